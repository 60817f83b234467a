"""A client without a model: the replies of a recording, found by what is asked."""

from .client import ReplayLM

__all__ = ["ReplayLM"]
