"""The models of one RLM: its clients, each behind its gate, by the names that cells may use."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plugins, secrets
from .adapter import SyncLM
from .client import BaseLM
from .errors import ConfigError, LimitExceeded, ModelError, RLMError
from .gate import Gate, Policy, Pool
from .pace import RateLimit, SharedTimes
from .recording import Recorder

if TYPE_CHECKING:
    from .cache import Cache
    from .config import Config


log = logging.getLogger("rlm")


class Backends:
    """Which client answers: the root's, that of sub-calls, and those a cell asks for by name."""

    def __init__(
        self,
        gates: Sequence[Gate],
        sub: Gate | None = None,
        *,
        keys: frozenset[str] = frozenset(),
        recorder: Recorder | None = None,
        limited: Sequence[str] = (),
        cache: Cache | None = None,
        sampling: Mapping[str, Any] | None = None,
        sub_sampling: Mapping[str, Any] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self.gates = list(gates)
        self._sub = sub or (self.gates[0] if self.gates else None)
        self._keys = keys
        self._recorder = recorder
        self._limited = limited
        self._aliases = dict(aliases or {})
        self.cache = cache
        """Where replies are kept, if anywhere."""
        self._sampling = sampling_fields(sampling or {})
        self._sub_sampling = self._sampling if sub_sampling is None else sampling_fields(sub_sampling)

    @classmethod
    def of(cls, client: BaseLM | None, *, owned: bool = False) -> Backends:
        """One client for everything; or none, and every call fails with a sentence that says so."""
        return cls([Gate(client, owned=owned)] if client is not None else [])

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
        gate = self._names().get(self._aliases.get(model, model)) if self.gates else self.root
        if gate is None:
            raise ModelError(
                f"this run offers no model {model!r}; it offers {self._offered()}. "
                "The second argument of llm_query is the name of a model: text belongs in the prompt.",
                sent=False,
            )
        return gate

    def sampling(self, *, sub: bool) -> dict[str, Any]:
        """The fields of a `Request` that the user has set for the root's turns, or for sub-calls."""
        return self._sub_sampling if sub else self._sampling

    def _names(self) -> dict[str, Gate]:
        """A model's own name; its backend's where that is no model's; both, for two of one name."""
        names: dict[str, Gate] = {}
        for gate in self.gates:
            for name in (gate.client.model_name, *getattr(gate.client, "model_names", ())):
                names.setdefault(name, gate)
        without = [gate for gate in self.gates if gate not in names.values()]
        for gate in [*without, *self.gates]:
            names.setdefault(f"{gate.name}/{gate.client.model_name}", gate)
        for gate in self.gates:
            names.setdefault(gate.name, gate)
        return names

    def _offered(self) -> str:
        """The names worth telling: one for each gate."""
        return ", ".join(map(repr, [*self._aliases, *self._models()]))

    def _models(self) -> list[str]:
        first = {id(gate): name for name, gate in reversed(self._names().items())}
        return [first[id(gate)] for gate in self.gates if id(gate) in first]

    def check_aliases(self) -> None:
        """Raises ConfigError for an alias of a model that there is not, or that hides one."""
        names = self._names()
        for alias, name in self._aliases.items():
            if name not in names:
                models = ", ".join(map(repr, self._models()))
                raise ConfigError(f"model_aliases: {alias!r} stands for {name!r}; there is {models}")
            if alias in names:
                raise ConfigError(f"model_aliases: {alias!r} is the name of a model already")

    async def prepare(self) -> list[str]:
        """Ready every client. Returns what they have to say to the user."""
        try:
            notes = [await gate.client.prepare() for gate in self.gates]
        except Exception as error:  # a boundary: a client is somebody else's code
            failure = self.as_ours(error)
            raise failure from failure.__cause__
        return [self.hide(note) for note in [*notes, *self._unused_limits()] if note]

    def _unused_limits(self) -> list[str]:
        known = {"*", *self._names(), *(gate.name for gate in self.gates)}
        return [
            f"rate_limits: {name!r} is no backend and no model of this RLM, which has {self._offered()}"
            for name in self._limited
            if name not in known
        ]

    def check_prices(self) -> None:
        """Raises ConfigError for a model whose calls nobody can tell the cost of."""
        for gate in self.gates:
            model = gate.client.model_name
            info = gate.info(model)
            if info.price is None and not info.tells_cost:
                raise ConfigError(
                    f"max_budget is set, and nobody knows what {model!r} ({gate.name}) costs: say so, with "
                    f"prices={{{model!r}: {{'input': ..., 'output': ...}}}} in dollars for a million tokens"
                )

    async def aclose(self) -> None:
        """Close what was made for these, and not what was given. Safe to call twice."""
        try:
            closing = [gate.client.aclose() for gate in self.gates if gate.owned]
            for outcome in await asyncio.gather(*closing, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    log.warning("a client could not be closed: %s", self.hide(repr(outcome)))
        finally:
            if self._recorder is not None:
                self._recorder.close()
            if self.cache is not None:
                await self.cache.aclose()

    def hide(self, text: str) -> str:
        """A text without keys: those in the settings, and those in the environment."""
        return secrets.hide(text, self._keys | secrets.in_environment())

    def as_ours(self, error: Exception) -> RLMError:
        """An error of this framework's own kinds, and without keys in anything that is printed of it."""
        if isinstance(error, LimitExceeded):  # the ledger's own words; a batch may have thousands of them
            return error
        hidden = self.hide(str(error))
        told = "\n".join(map(str, _chain(error)))
        if isinstance(error, RLMError):
            failure: RLMError = error
            if hidden != str(error):
                failure.args = (hidden,)
        else:
            failure = ModelError(f"the model call failed: {type(error).__name__}: {hidden}")
            failure.__cause__ = error
        if self.hide(told) != told:  # a traceback shows the text of what an error came of, too
            failure.__cause__ = failure.__context__ = None
        if isinstance(failure, ModelError):
            failure.code = failure.code and self.hide(failure.code)
            failure.request_id = failure.request_id and self.hide(failure.request_id)
        return failure


def _chain(error: BaseException) -> list[BaseException]:
    """An error, and what it came of, as a traceback would go through them."""
    chain: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is not None and found not in chain:
            chain.append(found)
            waiting += [found.__cause__, found.__context__, *getattr(found, "exceptions", ())]
    return chain


def connect(config: Config) -> Backends:
    """The clients that a config names. Raises ConfigError or PluginError for what cannot be had."""
    wanted = _wanted(config)
    clients = [client_of(backend, kwargs) for backend, kwargs in wanted]
    with contextlib.ExitStack() as opened:
        recorder = opened.enter_context(Recorder(config.record)) if config.record is not None else None
        cache = opened.enter_context(_cache(config.cache)) if config.cache is not None else None
        gates = _gates(config, wanted, clients, recorder)
        opened.pop_all()  # all went well: they stay open
    told = [config.sampling_args, config.sub_sampling_args, *(kwargs for _, kwargs in wanted)]
    return Backends(
        gates,
        sub=gates[1] if len(gates) > 1 else None,  # without a sub_backend the first of the others, as in rlms
        keys=frozenset(secrets.find(told)),
        recorder=recorder,
        cache=cache,
        limited=tuple(config.rate_limits),
        sampling=config.sampling_args,
        sub_sampling=config.sub_sampling_args,
        aliases=config.model_aliases,
    )


def _cache(path: Path) -> Cache:
    from .cache import Cache  # whoever has none need not have SQLite

    return Cache(path)


def _wanted(config: Config) -> list[tuple[Any, Mapping[str, Any]]]:
    """Every backend with its keywords: the root's, that of sub-calls, the others."""
    wanted = [(config.backend, config.backend_kwargs)]
    if config.sub_backend is not None:
        wanted.append((config.sub_backend, config.sub_backend_kwargs))
    elif config.sub_backend_kwargs:
        raise ConfigError("sub_backend_kwargs have no use without a sub_backend")
    settings = config.other_backend_kwargs or [{}] * len(config.other_backends)
    if len(settings) != len(config.other_backends):
        raise ConfigError(
            f"other_backend_kwargs has {len(settings)} entries, and other_backends has "
            f"{len(config.other_backends)}: there is one for each"
        )
    return [*wanted, *zip(config.other_backends, settings, strict=True)]


def _gates(
    config: Config,
    wanted: Sequence[tuple[Any, Mapping[str, Any]]],
    clients: Sequence[BaseLM],
    recorder: Recorder | None,
) -> list[Gate]:
    policy = Policy(config.max_retries, config.call_timeout, config.hedge_after)
    pools = _Pools(config.rate_limits, config.share_rate_limits)
    identities = _identities(wanted) if config.cache is not None else [""] * len(wanted)
    return [
        Gate(
            recorder.record(client) if recorder is not None else client,
            name_of(backend),
            owned=not isinstance(backend, BaseLM),
            policy=policy,
            pool_for=functools.partial(pools.of, name_of(backend)),
            prices=config.prices,
            identity=identity,
        )
        for client, (backend, _), identity in zip(clients, wanted, identities, strict=True)
    ]


def _identities(wanted: Sequence[tuple[Any, Mapping[str, Any]]]) -> list[str]:
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
        if shared is not None:
            try:
                shared.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"share_rate_limits: no folder {str(shared)!r}: {error.strerror}") from None
        self._pools: dict[str, Pool] = {}

    def of(self, backend: str, provider: str, model: str) -> Sequence[Pool]:
        limit = self._limits.get(backend) or self._limits.get("*")
        pools = [self._pool(provider, limit)]
        if model in self._limits:  # first, so that who waits for it holds no place among all the others
            pools.insert(0, self._pool(f"{model} of {provider}", self._limits[model]))
        return pools

    def _pool(self, name: str, limit: RateLimit | None) -> Pool:
        if name not in self._pools:
            times = None
            if self._shared is not None:
                times = SharedTimes(self._shared, name.partition("\0")[0])
            self._pools[name] = Pool(name.partition("\0")[0], limit, times)
        return self._pools[name]


def client_of(backend: Any, settings: Mapping[str, Any]) -> BaseLM:
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


_SAMPLING = frozenset(("max_tokens", "temperature", "stop", "seed", "schema"))


def sampling_fields(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling arguments as fields of a `Request`; what has no field of its own is ``extra``."""
    fields = {name: value for name, value in sampling.items() if name in _SAMPLING}
    if isinstance(stop := fields.get("stop"), str):
        fields["stop"] = (stop,)
    elif isinstance(stop, list | tuple) and all(isinstance(text, str) for text in stop):
        fields["stop"] = tuple(stop)
    elif stop is not None:
        raise ConfigError(f"stop={stop!r} among the sampling arguments: it is a text, or several")
    extra = {name: value for name, value in sampling.items() if name not in _SAMPLING}
    return {**fields, "extra": extra} if extra else fields
