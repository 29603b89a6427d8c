"""Docker's command line, in either of the forms in which compose comes."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
COMPOSE_FILE = ROOT / "docker/compose.yaml"


def output(*words: str, **options) -> str:
    """What `docker …` prints; ends the run where it fails."""
    ran = subprocess.run(["docker", *words], stdout=subprocess.PIPE, text=True, **options)
    if ran.returncode:
        sys.exit(f"docker {' '.join(words)}: exit status {ran.returncode}")
    return ran.stdout.strip()


def build(dockerfile: str, image: str, context: Path) -> None:
    """Shows what it does, which may take long; ends the run where it fails."""
    if status := subprocess.run(["docker", "build", "-f", str(context / dockerfile), "-t", image, str(context)]).returncode:
        sys.exit(f"docker build -f {dockerfile}: exit status {status}")


def check() -> None:
    """Ends the run with a sentence where there is no Docker to talk to."""
    if shutil.which("docker") is None:
        sys.exit("there is no `docker`: install Docker, or on Debian: apt-get install docker.io docker-compose")
    if subprocess.run(["docker", "info"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        sys.exit("Docker's daemon does not answer `docker info`: start it, or join the group that may use it")


def compose() -> list[str]:
    """`docker compose`, or the program `docker-compose` where the plug-in is missing."""
    plugin = subprocess.run(["docker", "compose", "version"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    command = ["docker", "compose"] if plugin.returncode == 0 else ["docker-compose"]
    if shutil.which(command[0]) is None:
        sys.exit("there is no compose: install Docker's compose plug-in, or on Debian: apt-get install docker-compose")
    return [*command, "-f", str(COMPOSE_FILE)]


def signal(container: str, name: str, command: str) -> None:
    """Sends a signal to the processes of a container whose command begins so."""
    output("exec", container, "sh", "-c",
           f'for at in /proc/[0-9]*; do case "$(tr "\\0" " " < $at/cmdline)" in "{command}"*) kill -{name} ${{at#/proc/}};; esac; done 2> /dev/null; true')


def megabytes(image: str) -> str:
    return f"{int(output('image', 'inspect', '-f', '{{.Size}}', image)) / 1e6:,.0f} MB"


def says_what_it_is(image: str) -> str:
    """The distribution in an image, whatever its tag says."""
    return output("run", "--rm", "--entrypoint", "sh", image, "-c", '. /etc/os-release && echo "$PRETTY_NAME"')
