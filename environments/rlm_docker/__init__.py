"""DockerREPL: cells in a container of their own, on any Docker engine."""

from .environment import DockerREPL as DockerREPL
