// Drives a Lathe server with the TypeScript client that @hey-api/openapi-ts makes of openapi/openapi.json.
//
// Run by run.py, which gives LATHE_URL and LATHE_KEY.
import { strict as assert } from 'node:assert';

import { client } from '../../openapi/sdk/typescript/plain/client.gen.ts';
import * as lathe from '../../openapi/sdk/typescript/plain/index.ts';
import { client as streamClient } from '../../openapi/sdk/typescript/streams/client.gen.ts';
import * as streams from '../../openapi/sdk/typescript/streams/index.ts';
import { given, step } from './step.ts';

const config = { baseUrl: given('LATHE_URL'), auth: given('LATHE_KEY') };
client.setConfig({ ...config, throwOnError: true });
streamClient.setConfig(config);

/** Options of every stream: no second try, and a failure is the caller's. */
function streamOptions() {
  return {
    sseMaxRetryAttempts: 1,
    onSseError: (error: unknown) => {
      throw error;
    },
  };
}

/** What came, without `[DONE]`, which is text. */
async function collected<T>(stream: AsyncIterable<T>): Promise<T[]> {
  const seen: T[] = [];
  for await (const event of stream) if (typeof event === 'object') seen.push(event);
  return seen;
}

/** A job, with the id of the model that it will make. */
async function started(body: lathe.TrainBody) {
  const { data } = await lathe.createTrainingJob({ body, throwOnError: true });
  assert(data.model);
  return [{ id: data.id, model: data.model }, data.state] as const;
}

const rows = Array.from({ length: 200 }, (_, n) => JSON.stringify({ instruction: `Count one up from ${n}.`, output: `${n + 1}` }) + '\n').join('');

const file = await step('upload', async () => {
  const upload = new File([rows], 'sums.jsonl');
  const { data } = await lathe.createFile({ body: { file: upload, purpose: 'fine-tune' }, throwOnError: true });
  assert.equal(data.filename, 'sums.jsonl');
  const content = await lathe.getFileContent({ path: { file_id: data.id }, parseAs: 'text', throwOnError: true });
  assert.equal(content.data, rows);
  return [data, `${data.bytes} bytes`] as const;
});

const dataset = await step('dataset', async () => {
  const body = { name: 'sums', source: { type: 'files' as const, files: [file.id] } };
  const { data } = await lathe.createDataset({ body, throwOnError: true });
  return [data, data.state] as const;
});

const tokenizer = await step('tokenizer', async () => {
  const body = { name: 'small', type: 'bpe' as const, dataset: dataset.id, vocab_size: 280 };
  const { data } = await lathe.createTokenizer({ body, throwOnError: true });
  return [data, data.state] as const;
});

const base = await step('pretraining job', async () => {
  const body: lathe.TrainBody = {
    name: 'base',
    dataset: dataset.id,
    tokenizer: tokenizer.id,
    method: { type: 'pretrain' },
    model: { architecture: 'gpt', layers: 1, heads: 2, width: 32, context: 32 },
    hyperparameters: { steps: 30, batch_size: 8 },
  };
  return await started(body);
});

const tuned = await step('tuning job', async () => {
  const body: lathe.TrainBody = {
    name: 'counting',
    dataset: dataset.id,
    base_model: base.model,
    method: { type: 'instruction' },
    hyperparameters: { steps: 30, batch_size: 8 },
  };
  return await started(body);
});

await step('events, streamed', async () => {
  const path = { job_id: tuned.id };
  const { stream } = await streams.listTrainingEvents({ path, query: { stream: true }, ...streamOptions() });
  const seen = await collected(stream);
  assert.deepEqual(seen.map((event) => event.id), seen.map((_, index) => index + 1));
  const ended = await lathe.getTrainingJob({ path, throwOnError: true });
  assert.equal(ended.data.state, 'succeeded');
  const later = await streams.listTrainingEvents({
    path,
    query: { stream: true },
    headers: { 'Last-Event-ID': seen.length - 1 },
    ...streamOptions(),
  });
  assert.deepEqual((await collected(later.stream)).map((event) => event.id), [seen.length]);
  return [undefined, `${seen.length} events, the last ${seen.at(-1)?.code}`] as const;
});

await step('lists', async () => {
  const first = await lathe.listTrainingJobs({ query: { limit: 1 }, throwOnError: true });
  const after = first.data.last_id ?? '';
  const second = await lathe.listTrainingJobs({ query: { limit: 1, after }, throwOnError: true });
  assert.deepEqual([...first.data.data, ...second.data.data].map((job) => job.id), [tuned.id, base.id]);
  const metrics = await lathe.listTrainingMetrics({ path: { job_id: tuned.id }, throwOnError: true });
  assert.equal(metrics.data.data.at(-1)?.step, 30);
  const model = await lathe.getModel({ path: { model: tuned.model }, throwOnError: true });
  assert.equal(model.data.lineage.base_model, base.model);
  return [undefined, `${metrics.data.data.length} metrics of a model of ${model.data.parameters} parameters`] as const;
});

await step('chat, plain and streamed', async () => {
  const body: lathe.CreateChatCompletion = {
    model: tuned.model,
    messages: [{ role: 'user', content: 'Count one up from 3.' }],
    temperature: 0,
    max_tokens: 8,
    logprobs: true,
    top_logprobs: 2,
  };
  const { data } = await lathe.createChatCompletion({ body, throwOnError: true });
  assert(data.choices[0].logprobs!.content[0].logprob <= 0);
  const { stream } = await streams.createChatCompletion({ body: { ...body, stream: true }, ...streamOptions() });
  const chunks = await collected(stream);
  const text = chunks.flatMap((chunk) => chunk.choices.map((choice) => choice.delta.content ?? '')).join('');
  assert.equal(text, data.choices[0].message.content);
  return [undefined, `${chunks.length} chunks, the text of the plain answer`] as const;
});

await step('completion, plain and streamed', async () => {
  const body: lathe.CreateCompletion = { model: base.model, prompt: 'Count one', temperature: 0, max_tokens: 8 };
  const { data } = await lathe.createCompletion({ body, throwOnError: true });
  const { stream } = await streams.createCompletion({ body: { ...body, stream: true }, ...streamOptions() });
  const chunks = await collected(stream);
  assert.equal(chunks.flatMap((chunk) => chunk.choices.map((choice) => choice.text)).join(''), data.choices[0].text);
  return [undefined, `${chunks.length} chunks, the text of the plain answer`] as const;
});

await step('refusals', async () => {
  const missing = await lathe.getModel({ path: { model: 'missing' }, throwOnError: false });
  assert.equal(missing.response?.status, 404);
  assert.equal(missing.error?.error.code, 'model_not_found');
  const gone = await lathe.listFiles({ query: { after: 'file-missing' }, throwOnError: false });
  assert.equal(gone.response?.status, 404);
  assert.equal(gone.error?.error.param, 'after');
  const asked = { model: base.model ?? '', messages: [{ role: 'user' as const, content: '3?' }] };
  const wrong = await lathe.createChatCompletion({ body: asked, throwOnError: false });
  assert.equal(wrong.response?.status, 400);
  assert.equal(wrong.error?.error.code, 'no_chat_template');
  const stranger = await lathe.listModels({ auth: 'sk-nobody', throwOnError: false });
  assert.equal(stranger.response?.status, 401);
  return [undefined, "404, 400 and 401 with the error's fields"] as const;
});

await step('deletion', async () => {
  for (const model of [tuned.model, base.model]) await lathe.deleteModel({ path: { model }, throwOnError: true });
  await lathe.deleteFile({ path: { file_id: file.id }, throwOnError: true });
  return [undefined, 'models and file'] as const;
});
