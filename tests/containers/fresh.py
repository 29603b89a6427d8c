#!/usr/bin/env python3
"""What `make fresh` does: both commands of the README, on a clone of what is committed, in a container that has a bare
Debian, Rust, and the packages that the README names; nothing of the developer's machine, and no root user.

    fresh.py [demo] [test]      only one of them

Ends with a table, and non-zero where a command failed. See docs/containers.md.
"""

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import docker  # noqa: E402
from steps import Row, show  # noqa: E402  (tests/steps.py)

IMAGE = "lathe-fresh"
# What the demo says when it goes on serving.
SERVING = "Serving until Ctrl-C."


def built() -> str:
    """The image with a clean clone in it; its distribution."""
    with tempfile.TemporaryDirectory() as folder:
        clone = f"{folder}/lathe"
        subprocess.run(["git", "clone", "--quiet", "--no-local", "--depth", "1", f"file://{docker.ROOT}", clone], check=True)
        docker.build("tests/containers/fresh.Dockerfile", IMAGE, Path(clone))
        subprocess.run(["git", "-C", clone, "log", "-1", "--format=%h %s"], check=True)
    return docker.says_what_it_is(IMAGE)


def carried_out(container: str, target: str) -> Row:
    """Runs `make TARGET` and shows what it prints; a demo that serves is sent Ctrl-C and must then end well."""
    begun = time.monotonic()
    ran = subprocess.Popen(["docker", "exec", container, "make", target], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said: list[str] = []
    for line in ran.stdout:
        print(line, end="", flush=True)
        said.append(line)
        if line.strip() == SERVING:
            docker.signal(container, "INT", "target/release/lathe demo")
    status, took = ran.wait(), time.monotonic() - begun
    passed = sum(int(line.split()[3]) for line in said if line.startswith("test result: ok."))
    told = next((line.strip() for line in reversed(said) if line.startswith("exact match ")), f"{passed} tests passed")
    return Row("fresh", f"make {target}", f"{told}, in {took / 60:.0f} minutes" if status == 0 else f"exit status {status}", status != 0)


def main() -> int:
    docker.check()
    rows = [Row("fresh", "image", built())]
    container = docker.output("run", "-d", "--rm", "--init", IMAGE)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for target in sys.argv[1:] or ("demo", "test"):
            rows.append(carried_out(container, target))
            if rows[-1].failed:
                break
    finally:
        subprocess.run(["docker", "rm", "-f", container], stdout=subprocess.DEVNULL)
    return show("part", rows)


if __name__ == "__main__":
    sys.exit(main())
