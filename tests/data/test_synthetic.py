import json

import numpy as np
import pytest

from retinaface.data.annotations import load_split, read_image
from retinaface.data.synthetic import MARKER, render_photo, write_synthetic_root
from retinaface.errors import InputError


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_root_reads_back_as_rendered(tmp_path):
    root = write_synthetic_root(tmp_path / "deep" / "root", train=6, val=3, size=96, seed=4)
    for split, number, count in (("train", 0, 6), ("val", 1, 3)):
        samples = load_split(root, split)
        assert len(samples) == count
        for index, sample in enumerate(samples):
            photo = render_photo(np.random.default_rng((4, number, index)), size=96)
            image = read_image(sample.path)
            assert image.shape == (96, 96, 3)
            assert np.abs(image.astype(int) - photo.image).mean() < 25  # JPEG of a noisy picture
            np.testing.assert_array_equal(sample.boxes, photo.boxes)
            np.testing.assert_allclose(sample.landmarks, photo.landmarks, atol=1e-3)
            assert sample.counted["all"].all()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["root"]  # no scratch folder stays


def test_same_seed_same_bytes_other_seed_other_photos(tmp_path):
    first = contents(write_synthetic_root(tmp_path / "a", train=2, val=1, size=64, seed=1))
    assert contents(write_synthetic_root(tmp_path / "b", train=2, val=1, size=64, seed=1)) == first
    other = contents(write_synthetic_root(tmp_path / "c", train=2, val=1, size=64, seed=2))
    assert all(other[name] != content for name, content in first.items() if name.endswith(".jpg"))


def test_photos_are_varied_and_faces_are_drawn_where_they_are_annotated():
    counts, heights, contrasts = [], [], []
    for index in range(60):
        photo = render_photo(np.random.default_rng(index), size=320)
        counts.append(len(photo.boxes))
        for box, points in zip(photo.boxes, photo.landmarks, strict=True):
            assert (box[:2] >= 0).all()
            assert (box[2:] <= 320).all()
            assert ((points > box[:2]) & (points < box[2:])).all()
            assert points[0, 0] < points[1, 0]
            assert points[3, 0] < points[4, 0]
            heights.append(box[3] - box[1])
            if heights[-1] > 60:  # an eye differs from the skin below it
                x, y = points[0].astype(int)
                below = y + int(heights[-1] * 0.2)
                skin = photo.image[below : below + 2, x].mean()
                contrasts.append(abs(float(photo.image[y - 1 : y + 2, x - 1 : x + 2].mean()) - skin))
    assert 0 in counts
    assert max(counts) >= 5
    assert min(heights) < 20
    assert max(heights) > 120
    assert np.median(contrasts) > 15


def test_complete_root_is_kept_and_other_settings_replace_it(tmp_path):
    root = write_synthetic_root(tmp_path / "root", train=2, val=1, size=64)
    photo = load_split(root, "train")[0].path
    before = photo.stat().st_mtime_ns
    write_synthetic_root(root, train=2, val=1, size=64)
    assert photo.stat().st_mtime_ns == before
    write_synthetic_root(root, train=3, val=1, size=64)
    assert len(load_split(root, "train")) == 3
    assert json.loads((root / MARKER).read_text())["train"] == 3


def test_interrupted_rendering_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("retinaface.data.synthetic._develop", fail)
    with pytest.raises(KeyboardInterrupt):
        write_synthetic_root(tmp_path / "root", train=2, val=1, size=64)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    write_synthetic_root(root, train=1, val=1, size=64)  # an empty folder may be filled
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "mine", tmp_path / "file"):
        with pytest.raises(InputError, match="not rendered"):
            write_synthetic_root(path, train=1, val=1, size=64)
    assert (tmp_path / "mine" / "diary.txt").read_text() == "dear diary"


@pytest.mark.parametrize("wrong", [{"train": 0}, {"val": 0}, {"size": 10}, {"seed": -1}])
def test_impossible_numbers(tmp_path, wrong):
    with pytest.raises(InputError, match="train >= 1"):
        write_synthetic_root(tmp_path / "root", **{"train": 1, "val": 1, **wrong})
