import numpy as np
import pytest

from emoexport.statistics import (
    basic_interval,
    exact_interval,
    paired_interval,
    percentile_interval,
    resampled_sums,
    wilson_interval,
)


def test_known_values():
    """Wilson and Clopper-Pearson of 8 in 10, as tables give them."""
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert exact_interval(8, 10) == pytest.approx((0.4439, 0.9748), abs=1e-4)


def test_the_paired_interval_as_published():
    """12 mended and 2 broken of 50: the example of Tango 1998 and of Newcombe 1998."""
    assert paired_interval(12, 2, 50) == pytest.approx((0.0611, 0.3447), abs=1e-4)


@pytest.mark.parametrize(("mended", "broken", "faces"), [(9, 2, 100), (4, 0, 100), (5, 1, 3600), (30, 15, 60)])
def test_the_paired_interval_agrees_with_mcnemar(mended, broken, faces):
    rejected = (mended - broken) ** 2 / (mended + broken) > 1.959964**2
    low, high = paired_interval(mended, broken, faces)
    assert low < (mended - broken) / faces < high
    assert (low > 0) == rejected


def test_the_paired_interval_turns_with_the_question():
    low, high = paired_interval(7, 3, 200)
    assert paired_interval(3, 7, 200) == pytest.approx((-high, -low))
    narrow = paired_interval(7, 3, 200, level=0.8)
    assert low < narrow[0] < narrow[1] < high


def test_paired_intervals_at_the_edges():
    low, high = paired_interval(0, 0, 300)  # nothing changed is no proof of equality
    assert low == -high
    assert 0 < high < 0.02
    assert paired_interval(20, 0, 20)[1] == 1
    assert paired_interval(0, 20, 20)[0] == -1


def test_paired_intervals_cover():
    """Simulated, 2,000 times each: no setting much under the 93 % that exact sums give, and 95 % on average.

    One of 2,000 simulations is off by 0.6 points; 92 % leaves that room.
    """
    rng = np.random.default_rng(7)
    found = {}
    for faces in (105, 500, 3600):
        for changed in (1, 2, 4, 6, 10, 20):
            for share in (0.5, 0.75, 1.0):
                mend, break_ = share * changed / faces, (1 - share) * changed / faces
                counts, times = np.unique(
                    rng.multinomial(faces, [mend, break_, 1 - mend - break_], size=2000), axis=0, return_counts=True
                )
                bounds = np.array([paired_interval(int(a), int(b), faces) for a, b, _ in counts])
                held = (bounds[:, 0] <= mend - break_) & (mend - break_ <= bounds[:, 1])
                found[faces, changed, share] = times[held].sum() / 2000
    assert min(found.values()) >= 0.92, found
    assert np.mean(list(found.values())) >= 0.95


def test_paired_intervals_exclude_zero_where_there_is_a_difference():
    rng = np.random.default_rng(7)
    counts = rng.multinomial(3600, [0.05, 0.02, 0.93], size=200)
    assert np.mean([paired_interval(int(a), int(b), 3600)[0] > 0 for a, b, _ in counts]) > 0.99


def test_paired_intervals_seldom_claim_what_is_not_there():
    rng = np.random.default_rng(7)
    counts = rng.multinomial(3600, [0.004, 0.004, 0.992], size=2000)
    bounds = np.array([paired_interval(int(a), int(b), 3600) for a, b, _ in counts])
    assert np.mean((bounds[:, 0] > 0) | (bounds[:, 1] < 0)) < 0.065


def test_resampled_sums_are_those_of_drawn_faces():
    columns = np.column_stack([np.ones(50), np.arange(50.0), np.arange(50.0)])
    sums = resampled_sums(columns, resamples=3000, seed=1)
    assert sums.shape == (3000, 3)
    assert (sums[:, 0] == 50).all()
    assert (sums[:, 1] == sums[:, 2]).all()  # the same faces for all columns
    assert sums[:, 1].mean() == pytest.approx(columns[:, 1].sum(), rel=0.01)
    assert sums[:, 1].std() == pytest.approx(50**0.5 * columns[:, 1].std(), rel=0.05)
    assert np.array_equal(sums, resampled_sums(columns, resamples=3000, seed=1))
    assert not np.array_equal(sums, resampled_sums(columns, resamples=3000, seed=2))


def test_resampling_in_parts_draws_as_often(monkeypatch):
    monkeypatch.setattr("emoexport.statistics._COUNTS_AT_ONCE", 120)
    assert resampled_sums(np.ones((50, 1)), resamples=7).shape == (7, 1)


@pytest.mark.parametrize("interval", ["percentile", "basic"])
def test_bootstrap_intervals_of_a_mean_cover(interval):
    rng = np.random.default_rng(3)
    covered = 0
    for seed in range(300):
        values = rng.gamma(2.0, size=(150, 1))
        means = resampled_sums(values, resamples=1000, seed=seed)[:, 0] / 150
        low, high = percentile_interval(means) if interval == "percentile" else basic_interval(values.mean(), means)
        covered += low <= 2.0 <= high
    assert 0.91 <= covered / 300 <= 0.98


def test_the_basic_interval_mirrors():
    samples = np.linspace(0.1, 0.3, 1001)
    low, high = percentile_interval(samples)
    assert basic_interval(0.15, samples) == pytest.approx((0.3 - high, 0.3 - low))
