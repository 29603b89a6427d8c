"""The table that a drive of many steps ends with, its verdict last."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Row:
    part: str
    step: str
    outcome: str
    failed: bool = False


class Failed(Exception):
    """A step did not show what it must."""


def expect(holds: bool, what: object) -> None:
    if not holds:
        raise Failed(str(what))


def until(holds: Callable[[], bool], complaint: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise Failed(complaint)
        time.sleep(0.2)


def show(first_column: str, rows: list[Row]) -> int:
    """Prints the table and the verdict; gives the exit status."""
    heads = (first_column, "step", "outcome")
    cells = [(row.part, row.step, f"FAILED: {row.outcome}" if row.failed else row.outcome) for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells)]
    for line in (heads, *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    failed = sum(row.failed for row in rows)
    print(f"{len(rows)} steps, {failed} failed" if failed else f"all {len(rows)} steps passed")
    return 1 if failed else 0
