"""DockerREPL: cells in a container of their own, on any Docker engine."""
