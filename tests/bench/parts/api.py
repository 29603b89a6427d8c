"""What the api costs a completion of one token, beside an engine that answers at once: time as the api's own spans say
(`request.duration_ms` of the log, which begins when the head is read), and its processor time a request.

The model, its tokenizer and its replica's row are real; the row is then pointed at the stand-in for its engine, whose own
time and the way there and back are within the span.
"""

import http.client
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from report import Figure
from sides import HERE
from stack import KEY, Stack, cpu_seconds

ROUNDS = 6
ALONE = 500
TOGETHER = 32
EACH = 50


def run() -> list[Figure]:
    stub = subprocess.Popen([sys.executable, HERE / "peers/stub_engine.py"], stdout=subprocess.PIPE, text=True)
    p50, p99, cpu = [], [], []
    try:
        port = int(stub.stdout.readline())
        with tempfile.TemporaryDirectory(prefix="lathe-bench-") as folder, Stack(Path(folder), {"LATHE_LOG_FORMAT": "json"}) as stack:
            model = served_model(stack, port)
            api = stack.process_of("api")
            ask(stack, model, 200)
            for _ in range(ROUNDS):
                said = stack.log.stat().st_size
                ask(stack, model, ALONE)
                times = sorted(span_milliseconds(stack.log, said))
                p50.append(times[len(times) // 2])
                p99.append(times[len(times) * 99 // 100])
                before = cpu_seconds([api])
                clients = [threading.Thread(target=ask, args=(stack, model, EACH)) for _ in range(TOGETHER)]
                for client in clients:
                    client.start()
                for client in clients:
                    client.join()
                cpu.append(1e3 * (cpu_seconds([api]) - before) / (TOGETHER * EACH))
    finally:
        stub.kill()
        stub.wait()
    return [
        Figure("api/overhead-p50", "ms", p50, goal=1.0, at_most=True, expected="0.8 ms"),
        Figure("api/overhead-p99", "ms", p99, goal=5.0, at_most=True, expected="3 ms"),
        Figure("api/cpu-32-clients", "ms", cpu, expected="0.5 ms", note="of a core, a request"),
    ]


def served_model(stack: Stack, port: int) -> str:
    """A tiny model whose requests go to the engine at `port`."""
    sums = {"instruction": "Count one up from {{ a }}.", "output": "{{ a + 1 }}", "variables": {"a": {"range": [0, 999]}}}
    dataset = stack.call("datasets", {"name": "sums", "source": {"type": "template", "rows": 500, "seed": 7, "templates": [sums]}})
    tokenizer = stack.call("tokenizers", {"name": "small", "type": "bpe", "dataset": dataset["id"], "vocab_size": 280})
    job = stack.call("training/jobs", {
        "name": "base", "dataset": dataset["id"], "tokenizer": tokenizer["id"], "method": {"type": "pretrain"},
        "model": {"architecture": "gpt", "layers": 1, "heads": 2, "width": 32, "context": 64}, "hyperparameters": {"steps": 2, "batch_size": 8}})
    model = stack.ended(f"training/jobs/{job['id']}", ("succeeded",))["model"]
    ask(stack, model, 1)
    stack.sql(f"UPDATE replicas SET address = '127.0.0.1:{port}' WHERE state = 'ready'")
    return model


def ask(stack: Stack, model: str, times: int) -> None:
    """One after the other on one connection."""
    connection = http.client.HTTPConnection(stack.url.removeprefix("http://"))
    body = json.dumps({"model": model, "prompt": "Count one up from 37.", "max_tokens": 1, "temperature": 0})
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    for _ in range(times):
        connection.request("POST", "/v1/completions", body, headers)
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            sys.exit(f"a completion was answered {answer.status}: {text.decode()}")
    connection.close()


def span_milliseconds(log: Path, since: int) -> list[float]:
    with log.open() as lines:
        lines.seek(since)
        said = [json.loads(line) for line in lines if '"answered"' in line and "/v1/completions" in line]
    return [line["request.duration_ms"] for line in said]
