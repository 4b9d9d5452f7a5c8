"""What goes into a package of a bundle: one engine, the files that it needs, and what is known of it."""

import functools
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from emoexport import __version__
from emoexport.bundle import Bundle
from emoexport.clock import timestamp
from emoexport.config import Record
from emoexport.engine_choice import speeds_of
from emoexport.engines import BACKENDS, require_known
from emoexport.engines.certificate import Certificate, read_certificate
from emoexport.engines.passport import Passport, read_engine, rebuild_command
from emoexport.errors import BadBundle, EmoexportError, UsageError
from emoexport.files import sha256_of, write_text
from emoexport.manifest import FileEntry
from emoexport.opening import file_for, origin_of
from emoexport.precision import PRECISIONS, precisions_named

__all__ = [
    "RECORD",
    "PackageRecord",
    "Packed",
    "Target",
    "choose_engine",
    "render",
    "require_as_written",
    "write_record",
]

RECORD = "emoexport.json"
"""In every package: what it was made of. A directory with it, and nothing else, may be replaced by another package."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What packages are for."""

    title: str
    runs: Sequence[str]
    """Names of backends that may be chosen for it, the first where all else is equal; others must be asked for."""
    refused: Mapping[str, str]
    """Why not, of those that it does not run."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """An engine of a bundle, chosen for a package."""

    bundle: Bundle
    backend: str
    """Of `engines.BACKENDS`."""
    precision: str
    file: Path
    """The graph, or what was built of it."""

    @property
    def name(self) -> str:
        """Runtime and precision, as in `onnxruntime-int8`."""
        return f"{self.backend}-{self.precision}"

    @property
    def weights(self) -> Path | None:
        """The file beside the graph that has its weights; None if they are in it."""
        found = self.file.with_name(f"{self.file.name}.data")
        return found if found.is_file() else None

    @functools.cached_property
    def passport(self) -> Passport | None:
        """Of what was built; None of a graph."""
        return Passport.read(self.file) if BACKENDS[self.backend].built_from else None

    @property
    def most(self) -> int:
        """The largest number of faces in a call."""
        profiles = self.passport.profiles if self.passport else []
        return min([self.bundle.manifest.max_batch, max((most for _, _, most in profiles), default=sys.maxsize)])

    @functools.cached_property
    def certificate(self) -> Certificate | None:
        """What `verify` has shown of it; None if nothing that can be read."""
        return read_certificate(self.bundle.path, self.name)

    @property
    def stale(self) -> str:
        """Why the certificate is not of this file, on whatever machine; empty if it is, or there is none."""
        found = self.certificate
        return found.stale_because(origin_of(self.bundle, self)[1], found.machine) if found else ""

    @property
    def is_certified(self) -> bool:
        """Whether it was, on some machine."""
        return self.certificate is not None and self.certificate.verdict == "certified" and not self.stale

    @property
    def standing(self) -> str:
        """What is known of it, a sentence that names no file of this machine."""
        found = self.certificate
        if found is None:
            return f"No certificate: {self.name}."
        if self.stale:
            return f"The certificate of {self.name} is stale: {self.stale}."
        if not self.is_certified:
            reasons = f": {'; '.join(found.reasons)}" if found.reasons else ""
            return f"Not certified: {self.name} ({found.verdict}){reasons}."
        where = ", the ".join(f"{name.replace('_', ' ')} {value}" for name, value in found.machine.items())
        return (
            f"{self.name} is certified on {found.shown_on}, in calls of "
            f"{', '.join(map(str, found.batches))}, with the {where}."
        )

    @property
    def verify_command(self) -> str:
        """What gives it a certificate."""
        return f"emoexport verify {self.bundle.path} --engine {self.backend} --precision {self.precision}"


class PackageRecord(Record):
    """`emoexport.json`."""

    schema_version: int = 1
    created: str
    """UTC, ISO 8601."""
    emoexport: str
    """The version that made it."""
    package: str
    """What it is for."""
    bundle_digest: str
    engine: str
    certificate: str
    """What was known of the engine then, a sentence."""
    files: dict[str, FileEntry]
    """All others of the package."""


def choose_engine(bundle: Bundle, target: Target, *, engine: str | None = None, precision: str | None = None) -> Packed:
    """The engine that is asked for, or the best that the target runs; nothing is opened.

    Certified ones come first, of these the one that `bench` found to be the fastest here; else FP32, on the CPU.

    Args:
        bundle: the bundle.
        target: what the package is for.
        engine: a runtime; the best if none.
        precision: the best if none.

    Raises:
        UsageError: if there is no such engine or precision, or the target does not run it.
        BadBundle: if the bundle has none, or one that is not as it was built.
    """
    if precision:
        precisions_named([precision])
    if engine:
        require_known([engine])
        if engine in target.refused:
            raise UsageError(
                f"{target.title} does not run {BACKENDS[engine].title}: {target.refused[engine]}",
                hint=f"--engine {target.runs[0]}",
            )
    names = [engine] if engine else list(target.runs)
    found, problems = [], []
    for name, each in itertools.product(names, [precision] if precision else PRECISIONS):
        try:
            file = file_for(bundle, BACKENDS[name], each)
        except EmoexportError as err:
            problems.append(err)
            continue
        if file is not None:
            found.append(Packed(bundle=bundle, backend=name, precision=each, file=file))
    if not found and problems:
        raise problems[0]
    if not found:
        asked = f"{precision} " if precision else ""
        raise BadBundle(
            f"{bundle.path} has no {asked}engine or graph for {engine or target.title}, which takes "
            f"{', '.join(BACKENDS[names[0]].precisions)}.",
            hint=_how_to_get(bundle, names[0], precision),
        )
    speeds, order = speeds_of(bundle), list(PRECISIONS)

    def place(one: Packed) -> tuple[bool, float, int, int]:
        speed = speeds.get(one.name, 0.0) if one.is_certified else 0.0
        return not one.is_certified, -speed, order.index(one.precision), names.index(one.backend)

    best = min(found, key=place)
    if best.passport is not None:  # graphs were held against the manifest when the bundle was opened
        read_engine(best.file, best.passport, hint=rebuild_command(best.file, best.backend, best.precision))
    return best


def _how_to_get(bundle: Bundle, backend: str, precision: str | None) -> str:
    """The command that gives a bundle an engine, or what to ask for instead."""
    if precision is not None and precision not in BACKENDS[backend].precisions:
        return f"--precision {BACKENDS[backend].precisions[0]}, or another --engine"
    if BACKENDS[backend].built_from == "graph":
        flag = f" --{precision}" if precision else ""
        return f"emoexport build {bundle.path} --engine {backend}{flag}"
    return bundle.build_command(*[precision] if precision else [])


def render(template: str, **values: Any) -> str:
    """A text file of a package, of a template."""
    environment = Environment(
        loader=PackageLoader("emoexport"),
        autoescape=False,  # noqa: S701 (it makes no HTML)
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)


def require_as_written(out: Path, target: Target) -> None:
    """Before a package is replaced: nothing in it was made by somebody else.

    Raises:
        UsageError: if it is for something else, or a file in it was added or changed since it was written.
        BadInput: if what it was made of cannot be read.
    """
    if not (out / RECORD).is_file():
        return
    record = PackageRecord.parse_json(out / RECORD)
    hint = "--force replaces it; or name another output"
    if record.package != target.title:
        raise UsageError(f"{out} is a package for {record.package}, not for {target.title}.", hint=hint)
    for file in sorted(out.rglob("*")):
        name = file.relative_to(out).as_posix()
        if not file.is_file() or name == RECORD or "__pycache__" in file.parts:
            continue
        known = record.files.get(name)
        if known is None or file.stat().st_size != known.bytes or sha256_of(file) != known.sha256:
            what = "was changed after the package was written" if known else "is no part of the package"
            raise UsageError(f"{out / name} {what}, and would be lost.", hint=hint)


def write_record(folder: Path, packed: Packed, target: Target) -> None:
    """Write `emoexport.json`, the last file of a package: what the others are, and what they were made of."""
    files = {
        file.relative_to(folder).as_posix(): FileEntry(sha256=sha256_of(file), bytes=file.stat().st_size)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    record = PackageRecord(
        created=timestamp(),
        emoexport=__version__,
        package=target.title,
        bundle_digest=packed.bundle.manifest.digest,
        engine=packed.name,
        certificate=packed.standing,
        files=files,
    )
    write_text(folder / RECORD, record.to_json())
