import shutil

import numpy as np
import pytest

from retinaface.data import split_cache
from retinaface.data.annotations import load_split
from retinaface.data.split_cache import load_cached_split
from retinaface.errors import InputError


@pytest.fixture
def root(tiny_root, tmp_path):
    """A root that a test may change."""
    return shutil.copytree(tiny_root, tmp_path / "root")


@pytest.fixture
def parses(monkeypatch):
    """A list that grows by the split's name each time that annotations are parsed."""
    calls = []

    def counted(root, split):
        calls.append(split)
        return original(root, split)

    original = split_cache.read_split
    monkeypatch.setattr(split_cache, "read_split", counted)
    return calls


def assert_same(samples, expected):
    assert len(samples) == len(expected) > 0
    for one, two in zip(samples, expected, strict=True):
        assert (one.path, one.name, one.counted.keys()) == (two.path, two.name, two.counted.keys())
        for ours, theirs in ((one.boxes, two.boxes), (one.landmarks, two.landmarks)):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            np.testing.assert_array_equal(ours, theirs)
        for subset, mask in one.counted.items():
            assert mask.dtype == bool
            np.testing.assert_array_equal(mask, two.counted[subset])


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_second_time_nothing_is_parsed_and_all_is_the_same(root, tmp_path, parses, split):
    folder = tmp_path / "runs" / "new"
    expected = load_split(root, split)
    assert any(len(sample.boxes) for sample in expected)
    assert_same(load_cached_split(root, split, folder), expected)
    assert_same(load_cached_split(str(root), split, str(folder)), expected)
    assert parses == [split]
    assert [path.name for path in folder.iterdir()] == [f"annotations_{split}.npz"]


def test_data_may_move(root, tmp_path, parses):
    load_cached_split(root, "train", tmp_path)
    moved = root.rename(tmp_path / "elsewhere")
    assert_same(load_cached_split(moved, "train", tmp_path), load_split(moved, "train"))
    assert parses == ["train"]


def test_official_difficulties_are_kept_and_their_warning_is_given_again(
    write_difficulty, root, tmp_path, parses, caplog
):
    first_only = {"easy": [], "medium": [1], "hard": [1]}
    names = [sample.name.split("/")[1] for sample in load_split(root, "val")]
    photos = {name: ([[1, 2, 30, 40], [5, 6, 7, 8]], first_only) for name in [*names, "absent"]}
    write_difficulty(root, photos, event="0--Synthetic")
    for _ in range(2):
        caplog.clear()
        samples = load_cached_split(root, "val", tmp_path)
        assert "5 of the 6 official photos" in caplog.text
    assert parses == ["val"]
    assert set(samples[0].counted) == {"all", "easy", "medium", "hard"}
    assert_same(samples, load_split(root, "val"))
    # Another subset alone is other content.
    (root / "wider_hard_val.mat").write_bytes((root / "wider_face_val.mat").read_bytes())
    with pytest.raises(InputError, match="lacks gt_list"):
        load_cached_split(root, "val", tmp_path)


def edit_a_box(root):
    file = root / "wider_face_split" / "label_train.txt"
    lines = file.read_text().splitlines()
    at = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    lines[at] = " ".join(["1", *lines[at].split()[1:]])
    file.write_text("\n".join(lines))


def add_a_photo(root):
    photo = next((root / "WIDER_train" / "images").rglob("*.jpg"))
    shutil.copy(photo, photo.with_name("new.jpg"))


def remove_the_landmarks(root):
    (root / "wider_face_split" / "label_train.txt").unlink()


@pytest.mark.parametrize("change", [edit_a_box, add_a_photo, remove_the_landmarks])
def test_changed_content_is_parsed_anew(root, tmp_path, parses, change):
    load_cached_split(root, "train", tmp_path)
    change(root)
    assert_same(load_cached_split(root, "train", tmp_path), load_split(root, "train"))
    load_cached_split(root, "train", tmp_path)
    assert parses == ["train"] * 2


def test_touching_the_files_changes_nothing(root, tmp_path, parses):
    load_cached_split(root, "train", tmp_path)
    for file in (root / "wider_face_split").iterdir():
        file.write_bytes(file.read_bytes())
    load_cached_split(root, "train", tmp_path)
    assert parses == ["train"]


def damage(file, how):
    content = file.read_bytes()
    if how == "another array":
        with np.load(file) as stored:
            kept = {name: stored[name] for name in stored.files if name != "boxes"}
        np.savez(file, **kept | {"key": np.array(["something else"])})
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        file.write_bytes({"empty": b"", "truncated": content[:-300], "a byte": flipped, "no zip": b"x" * 500}[how])


@pytest.mark.parametrize("how", ["empty", "truncated", "a byte", "no zip", "another array"])
def test_a_damaged_file_is_replaced(root, tmp_path, parses, how):
    load_cached_split(root, "train", tmp_path)
    damage(tmp_path / "annotations_train.npz", how)
    assert_same(load_cached_split(root, "train", tmp_path), load_split(root, "train"))
    load_cached_split(root, "train", tmp_path)
    assert parses == ["train"] * 2


def test_a_pickle_is_not_opened(root, tmp_path):
    np.savez(tmp_path / "annotations_train.npz", key=np.array([{"harm": 1}], dtype=object))
    assert_same(load_cached_split(root, "train", tmp_path), load_split(root, "train"))


def test_where_nothing_can_be_written_it_still_loads(root, tmp_path):
    (tmp_path / "file").touch()
    assert_same(load_cached_split(root, "train", tmp_path / "file" / "folder"), load_split(root, "train"))


def test_a_missing_photo_is_an_error_each_time(root, tmp_path):
    load_cached_split(root, "train", tmp_path)
    next((root / "WIDER_train" / "images").rglob("*.jpg")).unlink()
    for _ in range(2):
        with pytest.raises(InputError, match="listed in the annotations but absent"):
            load_cached_split(root, "train", tmp_path)
