"""The proof of a precision: does a runtime compute in the type of number that was asked for?

Runtimes put FP32 where they have no kernel of fewer bits, and fewer bits where they are faster, without a word.
"""

from collections.abc import Mapping

from emoexport.engines import Backend
from emoexport.engines.number_types import Executed
from emoexport.precision import PRECISIONS, Precision
from emoexport.verdict import Judgement

__all__ = ["prove"]

_LEAST_OF_GRAPH = 0.5
"""Of the share of multiplications that a graph has in the type of its precision, the least part that must be run."""

_BITS = {row.number: row.bits for row in PRECISIONS.values()}


def prove(
    row: Precision, executed: Executed, in_graph: Mapping[str, int], backend: Backend, *, named: bool
) -> Judgement:
    """Hold what was executed against what was asked for.

    A graph that has nothing in the type of its precision is another one under its name, and fails.
    Nothing may be computed in fewer bits than asked for, nor in fewer than 32 in a type that the graph has not. And
    what was asked for must be there: by number of multiplications at least half the share that the graph has of them,
    or, where a runtime names no operators, the least share of time of the precision's row. Runtimes that open graphs
    have no kernels for some, and compute those in FP32. That is a failure if the precision was named; if not, the
    engine is no engine of it, and not judged.

    Args:
        row: the precision of the graph.
        executed: what the runtime tells.
        in_graph: by type of number, how many multiplications the graph has.
        backend: of the engine.
        named: whether the user asked for this precision.
    """
    if in_graph and not in_graph.get(row.number):
        told = ", ".join(f"{number} {count}" for number, count in in_graph.items())
        said = f"the graph of {row.title} multiplies nothing in {row.number} ({told}), so it is another one"
        return Judgement(verdict="failed", reasons=(said,))
    shares = _shares(executed.multiplications) or executed.time_share
    if not shares:
        return Judgement(verdict="certified", reasons=(f"{backend.title} does not tell in which types it multiplies",))
    told = ", ".join(f"{number} {part:.0%}" for number, part in shares.items() if part)
    own = in_graph or shares  # of what has no graph nothing is foreign
    if any(_BITS[number] < (row.bits if number in own else 32) for number in shares):
        return Judgement(
            verdict="failed", reasons=(f"{backend.title} multiplies the graph of {row.title} in fewer bits ({told})",)
        )
    found = shares.get(row.number, 0.0)
    if found >= _least(row, executed, in_graph):
        return Judgement(verdict="certified")
    is_known = not (named or backend.built_from)
    said = f"{backend.title} multiplies the graph of {row.title} in other types here ({told}), so it is no engine of it"
    return Judgement(verdict="not judged" if is_known else "failed", reasons=(said,))


def _least(row: Precision, executed: Executed, in_graph: Mapping[str, int]) -> float:
    if not executed.multiplications:
        return row.min_share
    return max(_LEAST_OF_GRAPH * _shares(in_graph).get(row.number, 0.0), 1e-9)


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    total = sum(counts.values())
    return {number: count / total for number, count in counts.items()} if total else {}
