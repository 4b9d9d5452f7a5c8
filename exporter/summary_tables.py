"""What a bundle holds, as tables for the terminal."""

from collections.abc import Iterator, Sequence

from rich.table import Table

from emoexport.decision import Decision
from emoexport.manifest import CalibrationEntry, MemberEntry, ViewEntry
from emoexport.precision import PRECISIONS
from emoexport.summary import BundleSummary
from emoexport.table_format import Row, terminal_table

__all__ = ["summary_tables"]


def summary_tables(summary: BundleSummary) -> Iterator[tuple[str, Table]]:
    """Titles and tables: the fold as a whole, its members, views, graphs, tensor types and operators."""
    yield f"{summary.bundle}, built {summary.created}", _fold_table(summary)
    members = [_member_row(number, one) for number, one in enumerate(summary.members, 1)]
    yield "members", _table(_with_weights(members, summary.members), "backbone")
    yield "views", _table(_view_rows(summary), "view", "function", "parameters", "mirrored", "same as")
    yield "graphs", _table(_graph_rows(summary), "graph", "file")
    if summary.engines:
        yield "compiled, for one kind of machine", _table(_package_rows(summary), "engine", "file", "PyTorch", "for")
    if summary.certificates:
        title = "certificates: points lost and labels that differ, at most, at 95 %"
        yield title, _table(_certificate_rows(summary), "engine", "verdict", "batches")
    if summary.passports:
        yield "built from the graphs", _table(_passport_rows(summary), "engine", "by", "for", "faces in a call")
    yield (
        "tensor types: of the weights, and that layers and other nodes compute in",
        _table(_type_rows(summary), "graph", "type"),
    )
    kept = _kept_rows(summary)
    if kept:
        yield "nodes of members that stay in FP32, or unquantised", _table(kept, "because of")
    yield "nodes of each operator", _table(_operator_rows(summary), "operator")


def _table(rows: Sequence[Row], *texts: str) -> Table:
    return terminal_table(list(rows[0]), rows, texts=texts)


def _fold_table(summary: BundleSummary) -> Table:
    height, width, channels = summary.face_shape
    members, views = len(summary.members), len(summary.views)
    merged = sum(view.same_as is not None for view in summary.views)
    shown = f"{views - merged} of {views} views" if merged and not summary.choice.passes else f"{views} views"
    computed = f"{'of ' if summary.choice.passes else ''}{members} members x {shown}"
    out = summary.bytes_out_a_face
    chosen = ", ".join(str(number) for number in summary.choice.numbers)
    facts = {
        **({"of the run": f"members {chosen}"} if chosen else {}),
        "passes a face": f"{summary.passes_a_face} ({computed})",
        **_passes_lines(summary.choice.passes),
        "vote": summary.vote,
        "decision": _decision_line(summary.decision),
        "layout": summary.layout.name,
        **_rewrites_lines(summary.rewrites),
        **_calibration_line(summary.calibration),
        "labels": ", ".join(summary.labels),
        "parameters": _number(summary.parameters),
        "GFLOP a face": _number(summary.gflop_a_face, digits=3),
        "faces a call": f"1 to {summary.max_batch}",
        "bytes in a face": f"{summary.bytes_in_a_face:,} (uint8 {height} x {width} x {channels})",
        "bytes out a face": f"{sum(out.values()):,}",
        **{f"  {name}": f"{size:,}" for name, size in out.items()},
    }
    return _table([{"of the fold": name, "": value} for name, value in facts.items()], "of the fold", "")


def _decision_line(decision: Decision) -> str:
    return (
        f"temperature {decision.temperature:.3g}, {len(decision.thresholds)} thresholds, "
        f"{len(decision.pairs)} confusion pairs"
    )


def _passes_lines(passes: dict[str, float]) -> dict[str, str]:
    """Single passes, with what part of the vote each has."""
    total = sum(passes.values())
    return {f"  {name}": f"{100 * weight / total:.1f} %" for name, weight in passes.items()}


def _rewrites_lines(rewrites: dict[str, int] | None) -> dict[str, str]:
    if not rewrites:
        return {"rewrites": "not counted" if rewrites is None else "none"}
    return {"rewrites, nodes": f"{sum(rewrites.values()):,}", **{f"  {name}": f"{n:,}" for name, n in rewrites.items()}}


def _calibration_line(calibration: CalibrationEntry | None) -> dict[str, str]:
    if calibration is None:
        return {}
    if calibration.random:
        return {"calibration": f"{calibration.method}, calibrated on random pictures"}
    return {"calibration": f"{calibration.method}, {calibration.faces:,} faces of {calibration.data}"}


def _view_rows(summary: BundleSummary) -> list[Row]:
    rows = [_view_row(view) for view in summary.views]
    if any(view.same_as for view in summary.views):
        rows = [row | {"same as": view.same_as or ""} for row, view in zip(rows, summary.views, strict=True)]
    return _with_weights(rows, summary.views)


def _with_weights(rows: list[Row], entries: Sequence[MemberEntry | ViewEntry]) -> list[Row]:
    """With a column of their weights, where any is not 1."""
    if all(entry.weight == 1 for entry in entries):
        return rows
    return [row | {"weight": f"{entry.weight:.4g}"} for row, entry in zip(rows, entries, strict=True)]


def _member_row(number: int, member: MemberEntry) -> Row:
    return {
        "member": str(number),
        "backbone": member.backbone,
        "epoch": str(member.epoch),
        "validation %": f"{100 * member.validation_accuracy:.1f}",
        "parameters": _number(member.parameters),
        "GFLOP a pass": _number(member.gflop_a_pass, digits=4),
    }


def _view_row(view: ViewEntry) -> Row:
    return {
        "view": view.name,
        "function": view.function,
        "parameters": ", ".join(f"{name} {value:.4g}" for name, value in view.parameters.items()),
        "mirrored": "yes" if view.mirrored else "no",
    }


def _graph_rows(summary: BundleSummary) -> list[Row]:
    return [
        {
            "graph": precision,
            "file": graph.file,
            "opset": str(graph.opset),
            "nodes": f"{sum(graph.operators.values()):,}",
            "MB": f"{graph.bytes / 1e6:,.1f}",
        }
        for precision, graph in summary.graphs.items()
    ]


def _package_rows(summary: BundleSummary) -> list[Row]:
    return [
        {
            "engine": name,
            "file": package.file,
            "PyTorch": package.torch,
            "for": f"{package.instruction_sets[0]} with {len(package.instruction_sets) - 1} extensions",
            "compiled in s": f"{package.seconds:,.0f}",
            "MB": f"{package.bytes / 1e6:,.1f}",
        }
        for name, package in summary.engines.items()
    ]


def _passport_rows(summary: BundleSummary) -> list[Row]:
    rows: list[Row] = []
    for name, passport in summary.passports.items():
        device = passport.device
        time = passport.time_share.get(PRECISIONS[passport.precision].number)
        rows.append(
            {
                "engine": name,
                "by": passport.versions[passport.backend],
                "for": device.get("name") or device.get("compute_capabilities") or "8.0 and later",
                "faces in a call": ", ".join("-".join(map(str, profile)) for profile in passport.profiles),
                "multiplications in it": "not known" if passport.asked_share is None else f"{passport.asked_share:.0%}",
                "time in it": "not measured" if time is None else f"{time:.0%}",
                "built in s": f"{passport.seconds:,.0f}",
                "MB": f"{passport.bytes / 1e6:,.1f}",
            }
        )
    return rows


def _certificate_rows(summary: BundleSummary) -> list[Row]:
    return [
        {
            "engine": name,
            "verdict": found.verdict,
            "points": f"{found.bound_points:+.2f}",
            "labels %": f"{found.disagreement_bound_pct:.2f}",
            "batches": ", ".join(map(str, found.batches)),
        }
        for name, found in summary.certificates.items()
    ]


def _type_rows(summary: BundleSummary) -> list[Row]:
    return [
        {
            "graph": precision,
            "type": name,
            "weights": f"{count.weights:,}",
            "weight MB": f"{count.weight_bytes / 1e6:,.2f}",
            "layers": f"{count.layers:,}",
            "other nodes": f"{count.other_nodes:,}",
        }
        for precision, graph in summary.graphs.items()
        for name, count in graph.types.items()
    ]


def _kept_rows(summary: BundleSummary) -> list[Row]:
    """One column a graph, as far as it kept any."""
    graphs = {precision: graph.kept for precision, graph in summary.graphs.items() if graph.kept}
    return [
        {"because of": why, **{precision: f"{len(kept.get(why, ())):,}" for precision, kept in graphs.items()}}
        for why in dict.fromkeys(why for kept in graphs.values() for why in kept)
    ]


def _operator_rows(summary: BundleSummary) -> list[Row]:
    """One column a graph; the order is that of the last graph's frequencies, then of what only others have."""
    graphs = summary.graphs
    names = dict.fromkeys(name for graph in reversed(graphs.values()) for name in graph.operators)
    return [
        {
            "operator": name,
            **{precision: f"{graph.operators.get(name, 0):,}" for precision, graph in graphs.items()},
        }
        for name in names
    ]


def _number(value: float | None, *, digits: int = 0) -> str:
    return "not counted" if value is None else f"{value:,.{digits}f}"
