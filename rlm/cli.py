"""The ``rlm`` command."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from . import __version__, plugins, secrets
from .errors import BrokenPlugin, ConfigError, RLMError, SandboxUnavailable

if TYPE_CHECKING:
    from .environment import SandboxInfo

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Answer questions about contexts of any length with models that write code, in sandboxes.",
)


def main() -> None:
    """Run the command line; errors of ours are one line and exit code 1."""
    try:
        for plugin in plugins.installed("rlm.commands"):
            _add_commands(plugin)
        app()
    except RLMError as error:
        _complain(error)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)  # noqa: T201 - the terminal is this module's business
        sys.exit(130)


def _add_commands(plugin: plugins.Plugin) -> None:
    """Mount what a package adds. One that is broken costs its own commands only."""
    try:
        app.add_typer(plugin.load(), name=plugin.name)
    except BrokenPlugin as error:
        _complain(error)


def _complain(error: RLMError) -> None:
    console = Console(stderr=True, highlight=False, markup=False)
    console.print(f"{type(error).__name__}: {error}", soft_wrap=True)
    if error.partial_answer:
        console.print(f"The best answer so far: {error.partial_answer}", soft_wrap=True)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def run(
    question: Annotated[str, typer.Argument(help="What to find out about the context.")],
    paths: Annotated[
        list[str] | None, typer.Argument(help="Files and directories; '-' reads standard input.")
    ] = None,
    environment: Annotated[str | None, typer.Option(help="Where cells run: see `rlm environments`.")] = None,
    backend: Annotated[str | None, typer.Option(help="The model client: see `rlm clients`.")] = None,
    backend_arg: Annotated[
        list[str] | None, typer.Option(help="A keyword for the client, NAME=VALUE; VALUE may be JSON.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model's name.")] = None,
    sub_backend: Annotated[str | None, typer.Option(help="The client for calls from cells.")] = None,
    sub_model: Annotated[str | None, typer.Option(help="The model for calls from cells.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings from a TOML, YAML or JSON file.")] = None,
    max_iterations: Annotated[int | None, typer.Option(help="Turns at most.")] = None,
    max_timeout: Annotated[float | None, typer.Option(help="Seconds at most.")] = None,
    max_depth: Annotated[int | None, typer.Option(help="Levels of runs at most.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Append every event to this JSONL file.")] = None,
    record: Annotated[
        Path | None, typer.Option(help="Append every request and reply to this file, for `--backend replay`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Ask a question about files, directories or standard input."""
    from .rlm import RLM

    given: dict[str, Any] = {
        "environment": environment, "backend": backend, "sub_backend": sub_backend, "trace": trace,
        "max_iterations": max_iterations, "max_timeout": max_timeout, "max_depth": max_depth,
        "record": record,
    }  # fmt: skip
    settings = {name: value for name, value in given.items() if value is not None}
    keywords = dict(_keyword(text) for text in backend_arg or [])
    if model is not None:
        keywords["model_name"] = model
    settings = _with_models(config, settings, keywords, sub_model)
    with RLM(**{**settings, "verbose": not quiet}) as rlm:
        result = rlm.completion(_context(paths or []), question)
    if as_json:
        typer.echo(_as_json(result))
        return
    if result.is_best_effort:
        typer.echo(f"({result.stopped} was reached: this is the best answer there was)", err=True)
    typer.echo(result.response)


def _with_models(
    file: Path | None, settings: dict[str, Any], keywords: dict[str, Any], sub_model: str | None
) -> dict[str, Any]:
    """All settings, with what the arguments say of a model added to what the file says of that backend.

    The file's keywords, its address and its key among them, are for the file's backend only.
    """
    from .config import Config

    written = Config.load(file) if file else Config.create()
    both = Config.create(**{**dict(written.given()), **settings})
    kept = written.backend_kwargs if both.backend == written.backend else {}
    sub_kept = written.sub_backend_kwargs if both.sub_backend == written.sub_backend else {}
    values: dict[str, Any] = {"backend_kwargs": {**kept, **keywords}, "sub_backend_kwargs": sub_kept}
    if sub_model is not None:
        if both.sub_backend is None:
            values |= {"sub_backend": both.backend, "sub_backend_kwargs": values["backend_kwargs"]}
        values["sub_backend_kwargs"] = {**values["sub_backend_kwargs"], "model_name": sub_model}
    return {**dict(both.given()), **{name: value for name, value in values.items() if value}}


def _keyword(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise typer.BadParameter(f"{text!r} is not of the form NAME=VALUE")
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    if secrets.find({name: parsed}):
        raise typer.BadParameter(
            f"{name} stands on the command line, which every user of this machine can read: set the "
            "provider's environment variable (OPENAI_API_KEY, ...), or put it into a --config file"
        )
    return name, parsed


def _context(paths: list[str]) -> Any:
    """The context that the arguments name: text for one file or standard input, else a dict."""
    if paths == ["-"] or (not paths and not sys.stdin.isatty()):
        data = sys.stdin.buffer.read()
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return data
    if not paths:
        raise typer.BadParameter("name a file or a directory, or '-' for standard input")
    if "-" in paths:
        raise typer.BadParameter("'-' stands alone: standard input is the whole context")
    missing = [path for path in paths if not Path(path).exists()]
    if missing:
        raise typer.BadParameter(f"there is no file or directory {missing[0]!r}")
    return Path(paths[0]) if len(paths) == 1 else [Path(path) for path in paths]


def _as_json(result: Any) -> str:
    fields = {
        "response": result.response,
        "value": result.value,
        "stopped": result.stopped,
        "root_model": result.root_model,
        "iterations": result.iterations,
        "execution_time": result.execution_time,
        "usage": result.usage_summary.model_usage_summaries,
    }
    return msgspec.json.encode(fields).decode()


environments_app = typer.Typer(
    add_completion=False,
    invoke_without_command=True,
    help="The environments that are installed, where they come from, and whether they work here.",
)
app.add_typer(environments_app, name="environments")


@environments_app.callback()
def environments(context: typer.Context) -> None:
    """The environments that are installed, where they come from, and whether they work here."""
    if context.invoked_subcommand is None:
        _list("rlm.environments", "environment", _try_environment)


@environments_app.command()
def check(
    name: Annotated[str, typer.Argument(help="An environment: see `rlm environments`.")],
    level: Annotated[
        str | None, typer.Option(help="Levels to check, comma-separated; all by default.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option(help="A keyword for the environment, KEY=VALUE; VALUE may be JSON.")
    ] = None,
    report: Annotated[Path | None, typer.Option("--json", help="Write the full report to this file.")] = None,
) -> None:
    """Run the conformance suite against an environment. Exit code 1 when it fails."""
    try:
        from .testing import check as suite
    except ImportError as error:
        if error.name not in ("pytest", "_pytest"):
            raise
        raise ConfigError("checking an environment needs pytest: pip install 'rlm[testing]'") from None
    settings = dict(_keyword(text) for text in setting or [])
    levels = [word.strip() for word in level.split(",")] if level else []
    found = suite.check(name, settings, levels=levels, on_result=_progress)
    if report is not None:
        report.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    _show(found)
    raise typer.Exit(1 if found["failed"] else 0)


def _progress(result: Any) -> None:
    """One character a test, on the terminal's own channel."""
    typer.echo({"passed": ".", "failed": "F", "skipped": "s"}.get(result.outcome, "x"), nl=False, err=True)


def _show(report: dict[str, Any]) -> None:
    typer.echo(err=True)
    outcomes = ("passed", "failed", "known failure", "skipped")
    table = Table("level", *outcomes)
    for level, counts in report["levels"].items():
        table.add_row(level, *(str(counts[outcome]) for outcome in outcomes))
    console = Console(highlight=False, markup=False)
    console.print(table)
    for title in ("failed", "known_failures"):
        for name, reason in report[title].items():
            console.print(f"{title.replace('_', ' ')}: {name}: {reason.splitlines()[0]}", soft_wrap=True)
    for reason, names in report["skipped"].items():
        console.print(f"skipped {len(names)}: {reason}", soft_wrap=True)


@app.command()
def clients() -> None:
    """The model clients that are installed, where they come from, and whether they can be imported."""
    _list("rlm.clients", "client", lambda plugin: (plugin.load(), "yes")[1])


sandboxes = typer.Typer(no_args_is_help=True, help="Sandboxes that exist, whoever started them.")
app.add_typer(sandboxes, name="sandboxes")


@sandboxes.command("list")
def list_sandboxes() -> None:
    """What there is, and whose it is."""
    table = Table("sandbox", "environment", "state", "owner", "age", "abandoned")
    for found in _ask_environments("sandboxes"):
        age = str(timedelta(seconds=round(time.time() - found.created)))
        abandoned = "yes" if found.abandoned else ""
        table.add_row(found.id, found.environment, found.state, found.owner, age, abandoned)
    Console(highlight=False).print(table)


@sandboxes.command()
def prune() -> None:
    """Remove what a process that is gone has left. Running sandboxes of others are never touched."""
    removed = _ask_environments("sweep")
    for found in removed:
        typer.echo(f"removed {found.id} ({found.owner})")
    typer.echo(f"{len(removed)} removed")


def _ask_environments(question: Literal["sandboxes", "sweep"]) -> list[SandboxInfo]:
    """Put a question of `SupportsSweep` to every environment that can answer it."""
    from . import hostloop
    from .environment import SupportsSweep

    found: list[SandboxInfo] = []
    for plugin in plugins.installed("rlm.environments"):
        try:
            kind = plugin.load()
            if isinstance(kind, SupportsSweep):
                found += hostloop.run(getattr(kind, question)())
        except (BrokenPlugin, SandboxUnavailable) as error:
            typer.echo(f"{plugin.name}: {error}", err=True)
    return found


def _try_environment(plugin: plugins.Plugin) -> str:
    """Start one, and say what it enforces."""
    from .repl import open_repl

    with open_repl(plugin.load()) as repl:
        isolation = repl.isolation
        text = f"yes: {isolation.level}"
        if isolation.enforced:
            text += f"; enforced: {', '.join(isolation.enforced)}"
        if isolation.missing:
            text += f"; NOT enforced: {'; '.join(isolation.missing)}"
        return text


def _list(group: plugins.Group, word: str, check: Any) -> None:
    table = Table(word, "from", "class", "usable")
    for plugin in plugins.installed(group):
        try:
            usable = check(plugin)
        except RLMError as error:
            usable = f"no: {error}"
        table.add_row(plugin.name, f"{plugin.distribution} {plugin.version}", plugin.target, usable)
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
