"""Drives a Lathe server with the stock `openai` SDK: files, a fine-tuning job, its events, models, chat.

Run by tests/it/openai_sdk.rs, which gives LATHE_URL, LATHE_KEY and LATHE_BASE_MODEL (a ready causal model).
"""

import hashlib
import io
import json
import os
import time

import openai

client = openai.OpenAI(base_url=os.environ["LATHE_URL"] + "/v1", api_key=os.environ["LATHE_KEY"], max_retries=1, timeout=120)
base_model = os.environ["LATHE_BASE_MODEL"]


def refused(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was expected")


def rows():
    for a in range(40):
        yield {"messages": [{"role": "user", "content": f"{a}+1?"}, {"role": "assistant", "content": str(a + 1)}]}


def check_files():
    content = "\n".join(map(json.dumps, rows())).encode()
    file = client.files.create(file=("sums.jsonl", io.BytesIO(content)), purpose="fine-tune")
    assert file.status == "processed" and file.bytes == len(content), file
    assert client.files.retrieve(file.id).filename == "sums.jsonl"
    assert client.files.content(file.id).read() == content
    assert file.id in [listed.id for listed in client.files.list()]
    refused(openai.NotFoundError, lambda: client.files.retrieve("file-missing"))
    return file


def check_uploads():
    content = b"one line\n" * 1000
    upload = client.uploads.create(filename="corpus.txt", purpose="fine-tune", bytes=len(content), mime_type="text/plain")
    assert upload.status == "pending" and upload.object == "upload" and upload.file is None, upload
    parts = [client.uploads.parts.create(upload.id, data=content[at : at + 4000]) for at in range(0, len(content), 4000)]
    assert {part.object for part in parts} == {"upload.part"} and parts[0].upload_id == upload.id, parts
    done = client.uploads.complete(upload.id, part_ids=[part.id for part in parts], md5=hashlib.md5(content).hexdigest())
    assert done.status == "completed" and done.file.bytes == len(content), done
    assert client.files.content(done.file.id).read() == content
    whole = client.uploads.upload_file_chunked(file=content, filename="again.txt", bytes=len(content), mime_type="text/plain", purpose="fine-tune")
    assert whole.status == "completed" and whole.file.filename == "again.txt", whole
    given_up = client.uploads.create(filename="a", purpose="batch", bytes=1, mime_type="text/plain")
    assert client.uploads.cancel(given_up.id).status == "cancelled"
    brief = client.files.create(file=("a.txt", b"a"), purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600})
    assert brief.expires_at == brief.created_at + 3600, brief
    assert [listed.id for listed in client.files.list(purpose="user_data", order="asc", limit=1)] == [brief.id]


def check_control(file):
    jobs = client.fine_tuning.jobs
    one = jobs.create(model=base_model, training_file=file.id, hyperparameters={"n_epochs": 1000}, metadata={"from": "the sdk"})
    assert one.metadata == {"from": "the sdk"} and one.hyperparameters.n_epochs == 1000 and one.method.type == "supervised", one
    jobs.pause(one.id)
    until = time.monotonic() + 60
    while (paused := jobs.retrieve(one.id)).state != "paused":
        assert time.monotonic() < until, paused
        time.sleep(0.1)
    assert paused.status == "queued", paused
    assert jobs.resume(one.id).state in ("queued", "blocked"), one
    jobs.cancel(one.id)
    while (ended := jobs.retrieve(one.id)).status != "cancelled":
        assert time.monotonic() < until, ended
        time.sleep(0.1)
    assert ended.fine_tuned_model is None and ended.error is None and ended.finished_at, ended
    seen = [job.id for job in jobs.list(limit=1)]
    assert one.id in seen and len(set(seen)) == len(seen) >= 2, seen


def check_job(file):
    job = client.fine_tuning.jobs.create(
        model=base_model,
        training_file=file.id,
        suffix="sums",
        seed=3,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8}}},
    )
    assert job.object == "fine_tuning.job" and job.status in ("queued", "validating_files", "running"), job
    assert job.hyperparameters.n_epochs == 2 and job.seed == 3 and job.result_files == []
    until = time.monotonic() + 120
    while job.status not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < until, job
        time.sleep(0.1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job
    assert job.fine_tuned_model.startswith("ft:") and job.finished_at >= job.created_at and job.trained_tokens > 0
    assert job.id in [listed.id for listed in client.fine_tuning.jobs.list(limit=1)]
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert len({event.id for event in events}) == len(events) > 2 and events[-1].message
    metrics = [event for event in events if event.type == "metrics"]
    assert metrics and {event.type for event in events} == {"metrics", "message"}, events
    assert metrics[0].data["step"] > metrics[-1].data["step"] > 0 and metrics[0].data["train_loss"] > 0, metrics
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert checkpoints and checkpoints[0].fine_tuned_model_checkpoint.startswith(job.fine_tuned_model)
    again = refused(openai.ConflictError, lambda: client.fine_tuning.jobs.cancel(job.id))
    assert again.code == "illegal_state", again
    unknown = refused(openai.BadRequestError, lambda: client.fine_tuning.jobs.create(model=base_model, training_file=file.id, extra_body={"colour": 1}))
    assert unknown.param == "colour", unknown
    return job.fine_tuned_model


def check_chat(model):
    assert model in [listed.id for listed in client.models.list()]
    assert client.models.retrieve(model).id == model
    messages = [{"role": "user", "content": "3+1?"}]
    whole = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=8)
    assert whole.choices[0].finish_reason in ("stop", "length") and whole.usage.total_tokens > 0
    stream = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=8, stream=True, stream_options={"include_usage": True})
    text, usage = "", None
    for chunk in stream:
        usage = chunk.usage or usage
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text == (whole.choices[0].message.content or ""), (text, whole)
    assert usage.completion_tokens == whole.usage.completion_tokens, usage
    conversation = [*messages, whole.choices[0].message, {"role": "user", "content": "and 5+1?"}]
    assert client.chat.completions.create(model=model, messages=conversation, temperature=0, max_tokens=2).usage.completion_tokens <= 2
    missing = refused(openai.NotFoundError, lambda: client.chat.completions.create(model="missing", messages=messages))
    assert (missing.code, missing.param) == ("model_not_found", "model"), missing


file = check_files()
check_uploads()
model = check_job(file)
check_chat(model)
check_control(file)
assert client.models.delete(model).deleted
refused(openai.NotFoundError, lambda: client.models.retrieve(model))
# The dataset of the job that was given up may still be read from the file.
until = time.monotonic() + 60
while True:
    try:
        assert client.files.delete(file.id).deleted
        break
    except openai.ConflictError:
        assert time.monotonic() < until, "the file stays in use"
        time.sleep(0.1)
print("the openai SDK", openai.__version__, "is content")
