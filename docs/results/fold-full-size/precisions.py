"""Calibrate the FP32 graph of a full-size bundle on a few drawn faces and convert it; for `/usr/bin/time -v`.

python docs/results/fold-full-size/precisions.py BUNDLE OUT [FACES] [METHOD] [PRECISION...]

Members that were never trained have no training faces, so these are drawn: two to calibrate on and one held out unless
told otherwise. Converted is to the precisions that are named, to none where a method is named alone, and to all but FP8
where nothing is. What a face takes does not depend on what it shows, and memory not on how many there are.
"""

import pkgutil
import sys
import time
from pathlib import Path

import numpy as np

from emoexport.bundle import Bundle
from emoexport.calibration import CALIBRATION_FILE, CalibrationFaces, calibrate
from emoexport.cli_options import console_of
from emoexport.files import write_text
from emoexport.precision import PRECISIONS
from emoexport.quantize import feeds_of
from emoexport.train.synthetic import synthetic_faces


def main(bundle: Path, out: Path, count: int = 2, method: str = "min-max", *, precisions: list[str]) -> None:
    """Print the seconds of each step."""
    opened = Bundle.open(bundle)
    graph, (size, _, channels) = opened.graph("fp32"), opened.manifest.face_shape
    images = np.repeat(synthetic_faces(count + 1, size=size, seed=1)[0], channels, axis=3)
    chosen = CalibrationFaces(
        images=images[:count],
        held_out=images[count : count + 1],
        source="synthetic",
        sha256="",
        counts={},
        disjoint_from={},
        left_out=0,
    )
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    earlier = out / CALIBRATION_FILE
    found = calibrate(graph, feeds_of(graph), chosen, method=method, earlier=earlier, console=console_of())
    write_text(out / CALIBRATION_FILE, found.to_json())
    print(f"calibrated by {method} on {count} faces, 1 held out: {time.monotonic() - start:.0f} s", flush=True)
    for row in PRECISIONS.values():
        if row.converter and row.name in precisions:
            start = time.monotonic()
            pkgutil.resolve_name(row.converter)(graph, out / f"model.{row.name}.onnx", found)
            print(f"{row.title}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    wanted = sys.argv[5:] if len(sys.argv) > 4 else [name for name in PRECISIONS if name != "fp8"]
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:4]), *sys.argv[4:5], precisions=wanted)
