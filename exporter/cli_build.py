"""The command that folds a run into a bundle, and has runtimes build engines of it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from emoexport.cli_options import console_of, newest
from emoexport.engines import BACKENDS
from emoexport.errors import UsageError
from emoexport.precision import PRECISIONS

__all__ = ["build"]

_BUILT = [row.name for row in BACKENDS.values() if row.built_from]
_PANEL = "TensorRT"


def build(
    context: typer.Context,
    run: Annotated[
        Path | None,
        typer.Argument(help="The training run, the newest under runs/ if none; or a bundle, to add --engine to."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--output", "--out", help="The bundle; build/<run> if none, of a plan build/<run>-few."),
    ] = None,
    member: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NUMBER[=WEIGHT]",
            help="A member to fold, numbered from 1, and its weight in the vote, 1 if none; repeatable. All if none.",
        ),
    ] = None,
    view: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=WEIGHT]", help="A view to fold, likewise. Those that the run votes with if none."),
    ] = None,
    single: Annotated[
        list[str] | None,
        typer.Option(
            "--pass",
            metavar="NUMBER:NAME[=WEIGHT]",
            help="Instead of both, one member on one view; repeatable. No other pass is computed.",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="A plan.json, which names passes and a precision; emoexport plan makes it."),
    ] = None,
    fp32: Annotated[
        bool, typer.Option("--fp32", help="The graph as exported: always there, so this is for --engine alone.")
    ] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Add a graph whose members compute in FP16.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Add a graph whose members compute in BF16.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Add a graph whose members compute in INT8.")] = False,
    int8_fp16: Annotated[
        bool, typer.Option("--int8-fp16", help="Add one for GPUs, in INT8 with FP16 between the layers.")
    ] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="Add one for GPUs, in FP8 with FP16 between the layers.")] = False,
    calib_size: Annotated[int, typer.Option(min=7, help="Training faces to calibrate on.")] = 512,
    calib_method: Annotated[
        str, typer.Option(help="Which range of the activations 8 bits span: min-max, entropy or percentile.")
    ] = "min-max",
    calib_data: Annotated[
        str | None, typer.Option(help="Where the training faces are, if not where the run read them.")
    ] = None,
    calib_file: Annotated[
        Path | None, typer.Option(help="A calibration.json of the same fold, instead of faces.")
    ] = None,
    calib_random: Annotated[
        bool, typer.Option("--calib-random", help="Calibrate on noise; every report says so.")
    ] = False,
    keep_rejected: Annotated[
        bool,
        typer.Option("--keep-rejected", help="Keep 8-bit graphs that are not faster here, or not as often right."),
    ] = False,
    gate_faces: Annotated[int, typer.Option(min=1, help="Validation faces, at most, to judge that on.")] = 1000,
    tuning: Annotated[
        Path | None, typer.Option(help="A tuning.json that says which blocks stay in FP32; emoexport tune makes it.")
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="The largest number of faces in a call; 256 if none, 64 of --engine.")
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            help="How members of one architecture stand in the graph: branches, stacked, or auto: the faster here."
        ),
    ] = "branches",
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Also have a compiler build engines, at the precisions asked for: {', '.join(_BUILT)}; repeatable."
        ),
    ] = None,
    min_batch: Annotated[
        int, typer.Option(min=1, help="The least number of faces in a call.", rich_help_panel=_PANEL)
    ] = 1,
    opt_batch: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="A number of faces that kernels are chosen for, 16 if none; repeatable, a profile for each.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    workspace: Annotated[
        float | None, typer.Option(min=0, help="Memory for the builder to try kernels in, GiB.", rich_help_panel=_PANEL)
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(help="A file that keeps what kernels took, read and added to.", rich_help_panel=_PANEL),
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="How long to search for kernels.", rich_help_panel=_PANEL)
    ] = None,
    version_compatible: Annotated[
        bool,
        typer.Option("--version-compatible", help="For later versions of the same major one.", rich_help_panel=_PANEL),
    ] = False,
    hardware_compatible: Annotated[
        str | None,
        typer.Option(
            help="For more GPUs than the one here: ampere-plus, same-compute-capability.", rich_help_panel=_PANEL
        ),
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="Weights can be exchanged in the engine.", rich_help_panel=_PANEL)
    ] = False,
    strip: Annotated[
        bool,
        typer.Option(
            "--strip", help="Leave weights in the graph; they are put in when it is loaded.", rich_help_panel=_PANEL
        ),
    ] = False,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X.Y",
            help="TensorRT-RTX: a kind of card to build for, as in 8.9; repeatable. 8.0 and later if none.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
) -> None:
    """Fold members, views, vote and decision into one graph, at FP32 and at the precisions asked for.

    Example: [bold]emoexport build runs/fer2013 -o build/fer2013 --fp16 --int8[/bold]
    """
    asked = {"fp32": fp32, "fp16": fp16, "bf16": bf16, "int8": int8, "int8-fp16": int8_fp16, "fp8": fp8}
    precisions = [name for name, wanted in asked.items() if wanted]
    builds = [name for name in dict.fromkeys(engine or ()) if name != "inductor"]
    from emoexport.engines.tensorrt_build import BuilderSettings  # noqa: PLC0415
    from emoexport.prebuilt import require_buildable  # noqa: PLC0415

    is_bundle = run is not None and (run / "manifest.json").is_file()
    bundle = _bundle_to_build_into(context, run, builds) if is_bundle else None
    most = max_batch or (64 if bundle is None else min(64, bundle.manifest.max_batch))
    settings = BuilderSettings(
        min_batch=min_batch,
        opt_batch=tuple(opt_batch or [max(min_batch, min(16, most))]),
        max_batch=most,
        workspace_gib=workspace,
        timing_cache=timing_cache,
        optimization_level=optimization_level,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        refit=refit,
        strip=strip,
        compute_capabilities=tuple(compute_capability or ()),
    )
    backends = require_buildable(builds, settings)
    console = console_of()
    if bundle is None:
        from emoexport.calibration import Wish  # noqa: PLC0415
        from emoexport.passes import Choice  # noqa: PLC0415
        from emoexport.pipeline import build as build_bundle  # noqa: PLC0415

        choice = Choice.of_options(member or (), view or (), single or ())
        run = run or newest(Path("runs"), "run.json", "emoexport train")
        if plan is not None:
            if choice != Choice():
                raise UsageError("found --plan, and passes besides it; needed is one of them.", hint="leave out --plan")
            from emoexport.planning import cascade_of_plan, planned  # noqa: PLC0415

            if (there := cascade_of_plan(plan)) is not None:
                where, name = there
                console.print(f"{plan} chose a cascade, which is part of {where} already: nothing is left to build.")
                console.print(f"next: emoexport predict photos/ --bundle {where} --cascade {name}")
                return
            out = out or Path("build") / f"{run.resolve().name}-few"
            run, choice, precision = planned(plan, run, console)
            precisions = precisions or [name for name in (precision,) if name != "fp32"]
        bundle = build_bundle(
            run,
            out or Path("build") / run.resolve().name,
            choice=choice,
            precisions=precisions,
            calibration=Wish(
                faces=calib_size, method=calib_method, data=calib_data, file=calib_file, random=calib_random
            ),
            max_batch=max_batch or 256,
            layout=layout,
            keep_rejected=keep_rejected,
            gate_faces=gate_faces,
            tuning=tuning,
            compiled="inductor" in (engine or ()),
            console=console,
        )
        _describe(bundle, console)
    if backends:
        _build_engines(bundle, backends, precisions or ([] if is_bundle else ["fp32"]), settings, console)
    console.print(f"next: emoexport verify {bundle.path}")


_OF_ENGINES = {"run", "engine", "max_batch", *(name.replace("-", "_") for name in PRECISIONS)}
"""Parameters of `build` that a bundle takes too, which is folded already, besides those of TensorRT."""


def _bundle_to_build_into(context: typer.Context, path: Path | None, builds: list[str]) -> Any:
    """Open the bundle that is named in place of a run: a `Bundle`."""
    from emoexport.cli_options import open_bundle  # noqa: PLC0415

    of_tensorrt = {each.name for each in context.command.params if getattr(each, "rich_help_panel", None) == _PANEL}
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if others := [name for name in given if name not in _OF_ENGINES | of_tensorrt]:
        raise UsageError(
            f"{path} is a bundle, which is folded already; --{others[0].replace('_', '-')} is of the fold.",
            hint="name the training run",
        )
    if not builds:
        known = [row.name for row in BACKENDS.values() if row.built_from == "graph"]
        raise UsageError(
            f"{path} is a bundle; what can be built into it are engines of {', '.join(known)}.",
            hint=f"emoexport build {path} --engine {known[0]}",
        )
    return open_bundle(path)


def _describe(bundle: Any, console: Any) -> None:
    """Say what was folded."""
    chosen = bundle.manifest.layout
    console.print(f"layout: {chosen.name}, {chosen.reason}")
    for name, found in bundle.manifest.gate.items():
        where = "" if found.verdict == "not judged" else " here"
        kept = "" if name in bundle.manifest.graphs else "; it is not kept, --keep-rejected would"
        console.print(f"{PRECISIONS[name].title} {found.verdict}{where}: {found.reason}{kept}")
    sizes = bundle.sizes()
    for name, entry in bundle.manifest.opened.items():
        console.print(f"{bundle.path / entry.file}  {sizes[name] / 1e6:.1f} MB")


def _build_engines(bundle: Any, backends: Any, precisions: list[str], settings: Any, console: Any) -> None:
    from emoexport.prebuilt import build_engines  # noqa: PLC0415

    for passport in build_engines(bundle, backends, precisions, settings, console=console).values():
        number, share = PRECISIONS[passport.precision].number.upper(), passport.asked_share
        console.print(
            f"{bundle.path / 'engines' / passport.file}  {passport.bytes / 1e6:.1f} MB, {passport.seconds:.0f} s"
            + ("" if share is None else f", {share:.0%} of the members' multiplications in {number}"),
        )
