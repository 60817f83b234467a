"""LocalREPL, as scripts for rlms know it."""

from .sandbox import Sandbox


class LocalREPL(Sandbox):
    """Cells in a process of their own on this machine: see `rlm_local`. Unlike there, not in this process."""

    environment = "local"
