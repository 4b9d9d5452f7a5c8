"""Bars and lines that show people how far something is, and log files nothing but the title."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["progress_bar", "status_line"]


@contextmanager
def progress_bar(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` are done; the function given counts further ones."""
    if not console.is_terminal:
        console.print(f"{title} ({total}) ...")
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)


@contextmanager
def status_line(console: Console, title: str) -> Iterator[Callable[[str], None]]:
    """Show what is going on behind a title, on a line of its own for people; the function given says it anew."""
    if not console.is_terminal:
        console.print(title)
        yield lambda _: None
        return
    with console.status(title) as status:
        yield lambda text: status.update(f"{title} {text}")
    console.print(title)
