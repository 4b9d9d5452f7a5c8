"""Near duplicates: one photograph met again after it was recompressed, resized, brightened, shifted or mirrored.

Two steps. A search over all pairs compares faces averaged down to 8 x 8 cells, at every shift by 0 or 2 pixels and
mirrored, as products of matrices. What is alike there is compared in its fine detail: what is left of a face when
its blurred self is taken away tells photographs apart where the layout of a face, much the same in all, does not.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

__all__ = ["THRESHOLD", "NearPairs", "near_duplicates"]

THRESHOLD = 0.6
"""Fine detail correlates at least this much in two pictures of one photograph.

Chosen by eye on FER-2013. Of random pairs at 0.60 to 0.70, 1 of 128 showed two photographs, above 0.70 none of 96;
at 0.55 to 0.60, 3 of 64; of all that are alike as mirror images, 4 of 96.

Of 600 of its faces that were changed, found are all after JPEG at quality 30, half the brightness, gamma 0.5, half
the resolution and back, a rotation by 2 degrees, a shift by 2 pixels along both axes, or mirrored; 99 % after JPEG at
quality 10; 96 % after a zoom by 4 %; 94 % after a shift by 3 pixels along both axes; 86 % after a brightness of 1.6,
where whites saturate; 74 % after a rotation by 4 degrees. Missed are other crops (7 % are found after a zoom by 8 %)
and shifts by 4 pixels. Not told apart are pictures that differ in a small part only, such as frames of a film.
"""

_FINE = 48  # pixels a side in which fine detail is compared; smaller faces are compared as they are
_CELLS = 8
_ALIKE = 0.91  # of the cells; on FER-2013 it lets through 98 in 100 near duplicates, and 1 in 10,000 other pairs
_SHIFTS = tuple(product((-2, 0, 2), repeat=2))  # one cell holds 6 pixels, so that a shift by 1 changes little
_REACH = 3  # pixels
_BLUR = 2.0  # pixels, standard deviation
_BATCH = 256  # pairs whose fine detail is compared at once


class NearPairs(NamedTuple):
    """P pairs of faces that show one photograph, each pair once, sorted by its rows."""

    first: NDArray[np.int64]
    """`(P,)`, row of the first face."""
    second: NDArray[np.int64]
    """`(P,)`, row of the second, which is the larger."""
    similarity: NDArray[np.float32]
    """`(P,)`, correlation of fine detail, `THRESHOLD` to 1."""
    mirrored: NDArray[np.bool_]
    """`(P,)`: the second is alike as its mirror image."""


def near_duplicates(
    faces: NDArray[np.uint8],
    *,
    threshold: float = THRESHOLD,
    chunk: int = 512,
    progress: Callable[[int], object] | None = None,
) -> NearPairs:
    """Find all pairs of faces that show one photograph.

    Every pair is compared, so the time grows with the square of N: about a minute on one core for 30,000 faces. It
    takes 10 kB of memory a face and 8 x `chunk` x N bytes. Equal faces are a pair too: leave copies out beforehand. A
    face of one grey value is like no other.

    Args:
        faces: uint8 `(N, H, W, C)`; of several channels their mean is compared.
        threshold: least correlation of fine detail.
        chunk: faces compared with all others at once; it changes the memory, not the answer.
        progress: called with the number of faces done after each chunk.

    Source: normalised cross-correlation, Lewis 1995, "Fast Normalized Cross-Correlation".
    """
    cells, fine = _describe(faces)
    found = [_confirmed(fine, np.zeros((0, 2), dtype=np.int64), threshold)]
    for start in range(0, len(faces), chunk):
        rows, others = np.nonzero(_likeness(cells, start, chunk) > _ALIKE)
        later = others > rows
        pairs = np.stack([rows[later], others[later]], axis=1) + start
        found += [_confirmed(fine, pairs[at : at + _BATCH], threshold) for at in range(0, len(pairs), _BATCH)]
        if progress is not None:
            progress(min(chunk, len(faces) - start))
    return NearPairs(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _describe(faces: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    """Cells of every face at every shift, straight then mirrored, `(2 x shifts, N, cells)`; fine detail `(N, S, S)`.

    Both have mean 0 and norm 1, so that a product is a correlation.
    """
    side = min(_FINE, *faces.shape[1:3])
    cells = np.empty((2 * len(_SHIFTS), len(faces), _CELLS**2), dtype=np.float32)
    fine = np.empty((len(faces), side, side), dtype=np.float16)
    for start in range(0, len(faces), 1024):  # by parts: as floats, large faces take four times the memory
        part = slice(start, start + 1024)
        grey = F.adaptive_avg_pool2d(torch.from_numpy(faces[part]).float().mean(dim=3)[:, None], side)
        padded = F.pad(grey, (2, 2, 2, 2), mode="replicate")
        views = [padded[..., 2 + dy : 2 + dy + side, 2 + dx : 2 + dx + side] for dy, dx in _SHIFTS]
        for index, view in enumerate([*views, *(view.flip(3) for view in views)]):
            cells[index, part] = _normalised(F.adaptive_avg_pool2d(view, _CELLS).numpy())
        pictures = grey.numpy()
        fine[part] = _normalised(pictures - gaussian_filter(pictures, (0, 0, _BLUR, _BLUR))).reshape(-1, side, side)
    return cells, fine


def _normalised(pictures: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each flat, with mean 0 and norm 1; what varies by less than rounding does is left near 0."""
    flat = pictures.reshape(len(pictures), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    normalised: NDArray[np.float32] = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1.0)
    return normalised


def _likeness(cells: NDArray[np.float32], start: int, chunk: int) -> NDArray[np.float32]:
    """The best correlation over shifts and mirroring, of `chunk` faces from `start` with all from there on."""
    unshifted = cells[_SHIFTS.index((0, 0)), start : start + chunk]
    best = unshifted @ cells[0, start:].T
    product_of_view = np.empty_like(best)
    for view in cells[1:]:
        np.maximum(best, np.matmul(unshifted, view[start:].T, out=product_of_view), out=best)
    return best


def _confirmed(fine: NDArray[np.float16], pairs: NDArray[np.int64], threshold: float) -> NearPairs:
    """Those of the pairs `(P, 2)` whose fine detail correlates, at the best of the shifts within reach."""
    first, second = (fine[pairs[:, column]].astype(np.float32) for column in (0, 1))
    straight, mirrored = _correlation(first, second), _correlation(first, second[:, :, ::-1])
    similarity = np.maximum(straight, mirrored)
    kept = similarity >= threshold
    return NearPairs(pairs[kept, 0], pairs[kept, 1], similarity[kept], (mirrored > straight)[kept])


def _correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest product of P pairs of pictures `(P, S, S)` over all shifts within reach."""
    size = [scipy.fft.next_fast_len(first.shape[1] + _REACH, real=True)] * 2  # room, so that nothing wraps around
    spectrum = scipy.fft.rfft2(first, s=size) * scipy.fft.rfft2(second, s=size).conj()
    near = np.arange(-_REACH, _REACH + 1)
    window = scipy.fft.irfft2(spectrum, s=size)[:, near[:, None], near]
    largest: NDArray[np.float32] = window.max(axis=(1, 2))
    return largest
