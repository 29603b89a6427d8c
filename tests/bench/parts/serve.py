"""`lathe serve`: its first and its second start, and what it takes while nobody asks anything."""

import tempfile
import time
from pathlib import Path

from report import Figure
from stack import Stack, cpu_seconds, memory_megabytes

ROUNDS = 5
IDLE_SECONDS = 8


def run() -> list[Figure]:
    first, second, memory, cpu = [], [], [], []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory(prefix="lathe-bench-") as folder:
            with Stack(Path(folder)) as stack:
                first.append(stack.ready_seconds)
            with Stack(Path(folder)) as stack:
                second.append(stack.ready_seconds)
                # What a start leaves to be done is not idleness.
                time.sleep(3)
                processes = stack.processes()
                before, begun = cpu_seconds(processes), time.monotonic()
                time.sleep(IDLE_SECONDS)
                cpu.append(100 * (cpu_seconds(processes) - before) / (time.monotonic() - begun))
                memory.append(memory_megabytes(processes))
    return [
        Figure("serve/first-start", "s", first, expected="1.5 s"),
        Figure("serve/second-start", "s", second, goal=1.0, at_most=True, expected="0.6 s"),
        Figure("serve/idle-memory", "MB", memory, expected="120 MB"),
        Figure("serve/idle-cpu", "%", cpu, goal=1.0, at_most=True, expected="0.5 %", note="of one core, all processes together"),
    ]
