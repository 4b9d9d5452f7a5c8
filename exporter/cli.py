"""The command line. It loads torch, onnx and runtimes only inside the commands that need them."""

import signal
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console

from emoexport import __version__
from emoexport.cli_bench import bench
from emoexport.cli_build import build
from emoexport.cli_cascade import cascade
from emoexport.cli_cube import cube
from emoexport.cli_data import data_commands
from emoexport.cli_doctor import doctor
from emoexport.cli_inspect import inspect
from emoexport.cli_package import package
from emoexport.cli_plan import plan
from emoexport.cli_predict import predict
from emoexport.cli_report import report
from emoexport.cli_score import score
from emoexport.cli_serve import serve
from emoexport.cli_training import combine, evaluate, train
from emoexport.cli_tune import tune
from emoexport.cli_verify import verify
from emoexport.errors import EmoexportError, MissingRuntime

__all__ = ["app", "main"]

MAP = """\
[bold]emoexport[/bold]: facial-emotion ensembles from the lab to production.

  1. emoexport train  --data D --out runs/x          five members from labelled faces
  2. emoexport evaluate --tta --ensemble --post-process --model-path runs/x
                                                     what does each step of the vote gain?
  3. emoexport build  runs/x -o build/x --fp16 --int8  one graph from raw faces to a label
  4. emoexport verify build/x --data D               does it decide like the PyTorch reference?
  5. emoexport bench  build/x                        how fast is it?
  6. emoexport report build/x                        all of it on one page
  7. emoexport plan   build/x --data D               what decides the same and costs least?
  8. emoexport predict photos/ --detect              use it
  9. emoexport serve  build/x                        a page and an API for it
 10. emoexport score  faces/ --out preds/            use it on millions of faces
 11. emoexport package build/x --triton triton/      or for Triton, or a container

Try it on drawn faces: emoexport train && emoexport build --fp16 --int8 && emoexport verify
What can this machine do? emoexport doctor
Each command takes --help."""


class _Commands(typer.core.TyperGroup):
    """Errors become one sentence, the next command and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        errors = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
        try:
            return super().invoke(ctx)
        except EmoexportError as err:
            errors.print(f"error: {err}", style="red")
            if err.hint:
                errors.print(f"next: {err.hint}")
            raise typer.Exit(err.exit_code) from err
        except BrokenPipeError:  # who reads has had enough: click ends quietly
            raise
        except OSError as err:
            errors.print(f"error: {err.filename or 'a file or standard output'}: {err.strerror or err}", style="red")
            raise typer.Exit(4) from err
        except ImportError as err:
            if not err.name or err.name.partition(".")[0] == "emoexport":
                raise
            errors.print(
                f"error: {err.name.partition('.')[0]} is not installed here, and this command needs it.", style="red"
            )
            errors.print("next: pip install emoexport, with all that it needs; or emoexport doctor")
            raise typer.Exit(MissingRuntime.exit_code) from err
        except KeyboardInterrupt as err:
            errors.print("stopped; nothing was left half-written.")
            raise typer.Exit(130) from err


app = typer.Typer(
    name="emoexport",
    cls=_Commands,
    help="Facial-emotion ensembles from the lab to production.",
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _map(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"emoexport {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        Console(highlight=False, soft_wrap=True).print(MAP)


app.command()(train)
app.command()(build)
# The recipe spells its options with underscores: --post_process, --model_path.
app.command(context_settings={"token_normalize_func": lambda word: word.replace("_", "-")})(evaluate)
app.command()(combine)
app.command()(cube)
app.command()(doctor)
app.command()(inspect)
app.command()(tune)
app.command()(verify)
app.command()(bench)
app.command()(report)
app.command()(plan)
app.command()(cascade)
app.command()(predict)
app.command()(score)
app.command()(package)
app.command()(serve)
app.add_typer(data_commands, name="data")


def main() -> None:
    """Run the command line; SIGTERM ends it as Ctrl-C does, with what was begun removed."""
    signal.signal(signal.SIGTERM, _end)
    app()


def _end(*_: object) -> None:
    raise SystemExit(143)
