"""The audit of a data set as tables, for the terminal and as Markdown."""

from typing import NamedTuple

from rich import box
from rich.table import Table

from emoexport.labels import EMOTIONS
from emoexport.leakage import AuditReport, RunAccuracy
from emoexport.statistics import Share
from emoexport.table_format import percent
from emoexport.train.audit import DataAudit, NearAudit, SplitAudit

__all__ = ["Section", "audit_markdown", "audit_sections"]


class Section(NamedTuple):
    """One table of the report."""

    title: str
    rows: list[dict[str, str]]
    """Cells by column; all rows have the same columns."""
    note: str = ""

    def table(self) -> Table:
        """For the terminal."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for index, column in enumerate(self.rows[0]):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row.values())
        return table

    def markdown(self) -> str:
        """For a file."""
        lines = [list(self.rows[0]), ["---"] * len(self.rows[0]), *(list(row.values()) for row in self.rows)]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return "\n\n".join(part for part in (f"## {self.title}", table, self.note) if part)


def audit_sections(report: AuditReport) -> list[Section]:
    """Everything that was found, table by table."""
    audit = report.audit
    sections = [
        Section(
            "Rows",
            [_split_row(name, split) for name, split in audit.splits.items()],
            f"{audit.images:,} different pictures in all, {audit.contradicting_images:,} of them with more than one "
            "label. Clean: what training keeps, and verify reports beside all rows.",
        ),
        Section("Emotions", _emotion_rows(audit), "Imbalance: largest over smallest; divergence from equal shares."),
    ]
    if audit.across:
        sections.append(Section("Copies across splits", _cross_rows(audit)))
    if audit.near is not None:
        sections.append(_near_section(audit.near))
    if report.run is not None:
        sections.append(_run_section(report.run))
    return sections


def audit_markdown(report: AuditReport) -> str:
    """The whole report as Markdown."""
    parts = [
        "# Audit of the data",
        f"Data: {report.data}, compared at {report.size} x {report.size} pixels, "
        f"{'grey' if report.channels == 1 else 'in colour'}, in {report.seconds:.0f} s. {report.created}.",
    ]
    parts += [f"Left out: {line}." for line in _left_out(report.audit)]
    parts += [section.markdown() for section in audit_sections(report)]
    return "\n\n".join(parts) + "\n"


def _left_out(audit: DataAudit) -> list[str]:
    lines = [(audit.outside, "rows whose label is none of the seven emotions"), (audit.skipped, "unreadable pictures")]
    return [f"{count:,} {what}" for count, what in lines if count]


def _split_row(name: str, split: SplitAudit) -> dict[str, str]:
    return {
        "split": name,
        "rows": f"{split.faces:,}",
        "pictures": f"{split.images:,}",
        "copies": f"{split.copied:,}",
        "in train": f"{split.leaked:,}",
        "contradicted": f"{split.contradicted:,}",
        "blank": f"{split.blank:,}",
        "clean": f"{split.clean:,}",
        "near": _count(split.near),
        "near in train": _count(split.near_train),
    }


def _emotion_rows(audit: DataAudit) -> list[dict[str, str]]:
    splits = audit.splits.items()
    rows = [
        {"emotion": emotion, **{name: _share(split.emotions[emotion], split.faces) for name, split in splits}}
        for emotion in EMOTIONS
    ]
    rows.append({"emotion": "imbalance", **{name: f"{split.imbalance:.1f}" for name, split in splits}})
    rows.append({"emotion": "divergence, bits", **{name: f"{split.divergence_bits:.3f}" for name, split in splits}})
    if any(split.votes for _, split in splits):
        rows.append({"emotion": "as most votes, %", **{name: _percent(split.votes) for name, split in splits}})
    return rows


def _cross_rows(audit: DataAudit) -> list[dict[str, str]]:
    return [
        {
            "splits": f"{pair.first}, {pair.second}",
            "pictures in both": f"{pair.images:,}",
            "rows of the first": f"{pair.rows_first:,}",
            "rows of the second": f"{pair.rows_second:,}",
            "near pairs": _count(pair.near_pairs),
        }
        for pair in audit.across
    ]


def _near_section(near: NearAudit) -> Section:
    counts = {
        "pairs": near.pairs,
        "pairs alike as mirror images": near.mirrored_pairs,
        "pairs with different labels": near.contradicting_pairs,
        "groups that hang together by pairs": near.groups,
        "groups with different labels": near.contradicting_groups,
        "pictures in groups": near.images,
        "pictures in the largest group": near.largest_group,
    }
    return Section(
        "Near duplicates",
        [{"all splits together": name, "number": f"{count:,}"} for name, count in counts.items()],
        f"Pictures of one photograph that are no copies: their fine detail correlates by {near.threshold:g} or more, "
        "straight or mirrored, within a shift by 3 pixels.",
    )


def _run_section(run: RunAccuracy) -> Section:
    what = {
        "all": "all",
        "clean": "clean",
        "leaked": "in train",
        "near": "clean, with a near duplicate in train",
        "unseen": "clean, with none",
    }
    note = ""
    if run.all_minus_clean is not None:
        value, low, high = (100 * part for part in run.all_minus_clean.model_dump().values())
        note = f"All minus clean: {value:+.2f} points [{low:+.2f}, {high:+.2f}] (Newcombe)."
    views = f"{len(run.views)} views" if len(run.views) > 1 else f"the view {run.views[0]} only"
    return Section(
        f"Accuracy of {run.run} on {run.split}, {views}",
        [
            {"rows": what[name], "n": f"{rate.n:,}", "accuracy % [95 %]": _percent(rate)}
            for name, rate in run.accuracy.items()
        ],
        note,
    )


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _share(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.1f} %)"


def _percent(rate: Share | None) -> str:
    return percent(rate, 2) if rate else ""
