"""The two sides of a comparison: processes that answer a line with a line, and where their packages come from."""

import json
import os
import subprocess
import sys
from pathlib import Path

from report import ROOT, Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "clients"))

import tools  # noqa: E402  (tests/clients/tools.py)


class Side:
    """Ends with its input."""

    def __init__(self, command: list, environment: dict[str, str] | None = None):
        self.process = subprocess.Popen([str(word) for word in command], cwd=ROOT, env={**os.environ, **(environment or {})},
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, question: str) -> None:
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()

    def hear(self) -> list[float]:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args[0]} ended with status {self.process.wait()}")
        return [float(word) for word in line.split()]

    def ask(self, question: str) -> list[float]:
        self.tell(question)
        return self.hear()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def bench_binary(package: str, name: str) -> Path:
    """Builds a bench of the workspace and gives its program."""
    built = subprocess.run(["cargo", "bench", "--locked", "--no-run", "-p", package, "--bench", name, "--message-format=json"],
                           cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if built.returncode:
        sys.exit(f"the bench {name} of {package} could not be built")
    for line in built.stdout.splitlines():
        message = json.loads(line)
        if message.get("reason") == "compiler-artifact" and message["target"]["name"] == name and message.get("executable"):
            return Path(message["executable"])
    sys.exit(f"cargo names no program for the bench {name}")


def model_bench(name: str) -> list[Figure]:
    """A bench of lathe-model, mostly beside PyTorch, fetched once (about 5 GB): the figures among the lines that it prints.
    Threads that wait sleep soon, as in a worker: spinning would measure what else the machine does."""
    peer = subprocess.run([sys.executable, ROOT / "docker/setup.py", "peer"], stdout=subprocess.PIPE, text=True, check=True)
    environment = {**os.environ, "LATHE_PEER": peer.stdout.strip(), "GOMP_SPINCOUNT": "1000"}
    ran = subprocess.Popen(["cargo", "bench", "--locked", "-p", "lathe-model", "--bench", name], cwd=ROOT, env=environment,
                           stdout=subprocess.PIPE, text=True)
    figures = []
    for line in ran.stdout:
        if line.startswith("FIGURE "):
            figures.append(Figure(**json.loads(line.removeprefix("FIGURE "))))
        else:
            print(line, end="", flush=True)
    if ran.wait():
        sys.exit(f"the bench {name} failed")
    return figures


def packages(part: str) -> Path:
    """The folder of the Python packages in requirements-PART.txt, fetched once."""
    return tools.pinned(f"bench-{part}", HERE / f"requirements-{part}.txt")


def python_side(script: str, part: str, environment: dict[str, str] | None = None, arguments: list = ()) -> Side:
    """Without the library path, which is for Lathe's own libtorch."""
    side = {**(environment or {}), "PYTHONPATH": str(packages(part)), "LD_LIBRARY_PATH": ""}
    return Side([sys.executable, HERE / "peers" / script, *arguments], side)
