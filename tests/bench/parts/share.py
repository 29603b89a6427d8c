"""What the platform costs a training: a job of the whole stack beside the same steps with nothing around them
(`model/benches/share.rs`). The job's time is its worker's own, from its first step to the end of its last save. It runs for
more than a minute, so that it saves as often as by default, and is asked about once a second, since answers take time
too."""

import json
import random
import re
import tempfile
from pathlib import Path

from report import Figure
from sides import Side, bench_binary
from stack import Stack

ROUNDS = 5
# Steps of a round; model and batch are those of share.rs.
CASES = {
    "small": (3300, {"architecture": "gpt", "layers": 4, "heads": 4, "width": 128, "context": 64}, 12),
    "medium": (240, {"architecture": "gpt", "layers": 6, "heads": 6, "width": 384, "context": 256}, 8),
}
EXPECTED = {"small": "1.02", "medium": "1.015"}


def texts() -> bytes:
    """Long texts, so that every row of a batch is full; enough different words for 4,096 tokens."""
    chance = random.Random(7)
    words = ["".join(chance.choice("bdfgklmnprstvz") + chance.choice("aeiou") for _ in range(chance.choice((2, 3, 4)))) for _ in range(9000)]
    return "".join(json.dumps({"text": " ".join(chance.choices(words, k=3000))}) + "\n" for _ in range(1500)).encode()


def trained(stack: Stack, names: dict, name: str) -> float:
    """Seconds of a step within a job."""
    steps, shape, batch_size = CASES[name]
    job = stack.call("training/jobs", {
        "name": name, "dataset": names["dataset"], "tokenizer": names["tokenizer"], "method": {"type": "pretrain"}, "model": shape,
        "hyperparameters": {"steps": steps, "batch_size": batch_size, "micro_batch_size": batch_size, "precision": "bf16",
                            "keep_checkpoints": 1}})["id"]
    stack.ended(f"training/jobs/{job}", ("succeeded",), every=1)
    log = re.sub(r"\x1b\[[0-9;]*m", "", stack.call(f"training/jobs/{job}/logs")["text"])
    seconds = re.search(r"trained step=(\d+) seconds=([0-9.]+)", log)
    assert seconds and int(seconds[1]) == steps, log
    return float(seconds[2]) / steps


def run() -> list[Figure]:
    program = bench_binary("lathe-model", "share")
    figures = []
    with tempfile.TemporaryDirectory(prefix="lathe-share-") as folder, Stack(Path(folder)) as stack:
        file = stack.form("files", "file", texts(), purpose="user_data")["id"]
        names = {"dataset": stack.call("datasets", {"name": "texts", "source": {"type": "files", "files": [file]}})["id"]}
        names["tokenizer"] = stack.call("tokenizers", {"name": "t", "type": "bpe", "dataset": names["dataset"], "vocab_size": 4096})["id"]
        for what in names:
            stack.ended(f"{what}s/{names[what]}", ("ready",))
        folders = [next((stack.data / f"artifacts/{what}s/{names[what]}").iterdir()) for what in names]
        for name, (steps, _, _) in CASES.items():
            bare = Side([program, name, *folders], {"GOMP_SPINCOUNT": "1000"})
            bare.hear()
            platform, alone = [], []
            # The first round, which is the slowest, does not count.
            for number in range(ROUNDS + 1):
                ours, theirs = trained(stack, names, name), bare.ask(str(steps))[0] / steps
                if number:
                    platform.append(ours * 1e3)
                    alone.append(theirs * 1e3)
            bare.close()
            figures.append(Figure(f"share/{name}", "ms a step", platform, alone, goal=1.03, at_most=True, expected=EXPECTED[name]))
    return figures
