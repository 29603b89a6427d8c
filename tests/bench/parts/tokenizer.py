"""Training of a tokenizer, and encoding, beside Python `tokenizers` on the same text."""

import data
from report import Figure

ROUNDS = 5


def run() -> list[Figure]:
    with data.sides() as (ours, theirs, folder, megabytes):
        train = data.rounds(ours, theirs, f"train {folder}/text.jsonl {data.VOCABULARY}", megabytes, ROUNDS)
        encode = data.rounds(ours, theirs, f"encode {folder}/text.jsonl", megabytes, ROUNDS)
    return [
        Figure("tokenizer/train", "MB/s", *train, goal=1.0, expected="0.9 ×"),
        Figure("tokenizer/encode", "MB/s", *encode, goal=1.0, expected="1.0 ×"),
    ]
