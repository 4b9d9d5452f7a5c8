"""The fold: views, members, vote and decision as one module, from raw faces to a label."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from emoexport.decision import Decision
from emoexport.errors import UsageError
from emoexport.member_graph import MemberGraph
from emoexport.stacked import Stacked, one_architecture
from emoexport.views import View

__all__ = ["LAYOUTS", "Autocast", "Branches", "Fold"]


class Branches(nn.ModuleList):
    """Members side by side; they may differ in architecture."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__(members)
        self.answering = list(range(len(members)))
        """Whose logits each member gives: its own."""
        self.taking: NDArray[np.bool_] | None = None
        """Which of the views that are shown each member sees, `(K, shown)`; None for all."""
        for number, member in enumerate(members):
            if isinstance(member, MemberGraph):
                member.place(f"members.{number}")

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures `(n, C, H, W)` in [0, 1] to logits `(K, n, L)`.

        Where members see some of the views only, pictures are `(shown*N, C, H, W)` and the logits `(1, passes*N, L)`,
        member after member.
        """
        if self.taking is not None:
            by_view = pictures.view(self.taking.shape[1], -1, *pictures.shape[1:]).unbind()
            seen = [torch.cat([by_view[view] for view in np.flatnonzero(views)]) for views in self.taking]
            return torch.cat([member(some) for member, some in zip(self, seen, strict=True)])[None]
        logits = {number: self[number](pictures) for number in dict.fromkeys(self.answering)}
        return torch.stack([logits[number] for number in self.answering])

    @contextlib.contextmanager
    def one_of_each(self) -> Iterator[list[int]]:
        """Within, the first traced member of each architecture answers for all of them.

        So an exporter writes the graph of each architecture once. What it gets are these numbers, by member. Members
        that see views of their own answer for themselves.
        """
        if self.taking is not None:
            yield self.answering
            return
        honest = self.answering
        self.answering = [
            next(first for first in range(number + 1) if self._are_alike(first, number)) for number in honest
        ]
        try:
            yield self.answering
        finally:
            self.answering = honest

    def _are_alike(self, one: int, other: int) -> bool:
        first, second = self[one], self[other]
        if isinstance(first, MemberGraph) and isinstance(second, MemberGraph):
            return one_architecture([first, second])
        return one == other


class Autocast(nn.Module):
    """Members whose layers compute in a type of fewer bits, FP32 around them.

    Autocast gives convolutions and matrix products operands of that type, and what lies between them values of it.

    Args:
        members: all as one module.
        device: `cpu` or `cuda`.
        dtype: `torch.float16` or `torch.bfloat16`.
    """

    def __init__(self, members: Branches, *, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.members, self.device, self.dtype = members, device, dtype

    def __len__(self) -> int:
        return len(self.members)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures `(n, C, H, W)` in [0, 1] to logits `(K, n, L)`, both float32."""
        with torch.autocast(self.device, dtype=self.dtype):
            logits: Tensor = self.members(pictures)
        return logits.float()


LAYOUTS: Mapping[str, Callable[[Sequence[MemberGraph]], Branches | Stacked]] = {
    "branches": Branches,
    "stacked": Stacked,
}
"""How the members of an ensemble become one module, pictures `(n, C, H, W)` to logits `(K, n, L)`."""


class Fold(nn.Module):
    """The whole ensemble as one function of the faces, ready for `torch.export`.

    All views of all faces go through a member as one batch of V*N pictures, so K forwards replace K*V.
    A member maps pictures `(n, C, H, W)` in [0, 1] to logits `(n, L)`.

    Args:
        members: K of them, or all as one module of `LAYOUTS`; a list becomes `Branches`.
        views: V of them.
        decision: what decides about the vote.
        weights: of each pass in the vote, `(K, V)`, of any sum, 0 for those that are not computed; None for equal ones.
        same_as: of each view the index of the first one that shows the same picture, as `views.coinciding` finds it:
            their passes are computed once, and count with all their weights. None to compute the passes of all.

    Raises:
        UsageError: if passes of weight 0 are to be left out of members that are stacked.
    """

    def __init__(
        self,
        members: Sequence[nn.Module] | Branches | Stacked,
        views: Sequence[View],
        decision: Decision,
        *,
        weights: NDArray[np.float64] | None = None,
        same_as: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        columns = np.arange(len(views)) if same_as is None else np.asarray(same_as)
        shown, place = np.unique(columns, return_inverse=True)
        every = np.broadcast_to(1.0 if weights is None else weights, (len(members), len(views)))
        merged = np.stack([every[:, columns == column].sum(axis=1) for column in shown], axis=1)
        self.show = Show([views[column] for column in shown])
        self.members = members if isinstance(members, nn.Module) else Branches(members)
        self.repeat: nn.Module = nn.Identity() if len(shown) == len(views) else Repeat(place)
        if (merged == 0).any():
            _branches_of(self.members).taking = merged > 0
            self.score, self.vote = Score(int(np.count_nonzero(merged))), Vote(merged[merged > 0][None])
            self.repeat = nn.Sequential(Spread(merged > 0), self.repeat)
        else:
            self.score, self.vote = Score(len(shown)), Vote(merged)
        self.calibrate = nn.Identity() if decision.temperature == 1 else Calibrate(decision.temperature)
        self.decide = Decide(decision)
        self.eval()

    def forward(self, faces: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Vote, calibrate and decide.

        Args:
            faces: uint8 `(N, H, W, C)`.

        Returns:
            probabilities `(N, L)`, label int64 `(N,)`, confidence `(N,)`; and of every pass the probabilities
            `(N, K, V, L)`, before vote and calibration, 0 where it is not computed.
        """
        shown = self.show(faces, next(self.parameters()).dtype)
        scores = self.score(self.members(shown))
        probabilities = self.calibrate(self.vote(scores))
        label, confidence = self.decide(probabilities)
        return probabilities, label, confidence, self.repeat(scores)


def _branches_of(members: nn.Module) -> Branches:
    inside = members.members if isinstance(members, Autocast) else members
    if not isinstance(inside, Branches):
        raise UsageError("stacked members see the same views, and passes are left out.", hint="--layout branches")
    return inside


class Show(nn.Module):
    """All views of all faces."""

    def __init__(self, views: Sequence[View]) -> None:
        super().__init__()
        self.views = tuple(views)

    def forward(self, faces: Tensor, dtype: torch.dtype) -> Tensor:
        """Faces uint8 `(N, H, W, C)` to pictures `(V*N, C, H, W)` in [0, 1], view after view."""
        pictures = faces.to(dtype).permute(0, 3, 1, 2) / 255  # in this order: TensorRT transposes no uint8
        return torch.cat([view(pictures) for view in self.views])


class Score(nn.Module):
    """The softmax probabilities of every pass."""

    def __init__(self, views: int) -> None:
        super().__init__()
        self.views = views

    def forward(self, logits: Tensor) -> Tensor:
        """Logits `(K, V*N, L)` to probabilities `(N, K, V, L)`."""
        return logits.softmax(dim=-1).view(len(logits), self.views, -1, logits.shape[-1]).permute(2, 0, 1, 3)


class Vote(nn.Module):
    """The weighted mean of the probabilities over members and views; the plain one where weights `(K, V)` are equal."""

    def __init__(self, weights: NDArray[np.float64]) -> None:
        super().__init__()
        self.shares = None if np.ptp(weights) == 0 else weights / weights.sum()

    def forward(self, scores: Tensor) -> Tensor:
        """Probabilities of every pass `(N, K, V, L)` to probabilities `(N, L)`."""
        if self.shares is None:
            return scores.mean(dim=(1, 2))
        shares = torch.as_tensor(self.shares, dtype=scores.dtype, device=scores.device)
        return (scores * shares[..., None]).sum(dim=(1, 2))


class Repeat(nn.Module):
    """The scores of the passes that were computed, in the columns of all views."""

    def __init__(self, place: NDArray[np.int64]) -> None:
        super().__init__()
        self.place = place

    def forward(self, scores: Tensor) -> Tensor:
        """Probabilities `(N, K, computed, L)` to `(N, K, V, L)`."""
        return scores.index_select(2, torch.as_tensor(self.place, device=scores.device))


class Spread(nn.Module):
    """The scores of the passes that were computed, in their places among all; 0 in the others."""

    def __init__(self, computed: NDArray[np.bool_]) -> None:
        super().__init__()
        self.shape = computed.shape
        self.place = np.where(computed.ravel(), np.cumsum(computed) - 1, np.count_nonzero(computed))

    def forward(self, scores: Tensor) -> Tensor:
        """Probabilities `(N, 1, passes, L)` to `(N, K, shown, L)`."""
        padded = torch.cat([scores[:, 0], torch.zeros_like(scores[:, 0, :1])], dim=1)
        placed = padded.index_select(1, torch.as_tensor(self.place, device=scores.device))
        return placed.view(-1, *self.shape, placed.shape[-1])


class Calibrate(nn.Module):
    """`decision.Decision.calibrate` in tensor operations that every runtime has."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, probabilities: Tensor) -> Tensor:
        """Probabilities `(N, L)` to calibrated probabilities `(N, L)`."""
        # Powers rather than a softmax of logarithms: that of 0 is infinite, and runtimes differ in what follows.
        powers = (probabilities / probabilities.amax(dim=-1, keepdim=True)) ** (1 / self.temperature)
        return powers / powers.sum(dim=-1, keepdim=True)


class Decide(nn.Module):
    """The rules of `decision.Decision.decide` in tensor operations that every runtime has."""

    thresholds: Tensor
    margins: Tensor

    def __init__(self, decision: Decision) -> None:
        super().__init__()
        self.has_thresholds = bool(decision.thresholds)
        self.has_pairs = bool(decision.pairs)
        self.register_buffer("thresholds", torch.from_numpy(decision.threshold_array))
        # Runtimes differ in arithmetic with infinities; a lead is never below -1, so -2 means "no rule" too.
        self.register_buffer("margins", torch.from_numpy(decision.margin_array).clamp(min=-2).flatten())

    def forward(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Calibrated probabilities `(N, L)` to label int64 `(N,)` and confidence `(N,)`."""
        chosen = probabilities
        if self.has_thresholds:
            allowed = probabilities >= self.thresholds
            chosen = torch.where(allowed, probabilities, -1.0)
            chosen = torch.where(allowed.any(dim=-1, keepdim=True), chosen, probabilities)
        label = chosen.argmax(dim=-1, keepdim=True)
        if self.has_pairs:
            count = probabilities.shape[-1]
            ours = torch.arange(count, device=label.device) == label
            others = torch.where(ours, -1.0, probabilities)
            second = others.argmax(dim=-1, keepdim=True)
            lead = probabilities.gather(-1, label) - probabilities.gather(-1, second)
            margin = self.margins[label * count + second]
            label = torch.where(lead < margin, second, label)
        return label.squeeze(-1), probabilities.gather(-1, label).squeeze(-1)
