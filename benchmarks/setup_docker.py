"""Make the image that both sides of `compare_docker.py` run in: ours plus what the peer needs.

The peer starts `python` in its container, runs `pip install dill requests` there each time, and
imports both. So that it neither waits for a network nor compiles anything, they are in the image,
compiled. The image is made of one that is on the engine already; no registry is asked for it, and
nothing in it has a network while it is built.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from setup_peers import InstallError, run

IMAGE = "rlm-bench:latest"
BASE = "rlm-sandbox:latest"
PACKAGES = ("pip", "dill", "requests")
PURE = ("--only-binary=:all:", "--platform", "any", "--implementation", "py", "--abi", "none")

# Run in the base image: its version, and a folder that its interpreter imports from.
PROBE = "import site, sys; print('%d.%d' % sys.version_info[:2]); print(site.getsitepackages()[0])"
PIP = '#!/bin/sh\nexec python3 -m pip "$@"\n'
DOCKERFILE = """\
FROM {base}
USER 0
COPY packages {folder}
COPY pip /usr/local/bin/pip
RUN command -v python || ln -s "$(command -v python3)" /usr/local/bin/python
RUN python3 -m compileall -q --invalidation-mode unchecked-hash {folder}
"""


def exists(image: str) -> bool:
    command = ["docker", "image", "inspect", image]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def make(base: str) -> None:
    """Build the image. Raises InstallError with the end of what failed."""
    probe = ["docker", "run", "--rm", "--pull", "never", "--network", "none", base, "python3", "-c", PROBE]
    version, folder = run(*probe).split()
    with tempfile.TemporaryDirectory() as name:
        context = Path(name)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--no-compile"]
        run(*pip, "--target", context / "packages", "--python-version", version, *PURE, *PACKAGES)
        (context / "pip").write_text(PIP)
        (context / "pip").chmod(0o755)
        text = DOCKERFILE.format(base=base, folder=folder)
        (context / "Dockerfile").write_text(text)
        run("docker", "build", "--quiet", "--network", "none", "--tag", IMAGE, context)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=BASE, help="an image with a python3 and a shell (%(default)s)")
    parser.add_argument("--again", action="store_true", help="make it anew if it is there")
    parser.add_argument("--clean", action="store_true", help="remove it")
    arguments = parser.parse_args(argv)
    try:
        if arguments.clean:
            if exists(IMAGE):
                run("docker", "rmi", IMAGE)
            print(f"{IMAGE}: removed")
        elif exists(IMAGE) and not arguments.again:
            print(f"{IMAGE}: already there")
        else:
            make(arguments.base)
            print(f"{IMAGE}: made of {arguments.base}")
    except (InstallError, FileNotFoundError) as error:
        print(f"{IMAGE}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
