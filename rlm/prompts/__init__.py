"""The words the model reads, as text files beside this one, reviewed as prose."""

from __future__ import annotations

import functools
from pathlib import Path


@functools.cache
def text(name: str) -> str:
    """The prompt file called ``name``, without its trailing newline."""
    return Path(__file__).with_name(f"{name}.md").read_text("utf-8").rstrip("\n")


def fill(name: str, **values: str) -> str:
    """A prompt file with each ``{{name}}`` replaced; braces of any other kind are left alone."""
    filled = text(name)
    for key, value in values.items():
        filled = filled.replace("{{" + key + "}}", value)
    return filled
