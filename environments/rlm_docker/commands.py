"""``rlm docker``: what sandboxes in containers need before the first one starts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, cast

import typer

app = typer.Typer(no_args_is_help=True, help="What sandboxes in containers need before the first one starts.")


@app.command()
def build(
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="interpreter (this Python; no network), debian (its packages; no registry) or registry "
            "(python:3.12-slim).",
            show_default="interpreter on Linux, registry elsewhere",
        ),
    ] = None,
    tag: Annotated[
        str | None, typer.Option(help="What to call the image.", show_default="rlm-sandbox:latest")
    ] = None,
    science: Annotated[
        bool, typer.Option("--science", help="With numpy, pandas, scipy, scikit-learn, sympy and networkx.")
    ] = False,
    packages: Annotated[
        Path | None, typer.Option(help="A directory of Python packages to add: see pip install --target.")
    ] = None,
) -> None:
    """Make the image that cells run in, and have the Docker engine hold it."""
    from . import images
    from .engine import BUILT_IMAGE

    # What `source` may be is for images.build to say, as one error like any other.
    chosen = cast(Any, source or images.default_source())
    name = tag or BUILT_IMAGE
    typer.echo(f"making {name} from {chosen} ...", err=True)
    image = images.build(chosen, name, target="science" if science else "plain", packages=packages)
    typer.echo(f"{image.tag}  {image.id}")
    typer.echo(f"{image.size / 1e6:.0f} MB, made from {chosen} in {image.seconds:.1f} s")
    kwargs = "" if image.tag == BUILT_IMAGE else f', environment_kwargs={{"image": "{image.tag}"}}'
    typer.echo(f'Use it: RLM(environment="docker"{kwargs})')


@app.command()
def warm(
    image: Annotated[str | None, typer.Option(help="The image, if not the default.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Containers to start at once.")] = 1,
) -> None:
    """Get the image, start containers once, and say how long it takes: what comes next finds all in place."""
    from rlm import hostloop, open_repl

    from .environment import DockerREPL

    settings: dict[str, Any] = {"image": image, "prewarm": count}
    start = time.perf_counter()
    hostloop.run(DockerREPL(**settings).warm())
    typer.echo(f"started {count} in {time.perf_counter() - start:.2f} s")
    start = time.perf_counter()
    with open_repl("docker", **settings) as repl:
        version = repl.execute("import sys; sys.version.split()[0]").value
        typer.echo(
            f"a first cell from there: {1000 * (time.perf_counter() - start):.0f} ms, Python {version}"
        )
        if repl.isolation.missing:
            typer.echo(f"not enforced: {'; '.join(repl.isolation.missing)}")
