"""What stands in each section of the page."""

from collections import Counter
from collections.abc import Sequence

from matplotlib.axes import Axes

from emoexport.certificate_figures import (
    MARKS,
    accuracy_panel,
    answered_by,
    confusion_panel,
    disagreement_panel,
    recall_panel,
    reliability_panel,
    that_differ_most,
)
from emoexport.contents_section import contents_section
from emoexport.evaluation import BINS
from emoexport.findings import Findings, Training
from emoexport.page import Drawing, Missing, Page, Section, Sheet
from emoexport.parity import EngineParity, ParityReport
from emoexport.parity_tables import certified_means, engine_row, evidence_row, parity_table, reasons_of
from emoexport.precision import PRECISIONS
from emoexport.precision_figures import graph_panel, layers_panel, sensitivity_panels, time_panel
from emoexport.saved_answers import SavedAnswers
from emoexport.speed_figures import latency_panel, roofline_panel, throughput_panels
from emoexport.speed_tables import engines_table, speed_table
from emoexport.svg import draw, legend_below
from emoexport.table_format import percent, with_interval
from emoexport.tables import machine_line
from emoexport.throughput import SpeedReport
from emoexport.train.curves import draw_accuracy, draw_losses
from emoexport.tuning_tables import tuning_sentences, tuning_table

__all__ = ["page_of"]


def page_of(found: Findings) -> Page:
    """The page of a bundle."""
    verdict = "not verified" if isinstance(found.parity, Missing) else found.parity.verdict
    return Page(
        title=found.bundle.path.resolve().name,
        verdict=verdict,
        mark=MARKS.get(verdict, "-"),
        lines=_summary_lines(found),
        sections=[
            contents_section(found),
            *_certificate_sections(found),
            *_speed_sections(found),
            _precision_section(found),
            _sensitivity_section(found),
            _training_section(found),
        ],
        foot=_foot(found),
    )


def _summary_lines(found: Findings) -> list[str]:
    manifest, parity, speed = found.bundle.manifest, found.parity, found.speed
    precisions = ", ".join(PRECISIONS[name].title for name in manifest.graphs)
    lines = [
        f"{len(manifest.members)} members and {len(manifest.views)} views, {manifest.passes_a_face} passes a face, "
        f"folded into one graph from uint8 faces to a label, in {precisions}."
    ]
    if isinstance(parity, ParityReport):
        counted = Counter(engine.verdict for engine in parity.engines)
        told = ", ".join(f"{count} {verdict}" for verdict, count in counted.items())
        lines.append(
            f"Engines against the PyTorch reference, on {parity.faces:,} faces of {parity.data}, "
            f"{parity.split}: {told}."
        )
    if isinstance(speed, SpeedReport):
        engines = parity.engines if isinstance(parity, ParityReport) else ()
        tried = {(one.engine, batch) for one in engines if one.verdict == "certified" for batch in one.batches}
        certified = [one for one in speed.results if (one.engine, one.batch) in tried]
        best = min(certified or speed.results, key=lambda result: result.ms_a_face)
        lines.append(
            f"{'Fastest of the certified' if certified else 'Fastest'}: {best.engine}, {best.ms_a_face:.3g} ms a face "
            f"in calls of {best.batch}, {with_interval(best.times_reference, 2)} times as fast as the reference."
        )
    return lines


def _certificate_sections(found: Findings) -> list[Section]:
    parity, saved = found.parity, found.answers
    names = {"certificate": "Certificate", "confusion": "Confusion", "reliability": "Reliability"}
    if not isinstance(parity, Missing) and not parity.results:
        parity = Missing(sentence="No engine answered: see reports/parity.md.", command="emoexport doctor")
    if isinstance(parity, Missing):
        return [Section(anchor=anchor, title=title, missing=[parity]) for anchor, title in names.items()]
    certificate = _certificate(parity)
    if isinstance(saved, Missing):
        rest = [Section(anchor=name, title=names[name], missing=[saved]) for name in ("confusion", "reliability")]
        return [certificate, *rest]
    return [certificate, *_answer_sections(parity, saved)]


def _certificate(report: ParityReport) -> Section:
    rows = list(dict.fromkeys(result.rows for result in report.results))
    most = that_differ_most(report, rows[0])
    recall = Drawing(
        panels=[recall_panel(result) for result in most],
        caption=f"Recall of each emotion, engine less reference, {rows[0]} rows: dot and paired 95 % interval "
        "(Tango 1998), n faces of the emotion. Shown is of each precision the engine that changes the most labels.",
    )
    worst = [_worst_sheet(result, report.labels) for result in most]
    return Section(
        anchor="certificate",
        title="Certificate",
        lines=[
            certified_means(report),
            *(f"{', '.join(names)}: {verdict}. {reason}." for (verdict, reason), names in reasons_of(report).items()),
            *report.notes,
        ],
        parts=[
            *(_intervals(report, name) for name in rows),
            recall,
            *(Sheet.of_terminal(f"{name} rows", parity_table(report, name)) for name in rows),
            *(_evidence_sheet(report, name) for name in rows),
            Sheet.of(
                "what the engines are",
                [engine_row(engine) for engine in report.engines],
                texts=tuple(engine_row(report.engines[0])),
                folded=True,
            ),
            *worst,
        ],
    )


def _intervals(report: ParityReport, rows: str) -> Drawing:
    faces = next(result.accuracy.n for result in report.results if result.rows == rows)
    return Drawing(
        panels=[accuracy_panel(report, rows), disagreement_panel(report, rows)],
        caption=f"Every engine and the reference on the same {faces:,} faces ({rows} rows of {report.data}, "
        f"{report.split}). Change of accuracy: dot, paired 95 % interval (Tango 1998), and as a stroke across its "
        "one-sided 95 % bound, which must not lie left of the dashed limit. Changed labels: "
        "dot, and the one-sided 95 % "
        "upper bound (Clopper-Pearson), which must not lie right of it. Colours are precisions.",
    )


def _evidence_sheet(report: ParityReport, rows: str) -> Sheet:
    found = [evidence_row(result) for result in report.results if result.rows == rows]
    title = f"face by face against the reference, {rows} rows"
    return Sheet.of(title, found, texts=("engine", "recall, largest loss [95 %]"), folded=True)


def _worst_sheet(result: EngineParity, labels: Sequence[str]) -> Sheet:
    rows = [
        {
            "face": f"{one.index:,}",
            "probability differs by": f"{one.largest_difference:.2g}",
            "engine": labels[one.label],
            "reference": labels[one.reference_label],
            "true": labels[one.true_label],
        }
        for one in result.evidence.worst
    ]
    title = f"the faces that differ most, {result.engine}"
    return Sheet.of(title, rows, texts=("engine", "reference", "true"), folded=True)


def _answer_sections(report: ParityReport, saved: SavedAnswers) -> list[Section]:
    rows = next(iter(saved.rows))
    answered = answered_by(saved, [result.engine for result in that_differ_most(report, rows)], rows)
    faces = int(saved.rows[rows].sum())
    where = f"n = {faces:,} faces, {rows} rows of {report.data}, {report.split}"
    errors = [
        {
            "of": one.name,
            "accuracy % [95 %]": percent(one.figures.accuracy, 2),
            "calibration error % [95 %]": percent(one.figures.ece, 2),
        }
        for one in answered
    ]
    confusion = Drawing(
        panels=[confusion_panel(one, report.labels) for one in answered],
        caption=f"Faces by true and decided emotion, coloured by their share of the row; {where}. Reference, and of "
        "each precision the engine that changes the most labels.",
    )
    reliability = Drawing(
        panels=[reliability_panel(one) for one in answered],
        caption=f"How often the decided label is right, by confidence in {BINS} bins of equal width, with 95 % Wilson "
        f"intervals; below, how many faces each bin holds; {where}. ECE: expected calibration error, 95 % bootstrap "
        "interval, from 0 where a calibrated model would show as much.",
    )
    sheet = Sheet.of("accuracy and calibration", errors, texts=("of",), folded=True)
    return [
        Section(anchor="confusion", title="Confusion", parts=[confusion]),
        Section(anchor="reliability", title="Reliability", parts=[reliability, sheet]),
    ]


def _speed_sections(found: Findings) -> list[Section]:
    speed = found.speed
    if isinstance(speed, Missing):
        return [Section(anchor="speed", title="Speed", missing=[speed])]
    batches = sorted({result.batch for result in speed.results})
    calls = min(result.latency_ms.calls for result in speed.results)
    latency = Drawing(
        panels=[latency_panel(speed, batch) for batch in dict.fromkeys((batches[0], batches[-1]))],
        caption=f"Time of single calls, end to end from uint8 faces in memory to labels, all engines in turn, "
        f"{calls} calls each or more: every call a dot, long stroke the median, short stroke the 95th percentile.",
    )
    throughput = Drawing(
        panels=throughput_panels(speed),
        caption="Faces a second, medians, by the number of faces in a call; both axes are logarithmic.",
    )
    gflop = found.bundle.manifest.gflop_a_face
    roof = [] if gflop is None else [_roofline(speed, gflop)]
    return [
        Section(
            anchor="speed",
            title="Speed",
            lines=[*speed.notes],
            parts=[
                latency,
                throughput,
                *roof,
                Sheet.of_terminal("what each engine takes, and its best batch", engines_table(speed)),
                Sheet.of_terminal("all figures", speed_table(speed), folded=True),
            ],
        )
    ]


def _roofline(speed: SpeedReport, gflop_a_face: float) -> Drawing:
    return Drawing(
        panels=[roofline_panel(speed, gflop_a_face)],
        caption="What the convolutions and matrix products of the passes come to in the median time of a call: a dot "
        "for each number of faces in a call, larger for more. The roof, a stroke across, is what a large matrix "
        "product by PyTorch reaches here in the same type of number; no bandwidth was measured, so the roof is flat. "
        "In words: the share of the roof where the engine reaches most.",
    )


def _precision_section(found: Findings) -> Section:
    parity = found.parity
    panels = [graph_panel(found.summary)]
    if isinstance(parity, ParityReport):
        panels += [layers_panel(parity), time_panel(parity)]
    return Section(
        anchor="precision",
        title="Precision",
        missing=[parity] if isinstance(parity, Missing) else [],
        parts=[
            Drawing(
                panels=panels,
                caption="Type of number by layer. Asked for: convolutions and matrix products of each graph. Computed: "
                "what the runtimes tell of each engine, all its layers by number, and its convolutions, matrix "
                "products and attention by share of their time; not told, where a runtime does not say.",
            )
        ],
    )


def _sensitivity_section(found: Findings) -> Section:
    title, anchor, tuning = "Sensitivity of each block", "sensitivity", found.tuning
    if isinstance(tuning, Missing):
        return Section(anchor=anchor, title=title, missing=[tuning])
    drawing = Drawing(
        panels=sensitivity_panels(tuning),
        caption="Cost: how far the vote moves where the block alone is in few bits, Kullback-Leibler divergence on "
        f"n = {tuning.setting.faces:,} validation faces. Gain: time that few bits in the block save, 95 % bootstrap "
        f"interval over {tuning.setting.rounds} rounds.",
    )
    sheet = Sheet.of_terminal("blocks", tuning_table(tuning), folded=True)
    return Section(anchor=anchor, title=title, lines=tuning_sentences(tuning), parts=[drawing, sheet])


def _training_section(found: Findings) -> Section:
    training = found.training
    if isinstance(training, Missing):
        return Section(anchor="training", title="Training", missing=[training])
    return Section(anchor="training", title="Training", parts=[_curves(training)])


def _curves(training: Training) -> Drawing:
    best = max((member.accuracy for member in training.members), default=0.0)
    count = f"{len(training.epochs)} epochs of {training.backbone}"

    def accuracy(axes: Axes) -> None:
        draw_accuracy(axes, training.epochs, training.settings, training.members)
        legend_below(axes, columns=2)

    def losses(axes: Axes) -> None:
        draw_losses(axes, training.epochs, training.settings)
        legend_below(axes, columns=2)

    return Drawing(
        panels=[
            draw(
                accuracy,
                name="training-accuracy",
                title="Accuracy",
                height=320,
                text=f"Accuracy by epoch, {count}; the best member has {100 * best:.1f} % on validation faces.",
            ),
            draw(
                losses,
                name="training-loss",
                title="Loss",
                height=320,
                text=f"Loss by epoch, {count}; the last on validation faces is "
                f"{training.epochs[-1]['validation_loss']:.3g}.",
            ),
        ],
        caption=f"{count}. Training accuracy is of augmented faces. Circles: weights that became members. Shaded: "
        "phases of augmentation, darker for stronger; dotted: where averaging or distillation begins.",
    )


def _foot(found: Findings) -> list[str]:
    lines = [f"Bundle of {found.bundle.built}."]
    for name, report in (("Verified", found.parity), ("Timed", found.speed)):
        if not isinstance(report, Missing):
            lines.append(f"{name} {report.created}. {machine_line(report.machine)}")
    return lines
