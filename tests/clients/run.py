#!/usr/bin/env python3
"""What `make sdk` does: lints openapi/openapi.json, generates the clients of docs/clients.md from it into openapi/sdk,
and drives a live server with each of them and with the stock `openai` SDKs.

The server is LATHE_BIN (by default target/release/lathe) on a throw-away data directory. Ends with a table, and non-zero
where anything failed. `run.py generate` stops after the clients are made.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import tools  # noqa: E402
from client import Client  # noqa: E402  (tests/client.py)
from steps import Row, show  # noqa: E402  (tests/steps.py)

ROOT = HERE.parent.parent
DOCUMENT = ROOT / "openapi/openapi.json"
SDK = ROOT / "openapi/sdk"
KEY = "sk-lathe-key-of-the-client-drives-000000000000000000"

# A drive that takes longer hangs.
DRIVE_SECONDS = 600

# More than a drive sends, and few enough to spend in a moment.
REQUESTS_PER_MINUTE = 600


def did(client: str, step: str, command: list, outcome: str, **options) -> Row:
    """Runs a tool, whose output is shown only where it failed."""
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if ran.returncode:
        print(ran.stdout, flush=True)
    return Row(client, step, outcome if ran.returncode == 0 else f"exit status {ran.returncode}", ran.returncode != 0)


def node(*arguments) -> list:
    return [tools.node(), "--disable-warning=ExperimentalWarning", *arguments]


def prepare() -> None:
    """Fetches the tools, lays the packages of Node beside the drives that import them, and clears openapi/sdk."""
    tools.fetch()
    link, packages = HERE / "node_modules", tools.node_packages()
    if link.is_symlink() and link.readlink() != packages:
        link.unlink()
    if not link.exists():
        link.symlink_to(packages)
    shutil.rmtree(SDK, ignore_errors=True)
    for folder in ("typescript/plain", "typescript/streams", "python"):
        (SDK / folder).mkdir(parents=True)
    package = {"name": "lathe-client", "private": True, "type": "module"}
    (SDK / "typescript/package.json").write_text(json.dumps(package) + "\n")


def generate() -> list[Row]:
    modules = tools.node_packages()
    parts = "apiTests=false,modelTests=false,apiDocs=false,modelDocs=false"
    names = f"packageName=lathe_client,packageVersion={json.loads(DOCUMENT.read_text())['info']['version']}"
    return [
        did("the document", "lint", node(modules / "@redocly/cli/bin/cli.js", "lint", DOCUMENT, "--config", HERE / "redocly.yaml"),
            "clean", env={**os.environ, "REDOCLY_TELEMETRY": "off", "REDOCLY_SUPPRESS_UPDATE_NOTICE": "true"}),
        did("generated Python", "generate", [tools.java(), "-jar", tools.generator_jar(), "generate", "-i", DOCUMENT, "-g", "python",
            "-o", SDK / "python", "--additional-properties", names, "--global-property", parts], "openapi/sdk/python"),
        did("generated TypeScript", "generate", node(modules / "@hey-api/openapi-ts/bin/run.js", "-f", HERE / "openapi-ts.config.mjs"),
            "openapi/sdk/typescript"),
        did("generated TypeScript", "type check, with the drives", node(modules / "typescript/bin/tsc", "-p", HERE), "strict"),
    ]


class Server(Client):
    """`lathe serve` on a folder of its own, which goes with it."""

    def __init__(self):
        """Its address is known once it has started."""

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="lathe-clients-")
        # The embedded database's user must be able to pass through.
        os.chmod(self.folder.name, 0o755)
        self.log = Path(self.folder.name) / "log"
        binary = Path(os.environ.get("LATHE_BIN", ROOT / "target/release/lathe"))
        if not binary.exists():
            sys.exit(f"there is no {binary}: build it with `make build`, or name one in LATHE_BIN")
        environment = {**os.environ, "LATHE_DATA_DIR": f"{self.folder.name}/data", "LATHE_API_KEY": KEY}
        environment.pop("DATABASE_URL", None)
        with self.log.open("w") as log:
            self.process = subprocess.Popen([binary, "serve", "--listen", "127.0.0.1:0", "--requests-per-minute", str(REQUESTS_PER_MINUTE)],
                                            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        ready = self.process.stdout.readline()
        if not ready.startswith("Lathe is ready at "):
            self.say_log()
            self.__exit__()
            sys.exit("the server did not start")
        super().__init__(ready.split()[4], KEY)
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(timeout=60)
        self.folder.cleanup()

    def say_log(self) -> None:
        lines = [line for line in self.log.read_text().splitlines() if "INFO" not in line]
        print("\n".join(["the server's log:", *lines[-100:]]), file=sys.stderr, flush=True)

    def base_model(self) -> str:
        """A pretrained model, which the `openai` SDKs cannot make, for them to tune."""
        sums = {"instruction": "Count one up from {{ a }}.", "output": "{{ a + 1 }}", "variables": {"a": {"range": [0, 999]}}}
        dataset = self.call("datasets", {"name": "sums", "source": {"type": "template", "rows": 500, "seed": 7, "templates": [sums]}})
        tokenizer = self.call("tokenizers", {"name": "small", "type": "bpe", "dataset": dataset["id"], "vocab_size": 280})
        job = self.call("training/jobs", {
            "name": "base", "dataset": dataset["id"], "tokenizer": tokenizer["id"], "method": {"type": "pretrain"},
            "model": {"architecture": "gpt", "layers": 1, "heads": 2, "width": 32, "context": 64},
            "hyperparameters": {"steps": 40, "batch_size": 8}})
        until = time.monotonic() + DRIVE_SECONDS
        while (job := self.call(f"training/jobs/{job['id']}"))["state"] != "succeeded":
            if job["state"] == "failed" or time.monotonic() > until:
                self.say_log()
                sys.exit(f"the model to tune was not trained: {job['error']}")
            time.sleep(0.2)
        return job["model"]


def drive(client: str, command: list, environment: dict) -> list[Row]:
    """The rows of a drive, which says a line a step (see step.py and step.ts)."""
    try:
        ran = subprocess.run(command, cwd=HERE, env={**os.environ, **environment}, capture_output=True, text=True, timeout=DRIVE_SECONDS)
        said, errors, failed = ran.stdout, ran.stderr, ran.returncode != 0
    except subprocess.TimeoutExpired as late:
        said, errors, failed = (late.stdout or b"").decode(), f"no end after {DRIVE_SECONDS} s", True
    rows = [Row(client, *line.split("\t", 1)) for line in said.splitlines() if "\t" in line]
    if failed:
        print(f"{client}:\n{errors}", file=sys.stderr, flush=True)
        if not said or said.endswith("\n"):
            rows.append(Row(client, "start" if not rows else "end", ""))
        rows[-1].outcome, rows[-1].failed = "see above", True
    return rows


def drive_all() -> list[Row]:
    packages = str(tools.python_packages())
    with Server() as server:
        common = {"LATHE_URL": server.url, "LATHE_KEY": KEY, "LATHE_BASE_MODEL": server.base_model()}
        python = {**common, "PYTHONPATH": packages}
        rows = drive("generated Python", [sys.executable, "generated_python.py"],
                     {**python, "PYTHONPATH": f"{SDK / 'python'}{os.pathsep}{packages}"})
        rows += drive("generated TypeScript", node("generated_typescript.ts"), common)
        rows += drive("openai for Python", [sys.executable, "openai_python.py"], python)
        rows += drive("openai for Node", node("openai_node.ts"), common)
        if any(row.failed for row in rows):
            server.say_log()
    return rows


def main() -> int:
    only_generate = sys.argv[1:] == ["generate"]
    if sys.argv[1:] and not only_generate:
        sys.exit(__doc__)
    prepare()
    rows = generate()
    if not only_generate and not any(row.failed for row in rows):
        rows += drive_all()
    return show("client", rows)


if __name__ == "__main__":
    sys.exit(main())
