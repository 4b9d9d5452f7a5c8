"""Where the eyes lie in the faces of FER-2013, and what finding and aligning a face anew does to what is decided.

    python measure.py DATA BUNDLE

Each face of 48 pixels stands, four times as large, in a picture whose margins mirror it. Prints Markdown.
"""

import sys

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import emoexport
from emoexport.detection import DetectedFace, Detector, aligned_face
from emoexport.statistics import changed, paired_points
from emoexport.table_format import with_interval
from emoexport.train.audit import clean_rows
from emoexport.train.dataset import load_data

SIZE, LARGE, MARGIN = 48, 192, 64


def in_a_picture(face: NDArray[np.uint8]) -> Image.Image:
    """A face `(48, 48, 1)` in a picture of 320 pixels."""
    large = Image.fromarray(face[..., 0]).resize((LARGE, LARGE), Image.Resampling.BICUBIC)
    return Image.fromarray(np.pad(np.asarray(large), MARGIN, mode="reflect"))


def largest(detector: Detector, picture: Image.Image) -> DetectedFace | None:
    """The largest face that is found; None if there is none."""
    return max(detector.find(picture), key=lambda face: face.box[2] - face.box[0], default=None)


def print_eyes(detector: Detector, images: NDArray[np.uint8]) -> None:
    """Quartiles of where the eyes lie."""
    found = [largest(detector, in_a_picture(image)) for image in images]
    pairs = [face.eyes for face in found if face]
    left, right = ((np.array([pair[side] for pair in pairs]) - MARGIN) / LARGE for side in (0, 1))
    middle, apart = (left + right) / 2, np.hypot(*(right - left).T)
    print(f"A face is found in {len(pairs):,} of {len(images):,} drawn from the training split.\n")
    print("| in widths of the face | 25 % | median | 75 % |\n|---|---|---|---|")
    for name, values in (("eyes, across", middle[:, 0]), ("eyes, down", middle[:, 1]), ("eyes apart", apart)):
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in np.percentile(values, [25, 50, 75])) + " |")


def main(source: str, bundle: str) -> None:
    """Measure and print."""
    detector = Detector()
    data = load_data(source, size=SIZE, channels=1)
    train, test = data.split("train"), data.split("public_test")
    print_eyes(detector, train.images[np.random.default_rng(0).permutation(len(train))[:3000]])
    clean = clean_rows(data)["public_test"]
    faces, aligned, labels = [], [], []
    for image, label in zip(test.images[clean], test.labels[clean], strict=True):
        picture = in_a_picture(image)
        if face := largest(detector, picture):
            faces.append(image)
            aligned.append(aligned_face(picture, face, size=SIZE, channels=1))
            labels.append(label)
    with emoexport.load(bundle) as session:
        as_it_is, anew = (session.run(np.stack(which)).label == np.array(labels) for which in (faces, aligned))
        gain = paired_points(*changed(as_it_is, anew), len(labels))
        print(f"\n{session.why}\n")
        print(f"A face is found in {len(labels):,} of {clean.sum():,} clean rows of public_test. Of these as they are")
        print(f"{100 * as_it_is.mean():.2f} % are decided right, found and aligned anew {100 * anew.mean():.2f} %:")
        print(f"{with_interval(gain, 2, sign=True)} points.")


if __name__ == "__main__":
    main(*sys.argv[1:])
