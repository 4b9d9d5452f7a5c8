"""A cascade as a table."""

from rich.table import Table

from emoexport.cascade_record import CascadeRecord
from emoexport.table_format import Row, terminal_table

__all__ = ["stage_rows", "stage_table"]


def stage_table(record: CascadeRecord) -> Table:
    """Where the faces on which a cascade is shown leave."""
    rows = stage_rows(record)
    return terminal_table(list(rows[0]), rows, texts=())


def stage_rows(record: CascadeRecord) -> list[Row]:
    """The same as rows; a stage without a face is left out, but for the last."""
    sizes, total = record.cascade.sizes, sum(record.left)
    return [
        {
            "stage": str(stage + 1),
            "passes so far": str(int(sizes[stage])),
            "faces leaving": f"{count:,}",
            "%": f"{100 * count / total:.1f}",
        }
        for stage, count in enumerate(record.left)
        if count or stage == len(record.left) - 1
    ]
