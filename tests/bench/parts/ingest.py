"""From a file to rows, and to tokens, beside Python `datasets` with the same tokenizer."""

import data
from report import Figure

ROUNDS = 5
EXPECTED = {"ingest jsonl": "1 ×", "ingest csv": "1 ×", "ingest parquet": "0.7 ×", "tokens jsonl": "1.2 ×", "tokens csv": "1.2 ×", "tokens parquet": "1.2 ×"}


def run() -> list[Figure]:
    figures = []
    with data.sides() as (ours, theirs, folder, megabytes):
        for work, said in (("ingest", "rows"), ("tokens", "tokens")):
            for kind in ("jsonl", "csv", "parquet"):
                our, their = data.rounds(ours, theirs, f"{work} {folder}/text.{kind}", megabytes, ROUNDS)
                figures.append(Figure(f"ingest/{kind}-{said}", "MB/s", our, their, goal=2.0, expected=EXPECTED[f"{work} {kind}"]))
    return figures
