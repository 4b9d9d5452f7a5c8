"""What other processes took of the processor in the meantime: they make times longer, and nothing else tells."""

import contextlib
import os
import time

import psutil

__all__ = ["BUSY_CORES", "OtherProcesses"]

BUSY_CORES = 0.1
"""Of one core, from which on times are of a machine in use: more than the system's own chores take."""

_SHORTEST = 0.5
"""Seconds below which nothing is said: kernels count processor time in ticks of up to 10 ms."""

_AT_WORK = ("user", "nice", "system", "steal")
"""Of what the system tells of a core: all time that somebody computed, another guest of the host included."""


class OtherProcesses:
    """Begins to watch when it is made."""

    def __init__(self) -> None:
        self._since = _seconds()

    def cores(self) -> float | None:
        """How many cores others have kept busy since, of those that this process may use; None before one can tell.

        What this process and those that it started have computed does not count.
        """
        elapsed, everyone, own = (now - then for now, then in zip(_seconds(), self._since, strict=True))
        return None if elapsed < _SHORTEST else round(max(0.0, everyone - own) / elapsed, 2)


def _seconds() -> tuple[float, float, float]:
    """Of a clock, of everyone's computing on our cores, and of our own: with that of children, waited for or not."""
    cores = psutil.cpu_times(percpu=True)
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(cores))
    everyone = sum(getattr(cores[core], field, 0.0) for core in usable if core < len(cores) for field in _AT_WORK)
    me = psutil.Process()
    own = me.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in me.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended, and is among those waited for, or will be
            spent = child.cpu_times()
            total += spent.user + spent.system + spent.children_user + spent.children_system
    return time.monotonic(), everyone, total
