"""What `bench` found, drawn for the page: times of single calls, faces a second by batch, operations under the roof."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from emoexport.engines import BACKENDS
from emoexport.precision import PRECISIONS, precision_of
from emoexport.svg import Panel, Row, draw, legend_below, list_rows, number_colour, scale_by_ratio
from emoexport.throughput import REFERENCE, EngineSpeed, SpeedReport

__all__ = ["latency_panel", "roofline_panel", "throughput_panels"]

_INK, _GREY = "#000000", "#666666"
_STYLES: Mapping[str, str] = {"fp32": "o-", "fp16": "s-", "bf16": "D-", "int8": "^-", "int8-fp16": "v--", "fp8": "P-"}


def latency_panel(report: SpeedReport, batch: int) -> Panel:
    """Every timed call of every engine with so many faces, and their median and 95th percentile."""
    results = [result for result in report.results if result.batch == batch]
    times = np.concatenate([result.samples_ms for result in results])

    def drawing(axes: Axes) -> None:
        list_rows(axes, [Row(name=result.engine, said=_times(result)) for result in results])
        scale_by_ratio(axes, axes.xaxis, times.min(), times.max())
        for height, result in enumerate(results):
            _strip(axes, height, result)
        axes.set_xlabel("milliseconds a call")

    return draw(
        drawing,
        name=f"latency-{batch}",
        title=_faces(batch),
        height=60 + 34 * len(results),
        text=f"Times of single calls with {_faces(batch)}, in milliseconds. "
        + " ".join(f"{result.engine}: {_times(result)}." for result in results),
    )


def throughput_panels(report: SpeedReport) -> list[Panel]:
    """Faces a second by the number of faces in a call: a panel for each runtime, with the reference in each."""
    rates = [result.faces_a_second for result in report.results]
    limits = min(rates), max(rates)
    reference = [result for result in report.results if result.engine == REFERENCE]
    runtimes: dict[str, list[EngineSpeed]] = {}
    for result in report.results:
        if result.engine != REFERENCE:
            runtimes.setdefault(result.engine.removesuffix(f"-{precision_of(result.engine)}"), []).append(result)
    return [_throughput_panel(runtime, [*reference, *found], limits) for runtime, found in runtimes.items()]


def roofline_panel(report: SpeedReport, gflop_a_face: float) -> Panel:
    """Operations a second of every engine at every batch, under what a large matrix product reaches."""
    engines = list(dict.fromkeys(result.engine for result in report.results))
    reached = {
        engine: {
            result.batch: result.faces_a_second * gflop_a_face / 1000
            for result in report.results
            if result.engine == engine
        }
        for engine in engines
    }
    roofs = {engine: report.gemm_peak_tops.get(PRECISIONS[precision_of(engine)].number) for engine in engines}
    said = {engine: _share(report, engine) for engine in engines}

    def drawing(axes: Axes) -> None:
        list_rows(axes, [Row(name=engine, said=said[engine]) for engine in engines])
        values = [value for found in reached.values() for value in found.values()]
        shown = [*values, *(roof for roof in roofs.values() if roof)]
        scale_by_ratio(axes, axes.xaxis, min(shown), max(shown))
        for height, engine in enumerate(engines):
            colour, roof = _colour(engine), roofs[engine]
            if roof:
                axes.plot([min(reached[engine].values()), roof], [height, height], color="#999999", linewidth=0.8)
                axes.plot([roof, roof], [height - 0.22, height + 0.22], color=_INK, linewidth=3)
            sizes = np.linspace(16, 64, len(reached[engine]))
            axes.scatter(list(reached[engine].values()), [height] * len(sizes), s=sizes, color=colour, zorder=3)
        axes.set_xlabel("10¹² operations a second")

    return draw(
        drawing,
        name="roofline",
        height=60 + 34 * len(engines),
        text="Operations a second of every engine, against those of a large matrix product of its type of number. "
        + " ".join(f"{engine}: {words}." for engine, words in said.items()),
    )


def _strip(axes: Axes, height: float, result: EngineSpeed) -> None:
    samples = np.array(result.samples_ms)
    # Golden-ratio steps spread points evenly and are the same every time.
    scatter = height + 0.36 * ((np.arange(len(samples)) * 0.618034) % 1 - 0.5)
    axes.plot(samples, scatter, "o", color=_colour(result.engine), markersize=3.5, alpha=0.55, markeredgewidth=0)
    for value, reach, width in ((result.latency_ms.p50_ms, 0.26, 2.0), (result.latency_ms.p95_ms, 0.16, 1.2)):
        axes.plot([value, value], [height - reach, height + reach], color=_INK, linewidth=width)


def _colour(engine: str) -> str:
    return _INK if engine == REFERENCE else number_colour(precision_of(engine))


def _throughput_panel(runtime: str, results: Sequence[EngineSpeed], limits: tuple[float, float]) -> Panel:
    batches = sorted({result.batch for result in results})
    title = BACKENDS[runtime].title if runtime in BACKENDS else runtime

    def drawing(axes: Axes) -> None:
        scale_by_ratio(axes, axes.yaxis, *limits)
        for engine in dict.fromkeys(result.engine for result in results):
            _line(axes, [result for result in results if result.engine == engine])
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.set_xlim(min(batches) / 1.3, max(batches) * 1.3)
        axes.minorticks_off()
        axes.set_xlabel("faces in a call")
        axes.set_ylabel("faces a second")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", linewidth=0.8)
        legend_below(axes)

    return draw(
        drawing,
        name=f"throughput-{runtime}",
        title=title,
        height=320,
        text=f"Faces a second of {title}. "
        + " ".join(f"{one.engine}, {_faces(one.batch)}: {one.faces_a_second:,.4g}." for one in results),
    )


def _line(axes: Axes, results: Sequence[EngineSpeed]) -> None:
    precision, is_reference = precision_of(results[0].engine), results[0].engine == REFERENCE
    axes.plot(
        [result.batch for result in results],
        [result.faces_a_second for result in results],
        "o--" if is_reference else _STYLES[precision],
        color=_GREY if is_reference else number_colour(precision),
        label="reference" if is_reference else PRECISIONS[precision].title,
        markersize=5,
    )


def _share(report: SpeedReport, engine: str) -> str:
    """At the batch size at which it reaches most."""
    best = max((result for result in report.results if result.engine == engine), key=lambda one: one.faces_a_second)
    if best.share_of_peak is None:
        return "no roof measured"
    return f"{100 * best.share_of_peak:.1f} %, {_faces(best.batch)}"


def _times(result: EngineSpeed) -> str:
    latency = result.latency_ms
    unstable = ", unstable" if result.unstable else ""
    return f"p50 {latency.p50_ms:.3g}, p95 {latency.p95_ms:.3g} ms{unstable}"


def _faces(batch: int) -> str:
    return f"{batch:,} face{'s' if batch > 1 else ''}"
