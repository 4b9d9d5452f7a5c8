import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy.stats import binom

from emoexport.errors import BadData, UsageError
from emoexport.inspection import audit
from emoexport.labels import EMOTIONS, to_label
from emoexport.leakage import judge_rows
from emoexport.train.audit import RowFindings, audit_data, clean_rows, distinct_faces, require_enough
from emoexport.train.dataset import DataSet, Faces
from emoexport.train.near_duplicates import THRESHOLD, NearPairs, near_duplicates
from emoexport.train.synthetic import synthetic_faces

IMAGES, LABELS = synthetic_faces(60, size=48, seed=1)  # of which no two are near duplicates, as a test below holds


def jpeg(face: np.ndarray, quality: int = 40) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(face[..., 0]).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))[..., None]


def shifted(face: np.ndarray, down: int, right: int) -> np.ndarray:
    padded = np.pad(face, ((3, 3), (3, 3), (0, 0)), mode="edge")
    return padded[3 - down : 51 - down, 3 - right : 51 - right]


CHANGES = {
    "recompressed": jpeg,
    "brighter": lambda face: (face * 0.7 + 70).astype(np.uint8),
    "darker": lambda face: face // 2,
    "other gamma": lambda face: (255 * (face / 255) ** 0.6).astype(np.uint8),
    "shifted": lambda face: shifted(face, 2, -2),
    "at half the resolution": lambda face: np.asarray(
        Image.fromarray(face[..., 0]).resize((24, 24)).resize((48, 48), Image.Resampling.BICUBIC)
    )[..., None],
    "mirrored": lambda face: face[:, ::-1],
    "mirrored, shifted and recompressed": lambda face: jpeg(shifted(face[:, ::-1], -1, 1)),
}


def split(images: np.ndarray, labels: np.ndarray, votes: np.ndarray | None = None) -> Faces:
    return Faces(images=images, labels=labels, flagged=np.zeros(len(labels), dtype=bool), votes=votes)


def look_over(**splits: Faces):
    data = DataSet(source="x", splits=splits)
    distinct = distinct_faces(data)
    return audit_data(data, distinct, near_duplicates(distinct.images), threshold=THRESHOLD)


def pairs_of(found: NearPairs) -> list[tuple[int, int, bool]]:
    columns = (found.first.tolist(), found.second.tolist(), found.mirrored.tolist())
    return list(zip(*columns, strict=True))


@pytest.fixture
def planted() -> dict[str, Faces]:
    """40 training faces and 20 test faces, with known faults."""
    train, labels = IMAGES[:40].copy(), LABELS[:40].copy()
    test, test_labels = IMAGES[40:].copy(), LABELS[40:].copy()
    train[1], labels[1] = train[0], labels[0]  # a copy
    train[3], labels[3] = train[2], (labels[2] + 1) % 7  # a contradiction
    train[4] = 200  # a blank
    train[6], labels[6] = jpeg(train[5]), (labels[5] + 1) % 7  # a near duplicate, with another label
    test[0], test_labels[0] = train[0], labels[0]  # a leak
    test[1], test_labels[1] = jpeg(train[8][:, ::-1]), labels[8]  # a near duplicate of a training face, mirrored
    test[3] = shifted(test[2], 1, 1)  # a near duplicate within the test split
    test_labels[3] = test_labels[2]
    return {"train": split(train, labels), "test": split(test, test_labels)}


@pytest.mark.parametrize("change", CHANGES)
def test_every_changed_face_is_found_and_nothing_else(change):
    changed = np.stack([CHANGES[change](face) for face in IMAGES[::4]])
    found = near_duplicates(np.concatenate([IMAGES, changed]))
    assert pairs_of(found) == [(4 * row, 60 + row, "mirrored" in change) for row in range(15)]
    assert (found.similarity >= THRESHOLD).all()


def test_nothing_is_found_where_nothing_is():
    assert pairs_of(near_duplicates(IMAGES)) == []
    assert pairs_of(near_duplicates(IMAGES[:0])) == []


def test_blank_faces_are_like_none():
    blank = np.full((4, 48, 48, 1), [[[[0]]], [[[90]]], [[[91]]], [[[255]]]], dtype=np.uint8)
    assert pairs_of(near_duplicates(np.concatenate([IMAGES[:5], blank]))) == []


def test_chunks_and_channels_change_nothing_but_memory():
    faces = np.concatenate([IMAGES, np.stack([jpeg(face) for face in IMAGES[:20]])])
    whole, done = near_duplicates(faces), []
    assert len(whole.first) == 20
    for chunk in (1, 7, 79, 80):
        done.clear()
        parts = near_duplicates(faces, chunk=chunk, progress=done.append)
        assert pairs_of(parts) == pairs_of(whole)
        assert np.allclose(parts.similarity, whole.similarity, atol=1e-5)
        assert sum(done) == len(faces)
    assert pairs_of(near_duplicates(np.repeat(faces, 3, axis=3))) == pairs_of(whole)


def test_larger_faces_are_compared_alike():
    large = np.stack(
        [np.asarray(Image.fromarray(face[..., 0]).resize((112, 112), Image.Resampling.BICUBIC)) for face in IMAGES[:20]]
    )[..., None]
    both = np.concatenate([large, np.stack([jpeg(face) for face in large[:6]])])
    assert pairs_of(near_duplicates(both)) == [(row, 20 + row, False) for row in range(6)]


def test_planted_faults_are_counted_and_nothing_else(planted):
    audit, _ = look_over(**planted)
    train, test = audit.splits["train"], audit.splits["test"]
    assert train.rows == {"copied": (1, 3), "contradicted": (2, 3), "blank": (4,)}
    assert test.rows == {"leaked": (0,), "near_train": (1,)}
    assert (train.faces, train.images, train.copied, train.leaked, train.near, train.near_train) == (40, 38, 2, 0, 2, 0)
    assert (test.faces, test.images, test.copied, test.leaked, test.near, test.near_train) == (20, 20, 0, 1, 2, 1)
    assert (audit.images, audit.contradicting_images) == (57, 1)
    (cross,) = audit.across
    assert (cross.images, cross.rows_first, cross.rows_second, cross.near_pairs) == (1, 2, 1, 1)
    near = audit.near
    assert (near.pairs, near.mirrored_pairs, near.contradicting_pairs) == (3, 1, 1)
    assert (near.groups, near.contradicting_groups, near.images, near.largest_group) == (3, 1, 6, 2)
    assert {line.rpartition(" ")[0] for line in near.listed} == {
        "train:5 train:6",
        "train:8 test:1",
        "test:2 test:3",
    }


def test_clean_rows_are_those_that_training_keeps(planted):
    found, findings = look_over(**planted)
    clean = clean_rows(DataSet(source="x", splits=planted))
    for name, masks in findings.items():
        assert np.array_equal(masks.clean, clean[name])
        faulty = masks.copied | masks.leaked | masks.contradicted | masks.blank
        assert np.array_equal(masks.clean, ~faulty)
        assert found.splits[name].clean == masks.clean.sum()


def test_pictures_hang_together_by_pairs():
    chain = np.stack([shifted(IMAGES[0], step, 0) for step in (-3, 0, 3)])  # the ends are 6 pixels apart
    audit, _ = look_over(train=split(chain, np.array([0, 1, 2])))
    assert (audit.near.pairs, audit.near.groups, audit.near.largest_group) == (2, 1, 3)


def test_a_leak_is_no_near_duplicate():
    faces = split(IMAGES, LABELS)
    audit, _ = look_over(train=faces, test=faces)
    assert (audit.splits["test"].leaked, audit.splits["test"].near_train, audit.near.pairs) == (60, 0, 0)


def test_balance_and_votes():
    labels = np.repeat(np.arange(7), [10, 5, 5, 5, 5, 5, 5])
    votes = np.zeros((40, 7), dtype=np.float32)
    votes[np.arange(40), labels] = 1
    votes[0] = np.nan  # nobody voted
    votes[1, :2] = 0.5  # no majority
    votes[2, :2] = 0.3, 0.7  # another majority
    audit, _ = look_over(train=split(IMAGES[:40], labels, votes))
    found = audit.splits["train"]
    assert found.emotions == dict(zip(EMOTIONS, [10, 5, 5, 5, 5, 5, 5], strict=True))
    assert found.imbalance == 2
    shares = np.array([0.25] + [0.125] * 6)
    assert found.divergence_bits == pytest.approx((shares * np.log2(shares * 7)).sum(), abs=1e-4)
    assert (found.votes.n, found.votes.value) == (38, round(37 / 38, 6))
    even, _ = look_over(train=split(IMAGES[:14], np.arange(14) % 7))
    assert (even.splits["train"].imbalance, even.splits["train"].divergence_bits) == (1, 0)
    assert even.splits["train"].votes is None


def found_rows(clean: np.ndarray, **masks: np.ndarray) -> RowFindings:
    none = np.zeros(len(clean), dtype=bool)
    names = ("copied", "leaked", "contradicted", "blank", "near", "near_train")
    return RowFindings(clean=clean, **{name: masks.get(name, none) for name in names})


def test_accuracy_by_what_stands_in_train():
    right = np.array([1, 1, 0, 1, 0, 0, 1, 0, 0, 0], dtype=bool)
    leaked, near_train = np.arange(10) < 3, (np.arange(10) >= 3) & (np.arange(10) < 5)
    found = found_rows(~leaked, leaked=leaked, near_train=near_train)
    accuracy = judge_rows(right, found, run="x", split="test", views=("identity",), searched=True)
    shares = {name: (rate.value, rate.n) for name, rate in accuracy.accuracy.items()}
    third, two_sevenths = round(2 / 3, 6), round(2 / 7, 6)
    assert shares == {
        "all": (0.4, 10),
        "clean": (two_sevenths, 7),
        "leaked": (third, 3),
        "near": (0.5, 2),
        "unseen": (0.2, 5),
    }
    assert accuracy.all_minus_clean.value == pytest.approx(0.4 - 2 / 7, abs=1e-5)
    alone = judge_rows(right, found_rows(~np.zeros(10, bool)), run="x", split="test", views=(), searched=False)
    assert alone.all_minus_clean is None
    assert set(alone.accuracy) == {"all", "clean"}


def test_the_interval_of_the_difference_covers():
    """Drawn 400 times: 30 leaked rows that are right at 0.9 beside 270 clean ones at 0.6."""
    rng = np.random.default_rng(0)
    clean = np.arange(300) >= 30
    found, covered = found_rows(clean, leaked=~clean), 0
    for _ in range(400):
        right = rng.random(300) < np.where(clean, 0.6, 0.9)
        difference = judge_rows(right, found, run="x", split="test", views=(), searched=False).all_minus_clean
        covered += difference.low <= 0.1 * 0.3 <= difference.high
    assert binom.ppf(0.001, 400, 0.95) <= covered <= binom.ppf(0.999, 400, 0.98)


def tree_of(splits: dict[str, Faces], root) -> str:
    for name, faces in splits.items():
        for row, (image, label) in enumerate(zip(faces.images, faces.labels, strict=True)):
            folder = root / "tree" / name / EMOTIONS[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(folder / f"{row:02}.png")
    return str(root / "tree")


def test_the_command_reports_and_strict_fails(planted, tmp_path, call):
    tree, out = tree_of(planted, tmp_path), tmp_path / "out"
    code, printed, err = call("data", "audit", tree)
    assert code == 0, err
    assert "Near duplicates" in printed
    assert not out.exists()
    code, _, err = call("data", "audit", tree, "--out", out, "--strict")
    assert code == 1
    assert "rows of test that stand in train: 1; pictures with contradicting labels: 1; blank pictures: 1;" in err
    report = json.loads((out / "audit.json").read_text())
    assert report["audit"]["near"]["pairs"] == 3
    assert "| train | 40 | 38 | 2 | 0 | 2 | 1 | 36 | 2 | 0 |" in (out / "audit.md").read_text()


def test_strict_passes_good_data_and_near_duplicates_can_be_left_out(tmp_path, call):
    tree = tree_of({"train": split(IMAGES[:42], LABELS[:42])}, tmp_path)
    code, printed, err = call("data", "audit", tree, "--strict", "--no-near", "--out", tmp_path / "out")
    assert code == 0, err
    assert "Near duplicates" not in printed
    report = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert report["audit"]["near"] is None
    assert report["audit"]["splits"]["train"]["near"] is None


def test_a_run_is_judged_by_what_it_has_seen(run_dir):
    quiet = Console(quiet=True)
    report = audit("synthetic:700", run=run_dir, quick=True, near=True, console=quiet)
    found = report.run
    assert (found.split, found.views, report.size) == ("test", ("identity",), 32)
    rates = found.accuracy
    assert rates["all"].n == 105
    assert rates["clean"].n == rates["unseen"].n + (rates["near"].n if "near" in rates else 0)
    assert rates["all"].value > 1 / 7
    with pytest.raises(UsageError, match="--size is 48"):
        audit("synthetic:700", run=run_dir, size=48, console=quiet)
    with pytest.raises(UsageError, match="no split 'other'"):
        audit("synthetic:700", split="other", console=quiet)


def test_too_few_faces_to_train_and_validate_on():
    labels = np.r_[np.arange(7), np.arange(6)]
    alone = {"train": split(IMAGES[:13], labels)}
    with pytest.raises(BadData, match="'train' has 1 face of 'neutral'; every emotion needs at least 2"):
        require_enough(DataSet(source="x", splits=alone))
    require_enough(DataSet(source="x", splits=alone | {"validation": split(IMAGES[20:33], labels)}))
    require_enough(DataSet(source="x", splits={"train": split(IMAGES[:14], np.arange(14) % 7)}))


@pytest.mark.parametrize(
    ("written", "meant"),
    [("hapy", "happy"), ("suprise", "surprise"), ("Angrey", "angry"), ("sadnes", "sadness"), ("neutrall", "neutral")],
)
def test_a_misspelt_class_folder_names_the_nearest_emotion(written, meant, tmp_path, call):
    tree = tree_of({"train": split(IMAGES[:14], np.arange(14) % 7)}, tmp_path)
    (tmp_path / "tree" / "train" / "happy").rename(tmp_path / "tree" / "train" / written)
    code, _, err = call("data", "audit", tree)
    assert code == 4
    assert f"Did you mean '{meant}'?" in err
    with pytest.raises(BadData) as caught:
        to_label("xyzzy")
    assert "Did you mean" not in str(caught.value)
