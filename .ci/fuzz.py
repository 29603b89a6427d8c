#!/usr/bin/env python3
"""Runs every property test of a reader of bytes that a stranger controls, over and over, for FUZZ_SECONDS each.

Such tests have names that end in `ends_well` or `end_well`: whatever the input, the reader gives a result or a
reason. A panic, a round of CASES inputs that takes longer than HANG seconds, or more than MEMORY bytes of address
space fails. Printed: rounds, and the peak of memory in use; the verdict last.
"""

import json
import os
import resource
import subprocess
import sys
import time

SECONDS = float(os.environ.get("FUZZ_SECONDS", "600"))
CASES = 2_000
HANG = 300
# Of which libtorch's code and the test's own threads take most.
MEMORY = 8 << 30


def test_binaries():
    command = ["cargo", "test", "--locked", "--workspace", "--lib", "--no-run", "--message-format", "json"]
    built = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    messages = map(json.loads, filter(None, built.splitlines()))
    return sorted({message["executable"] for message in messages if message.get("executable")})


def readers(binary):
    listed = subprocess.run([binary, "--list"], stdout=subprocess.PIPE, text=True, check=True).stdout
    names = (line.removesuffix(": test") for line in listed.splitlines() if line.endswith(": test"))
    return [name for name in names if name.endswith(("ends_well", "end_well"))]


def fuzz(binary, name):
    """How many rounds there were, and what went wrong in the last."""
    environment = dict(os.environ, PROPTEST_CASES=str(CASES), RUST_BACKTRACE="0")
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    end, rounds = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        try:
            run = subprocess.run([binary, "--exact", name], env=environment, preexec_fn=limit, timeout=HANG,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        except subprocess.TimeoutExpired:
            return rounds, f"it hangs: {CASES} inputs take longer than {HANG} s"
        if run.returncode:
            return rounds, run.stdout
        rounds += 1
    return rounds, None


def main():
    failed = []
    for binary in test_binaries():
        for name in readers(binary):
            rounds, problem = fuzz(binary, name)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
            print(f"{name:65} {rounds * CASES:9} inputs  peak so far {peak:5} MB  {'failed' if problem else 'well'}", flush=True)
            if problem:
                failed.append(name)
                print(problem, flush=True)
    print(f"short: {', '.join(failed)}" if failed else "met")
    sys.exit(bool(failed))


main()
