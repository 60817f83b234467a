"""LMHandler: models for sandboxes that a script opens by itself, found by its address."""

from __future__ import annotations

from typing import Any

from rlm import handler, hostloop
from rlm.backends import Backends, client_of
from rlm.client import UsageSummary
from rlm.desk import Desk
from rlm.events import EventBus, Subscriber
from rlm.gate import Gate
from rlm.handler import Caller
from rlm.ledger import Ledger
from rlm.limits import Limits
from rlm.pool import Environments
from rlm.session import ServeCalls
from rlm.tree import Tree

from ..clients.base_lm import Prompt, messages_of

_listening: dict[tuple[str, int], LMHandler] = {}
"""The handlers of this process, by address."""


class LMHandler:
    """Answers what cells ask, with a client of the core's or one that waits for its replies.

    ``other_backend_client`` is asked in place of ``client`` by cells that name no model. What cells
    may ask for by name are the models of all clients.
    """

    def __init__(
        self,
        client: Any,
        host: str = "127.0.0.1",
        port: int = 0,
        other_backend_client: Any = None,
        batch_max_concurrent: int = 16,
    ) -> None:
        self.default_client = client
        self.other_backend_client = other_backend_client
        self.clients: dict[str, Any] = {}
        self._listen = (host, port)
        self._concurrency = batch_max_concurrent
        self._ledger = Ledger(Limits(max_depth=1))
        self._gates: dict[int, Gate] = {}
        self._door: handler.LMHandler | None = None
        for given in (client, other_backend_client):
            if given is not None:
                self.register_client(self._gate(given).client.model_name, given)

    def register_client(self, model_name: str, client: Any) -> None:
        """Let cells ask this client by this name."""
        self.clients[model_name] = client

    def start(self) -> tuple[str, int]:
        """Begin to answer. Returns the address. Safe to call twice."""
        if self._door is None:
            hostloop.run(self._start())
            _listening[self.address] = self
        return self.address

    def stop(self) -> None:
        """Answer no more. Safe to call twice."""
        if self._door is not None:
            del _listening[self.address]
            door, self._door = self._door, None
            hostloop.run(door.__aexit__())

    def __enter__(self) -> LMHandler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> tuple[str, int]:
        """What a sandbox is told to find this handler by; real once it has been started."""
        return self._door.address if self._door is not None else self._listen

    @property
    def port(self) -> int:
        """The address's second half."""
        return self.address[1]

    def completion(self, prompt: Prompt, model: str | None = None) -> str:
        """A reply to a text or to a list of messages. Raises ModelError."""
        door, caller = self._new_door(EventBus()), Caller("script", None, 0, "root")
        return hostloop.run(door.complete(messages_of(prompt), caller, model=model)).text

    def get_usage_summary(self) -> UsageSummary:
        """What all calls through this handler took, by model."""
        return self._ledger.usage()

    def serving(self, told: Subscriber) -> ServeCalls:
        """What answers the calls of a sandbox; ``told`` is told of each, as events."""
        door = self._new_door(EventBus([told]))
        tree = Tree(door, self._ledger, door.events, Environments(_no_environment))
        return Desk(tree, Caller("script", None, 0, "sub")).serve

    async def _start(self) -> None:
        host, port = self._listen
        backends = self._backends()
        await backends.prepare()
        door = handler.LMHandler(backends, self._ledger, EventBus(), host=host, port=port)
        self._door = await door.__aenter__()

    def _new_door(self, events: EventBus) -> handler.LMHandler:
        return handler.LMHandler(
            self._backends(), self._ledger, events, concurrency=self._concurrency, stream=False
        )

    def _backends(self) -> Backends:
        """The clients as they are now: a script may have registered more of them."""
        other = self.other_backend_client
        gates = {name: self._gate(client) for name, client in self.clients.items()}
        return Backends(
            [*dict.fromkeys((self._gate(self.default_client), *gates.values()))],
            sub=self._gate(other) if other is not None else None,
            aliases={name: gate.client.model_name for name, gate in gates.items()},
        )

    def _gate(self, client: Any) -> Gate:
        """One gate for each client, however often it is registered."""
        if id(client) not in self._gates:
            self._gates[id(client)] = Gate(client_of(client, {}), owned=False)
        return self._gates[id(client)]


def handler_at(address: tuple[str, int]) -> LMHandler | None:
    """The handler of this process that listens there."""
    return _listening.get(tuple(address))  # type: ignore[arg-type] # it may have come out of JSON, as a list


def _no_environment() -> Any:
    raise AssertionError("no child runs are started here")
