"""An upload of two gigabytes until it is on the disk, beside `curl` to nginx, which writes the body to a file, and fsync;
and what it takes of the api's memory. `curl` sends both, and both write below one folder."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import Figure
from stack import KEY, Stack

ROUNDS = 5
MEGABYTES = 2048
# Beyond what one request takes anyway.
FLAT_MEGABYTES = 16

CONFIGURATION = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/errors;
events {{ worker_connections 64; }}
http {{
    access_log off; client_max_body_size 0;
    client_body_temp_path {folder}/bodies; proxy_temp_path {folder}/t1; fastcgi_temp_path {folder}/t2;
    uwsgi_temp_path {folder}/t3; scgi_temp_path {folder}/t4;
    server {{ listen 127.0.0.1:{port}; root {folder}/files; location / {{ dav_methods PUT; }} }}
}}
"""


def run() -> list[Figure]:
    missing = [(name, line) for name, line in (("nginx", "apt-get install nginx-light"), ("curl", "apt-get install curl"))
               if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    if missing:
        sys.exit("missing on this machine:\n" + "\n".join(f"  {name:8} install it with: {line}" for name, line in missing))
    ours, theirs, grown = [], [], []
    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as name, Stack(Path(name)) as stack:
        folder, body = Path(name) / "nginx", Path(name) / "body"
        write(body)
        nginx, port = start_nginx(folder)
        try:
            # The first round, in which each touches its memory for the first time, does not count.
            for at in range(ROUNDS + 1):
                api = stack.process_of("api")
                before = most_megabytes(api)
                our, their = to_lathe(stack, body), to_nginx(folder, port, body)
                if at > 0:
                    ours.append(MEGABYTES / our)
                    theirs.append(MEGABYTES / their)
                    grown.append(most_megabytes(api) - before)
        finally:
            nginx.terminate()
            nginx.wait()
    return [
        Figure("upload/speed", "MiB/s", ours, theirs, goal=0.8, expected="0.7 ×"),
        Figure("upload/api-memory", "MB", [max(value, 0.1) for value in grown], goal=FLAT_MEGABYTES, at_most=True, expected="2 MB",
               note="by which the most that the api ever took grew in one upload"),
    ]


def write(body: Path) -> None:
    block = bytes(n * n * 31 % 251 for n in range(1 << 20))
    with body.open("wb") as file:
        for _ in range(MEGABYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def start_nginx(folder: Path) -> tuple[subprocess.Popen, int]:
    for part in (folder, folder / "files"):
        part.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    user = "user root;\n" if os.geteuid() == 0 else ""
    (folder / "conf").write_text(user + CONFIGURATION.format(folder=folder, port=port))
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    nginx = subprocess.Popen([program, "-e", folder / "errors", "-c", folder / "conf", "-p", folder])
    until = time.monotonic() + 10
    while not listens(port):
        if nginx.poll() is not None or time.monotonic() > until:
            sys.exit(f"nginx did not start: {(folder / 'errors').read_text()}")
        time.sleep(0.01)
    return nginx, port


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def curl(*words) -> str:
    ran = subprocess.run(["curl", "-sS", "--fail-with-body", *map(str, words)], stdout=subprocess.PIPE, text=True)
    if ran.returncode:
        sys.exit(f"curl failed: {ran.stdout}")
    return ran.stdout


def to_lathe(stack: Stack, body: Path) -> float:
    """Lathe answers once the file is synced."""
    begun = time.monotonic()
    said = curl(f"{stack.url}/v1/files", "-H", f"Authorization: Bearer {KEY}", "-F", "purpose=fine-tune", "-F", f"file=@{body};filename=text.txt")
    seconds = time.monotonic() - begun
    curl("-X", "DELETE", f"{stack.url}/v1/files/{json.loads(said)['id']}", "-H", f"Authorization: Bearer {KEY}")
    return seconds


def to_nginx(folder: Path, port: int, body: Path) -> float:
    begun = time.monotonic()
    curl("-T", body, f"http://127.0.0.1:{port}/body")
    with (folder / "files/body").open("rb") as file:
        os.fsync(file.fileno())
    seconds = time.monotonic() - begun
    (folder / "files/body").unlink()
    return seconds


def most_megabytes(pid: int) -> float:
    """The most that the process has had in memory so far."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000
