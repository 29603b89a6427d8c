"""What is there before schemathesis begins, so that every operation has something to be carried out on.

`finish` runs beside an ordinary runner and makes what has to be trained. `spare` runs beside the one with an empty
device pool, under which a training waits for ever, and makes what the run may delete, cancel, pause and resume.
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from stack import KEY, Stack

# Of each kind of thing that can be used up.
SPARE = 25

ROWS = "".join(json.dumps({"instruction": f"Count one up from {n}.", "output": str(n + 1)}) + "\n" for n in range(300)).encode()
SUMS = {"instruction": "Count one up from {{ a }}.", "output": "{{ a + 1 }}", "variables": {"a": {"range": [0, 999]}}}
SHAPE = {"architecture": "gpt", "layers": 1, "heads": 2, "width": 32, "context": 64}


@dataclass
class Made:
    """Ids by what they are good for: `ids["model_to_delete"]`. `uploads` has the parts of each upload that can be completed."""

    ids: dict[str, list[str]] = field(default_factory=dict)
    uploads: dict[str, list[str]] = field(default_factory=dict)
    # A key of another project, whose holder must see nothing of this one.
    stranger: str = ""
    # The ids of that key and of the one that the run itself uses.
    kept_keys: list[str] = field(default_factory=list)

    def add(self, use: str, *ids: str) -> None:
        self.ids.setdefault(use, []).extend(ids)


def file(stack: Stack, content: bytes = ROWS) -> str:
    return stack.form("files", "file", content, purpose="fine-tune")["id"]


def training(stack: Stack, made: Made, **changes) -> dict:
    body = {"name": "base", "dataset": made.ids["dataset"][0], "tokenizer": made.ids["tokenizer"][0],
            "method": {"type": "pretrain"}, "model": SHAPE, "hyperparameters": {"steps": 20, "batch_size": 8}}
    return stack.call("training/jobs", {key: value for key, value in {**body, **changes}.items() if value is not None})


def finish(stack: Stack, made: Made) -> None:
    """Data, a tokenizer, a pretrained and a tuned model with all that their jobs leave behind, and a failed job."""
    made.add("file", file(stack), file(stack))
    template = {"type": "template", "rows": 300, "seed": 7, "templates": [SUMS]}
    files = {"type": "files", "files": made.ids["file"][:1]}
    made.add("dataset", *(stack.call("datasets", {"name": "sums", "source": source})["id"] for source in (template, files)))
    for dataset in made.ids["dataset"]:
        stack.ended(f"datasets/{dataset}", ("ready",))
    tokenizer = stack.call("tokenizers", {"name": "small", "type": "bpe", "dataset": made.ids["dataset"][0], "vocab_size": 280})["id"]
    stack.ended(f"tokenizers/{tokenizer}", ("ready",))
    made.add("tokenizer", tokenizer)
    base = training(stack, made)
    tuned = training(stack, made, name="tuned", method={"type": "instruction"}, base_model=base["model"], tokenizer=None, model=None)
    for job in (base, tuned):
        stack.ended(f"training/jobs/{job['id']}", ("succeeded",))
    made.add("job", base["id"], tuned["id"])
    made.add("tuning_job", tuned["id"])
    made.add("model", base["model"], tuned["model"])
    made.add("chat_model", tuned["model"])
    doomed = stack.call("datasets", {"name": "bad", "source": {"type": "files", "files": [file(stack, b"{\n")], "format": "jsonl"}})
    failed = training(stack, made, name="failed", dataset=doomed["id"])
    until = time.monotonic() + 60
    while stack.call(f"training/jobs/{failed['id']}")["state"] != "failed":
        if time.monotonic() > until:
            raise SystemExit("the job on a broken file did not fail")
        time.sleep(0.1)
    made.add("job", failed["id"])
    made.add("dataset", doomed["id"])


def spare(stack: Stack, made: Made) -> None:
    """What can be used up, a second project, and a model that is loaded."""
    own = next(key["id"] for key in listed(stack, f"projects/{default_project(stack)}/keys") if key["name"] == "bootstrap")
    for _ in range(SPARE):
        made.add("file_to_delete", file(stack, b"{}\n"))
        made.add("dataset_to_delete", stack.call("datasets", {"name": "spare", "source": {"type": "files", "files": made.ids["file"][:1]}})["id"])
        made.add("tokenizer_to_delete",
                 stack.call("tokenizers", {"name": "spare", "type": "bpe", "dataset": made.ids["dataset"][0], "vocab_size": 280})["id"])
        for use in ("job_to_cancel", "job_to_pause"):
            made.add(use, training(stack, made)["id"])
        paused = training(stack, made)["id"]
        stack.call(f"training/jobs/{paused}/pause", {})
        made.add("job_to_resume", paused)
        for use, what in (("job_to_delete", "id"), ("model_to_delete", "model")):
            job = training(stack, made)
            stack.call(f"training/jobs/{job['id']}/cancel", {})
            made.add(use, job[what])
        for use in ("tuning_job_to_cancel", "tuning_job_to_pause", "tuning_job_to_resume"):
            job = stack.call("fine_tuning/jobs", {"model": made.ids["model"][0], "training_file": made.ids["file"][0]})["id"]
            made.add(use, job)
            if use == "tuning_job_to_resume":
                stack.call(f"fine_tuning/jobs/{job}/pause", {})
        whole = {"filename": "rows.jsonl", "purpose": "fine-tune", "bytes": len(ROWS), "mime_type": "text/jsonl"}
        upload = stack.call("uploads", whole)["id"]
        made.uploads[upload] = [stack.form(f"uploads/{upload}/parts", "data", ROWS)["id"]]
        made.add("upload_to_complete", upload)
        for use in ("upload_to_cancel", "upload_to_fill"):
            made.add(use, stack.call("uploads", {**whole, "bytes": 1 << 30})["id"])
    for use in ("dataset_to_delete", "tokenizer_to_delete"):
        for one in made.ids[use]:
            stack.ended(f"{use.split('_')[0]}s/{one}", ("ready",))
    # Digested once by a job of its own.
    stack.call(f"datasets/{made.ids['dataset'][0]}/statistics")
    project = stack.call("projects", {"name": "stranger"})["id"]
    made.add("project", project, default_project(stack))
    made.add("project_to_change", project)
    stranger = stack.call(f"projects/{project}/keys", {"name": "stranger"})
    made.stranger, made.kept_keys = stranger["key"], [own, stranger["id"]]
    keys = stack.call("projects", {"name": "keys"})["id"]
    made.add("project_of_keys", keys)
    made.add("key_to_delete", *(stack.call(f"projects/{keys}/keys", {"name": "spare"})["id"] for _ in range(SPARE)))
    for model in made.ids["model"]:
        stack.call("completions", {"model": model, "prompt": "Count", "max_tokens": 1})
    keep_workers_modest(stack)


def keep_workers_modest(stack: Stack) -> None:
    """Reading datasets and training tokenizers, of which the run asks a lot, takes what requests leave of the processor."""
    for thread in Path(f"/proc/{stack.process_of('runner')}/task").iterdir():
        os.setpriority(os.PRIO_PROCESS, int(thread.name), 19)


def listed(stack: Stack, path: str) -> list[dict]:
    return stack.call(f"{path}?limit=100")["data"]


def default_project(stack: Stack) -> str:
    return next(project["id"] for project in listed(stack, "projects") if project["name"] == "default")
