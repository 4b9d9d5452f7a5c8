"""Where the stages meet: a run becomes a bundle."""

import functools
import os
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from emoexport.bundle import Bundle
from emoexport.calib.record import Calibration
from emoexport.calib.tuning import Tuning
from emoexport.calibration import (
    CALIBRATION_FILE,
    CalibrationFaces,
    Wish,
    calibrate,
    calibration_entry,
    faces_to_calibrate_on,
    read_calibration,
)
from emoexport.compiled import compile_fold, require_compiler
from emoexport.decision import Decision
from emoexport.engines.machine import versions_of
from emoexport.entries import graph_entry, member_entries, view_entry
from emoexport.errors import BadCheckpoint, BadData, UsageError
from emoexport.files import new_directory, sha256_of, write_text
from emoexport.fold import Fold
from emoexport.gate import GATE_FACES, judge_graphs
from emoexport.half import Kept
from emoexport.layout import export_in_layout, require_layout
from emoexport.manifest import MANIFEST_FILE, FileEntry, GateEntry, Manifest
from emoexport.passes import Choice
from emoexport.precision import PRECISIONS, Precision, precisions_named
from emoexport.provenance import record_provenance
from emoexport.quantize import feeds_of
from emoexport.rewrites import prepare_members
from emoexport.run_faces import validation_faces
from emoexport.train.checkpoint import FittedDecision, MemberRecord, RunRecord, load_members, read_run
from emoexport.train.dataset import Faces
from emoexport.tuning import TUNING_FILE, nodes_left, read_tuning
from emoexport.views import coinciding, views_named

__all__ = ["build"]


def build(
    run: Path,
    out: Path,
    *,
    choice: Choice = Choice(),  # noqa: B008 (frozen)
    precisions: Sequence[str] = (),
    calibration: Wish = Wish(),  # noqa: B008 (frozen)
    max_batch: int = 256,
    layout: str = "branches",
    keep_rejected: bool = False,
    gate_faces: int = GATE_FACES,
    tuning: Path | None = None,
    compiled: bool = False,
    console: Console,
) -> Bundle:
    """Fold a run into graphs.

    Args:
        run: a directory that `train` wrote.
        out: the bundle; it appears when it is complete, and replaces a bundle that stands there.
        choice: which members and views, and how much each weighs; the run's own vote if none is named.
        precisions: besides FP32, which the others are made from.
        calibration: what FP16 and 8-bit graphs are calibrated on, and how.
        max_batch: the largest number of faces in a call.
        keep_rejected: keep graphs of 8 bits that are not recommended on this machine.
        gate_faces: how many validation faces at most to judge that on.
        tuning: a `tuning.json` that says which blocks of the members stay in FP32 in a graph of 8 bits.
        layout: how the members stand in the graph, as `layout.export_in_layout` takes it.
        compiled: also compile the fold for this machine, as `compiled.compile_fold` does.
        console: where progress is shown.

    Raises:
        UsageError: if there is no such member, view or layout, or the members cannot stand in it.
        BadCheckpoint: if the members cannot be rebuilt or do not fit together.
        BadData: if calibration needs faces and they cannot be read.
        MissingRuntime: if the fold is to be compiled and there is no C++ compiler.
        Busy, DiskFull: if another command is writing `out`, or there is no room for it.
    """
    rows = precisions_named(list(precisions))
    _check_wishes(calibration, layout, compiled=compiled)
    if choice.passes and layout != "branches":
        raise UsageError(f"single passes stand in the layout branches; found --layout {layout}.", hint="leave it out")
    tuned = None if tuning is None else _tuning_for(rows, tuning)
    with new_directory(out, marker=MANIFEST_FILE) as directory:
        record = read_run(run)
        entries, members = load_members(run)
        whole = choice.among(len(entries), record.config.views)
        is_full_vote = choice.is_full_vote(len(entries), record.config.views)
        entries = [entries[number - 1] for number in whole.members]
        members = [members[number - 1] for number in whole.members]
        decision = FittedDecision.parse_json(run / "decision.json", error=BadCheckpoint).decision
        model = entries[0].model
        _require_one_kind(run, record, decision, entries[0])
        views = views_named(list(whole.views))
        shape = (model.image_size, model.image_size, model.channels)
        faces = faces_to_calibrate_on(run, record, calibration) if any(row.calibrated for row in rows) else None
        if not is_full_vote:
            console.print(
                "The decision was fitted on the run's vote, all its members and views with equal weights; "
                "this bundle votes otherwise.",
                style="yellow",
            )
        console.print(f"folding {len(members)} members x {len(views)} views ...")
        described = member_entries(entries, members, list(whole.members.values()))
        graphs, rewrites = prepare_members(
            members, [entry.model for entry in entries], (model.channels, model.image_size, model.image_size)
        )
        fp32 = directory / "model.fp32.onnx"
        weights, same_as = whole.weights(), coinciding(views, shape)
        fold = functools.partial(Fold, views=views, decision=decision, weights=weights, same_as=same_as)
        limits: dict[str, Any] = {"face_shape": shape, "max_batch": max_batch, "console": console}
        packages = compile_fold(graphs, fold, directory, **limits) if compiled else {}
        laid_out = export_in_layout(graphs, fold, fp32, layout=layout, **limits)  # uses the members up
        del graphs
        found = _calibrated(fp32, rows, record, calibration, faces, earlier=out / CALIBRATION_FILE, console=console)
        if found is not None:
            write_text(directory / CALIBRATION_FILE, found.to_json())
        left = {} if tuned is None or found is None else _keep_tuning(tuned, found, fp32, console)
        kept: dict[str, Kept] = {"fp32": {}}
        for row in rows:
            if row.converter:
                console.print(f"converting to {row.title} ...")
                convert = pkgutil.resolve_name(row.converter)
                kept[row.name] = convert(fp32, directory / f"model.{row.name}.onnx", found, left.get(row.name, ()))
        graph_files = {row.name: directory / f"model.{row.name}.onnx" for row in rows}
        validation = None if faces is None else faces.validation
        gate = _judge(
            run, record, graph_files, calibration, validation, max_batch=max_batch, count=gate_faces, console=console
        )
        for name, judged in gate.items():
            if judged.verdict == "not recommended" and not keep_rejected:
                for file in directory.glob(f"{graph_files.pop(name).name}*"):
                    file.unlink()
        write_text(directory / "labels.txt", "".join(f"{label}\n" for label in model.labels))
        versions = versions_of("emoexport", "torch", "timm", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime")
        read = [run / "run.json", run / "decision.json", *(file for file in (calibration.file, tuning) if file)]
        manifest = Manifest(
            face_shape=shape,
            max_batch=max_batch,
            labels=model.labels,
            run=os.path.relpath(run.resolve(), out.resolve()),
            members=described,
            views=tuple(
                view_entry(view, views[first], whole.views[view.name])
                for view, first in zip(views, same_as, strict=True)
            ),
            choice=choice,
            decision=decision,
            layout=laid_out,
            rewrites=rewrites,
            graphs={name: graph_entry(file, kept[name]) for name, file in graph_files.items()},
            engines=packages,
            gate=gate,
            calibration=None if found is None else calibration_entry(found),
            tuning=None if tuned is None else TUNING_FILE,
            data=record.data.model_dump(mode="json"),
            versions=versions,
            provenance=record_provenance(
                directory, run, members=described, data=record.data, packages=versions, materials=read
            ),
            files={
                file.relative_to(directory).as_posix(): FileEntry(sha256=sha256_of(file), bytes=file.stat().st_size)
                for file in sorted(directory.rglob("*"))
                if file.is_file()
            },
        ).sealed()
        write_text(directory / MANIFEST_FILE, manifest.to_json())
    return Bundle(path=out, manifest=manifest)


def _check_wishes(calibration: Wish, layout: str, *, compiled: bool) -> None:
    """Before anything slow is done."""
    require_layout(layout)
    calibration.check()
    if compiled:
        require_compiler()


def _tuning_for(rows: Sequence[Precision], file: Path) -> Tuning:
    """What was chosen for one of the precisions that are built."""
    tuned = read_tuning(file)
    if tuned.setting.precision not in {row.name for row in rows}:
        raise UsageError(
            f"{file} is a tuning of {tuned.setting.precision}, which is not asked for.",
            hint=f"emoexport build --{tuned.setting.precision} --tuning {file}",
        )
    return tuned


def _keep_tuning(tuned: Tuning, found: Calibration, fp32: Path, console: Console) -> dict[str, list[str]]:
    """Write what was chosen beside the FP32 graph and its calibration; by precision, the nodes that stay in FP32."""
    left = nodes_left(tuned, fp32, found.graph_sha256)
    write_text(fp32.with_name(TUNING_FILE), tuned.to_json())
    if tuned.setting.calibration_sha256 != sha256_of(fp32.with_name(CALIBRATION_FILE)):
        console.print(
            "The tuning was made with another calibration: what it says of costs is not of this graph.",
            style="yellow",
        )
    return {tuned.setting.precision: left}


def _calibrated(
    fp32: Path,
    rows: Sequence[Precision],
    record: RunRecord,
    wish: Wish,
    faces: CalibrationFaces | None,
    *,
    earlier: Path,
    console: Console,
) -> Calibration | None:
    """The ranges that these precisions need of the FP32 graph: read, found before, or found now."""
    if not any(row.calibrated for row in rows):
        return None
    if faces is None:
        assert wish.file is not None
        return read_calibration(wish.file, fp32, record)
    feeds = feeds_of(fp32) if any(row.bits == 8 for row in rows) else []
    return calibrate(fp32, feeds, faces, method=wish.method, earlier=earlier, console=console)


def _judge(
    run: Path,
    record: RunRecord,
    graphs: Mapping[str, Path],
    wish: Wish,
    validation: Faces | None,
    *,
    max_batch: int,
    count: int,
    console: Console,
) -> dict[str, GateEntry]:
    """Hold the graphs of 8 bits against the others, on the faces that the run was validated on."""
    small = [name for name in graphs if PRECISIONS[name].bits == 8]
    if not small:
        return {}
    if validation is None:  # calibration needed no faces, so the build goes on where there are none
        try:
            validation = validation_faces(run, record, wish.data)
        except BadData as err:
            reason = f"there are no faces to judge on: {err}"
            return dict.fromkeys(small, GateEntry(verdict="not judged", reason=reason))
    return judge_graphs(graphs, validation, max_batch=max_batch, count=count, console=console)


def _require_one_kind(run: Path, record: RunRecord, decision: Decision, member: MemberRecord) -> None:
    """Hold the three files of a run against each other: each could have been edited or exchanged."""
    for name, found, needed in (
        ("decision.json has the labels", decision.labels, member.model.labels),
        ("run.json has the image_size", record.config.model.image_size, member.model.image_size),
        ("run.json has the channels", record.config.model.channels, member.model.channels),
    ):
        if found != needed:
            raise BadCheckpoint(
                f"{run}: {name} {found}; its members have {needed}.", hint="restore the run's files, or train again"
            )
