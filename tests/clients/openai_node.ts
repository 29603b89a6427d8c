// Drives a Lathe server with the stock `openai` SDK: all that it covers of the server's routes.
//
// Run by run.py, which gives LATHE_URL, LATHE_KEY and LATHE_BASE_MODEL (a ready causal model). The
// server must have a limit of requests per minute.
import { strict as assert } from 'node:assert';
import { createHash } from 'node:crypto';
import { setTimeout as pause } from 'node:timers/promises';

import OpenAI, { toFile } from 'openai';

import { given, step } from './step.ts';

const BASE_MODEL = given('LATHE_BASE_MODEL');
const MESSAGES: OpenAI.ChatCompletionMessageParam[] = [{ role: 'user', content: '3+1?' }];

/** Retry counts of the requests sent, as the SDK states them. */
const sent: string[] = [];

const counting: typeof fetch = (url, init) => {
  sent.push(new Headers(init?.headers).get('x-stainless-retry-count') ?? '');
  return fetch(url, init);
};

const client = new OpenAI({ baseURL: `${given('LATHE_URL')}/v1`, apiKey: given('LATHE_KEY'), maxRetries: 2, fetch: counting });

/** The exception of a call that must be refused, at its first try. */
async function refused<T extends InstanceType<typeof OpenAI.APIError>>(
  kind: new (...given: never[]) => T,
  call: () => Promise<unknown>,
): Promise<T> {
  const before = sent.length;
  const error: unknown = await call().then(
    () => assert.fail(`${kind.name} was expected`),
    (error) => error,
  );
  assert(error instanceof kind, String(error));
  assert.equal(sent.length, before + 1);
  assert.match(error.requestID ?? '', /^req_/);
  return error;
}

async function all<T>(items: AsyncIterable<T>): Promise<T[]> {
  const seen: T[] = [];
  for await (const item of items) seen.push(item);
  return seen;
}

async function waitUntil<T>(look: () => Promise<T | undefined | false>, what: string, every = 100): Promise<T> {
  const until = Date.now() + 120_000;
  for (;;) {
    const value = await look();
    if (value) return value;
    assert(Date.now() < until, what);
    await pause(every);
  }
}

const rows = Array.from({ length: 40 }, (_, a) => ({
  messages: [
    { role: 'user', content: `${a}+1?` },
    { role: 'assistant', content: `${a + 1}` },
  ],
}));

const file = await step('files', async () => {
  const content = rows.map((row) => JSON.stringify(row)).join('\n');
  const file = await client.files.create({ file: await toFile(Buffer.from(content), 'sums.jsonl'), purpose: 'fine-tune' });
  assert.deepEqual([file.bytes, file.filename], [content.length, 'sums.jsonl']);
  assert.equal(await (await client.files.content(file.id)).text(), content);
  const brief = await client.files.create({
    file: await toFile(Buffer.from('a'), 'a.txt'),
    purpose: 'user_data',
    expires_after: { anchor: 'created_at', seconds: 3600 },
  });
  assert.equal(brief.expires_at, brief.created_at + 3600);
  const listed = await all(client.files.list({ limit: 1 }));
  assert.deepEqual(listed.slice(0, 2).map((one) => one.id), [brief.id, file.id]);
  assert((await client.files.delete(brief.id)).deleted);
  await refused(OpenAI.NotFoundError, () => client.files.retrieve(brief.id));
  return [file, 'created, read, listed page by page, deleted'] as const;
});

await step('uploads', async () => {
  const content = Buffer.from('one line\n'.repeat(1000));
  const about = { filename: 'corpus.txt', purpose: 'fine-tune' as const, mime_type: 'text/plain' };
  const upload = await client.uploads.create({ ...about, bytes: content.length });
  assert.equal(upload.status, 'pending');
  const parts: string[] = [];
  for (let at = 0; at < content.length; at += 4000) {
    const data = await toFile(content.subarray(at, at + 4000), 'part');
    parts.push((await client.uploads.parts.create(upload.id, { data })).id);
  }
  const md5 = createHash('md5').update(content).digest('hex');
  const done = await client.uploads.complete(upload.id, { part_ids: parts, md5 });
  assert.deepEqual([done.status, done.file?.bytes], ['completed', content.length]);
  const givenUp = await client.uploads.create({ ...about, bytes: 1 });
  assert.equal((await client.uploads.cancel(givenUp.id)).status, 'cancelled');
  return [undefined, 'in parts, given up'] as const;
});

const tuned = await step('fine-tuning job', async () => {
  const job = await client.fineTuning.jobs.create({
    model: BASE_MODEL,
    training_file: file.id,
    suffix: 'sums',
    seed: 3,
    method: { type: 'supervised', supervised: { hyperparameters: { n_epochs: 2, batch_size: 8 } } },
  });
  const ended = await waitUntil(async () => {
    const now = await client.fineTuning.jobs.retrieve(job.id);
    return ['succeeded', 'failed', 'cancelled'].includes(now.status) && now;
  }, 'the job ends');
  assert.equal(ended.status, 'succeeded', JSON.stringify(ended.error));
  assert.match(ended.fine_tuned_model ?? '', /^ft:/);
  assert((await all(client.fineTuning.jobs.list({ limit: 1 }))).some((one) => one.id === job.id));
  const again = await refused(OpenAI.ConflictError, () => client.fineTuning.jobs.cancel(job.id));
  assert.equal(again.code, 'illegal_state');
  return [{ id: job.id, model: ended.fine_tuned_model ?? '' }, ended.status] as const;
});

await step('its events', async () => {
  const listed = await all(client.fineTuning.jobs.listEvents(tuned.id, { limit: 2 }));
  assert(listed.length > 2 && new Set(listed.map((event) => event.id)).size === listed.length);
  assert.deepEqual(new Set(listed.map((event) => event.type)), new Set(['message', 'metrics']));
  return [undefined, `${listed.length}, two a page`] as const;
});

await step('its checkpoints', async () => {
  const listed = await all(client.fineTuning.jobs.checkpoints.list(tuned.id, { limit: 1 }));
  assert(listed.length > 0 && listed[0].fine_tuned_model_checkpoint.startsWith(tuned.model));
  assert.equal(new Set(listed.map((checkpoint) => checkpoint.id)).size, listed.length);
  return [undefined, `${listed.length}, one a page`] as const;
});

await step('pause, resume, cancel', async () => {
  const { jobs } = client.fineTuning;
  const one = await jobs.create({ model: BASE_MODEL, training_file: file.id, hyperparameters: { n_epochs: 1000 } });
  await jobs.pause(one.id);
  // A paused job is `queued` in OpenAI's words; `state` is Lathe's own.
  await waitUntil(async () => (await jobs.retrieve(one.id) as { state?: string }).state === 'paused', 'the job pauses');
  assert.equal((await jobs.resume(one.id)).status, 'queued');
  await jobs.cancel(one.id);
  const ended = await waitUntil(async () => {
    const now = await jobs.retrieve(one.id);
    return now.status === 'cancelled' && now;
  }, 'the job is cancelled');
  assert.deepEqual([ended.fine_tuned_model, ended.error], [null, null]);
  return [undefined, 'paused, resumed, cancelled'] as const;
});

await step('models', async () => {
  const listed = (await all(client.models.list())).map((model) => model.id);
  assert(listed.includes(tuned.model) && listed.includes(BASE_MODEL));
  assert.equal((await client.models.retrieve(tuned.model)).id, tuned.model);
  return [undefined, 'listed and read'] as const;
});

await step('completions', async () => {
  const ask = { model: BASE_MODEL, prompt: '3+', temperature: 0, max_tokens: 6 };
  const whole = await client.completions.create(ask);
  const chunks = await all(await client.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } }));
  assert.equal(chunks.flatMap((chunk) => chunk.choices.map((choice) => choice.text)).join(''), whole.choices[0].text);
  assert.deepEqual(chunks.at(-1)?.usage, whole.usage);
  const several = await client.completions.create({ model: BASE_MODEL, prompt: ['1+', '2+'], n: 2, max_tokens: 2, seed: 1 });
  assert.deepEqual(several.choices.map((choice) => choice.index), [0, 1, 2, 3]);
  const [scored] = (await client.completions.create({ model: BASE_MODEL, prompt: '12+1', echo: true, logprobs: 2, max_tokens: 0 })).choices;
  assert.equal(scored.logprobs?.tokens?.join(''), '12+1');
  assert.equal(scored.logprobs?.token_logprobs?.[0], null);
  return [undefined, 'plain, streamed, several, scored'] as const;
});

await step('chat', async () => {
  const ask = { model: tuned.model, messages: MESSAGES, temperature: 0, max_tokens: 8 };
  const whole = await client.chat.completions.create(ask);
  const text = whole.choices[0].message.content;
  const messages = [...MESSAGES, whole.choices[0].message, { role: 'user' as const, content: 'and 5+1?' }];
  assert(((await client.chat.completions.create({ ...ask, messages, max_tokens: 2 })).usage?.completion_tokens ?? 3) <= 2);
  const chunks = await all(await client.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } }));
  assert.equal(chunks.flatMap((chunk) => chunk.choices.map((choice) => choice.delta.content ?? '')).join(''), text);
  assert.deepEqual(chunks.at(-1)?.usage, whole.usage);
  const stream = client.chat.completions.stream(ask);
  assert.equal(await stream.finalContent(), text);
  return [undefined, 'plain, with its answer sent back, streamed'] as const;
});

await step('chat with logprobs', async () => {
  const ask = { model: tuned.model, messages: MESSAGES, temperature: 0, max_tokens: 8, logprobs: true, top_logprobs: 3 };
  const tokens = (await client.chat.completions.create(ask)).choices[0].logprobs?.content ?? [];
  assert(tokens.length > 0 && tokens.every((token) => token.top_logprobs.length === 3));
  assert(tokens.every((token) => token.logprob === token.top_logprobs[0].logprob && token.logprob <= 0));
  const chunks = await all(await client.chat.completions.create({ ...ask, stream: true }));
  const streamed = chunks.flatMap((chunk) => chunk.choices.flatMap((choice) => choice.logprobs?.content ?? []));
  assert.deepEqual(streamed.map((token) => token.token), tokens.map((token) => token.token));
  return [undefined, `${tokens.length} tokens, plain and streamed alike`] as const;
});

await step('errors', async () => {
  const body = { model: BASE_MODEL, training_file: file.id, colour: 1 };
  const unknown = await refused(OpenAI.BadRequestError, () => client.fineTuning.jobs.create(body));
  assert.deepEqual([unknown.param, unknown.type], ['colour', 'invalid_request_error']);
  const chat = (ask: object) => client.chat.completions.create({ model: tuned.model, messages: MESSAGES, ...ask });
  const missing = await refused(OpenAI.NotFoundError, () => chat({ model: 'missing' }));
  assert.deepEqual([missing.code, missing.param], ['model_not_found', 'model']);
  assert.equal((await refused(OpenAI.BadRequestError, () => chat({ model: BASE_MODEL }))).code, 'no_chat_template');
  await refused(OpenAI.UnprocessableEntityError, () => chat({ max_tokens: 1, max_completion_tokens: 1 }));
  const stranger = client.withOptions({ apiKey: 'sk-nobody' });
  await refused(OpenAI.AuthenticationError, () => stranger.models.list());
  return [undefined, '400, 401, 404, 409, 422; none is tried again'] as const;
});

await step('rate limit', async () => {
  // A key of its own, since the others' requests would be refused too.
  const keys = '/projects/proj_default/keys';
  const created: { id: string; key: string } = await client.post(keys, { body: { name: 'spends its minute' } });
  const limited = client.withOptions({ apiKey: created.key });
  const spend = () => fetch(`${client.baseURL}/models?limit=1`, { headers: { Authorization: `Bearer ${created.key}` } });
  for (let answer = await spend(); answer.status === 200; answer = await spend()) await answer.arrayBuffer();
  // Meanwhile there may be room for one more.
  const error = await waitUntil(async () => {
    try {
      await limited.withOptions({ maxRetries: 0 }).models.list();
    } catch (error) {
      assert(error instanceof OpenAI.RateLimitError, String(error));
      return error;
    }
  }, 'a request too many', 0);
  assert(Number(error.headers?.get('retry-after')) >= 1);
  assert.equal(error.headers?.get('x-ratelimit-remaining-requests'), '0');
  assert((await limited.models.list()).data.length > 0, 'tried again after Retry-After');
  await client.delete(`${keys}/${created.id}`);
  const limit = error.headers?.get('x-ratelimit-limit-requests');
  return [undefined, `${limit} requests, a 429, and the next after Retry-After`] as const;
});

await step('retries', async () => {
  /** Sends every request, and loses the answer to each one that is not a retry. */
  const losing: typeof fetch = async (url, init) => {
    const answer = await counting(url, init);
    if (sent.at(-1) === '0') throw new TypeError('the answer was lost on its way');
    return answer;
  };
  const lossy = client.withOptions({ fetch: losing });
  const before = (await all(client.files.list())).length;
  const twice = await lossy.files.create({ file: await toFile(Buffer.from('sent twice'), 'twice.txt'), purpose: 'user_data' });
  const job = await lossy.fineTuning.jobs.create({
    model: BASE_MODEL,
    training_file: file.id,
    suffix: 'once-node',
    hyperparameters: { n_epochs: 1000 },
  });
  assert.deepEqual(sent.slice(-4), ['0', '1', '0', '1']);
  assert.equal((await all(client.files.list())).length, before + 1);
  const jobs = (await all(client.fineTuning.jobs.list())) as { user_provided_suffix?: string | null }[];
  assert.equal(jobs.filter((one) => one.user_provided_suffix === 'once-node').length, 1);
  await client.fineTuning.jobs.cancel(job.id);
  await waitUntil(async () => (await client.fineTuning.jobs.retrieve(job.id)).status === 'cancelled', 'the job is cancelled');
  await client.files.delete(twice.id);
  return [undefined, 'an answer lost on its way: one file and one job all the same'] as const;
});

await step('deletion', async () => {
  assert((await client.models.delete(tuned.model)).deleted);
  await refused(OpenAI.NotFoundError, () => client.models.retrieve(tuned.model));
  await waitUntil(async () => {
    try {
      return (await client.files.delete(file.id)).deleted;
    } catch (error) {
      // The dataset of a job that was given up may still be read from the file.
      if (error instanceof OpenAI.ConflictError) return false;
      throw error;
    }
  }, 'the file stays in use');
  return [undefined, 'model and file'] as const;
});
