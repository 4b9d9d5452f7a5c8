"""The passport of an engine: what it was made from, for which machine, what was found in it, and what was shown of it.

It stands beside the engine, which stays as its runtime wrote it, and needs nothing but the standard library to be read.
"""

import dataclasses
import hashlib
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from emoexport.errors import BadBundle
from emoexport.files import lies_inside, read_text, sha256_of_graph, write_text
from emoexport.precision import PRECISIONS

__all__ = ["PASSPORT", "Passport", "is_of_its_types", "passport_of", "passports_in", "read_engine", "rebuild_command"]


PASSPORT = ".passport.json"
"""How the names of passports end."""


def passport_of(engine: Path) -> Path:
    """Where the passport of an engine stands."""
    return engine.with_name(f"{engine.stem}{PASSPORT}")


def rebuild_command(engine: Path, backend: str, precision: str) -> str:
    """The command that builds an engine of a bundle again, as its passport says it was built, if that can be read."""
    flags = [f"--{precision}"]
    try:
        found = Passport.read(engine)
    except BadBundle:
        found = None
    if found is not None:
        flags += [word for profile in found.profiles for word in ("--opt-batch", str(profile[1]))]
        flags += ["--min-batch", str(found.profiles[0][0]), "--max-batch", str(found.profiles[0][2])]
        flags += [word for name, value in found.settings.items() for word in _option(name, value)]
    return shlex.join(["emoexport", "build", str(engine.parent.parent), "--engine", backend, *flags])


_NAMES = {"workspace_gib": "workspace", "compute_capabilities": "compute-capability"}
"""Options of `build` that have another name than the setting of the builder."""


def _option(name: str, value: Any) -> list[str]:
    """A setting as `build` takes it."""
    option = f"--{_NAMES.get(name, name.replace('_', '-'))}"
    if isinstance(value, bool):
        return [option] if value else []
    return [word for each in (value if isinstance(value, list | tuple) else [value]) for word in (option, str(each))]


@dataclass(frozen=True, kw_only=True)
class Passport:
    """What is known of an engine file."""

    file: str
    """Its name, in the same directory."""
    sha256: str
    bytes: int
    backend: str
    """Of `engines.BACKENDS`."""
    precision: str
    graph: str
    """The graph that it was built from, relative to the passport."""
    graph_sha256: str
    """As `files.sha256_of_graph` gives it."""
    created: str
    """UTC, ISO 8601."""
    seconds: float
    """How long the build took, or opening the graph where the runtime builds nothing ahead of time."""
    versions: dict[str, str]
    """Of what built it."""
    device: dict[str, str]
    """The GPU that it was built on or for: `name`, `compute_capability`, `cuda`; fewer where any will do."""
    profiles: list[list[int]]
    """Faces in a call, least, best and most, of each optimisation profile."""
    settings: dict[str, Any]
    """Of the builder, where they are not the usual ones."""
    network: dict[str, dict[str, int]]
    """By type of layer as the parser made it, how many have outputs of which type of number."""
    asked_share: float | None = None
    """Of the members' convolutions and matrix products in the network, the share of the precision's type."""
    engine: dict[str, int] = field(default_factory=dict)
    """By type of number, how many layers of the engine compute in it; empty where no device could tell."""
    time_share: dict[str, float] = field(default_factory=dict)
    """The same by share of the time of one call; empty where nothing was timed."""
    certificate: dict[str, Any] = field(default_factory=dict)
    """What `verify` has shown, as `certificate.Certificate` has it; empty before."""
    digest: str = ""
    """SHA-256 of the passport without this field."""

    def write(self, engine: Path) -> None:
        """Seal it and write it beside the engine, whole or not at all."""
        fields = dataclasses.asdict(self)
        write_text(passport_of(engine), json.dumps({**fields, "digest": _digest_of(fields)}, indent=2) + "\n")

    @classmethod
    def read(cls, engine: Path, *, hint: str = "") -> "Passport":
        """Read the passport that stands beside an engine.

        Args:
            engine: the engine, which is not read.
            hint: the command that builds it again.

        Raises:
            BadBundle: if there is none, or it is not as it was written.
        """
        path = passport_of(engine)
        if not path.exists():
            raise BadBundle(f"{engine} has no passport: {path.name} is not beside it.", hint=hint)
        try:
            found = json.loads(read_text(path, inside=engine.parent.parent))
        except (ValueError, RecursionError) as err:
            raise BadBundle(f"{path} cannot be read as JSON: {str(err).rstrip(chr(46))}.", hint=hint) from err
        if not isinstance(found, dict) or found.get("digest") != _digest_of(found):
            raise BadBundle(f"{path} was changed after it was written.", hint=hint)
        try:
            passport = cls(**found)
        except TypeError:  # as intact as it was, and of another version
            passport = None
        if passport is None or not is_of_its_types(passport) or not passport._makes_sense(engine):
            raise BadBundle(f"{path} has other fields than this version of emoexport writes.", hint=hint)
        return passport

    def _makes_sense(self, engine: Path) -> bool:
        """Whether it can be of this engine: its numbers are of a known type, its faces in a call are in order."""
        is_built = engine.with_name(f"{engine.stem}.engine").exists()
        return (
            self.precision in PRECISIONS
            and bool(self.profiles)
            and all(len(profile) == 3 and 1 <= profile[0] <= profile[1] <= profile[2] for profile in self.profiles)
            and (not is_built or self.versions.get(self.backend, "")[:1].isdecimal())
        )

    def is_of(self, graph: Path) -> bool:
        """Whether the engine was built from this graph as it is now."""
        return self.graph_sha256 == sha256_of_graph(graph)


def is_of_its_types(record: Any) -> bool:
    """Whether the fields of a dataclass that JSON has filled are of the types that they are said to be."""
    types = get_type_hints(type(record))
    return all(_is_of(getattr(record, one.name), types[one.name]) for one in dataclasses.fields(record))


def _is_of(value: object, kind: Any) -> bool:
    inner = get_args(kind)
    if isinstance(kind, UnionType):
        return any(_is_of(value, one) for one in inner)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(one, inner[0]) for one in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_is_of(one, inner[0]) and _is_of(value[one], inner[1]) for one in value)
    return kind is Any or type(value) is kind or (kind is float and type(value) is int)


def read_engine(engine: Path, passport: Passport, *, hint: str = "") -> bytes:
    """Read an engine, and hold what was read against its passport.

    Args:
        engine: the file.
        passport: that stands beside it.
        hint: the command that builds it again.

    Raises:
        BadBundle: if it is missing, cut short or another file.
    """
    if not engine.is_file() or not lies_inside(engine, engine.parent.parent):
        raise BadBundle(f"{engine} is missing.", hint=hint)
    size = engine.stat().st_size
    if size != passport.bytes:
        raise BadBundle(f"{engine} has {size:,} bytes; needed are {passport.bytes:,}.", hint=hint)
    plan = engine.read_bytes()
    if hashlib.sha256(plan).hexdigest() != passport.sha256:
        raise BadBundle(f"{engine} is not the engine that its passport is of: its SHA-256 is another.", hint=hint)
    return plan


def passports_in(bundle: Path) -> dict[str, Passport]:
    """Passports of the engines that were built of a bundle's graphs, by name of the engine.

    Raises:
        BadBundle: if one is not as it was written.
    """
    again = f"remove it, or emoexport build {bundle} --engine with the engine's name"
    return {engine.stem: Passport.read(engine, hint=again) for engine in sorted((bundle / "engines").glob("*.engine"))}


def _digest_of(fields: dict[str, Any]) -> str:
    rest = {name: value for name, value in fields.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
