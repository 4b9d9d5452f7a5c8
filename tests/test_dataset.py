import csv
import io
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from emoexport.errors import BadData, UsageError
from emoexport.labels import EMOTIONS, to_label
from emoexport.train.audit import clean_rows
from emoexport.train.dataset import DataSet, Faces, load_data


def png(face: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(face[..., 0]).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def tree(tmp_path, faces):
    """The guide's layout: train/<emotion>/*.png and test/<emotion>/*.png, two faces of each emotion."""
    images, labels = faces
    for split in ("train", "test"):
        for label, name in enumerate(EMOTIONS):
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for number, row in enumerate(np.flatnonzero(labels == label)[:2]):
                (folder / f"{number}.png").write_bytes(png(images[row]))
    return tmp_path / "tree"


def write_csv(path, images, labels, header, usage):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for image, label, use in zip(images, labels, usage, strict=True):
            cells = {"emotion": label, "pixels": " ".join(map(str, image.ravel())), "usage": use}
            writer.writerow([cells[name.strip().lower()] for name in header])


def test_folder_tree(tree, faces):
    data = load_data(str(tree), size=32)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 14, "test": 14}
    row = np.flatnonzero(faces[1] == 3)[0]
    assert np.array_equal(data.splits["train"].images[data.splits["train"].labels == 3][0], faces[0][row])
    assert data.evaluation_split() == "test"


@pytest.mark.parametrize("header", [["emotion", "pixels", "Usage"], ["emotion", " Usage", " pixels"]])
def test_both_published_csv_headers(header, tmp_path, faces):
    images, labels = faces
    usage = ["Training", "PublicTest"] * 35
    write_csv(tmp_path / "fer.csv", images, labels, header, usage)
    data = load_data(str(tmp_path / "fer.csv"), size=32)
    assert set(data.splits) == {"train", "public_test"}
    assert np.array_equal(data.splits["train"].images, images[::2])
    assert np.array_equal(data.splits["public_test"].labels, labels[1::2])


@pytest.mark.parametrize("column", ["png", "image"])
@pytest.mark.parametrize("nested", [False, True])
def test_parquet_file_and_folder(column, nested, tmp_path, faces):
    images, labels = faces
    cells = [png(image) for image in images]
    cells = [{"bytes": cell, "path": None} for cell in cells] if nested else cells
    for split in ("train", "validation"):
        pq.write_table(pa.table({column: cells, "label": labels}), tmp_path / f"{split}.parquet")
    data = load_data(str(tmp_path), size=32)
    assert set(data.splits) == {"train", "validation"}
    assert np.array_equal(data.splits["train"].images, images)
    alone = load_data(str(tmp_path / "train.parquet"), size=32)
    assert np.array_equal(alone.splits["train"].labels, labels)


def test_parquet_split_column_and_marks(tmp_path, faces):
    images, labels = faces
    table = pa.table(
        {
            "png": [png(image) for image in images],
            "label": labels,
            "split": ["Training"] * 35 + ["PublicTest"] * 35,
            "dup_first": [row != 3 for row in range(70)],
            "in_train_exact": [row in (0, 40) for row in range(70)],
            "constant": [row == 5 for row in range(70)],
        }
    )
    pq.write_table(table, tmp_path / "fer2013.parquet")
    data = load_data(str(tmp_path), size=32)
    assert np.flatnonzero(data.splits["train"].flagged).tolist() == [3, 5]  # a train row is no leak of itself
    assert np.flatnonzero(data.splits["public_test"].flagged).tolist() == [5]


def test_synthetic_is_named_split_and_repeatable():
    data = load_data("synthetic:200", size=32)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 140, "validation": 30, "test": 30}
    again = load_data("synthetic:200", size=32)
    assert all(data.splits[name].sha256() == again.splits[name].sha256() for name in data.splits)
    other = load_data("synthetic:200", size=32, seed=1)
    assert other.splits["train"].sha256() != data.splits["train"].sha256()
    assert data.splits["train"].sha256() != data.splits["test"].sha256()


def test_size_and_channels_are_converted(tree):
    split = load_data(str(tree), size=24, channels=3).splits["train"]
    assert split.images.shape == (14, 24, 24, 3)
    assert np.array_equal(split.images[..., 0], split.images[..., 2])


@pytest.mark.parametrize(
    ("value", "order", "label"),
    [
        ("Happiness", "fer2013", "happy"),
        ("ANGER", "ferplus", "angry"),
        (3, "fer2013", "happy"),
        ("0", "ferplus", "neutral"),
        (1, "rafdb", "surprise"),
        (7, "rafdb", "neutral"),
        (6, "affectnet", "angry"),
        ("contempt", "affectnet", None),
        (7, "affectnet", None),
        (9, "ferplus", None),
        (10, "affectnet", None),
    ],
)
def test_labels_of_other_data_sets(value, order, label):
    assert to_label(value, order=order) == (None if label is None else EMOTIONS.index(label))


@pytest.mark.parametrize(("value", "order"), [("bored", "fer2013"), (7, "fer2013"), (0, "rafdb"), (-1, "fer2013")])
def test_unknown_labels(value, order):
    with pytest.raises(BadData, match=str(value)):
        to_label(value, order=order)


def test_contempt_is_left_out_and_counted(tree):
    (tree / "train" / "contempt").mkdir()
    (tree / "train" / "contempt" / "1.png").write_bytes((tree / "train" / "happy" / "1.png").read_bytes())
    data = load_data(str(tree), size=32)
    assert data.outside == 1
    assert len(data.splits["train"]) == 14


def test_what_cannot_be_read_is_named_counted_and_skipped(tree):
    bad = tree / "train" / "sad" / "0.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(BadData, match=r"0\.png") as caught:
        load_data(str(tree), size=32)
    assert "--skip-bad" in caught.value.hint
    data = load_data(str(tree), size=32, skip_bad=True)
    assert len(data.skipped) == 1
    assert "0.png" in data.skipped[0]
    assert len(data.splits["train"]) == 13


def test_an_emotion_without_faces(tree):
    for path in (tree / "test" / "fear").iterdir():
        path.unlink()
    with pytest.raises(BadData, match="'test' has no face of 'fear'"):
        load_data(str(tree), size=32)


def test_an_unknown_class_folder(tree):
    (tree / "train" / "happy").rename(tree / "train" / "hapy")
    with pytest.raises(BadData, match="'hapy'"):
        load_data(str(tree), size=32)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "a,b\n1,2\n", "needed are emotion, pixels"),
        ("x.csv", "emotion,pixels,Usage\n3,1 2 3,Training\n", "line 2: found 3 grey values"),
        ("x.csv", "emotion,pixels,Usage\n3,1 2 3 999,Training\n", "line 2: found grey values from 1 to 999"),
        ("x.csv", "emotion,pixels,Usage\n3,1 2 3 x,Training\n", "line 2: found grey values that are no whole"),
        ("x.csv", f"emotion,pixels,Usage\n3,1 2 3 {10**30},Training\n", "line 2: found grey values that"),
        ("x.csv", f"emotion,pixels,Usage\n{'9' * 5000},1 2 3 4,Training\n", "line 2: '9+' is no label"),
        ("x.csv", "emotion,pixels,Usage\n,1 2 3 4,Training\n", "line 2: '' is no label"),
        ("x.csv", "emotion,pixels,Usage\n3,1 2 3 4\n", "2 cells"),
        ("x.csv", "", "needed are emotion, pixels"),
        ("x.parquet", "PAR1 but not really", "Parquet"),
        ("x.txt", "hello", "neither"),
    ],
)
def test_files_that_are_no_data(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(BadData, match=message):
        load_data(str(tmp_path / name), size=32)


def test_no_such_data_and_an_empty_folder(tmp_path):
    with pytest.raises(BadData, match="no data at"):
        load_data(str(tmp_path / "nothing"), size=32)
    with pytest.raises(BadData, match="no face with a label"):
        load_data(str(tmp_path), size=32)
    with pytest.raises(UsageError):
        load_data("synthetic:few", size=32)


def test_a_csv_of_large_faces_with_blank_lines(tmp_path):
    large = " ".join(["100"] * 256 * 256)
    lines = [f"{label},{large},Training\n\n" for label in range(7)]
    (tmp_path / "x.csv").write_text("emotion,pixels,Usage\n" + "".join(lines) + "\n")
    assert load_data(str(tmp_path / "x.csv"), size=32).splits["train"].images.shape == (7, 32, 32, 1)


def test_cells_of_another_type(tmp_path, faces):
    cells = [png(image) for image in faces[0][:7]]
    table = pa.table({"image": cells, "label": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "split": [1] * 7})
    pq.write_table(table, tmp_path / "x.parquet")
    assert len(load_data(str(tmp_path), size=32).splits["1"]) == 7
    pq.write_table(pa.table({"image": [[1, 2, 3]], "label": [0]}), tmp_path / "x.parquet")
    with pytest.raises(BadData, match="row 1: found a list"):
        load_data(str(tmp_path), size=32)
    pq.write_table(pa.table({"image": cells[:1], "label": [None]}), tmp_path / "x.parquet")
    with pytest.raises(BadData, match="row 1: 'None' is no label"):
        load_data(str(tmp_path), size=32)


@pytest.mark.parametrize(
    "votes",
    [["[", "0"], [float("nan")], [float("inf")], [-1.0], [0] * 11, [None], [[1]], "0", 1, [1e300]],
    ids=str,
)
def test_votes_that_are_no_counts(votes, tmp_path, faces):
    rows = {"image": [png(faces[0][0])], "label": [0], "ferplus_votes": [votes]}
    pq.write_table(pa.table(rows), tmp_path / "x.parquet")
    with pytest.raises(BadData, match=r"row 1: found the votes .*; needed are counts in FER\+'s order"):
        load_data(str(tmp_path), size=32)
    with pytest.raises(BadData, match="1 could not be read"):
        load_data(str(tmp_path), size=32, skip_bad=True)


def test_text_in_a_table_that_is_no_utf_8(tmp_path, faces):
    split = pa.array([b"\xf4"]).view(pa.string())
    pq.write_table(pa.table({"image": [png(faces[0][0])], "label": [0], "split": split}), tmp_path / "x.parquet")
    with pytest.raises(BadData, match="cannot be read as Parquet"):
        load_data(str(tmp_path), size=32)


def test_pictures_of_a_tree_that_would_be_waited_for(tree):
    os.mkfifo(tree / "train" / "sad" / "pipe.png")
    with pytest.raises(BadData, match=r"pipe\.png: this is no file, but a device or a pipe"):
        load_data(str(tree), size=32)


def test_shards_of_a_published_set_are_one_split(tmp_path, faces):
    for shard, rows in enumerate((slice(0, 35), slice(35, 70))):
        table = pa.table({"image": [png(image) for image in faces[0][rows]], "label": faces[1][rows]})
        pq.write_table(table, tmp_path / f"train-0000{shard}-of-00002.parquet")
    assert len(load_data(str(tmp_path), size=32).splits["train"]) == 70


def test_what_only_looks_like_a_picture_and_what_is_hidden(tree):
    (tree / "train" / "sad" / "._0.png").write_bytes(b"made by a file manager")
    (tree / "train" / ".ipynb_checkpoints").mkdir()
    assert len(load_data(str(tree), size=32).splits["train"]) == 14
    (tree / "train" / "sad" / "folder.png").mkdir()
    with pytest.raises(BadData, match=r"folder\.png: this file cannot be read"):
        load_data(str(tree), size=32)
    assert len(load_data(str(tree), size=32, skip_bad=True).skipped) == 1


def test_parquet_without_the_columns(tmp_path):
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "x.parquet")
    with pytest.raises(BadData, match="picture"):
        load_data(str(tmp_path), size=32)


def split(images: list[int], labels: list[int]) -> Faces:
    """Faces of two grey values, so that they are not constant, told apart by the first."""
    pictures = np.zeros((len(images), 4, 4, 1), dtype=np.uint8)
    for row, value in enumerate(images):
        pictures[row, 0, 0] = value
    return Faces(images=pictures, labels=np.array(labels), flagged=np.zeros(len(images), dtype=bool))


def test_clean_rows():
    data = DataSet(
        source="x",
        splits={
            #              first, copy, blank, conflict with test
            "train": split([1, 1, 0, 5, 6], [0, 0, 1, 2, 3]),
            #             leak, first, copy, conflict, new
            "test": split([1, 7, 7, 5, 9], [0, 4, 4, 3, 6]),
        },
    )
    clean = clean_rows(data)
    assert clean["train"].tolist() == [True, False, False, False, True]
    assert clean["test"].tolist() == [False, True, False, False, True]
