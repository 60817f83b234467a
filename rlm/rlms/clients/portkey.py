"""Portkey, as scripts for rlms name it."""

from .provider import ProviderClient


class PortkeyClient(ProviderClient):
    """The Portkey gateway."""

    backend = "portkey"
