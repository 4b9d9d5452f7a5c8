"""Trials: graphs with some of the members' blocks in few bits, made, measured and written down."""

import functools
import json
import pkgutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from rich.console import Console

from emoexport.calib.record import Calibration
from emoexport.calib.sensitivity import Cost, block_of, cost_of
from emoexport.calib.tuning import Kind, Setting, Trial
from emoexport.calibration import CALIBRATION_FILE
from emoexport.engines import Backend, backends_named, open_engine
from emoexport.engines.base import Engine
from emoexport.engines.machine import describe_machine
from emoexport.engines.timing import interleave, ratio_of
from emoexport.errors import BadInput, UsageError
from emoexport.files import sha256_of, sha256_of_graph, write_text
from emoexport.member_graph import in_member
from emoexport.outcome import Outcome
from emoexport.precision import PRECISIONS
from emoexport.progress import progress_bar
from emoexport.quantize import layers_of
from emoexport.statistics import Estimate
from emoexport.temporaries import temporary_directory
from emoexport.train.dataset import Faces

__all__ = ["TrialLog", "Trials", "Workshop", "nodes_by_block"]


def nodes_by_block(graph: Path) -> dict[str, str]:
    """The names of the members' nodes, each with its block."""
    return {str(node.name): block_of(str(node.name)) for node in ir.load(graph).graph if in_member(node.name)}


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """What graphs are made of, opened with and measured on."""

    fp32: Path
    calibration: Calibration
    precision: str
    faces: Faces
    batch: int
    rounds: int
    threads: int | None
    max_batch: int
    scratch: Path
    """A folder for graphs that are only measured: they may be large."""
    console: Console

    @functools.cached_property
    def nodes(self) -> Mapping[str, str]:
        """Names of the members' nodes, each with its block."""
        return nodes_by_block(self.fp32)

    @functools.cached_property
    def blocks(self) -> list[str]:
        """Those with a layer that can have few bits, in the order of the graph."""
        return list(dict.fromkeys(block_of(str(node.name)) for node in layers_of(ir.load(self.fp32).graph)))

    @property
    def some(self) -> NDArray[np.uint8]:
        """The faces of a call that is timed."""
        return np.resize(self.faces.images, (self.batch, *self.faces.images.shape[1:]))

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A folder for a graph, gone afterwards."""
        with temporary_directory(self.scratch / "graph") as folder:
            yield folder

    def convert(self, folder: Path, precision: str, left: Sequence[str], *, alone: bool = False) -> Path:
        """Make the graph that leaves blocks in FP32; if `alone`, all that is in none too."""
        kept = set(left)
        stays = [name for name, block in self.nodes.items() if block in kept or (alone and block not in self.blocks)]
        graph = folder / "model.onnx"
        pkgutil.resolve_name(PRECISIONS[precision].converter)(self.fp32, graph, self.calibration, stays)
        return graph

    def open(self, backend: Backend, precision: str, graph: Path) -> Engine:
        """Open a graph."""
        return open_engine(
            backend,
            graph,
            precision=precision,
            face_shape=self.faces.images.shape[1:],
            max_batch=self.max_batch,
            threads=self.threads,
        )

    def run(self, engine: Engine, title: str) -> Outcome:
        """What an engine decides about the faces."""
        with progress_bar(self.console, title, len(self.faces)) as advance:
            return engine.run_all(self.faces.images, batch_size=self.batch, progress=advance)

    def setting(self, backend: Backend) -> Setting:
        """What all this is, for the log."""
        machine = describe_machine()
        del machine["load_average"]  # it is another one at every start
        return Setting(
            graph_sha256=sha256_of_graph(self.fp32),
            calibration_sha256=sha256_of(self.fp32.with_name(CALIBRATION_FILE)),
            precision=self.precision,
            engine=backend.name,
            faces_sha256=self.faces.sha256(),
            faces=len(self.faces),
            batch=self.batch,
            rounds=self.rounds,
            threads=self.threads,
            machine=machine,
        )


class TrialLog:
    """Trials as lines of a file, the setting first."""

    def __init__(self, path: Path, setting: Setting, *, force: bool) -> None:
        self.path, self.setting = path, setting
        self.trials: list[Trial] = []
        whole = [] if force else _whole_lines(path)
        if not whole:
            write_text(path, setting.model_dump_json() + "\n")
            return
        self._require_same(Setting.parse(_json(whole[0], path), source=str(path)))
        self.trials = [Trial.parse(_json(line, path), source=str(path)) for line in whole[1:]]
        write_text(path, "".join(whole))

    def _require_same(self, known: Setting) -> None:
        for field in Setting.model_fields:
            was, is_now = getattr(known, field), getattr(self.setting, field)
            if was != is_now:
                raise UsageError(
                    f"the trials in {self.path} were made with another {field}: {was}; now it is {is_now}.",
                    hint="--force forgets them; or name another --output",
                )

    @staticmethod
    def engine_of(path: Path) -> str | None:
        """The engine that earlier trials were made with; None if there are none."""
        lines = _whole_lines(path)
        return Setting.parse(_json(lines[0], path), source=str(path)).engine if lines else None

    def find(self, kind: str, precision: str, left: Sequence[str]) -> Trial | None:
        """A trial that was made before."""
        wanted = (kind, precision, tuple(left))
        return next((trial for trial in self.trials if (trial.kind, trial.precision, trial.left) == wanted), None)

    def add(self, trial: Trial) -> Trial:
        """Keep a trial."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(trial.model_dump_json() + "\n")
        self.trials.append(trial)
        return trial


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file, if there is one; the last may have been cut off, and is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [line for line in lines if line.endswith("\n")]


def _json(line: str, path: Path) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as err:
        raise BadInput(f"{path} holds a line that is no JSON: {line[:40]!r}.", hint="--force forgets it") from err


class Trials:
    """Makes trials that are not in the log; opens what they are held against when the first one needs it."""

    def __init__(self, shop: Workshop, backend: Backend, log: TrialLog) -> None:
        self.shop, self.backend, self.log = shop, backend, log
        self._kept = ExitStack()

    def __enter__(self) -> "Trials":
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.close()

    @functools.cached_property
    def _before(self) -> Outcome:
        """What the FP32 graph decides."""
        backend = next(row for row in (self.backend, *backends_named(None)) if row.takes("fp32"))
        return self.shop.run(self.shop.open(backend, "fp32", self.shop.fp32), "the FP32 graph on validation faces")

    @functools.cached_property
    def _whole(self) -> Engine:
        """The graph with all blocks in few bits."""
        graph = self.shop.convert(self._kept.enter_context(self.shop.folder()), self.shop.precision, ())
        return self.shop.open(self.backend, self.shop.precision, graph)

    def alone(self, block: str, precision: str, backend: Backend) -> Trial:
        """What it costs to have one block in a precision, and all else in FP32."""
        left = [name for name in self.shop.blocks if name != block]
        title = f"{block} alone in {PRECISIONS[precision].title}"
        return self._trial("alone", left, title, precision=precision, backend=backend)

    def without(self, block: str) -> Trial:
        """How fast the graph is with one block in FP32, and all else in few bits."""
        return self._trial("without", [block], f"without {block}")

    def together(self, left: Collection[str]) -> Trial:
        """What a step of the search costs, and how fast it is."""
        blocks = self.shop.blocks
        title = f"{len(blocks) - len(left)} of {len(blocks)} blocks in {self.shop.precision}"
        return self._trial("search", [block for block in blocks if block in left], title)

    def _trial(
        self,
        kind: Kind,
        left: Sequence[str],
        title: str,
        *,
        precision: str | None = None,
        backend: Backend | None = None,
    ) -> Trial:
        """Take a trial from the log, or make it: what a graph costs, how fast it is, or both."""
        precision = precision or self.shop.precision
        known = self.log.find(kind, precision, left)
        if known is not None:
            return known
        cost, speed, milliseconds = None, None, None
        with self.shop.folder() as folder:
            graph = self.shop.convert(folder, precision, left, alone=kind == "alone")
            engine = self.shop.open(backend or self.backend, precision, graph)
            if kind != "without":
                cost = self._cost(engine, title)
            if kind != "alone":
                speed, milliseconds = self._speed(engine, title)
        trial = Trial(
            kind=kind, precision=precision, left=tuple(left), cost=cost, times_as_fast=speed, ms_a_face=milliseconds
        )
        return self.log.add(trial)

    def _cost(self, engine: Engine, title: str) -> Cost:
        return cost_of(self._before, self.shop.run(engine, title), self.shop.faces.labels)

    def _speed(self, engine: Engine, title: str) -> tuple[Estimate, float]:
        calls: dict[str, Callable[[], object]] = {
            "whole": functools.partial(self._whole.run, self.shop.some),
            "this": functools.partial(engine.run, self.shop.some),
        }
        with progress_bar(self.shop.console, f"{title}, timed", self.shop.rounds + 2) as advance:
            samples = interleave(calls, rounds=self.shop.rounds, progress=advance)
        ratio = ratio_of(samples["whole"], samples["this"])
        spent = float(np.median(samples["this"])) / self.shop.batch
        return Estimate(value=ratio.value, low=ratio.low, high=ratio.high), round(spent, 4)
