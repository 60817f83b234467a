"""RLMLogger: what runs did, in memory and as the JSON lines that rlms' viewer reads."""

from __future__ import annotations

import os
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

from rlm import jsonl, secrets
from rlm.backends import name_of
from rlm.config import Config
from rlm.errors import ConfigError

from .core.trajectory import Trajectory, entry
from .core.types import RLMIteration, RLMMetadata


class RLMLogger:
    """Keeps what the latest run did; with ``log_dir`` a file keeps what all of them did.

    The file has a line of "metadata", then a line for each "iteration" when it is over. While several
    runs go on at once their iterations stand here side by side; a result's ``metadata`` has its own only.
    """

    def __init__(self, log_dir: str | os.PathLike[str] | None = None, file_name: str = "rlm") -> None:
        self.log_dir = log_dir
        self.log_file_path: str | None = None
        if log_dir is not None:
            name = f"{file_name}_{datetime.now():%Y-%m-%d_%H-%M-%S}_{uuid.uuid4().hex[:8]}.jsonl"
            self.log_file_path = os.path.join(log_dir, name)
        self._metadata: dict[str, Any] | None = None
        self._iterations: list[dict[str, Any]] = []

    def follow(self, config: Config, root_model: str) -> Trajectory:
        """A run begins: what is to be told its events."""
        metadata = RLMMetadata(
            root_model=root_model,
            max_depth=config.max_depth,
            max_iterations=config.max_iterations,
            backend=name_of(config.backend),
            backend_kwargs=secrets.mask(config.backend_kwargs),
            environment_type=name_of(config.environment),
            environment_kwargs=secrets.mask(config.environment_kwargs),
            other_backends=[name_of(backend) for backend in config.other_backends] or None,
        )
        self.log_metadata(metadata)
        self.clear_iterations()
        return Trajectory(metadata, self.log)

    def log_metadata(self, metadata: RLMMetadata) -> None:
        """Keep how runs are set up; of the first of them only."""
        if self._metadata is None:
            self._metadata = metadata.to_dict()
            self._write({"type": "metadata", "timestamp": datetime.now().isoformat(), **self._metadata})

    def log(self, iteration: RLMIteration) -> None:
        """Keep an iteration. Called on the core's thread, when it is over."""
        line = entry(iteration, self.iteration_count + 1, datetime.now())
        self._iterations.append(line)
        self._write(line)

    def clear_iterations(self) -> None:
        """Forget the iterations so far; the file keeps them."""
        self._iterations = []

    def get_trajectory(self) -> dict[str, Any] | None:
        """What has been kept; None before the first run."""
        if self._metadata is None:
            return None
        return {"run_metadata": self._metadata, "iterations": list(self._iterations)}

    @property
    def iteration_count(self) -> int:
        """How many iterations are kept."""
        return len(self._iterations)

    def _write(self, line: dict[str, Any]) -> None:
        if self.log_file_path is None:
            return
        path = Path(self.log_file_path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with jsonl.Appender(path, "log") as file:
                file.append(line)
        except OSError as error:
            raise ConfigError(f"the log {str(path)!r} cannot be written: {error.strerror}") from error
