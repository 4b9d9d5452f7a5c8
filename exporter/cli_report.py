"""The command that puts all that is known of a bundle on one page."""

from pathlib import Path
from typing import Annotated

import typer

from emoexport.cli_options import BundleDir, RunOption, console_of, open_bundle

__all__ = ["report"]


def report(
    bundle: BundleDir = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file; reports/report.html in the bundle if none.")
    ] = None,
    run: RunOption = None,
) -> None:
    """Write one HTML page: what was built from what, the certificate, speed, precisions, training.

    It holds all it shows and asks no network for anything. What has not been found yet it says, with the command.

    Example: [bold]emoexport report build/fer2013[/bold]
    """
    opened = open_bundle(bundle)
    from emoexport.report import write_report  # noqa: PLC0415

    path = write_report(opened, out=out, run=run)
    console_of().print(f"report: {path}")
