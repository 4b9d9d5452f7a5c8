"""Answers of engines and reference, kept to be judged again without running anything; no picture is among them."""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emoexport.errors import BadData, reason_of
from emoexport.files import new_file
from emoexport.outcome import Outcome
from emoexport.parity import ParityReport, VerifyFacts, conclude
from emoexport.verdict import Limits

__all__ = ["SavedAnswers"]

_REFERENCE = "reference"
"""What an archive calls it; engines have a dash in their names."""
_MOST_BYTES = 2**31
"""Of all arrays; a million faces and twenty engines have a thousand millions."""


@dataclass(frozen=True, kw_only=True)
class SavedAnswers:
    """What engines and the reference say about N faces, and all else that was found."""

    facts: VerifyFacts
    answers: Mapping[str, Outcome]
    """By engine."""
    reference: Outcome
    truth: NDArray[np.int64]
    """True labels, `(N,)`."""
    rows: Mapping[str, NDArray[np.bool_]]
    """Sets of rows, by name, each a mask `(N,)`."""

    def judged(self, limits: Limits) -> ParityReport:
        """Judge them by these limits."""
        return conclude(self.facts, self.answers, self.reference, self.truth, self.rows, limits)

    def write(self, path: Path) -> None:
        """Write a NumPy archive, whole or not at all."""
        arrays: dict[str, NDArray[np.generic]] = {
            "facts": np.frombuffer(self.facts.model_dump_json().encode(), dtype=np.uint8),
            "truth": self.truth,
            **{f"rows/{name}": mask for name, mask in self.rows.items()},
        }
        for name, outcome in {**self.answers, _REFERENCE: self.reference}.items():
            arrays |= {f"{name}/{field}": column for field, column in outcome._asdict().items()}
        arrays["sha256"] = np.array(_digest_of(arrays))
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    @classmethod
    def read(cls, path: Path) -> "SavedAnswers":
        """Read such an archive.

        Raises:
            BadData: if there is none, or it is not one that `write` wrote.
        """
        hint = "emoexport verify writes reports/answers.npz"
        try:
            _require_few_bytes(path)
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            if "sha256" in arrays and str(arrays["sha256"]) != _digest_of(arrays):
                raise BadData(f"{path} was changed after it was written.", hint=hint)
            facts = VerifyFacts.parse(json.loads(arrays["facts"].tobytes()), source=str(path), error=BadData)
            found = cls(
                facts=facts,
                answers={
                    engine.engine: _outcome(arrays, engine.engine) for engine in facts.engines if not engine.failure
                },
                reference=_outcome(arrays, _REFERENCE),
                truth=arrays["truth"],
                rows={name.partition("/")[2]: mask for name, mask in arrays.items() if name.startswith("rows/")},
            )
            found._require_whole(path)
        except BadData:
            raise
        except Exception as err:  # zipfile, zlib and numpy raise no common class for what is damaged
            raise BadData(f"{path} holds no answers that verify has saved: {reason_of(err)}.", hint=hint) from err
        return found

    def _require_whole(self, path: Path) -> None:
        faces, emotions = self.facts.faces, len(self.facts.labels)
        outcomes = [*self.answers.values(), self.reference]
        is_whole = (
            all(outcome.probabilities.shape == (faces, emotions) for outcome in outcomes)
            and all(outcome.label.shape == outcome.confidence.shape == (faces,) for outcome in outcomes)
            and all(mask.shape == (faces,) and mask.dtype == bool and mask.any() for mask in self.rows.values())
            and all(
                ((label >= 0) & (label < emotions)).all() for label in (self.truth, *(one.label for one in outcomes))
            )
            and self.truth.shape == (faces,)
            and bool(self.rows)
        )
        if not is_whole:
            raise BadData(f"{path} holds other arrays than of {faces:,} faces and {emotions} emotions.")


def _require_few_bytes(path: Path) -> None:
    """Before any is unpacked: a small file can hold as many zeros as fill the memory."""
    with zipfile.ZipFile(path) as archive:
        total = sum(entry.file_size for entry in archive.infolist())
    if total > _MOST_BYTES:
        raise BadData(f"{path} would have {total:,} bytes unpacked; the limit is {_MOST_BYTES:,}.")


def _digest_of(arrays: Mapping[str, NDArray[np.generic]]) -> str:
    """SHA-256 of all other arrays, with their names and types."""
    digest = hashlib.sha256()
    for name in sorted(set(arrays) - {"sha256"}):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _outcome(arrays: Mapping[str, NDArray[np.generic]], name: str) -> Outcome:
    return Outcome(*(arrays[f"{name}/{field}"] for field in Outcome._fields))  # type: ignore[arg-type]
