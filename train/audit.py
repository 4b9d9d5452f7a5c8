"""Which rows of a data set can be trusted: no copies, leaks, contradictions or blanks."""

import hashlib
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import entropy

from emoexport.config import Record
from emoexport.errors import BadData
from emoexport.labels import EMOTIONS
from emoexport.statistics import Share
from emoexport.train.dataset import DataSet, Faces
from emoexport.train.near_duplicates import NearPairs

__all__ = [
    "CrossAudit",
    "DataAudit",
    "DistinctFaces",
    "NearAudit",
    "RowFindings",
    "SplitAudit",
    "audit_data",
    "clean_rows",
    "distinct_faces",
    "face_hashes",
    "require_enough",
]

PAIRS_LISTED = 5000
"""Near duplicates named one by one in a report, the most alike; all are counted."""


class SplitAudit(Record):
    """What one split holds. But for `images` and `emotions` these are numbers of rows."""

    faces: int
    images: int
    """Different pictures."""
    copied: int
    """Rows with the pixels of an earlier row of the split."""
    leaked: int
    """Rows whose pixels stand in `train` too; 0 for `train` itself."""
    contradicted: int
    """Rows whose pixels stand somewhere in the data with another label."""
    blank: int
    """Rows whose pixels are all alike."""
    marked: int
    """Rows that the data set's own columns mark as copies, leaks, contradictions or blanks."""
    clean: int
    """Rows that training and `verify` call clean; near duplicates are among them."""
    near: int | None
    """Rows with a near duplicate in the same split; None where none were looked for."""
    near_train: int | None
    """Rows that are no leak but have a near duplicate in `train`; 0 for `train` itself."""
    emotions: dict[str, int]
    imbalance: float
    """The largest number of faces of an emotion over the smallest."""
    divergence_bits: float
    """Kullback-Leibler divergence of the emotions from equal shares, 0 to 2.8 bits."""
    votes: Share | None
    """Rows with the label that more than half of the votes are for, of those with such a label; None without votes."""
    rows: dict[str, tuple[int, ...]]
    """Rows behind the numbers above, counted from 0 among the faces read; those behind `near` stand in the pairs."""


class CrossAudit(Record):
    """What two splits share."""

    first: str
    second: str
    images: int
    """Different pictures that stand in both."""
    rows_first: int
    """Rows of the first split with such a picture."""
    rows_second: int
    near_pairs: int | None
    """Near duplicates with one picture in each; None where none were looked for."""


class NearAudit(Record):
    """Pictures of one photograph that are no copies of each other, over all splits."""

    threshold: float
    pairs: int
    mirrored_pairs: int
    contradicting_pairs: int
    """Pairs with different labels."""
    groups: int
    """Pictures that hang together by pairs."""
    contradicting_groups: int
    largest_group: int
    """Pictures in the largest group."""
    images: int
    """Pictures in groups."""
    listed: tuple[str, ...]
    """The most alike, as `split:row split:row similarity`, rows counted from 0 among the faces read."""


class DataAudit(Record):
    """What is wrong with a data set, in numbers."""

    splits: dict[str, SplitAudit]
    across: tuple[CrossAudit, ...]
    images: int
    """Different pictures in all splits."""
    contradicting_images: int
    """Those that stand somewhere with more than one label."""
    outside: int
    """Rows left out because their label is none of the seven emotions."""
    skipped: int
    """Pictures left out because they cannot be read."""
    near: NearAudit | None
    """None where near duplicates were not looked for."""

    def failures(self) -> list[str]:
        """What no data set to train and report on should have, in words."""
        found = [(split.leaked, f"rows of {name} that stand in train") for name, split in self.splits.items()]
        found.append((self.contradicting_images, "pictures with contradicting labels"))
        found.append((sum(split.blank for split in self.splits.values()), "blank pictures"))
        return [f"{what}: {count:,}" for count, what in found if count]


@dataclass(frozen=True, kw_only=True)
class RowFindings:
    """Masks `(N,)` over the rows of one split; what they mean stands in `SplitAudit`."""

    copied: NDArray[np.bool_]
    leaked: NDArray[np.bool_]
    contradicted: NDArray[np.bool_]
    blank: NDArray[np.bool_]
    clean: NDArray[np.bool_]
    near: NDArray[np.bool_]
    near_train: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class DistinctFaces:
    """The D different pictures of a data set, each once."""

    images: NDArray[np.uint8]
    """`(D, H, W, C)`."""
    of_row: dict[str, NDArray[np.int64]]
    """For each split `(N,)`: which picture a row has, an index into `images`."""


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


def distinct_faces(data: DataSet) -> DistinctFaces:
    """Take every picture of a data set once, copies of it left out."""
    everything = np.concatenate([faces.images for faces in data.splits.values()])
    _, first, image = np.unique(face_hashes(everything), return_index=True, return_inverse=True)
    order = np.argsort(first)  # as read, so that a picture's index does not hang on its hash
    ends = np.cumsum([len(faces) for faces in data.splits.values()])
    rows = np.split(np.argsort(order)[image], ends[:-1])
    return DistinctFaces(images=everything[first[order]], of_row=dict(zip(data.splits, rows, strict=True)))


def require_enough(data: DataSet) -> None:
    """Refuse data with too few faces to train and to validate on.

    Raises:
        BadData: if an emotion has a single face in `train` and there is no split `validation`.
    """
    if "train" not in data.splits or "validation" in data.splits:
        return
    counts = np.bincount(data.splits["train"].labels, minlength=len(EMOTIONS))
    if counts.min() < 2:
        raise BadData(
            f"{data.source}: the split 'train' has {counts.min()} face of '{EMOTIONS[counts.argmin()]}'; every emotion "
            "needs at least 2, one to train and one to validate on.",
            hint="add faces of it, or a split 'validation'",
        )


def audit_data(
    data: DataSet, distinct: DistinctFaces, pairs: NearPairs | None, *, threshold: float
) -> tuple[DataAudit, dict[str, RowFindings]]:
    """Count copies, leaks, contradictions, blanks and near duplicates.

    Args:
        data: the data set.
        distinct: its pictures, each once.
        pairs: near duplicates among those; None if they were not looked for.
        threshold: what they were looked for with.

    Returns:
        The numbers, and for each split which rows they count.
    """
    names = list(data.splits)
    stands = np.zeros((len(distinct.images), len(names)), dtype=bool)  # (D, splits)
    labelled = np.zeros((len(distinct.images), len(EMOTIONS)), dtype=bool)  # (D, L)
    for column, (name, faces) in enumerate(data.splits.items()):
        stands[distinct.of_row[name], column] = True
        labelled[distinct.of_row[name], faces.labels] = True
    near_splits = _neighbours(pairs, stands)
    clean = clean_rows(data)
    findings = {
        name: _find(faces, distinct.of_row[name], names, name, stands, labelled, near_splits, clean[name])
        for name, faces in data.splits.items()
    }
    audit = DataAudit(
        splits={name: _split_audit(faces, findings[name], pairs is not None) for name, faces in data.splits.items()},
        across=tuple(
            _cross_audit(names, first, second, stands, distinct, pairs)
            for first, second in combinations(range(len(names)), 2)
        ),
        images=len(distinct.images),
        contradicting_images=int((labelled.sum(axis=1) > 1).sum()),
        outside=data.outside,
        skipped=len(data.skipped),
        near=None if pairs is None else _near_audit(pairs, labelled, distinct, threshold),
    )
    return audit, findings


def _neighbours(pairs: NearPairs | None, stands: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """For every picture, which splits hold a near duplicate of it: `(D, splits)`."""
    if pairs is None:
        return np.zeros_like(stands)
    found: NDArray[np.bool_] = (_adjacency(pairs, len(stands)) @ stands.astype(np.int64)) > 0
    return found


def _adjacency(pairs: NearPairs, count: int) -> Any:
    """The pairs as a symmetric sparse matrix `(count, count)` of ones."""
    rows, columns = np.r_[pairs.first, pairs.second], np.r_[pairs.second, pairs.first]
    return csr_array((np.ones(len(rows), dtype=np.int64), (rows, columns)), shape=(count, count))


def _find(
    faces: Faces,
    image: NDArray[np.int64],
    names: list[str],
    name: str,
    stands: NDArray[np.bool_],
    labelled: NDArray[np.bool_],
    near_splits: NDArray[np.bool_],
    clean: NDArray[np.bool_],
) -> RowFindings:
    copied = np.ones(len(faces), dtype=bool)
    copied[np.unique(image, return_index=True)[1]] = False
    nothing = np.zeros(len(faces), dtype=bool)
    tested = "train" in names and name != "train"
    leaked = stands[image, names.index("train")] if tested else nothing
    return RowFindings(
        copied=copied,
        leaked=leaked,
        contradicted=labelled[image].sum(axis=1) > 1,
        blank=np.ptp(faces.images.reshape(len(faces), -1), axis=1) == 0,
        clean=clean,
        near=near_splits[image, names.index(name)],
        near_train=near_splits[image, names.index("train")] & ~leaked if tested else nothing,
    )


def _split_audit(faces: Faces, found: RowFindings, searched: bool) -> SplitAudit:
    counts = np.bincount(faces.labels, minlength=len(EMOTIONS))
    uniform = np.full(len(EMOTIONS), 1 / len(EMOTIONS))
    masks = {field.name: getattr(found, field.name) for field in fields(found) if field.name not in ("clean", "near")}
    return SplitAudit(
        faces=len(faces),
        images=int((~found.copied).sum()),
        copied=int(found.copied.sum()),
        leaked=int(found.leaked.sum()),
        contradicted=int(found.contradicted.sum()),
        blank=int(found.blank.sum()),
        marked=int(faces.flagged.sum()),
        clean=int(found.clean.sum()),
        near=int(found.near.sum()) if searched else None,
        near_train=int(found.near_train.sum()) if searched else None,
        emotions=dict(zip(EMOTIONS, counts.tolist(), strict=True)),
        imbalance=round(float(counts.max() / counts.min()), 2) if counts.min() else float("inf"),
        divergence_bits=round(float(entropy(counts, uniform, base=2)), 4),
        votes=_vote_agreement(faces),
        rows={name: tuple(np.flatnonzero(mask).tolist()) for name, mask in masks.items() if mask.any()},
    )


def _vote_agreement(faces: Faces) -> Share | None:
    if faces.votes is None:
        return None
    decided = np.nan_to_num(faces.votes).max(axis=1) > 0.5
    hits = faces.votes[decided].argmax(axis=1) == faces.labels[decided]
    return Share.of(hits) if len(hits) else None


def _cross_audit(
    names: list[str],
    first: int,
    second: int,
    stands: NDArray[np.bool_],
    distinct: DistinctFaces,
    pairs: NearPairs | None,
) -> CrossAudit:
    shared = stands[:, first] & stands[:, second]
    near = None
    if pairs is not None:
        one, other = stands[pairs.first], stands[pairs.second]
        near = int((one[:, first] & other[:, second] | one[:, second] & other[:, first]).sum())
    return CrossAudit(
        first=names[first],
        second=names[second],
        images=int(shared.sum()),
        rows_first=int(shared[distinct.of_row[names[first]]].sum()),
        rows_second=int(shared[distinct.of_row[names[second]]].sum()),
        near_pairs=near,
    )


def _near_audit(pairs: NearPairs, labelled: NDArray[np.bool_], distinct: DistinctFaces, threshold: float) -> NearAudit:
    _, group = connected_components(_adjacency(pairs, len(labelled)), directed=False)
    sizes = np.bincount(group)
    of_group = np.zeros((len(sizes), labelled.shape[1]), dtype=bool)
    np.logical_or.at(of_group, group, labelled)
    real = sizes > 1
    names = {}
    for name, images in reversed(distinct.of_row.items()):  # a picture goes by the first row that has it
        names.update({image: f"{name}:{row}" for row, image in reversed(list(enumerate(images.tolist())))})
    most_alike = np.argsort(-pairs.similarity, kind="stable")[:PAIRS_LISTED]
    return NearAudit(
        threshold=threshold,
        pairs=len(pairs.first),
        mirrored_pairs=int(pairs.mirrored.sum()),
        contradicting_pairs=int(((labelled[pairs.first] | labelled[pairs.second]).sum(axis=1) > 1).sum()),
        groups=int(real.sum()),
        contradicting_groups=int((of_group[real].sum(axis=1) > 1).sum()),
        largest_group=int(sizes[real].max()) if real.any() else 0,
        images=int(sizes[real].sum()),
        listed=tuple(
            f"{names[int(pairs.first[at])]} {names[int(pairs.second[at])]} {pairs.similarity[at]:.2f}"
            for at in most_alike
        ),
    )
