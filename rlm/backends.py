"""The models of one RLM: its clients, each behind its gate, by the names that cells may use."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plugins, secrets
from .adapter import SyncLM
from .client import BaseLM
from .errors import ConfigError, ModelError
from .gate import Gate, Policy, Pool
from .pace import RateLimit, SharedTimes
from .recording import Recorder

if TYPE_CHECKING:
    from .cache import Cache
    from .config import Config


class Backends:
    """Which client answers: the root's, that of sub-calls, and those a cell asks for by name."""

    def __init__(
        self,
        gates: Sequence[Gate],
        sub: Gate | None = None,
        *,
        keys: frozenset[str] = frozenset(),
        recorder: Recorder | None = None,
        cache: Cache | None = None,
        sampling: Mapping[str, Any] | None = None,
        sub_sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self.gates = list(gates)
        self._sub = sub or (self.gates[0] if self.gates else None)
        self._keys = keys
        self._recorder = recorder
        self.cache = cache
        """Where replies are kept, if anywhere."""
        self._sampling = _fields(sampling or {})
        self._sub_sampling = self._sampling if sub_sampling is None else _fields(sub_sampling)

    @classmethod
    def of(cls, client: BaseLM | None) -> Backends:
        """One client for everything; or none, and every call fails with a sentence that says so."""
        return cls([Gate(client)] if client is not None else [])

    @property
    def root(self) -> Gate:
        """Whose replies are the root's turns."""
        if not self.gates:
            raise ModelError(
                "no model is connected to this environment: it was opened without one", sent=False
            )
        return self.gates[0]

    def choose(self, model: str | None, *, sub: bool) -> Gate:
        """The gate for a call. Raises ModelError for a name that the run does not offer."""
        if model is None:
            return self._sub if sub and self._sub is not None else self.root
        gate = self._names().get(model) if self.gates else self.root
        if gate is None:
            raise ModelError(
                f"this run offers no model {model!r}; it offers {', '.join(map(repr, self._names()))}. "
                "The second argument of llm_query is the name of a model: text belongs in the prompt.",
                sent=False,
            )
        return gate

    def sampling(self, *, sub: bool) -> dict[str, Any]:
        """The fields of a `Request` that the user has set for the root's turns, or for sub-calls."""
        return self._sub_sampling if sub else self._sampling

    def _names(self) -> dict[str, Gate]:
        """A model's own name, its backend's where that is no model's, and both for two of one name."""
        names: dict[str, Gate] = {}
        for gate in self.gates:
            names.setdefault(gate.client.model_name, gate)
        for gate in self.gates:
            if names[gate.client.model_name] is not gate:
                names.setdefault(f"{gate.name}/{gate.client.model_name}", gate)
        return names

    async def prepare(self) -> list[str]:
        """Ready every client. Returns what they have to say to the user."""
        notes = [await gate.client.prepare() for gate in self.gates]
        return [self.hide(note) for note in notes if note]

    async def aclose(self) -> None:
        """Close what was made for these, and not what was given. Safe to call twice."""
        try:
            for gate in self.gates:
                if gate.owned:
                    await gate.client.aclose()
        finally:
            if self._recorder is not None:
                self._recorder.close()
            if self.cache is not None:
                await self.cache.aclose()

    def hide(self, text: str) -> str:
        """A text without keys: those in the settings, and those in the environment."""
        return secrets.hide(text, self._keys | secrets.in_environment())


def connect(config: Config) -> Backends:
    """The clients that a config names. Raises ConfigError or PluginError for what cannot be had."""
    wanted = _wanted(config)
    with contextlib.ExitStack() as opened:
        recorder = opened.enter_context(Recorder(config.record)) if config.record is not None else None
        cache = opened.enter_context(_cache(config.cache)) if config.cache is not None else None
        gates = _gates(config, wanted, recorder)
        opened.pop_all()  # all went well: they stay open
    return Backends(
        gates,
        sub=gates[1] if len(gates) > 1 else None,  # without a sub_backend the first of the others, as in rlms
        keys=frozenset(secrets.find([kwargs for _, kwargs in wanted])),
        recorder=recorder,
        cache=cache,
        sampling=config.sampling_args,
        sub_sampling=config.sub_sampling_args,
    )


def _cache(path: Path) -> Cache:
    from .cache import Cache  # whoever has none need not have SQLite

    return Cache(path)


def _wanted(config: Config) -> list[tuple[Any, dict[str, Any]]]:
    """The backends of a config with their keywords: the root's, that of sub-calls, the others."""
    wanted = [(config.backend, config.backend_kwargs)]
    if config.sub_backend is not None:
        wanted.append((config.sub_backend, config.sub_backend_kwargs))
    settings = config.other_backend_kwargs or [{}] * len(config.other_backends)
    if len(settings) != len(config.other_backends):
        raise ConfigError(
            f"other_backend_kwargs has {len(settings)} entries, and other_backends has "
            f"{len(config.other_backends)}: there is one for each"
        )
    return [*wanted, *zip(config.other_backends, settings, strict=True)]


def _gates(
    config: Config, wanted: Sequence[tuple[Any, dict[str, Any]]], recorder: Recorder | None
) -> list[Gate]:
    policy = Policy(config.max_retries, config.call_timeout, config.hedge_after)
    pools = _Pools(config.rate_limits, config.share_rate_limits)
    identities = _identities(wanted) if config.cache is not None else [""] * len(wanted)
    gates = []
    for (backend, kwargs), identity in zip(wanted, identities, strict=True):
        client, name = _client(backend, kwargs), name_of(backend)
        if recorder is not None:
            client = recorder.record(client)
        pool_for = functools.partial(pools.of, name)
        owned = not isinstance(backend, BaseLM)
        gate = Gate(
            client,
            name,
            owned=owned,
            policy=policy,
            pool_for=pool_for,
            prices=config.prices,
            identity=identity,
        )
        gates.append(gate)
    return gates


def _identities(wanted: Sequence[tuple[Any, dict[str, Any]]]) -> list[str]:
    """What tells each backend from others of its name, in a cache that other processes share.

    For one that is made by name: what it is made with. Of an object nothing more is known than that it
    is none of those before it.
    """
    from .cache import settings_key

    objects: dict[str, dict[int, int]] = {}
    found = []
    for backend, kwargs in wanted:
        if isinstance(backend, str):
            found.append(settings_key(kwargs))
            continue
        alike = objects.setdefault(name_of(backend), {})
        found.append(f"object {alike.setdefault(id(backend), len(alike) + 1)}")
    return found


class _Pools:
    """One pool for each provider, and for each model with limits of its own."""

    def __init__(self, limits: Mapping[str, RateLimit], shared: Path | None) -> None:
        self._limits = limits
        self._shared = shared
        self._pools: dict[str, Pool] = {}

    def of(self, backend: str, provider: str, model: str) -> Sequence[Pool]:
        limit = self._limits.get(backend) or self._limits.get("*")
        pools = [self._pool(provider, limit)]
        if model in self._limits:
            pools.append(self._pool(f"{provider} {model}", self._limits[model]))
        return pools

    def _pool(self, name: str, limit: RateLimit | None) -> Pool:
        if name not in self._pools:
            times = SharedTimes(self._shared, name) if self._shared is not None else None
            self._pools[name] = Pool(name, limit, times)
        return self._pools[name]


def _client(backend: Any, settings: Mapping[str, Any]) -> BaseLM:
    """The client that a backend stands for: a name, a BaseLM, a function, a synchronous client."""
    if isinstance(backend, str):
        kind = plugins.load("rlm.clients", backend)
        made = plugins.construct(kind, settings, f"backend {backend!r}")
    elif settings:
        raise ConfigError("backend_kwargs have no use with a backend object: give them to it")
    elif isinstance(backend, type):
        raise ConfigError(f"backend={backend.__name__} is a class: give an object, {backend.__name__}(...)")
    else:
        made = backend
    if isinstance(made, BaseLM):
        return made
    if callable(made) or hasattr(made, "completion"):
        return SyncLM(made)
    raise ConfigError(
        f"backend={made!r}: give the name of a client (see `rlm clients`), a BaseLM, or a function "
        "of a Request"
    )


def name_of(thing: Any) -> str:
    """What a backend or an environment is called in events."""
    return thing if isinstance(thing, str) else getattr(thing, "__name__", type(thing).__name__)


_SAMPLING = frozenset(("max_tokens", "temperature", "stop", "seed"))


def _fields(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling arguments as fields of a `Request`; what has no field of its own is ``extra``."""
    fields = {name: value for name, value in sampling.items() if name in _SAMPLING}
    if isinstance(stop := fields.get("stop"), str):
        fields["stop"] = (stop,)
    elif stop is not None:
        fields["stop"] = tuple(stop)
    extra = {name: value for name, value in sampling.items() if name not in _SAMPLING}
    return {**fields, "extra": extra} if extra else fields
