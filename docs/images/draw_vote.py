"""Draw vote.png: a drawn face, its 16 views, what each member says of each view, and the vote.

make demo && .venv/bin/python docs/images/draw_vote.py build/demo
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from emoexport.bundle import Bundle
from emoexport.run_faces import data_of_run
from emoexport.sessions import open_reference


def main(path: Path, row: int) -> None:
    """Draw the vote about one face of the test split."""
    bundle = Bundle.open(path)
    reference, run, record = open_reference(bundle)
    face = data_of_run(run, record).split("test").images[row : row + 1]
    scores = reference.scores(face)[0]  # (K, V, L)
    outcome = reference.run(face)
    labels, label = bundle.manifest.labels, int(outcome.label[0])
    pictures = torch.from_numpy(face).permute(0, 3, 1, 2).float() / 255

    figure = plt.figure(figsize=(11, 3.4), layout="constrained")
    grid = figure.add_gridspec(1, 4, width_ratios=[1, 1.5, 1.9, 1.4])
    show_face(figure.add_subplot(grid[0]), pictures[0, 0], "a face\nuint8")
    views = grid[1].subgridspec(4, 4, wspace=0.05, hspace=0.05)
    for index, view in enumerate(reference.views):
        axis = figure.add_subplot(views[index // 4, index % 4])
        show_face(axis, view(pictures)[0, 0], "16 views" if index == 1 else "")
    votes = figure.add_subplot(grid[2])
    image = votes.imshow(scores[:, :, label], vmin=0, vmax=1, cmap="viridis", aspect="auto")
    votes.set(
        title=f"{scores.shape[0]} members x {scores.shape[1]} views: P({labels[label]})", xlabel="view", ylabel="member"
    )
    votes.set_xticks(range(0, scores.shape[1], 5), [str(view + 1) for view in range(0, scores.shape[1], 5)])
    votes.set_yticks(range(len(scores)), [str(member + 1) for member in range(len(scores))])
    figure.colorbar(image, ax=votes)
    bars = figure.add_subplot(grid[3])
    colours = ["tab:blue" if index == label else "lightsteelblue" for index in range(len(labels))]
    bars.barh(labels, outcome.probabilities[0], color=colours)
    bars.invert_yaxis()
    bars.set(title=f"the vote: {labels[label]}, {outcome.confidence[0]:.2f}", xlim=(0, 1))
    bars.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_name("vote.png"), dpi=110)


def show_face(axis: plt.Axes, picture: torch.Tensor, title: str) -> None:
    """Show a grey picture `(H, W)` in [0, 1]."""
    axis.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=1)
    axis.set_title(title)
    axis.axis("off")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
