"""Which rows of a data set can be trusted: no copies, leaks, contradictions or blanks."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from emoexport.train.dataset import DataSet

__all__ = ["clean_rows", "face_hashes"]


def face_hashes(images: NDArray[np.uint8]) -> list[str]:
    """A name for the pixels of each face: faces uint8 `(N, H, W, C)` to N texts of 32 hexadecimal digits."""
    return [hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in images]


def clean_rows(data: DataSet) -> dict[str, NDArray[np.bool_]]:
    """Find the rows of each split to train on and to report on.

    A row is clean if its pixels are not all alike, if no copy of them anywhere in the data has another
    label, if it is the first of its copies in its split, if (outside `train`) none stands in `train`, and if
    the data set's own columns raise nothing against it.

    Returns:
        For each split a mask `(N,)`, True for clean.
    """
    hashes = {name: face_hashes(faces.images) for name, faces in data.splits.items()}
    labels_of: dict[str, set[int]] = {}
    for name, faces in data.splits.items():
        for key, label in zip(hashes[name], faces.labels, strict=True):
            labels_of.setdefault(key, set()).add(int(label))
    trained = set(hashes.get("train", ()))
    masks = {}
    for name, faces in data.splits.items():
        seen: set[str] = set() if name == "train" else set(trained)
        mask = ~faces.flagged & (np.ptp(faces.images.reshape(len(faces), -1), axis=1) > 0)
        for row, key in enumerate(hashes[name]):
            mask[row] &= key not in seen and len(labels_of[key]) == 1
            seen.add(key)
        masks[name] = mask
    return masks
