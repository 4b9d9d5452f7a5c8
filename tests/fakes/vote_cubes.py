"""Votes for tests: score cubes of passes that go together, and decisions with all kinds of rules."""

import numpy as np
from hypothesis import strategies as st

from emoexport.decision import Decision, PairRule
from emoexport.labels import EMOTIONS

names = st.sampled_from(EMOTIONS)
decisions = st.builds(
    Decision,
    temperature=st.sampled_from([1.0, 0.02, 0.3, 0.9, 1.3, 4.0, 30.0]),
    thresholds=st.dictionaries(names, st.floats(0.02, 0.95), max_size=7),
    pairs=st.lists(st.builds(PairRule, leader=names, favoured=names, margin=st.floats(0.01, 0.9)), max_size=6).map(
        tuple
    ),
)


def vote_cube(faces, *, members=3, views=4, labels=7, seed=0, signal=1.6, noise=1.0):
    """Draw scores float32 `(N, K, V, L)` and true labels int64 `(N,)`: what a face shows, plus what a pass adds."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(labels, size=faces)
    shown = rng.normal(size=(faces, 1, 1, labels)) + signal * np.eye(labels)[truth][:, None, None]
    of_member = rng.normal(size=(faces, members, 1, labels))
    of_view = rng.normal(size=(faces, members, views, labels))
    logits = 1.5 * (shown + noise * (0.5 * of_member + 0.5 * of_view))
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (powers / powers.sum(axis=-1, keepdims=True)).astype(np.float32), truth
