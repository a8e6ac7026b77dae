import cv2
import numpy as np
import pytest
from rich.console import Console

from retinaface.data.check import EventCount, check_root, check_tables
from retinaface.errors import InputError


def write_photo(path, height=100, width=200):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    return path


def write_split(root, split, photos):
    """A split of photos, 200 pixels wide and 100 high, and the rows ``x y w h [invalid]`` of their faces."""
    text = ""
    for name, rows in photos.items():
        write_photo(root / f"WIDER_{split}" / "images" / name)
        text += f"{name}\n{len(rows)}\n"
        text += "".join(f"{x} {y} {w} {h} 0 0 0 {invalid[0] if invalid else 0} 0 0\n" for x, y, w, h, *invalid in rows)
    (root / "wider_face_split").mkdir(exist_ok=True)
    (root / "wider_face_split" / f"wider_face_{split}_bbx_gt.txt").write_text(text)


def printed(checks):
    console = Console(width=200, record=True)
    for table in check_tables(checks):
        console.print(table)
    return console.export_text()


def test_every_face_is_counted_where_it_belongs(tmp_path):
    photos = {
        "a/one.jpg": [
            (0, 0, 7, 90),  # the shorter side decides: below 8
            (0, 0, 8, 8),
            (184, 84, 16, 16),  # up to the very edge
            (185, 0, 16, 20),  # one pixel beyond
            (-1, 0, 300, 300),
            (200, 5, 20, 20),  # wholly outside
            (5, -30, 30, 30),
            (10, 10, 0, 9),
            (10, 10, 30, 30, 1),
        ],
        "a/two.jpg": [],
        "b/three.jpg": [(10, 10, 9, 0), (20, 20, 40, 40, 1)],
    }
    write_split(tmp_path, "train", photos)
    (check,) = check_root(tmp_path)
    assert (check.split, check.photos, check.photos_without_faces) == ("train", 3, 2)
    assert (check.annotated, check.faces, check.without_size, check.invalid) == (11, 7, 2, 2)
    assert check.beyond_photo == 4
    assert check.outside_photo == [f"{tmp_path / 'WIDER_train' / 'images' / 'a' / 'one.jpg'}: 2"]
    assert check.sizes == {
        "below 8 px": 1,
        "8-16 px": 1,
        "16-32 px": 4,
        "32-64 px": 0,
        "64-128 px": 0,
        "128-256 px": 0,
        "256 px and more": 1,
    }
    assert sorted(check.short_sides) == [7, 8, 16, 16, 20, 30, 300]
    assert check.events == {"a": EventCount(2, 7), "b": EventCount(1, 0)}
    assert (check.absent, check.unlisted, check.unreadable, check.broken, check.subsets) == ([], [], [], [], {})


def test_broken_files_are_named(tmp_path):
    write_split(tmp_path, "train", {f"a/{name}.jpg": [(1, 1, 20, 20)] for name in ("good", "cut", "page", "gone")})
    images = tmp_path / "WIDER_train" / "images" / "a"
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:-300])
    (images / "page.jpg").write_text("<html>quota exceeded</html>")
    (images / "gone.jpg").unlink()
    write_photo(images / "new.png")
    (check,) = check_root(str(tmp_path))
    assert check.absent == [str(images / "gone.jpg")]
    assert check.unlisted == ["a/new.png"]
    assert [line.split(": ")[0] for line in check.unreadable] == [str(images / "cut.jpg"), str(images / "page.jpg")]
    assert "truncated" in check.unreadable[0]
    assert "not a picture" in check.unreadable[1]
    assert len(check.broken) == 3
    # Whether faces reach beyond a photo that cannot be read is not known.
    assert (check.photos, check.faces, check.beyond_photo, check.outside_photo) == (3, 3, 0, [])


def test_a_split_of_which_every_photo_is_gone(tmp_path):
    write_split(tmp_path, "train", {"one.jpg": [(1, 1, 20, 20)]})
    (tmp_path / "WIDER_train" / "images" / "one.jpg").unlink()
    (check,) = check_root(tmp_path)
    assert (check.photos, check.faces, len(check.broken)) == (0, 0, 1)
    assert "0" in printed([check])


def test_landmarks_both_splits_and_the_tables(tiny_root):
    checks = check_root(tiny_root)
    train, val = checks
    assert (train.split, train.photos, val.split, val.photos) == ("train", 8, "val", 5)
    assert train.with_landmarks == train.faces > 0
    assert not train.broken
    text = printed(checks)
    assert f"{train.faces:,}" in text
    assert "with five landmarks" in text
    assert "0--Synthetic" in text
    assert "train photos" in text


def test_many_events_are_cut_to_those_with_most_faces(tmp_path):
    rows = [(1, 1, 20, 20)]
    write_split(tmp_path, "train", {f"event{n:03}/one.jpg": rows * (n + 1) for n in range(103)} | {"top.jpg": []})
    text = printed(check_root(tmp_path))
    assert "event102" in text
    assert "event003" in text
    assert "event002" not in text
    (others,) = (line for line in text.splitlines() if "4 others" in line)
    assert [cell.strip() for cell in others.strip("│").split("│")] == ["4 others", "4", "6"]


def test_official_photos_that_are_absent_are_no_fault(write_difficulty, tmp_path):
    faces = [[5, 6, 7, 8], [1, 2, 10, 20], [1, 1, 0, 4]]
    photos = {
        "one": (faces, {"easy": [2], "medium": [1, 2], "hard": [1, 2]}),
        "gone": (faces, {"easy": [2], "medium": [1, 2], "hard": [1, 2]}),
    }
    write_difficulty(tmp_path, photos)
    write_photo(tmp_path / "WIDER_val" / "images" / "a" / "one.jpg")
    (check,) = check_root(tmp_path)
    assert check.subsets == {"easy": 1, "medium": 2, "hard": 2}
    assert len(check.absent) == 1
    assert check.broken == []
    assert "easy by the .mat files" in printed([check])
    (tmp_path / "WIDER_val" / "images" / "a" / "one.jpg").unlink()
    (check,) = check_root(tmp_path)
    assert len(check.broken) == 2  # but without any there is nothing to evaluate on


def test_what_is_no_data_root(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        check_root(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"WIDER_train/images: no such folder"):
        check_root(tmp_path)
    (tmp_path / "WIDER_val" / "images").mkdir(parents=True)
    with pytest.raises(InputError, match="no annotations for val"):
        check_root(tmp_path)


@pytest.mark.reference
def test_reference_root(reference):
    checks = check_root(reference / "masks_wider")
    assert [(check.photos, check.annotated) for check in checks] == [(480, 2391), (120, 574)]
    assert not any(check.broken for check in checks)
