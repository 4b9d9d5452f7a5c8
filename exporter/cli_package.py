"""The command that packs an engine of a bundle for where it is to run."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from emoexport.cli_options import BundleDir, OneEngine, OnePrecision, console_of, open_bundle
from emoexport.engines import BACKENDS
from emoexport.errors import UsageError

__all__ = ["package"]

_PANEL = "Triton"


def package(
    context: typer.Context,
    bundle: BundleDir = None,
    triton: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write a model repository for Triton, with a client.")
    ] = None,
    docker: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write a Dockerfile for the runtime alone, with all it needs.")
    ] = None,
    engine: OneEngine = None,
    precision: OnePrecision = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a package with files that were changed or added, or another kind.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="Of the model; that of the bundle's directory if none.", rich_help_panel=_PANEL)
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Faces in a call; what the engine takes, up to 64, if none.", rich_help_panel=_PANEL),
    ] = None,
    queue_delay: Annotated[
        int,
        typer.Option(
            min=0, help="Microseconds that a request may wait for others to be computed with.", rich_help_panel=_PANEL
        ),
    ] = 1000,
    instances: Annotated[
        int, typer.Option(min=1, help="Calls at once, on each GPU or on the CPU.", rich_help_panel=_PANEL)
    ] = 1,
) -> None:
    """Pack one engine of a bundle for where it is to run: a Triton server, or a container with the runtime alone.

    Example: [bold]emoexport package build/fer2013 --triton triton/[/bold]
    """
    if (triton is None) == (docker is None):
        found = "neither --triton nor --docker" if triton is None else "--triton and --docker"
        raise UsageError(
            f"found {found}; needed is one of them.", hint=f"emoexport package {bundle or 'build/x'} --triton triton/"
        )
    if docker is not None:
        _require_none_of_triton(context)
    opened = open_bundle(bundle)
    from emoexport.dockerfile import DOCKER  # noqa: PLC0415
    from emoexport.packaging import choose_engine, require_as_written  # noqa: PLC0415
    from emoexport.triton import TRITON, ServerSettings  # noqa: PLC0415

    target, out = (DOCKER, docker) if triton is None else (TRITON, triton)
    if out is not None and not force:
        require_as_written(out, target)
    packed = choose_engine(opened, target, engine=engine, precision=precision)
    if triton is not None:
        settings = ServerSettings(name=name, max_batch=max_batch, queue_delay_us=queue_delay, instances=instances)
        _for_triton(packed, triton, settings)
    elif docker is not None:
        _for_docker(packed, docker)


def _require_none_of_triton(context: typer.Context) -> None:
    for each in context.command.params:
        source = context.get_parameter_source(each.name or "")
        is_given = source is not None and source.name == "COMMANDLINE"
        if is_given and getattr(each, "rich_help_panel", None) == _PANEL:
            raise UsageError(f"{each.opts[0]} is of Triton, and found is --docker.", hint=f"leave out {each.opts[0]}")


def _for_triton(packed: Any, out: Path, settings: Any) -> None:
    from emoexport.triton import notes_for_triton, write_repository  # noqa: PLC0415

    model = write_repository(packed, out, settings)
    written = f"{out}: {packed.name} as the model {model.name}, up to {model.max_batch} faces in a call"
    _tell(packed, notes_for_triton(packed), written, f"cat {shlex.quote(str(out / 'README.md'))}")


def _for_docker(packed: Any, out: Path) -> None:
    from emoexport.dockerfile import write_context  # noqa: PLC0415

    write_context(packed, out)
    written = f"{out}: emoexport predict with {BACKENDS[packed.backend].title} alone, at {packed.precision}"
    _tell(packed, [], written, f"docker build -t emotions {shlex.quote(str(out))}")


def _tell(packed: Any, notes: list[str], written: str, following: str) -> None:
    """What is known of the engine, what whoever runs it must know, what was written and what comes next."""
    console = console_of()
    if packed.is_certified:
        console.print(packed.standing)
    else:
        console.print(f"{packed.standing} Next: {packed.verify_command}", style="yellow")
    for note in notes:
        console.print(note, style="yellow")
    console.print(written)
    console.print(f"next: {following}")
