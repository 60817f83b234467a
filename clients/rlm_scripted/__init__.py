"""A client without a model: replies from a script, for tests, demos and benchmarks."""

from .client import ScriptedLM

__all__ = ["ScriptedLM"]
