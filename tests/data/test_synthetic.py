import json

import numpy as np
import pytest
from scipy.io import loadmat

from retinaface.data.annotations import DIFFICULTIES, load_split, read_difficulty, read_image
from retinaface.data.synthetic import MARKER, subsets_of, write_synthetic_root
from retinaface.data.synthetic_photo import Attributes, render_photo
from retinaface.errors import InputError
from retinaface.evaluation.wider_ap import evaluate_predictions

SIZE = 160


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def one_root(tmp_path_factory):
    """6 training and 12 validation photos of seed 4."""
    return write_synthetic_root(tmp_path_factory.mktemp("deep") / "deep" / "root", train=6, val=12, size=SIZE, seed=4)


def test_root_reads_back_as_rendered(one_root):
    for split, number, count in (("train", 0, 6), ("val", 1, 12)):
        samples = load_split(one_root, split)
        assert len(samples) == count
        for index, sample in enumerate(samples):
            photo = render_photo(np.random.default_rng((4, number, index)), size=SIZE)
            image = read_image(sample.path)
            assert image.shape == (SIZE, SIZE, 3)
            assert np.abs(image.astype(int) - photo.image).mean() < 25  # JPEG of a noisy picture
            np.testing.assert_array_equal(sample.boxes, photo.boxes)
            np.testing.assert_allclose(sample.landmarks, photo.landmarks, atol=1e-3)
            np.testing.assert_array_equal(sample.counted["all"], photo.visible >= np.float32(0.3))
            for subset, counted in subsets_of(photo.boxes, photo.visible, photo.attributes).items():
                if split == "val":
                    np.testing.assert_array_equal(sample.counted[subset], counted)
    assert [path.name for path in one_root.parent.iterdir()] == ["root"]  # no scratch folder stays


def test_same_seed_same_bytes_other_seed_other_photos(tmp_path):
    first = contents(write_synthetic_root(tmp_path / "a", train=2, val=1, size=64, seed=1))
    assert contents(write_synthetic_root(tmp_path / "b", train=2, val=1, size=64, seed=1)) == first
    other = contents(write_synthetic_root(tmp_path / "c", train=2, val=1, size=64, seed=2))
    assert all(other[name] != content for name, content in first.items() if name.endswith(".jpg"))


def test_processes_change_nothing(tmp_path):
    one, two = (write_synthetic_root(tmp_path / str(n), train=9, val=8, size=64, processes=n) for n in (1, 2))
    assert contents(one) == contents(two)


def test_text_files_hold_the_official_attributes(one_root):
    for split, number, count in (("train", 0, 6), ("val", 1, 12)):
        lines = (one_root / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt").read_text().splitlines()
        for index in range(count):
            photo = render_photo(np.random.default_rng((4, number, index)), size=SIZE)
            name, faces = lines.pop(0), int(lines.pop(0))
            assert name == f"0--Synthetic/0_Synthetic_{split}_{index:05d}.jpg"
            rows = [list(map(int, lines.pop(0).split())) for _ in range(faces or 1)]
            assert faces == len(photo.boxes)
            if faces:
                np.testing.assert_array_equal(np.array(rows)[:, 4:], photo.attributes)
            else:
                assert rows == [[0] * 10]
        assert not lines


def test_subsets_are_nested_and_follow_the_rule():
    heights = np.array([9, 10, 24, 25, 49, 50, 50, 50, 50, 50, 50, 50])
    visible = np.array([1, 1, 1, 1, 1, 1, 0.7, 0.69, 0.49, 0.2, 1, 1], dtype=np.float32)
    boxes = np.stack([heights * 0, heights * 0, heights, heights], axis=1).astype(np.float32)
    attributes = np.zeros((12, 6), dtype=np.int64)
    attributes[9] = Attributes(0, 0, 0, invalid=1, occlusion=2, pose=0)
    attributes[10] = Attributes(blur=2, expression=0, illumination=0, invalid=0, occlusion=0, pose=0)
    attributes[11] = Attributes(blur=1, expression=1, illumination=1, invalid=0, occlusion=0, pose=1)
    subsets = subsets_of(boxes, visible, attributes)
    assert np.flatnonzero(subsets["easy"]).tolist() == [5, 6]
    assert np.flatnonzero(subsets["medium"]).tolist() == [3, 4, 5, 6, 7, 11]
    assert np.flatnonzero(subsets["hard"]).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11]


def test_subsets_of_many_photos_differ_in_size(tmp_path):
    samples = load_split(write_synthetic_root(tmp_path / "root", train=1, val=40, size=320), "val")
    easy, medium, hard, valid = (
        sum(sample.counted[subset].sum() for sample in samples) for subset in (*DIFFICULTIES, "all")
    )
    assert 5 < easy < medium < hard < valid < sum(len(sample.boxes) for sample in samples)
    assert sum(np.isfinite(sample.landmarks).all(axis=(1, 2)).sum() for sample in samples) >= valid


def kinds(value):
    """The nesting of a MATLAB file: of cells, their size and what the first one that is not empty holds."""
    if value.dtype != object:
        return "text" if value.dtype.kind == "U" else f"{value.dtype.kind}, {value.ndim} dimensions"
    first = next((cell for cell in value[:, 0] if cell.size), value[0, 0])
    return [value.shape[1], kinds(first)]


@pytest.mark.reference
def test_mat_files_are_nested_like_the_official_ones(one_root, reference):
    official = reference / "wider_val"
    for name in ("face", *DIFFICULTIES):
        theirs, ours = (
            loadmat(folder / f"wider_{name}_val.mat") for folder in (official, one_root / "wider_face_split")
        )
        assert ours.keys() == theirs.keys()
        for key in theirs:
            if not key.startswith("__"):
                assert kinds(ours[key]) == kinds(theirs[key]), key


def test_evaluator_gives_perfect_detections_full_marks(one_root, tmp_path):
    truth = one_root / "wider_face_split"
    for name, faces in read_difficulty(truth).items():
        file = tmp_path / f"{name}.txt"
        file.parent.mkdir(exist_ok=True)
        rows = [f"{x1} {y1} {x2 - x1} {y2 - y1} 0.9" for x1, y1, x2, y2 in faces.boxes.tolist()]
        file.write_text("\n".join([name, str(len(rows) + 1), "0 0 2 2 0.1", *rows]) + "\n")
    result = evaluate_predictions(tmp_path, truth)
    assert result["medium"] == pytest.approx(1, abs=2e-3)  # 1000 thresholds
    assert result["hard"] == pytest.approx(1, abs=2e-3)


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

    monkeypatch.setattr("retinaface.data.synthetic.render_photo", fail)
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
