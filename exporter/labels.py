"""The seven emotions, and how other data sets name and number them.

Sources of the numberings: FER-2013 (Goodfellow et al. 2013), FER+ (Barsoum et al. 2016, the column order of
its vote table), RAF-DB (Li et al. 2017, numbered from 1), AffectNet (Mollahosseini et al. 2017).
"""

import difflib
from collections.abc import Sequence

from emoexport.errors import BadData, UsageError

__all__ = ["EMOTIONS", "LABEL_ORDERS", "order_of", "to_label"]

EMOTIONS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")

# A label outside the seven emotions that these data sets are known to hold; its rows are left out and counted.
_OUTSIDE = {"contempt", "unknown", "not a face", "nf"}

_ALIASES = {
    "anger": "angry",
    "disgusted": "disgust",
    "afraid": "fear",
    "fearful": "fear",
    "happiness": "happy",
    "joy": "happy",
    "sadness": "sad",
    "surprised": "surprise",
}

# What the number n means: the name at index n; an empty name is no label.
LABEL_ORDERS: dict[str, tuple[str, ...]] = {
    "fer2013": EMOTIONS,
    "ferplus": (
        "neutral",
        "happiness",
        "surprise",
        "sadness",
        "anger",
        "disgust",
        "fear",
        "contempt",
        "unknown",
        "not a face",
    ),
    "rafdb": ("", "surprise", "fear", "disgust", "happiness", "sadness", "anger", "neutral"),
    "affectnet": ("neutral", "happy", "sad", "surprise", "fear", "disgust", "anger", "contempt", *["unknown"] * 3),
}


def order_of(name: str) -> Sequence[str]:
    """Look up a numbering by name.

    Raises:
        UsageError: if there is none of that name.
    """
    if name not in LABEL_ORDERS:
        raise UsageError(f"'{name}' is no known label order; known are {', '.join(LABEL_ORDERS)}.")
    return LABEL_ORDERS[name]


def to_label(value: str | int, *, order: str = "fer2013") -> int | None:
    """Map a data set's own label to an index into `EMOTIONS`.

    Args:
        value: a name in any case ("Happiness"), or a number (also as text) in the numbering `order`.
        order: a key of `LABEL_ORDERS`.

    Returns:
        The index, or None where the label is known but none of the seven emotions (contempt).

    Raises:
        BadData: if the label is unknown.
        UsageError: if the order is unknown.
    """
    names = order_of(order)
    text = str(value).strip().lower().replace("_", " ")
    if text.isdecimal():
        # Of more digits than an index has, Python may refuse to make a number.
        text = names[int(text)] if len(text) < 9 and int(text) < len(names) else ""
    text = _ALIASES.get(text, text)
    if text in EMOTIONS:
        return EMOTIONS.index(text)
    if text in _OUTSIDE:
        return None
    near = difflib.get_close_matches(text, [*EMOTIONS, *_ALIASES, *_OUTSIDE], n=1)
    meant = f" Did you mean '{near[0]}'?" if near else ""
    raise BadData(
        f"'{value}' is no label of the order '{order}'; needed is one of {', '.join(EMOTIONS)}, or its number.{meant}",
        hint=f"where numbers mean something else, --label-order says what: {', '.join(LABEL_ORDERS)}",
    )
