#!/usr/bin/env python3
"""Run a command beside a throw-away PostgreSQL, its address in DATABASE_URL.

    with_postgres.py COMMAND [ARGUMENT ...]

The cluster lives in a temporary folder, listens on loopback alone, and is gone when the command
ends. As root the server runs under another user, which PostgreSQL demands;
where that user cannot reach the binaries (a private home), a copy is taken. `--migrate` before the
command applies migrations/*.sql first.
"""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def server_user():
    """The (uid, gid) to drop to; None where this process is not root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
        except KeyError:
            continue
    return 65534, 65534


@contextlib.contextmanager
def server(durable: bool = False):
    """A fresh server while the block runs: its port, and how to run a program of PostgreSQL as its user. `durable` writes
    through to the disk, as a server in earnest does."""
    binaries = Path(os.environ["LATHE_POSTGRES_BIN"])
    user = server_user()
    folder = Path(tempfile.mkdtemp(prefix="lathe-pg-", dir="/tmp"))

    def run(program, *words, **options):
        if user:
            options |= {"user": user[0], "group": user[1], "extra_groups": []}
        command = [str(word) for word in (binaries / program, *words)]
        return subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, **options)

    try:
        if user:
            os.chown(folder, *user)
            try:
                run("postgres", "--version")
            except (PermissionError, subprocess.CalledProcessError):
                copy = folder / "install"
                shutil.copytree(binaries.parent, copy, symlinks=True)
                binaries = copy / binaries.name
        os.chmod(folder, 0o755)
        cluster = folder / "cluster"
        run("initdb", "-D", cluster, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c max_connections=300"
        settings += "" if durable else " -c fsync=off"
        run("pg_ctl", "-D", cluster, "-o", settings, "-l", folder / "log", "-w", "start")
        try:
            yield port, run
        finally:
            run("pg_ctl", "-D", cluster, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    arguments = sys.argv[1:]
    migrate = arguments[:1] == ["--migrate"]
    command = arguments[1:] if migrate else arguments
    if not command:
        sys.exit(__doc__)
    with server() as (port, run):
        if migrate:
            for file in sorted((ROOT / "migrations").glob("*.sql")):
                run("psql", "-q", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", port, "-U", "postgres", "-d", "postgres",
                    "-f", "-", input=file.read_bytes())
        environment = os.environ | {"DATABASE_URL": f"postgres://postgres@127.0.0.1:{port}/postgres"}
        return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
