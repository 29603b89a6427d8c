"""Loaded by schemathesis: counts what was answered, gives an upload its own parts, spares what the run stands on, and
says what is reported and is no failure.

Reads `made.json` of the folder above and writes `tally.json` here.
"""

import atexit
import itertools
import json
import threading
from collections import Counter
from pathlib import Path

import schemathesis
from schemathesis.generation.meta import TestPhase

MADE = json.loads(Path("../made.json").read_text())

# Refusals of data that is valid by the document: operation, status, code; docs/contract.md gives the reasons.
EXCUSED = {
    ("create_chat_completion", 400, "no_chat_template"),
    ("create_chat_completion", 400, "context_length_exceeded"),
    ("create_completion", 400, "context_length_exceeded"),
    ("list_training_events", 422, "contradiction"),
}

KEPT = {one for use in ("file", "dataset", "tokenizer", "job", "model") for one in MADE["ids"][use]}.union(MADE["kept_keys"])

lock = threading.Lock()
# (operation, whether the data is valid by the document, status, code of the error) → answers.
tally: Counter = Counter()
numbers = itertools.count()


def operation_id(case) -> str:
    return case.operation.definition.raw.get("operationId")


def is_valid(case) -> bool:
    return case.meta is not None and case.meta.generation.mode.is_positive


def error(response) -> dict:
    """Of a refusal; empty where there is none."""
    if response.status_code < 400:
        return {}
    try:
        found = response.json().get("error")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@schemathesis.hook
def after_call(context, case, response):
    key = (case.operation.label, "valid" if is_valid(case) else "other", response.status_code, error(response).get("code") or "")
    with lock:
        tally["\t".join(map(str, key))] += 1


@schemathesis.hook
def before_call(context, case, kwargs):
    path = case.path_parameters if isinstance(case.path_parameters, dict) else {}
    name = operation_id(case)
    # No schema can say that the parts are this upload's.
    if name == "complete_upload" and is_valid(case) and isinstance(case.body, dict) and (parts := MADE["uploads"].get(path.get("upload_id"))):
        case.body = {"part_ids": parts}
    # One key again with another body is a 422, which would be the answer to nearly all creations, bad ones too. In a
    # sequence, one with the same body would answer with what an earlier sequence made, and deleted.
    key = (case.headers or {}).get("Idempotency-Key")
    repeats = case.meta is not None and case.meta.phase.name != TestPhase.STATEFUL and next(numbers) % 8 == 0
    if isinstance(key, str) and 1 <= len(key) <= 200 and key.isascii() and key.replace("\t", "").isprintable() and not repeats:
        case.headers["Idempotency-Key"] = f"{key}-{next(numbers)}"
    # What the run stands on: things to name, the keys that it sends, and the quotas of the project that it works in.
    for parameter, value in path.items() if name.startswith("delete_") else ():
        spare = MADE["ids"].get(f"{parameter.removesuffix('_id')}_to_delete")
        if spare and isinstance(value, str) and value in KEPT:
            case.path_parameters = {**path, parameter: spare[0]}
    if name == "update_project" and path.get("project_id") not in MADE["ids"]["project_to_change"]:
        case.path_parameters = {**path, "project_id": MADE["ids"]["project_to_change"][0]}


@schemathesis.hook
def filter_failure(context, failure, case, response):
    match type(failure).__name__:
        # A key that was made up is none.
        case "RejectedPositiveData" if response.status_code == 401:
            return response.request.headers.get("Authorization") == MADE["authorization"]
        case "RejectedPositiveData":
            return (operation_id(case), response.status_code, error(response).get("code")) not in EXCUSED
        # What is missing is not the created thing of the path, but one that the body names.
        case "EnsureResourceAvailability":
            return not error(response).get("param")
        # An empty list or object has no part in a form: what is sent is valid.
        case "AcceptedNegativeData" if case.media_type == "multipart/form-data" and isinstance(case.body, dict):
            return not any(value in ([], {}) for value in case.body.values())
    return True


@atexit.register
def write():
    Path("tally.json").write_text(json.dumps(tally))
