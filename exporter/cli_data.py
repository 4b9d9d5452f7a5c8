"""The commands that look at data and prepare it: `emoexport data ...`."""

import typer

__all__ = ["data_commands"]

data_commands = typer.Typer(help="Look at labelled faces, and prepare them.", no_args_is_help=True)
