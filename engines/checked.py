"""What an engine answers, checked before it is used: a graph of a stranger, or one that overflows, answers anything."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from emoexport.engines.base import Engine
from emoexport.errors import BadBundle, EmoexportError, EngineFailed
from emoexport.outcome import Outcome

__all__ = ["outcome_of", "telling_failures"]


def outcome_of(engine: Engine, faces: NDArray[np.uint8], *, batch: int, labels: int) -> Outcome:
    """What an engine decides, as far as it is a decision: what is not, `verify` measures and nobody uses.

    Raises:
        BadInput: if the type or the shape of the faces is another.
        EngineFailed: if the runtime raises an error.
        BadBundle: if an answer is no outcome of these faces and so many labels.
    """
    with telling_failures(engine):
        outcome = engine.run_all(faces, batch_size=batch)
    if not outcome.is_of(len(faces), labels):
        raise BadBundle(
            f"{engine.name} answers no probabilities of {labels} emotions, label and confidence a face.",
            hint="emoexport verify says what is wrong with it",
        )
    return outcome


@contextmanager
def telling_failures(engine: Engine) -> Iterator[None]:
    """Say which engine it is that fails.

    Raises:
        EngineFailed: if the runtime raises an error.
    """
    try:
        yield
    except EmoexportError:
        raise
    except Exception as err:  # what runtimes raise shares no base but this
        raise EngineFailed(f"{engine.name} fails in a call: {err}") from err
