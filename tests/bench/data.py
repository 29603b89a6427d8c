"""The two sides of the parts that read text, and the text, which is made by rule."""

import contextlib
import tempfile
from pathlib import Path

from sides import Side, bench_binary, packages, python_side

MEGABYTES = 40
VOCABULARY = 8192


@contextlib.contextmanager
def sides():
    """Lathe, Python, the folder of the files, and how many megabytes of text each of them holds. A tokenizer is there."""
    program, _ = bench_binary("lathe-jobs", "data"), packages("data")
    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as name:
        folder = Path(name)
        (folder / "tokenizer").mkdir()
        environment = {"TOKENIZERS_PARALLELISM": "true", "HF_HOME": f"{name}/hf", "HF_HUB_OFFLINE": "1"}
        ours = Side([program, folder / "tokenizer"], environment)
        theirs = python_side("data_peer.py", "data", environment, [folder / "tokenizer"])
        megabytes = theirs.ask(f"make {folder} {MEGABYTES}")[0]
        ours.ask(f"train {folder}/text.jsonl {VOCABULARY}")
        yield ours, theirs, folder, megabytes
        ours.close()
        theirs.close()


def rounds(ours: Side, theirs: Side, question: str, megabytes: float, count: int) -> tuple[list[float], list[float]]:
    """Megabytes of text a second, a value a round; the first round does not count."""
    both = [(megabytes / ours.ask(question)[0], megabytes / theirs.ask(question)[0]) for _ in range(count + 1)][1:]
    return [our for our, _ in both], [their for _, their in both]
