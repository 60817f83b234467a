"""``rlm docker``: what sandboxes in containers need before the first one starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

app = typer.Typer(no_args_is_help=True, help="Images for the docker environment.")


@app.callback()
def _root() -> None:
    """Typer would take a lone command for the whole program without this."""


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

    # What `source` may be is for images.build to say, as one error like any other.
    chosen = cast(Any, source or images.default_source())
    name = tag or images.DEFAULT_TAG
    typer.echo(f"making {name} from {chosen} ...", err=True)
    image = images.build(chosen, name, target="science" if science else "plain", packages=packages)
    typer.echo(f"{image.tag}  {image.id}")
    typer.echo(f"{image.size / 1e6:.0f} MB, made from {chosen} in {image.seconds:.1f} s")
    kwargs = "" if image.tag == images.DEFAULT_TAG else f', environment_kwargs={{"image": "{image.tag}"}}'
    typer.echo(f'Use it: RLM(environment="docker"{kwargs})')
