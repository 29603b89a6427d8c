#!/usr/bin/env python3
"""What `make contract` does: schemathesis over the whole document against a live server (docs/contract.md).

REQUESTS (50,000) is how many it sends at least, SEED (1) what it draws them from; HOLD=1 leaves the server there when it
is done, until Ctrl-C. The server is LATHE_BIN (by default target/debug/lathe, whose arithmetic is checked) on a throw-away
data directory. Ends with a table, and non-zero where something failed.
"""

import concurrent.futures
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT / "tests/bench"), str(ROOT / "tests/clients"), str(ROOT / "tests")]
os.environ.setdefault("LATHE_BIN", str(ROOT / "target/debug/lathe"))

import made  # noqa: E402
import settings  # noqa: E402
import tools  # noqa: E402
from stack import Stack  # noqa: E402

# What a run leaves to look into: a folder for each task, the server's log, and what schemathesis was told.
FOLDER = ROOT / "target/contract"


@dataclass
class Task:
    """One process of schemathesis. It keeps to one core, and is slower than the server, so several run side by side."""

    name: str
    phases: str
    seed: int
    # Tests drawn for each operation, or sequences of requests.
    examples: int
    options: tuple[str, ...] = ()


def tasks(stated: dict, wanted: int, seed: int) -> list[Task]:
    """A sequence cannot be drawn anew where the server stands differently the second time; schemathesis ends the phase
    there, without a word. So that phase runs several times, each with the next seed."""
    tags = Counter(operation["tags"][0] for _, _, operation in settings.operations(stated))
    examples = math.ceil(wanted / tags.total())
    # Made-up keys are tried with the bounds; here nearly half of all requests would end at them.
    keyed = ("--generation-with-security-parameters", "false")
    invented = [Task(f"invented-{tag}", "fuzzing", seed, examples, ("--include-tag", tag, *keyed)) for tag, _ in tags.most_common()]
    rounds = range(max(wanted // 5_000, 1))
    sequences = [Task(f"sequences-{number}", "stateful", seed + number, examples, keyed) for number in rounds]
    return [Task("bounds", "examples,coverage", seed, 1), *sequences, *invented]


@dataclass
class Outcome:
    """What a task did: answers by what the hooks count, failures as the report has them, errors in words."""

    answers: Counter = field(default_factory=Counter)
    failures: list[dict] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def packages() -> Path:
    return tools.pinned("contract-python", HERE / "requirements.txt")


def run(task: Task, url: str, running: set[subprocess.Popen]) -> Outcome:
    """To its end; what schemathesis says goes to the file `said` of the task's folder."""
    folder = FOLDER / task.name
    folder.mkdir()
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", FOLDER / "schemathesis.toml", "run", FOLDER / "document.json",
               "--url", url, "--phases", task.phases, "--mode", "all", "--checks", "all", "--max-examples", str(task.examples),
               "--seed", str(task.seed), "--workers", "1", "--report", "json", "--report-json-path", folder / "report.json",
               "--no-color", "--output-truncate", "false", "--suppress-health-check", "all", *task.options]
    environment = {**os.environ, "PYTHONPATH": f"{packages()}{os.pathsep}{HERE}", "SCHEMATHESIS_HOOKS": "hooks"}
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT)
    running.add(process)
    status = process.wait()
    running.discard(process)
    try:
        tally, report = (json.loads((folder / name).read_text()) for name in ("tally.json", "report.json"))
    except (FileNotFoundError, ValueError):
        return Outcome(errors=[f"{task.name} ended with status {status} and without a report"])
    errors = [f"{task.name}: {error['title']}, {error['count']} times" for error in report["errors"]]
    if status not in (0, 1) or not report["complete"]:
        errors.append(f"{task.name} was not complete: status {status}, {report['stop_reason']}")
    return Outcome(Counter(tally), report["failures"], errors)


def run_all(todo: list[Task], url: str) -> list[Outcome]:
    running: set[subprocess.Popen] = set()
    side_by_side = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    try:
        return list(side_by_side.map(lambda task: run(task, url, running), todo))
    finally:
        side_by_side.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.kill()


def show(stated: dict, outcomes: list[Outcome], wanted: int, seconds: float, seed: int) -> int:
    """Prints what each operation answered, what failed, and the verdict; gives the exit status."""
    counts: dict[str, Counter] = {label: Counter() for _, label, _ in settings.operations(stated)}
    for answers in (one.answers for one in outcomes):
        for key, number in answers.items():
            label, kind, status, _ = key.split("\t")
            kinds = ["all", kind, status] + (["2xx", f"{kind} 2xx"] if status[0] == "2" else ["5xx"] * (status[0] == "5"))
            counts[label].update(dict.fromkeys(kinds, number))
    width = max(map(len, counts))
    print(f"{'operation':{width}}  {'requests':>8}  {'2xx':>6}  {'share':>6}  {'of valid':>8}  answers")
    for label, of in counts.items():
        statuses = " ".join(f"{status}: {number:,}" for status, number in sorted(of.items()) if status.isdigit())
        share, of_valid = of["2xx"] / max(of["all"], 1), of["valid 2xx"] / max(of["valid"], 1)
        print(f"{label:{width}}  {of['all']:8,}  {of['2xx']:6,}  {share:6.1%}  {of_valid:8.1%}  {statuses}")
    failures = [failure for one in outcomes for failure in one.failures]
    for failure in failures:
        print(f"FAILED: {failure['title']}, {failure['count']} times: {', '.join(failure['operations'])}")
    errors = [error for one in outcomes for error in one.errors]
    for error in errors:
        print(f"FAILED: {error}")
    requests, bad = (sum(of[kind] for of in counts.values()) for kind in ("all", "5xx"))
    never = [label for label, of in counts.items() if not of["2xx"]]
    wrong = [f"{sum(failure['count'] for failure in failures)} failures"] if failures else []
    wrong += [f"{len(errors)} errors"] if errors else []
    wrong += [f"{bad} answers of 5xx"] if bad else []
    wrong += [f"no 2xx from {', '.join(never)}"] if never else []
    wrong += [f"fewer requests than {wanted:,}"] if requests < wanted else []
    if wrong:
        print(f"each failure with its curl line: {FOLDER}/*/said")
    print(f"{requests:,} requests to {len(counts)} operations in {seconds / 60:.1f} min, seed {seed}: "
          + (f"short: {'; '.join(wrong)}" if wrong else "met"))
    return 1 if wrong else 0


def main() -> int:
    wanted, seed = int(os.environ.get("REQUESTS", "50000")), int(os.environ.get("SEED", "1"))
    # So that the server and schemathesis end with this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    packages()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    things = made.Made()
    with tempfile.TemporaryDirectory(prefix="lathe-contract-") as scratch:
        with Stack(Path(scratch)) as stack:
            made.finish(stack, things)
        with Stack(Path(scratch), {"LATHE_LIGHT_ONLY": "true"}) as stack:
            made.spare(stack, things)
            stated = settings.document((ROOT / "openapi/openapi.json").read_text(), things)
            settings.write(FOLDER, stated, things)
            print(f"seed {seed}: all is made; schemathesis begins", flush=True)
            begun = time.monotonic()
            outcomes = run_all(tasks(stated, wanted, seed), stack.url)
            failed = show(stated, outcomes, wanted, time.monotonic() - begun, seed)
            shutil.copy(stack.log, FOLDER / "server.log")
            if os.environ.get("HOLD"):
                print(f"the server stays at {stack.url} until Ctrl-C", flush=True)
                with contextlib.suppress(KeyboardInterrupt):
                    signal.pause()
    return failed


if __name__ == "__main__":
    sys.exit(main())
