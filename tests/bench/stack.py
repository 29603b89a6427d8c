"""`lathe serve` on a folder of its own, and what its processes take."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from client import Client
from processes import family, stat_fields
from report import ROOT

KEY = "sk-lathe-key-of-the-benchmarks-00000000000000000000"
BINARY = Path(os.environ.get("LATHE_BIN", ROOT / "target/release/lathe"))


class Stack(Client):
    """Ready once made; `ready_seconds` is from the start of the process to its word."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None):
        # The embedded database's user must be able to pass through.
        folder.chmod(0o755)
        self.data, self.log = folder / "data", folder / "log"
        variables = {**os.environ, "LATHE_DATA_DIR": str(self.data), "LATHE_API_KEY": KEY, **(environment or {})}
        variables.pop("DATABASE_URL", None)
        begun = time.monotonic()
        with self.log.open("a") as log:
            self.process = subprocess.Popen([BINARY, "serve", "--listen", "127.0.0.1:0"], cwd=ROOT, env=variables,
                                            stdout=subprocess.PIPE, stderr=log, text=True)
        ready = self.process.stdout.readline()
        if not ready.startswith("Lathe is ready at "):
            self.stop()
            sys.exit(f"the server did not start:\n{self.log.read_text()}")
        self.ready_seconds = time.monotonic() - begun
        super().__init__(ready.split()[4], KEY)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)

    def sql(self, statement: str) -> str:
        """What the embedded database answers."""
        psql = [f"{os.environ['LATHE_POSTGRES_BIN']}/psql", "-qtA", "-c", statement, (self.data / "database_url").read_text().strip()]
        return subprocess.run(psql, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()

    def processes(self) -> list[int]:
        """`serve` and all below it."""
        return family(self.process.pid)

    def process_of(self, command: str) -> int:
        """The one that runs `lathe COMMAND`."""
        for pid in self.processes():
            if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1:2] == [command.encode()]:
                return pid
        sys.exit(f"there is no `lathe {command}`")


def cpu_seconds(pids: list[int]) -> float:
    """Time on a core of these processes, and of their children that have ended."""
    ended = sum(sum(map(int, fields[13:15])) for pid in pids if (fields := stat_fields(pid))) / os.sysconf("SC_CLK_TCK")
    nanoseconds = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            try:
                nanoseconds += int(task.read_text().split()[0])
            except (FileNotFoundError, ProcessLookupError):
                pass
    return ended + nanoseconds / 1e9


def memory_megabytes(pids: list[int]) -> float:
    """Memory of these processes; what they share is counted once."""
    kilobytes = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        kilobytes += int(text.split("\nPss:")[1].split()[0])
    return kilobytes / 1000
