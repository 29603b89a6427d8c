#!/usr/bin/env python3
"""What `make compose-test` does: starts docker/compose.yaml with two runners, takes the main job through it, kills the
container of the runner that trains, and sees the job finish on the other one.

LATHE_IMAGE names an image to take as it is, instead of building one. The stack has a project name, a port and volumes of its own, and is gone afterwards, failed or not. Ends with a table, and
non-zero where a step failed. See docs/containers.md.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import docker  # noqa: E402
from client import Client  # noqa: E402  (tests/client.py)
from steps import Failed, Row, expect, show, until  # noqa: E402  (tests/steps.py)

KEY = "sk-lathe-key-of-the-compose-test-0000000000000000000"
IMAGE = os.environ.get("LATHE_IMAGE", "lathe-compose-test")
ROWS = "".join(json.dumps({"instruction": f"Count one up from {n}.", "output": str(n + 1)}) + "\n" for n in range(2000)).encode()
SHAPE = {"architecture": "gpt", "layers": 4, "heads": 4, "width": 128, "context": 64}
STEPS, KILL_AFTER, CHECKPOINT_EVERY = 400, 60, 20


class Stack(Client):
    """The services under a name of their own; down, with their volumes, at the end."""

    def __init__(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        super().__init__(f"http://127.0.0.1:{port}", KEY)
        self.project = f"lathe-test-{os.getpid()}"
        self.environment = {**os.environ, "COMPOSE_PROJECT_NAME": self.project, "LATHE_IMAGE": IMAGE, "LATHE_API_KEY": KEY,
                            "LATHE_PORT": f"127.0.0.1:{port}"}
        self.command = docker.compose()

    def compose(self, *words: str) -> str:
        ran = subprocess.run([*self.command, *words], env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if ran.returncode:
            raise Failed(f"compose {' '.join(words)}: exit status {ran.returncode}\n{ran.stdout}")
        return ran.stdout.strip()

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "-q", service).split()

    def ready(self) -> None:
        def answers() -> bool:
            try:
                return urllib.request.urlopen(f"{self.url}/readyz", timeout=5).status == 200
            except (OSError, urllib.error.HTTPError):
                return False
        until(answers, "the stack is not ready", 120)

    def runner_of(self, job: str) -> str:
        """The container in which a job runs: a runner's host is its container's id."""
        until(lambda: any(job in runner["jobs"] for runner in self.call("runners?limit=100")["data"]), f"no runner has {job}", 60)
        host = next(runner["host"] for runner in self.call("runners?limit=100")["data"] if job in runner["jobs"])
        return next(container for container in self.containers("runner") if container.startswith(host))

    def live_runners(self) -> int:
        return sum(runner["state"] == "live" for runner in self.call("runners?limit=100")["data"])


def inside(container: str, script: str) -> str:
    return docker.output("exec", container, "sh", "-c", script)


def starts(stack: Stack) -> str:
    stack.compose("up", "-d", "--scale", "runner=2")
    stack.ready()
    until(lambda: stack.live_runners() == 2, "two runners are not live", 60)
    api = stack.containers("api")[0]
    until(lambda: docker.output("inspect", "-f", "{{.State.Health.Status}}", api) == "healthy", "the api is not healthy", 60)
    return "ready, two runners live, the health check passes"


def is_confined(stack: Stack) -> str:
    """Of every container with Lathe in it."""
    for container in stack.containers("api") + stack.containers("runner"):
        expect(inside(container, "id -u") != "0", "it runs as root")
        told = inside(container, "touch /etc/x /usr/local/bin/x 2>&1; true")
        expect(told.count("Read-only file system") == 2, told)
        expect(re.search(r"CapEff:\s+0+$", inside(container, "cat /proc/1/status"), re.M) is not None, "it has capabilities")
    return "not root, no capabilities, the root file system is read-only"


def takes_data(stack: Stack, made: dict) -> str:
    file = stack.form("files", "file", ROWS, purpose="fine-tune")["id"]
    made["dataset"] = stack.call("datasets", {"name": "sums", "source": {"type": "files", "files": [file]}})["id"]
    made["tokenizer"] = stack.call("tokenizers", {"name": "small", "type": "bpe", "dataset": made["dataset"], "vocab_size": 280})["id"]
    stack.ended(f"tokenizers/{made['tokenizer']}", ("ready",))
    return "a file became a dataset and a tokenizer"


def survives_its_runner(stack: Stack, made: dict) -> str:
    job = stack.call("training/jobs", {
        "name": "base", "dataset": made["dataset"], "tokenizer": made["tokenizer"], "method": {"type": "pretrain"},
        "model": SHAPE, "hyperparameters": {"steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY}})["id"]
    until(lambda: stack.call(f"training/jobs/{job}")["step"] >= KILL_AFTER, "the training does not get on", 120)
    first = stack.runner_of(job)
    docker.output("kill", first)
    killed = time.monotonic()
    until(lambda: stack.call(f"training/jobs/{job}")["attempts"] == 2, "the job is not tried again", 60)
    waited = time.monotonic() - killed
    second = stack.runner_of(job)
    expect(second != first, "it runs where it was killed")
    ended = stack.ended(f"training/jobs/{job}", ("succeeded",))
    expect(ended["step"] == STEPS and ended["failures"] == 0, ended)
    events = stack.call(f"training/jobs/{job}/events?limit=100")["data"]
    resumed = [event["data"]["step"] for event in events if event["code"] == "checkpoint.resumed"]
    expect(len(resumed) == 1 and resumed[0] >= KILL_AFTER - CHECKPOINT_EVERY, events)
    made["base"], made["killed"] = ended["model"], first
    return f"the other runner had it {waited:.1f} s after the kill, went on from step {resumed[0]} and finished all {STEPS}"


def answers(stack: Stack, made: dict) -> str:
    job = stack.call("training/jobs", {"name": "counting", "dataset": made["dataset"], "base_model": made["base"],
                                       "method": {"type": "instruction"}, "hyperparameters": {"steps": 100}})
    made["model"] = stack.ended(f"training/jobs/{job['id']}", ("succeeded",))["model"]
    return f"tuned; {answer(stack, made['model'])}"


def answer(stack: Stack, model: str) -> str:
    """A chat answer streamed from an engine in another container than the api's."""
    body = {"model": model, "stream": True, "temperature": 0, "max_tokens": 8,
            "messages": [{"role": "user", "content": "Count one up from 37."}]}
    with stack.send("chat/completions", json.dumps(body).encode()) as stream:
        lines = [line.decode().strip() for line in stream]
    expect(lines[-1] == "" and "data: [DONE]" in lines, lines)
    return f"streams {sum(line.startswith('data: {') for line in lines)} events"


def comes_back(stack: Stack, made: dict) -> str:
    """A container whose process dies is started again by its restart policy; one that was killed by hand, by hand."""
    docker.output("start", made["killed"])
    until(lambda: stack.live_runners() == 2, "the killed runner does not come back", 60)
    runner = stack.containers("runner")[0]
    docker.signal(runner, "KILL", "lathe runner")
    until(lambda: docker.output("inspect", "-f", "{{.RestartCount}}", runner) != "0", "its container is not started again", 60)
    until(lambda: stack.live_runners() == 2, "the crashed runner does not come back", 60)
    return "both live again, one started anew by its restart policy"


def stops_and_starts(stack: Stack, made: dict) -> str:
    running = stack.containers("api") + stack.containers("runner") + stack.containers("postgres")
    begun = time.monotonic()
    stack.compose("stop")
    took = time.monotonic() - begun
    statuses = [docker.output("inspect", "-f", "{{.State.ExitCode}}", container) for container in running]
    expect(set(statuses) == {"0"}, f"exit statuses {statuses}")
    stack.compose("start")
    stack.ready()
    return f"stopped in {took:.1f} s, all with status 0; started again, {answer(stack, made['model'])}"


def leaves_nothing(stack: Stack) -> str:
    stack.compose("down", "-v", "--remove-orphans")
    label = f"label=com.docker.compose.project={stack.project}"
    left = docker.output("ps", "-aq", "--filter", label) + docker.output("volume", "ls", "-q", "--filter", label)
    expect(not left, left)
    return "no container and no volume is left"


def main() -> int:
    docker.check()
    begun = time.monotonic()
    if "LATHE_IMAGE" in os.environ:
        rows = [Row("image", "given", docker.megabytes(IMAGE))]
    else:
        docker.build("docker/Dockerfile", IMAGE, docker.ROOT)
        rows = [Row("image", "build", f"{docker.megabytes(IMAGE)}, in {time.monotonic() - begun:.0f} s")]
    stack, made = Stack(), {}
    steps = [
        ("start", lambda: starts(stack)),
        ("confinement", lambda: is_confined(stack)),
        ("data", lambda: takes_data(stack, made)),
        ("pretraining, its runner's container killed", lambda: survives_its_runner(stack, made)),
        ("tuning and chat", lambda: answers(stack, made)),
        ("a runner dies", lambda: comes_back(stack, made)),
        ("stop and start", lambda: stops_and_starts(stack, made)),
        ("down", lambda: leaves_nothing(stack)),
    ]
    for step, taken in steps:
        try:
            rows.append(Row("compose", step, taken()))
        except (Failed, SystemExit, urllib.error.URLError) as error:
            print(subprocess.run([*stack.command, "logs", "--tail=60"], env=stack.environment, stdout=subprocess.PIPE, text=True).stdout)
            print(error, file=sys.stderr, flush=True)
            rows.append(Row("compose", step, "see above", failed=True))
            subprocess.run([*stack.command, "down", "-v", "--remove-orphans"], env=stack.environment, stdout=subprocess.DEVNULL)
            break
    return show("part", rows)


if __name__ == "__main__":
    sys.exit(main())
