"""The command that chooses which blocks have few bits."""

from pathlib import Path
from typing import Annotated

import typer

from emoexport.cli_options import BundleDir, RunOption, Threads, console_of, open_bundle, print_table
from emoexport.engines import BACKENDS
from emoexport.precision import PRECISIONS

__all__ = ["tune"]


def tune(
    bundle: BundleDir = None,
    precision: Annotated[
        str,
        typer.Option(help=f"Of 8 bits: {', '.join(name for name, row in PRECISIONS.items() if row.bits == 8)}."),
    ] = "int8",
    engine: Annotated[
        str | None, typer.Option(help=f"What to be fast on, of {', '.join(BACKENDS)}; the fastest here if none.")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(min=0, max=100, help="Points of accuracy that may be lost; the precision's tolerance if none."),
    ] = None,
    data: Annotated[str | None, typer.Option(help="Where the faces of the run are, if not where it read them.")] = None,
    faces: Annotated[int, typer.Option(min=1, help="Validation faces to count costs on.")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Faces in a call that is timed.")] = 16,
    rounds: Annotated[int, typer.Option(min=2, help="Counted calls of each graph.")] = 12,
    run: RunOption = None,
    threads: Threads = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--output", "--out", help="Where trials are kept; tuning/<bundle>-<precision> if none."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Forget the trials that were made.")] = False,
) -> None:
    """Try every block of the members in few bits, and keep so those that gain speed here and cost no accuracy.

    What was cut off goes on with the same command.

    Example: [bold]emoexport tune build/fer2013 --engine openvino[/bold]
    """
    opened = open_bundle(bundle)
    from emoexport.files import write_bytes, write_text, writing  # noqa: PLC0415
    from emoexport.tuning import TUNING_FILE  # noqa: PLC0415
    from emoexport.tuning import tune as tune_bundle  # noqa: PLC0415
    from emoexport.tuning_tables import (  # noqa: PLC0415
        tuning_markdown,
        tuning_plot,
        tuning_sentences,
        tuning_table,
    )

    console = console_of()
    out = out or Path("tuning") / f"{opened.path.resolve().name}-{precision}"
    with writing(out):
        found = tune_bundle(
            opened,
            out,
            precision=precision,
            engine=engine,
            run=run,
            data=data,
            faces=faces,
            batch=batch,
            rounds=rounds,
            threads=threads,
            max_drop=None if max_drop is None else max_drop / 100,
            force=force,
            console=console,
        )
        write_text(out / "tuning.md", tuning_markdown(found))
        write_bytes(out / "tuning.png", tuning_plot(found))
    print_table(console, f"{opened.path}, {found.setting.faces:,} validation faces", tuning_table(found))
    for sentence in tuning_sentences(found):
        console.print(sentence)
    console.print(
        f"reports: {out / 'tuning.md'}, {out / 'tuning.png'}\n"
        f"next: {opened.build_command(precision, tuning=out / TUNING_FILE)}",
    )
