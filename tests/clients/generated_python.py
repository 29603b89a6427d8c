"""Drives a Lathe server with the Python client that openapi-generator makes of openapi/openapi.json.

Run by run.py, which gives LATHE_URL and LATHE_KEY and puts the client on PYTHONPATH.
"""

import json
import os

from lathe_client import (
    ApiClient,
    Configuration,
    CreateChatCompletion,
    CreateCompletion,
    CreateDataset,
    CreateTokenizer,
    DatasetsApi,
    ArchitectureName,
    ChatCompletionChunk,
    Completion,
    EventObject,
    FilesApi,
    FilesSource,
    FilesType,
    GenerationApi,
    HyperparametersBody,
    InstructionBody,
    InstructionMethod,
    InstructionType,
    Message,
    MessageContent,
    MessageRole,
    ModelBody,
    ModelsApi,
    PretrainBody,
    PretrainMethod,
    PretrainType,
    PromptField,
    Purpose,
    ShapeBody,
    SourceBody,
    TokenizersApi,
    TrainableType,
    TrainBody,
    TrainingApi,
    TrainTokenizer,
)
from lathe_client.exceptions import BadRequestException, NotFoundException, UnauthorizedException

from step import expect, step

configuration = Configuration(host=os.environ["LATHE_URL"], access_token=os.environ["LATHE_KEY"])
client = ApiClient(configuration)
files, datasets, tokenizers = FilesApi(client), DatasetsApi(client), TokenizersApi(client)
training, models, generation = TrainingApi(client), ModelsApi(client), GenerationApi(client)


def events_of(response, kind):
    """The server-sent events of an answer that was not read beforehand, each as `kind`."""
    for line in response:
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield kind.from_json(line[len(b"data: ") :])


def upload():
    rows = "".join(json.dumps({"instruction": f"Count one up from {n}.", "output": str(n + 1)}) + "\n" for n in range(200)).encode()
    file = files.create_file(file=("sums.jsonl", rows), purpose=Purpose.FINE_MINUS_TUNE)
    expect(file.bytes == len(rows) and file.filename == "sums.jsonl", file)
    expect(files.get_file_content(file.id) == rows)
    return file, f"{file.bytes} bytes"


def make_dataset():
    source = SourceBody(FilesSource(type=FilesType.FILES, files=[file.id]))
    dataset = datasets.create_dataset(CreateDataset(name="sums", source=source))
    return dataset, dataset.state.value


def make_tokenizer():
    body = TrainTokenizer(name="small", type=TrainableType.BPE, dataset=dataset.id, vocab_size=280)
    tokenizer = tokenizers.create_tokenizer(CreateTokenizer(body))
    return tokenizer, tokenizer.state.value


def pretrain():
    shape = ShapeBody(architecture=ArchitectureName.GPT, layers=1, heads=2, width=32, context=32)
    body = PretrainBody(
        name="base",
        dataset=dataset.id,
        tokenizer=tokenizer.id,
        method=PretrainMethod(type=PretrainType.PRETRAIN),
        model=ModelBody(shape),
        hyperparameters=HyperparametersBody(steps=30, batch_size=8),
    )
    job = training.create_training_job(TrainBody(body))
    return job, job.state.value


def tune():
    body = InstructionBody(
        name="counting",
        dataset=dataset.id,
        base_model=base.model,
        method=InstructionMethod(type=InstructionType.INSTRUCTION),
        hyperparameters=HyperparametersBody(steps=30, batch_size=8),
    )
    job = training.create_training_job(TrainBody(body))
    return job, job.state.value


def follow():
    response = training.list_training_events_without_preload_content(tuned.id, stream=True)
    seen = list(events_of(response, EventObject))
    expect([event.id for event in seen] == list(range(1, len(seen) + 1)), seen)
    expect(training.get_training_job(tuned.id).state.value == "succeeded", seen)
    later = training.list_training_events_without_preload_content(tuned.id, stream=True, last_event_id=seen[-2].id)
    expect([event.id for event in events_of(later, EventObject)] == [seen[-1].id])
    return f"{len(seen)} events, the last {seen[-1].code}"


def lists():
    first = training.list_training_jobs(limit=1)
    second = training.list_training_jobs(limit=1, after=first.last_id)
    expect([job.id for job in first.data + second.data] == [tuned.id, base.id], first, second)
    metrics = training.list_training_metrics(tuned.id)
    expect(metrics.data[-1].step == 30 and metrics.data[-1].loss > 0, metrics)
    expect(training.list_training_checkpoints(tuned.id).data)
    model = models.get_model(tuned.model)
    expect(model.state.value == "ready" and model.lineage.base_model == base.model, model)
    return f"{len(metrics.data)} metrics of a model of {model.parameters} parameters"


def chat():
    asked = CreateChatCompletion(
        model=tuned.model,
        messages=[Message(role=MessageRole.USER, content=MessageContent("Count one up from 3."))],
        temperature=0,
        max_tokens=8,
        logprobs=True,
        top_logprobs=2,
    )
    whole = generation.create_chat_completion(asked)
    expect(whole.choices[0].logprobs.content[0].logprob <= 0, whole)
    asked.stream = True
    chunks = list(events_of(generation.create_chat_completion_without_preload_content(asked), ChatCompletionChunk))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    expect(text == whole.choices[0].message.content, text, whole)
    return f"{len(chunks)} chunks, the text of the plain answer"


def complete():
    asked = CreateCompletion(model=base.model, prompt=PromptField("Count one"), temperature=0, max_tokens=8)
    whole = generation.create_completion(asked)
    asked.stream = True
    chunks = list(events_of(generation.create_completion_without_preload_content(asked), Completion))
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    expect(text == whole.choices[0].text, text, whole)
    return f"{len(chunks)} chunks, the text of the plain answer"


def refused(kind, call):
    try:
        call()
    except kind as error:
        return error.data.error
    raise AssertionError(f"{kind.__name__} was expected")


def refusals():
    missing = refused(NotFoundException, lambda: models.get_model("missing"))
    expect(missing.code == "model_not_found", missing)
    gone = refused(NotFoundException, lambda: files.list_files(after="file-missing"))
    expect(gone.param == "after", gone)
    asked = CreateChatCompletion(model=base.model, messages=[Message(role=MessageRole.USER, content=MessageContent("3?"))])
    wrong = refused(BadRequestException, lambda: generation.create_chat_completion(asked))
    expect(wrong.param == "model" and wrong.code == "no_chat_template", wrong)
    stranger = ModelsApi(ApiClient(Configuration(host=os.environ["LATHE_URL"], access_token="sk-nobody")))
    refused(UnauthorizedException, stranger.list_models)
    return "404, 400 and 401 as exceptions with the error's fields"


def delete():
    for delete, made in ((models.delete_model, tuned.model), (models.delete_model, base.model)):
        expect(delete(made).deleted, made)
    expect(files.delete_file(file.id).deleted, file)
    return "models and file"


file = step("upload", upload)
dataset = step("dataset", make_dataset)
tokenizer = step("tokenizer", make_tokenizer)
base = step("pretraining job", pretrain)
tuned = step("tuning job", tune)
step("events, streamed", follow)
step("lists", lists)
step("chat, plain and streamed", chat)
step("completion, plain and streamed", complete)
step("refusals", refusals)
step("deletion", delete)
