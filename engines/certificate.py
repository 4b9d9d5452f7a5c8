"""The certificate of an engine: what `verify` has shown of it, where, and with what. It stands in its passport.

It needs nothing but the standard library to be read, so that whatever loads an engine can ask for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from emoexport.engines.passport import PASSPORT, Passport, is_of_its_types, passport_of
from emoexport.errors import BadBundle

__all__ = ["Certificate", "certificates_in", "read_certificate"]


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A verdict, and all that it holds for."""

    verdict: str
    """`certified`, `failed`, `not enough evidence` or `not judged`."""
    reasons: list[str]
    """A sentence each, without its point; of what is certified, what could not be told."""
    created: str
    """UTC, ISO 8601."""
    engine_sha256: str
    """Of the file that the engine was opened from, and of its weights where they are a file of their own."""
    machine: dict[str, str]
    """The runtime and its version, and the processor or the GPU."""
    batches: list[int]
    """Numbers of faces in a call."""
    data: str
    split: str
    data_sha256: str
    """Of the faces and their labels."""
    faces: int
    max_drop_points: float
    """The limits: points of accuracy that may be lost, and in the next labels that may differ."""
    max_disagreement_pct: float
    bound_points: float
    """What was found, one-sided at 95 %: accuracy is no more than this below the reference; and labels that differ."""
    disagreement_bound_pct: float
    multiplies_in: dict[str, float]
    """By type of number, what part of the time of the multiplications; empty where the runtime does not tell."""

    @property
    def shown_on(self) -> str:
        """How many faces of what, for a sentence; of a path the last part."""
        return f"{self.faces:,} faces of {PurePath(self.data).name} ({self.split})"

    def stale_because(self, engine_sha256: str, machine: Mapping[str, str]) -> str:
        """Why it says nothing of an engine on a machine; empty if it does."""
        if engine_sha256 != self.engine_sha256:
            return "it is of another file"
        for name, value in self.machine.items():
            if machine.get(name) != value:
                return f"it is for the {name} {value}; here is {machine.get(name, 'none')}"
        return ""

    def lacks(self, batches: Sequence[int]) -> list[int]:
        """Those numbers of faces in a call that were not tried."""
        return [batch for batch in batches if batch not in self.batches]


def certificates_in(bundle: Path) -> dict[str, Certificate]:
    """The certificates that can be read of a bundle's engines, by name of the engine."""
    names = sorted(path.name.removesuffix(PASSPORT) for path in (bundle / "engines").glob(f"*{PASSPORT}"))
    found = {name: read_certificate(bundle, name) for name in names}
    return {name: certificate for name, certificate in found.items() if certificate is not None}


def read_certificate(bundle: Path, engine: str) -> Certificate | None:
    """The certificate of an engine of a bundle, by the engine's name; None if it has none that can be read."""
    file = bundle / "engines" / engine
    if not passport_of(file).exists():
        return None
    try:
        certificate = Certificate(**Passport.read(file).certificate)
    except (BadBundle, TypeError):  # changed after it was written, of another version, or none
        return None
    return certificate if is_of_its_types(certificate) and min(certificate.batches, default=1) > 0 else None
