"""Python `datasets` and `tokenizers`, as their users run them. Answers a line with a line, as `jobs/benches/data.rs` does;
every answer but the first is in seconds. The argument is the folder of the tokenizer.

    make FOLDER MEGABYTES   writes text.jsonl, text.csv and text.parquet with the same rows; the megabytes of text
    ingest FILE             load_dataset, into a fresh cache
    tokens FILE             the same, and a map that replaces the text by its ids
    train FILE VOCABULARY   the training of a tokenizer on the file's texts, which are read before
    encode FILE             the encoding of the file's texts, which are read before
"""

import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import datasets
import pyarrow
import pyarrow.csv
import pyarrow.parquet
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TOKENIZER = Path(sys.argv[1]) / "tokenizer.json"
READERS = {".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
datasets.disable_progress_bars()


def make(folder: Path, megabytes: float) -> float:
    """Sentences of made-up words, some much more frequent than others, as in a language."""
    chance = random.Random(7)
    syllables = [first + vowel + last for first in "bdfgklmnprstvz" for vowel in "aeiou" for last in ("", "n", "r", "s")]
    words = ["".join(chance.choices(syllables, k=chance.choice((1, 2, 2, 3, 4)))) for _ in range(20_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    rows, size = [], 0
    while size < megabytes * 1e6:
        drawn = chance.choices(words, weights, k=1200)
        for at in range(0, len(drawn), 60):
            said = drawn[at:at + 60]
            rows.append(". ".join(" ".join(said[part:part + 12]).capitalize() for part in range(0, 60, 12)) + f", {chance.randrange(10_000)}.")
            size += len(rows[-1])
    with (folder / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": row}) + "\n" for row in rows)
    table = pyarrow.table({"text": rows})
    pyarrow.csv.write_csv(table, folder / "text.csv")
    pyarrow.parquet.write_table(table, folder / "text.parquet")
    return size / 1e6


def loaded(file: Path, cache: str):
    return datasets.load_dataset(READERS[file.suffix], data_files=str(file), split="train", cache_dir=cache)


def read(file: Path, tokens: bool) -> float:
    """A cache of its own each time, since the second reading of a file would read none of it."""
    cache = tempfile.mkdtemp(prefix="lathe-bench-datasets-")
    tokenizer = Tokenizer.from_file(str(TOKENIZER)) if tokens else None
    begun = time.perf_counter()
    rows = loaded(file, cache)
    if tokenizer:
        rows = rows.map(lambda batch: {"ids": [text.ids for text in tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)]},
                        batched=True, remove_columns=["text"])
    seconds = time.perf_counter() - begun
    shutil.rmtree(cache)
    return seconds


def texts(file: Path) -> list[str]:
    with file.open() as lines:
        return [json.loads(line)["text"] for line in lines]


def train(file: Path, vocabulary: int) -> float:
    """The splitting that Lathe's have, and as many tokens."""
    rows = texts(file)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = Tokenizer.from_file(str(TOKENIZER)).pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    begun = time.perf_counter()
    tokenizer.train_from_iterator(rows, trainer, length=len(rows))
    return time.perf_counter() - begun


def encode(file: Path) -> float:
    rows, tokenizer = texts(file), Tokenizer.from_file(str(TOKENIZER))
    begun = time.perf_counter()
    tokenizer.encode_batch_fast(rows, add_special_tokens=False)
    return time.perf_counter() - begun


for line in sys.stdin:
    match line.split():
        case ["make", folder, megabytes]:
            print(make(Path(folder), float(megabytes)), flush=True)
        case ["ingest", file]:
            print(read(Path(file), tokens=False), flush=True)
        case ["tokens", file]:
            print(read(Path(file), tokens=True), flush=True)
        case ["train", file, vocabulary]:
            print(train(Path(file), int(vocabulary)), flush=True)
        case ["encode", file]:
            print(encode(Path(file)), flush=True)
        case _:
            raise ValueError(line)
