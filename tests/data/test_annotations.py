from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.io import savemat

from retinaface.data.annotations import load_split, read_difficulty, read_image, read_label_txt, read_wider
from retinaface.errors import InputError

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the optional ../shared/reference is absent")
IMAGES = Path("images")
FACE = "1 2 10 20 0 0 0 0 0 0"
POINTS = "3 4 0.0 8 4 0.0 5 9 0.0 4 15 0.0 8 15 0.0 0.9"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def write_photo(path: Path, shape=(40, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    cv2.imwrite(str(path), picture)
    return path


def cells(values: list) -> np.ndarray:
    """A MATLAB cell column."""
    column = np.empty((len(values), 1), dtype=object)
    column[:, 0] = values
    return column


def write_difficulty(folder: Path, photos: dict[str, tuple[list, dict[str, list[int]]]]) -> None:
    """The four official files for one event, ``a``; indices start at 1."""
    folder.mkdir(parents=True, exist_ok=True)
    common = {
        "event_list": cells(["a"]),
        "file_list": cells([cells(list(photos))]),
        "face_bbx_list": cells([cells([np.array(boxes, dtype=np.int32) for boxes, _ in photos.values()])]),
    }
    savemat(folder / "wider_face_val.mat", common)
    for subset in ("easy", "medium", "hard"):
        indices = cells([np.array(lists[subset], dtype=np.uint8).reshape(-1, 1) for _, lists in photos.values()])
        savemat(folder / f"wider_{subset}_val.mat", {**common, "gt_list": cells([indices])})


def test_official_rows_become_corners_and_flags(tmp_path):
    text = f"a/one.jpg\n3\n{FACE}\n5 6 7 8 2 1 1 1 2 1\n5 6 0 8 0 0 0 0 0 0\nb/two.x.jpg\n1\n{FACE}\n"
    one, two = read_wider(write(tmp_path / "gt.txt", text), IMAGES)
    assert one.path == IMAGES / "a" / "one.jpg"
    assert (one.name, two.name) == ("a/one", "b/two.x")
    np.testing.assert_array_equal(one.boxes, [[1, 2, 11, 22], [5, 6, 12, 14], [5, 6, 5, 14]])
    assert one.boxes.dtype == np.float32
    assert one.counted["all"].tolist() == [True, False, False]  # fine, flagged invalid, no width
    assert one.landmarks.shape == (3, 5, 2)
    assert np.isnan(one.landmarks).all()


@pytest.mark.parametrize("dummy", ["", "0 0 0 0 0 0 0 0 0 0 \n"], ids=["without", "with"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_photo_without_faces_with_or_without_its_dummy_row(tmp_path, dummy, newline):
    text = f"a/none.jpg  \n0\n{dummy}\n\na/one.jpg\n1 \n{FACE} \n\n".replace("\n", newline)
    none, one = read_wider(write(tmp_path / "gt.txt", text), IMAGES)
    assert none.boxes.shape == (0, 4)
    assert none.landmarks.shape == (0, 5, 2)
    assert none.counted["all"].shape == (0,)
    assert one.name == "a/one"
    assert len(one.boxes) == 1


def test_boxes_beyond_the_photo_and_byte_order_mark_are_kept_and_dropped(tmp_path):
    (sample,) = read_wider(write(tmp_path / "gt.txt", "\ufeffa/one.jpg\n1\n-5 -6 9000 20\n"), IMAGES)
    assert sample.name == "a/one"
    np.testing.assert_array_equal(sample.boxes, [[-5, -6, 8995, 14]])
    assert sample.counted["all"].all()


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("a/one.jpg\nmany\n", 2, "number of faces"),
        ("a/one.jpg\n-1\n", 2, "number of faces"),
        ("a/one.jpg\n", 1, "number of faces"),
        ("a/one.jpg\n1\n1 2 three 4\n", 3, "x y width height"),
        ("a/one.jpg\n1\n1 2 nan 4\n", 3, "x y width height"),
        ("a/one.jpg\n1\n1 2 3\n", 3, "x y width height"),
        (f"a/one.jpg\n2\n{FACE}\n", 1, "ends after 1"),
        (f"a/one.jpg\n2\n{FACE}\nb/two.jpg\n1\n{FACE}\n", 4, "x y width height"),
        (f"a/one.jpg\n1\n{FACE}\n{FACE}\nb/two.jpg\n", 4, "number of faces of the photo above"),
    ],
)
def test_malformed_official_file_names_the_line(tmp_path, text, line, expected):
    file = write(tmp_path / "gt.txt", text)
    with pytest.raises(InputError, match=expected) as error:
        read_wider(file, IMAGES)
    assert str(error.value).startswith(f"{file}:{line}: ")
    assert "\n" not in str(error.value)


def test_label_rows_with_and_without_landmarks(tmp_path):
    absent = " ".join(["-1.0"] * 15)
    text = f"# a/one.jpg\n1 2 10 20 {POINTS}\n1 2 10 20 {absent} 0.1\n\n# a/none.jpg\r\n# b/two.jpg\n1 2 0 4\n"
    one, none, two = read_label_txt(write(tmp_path / "label.txt", text), IMAGES)
    np.testing.assert_array_equal(one.landmarks[0], [[3, 4], [8, 4], [5, 9], [4, 15], [8, 15]])
    assert np.isnan(one.landmarks[1]).all()
    assert one.counted["all"].all()
    assert len(none.boxes) == 0
    assert np.isnan(two.landmarks).all()
    assert not two.counted["all"].any()


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("1 2 3 4\n", 1, "before the first face"),
        ("# a/one.jpg\n1 2 3\n", 2, "expected 4 numbers"),
        ("# a/one.jpg\n\nx y\n", 3, "expected 4 numbers"),
        ("# a/one.jpg\n1 2 3 4 5 6 7 8 9 10 11 12 13 14\n", 2, "expected 4 numbers"),
    ],
)
def test_malformed_label_file_names_the_line(tmp_path, text, line, expected):
    file = write(tmp_path / "label.txt", text)
    with pytest.raises(InputError, match=expected) as error:
        read_label_txt(file, IMAGES)
    assert str(error.value).startswith(f"{file}:{line}: ")


@pytest.mark.parametrize("reader", [read_wider, read_label_txt])
def test_empty_absent_and_binary_annotation_files(tmp_path, reader):
    with pytest.raises(InputError, match="empty"):
        reader(write(tmp_path / "empty.txt", " \n\n"), IMAGES)
    with pytest.raises(InputError, match=r"absent\.txt: cannot be read"):
        reader(tmp_path / "absent.txt", IMAGES)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(InputError, match="UTF-8"):
        reader(tmp_path / "binary.txt", IMAGES)


def test_split_from_the_official_file(tmp_path):
    write(tmp_path / "wider_face_split" / "wider_face_train_bbx_gt.txt", f"a/one.jpg\n1\n{FACE}\n")
    photo = write_photo(tmp_path / "WIDER_train" / "images" / "a" / "one.jpg")
    (sample,) = load_split(tmp_path, "train")
    assert sample.path == photo
    assert read_image(sample.path).shape == (40, 60, 3)


@pytest.mark.parametrize("place", ["wider_face_split/label_train.txt", "WIDER_train/label.txt", "train/label.txt"])
def test_label_file_wins_but_the_official_flags_stay(tmp_path, place):
    write(tmp_path / "wider_face_split" / "wider_face_train_bbx_gt.txt", "a/one.jpg\n1\n5 6 7 8 2 0 0 1 2 0\n")
    write(tmp_path / place, f"# a/one.jpg\n1 2 10 20 {POINTS}\n5 6 7 8 {POINTS}\n")
    write_photo(tmp_path / "WIDER_train" / "images" / "a" / "one.jpg")
    (sample,) = load_split(str(tmp_path), "train")
    np.testing.assert_array_equal(sample.boxes, [[1, 2, 11, 22], [5, 6, 12, 14]])
    assert np.isfinite(sample.landmarks).all()
    assert sample.counted["all"].tolist() == [True, False]


@pytest.mark.parametrize("folder", ["", "wider_face_split", "ground_truth", "eval_tools/ground_truth"])
def test_difficulty_files_supply_boxes_and_counted_faces(tmp_path, folder):
    photos = {
        "one": ([[5, 6, 7, 8], [1, 2, 10, 20], [1, 1, 0, 4]], {"easy": [2], "medium": [1, 2], "hard": [1, 2]}),
        "absent": ([[1, 2, 3, 4]], {"easy": [], "medium": [], "hard": [1]}),
    }
    write_difficulty(tmp_path / folder, photos)
    photo = write_photo(tmp_path / "WIDER_val" / "images" / "a" / "one.jpg")
    (sample,) = load_split(tmp_path, "val")
    assert (sample.name, sample.path) == ("a/one", photo)
    np.testing.assert_array_equal(sample.boxes, [[5, 6, 12, 14], [1, 2, 11, 22], [1, 1, 1, 5]])
    assert {subset: mask.tolist() for subset, mask in sample.counted.items()} == {
        "all": [True, True, False],
        "easy": [False, True, False],
        "medium": [True, True, False],
        "hard": [True, True, False],
    }
    # Text annotations add landmarks and invalid flags to the boxes that they share.
    write(tmp_path / "wider_face_split" / "wider_face_val_bbx_gt.txt", "a/one.jpg\n1\n5 6 7 8 0 0 0 1 0 0\n")
    write(tmp_path / "wider_face_split" / "label_val.txt", f"# a/one.jpg\n1 2 10 20 {POINTS}\n5 6 7 8\n")
    (sample,) = load_split(tmp_path, "val")
    assert np.isfinite(sample.landmarks).all(axis=(1, 2)).tolist() == [False, True, False]
    assert sample.counted["all"].tolist() == [False, True, False]
    assert sample.counted["medium"].tolist() == [True, True, False]


def test_difficulty_of_a_photo_without_counted_faces(tmp_path):
    write_difficulty(tmp_path, {"one": ([[1, 2, 3, 4]], {"easy": [], "medium": [], "hard": []})})
    truth = read_difficulty(tmp_path)
    assert list(truth) == ["a/one"]
    assert not any(mask.any() for mask in truth["a/one"].counted.values())


def test_incomplete_difficulty_files(tmp_path):
    write_difficulty(tmp_path, {"one": ([[1, 2, 3, 4]], {"easy": [], "medium": [], "hard": []})})
    (tmp_path / "WIDER_val" / "images").mkdir(parents=True)
    with pytest.raises(InputError, match="none of the photos"):
        load_split(tmp_path, "val")
    (tmp_path / "wider_hard_val.mat").write_bytes((tmp_path / "wider_easy_val.mat").read_bytes()[:300])
    with pytest.raises(InputError, match=r"wider_hard_val\.mat: not a MATLAB file"):
        load_split(tmp_path, "val")
    (tmp_path / "wider_hard_val.mat").unlink()
    with pytest.raises(InputError, match=r"wider_hard_val\.mat: no such file"):
        load_split(tmp_path, "val")
    savemat(tmp_path / "wider_hard_val.mat", {"other": np.zeros(1)})
    with pytest.raises(InputError, match="lacks gt_list"):
        load_split(tmp_path, "val")


def test_missing_pieces_of_a_root(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        load_split(tmp_path / "nowhere", "train")
    with pytest.raises(InputError, match=r"WIDER_train/images: no such folder"):
        load_split(tmp_path, "train")
    write_photo(tmp_path / "WIDER_train" / "images" / "a" / "one.jpg")
    with pytest.raises(InputError, match=r"expected .*wider_face_train_bbx_gt\.txt or .*label_train\.txt"):
        load_split(tmp_path, "train")
    write(
        tmp_path / "wider_face_split" / "wider_face_train_bbx_gt.txt",
        f"a/one.jpg\n1\n{FACE}\na/two.jpg\n1\n{FACE}\na/three.jpg\n0\n",
    )
    with pytest.raises(InputError, match=r"two\.jpg and 1 more: listed in the annotations but absent"):
        load_split(tmp_path, "train")


def test_read_image_ignores_the_orientation_tag(tmp_path):
    plain = write_photo(tmp_path / "plain.jpg")
    content = plain.read_bytes()
    # An EXIF block that says "turn by 90 degrees": boxes refer to the stored pixels.
    tiff = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    exif = b"Exif\0\0" + tiff
    turned = tmp_path / "turned.jpg"
    turned.write_bytes(content[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + content[2:])
    assert cv2.imread(str(turned)).shape == (60, 40, 3)  # the tag is seen by who looks for it
    np.testing.assert_array_equal(read_image(turned), read_image(plain))


def test_read_image_is_bgr_with_three_channels(tmp_path):
    blue = np.zeros((8, 8, 3), dtype=np.uint8)
    blue[..., 0] = 255
    cv2.imwrite(str(tmp_path / "blue.png"), blue)
    cv2.imwrite(str(tmp_path / "grey.png"), blue[..., 0])
    np.testing.assert_array_equal(read_image(tmp_path / "blue.png"), blue)
    assert read_image(tmp_path / "grey.png").shape == (8, 8, 3)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize("kept", [0.0, 0.05, 0.6, 0.99])
def test_truncated_pictures_are_refused(tmp_path, suffix, kept):
    photo = write_photo(tmp_path / f"photo{suffix}", shape=(120, 160))
    content = photo.read_bytes()
    photo.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(InputError) as error:
        read_image(photo)
    assert str(photo) in str(error.value)
    assert "\n" not in str(error.value)


def test_end_marker_of_a_thumbnail_does_not_hide_a_truncation(tmp_path):
    content = write_photo(tmp_path / "photo.jpg").read_bytes()
    thumbnail = write_photo(tmp_path / "small.jpg", shape=(8, 8)).read_bytes()
    with_thumbnail = content[:2] + b"\xff\xe2" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail + content[2:]
    (tmp_path / "photo.jpg").write_bytes(with_thumbnail)
    assert read_image(tmp_path / "photo.jpg").shape == (40, 60, 3)
    (tmp_path / "photo.jpg").write_bytes(with_thumbnail[:-100])
    with pytest.raises(InputError, match="truncated"):
        read_image(tmp_path / "photo.jpg")


def test_bytes_after_the_end_of_a_jpeg_are_fine(tmp_path):
    photo = write_photo(tmp_path / "photo.jpg")
    before = read_image(photo)
    photo.write_bytes(photo.read_bytes() + b"\0" * 500)
    np.testing.assert_array_equal(read_image(photo), before)


def test_what_is_no_picture(tmp_path):
    with pytest.raises(InputError, match=r"absent\.jpg: cannot be read"):
        read_image(tmp_path / "absent.jpg")
    with pytest.raises(InputError, match=r"page\.jpg: not a readable picture"):
        read_image(write(tmp_path / "page.jpg", "<html>quota exceeded</html>"))


@pytest.mark.reference
@needs_reference
def test_reference_roots():
    sizes = {split: load_split(REFERENCE / "masks_wider", split) for split in ("train", "val")}
    assert {split: (len(samples), sum(len(s.boxes) for s in samples)) for split, samples in sizes.items()} == {
        "train": (480, 2391),
        "val": (120, 574),
    }
    official = load_split(REFERENCE / "wider_val", "val")
    assert len(official) == 67
    assert set(official[0].counted) == {"all", "easy", "medium", "hard"}
    truth = read_difficulty(REFERENCE / "wider_val")
    totals = {subset: sum(photo.counted[subset].sum() for photo in truth.values()) for subset in ("easy", "hard")}
    assert (len(truth), totals) == (3226, {"easy": 7211, "hard": 31958})  # the published numbers of faces
