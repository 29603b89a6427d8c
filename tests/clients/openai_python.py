"""Drives a Lathe server with the stock `openai` SDK: all that it covers of the server's routes.

Run by run.py, and in the test suite by tests/it/openai_sdk.rs, which both give LATHE_URL, LATHE_KEY and LATHE_BASE_MODEL
(a ready causal model). The server must have a limit of requests per minute.
"""

import hashlib
import io
import json
import math
import os
import time

import httpx2
import openai

from step import expect, step

BASE_URL, KEY, BASE_MODEL = os.environ["LATHE_URL"] + "/v1", os.environ["LATHE_KEY"], os.environ["LATHE_BASE_MODEL"]
MESSAGES = [{"role": "user", "content": "3+1?"}]

# Requests sent, as an SDK sees them go.
sent = []
counting = openai.DefaultHttpxClient(event_hooks={"request": [sent.append]})
client = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=2, timeout=120, http_client=counting)


def refused(kind, call):
    """The exception of a call that must be refused, at its first try."""
    before = len(sent)
    try:
        call()
    except kind as error:
        expect(type(error) is kind and len(sent) == before + 1, error, sent[before:])
        expect(error.request_id.startswith("req_") and error.body["message"], error)
        return error
    raise AssertionError(f"{kind.__name__} was expected")


def wait_until(seen, what, pause=0.1):
    until = time.monotonic() + 120
    while not (value := seen()):
        expect(time.monotonic() < until, what)
        time.sleep(pause)
    return value


def rows():
    for a in range(40):
        yield {"messages": [{"role": "user", "content": f"{a}+1?"}, {"role": "assistant", "content": str(a + 1)}]}


def files():
    content = "\n".join(map(json.dumps, rows())).encode()
    file = client.files.create(file=("sums.jsonl", io.BytesIO(content)), purpose="fine-tune")
    expect(file.status == "processed" and file.bytes == len(content), file)
    expect(client.files.retrieve(file.id).filename == "sums.jsonl")
    expect(client.files.content(file.id).read() == content)
    expect(client.files.wait_for_processing(file.id).status == "processed")
    brief = client.files.create(file=("a.txt", b"a"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600})
    expect(brief.expires_at == brief.created_at + 3600, brief)
    expect([listed.id for listed in client.files.list(purpose="user_data", order="asc", limit=1)] == [brief.id])
    expect([listed.id for listed in client.files.list(limit=1)][:2] == [brief.id, file.id])
    expect(client.files.delete(brief.id).deleted)
    refused(openai.NotFoundError, lambda: client.files.retrieve(brief.id))
    return file, "created, read, listed page by page, deleted"


def uploads():
    content = b"one line\n" * 1000
    upload = client.uploads.create(filename="corpus.txt", purpose="fine-tune", bytes=len(content), mime_type="text/plain")
    expect(upload.status == "pending" and upload.object == "upload" and upload.file is None, upload)
    parts = [client.uploads.parts.create(upload.id, data=content[at : at + 4000]) for at in range(0, len(content), 4000)]
    expect({part.object for part in parts} == {"upload.part"} and parts[0].upload_id == upload.id, parts)
    done = client.uploads.complete(upload.id, part_ids=[part.id for part in parts], md5=hashlib.md5(content).hexdigest())
    expect(done.status == "completed" and done.file.bytes == len(content), done)
    expect(client.files.content(done.file.id).read() == content)
    whole = client.uploads.upload_file_chunked(file=content, filename="again.txt", bytes=len(content), mime_type="text/plain", purpose="fine-tune")
    expect(whole.status == "completed" and whole.file.filename == "again.txt", whole)
    given_up = client.uploads.create(filename="a", purpose="batch", bytes=1, mime_type="text/plain")
    expect(client.uploads.cancel(given_up.id).status == "cancelled")
    return "in parts, in chunks, given up"


def job():
    job = client.fine_tuning.jobs.create(
        model=BASE_MODEL,
        training_file=file.id,
        suffix="sums",
        seed=3,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8}}},
    )
    expect(job.object == "fine_tuning.job" and job.status in ("queued", "validating_files", "running"), job)
    expect(job.hyperparameters.n_epochs == 2 and job.seed == 3 and job.result_files == [], job)
    ended = ("succeeded", "failed", "cancelled")
    job = wait_until(lambda: (now := client.fine_tuning.jobs.retrieve(job.id)).status in ended and now, job)
    expect(job.status == "succeeded", job)
    expect(job.fine_tuned_model.startswith("ft:") and job.finished_at >= job.created_at and job.trained_tokens > 0, job)
    expect(job.id in [listed.id for listed in client.fine_tuning.jobs.list(limit=1)])
    again = refused(openai.ConflictError, lambda: client.fine_tuning.jobs.cancel(job.id))
    expect(again.code == "illegal_state", again)
    return job, job.status


def events():
    listed = list(client.fine_tuning.jobs.list_events(tuned.id, limit=2))
    expect(len({event.id for event in listed}) == len(listed) > 2 and listed[-1].message, listed)
    metrics = [event for event in listed if event.type == "metrics"]
    expect(metrics and {event.type for event in listed} == {"metrics", "message"}, listed)
    expect(metrics[0].data["step"] > metrics[-1].data["step"] > 0 and metrics[0].data["train_loss"] > 0, metrics)
    return f"{len(listed)}, two a page"


def checkpoints():
    listed = list(client.fine_tuning.jobs.checkpoints.list(tuned.id, limit=1))
    expect(listed and listed[0].fine_tuned_model_checkpoint.startswith(tuned.fine_tuned_model), listed)
    expect(len({checkpoint.id for checkpoint in listed}) == len(listed) and listed[0].step_number > 0, listed)
    return f"{len(listed)}, one a page"


def control():
    jobs = client.fine_tuning.jobs
    one = jobs.create(model=BASE_MODEL, training_file=file.id, hyperparameters={"n_epochs": 1000}, metadata={"from": "the sdk"})
    expect(one.metadata == {"from": "the sdk"} and one.hyperparameters.n_epochs == 1000 and one.method.type == "supervised", one)
    jobs.pause(one.id)
    paused = wait_until(lambda: (now := jobs.retrieve(one.id)).state == "paused" and now, one)
    expect(paused.status == "queued", paused)
    expect(jobs.resume(one.id).state in ("queued", "blocked"), one)
    jobs.cancel(one.id)
    ended = wait_until(lambda: (now := jobs.retrieve(one.id)).status == "cancelled" and now, one)
    expect(ended.fine_tuned_model is None and ended.error is None and ended.finished_at, ended)
    seen = [job.id for job in jobs.list(limit=1)]
    expect(one.id in seen and len(set(seen)) == len(seen) >= 2, seen)
    return "paused, resumed, cancelled"


def list_models():
    expect({tuned.fine_tuned_model, BASE_MODEL} <= {listed.id for listed in client.models.list()})
    expect(client.models.retrieve(tuned.fine_tuned_model).id == tuned.fine_tuned_model)
    return "listed and read"


def complete():
    ask = dict(model=BASE_MODEL, prompt="3+", temperature=0, max_tokens=6)
    whole = client.completions.create(**ask)
    expect(whole.object == "text_completion" and whole.usage.completion_tokens <= 6, whole)
    chunks = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    expect("".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text, chunks)
    expect(chunks[-1].choices == [] and chunks[-1].usage == whole.usage, chunks[-1])
    several = client.completions.create(model=BASE_MODEL, prompt=["1+", "2+"], n=2, max_tokens=2, seed=1)
    expect([choice.index for choice in several.choices] == [0, 1, 2, 3], several)
    scored = client.completions.create(model=BASE_MODEL, prompt="12+1", echo=True, logprobs=2, max_tokens=0).choices[0]
    expect(scored.text == "12+1" == "".join(scored.logprobs.tokens), scored)
    expect(scored.logprobs.token_logprobs[0] is None and all(score <= 0 for score in scored.logprobs.token_logprobs[1:]), scored)
    expect(len(scored.logprobs.top_logprobs[-1]) >= 2 and scored.logprobs.text_offset[0] == 0, scored)
    return "plain, streamed, several, scored"


def chat():
    ask = dict(model=tuned.fine_tuned_model, messages=MESSAGES, temperature=0, max_tokens=8)
    whole = client.chat.completions.create(**ask)
    expect(whole.choices[0].finish_reason in ("stop", "length") and whole.usage.total_tokens > 0, whole)
    conversation = [*MESSAGES, whole.choices[0].message, {"role": "user", "content": "and 5+1?"}]
    expect(client.chat.completions.create(**ask | {"messages": conversation, "max_tokens": 2}).usage.completion_tokens <= 2)
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    expect(text == whole.choices[0].message.content, text, whole)
    expect(chunks[-1].choices == [] and chunks[-1].usage == whole.usage, chunks[-1])
    with client.chat.completions.stream(**ask) as stream:
        expect("".join(event.delta for event in stream if event.type == "content.delta") == text)
    return "plain, with its answer sent back, streamed"


def logprobs():
    ask = dict(model=tuned.fine_tuned_model, messages=MESSAGES, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3)
    tokens = client.chat.completions.create(**ask).choices[0].logprobs.content
    expect(tokens and all(len(token.top_logprobs) == 3 and token.bytes is not None for token in tokens), tokens)
    expect(all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in tokens), "greedy takes the likeliest", tokens)
    expect(sum(math.exp(top.logprob) for top in tokens[0].top_logprobs) <= 1.001, tokens[0])
    chunks = client.chat.completions.create(**ask, stream=True)
    streamed = [token for chunk in chunks for choice in chunk.choices for token in (choice.logprobs.content if choice.logprobs else [])]
    expect([token.token for token in streamed] == [token.token for token in tokens], streamed, tokens)
    return f"{len(tokens)} tokens, plain and streamed alike"


def errors():
    create = client.fine_tuning.jobs.create
    unknown = refused(openai.BadRequestError, lambda: create(model=BASE_MODEL, training_file=file.id, extra_body={"colour": 1}))
    expect((unknown.param, unknown.type) == ("colour", "invalid_request_error"), unknown)
    missing = refused(openai.NotFoundError, lambda: client.chat.completions.create(model="missing", messages=MESSAGES))
    expect((missing.code, missing.param) == ("model_not_found", "model"), missing)
    untuned = refused(openai.BadRequestError, lambda: client.chat.completions.create(model=BASE_MODEL, messages=MESSAGES))
    expect(untuned.code == "no_chat_template", untuned)
    both = dict(model=tuned.fine_tuned_model, messages=MESSAGES, max_tokens=1, max_completion_tokens=1)
    refused(openai.UnprocessableEntityError, lambda: client.chat.completions.create(**both))
    refused(openai.AuthenticationError, client.with_options(api_key="sk-nobody").models.list)
    return "400, 401, 404, 409, 422; none is tried again"


def rate_limit():
    # A key of its own, since the others' requests would be refused too.
    created = client.post("/projects/proj_default/keys", cast_to=dict, body={"name": "spends its minute"})
    limited = client.with_options(api_key=created["key"])
    with openai.DefaultHttpxClient(headers={"Authorization": f"Bearer {created['key']}"}) as spender:
        while spender.get(f"{BASE_URL}/models?limit=1").status_code == 200:
            pass

    def spend():
        try:
            limited.with_options(max_retries=0).models.list()
        except openai.RateLimitError as error:
            return error

    # Meanwhile there may be room for one more.
    error = wait_until(spend, "a request too many", pause=0)
    expect(int(error.response.headers["retry-after"]) >= 1, error.response.headers)
    expect(error.response.headers["x-ratelimit-remaining-requests"] == "0", error.response.headers)
    expect(limited.models.list().data, "tried again after `Retry-After`")
    client.delete(f"/projects/proj_default/keys/{created['id']}", cast_to=dict)
    return f"{error.response.headers['x-ratelimit-limit-requests']} requests, a 429, and the next after Retry-After"


class LosesFirstAnswers(openai.DefaultHttpxClient):
    """Sends every request, and loses the answer to each one that is not a retry."""

    def send(self, request, **options):
        sent.append(request)
        answer = super().send(request, **options)
        if request.headers.get("x-stainless-retry-count") == "0":
            answer.close()
            raise httpx2.ReadError("the answer was lost on its way", request=request)
        return answer


def retries():
    lossy = client.with_options(http_client=LosesFirstAnswers())
    before, listed = len(sent), len(list(client.files.list()))
    twice = lossy.files.create(file=("twice.txt", b"sent twice"), purpose="user_data")
    job = lossy.fine_tuning.jobs.create(model=BASE_MODEL, training_file=file.id, suffix="once", hyperparameters={"n_epochs": 1000})
    expect([request.headers["x-stainless-retry-count"] for request in sent[-4:]] == ["0", "1", "0", "1"], sent[before:])
    expect(len(list(client.files.list())) == listed + 1, "a file whose answer was lost is made once")
    expect([one.user_provided_suffix for one in client.fine_tuning.jobs.list()].count("once") == 1)
    client.fine_tuning.jobs.cancel(job.id)
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "cancelled", job)
    client.files.delete(twice.id)
    return "an answer lost on its way: one file and one job all the same"


def delete():
    expect(client.models.delete(tuned.fine_tuned_model).deleted)
    refused(openai.NotFoundError, lambda: client.models.retrieve(tuned.fine_tuned_model))

    def deleted():
        try:
            return client.files.delete(file.id).deleted
        except openai.ConflictError:
            # The dataset of a job that was given up may still be read from the file.
            return False

    wait_until(deleted, "the file stays in use")
    return "model and file"


file = step("files", files)
step("uploads", uploads)
tuned = step("fine-tuning job", job)
step("its events", events)
step("its checkpoints", checkpoints)
step("pause, resume, cancel", control)
step("models", list_models)
step("completions", complete)
step("chat", chat)
step("chat with logprobs", logprobs)
step("errors", errors)
step("rate limit", rate_limit)
step("retries", retries)
step("deletion", delete)
