"""DockerREPL, as scripts for rlms know it."""

from __future__ import annotations

from typing import Any

from .sandbox import Sandbox


class DockerREPL(Sandbox):
    """Cells in a container, without any network: see `rlm_docker`, also for the ``image``."""

    environment = "docker"
    takes_source = True

    def __init__(self, image: str | None = None, *args: Any, **settings: Any) -> None:
        if image is not None:
            settings["image"] = image
        super().__init__(*args, **settings)
