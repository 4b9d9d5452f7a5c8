"""`reports/report.html`: all that is known of a bundle on one page."""

from contextlib import nullcontext
from pathlib import Path

from emoexport.bundle import Bundle
from emoexport.files import write_text
from emoexport.findings import find
from emoexport.report_sections import page_of

__all__ = ["REPORT", "write_report"]

REPORT = "reports/report.html"


def write_report(bundle: Bundle, *, out: Path | None = None, run: Path | None = None) -> Path:
    """Write the page of a bundle: the same bytes for the same bundle, reports, run and working directory.

    Args:
        bundle: the bundle.
        out: the file; None for `reports/report.html` in the bundle.
        run: where the training run is now, if it was moved.

    Returns:
        Where it is.

    Raises:
        BadCheckpoint: if the run that is named is none.
        UsageError: if it is not the one that the bundle was built from.
        BadBundle: if a graph or a passport cannot be read.
        Busy: if another command is writing into the bundle, where the page is to be.
    """
    path = out or bundle.path / REPORT
    with bundle.writing() if out is None else nullcontext():
        write_text(path, page_of(find(bundle, run)).html())
    return path
