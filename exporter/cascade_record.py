"""`cascades/<name>/cascade.json` of a bundle: a cascade on an engine, what is certified of it, and what it costs."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from emoexport.bundle import Bundle, check_files
from emoexport.cascade import Cascade
from emoexport.cascade_certificate import CascadeCertificate
from emoexport.cascade_stages import Calls
from emoexport.comparison import Comparison
from emoexport.config import Record, SealedRecord
from emoexport.engines import BACKENDS
from emoexport.engines.timing import Ratio
from emoexport.errors import BadBundle
from emoexport.external_data import require_own_weights
from emoexport.manifest import FileEntry
from emoexport.precision import PRECISIONS
from emoexport.table_format import with_interval
from emoexport.verdict import Judgement, Limits, Verdict, judge_counts

__all__ = [
    "CASCADES",
    "CASCADE_FILE",
    "CascadeRecord",
    "CascadeTiming",
    "cascades_in",
    "is_cascade",
    "read_cascade",
    "record_of",
]

CASCADES = "cascades"
"""The folder of a bundle with a folder for each."""
CASCADE_FILE = "cascade.json"
_PREFIX = "cascade-"


class CascadeTiming(Record):
    """A cascade against the whole fold in the same runtime and precision, on the same real faces, in turn."""

    batch: int
    """Faces in a call."""
    calls: int
    """Counted, of each."""
    ms_a_face: float
    """Mean over the calls, end to end."""
    full_ms_a_face: float
    """Of the whole fold."""
    times_full: Ratio
    """As fast as the whole fold, call by call."""


class CascadeRecord(SealedRecord):
    """`cascade.json`."""

    schema_version: Literal[1] = 1
    created: str
    """UTC, ISO 8601."""
    bundle_digest: str
    backend: str
    """Of `engines.BACKENDS`."""
    precision: str
    calls: Calls
    """How passes of a member are put into calls, and what these took."""
    cascade: Cascade
    fitted_on: str
    """The faces that fitted it, as people name them, and in the next those that it is shown on."""
    shown_on: str
    unfit: str = ""
    """Why these faces show nothing of how it does on new ones; empty where they do."""
    fitted_sha256: str
    shown_sha256: str
    reference: str
    """What computed the full vote that it is held against."""
    others: int = 0
    """Cascades of the bundle that were certified on the same faces before."""
    certificate: CascadeCertificate | None
    """None by exact bounds: those labels are the full vote's."""
    shown: Comparison
    """What the cascade itself, in calls of `timing.batch` faces, decides, against the full vote of the reference."""
    left: tuple[int, ...]
    """How many of these faces left at each stage."""
    passes_per_face: float
    """Mean over these faces."""
    timing: CascadeTiming
    machine: dict[str, str]
    """The runtime with its version, and the processor or the GPU."""
    graphs: tuple[str, ...] = Field(min_length=1)
    """What is opened, one a member, in their order: names in the same folder."""
    files: dict[str, FileEntry]
    """All of them, and what stands beside them."""

    @property
    def engine(self) -> str:
        """The name of the engine that runs it."""
        return f"{_PREFIX}{self.cascade.rule}-{self.backend}-{self.precision}"

    @property
    def limits(self) -> Limits:
        """What may be lost against the full vote: as certified, and the usual limits where the bounds are exact."""
        if self.certificate is None:
            return Limits()
        found = self.certificate
        return Limits(
            max_drop_points=100 if found.max_drop is None else 100 * found.max_drop,
            max_disagreement_pct=100 if found.epsilon is None else 100 * found.epsilon,
        )

    @property
    def verdict(self) -> Verdict:
        """Whether what is claimed was shown, and any face leaves early."""
        if self.unfit:
            return "not enough evidence"
        if self.certificate is not None:
            is_shown = self.certificate.vote_holds and self.certificate.threshold is not None
            return "certified" if is_shown else "not enough evidence"
        return self._judgement.verdict

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why, a sentence each without its point."""
        if self.unfit:
            return (self.unfit,)
        if self.certificate is not None:
            return (self.certificate.sentence.rstrip("."),)
        return self._judgement.reasons

    @property
    def _judgement(self) -> Judgement:
        """Where the bounds are exact, the engine's full vote is judged like any engine."""
        found = self.shown
        return judge_counts(found.only_right, found.only_wrong, found.disagreements, found.faces, self.limits)

    @property
    def sentences(self) -> tuple[str, ...]:
        """What was found, for people."""
        timing, found = self.timing, self.shown
        if self.certificate is not None:
            what = [self.certificate.sentence]
        else:
            what = [f"No face leaves before its label is settled: {self.passes_per_face:.2f} passes a face on average."]
            what += [f"Its full vote: {reason}." for reason in self.reasons if not self.unfit]
        if self.unfit:
            what.append(f"It shows nothing of new faces: {self.unfit}.")
        if self.others:
            what.append(
                f"{self.others} other cascades of this bundle were certified on the same faces: each certificate holds "
                "by itself, not for the one that is best of them."
            )
        return (
            *what,
            f"On {self.shown_on}: accuracy {with_interval(found.gain_points, 2, sign=True)} points against the full "
            f"vote of the reference ({self.reference}), {found.disagreement_pct.value:.2f} % other labels.",
            f"{self.engine}: {timing.ms_a_face:.3g} ms a face in calls of {timing.batch}, "
            f"{with_interval(timing.times_full, 1)} times as fast as the whole fold in the same engine "
            f"({timing.full_ms_a_face:.3g} ms).",
        )


def is_cascade(engine: str) -> bool:
    """Whether this is the name of an engine that runs a cascade."""
    return engine.startswith(_PREFIX)


def cascades_in(bundle: Path) -> list[str]:
    """The names of a bundle's cascades."""
    return sorted(path.parent.name for path in (bundle / CASCADES).glob(f"[!.]*/{CASCADE_FILE}"))


def record_of(bundle: Bundle, name: str) -> CascadeRecord:
    """Read a cascade's record; what it consists of is not looked at.

    Args:
        bundle: the bundle.
        name: as `cascades_in` has it.

    Raises:
        BadBundle: if it is not there, was changed, is of another bundle, or of what runs no cascades.
    """
    folder = bundle.path / CASCADES / name
    again = f"emoexport cascade {bundle.path}"
    if not (folder / CASCADE_FILE).is_file():
        known = ", ".join(cascades_in(bundle.path)) or "none"
        raise BadBundle(f"{bundle.path} has no cascade {name}; it has {known}.", hint=again)
    record = CascadeRecord.parse_json(folder / CASCADE_FILE, inside=bundle.path, error=BadBundle)
    if not record.is_intact() or record.engine != name:
        raise BadBundle(f"{folder / CASCADE_FILE} was changed after it was written.", hint=again)
    if record.bundle_digest != bundle.manifest.digest:
        raise BadBundle(f"{folder} is a cascade of another bundle than {bundle.path} is now.", hint=again)
    backend = BACKENDS.get(record.backend)
    if backend is None or backend.built_from == "fold" or record.precision not in PRECISIONS:
        engine = f"{record.backend}-{record.precision}"
        raise BadBundle(f"{folder / CASCADE_FILE} is of {engine}, which runs no cascades.", hint=again)
    kind = ".engine" if backend.built_from else ".onnx"
    if others := [file for file in record.graphs if not file.endswith(kind)]:
        raise BadBundle(f"{folder / CASCADE_FILE} opens '{others[0]}'; needed are files ending in {kind}.", hint=again)
    if missing := [file for file in record.graphs if file not in record.files]:
        raise BadBundle(f"{folder / CASCADE_FILE} lists no hash for {missing[0]}.", hint=again)
    return record


def read_cascade(bundle: Bundle, name: str) -> CascadeRecord:
    """Read a cascade's record, and check its files.

    Raises:
        BadBundle: as `record_of`, or if a file is missing or was changed.
    """
    record, folder = record_of(bundle, name), bundle.path / CASCADES / name
    again = f"emoexport cascade {bundle.path}"
    check_files(folder, record.files, inside=bundle.path, hint=again)
    for graph in record.graphs:
        if graph.endswith(".onnx"):
            require_own_weights(folder / graph, listed=f"{graph}.data" in record.files)
    return record
