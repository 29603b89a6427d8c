"""What every part of `make bench` hands over, and the table that is made of it.

A figure is judged by rounds in which both sides ran one after the other, so that what else the machine does meets both:
by the 90 % interval of the mean of their ratios (of the logarithms), at least five of them, or, where it has a bound
instead of a peer, of the values. It is

    met      on the good side of the goal, interval and all
    tied     the interval holds the goal
    short    on the wrong side

A figure that is short fails the run unless docs/results.md lists its name with the reason.
"""

import math
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

# Of Student's distribution, both tails together 10 %, by degrees of freedom from 1.
T90 = [6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753]


@dataclass
class Figure:
    """`ours` and `peers` hold a value a round, in `unit`; without `peers`, `goal` is a bound in that unit, else one of the
    ratio. `expected` was written down before the first measurement. Without a goal the figure is only shown."""

    name: str
    unit: str
    ours: list[float]
    peers: list[float] = field(default_factory=list)
    goal: float | None = None
    at_most: bool = False
    expected: str = ""
    note: str = ""

    def judged(self) -> list[float]:
        return [our / peer for our, peer in zip(self.ours, self.peers)] if self.peers else self.ours

    def interval(self) -> tuple[float, float]:
        values = self.judged()
        if len(values) < 2:
            return values[0], values[0]
        logs = [math.log(max(value, 1e-12)) for value in values]
        half = T90[min(len(logs) - 2, len(T90) - 1)] * statistics.stdev(logs) / math.sqrt(len(logs))
        middle = statistics.fmean(logs)
        return math.exp(middle - half), math.exp(middle + half)

    def verdict(self) -> str:
        if self.goal is None:
            return ""
        low, high = self.interval()
        if low <= self.goal <= high and low < high:
            return "tied"
        return "met" if (statistics.median(self.judged()) <= self.goal) == self.at_most else "short"


def number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def excused() -> set[str]:
    """The names in the table of docs/results.md that lists what is short and why."""
    text = (ROOT / "docs/results.md").read_text()
    section = re.search(r"^## Short of their goal\n(.*?)(?=^## |\Z)", text, re.S | re.M)
    return set(re.findall(r"^\| `([^`]+)`", section[1], re.M)) if section else set()


def row(figure: Figure) -> list[str]:
    sign = "≤" if figure.at_most else "≥"
    low, high = figure.interval()
    interval = f"{number(statistics.median(figure.judged()))} ({number(low)} to {number(high)})"
    goal = "" if figure.goal is None else f"{sign} {number(figure.goal)}{' ×' if figure.peers else ' ' + figure.unit}"
    peer = number(statistics.median(figure.peers)) if figure.peers else ""
    return [figure.name, f"{number(statistics.median(figure.ours))} {figure.unit}", peer, interval, goal, figure.expected, figure.verdict()]


def show(figures: list[Figure]) -> int:
    """Prints the table; gives the exit status."""
    heads = ["figure", "Lathe, median", "peer, median", "ratio or value (90 % interval)", "goal", "expected", "verdict"]
    cells = [row(figure) for figure in figures]
    widths = [max(map(len, column)) for column in zip(heads, *cells)]
    for line in [heads, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    for figure in figures:
        if figure.note:
            print(f"{figure.name}: {figure.note}")
    short = [figure.name for figure in figures if figure.verdict() == "short"]
    unexplained = [name for name in short if name not in excused()]
    counts = ", ".join(f"{sum(figure.verdict() == verdict for figure in figures)} {verdict}" for verdict in ("met", "tied", "short"))
    print(counts + (f"; not listed in docs/results.md: {', '.join(unexplained)}" if unexplained else ""))
    return 1 if unexplained else 0
