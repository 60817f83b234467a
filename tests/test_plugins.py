"""Facts about names and what they stand for, told with real distributions."""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlm import RLM, open_repl, plugins
from rlm.client import BaseLM
from rlm.environment import BaseEnv
from rlm.errors import BrokenPlugin, ConfigError, PluginConflict, PluginError, UnknownPlugin
from rlm.plugins import Group

CLIENTS: Group = "rlm.clients"
ENVIRONMENTS: Group = "rlm.environments"

Install = Callable[..., Path]

CLIENT = """
from rlm.client import BaseLM, Reply

class EchoLM(BaseLM):
    model_name = "echo"

    def __init__(self, prefix=""):
        self.prefix = prefix

    async def complete(self, request):
        return Reply(self.prefix + request.messages[-1].content)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution, as pip would leave it, on the path."""
    numbers = itertools.count()
    before = set(sys.modules)

    def install(
        name: str,
        points: str,
        *,
        group: str = CLIENTS,
        version: str = "1.2.3",
        module: str = "",
        code: str = "",
    ) -> Path:
        site = tmp_path / f"site-{next(numbers)}"
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{points}\n")
        if module:
            (site / f"{module}.py").write_text(code)
        monkeypatch.syspath_prepend(site)
        return site

    yield install
    for module in set(sys.modules) - before:
        if getattr(sys.modules[module], "__file__", None) and str(tmp_path) in str(
            sys.modules[module].__file__
        ):
            del sys.modules[module]


def names(group: Group) -> list[str]:
    return [plugin.name for plugin in plugins.installed(group)]


# --- what is built in --------------------------------------------------------------------------


def test_the_built_in_environment_is_found_by_its_name() -> None:
    kind = plugins.load(ENVIRONMENTS, "local")
    assert issubclass(kind, BaseEnv)
    assert (kind.__module__.partition(".")[0], kind.__name__) == ("rlm_local", "LocalREPL")


def test_the_built_in_client_is_found_by_its_name() -> None:
    kind = plugins.load(CLIENTS, "scripted")
    assert issubclass(kind, BaseLM)
    assert (kind.__module__.partition(".")[0], kind.__name__) == ("rlm_scripted", "ScriptedLM")


def test_what_is_built_in_is_listed_with_where_it_comes_from() -> None:
    [local] = [plugin for plugin in plugins.installed(ENVIRONMENTS) if plugin.name == "local"]
    assert (local.target, local.distribution) == ("rlm_local:LocalREPL", "rlm")
    assert local.version[0].isdigit()


# --- what others install -----------------------------------------------------------------------


def test_anyones_client_is_found_like_our_own(install: Install) -> None:
    install("rlm-echo", "echo = rlm_echo_one:EchoLM", module="rlm_echo_one", code=CLIENT)
    kind = plugins.load(CLIENTS, "echo")
    assert issubclass(kind, BaseLM)
    assert RLM(backend="echo", max_depth=0).completion("say this").response == "say this"
    with RLM(backend="echo", backend_kwargs={"prefix": "> "}, max_depth=0) as rlm:
        assert rlm.completion("say this").response == "> say this"


def test_installed_lists_names_in_order_with_their_distribution(install: Install) -> None:
    install("rlm-many", "zebra = m:Z\nape = m:A", version="0.9")
    found = {plugin.name: plugin for plugin in plugins.installed(CLIENTS)}
    assert list(found) == sorted(found)
    assert {"ape", "scripted", "zebra"} <= set(found)
    assert (found["ape"].target, found["ape"].distribution, found["ape"].version) == (
        "m:A",
        "rlm-many",
        "0.9",
    )


def test_groups_are_apart(install: Install) -> None:
    install("rlm-space", "space = m:Space", group=ENVIRONMENTS)
    assert "space" in names(ENVIRONMENTS)
    assert "space" not in names(CLIENTS)


def test_listing_imports_nothing(install: Install) -> None:
    install("rlm-bomb", "bomb = rlm_bomb_one:X", module="rlm_bomb_one", code="raise SystemExit('imported')")
    assert "bomb" in names(CLIENTS)
    assert "rlm_bomb_one" not in sys.modules


def test_a_distribution_that_is_on_the_path_twice_makes_no_conflict(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = install("rlm-twice", "twice = rlm_twice_one:EchoLM", module="rlm_twice_one", code=CLIENT)
    copy = site.parent / "copy"
    copy.symlink_to(site)
    monkeypatch.syspath_prepend(copy)
    assert names(CLIENTS).count("twice") == 1
    assert plugins.load(CLIENTS, "twice").__name__ == "EchoLM"


# --- what cannot be had ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "name", "nearest"),
    [(ENVIRONMENTS, "locl", "local"), (ENVIRONMENTS, "Local", "local"), (CLIENTS, "script", "scripted")],
)
def test_an_unknown_name_is_told_the_nearest_and_what_is_installed(
    group: Group, name: str, nearest: str
) -> None:
    with pytest.raises(UnknownPlugin) as caught:
        plugins.load(group, name)
    message = str(caught.value)
    assert f"is called {name!r}; did you mean {nearest!r}?" in message
    assert f"Installed: {', '.join(names(group))}." in message


@pytest.mark.parametrize(("group", "word"), [(ENVIRONMENTS, "environment"), (CLIENTS, "backend")])
def test_a_name_like_no_other_is_told_what_to_do(group: Group, word: str) -> None:
    with pytest.raises(UnknownPlugin, match=f"no {word} is called 'xyzzy'") as caught:
        plugins.load(group, "xyzzy")
    assert "did you mean" not in str(caught.value)
    assert f"Install a package that offers this {word}, or pass an object" in str(caught.value)


def test_a_name_that_an_extra_brings_is_told_the_command(install: Install) -> None:
    """Whatever extras there are: an rlm of our own making stands first on the path."""
    site = install("rlm", "other = m:X", version="9.9")
    metadata = site / "rlm-9.9.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text() + "Provides-Extra: docker\n")
    with pytest.raises(UnknownPlugin, match=r"pip install 'rlm\[docker\]'"):
        plugins.load(ENVIRONMENTS, "docker")


def test_a_name_that_two_claim_is_refused_naming_both(install: Install) -> None:
    install("rlm-first", "disputed = m:A", version="1.0")
    install("rlm-second", "disputed = n:B", version="2.0")
    with pytest.raises(PluginConflict) as caught:
        plugins.load(CLIENTS, "disputed")
    message = str(caught.value)
    assert "the backend 'disputed' is claimed by" in message
    assert "rlm-first 1.0 (m:A)" in message
    assert "rlm-second 2.0 (n:B)" in message
    assert "uninstall one" in message


def test_nobody_takes_over_a_built_in_name_in_silence(install: Install) -> None:
    install("rlm-thief", "local = thief:Env", group=ENVIRONMENTS)
    with pytest.raises(PluginConflict, match="rlm-thief"):
        plugins.load(ENVIRONMENTS, "local")


def test_a_plugin_that_does_not_import_is_broken_and_says_why(install: Install) -> None:
    install("rlm-sad", "sad = rlm_sad_one:X", module="rlm_sad_one", code="import no_such_sdk_anywhere")
    with pytest.raises(BrokenPlugin) as caught:
        plugins.load(CLIENTS, "sad")
    assert isinstance(caught.value.__cause__, ImportError)
    assert "'sad' (rlm-sad 1.2.3) is installed but cannot be imported" in str(caught.value)
    assert "no_such_sdk_anywhere" in str(caught.value)


@pytest.mark.parametrize(
    ("number", "target", "code", "cause"),
    [
        (1, "rlm_odd_1:Missing", "", AttributeError),
        (2, "rlm_odd_2:X", "X = 1 / 0", ZeroDivisionError),
        (3, "rlm_odd_3:X", "def broken(:", SyntaxError),
        (4, "rlm_not_there:X", "", ModuleNotFoundError),
        (5, "not a target", "", Exception),
    ],
)
def test_a_plugin_is_broken_whatever_its_module_raises(
    number: int, target: str, code: str, cause: type[Exception], install: Install
) -> None:
    install("rlm-odd", f"odd = {target}", module=f"rlm_odd_{number}", code=code)
    with pytest.raises(BrokenPlugin, match="rlm-odd") as caught:
        plugins.load(CLIENTS, "odd")
    assert isinstance(caught.value.__cause__, cause)


def test_a_broken_plugin_stands_in_nobodys_way(install: Install) -> None:
    install("rlm-sad", "sad = rlm_sad_two:X", module="rlm_sad_two", code="import no_such_sdk_anywhere")
    assert plugins.load(CLIENTS, "scripted").__name__ == "ScriptedLM"


def test_a_distribution_without_metadata_stands_in_nobodys_way(install: Install) -> None:
    """An uninstall that was interrupted leaves such folders."""
    site = install("rlm-rest", "rest = m:X")
    (site / "rlm_rest-1.2.3.dist-info" / "METADATA").unlink()
    assert "scripted" in names(CLIENTS)
    assert plugins.load(CLIENTS, "scripted").__name__ == "ScriptedLM"


def test_every_failure_is_a_plugin_error() -> None:
    assert issubclass(UnknownPlugin, PluginError)
    assert issubclass(PluginConflict, PluginError)
    assert issubclass(BrokenPlugin, PluginError)


# --- from the outside --------------------------------------------------------------------------


def test_an_unknown_backend_is_told_at_the_first_completion() -> None:
    with pytest.raises(UnknownPlugin, match="did you mean 'scripted'"):
        RLM(backend="scriptd").completion("x")


def test_an_unknown_environment_is_told_when_a_session_is_opened() -> None:
    with pytest.raises(UnknownPlugin, match="did you mean 'local'"):
        open_repl("lokal")


def test_keywords_that_a_client_does_not_take_are_a_config_error(install: Install) -> None:
    install("rlm-echo", "echo = rlm_echo_two:EchoLM", module="rlm_echo_two", code=CLIENT)
    with pytest.raises(ConfigError, match="backend 'echo' does not take these settings"):
        RLM(backend="echo", backend_kwargs={"sufix": "!"}).completion("x")


def test_a_reader_of_metadata_that_another_package_puts_in_place_changes_nothing(install: Install) -> None:
    """importlib_metadata does so when it is imported, which LiteLLM and many others do."""
    pytest.importorskip("importlib_metadata", reason="importlib_metadata is not installed")
    site = install("rlm-rest", "rest = m:X\nodd = not a target")
    (site / "rlm_rest-1.2.3.dist-info" / "METADATA").unlink()
    assert "scripted" in names(CLIENTS)
    with pytest.raises(BrokenPlugin, match="odd"):
        plugins.load(CLIENTS, "odd")
