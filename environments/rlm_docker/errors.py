"""What can go wrong with an engine and its containers, each with what to do next.

SandboxUnavailable          (rlm.errors) no container can be started
 |- EngineUnavailable         no engine answers, or there is no client for it
 |- EnginePermission          one answers, but not to this user
 |- ImageMissing              the image is not there and cannot be had
 |- EngineDiskFull            the engine has no room for a container
 `- ContainerRefused          the engine or the image cannot start this container
SandboxLost                 (rlm.errors) a container died
 |- ContainerOutOfMemory      killed for want of memory, supervisor and all
 |- ContainerKilled           killed from outside
 |- ContainerRemoved          removed from outside
 |- ContainerExpired          its time to live was over
 `- EngineLost                the engine stopped or was restarted
"""

from __future__ import annotations

from rlm.errors import SandboxLost, SandboxUnavailable


class EngineUnavailable(SandboxUnavailable):
    """No Docker engine answers, or a client for it is missing."""


class EnginePermission(SandboxUnavailable):
    """The engine's socket is not this user's to use."""


class ImageMissing(SandboxUnavailable):
    """The image is not on the engine and could not be pulled."""


class EngineDiskFull(SandboxUnavailable):
    """The engine has no space left."""


class ContainerRefused(SandboxUnavailable):
    """The engine refused the container, or nothing in the image could start in it."""


class ContainerOutOfMemory(SandboxLost):
    """The whole container was killed for want of memory."""


class ContainerKilled(SandboxLost):
    """Somebody killed the container."""


class ContainerRemoved(SandboxLost):
    """Somebody removed the container."""


class ContainerExpired(SandboxLost):
    """The container's time to live was over."""


class EngineLost(SandboxLost):
    """The engine stopped, was restarted, or can no longer be reached."""
