"""RLM, where rlms has it."""

from rlm.rlm import RLM

__all__ = ["RLM"]
