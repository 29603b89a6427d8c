#!/usr/bin/env python3
"""What `make s3-test` does: an api and two runners with folders of their own, as on three machines, share a bucket of an S3
server (moto), and the main job goes through them while machines and the bucket fail.

The binary is LATHE_BIN (by default target/release/lathe). Ends with a table, and non-zero where a step failed. See
docs/object-store.md.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE.parent), str(ROOT / ".ci"), str(HERE.parent / "clients")]

import tools  # noqa: E402  (tests/clients/tools.py)
import with_postgres  # noqa: E402  (.ci/with_postgres.py)
from client import Client  # noqa: E402  (tests/client.py)
from processes import family  # noqa: E402  (tests/processes.py)
from steps import Failed, Row, expect, show, until  # noqa: E402  (tests/steps.py)

BINARY = Path(os.environ.get("LATHE_BIN", ROOT / "target/release/lathe"))
KEY = "sk-lathe-key-of-the-bucket-test-00000000000000000000"
BUCKET, PREFIX = "lathe-test", "one"
ROWS = "".join(f'{{"instruction": "Count one up from {n}.", "output": "{n + 1}"}}\n' for n in range(2000)).encode()
SHAPE = {"architecture": "gpt", "layers": 4, "heads": 4, "width": 128, "context": 64}
STEPS, KILL_AFTER, CHECKPOINT_EVERY = 300, 60, 20
# Longer than the bucket is asked again for within one request, shorter than a lease can wait.
AWAY_SECONDS = 20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Machines(Client):
    """The S3 server, the api and the runners, each in a folder below `folder`."""

    def __init__(self, folder: Path, database_url: str):
        self.folder, self.log = folder, (folder / "log").open("wb")
        self.api_port, self.s3_port = free_port(), free_port()
        super().__init__(f"http://127.0.0.1:{self.api_port}", KEY)
        self.environment = {
            **os.environ, "DATABASE_URL": database_url, "LATHE_ARTIFACT_STORE": f"s3://{BUCKET}/{PREFIX}",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.s3_port}", "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "LATHE_LOG": "info,sqlx=warn,lathe_api=warn"}
        self.processes: dict[str, subprocess.Popen] = {}

    def start(self, name: str, command: list, environment: dict[str, str] | None = None) -> None:
        self.processes[name] = subprocess.Popen(command, cwd=ROOT, env={**self.environment, **(environment or {})},
                                                stdout=self.log, stderr=self.log)

    def start_s3(self) -> None:
        packages = tools.pinned("bucket-python", HERE / "requirements.txt")
        self.start("s3", [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.s3_port)],
                   {"PYTHONPATH": str(packages)})

        def made() -> bool:
            with contextlib.suppress(OSError):
                request = urllib.request.Request(f"http://127.0.0.1:{self.s3_port}/{BUCKET}", method="PUT")
                return urllib.request.urlopen(request, timeout=5).status == 200
            return False
        until(made, "the S3 server does not start", 60)

    def start_lathe(self, name: str, *words: str) -> None:
        environment = {"LATHE_ARTIFACTS": str(self.folder / name), "LATHE_DATA_DIR": str(self.folder / name), "LATHE_API_KEY": KEY}
        self.start(name, [BINARY, *words], environment)

    def start_api(self) -> None:
        self.start_lathe("api", "api", "--listen", f"127.0.0.1:{self.api_port}")

        def answers() -> bool:
            with contextlib.suppress(OSError):
                return urllib.request.urlopen(f"{self.url}/healthz", timeout=5).status == 200
            return False
        until(answers, "the api does not start", 60)

    def start_runner(self, name: str) -> None:
        self.start_lathe(name, "runner")

    def kill(self, name: str) -> None:
        """Its processes, and its folder with them: the machine is gone."""
        process = self.processes[name]
        all_of_them = family(process.pid)
        process.kill()
        process.wait()
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in all_of_them), f"children of {name} outlive it", 30)
        shutil.rmtree(self.folder / name)

    def runner_of(self, job: str) -> str:
        until(lambda: any(job in runner["jobs"] for runner in self.runners()), f"no runner has {job}", 60)
        pid = next(runner["pid"] for runner in self.runners() if job in runner["jobs"])
        return next(name for name, process in self.processes.items() if process.pid == pid)

    def runners(self) -> list[dict]:
        return [runner for runner in self.call("runners?limit=100")["data"] if runner["state"] == "live"]

    def objects(self, below: str) -> int:
        """Objects of the bucket below a key."""
        url = f"http://127.0.0.1:{self.s3_port}/{BUCKET}?list-type=2&prefix={PREFIX}/{below}"
        return urllib.request.urlopen(url, timeout=10).read().count(b"<Key>")

    @contextlib.contextmanager
    def bucket_away(self):
        self.processes["s3"].send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.processes["s3"].send_signal(signal.SIGCONT)

    def stop(self) -> None:
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
        self.log.close()


def pretraining(machines: Machines, made: dict) -> str:
    return machines.call("training/jobs", {
        "name": "base", "dataset": made["dataset"], "tokenizer": made["tokenizer"], "method": {"type": "pretrain"},
        "model": SHAPE, "hyperparameters": {"steps": STEPS, "checkpoint_every": CHECKPOINT_EVERY}})["id"]


def events(machines: Machines, job: str, code: str) -> list[dict]:
    return [event for event in machines.call(f"training/jobs/{job}/events?limit=100")["data"] if event["code"] == code]


def starts(machines: Machines, _) -> str:
    machines.start_s3()
    ran = subprocess.run([BINARY, "migrate"], env=machines.environment, stdout=machines.log, stderr=machines.log)
    expect(ran.returncode == 0, "the database could not be migrated")
    machines.start_api()
    machines.start_runner("first")
    machines.start_runner("second")
    until(lambda: len(machines.runners()) == 2, "two runners are not live", 60)
    return "an api and two runners, each with a folder of its own, know each other by the bucket"


def takes_data(machines: Machines, made: dict) -> str:
    made["file"] = machines.form("files", "file", ROWS, purpose="fine-tune")["id"]
    made["dataset"] = machines.call("datasets", {"name": "sums", "source": {"type": "files", "files": [made["file"]]}})["id"]
    made["tokenizer"] = machines.call("tokenizers", {"name": "small", "type": "bpe", "dataset": made["dataset"], "vocab_size": 280})["id"]
    machines.ended(f"tokenizers/{made['tokenizer']}", ("ready",))
    rows = machines.call(f"datasets/{made['dataset']}/rows?limit=3")
    tokens = machines.call(f"tokenizers/{made['tokenizer']}/encode", {"text": "Count one up from 7."})
    expect(rows["total"] == 2000 and tokens["tokens"], (rows, tokens))
    return f"{machines.objects('')} objects; the api shows rows and tokens that runners made"


def survives_its_machine(machines: Machines, made: dict) -> str:
    job = pretraining(machines, made)
    until(lambda: machines.call(f"training/jobs/{job}")["step"] >= KILL_AFTER, "the training does not get on", 120)
    lost = machines.runner_of(job)
    machines.kill(lost)
    ended = machines.ended(f"training/jobs/{job}", ("succeeded",))
    resumed = [event["data"]["step"] for event in events(machines, job, "checkpoint.resumed")]
    expect(ended["attempts"] == 2 and len(resumed) == 1 and resumed[0] >= KILL_AFTER - CHECKPOINT_EVERY, (ended, resumed))
    log = machines.call(f"training/jobs/{job}/logs?attempt=2")["text"]
    expect(bool(log.strip()), "the log of the attempt is empty")
    machines.start_runner(lost)
    until(lambda: len(machines.runners()) == 2, "two runners are not live", 60)
    made["base"], made["base_job"] = ended["model"], job
    return f"the other went on from step {resumed[0]} with what the bucket has, and its log is read on the api's machine"


def waits_for_the_bucket(machines: Machines, made: dict) -> str:
    job = pretraining(machines, made)
    until(lambda: machines.call(f"training/jobs/{job}")["step"] >= KILL_AFTER, "the training does not get on", 120)
    with machines.bucket_away():
        away, before = time.monotonic(), machines.call(f"training/jobs/{job}")["step"]
        try:
            machines.form("files", "file", ROWS, purpose="fine-tune")
            raise Failed("a file was taken without a bucket to put it in")
        except urllib.error.HTTPError as refused:
            told = (refused.code, refused.read().decode())
            expect(refused.code == 503 and "artifact_store_unavailable" in told[1], told)
        took = time.monotonic() - away
        time.sleep(max(0.0, AWAY_SECONDS - took))
        expect(machines.call(f"training/jobs/{job}")["state"] == "running", "the training did not wait")
    ended = machines.ended(f"training/jobs/{job}", ("succeeded",))
    saved = [event["data"]["step"] for event in events(machines, job, "checkpoint.saved")]
    # Of those that waited, only the newest are worth keeping.
    expect(ended["attempts"] == 1 and saved[-1] > before, f"{ended['attempts']} attempts, checkpoints at {saved}")
    return f"{AWAY_SECONDS} s without it: one attempt, checkpoints go on; an upload was refused with 503 after {took:.0f} s"


def answers(machines: Machines, made: dict) -> str:
    job = machines.call("training/jobs", {"name": "counting", "dataset": made["dataset"], "base_model": made["base"],
                                          "method": {"type": "instruction"}, "hyperparameters": {"steps": 60}})["id"]
    made["model"] = machines.ended(f"training/jobs/{job}", ("succeeded",))["model"]
    body = {"model": made["model"], "max_tokens": 8, "messages": [{"role": "user", "content": "Count one up from 37."}]}
    said = machines.call("chat/completions", body)
    expect(said["usage"]["completion_tokens"] > 0, said)
    return "tuned and asked"


def starts_from_nothing(machines: Machines, made: dict) -> str:
    for name in ("api", "first", "second"):
        machines.kill(name)
    machines.start_api()
    machines.start_runner("third")
    with machines.send(f"files/{made['file']}/content") as content:
        expect(content.read() == ROWS, "the file is another")
    body = {"model": made["model"], "prompt": "Count", "max_tokens": 4}
    until(lambda: len(machines.runners()) == 1, "the new runner is not live", 60)
    expect(machines.call("completions", body)["usage"]["completion_tokens"] > 0, "no answer")
    return "new machines, nothing but the database and the bucket: the file is the same, the model answers"


def deletes(machines: Machines, made: dict) -> str:
    expect(machines.objects(f"models/{made['model']}/") > 0 and machines.objects(f"files/{made['file']}") == 1, "nothing to delete")
    for path in (f"models/{made['model']}", f"files/{made['file']}"):
        request = urllib.request.Request(f"{machines.url}/v1/{path}", headers={"Authorization": f"Bearer {KEY}"}, method="DELETE")
        urllib.request.urlopen(request, timeout=60).read()
    until(lambda: machines.objects(f"models/{made['model']}/") + machines.objects(f"files/{made['file']}") == 0, "objects are left", 30)
    return "a deleted model and a deleted file leave no object"


STEPS_TAKEN = [
    ("start", starts), ("data", takes_data), ("pretraining, its machine lost", survives_its_machine),
    ("pretraining, the bucket away", waits_for_the_bucket), ("tuning and chat", answers),
    ("every machine replaced", starts_from_nothing), ("deletion", deletes)]


def main() -> int:
    if not BINARY.exists():
        sys.exit(f"there is no {BINARY}: build it with `make build`, or name one in LATHE_BIN")
    rows, made = [], {}
    with with_postgres.server() as (port, _), tempfile.TemporaryDirectory(prefix="lathe-bucket-") as folder:
        machines = Machines(Path(folder), f"postgres://postgres@127.0.0.1:{port}/postgres")
        try:
            for step, taken in STEPS_TAKEN:
                begun = time.monotonic()
                try:
                    rows.append(Row("moto", step, f"{taken(machines, made)} ({time.monotonic() - begun:.0f} s)"))
                except (Failed, SystemExit, OSError) as error:
                    lines = (Path(folder) / "log").read_text(errors="replace").splitlines()
                    print("\n".join(line for line in lines[-150:] if '" 200 -' not in line), file=sys.stderr)
                    print(repr(error), file=sys.stderr, flush=True)
                    rows.append(Row("moto", step, "see above", failed=True))
                    break
        finally:
            machines.stop()
    return show("store", rows)


if __name__ == "__main__":
    sys.exit(main())
