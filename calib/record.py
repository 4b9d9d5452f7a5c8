"""`calibration.json`: what the activations of a graph are on which faces, and how that was found."""

from collections.abc import Iterable
from typing import Literal

from emoexport.config import Record
from emoexport.errors import BadInput

__all__ = ["Calibration", "Range"]

Range = tuple[float, float]


class Calibration(Record):
    """`calibration.json`."""

    written_by = "emoexport build --int8"
    schema_version: Literal[2] = 2
    method: str
    """Of `thresholds.METHODS`."""
    data: str
    """Where the faces are from."""
    data_sha256: str
    """Of the training faces they were chosen from."""
    random: bool = False
    """Whether they are noise, which tells nothing of real ones."""
    faces: dict[str, int]
    """By emotion, how many."""
    face_hashes: tuple[str, ...]
    """Of the pixels of each face."""
    held_out_hashes: tuple[str, ...]
    """Of further training faces, on which it was counted what the ranges clip."""
    disjoint_from: dict[str, int]
    """By split that judges, how many different pictures it has; none of them is among the faces."""
    left_out: int
    """Training faces that were not eligible, since one of these splits shows the same picture."""
    graph_sha256: str
    """Of the FP32 graph whose tensors are named, with its weights."""
    extremes: dict[str, Range]
    """Lowest and highest value of every tensor of the members."""
    ranges: dict[str, Range]
    """Of the tensors that feed quantised layers, what the method keeps of the extremes."""
    clipped: dict[str, float]
    """Which share of their values on the held-out faces lies beyond."""

    def ranges_of(self, tensors: Iterable[str]) -> dict[str, Range]:
        """What the method keeps of tensors.

        Raises:
            BadInput: if one has no range: the calibration is of another graph.
        """
        return _found(self.ranges, tensors)

    def extremes_of(self, tensors: Iterable[str]) -> dict[str, Range]:
        """The extremes of tensors.

        Raises:
            BadInput: if one was not seen: the calibration is of another graph.
        """
        return _found(self.extremes, tensors)


def _found(known: dict[str, Range], tensors: Iterable[str]) -> dict[str, Range]:
    names = list(tensors)
    missing = [name for name in names if name not in known]
    if missing:
        raise BadInput(f"the calibration has no range for '{missing[0]}': it is of another graph.", hint="build again")
    return {name: known[name] for name in names}
