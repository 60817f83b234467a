"""Cells in a process of this machine, behind the strongest wall its kernel offers."""

from .environment import LocalREPL

__all__ = ["LocalREPL"]
