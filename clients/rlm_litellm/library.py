"""LiteLLM's import, and what has to be so before and after it.

Left to itself the import asks the network for prices and reads a ``.env`` of the working
directory, which can send prompts and keys elsewhere; and it takes seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from importlib import metadata
from types import ModuleType

from rlm.errors import ConfigError

MALWARE = ("1.82.7", "1.82.8")
"""Versions that were put on PyPI in March 2026 by somebody else, and steal credentials (MAL-2026-2144)."""

QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION"}
"""Prices from the package instead of the network, and no ``.env``; what the user has set stays."""

SETTINGS = {
    "telemetry": False,
    "cache": None,
    "drop_params": False,
    "num_retries": None,
    "suppress_debug_info": True,  # the "Give Feedback / Get Help" on the terminal
    "disable_token_counter": True,  # which asks a hub for some models' tokenizers, and waits half a minute
}
"""Of LiteLLM's, for the whole process. A user who has imported it before has settings of their own."""

CALLBACKS = ("callbacks", "input_callback", "success_callback", "failure_callback", "service_callback")

_LOGGERS = ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy")

_lock = threading.Lock()


def load() -> ModuleType:
    """LiteLLM, imported once for the process. Blocks for seconds: not for an event loop."""
    with _lock:
        _refuse_malware()
        is_new = sys.modules.get("litellm") is None  # else it is the user's own, or ours from before
        with _environment() if is_new else contextlib.nullcontext():
            try:
                library = importlib.import_module("litellm")
            except ModuleNotFoundError as error:
                raise ConfigError(f"{error}: pip install 'rlm[litellm]'") from None
        if is_new:
            _configure(library)
        return library


def _refuse_malware() -> None:
    """Refuse to import what is known to steal keys. Raises ConfigError."""
    for found in metadata.distributions(name="litellm"):
        if found.version in MALWARE:
            raise ConfigError(
                f"litellm {found.version} is malware that steals credentials (MAL-2026-2144, March 2026), "
                "and was not imported. Take it off this machine, and renew every key that was readable here: "
                "1.82.8 already runs when Python starts. Then: pip install 'rlm[litellm]'"
            )


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """The environment variables for the import; all of them are as before afterwards."""
    before = dict(os.environ)
    os.environ.update({name: value for name, value in QUIET.items() if name not in before})
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _configure(library: ModuleType) -> None:
    """One attempt, no words on the terminal, nothing dropped in silence, no cache, no callbacks."""
    for name, value in SETTINGS.items():
        setattr(library, name, value)
    for name in CALLBACKS:
        setattr(library, name, [])
    for name in _LOGGERS:  # leave what it logs to the user's handlers: it brings ones to standard error
        logger = logging.getLogger(name)
        logger.handlers = [logging.NullHandler()]
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)  # below that it logs requests whole
    # What it thinks of a reply in an odd shape; that it is one is for the reply's reader to say.
    warnings.filterwarnings("ignore", message="Pydantic serializer warnings", category=UserWarning)
