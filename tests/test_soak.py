"""A long bounded load: memory is flat, no file handle or thread is left, calls take as long at the end as before.

An hour of it unless EMOEXPORT_SOAK_MINUTES says otherwise, as `.ci/run` does.
"""

import os

import pytest
from soak import Sample, Soak, soak

MINUTES = float(os.environ.get("EMOEXPORT_SOAK_MINUTES", "60"))


def made_up(mib, handles=10, threads=5):
    """An hour of which every sample holds what is given."""
    at = range(0, 3600, 30)
    samples = [Sample(each, mib(each), handles, threads) for each in at]
    return Soak("made up", samples, [(each, 1.0) for each in at], {"ok": len(at)})


def grows(found, slack_mib=0):
    (first, _), _, (last, _) = found.thirds_mib
    return last > 1.1 * first + slack_mib


def test_growth_is_told_from_noise():
    wanders = made_up(lambda at: 200 + 8 * (at // 30 % 3))
    assert wanders.thirds_mib == [(208, 216)] * 3
    assert not grows(wanders)
    assert grows(made_up(lambda at: 200 + 8 * (at // 30 % 3) + at / 60))
    assert wanders.p99_ms(0, 4) == 1


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 300)
def test_a_long_load_leaves_nothing_behind(bundle):
    for found in soak(bundle.path, MINUTES, reopen=60 if MINUTES >= 10 else 6):
        assert found.counts["ok"] >= 60 * MINUTES
        assert not grows(found, 0 if MINUTES >= 10 else 64), found.thirds_mib  # a short one ends before pools are full
        assert found.warm[-1].handles <= max(sample.handles for sample in found.warm[: len(found.warm) // 3])
        assert found.warm[-1].threads <= max(sample.threads for sample in found.warm[: len(found.warm) // 3])
        assert found.p99_ms(3, 4) <= 3 * found.p99_ms(0, 4) + 50, found.name  # other work may stand beside it
