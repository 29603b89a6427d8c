"""What schemathesis is told: the document with the ids of its examples replaced, the two identities, and schemathesis.toml.

All checks are on, for all operations. What is told beyond that is which ids there are, and which refusals of valid data
are allowed (docs/contract.md says why).
"""

import json
import re
from pathlib import Path

from made import Made
from stack import KEY

# Which ids an operation draws from for a part of its request; the others draw nothing from here.
DRAWN = {
    ("path.file_id", "file"): r"get_file|get_file_content",
    ("path.file_id", "file_to_delete"): "delete_file",
    ("path.dataset_id", "dataset"): "get_dataset|get_dataset_statistics|list_dataset_rows|list_dataset_errors",
    ("path.dataset_id", "dataset_to_delete"): "delete_dataset",
    ("query.tokenizer", "tokenizer"): "get_dataset_statistics",
    ("path.tokenizer_id", "tokenizer"): "get_tokenizer|encode_text|decode_ids|count_tokens",
    ("path.tokenizer_id", "tokenizer_to_delete"): "delete_tokenizer",
    ("path.job_id", "job"): "get_training_job|list_training_.+|get_training_logs",
    ("path.job_id", "job_to_cancel"): "cancel_training_job",
    ("path.job_id", "job_to_pause"): "pause_training_job",
    ("path.job_id", "job_to_resume"): "resume_training_job",
    ("path.job_id", "job_to_delete"): "delete_training_job",
    ("path.job_id", "tuning_job"): "get_fine_tuning_job|list_fine_tuning_(events|checkpoints)",
    ("path.job_id", "tuning_job_to_cancel"): "cancel_fine_tuning_job",
    ("path.job_id", "tuning_job_to_pause"): "pause_fine_tuning_job",
    ("path.job_id", "tuning_job_to_resume"): "resume_fine_tuning_job",
    ("path.model", "model"): "get_model",
    ("path.model", "model_to_delete"): "delete_model",
    ("path.upload_id", "upload_to_complete"): "complete_upload",
    ("path.upload_id", "upload_to_cancel"): "cancel_upload",
    ("path.upload_id", "upload_to_fill"): "create_upload_part",
    ("path.project_id", "project"): "get_project|get_project_usage|list_keys",
    ("path.project_id", "project_to_change"): "update_project",
    ("path.project_id", "project_of_keys"): "create_key|delete_key",
    ("path.key_id", "key_to_delete"): "delete_key",
    ("body.model", "model"): "create_completion|create_fine_tuning_job",
    ("body.model", "chat_model"): "create_chat_completion",
    ("body.training_file", "file"): "create_fine_tuning_job",
    ("body.validation_file", "file"): "create_fine_tuning_job",
    ("body.dataset", "dataset"): "create_tokenizer|create_training_job",
    ("body.file", "file"): "create_tokenizer",
    ("body.tokenizer", "tokenizer"): "create_training_job",
    ("body.base_model", "model"): "create_training_job",
    ("body.source.files[*]", "file"): "create_dataset",
    ("body.source.exclude[*]", "dataset"): "create_dataset",
}

# How often they are drawn; otherwise schemathesis invents an id, or takes one from an earlier answer.
DRAWN_SHARE = 0.8

# Answers to valid data besides 2xx: an id that is drawn is unknown, or what it names is in another state.
VALID = ["2xx", "404", "409"]
# The issue of a creation may be decided by more than the schema can say.
VALID_CREATION = [*VALID, "413", "422", "429", "507"]


def drawn(operation: str) -> dict[str, str]:
    return {part: use for (part, use), operations in DRAWN.items() if re.fullmatch(operations, operation)}


def document(text: str, made: Made) -> dict:
    """The document with real ids in its examples, so that these can be carried out, and with streams of events described
    as OpenAPI 3.2 does: what the document gives as the shape of a stream is that of each event's data."""
    known = {"file-": "file", "ds_": "dataset", "tok_": "tokenizer", "model-": "chat_model"}

    def real(match: re.Match) -> str:
        return f'"{made.ids[known[match[1]]][0]}"'

    def replaced(value):
        if isinstance(value, dict):
            return {key: json.loads(re.sub(r'"(file-|ds_|tok_|model-)[0-9A-Z…]*"', real, json.dumps(inner, ensure_ascii=False)))
                    if key in ("example", "examples") else replaced(inner) for key, inner in value.items()}
        return [replaced(inner) for inner in value] if isinstance(value, list) else value

    stated = replaced(json.loads(text))
    for _, _, operation in operations(stated):
        for response in operation["responses"].values():
            if stream := response.get("content", {}).get("text/event-stream"):
                stream["itemSchema"] = event(stream.pop("schema"))
    return stated


def event(schema: dict) -> dict:
    """A server-sent event with data of this schema, or an error's, or the end of OpenAI's streams."""
    either = {"anyOf": [schema, {"$ref": "#/components/schemas/ErrorBody"}]}
    data = {"type": "string", "if": {"const": "[DONE]"}, "else": {"contentMediaType": "application/json", "contentSchema": either}}
    return {"type": "object", "required": ["data"], "properties": {"data": data}}


def toml(value) -> str:
    """Strings, numbers, lists and booleans are written alike in TOML and JSON."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


def operations(stated: dict) -> list[tuple[str, str, dict]]:
    """Operation id, label and description of every operation."""
    methods = ("get", "put", "post", "delete", "patch", "head")
    return [(operation["operationId"], f"{method.upper()} {path}", operation)
            for path, item in stated["paths"].items() for method, operation in item.items() if method in methods]


def write(folder: Path, stated: dict, made: Made) -> None:
    """The files of a run into `folder`: `document.json`, `auth.json`, `made.json`, `schemathesis.toml`."""
    (folder / "document.json").write_text(json.dumps(stated))
    bearer = {"owner": KEY, "stranger": made.stranger}
    identities = [{"name": name, "fixedHeaders": [{"name": "Authorization", "value": f"Bearer {key}"}]} for name, key in bearer.items()]
    (folder / "auth.json").write_text(json.dumps({"auth": identities}))
    (folder / "made.json").write_text(json.dumps({"uploads": made.uploads, "kept_keys": made.kept_keys, "authorization": f"Bearer {KEY}", "ids": made.ids}))
    lines = ["continue-on-failure = true", "request-timeout = 10", "max-stream-events = 50",
             # The key is this server's alone, and a line of curl is to be sent as it stands.
             "[output.sanitization]", "enabled = false",
             "[phases.stateful]", "max-steps = 20",
             "[auth.wfc]", f"path = {toml(str(folder / 'auth.json'))}", 'user = "owner"', 'peers = ["owner", "stranger"]',
             "[checks.positive_data_acceptance]", f"expected-statuses = {toml(VALID)}", "[dictionaries]"]
    lines += [f"{use} = {toml({'values': ids})}" for use, ids in made.ids.items()]
    for name, _, operation in operations(stated):
        bound = {part: {"dictionary": use, "probability": DRAWN_SHARE} for part, use in drawn(name).items()}
        told = {"parameters": bound} if bound else {}
        if "requestBody" in operation:
            told["checks"] = {"positive_data_acceptance": {"expected-statuses": VALID_CREATION}}
        if told:
            lines += ["[[operations]]", f"include-operation-id = {toml(name)}", *(f"{key} = {toml(value)}" for key, value in told.items())]
    (folder / "schemathesis.toml").write_text("\n".join(lines) + "\n")
