from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.io import savemat

from retinaface.data.annotations import (
    annotation_files,
    evenly_spread,
    find_photos,
    load_split,
    load_unlabelled,
    read_difficulty,
    read_image,
    read_label_txt,
    read_split,
    read_wider,
)
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
        ("a/one.jpg\n1\n1 2 nan 4\n", 3, "not all numbers are finite"),
        ("a/one.jpg\n1\n1 2 3\n", 3, "x y width height"),
        (f"a/one.jpg\n2\n{FACE}\n", 1, "ends after 1"),
        (f"a/one.jpg\n2\n{FACE}\nb/two.jpg\n1\n{FACE}\n", 4, "x y width height"),
        (f"a/one.jpg\n1\n{FACE}\n{FACE}\nb/two.jpg\n", 4, "number of faces of the photo above"),
        (f"a/one.jpg\n0\n{FACE}\n", 3, "should have none"),
        ("a/one.jpg\n2\n1 2 3 4\n\n1 2 1e39 4\n", 5, "not all numbers are finite"),
        (f"../one.jpg\n1\n{FACE}\n", 1, "within the images folder"),
        (f"a/one.jpg\r\n1\r\n{FACE}\r\na\\..\\..\\one.jpg\r\n0\r\n", 4, "within the images folder"),
        (f"/etc/one.jpg\n1\n{FACE}\n", 1, "within the images folder"),
        (f"C:\\photos\\one.jpg\n1\n{FACE}\n", 1, "within the images folder"),
        (f"a/one.jpg\n1\n{FACE}\nb.jpg\n0\n./a/one.jpg\n2\n{FACE}\n{FACE}\n", 6, "other faces than in line 1"),
        (f"a/one.jpg\n1\n{FACE}\na/one.jpg\n1\n1 2 10 20 0 0 0 1 0 0\n", 4, "other faces than in line 1"),
        (f"a/one.jpg\n1\n{FACE}\na/one.png\n1\n{FACE}\n", 4, "of line 1 are told apart by their suffix"),
    ],
)
def test_malformed_official_file_names_the_line(tmp_path, text, line, expected):
    file = write(tmp_path / "gt.txt", text)
    with pytest.raises(InputError, match=expected) as error:
        read_wider(file, IMAGES)
    assert str(error.value).startswith(f"{file}:{line}: ")
    assert "\n" not in str(error.value)


def test_a_photo_listed_twice_with_the_same_faces_is_kept_once(tmp_path, caplog):
    text = f"a/one.jpg\n1\n{FACE}\nb/two.jpg\n0\n" * 2
    file = write(tmp_path / "gt.txt", text)
    assert [(sample.name, len(sample.boxes)) for sample in read_wider(file, IMAGES)] == [("a/one", 1), ("b/two", 0)]
    assert caplog.messages == [
        f"{file}:6: a/one is listed again, as in line 1; kept once",
        f"{file}:9: b/two is listed again, as in line 4; kept once",
    ]
    text = f"# a/one.jpg\n1 2 10 20 {POINTS}\n1 2 10 20\n" * 2
    (sample,) = read_label_txt(write(tmp_path / "label.txt", text), IMAGES)
    assert sample.boxes.shape == (2, 4)


@pytest.mark.parametrize("name", ["./a/one.jpg", "a\\one.jpg", ".\\a/one.jpg", "a//one.jpg"])
def test_paths_are_written_in_many_ways(tmp_path, name):
    (wider,) = read_wider(write(tmp_path / "gt.txt", f"{name}\n1\n{FACE}\n"), IMAGES)
    (label,) = read_label_txt(write(tmp_path / "label.txt", f"#{name} \n1 2 3 4\n"), IMAGES)
    assert {(sample.name, sample.path) for sample in (wider, label)} == {("a/one", IMAGES / "a" / "one.jpg")}


def test_names_beyond_ascii_with_spaces_and_rare_characters(tmp_path):
    names = [
        "Straße 1/Café mit Ä.jpg",
        "写真/二 枚目.jpg",
        "a/one\u2028two\x85three.jpg",
        "#a/one.jpg",
        "a/1 2 3 4.jpg",
    ]
    text = "".join(f"{name}\n1\n{FACE}\n" for name in names)
    labels = "".join(f"# {name}\n1 2 10 20\n" for name in names)
    expected = [name.removesuffix(".jpg") for name in names]
    assert [sample.name for sample in read_wider(write(tmp_path / "gt.txt", text), IMAGES)] == expected
    assert [sample.name for sample in read_label_txt(write(tmp_path / "label.txt", labels), IMAGES)] == expected


def test_small_faces_and_negative_coordinates_stay(tmp_path):
    (sample,) = read_wider(write(tmp_path / "gt.txt", "a/one.jpg\n3\n-9 -8 3 4\n5 5 1 1\n7 7 -2 4\n"), IMAGES)
    np.testing.assert_array_equal(sample.boxes, [[-9, -8, -6, -4], [5, 5, 6, 6], [7, 7, 5, 11]])
    assert sample.counted["all"].tolist() == [True, True, False]


def test_second_version_of_label_files_has_corners(tmp_path):
    text = (
        f"# a/one 1.jpg 640 480\n1 2 11 22 {POINTS.removesuffix(' 0.9')}\n5 6 5 14\n5 6 12 14 1\n5 6 12 14 0\n"
        "# b/none.JPG 10 20\n"
    )
    one, none = read_label_txt(write(tmp_path / "labelv2.txt", text), IMAGES)
    assert (one.name, one.path, none.name) == ("a/one 1", IMAGES / "a" / "one 1.jpg", "b/none")
    np.testing.assert_array_equal(one.boxes, [[1, 2, 11, 22], [5, 6, 5, 14], [5, 6, 12, 14], [5, 6, 12, 14]])
    np.testing.assert_array_equal(one.landmarks[0], [[3, 4], [8, 4], [5, 9], [4, 15], [8, 15]])
    assert np.isnan(one.landmarks[1:]).all()
    assert one.counted["all"].tolist() == [True, False, False, True]  # fine, no width, to be ignored, fine
    assert none.boxes.shape == (0, 4)


def test_hidden_landmarks_are_labelled_and_single_ones_may_be_absent(tmp_path):
    row = "1 2 10 20 3 4 0 8 4 1 -1 -1 -1 4 15 -1 -1 -1 0 0.9"
    (sample,) = read_label_txt(write(tmp_path / "label.txt", f"# a/one.jpg\n{row}\n"), IMAGES)
    np.testing.assert_array_equal(sample.landmarks[0], [[3, 4], [8, 4], *[[np.nan, np.nan]] * 3])


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
        ("# a/one.jpg\n1 2 3 4 1\n", 2, "expected 4 numbers"),
        ("#\n1 2 3 4\n", 1, "within the images folder"),
        ("# a/one.jpg\n\n1 2 inf 4\n", 3, "not all numbers are finite"),
        ("# a/one.jpg 60 40\n# a/two.jpg\n", 2, "either all photos or none"),
        ("# a/one.jpg 60 40\n30 20 10 15\n", 2, "expected 'x1 y1 x2 y2'"),
        ("# a/one.jpg\n1 2 3 4\n# ../two.jpg\n", 3, "within the images folder"),
        ("# a/one.jpg\n1 2 3 4\n# a/one.jpg\n1 2 3 5\n", 3, "other faces than in line 1"),
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
    with pytest.raises(InputError, match=r"binary\.txt:1: not UTF-8"):
        reader(tmp_path / "binary.txt", IMAGES)
    (tmp_path / "latin1.txt").write_bytes("# a/one.jpg\n1 2 3 4\n# b/Straße.jpg\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin1\.txt:3: not UTF-8"):
        reader(tmp_path / "latin1.txt", IMAGES)


def test_split_from_the_official_file(tmp_path):
    write(tmp_path / "wider_face_split" / "wider_face_train_bbx_gt.txt", f"a/one.jpg\n1\n{FACE}\n")
    photo = write_photo(tmp_path / "WIDER_train" / "images" / "a" / "one.jpg")
    (sample,) = load_split(tmp_path, "train")
    assert sample.path == photo
    assert read_image(sample.path).shape == (40, 60, 3)


def test_annotations_and_photos_that_do_not_fit(tmp_path):
    write(
        tmp_path / "wider_face_split" / "wider_face_train_bbx_gt.txt",
        "".join(f"{name}\n0\n" for name in ("b/here.jpg", "b/absent.jpg", "scan.jp2", "a/here.JPG", "absent.png")),
    )
    images = tmp_path / "WIDER_train" / "images"
    for name in ("b/here.jpg", "a/here.JPG", "scan.jp2", "b/more.jpg", "other.png", "b/._more.jpg", "b/notes.txt"):
        write(images / name, "")
    index = read_split(tmp_path, "train")
    assert [sample.name for sample in index.samples] == ["b/here", "scan", "a/here"]
    assert (index.absent, index.unlisted) == (["b/absent.jpg", "absent.png"], ["b/more.jpg", "other.png"])
    assert not index.official
    assert find_photos(images) == ["a/here.JPG", "b/here.jpg", "b/more.jpg", "other.png"]


def test_files_that_a_split_is_made_of(write_difficulty, tmp_path):
    assert annotation_files(tmp_path, "val") == []
    text = write(tmp_path / "wider_face_split" / "wider_face_val_bbx_gt.txt", "")
    label = write(tmp_path / "val" / "labelv2.txt", "")
    write_difficulty(tmp_path / "ground_truth", {"one": ([[1, 2, 3, 4]], {"easy": [], "medium": [], "hard": []})})
    matrices = [tmp_path / "ground_truth" / f"wider_{name}_val.mat" for name in ("face", "easy", "medium", "hard")]
    assert annotation_files(tmp_path, "val") == [text, label, *matrices]
    assert annotation_files(tmp_path, "train") == []


@pytest.mark.parametrize(
    "place",
    ["wider_face_split/label_train.txt", "WIDER_train/label.txt", "train/label.txt"],
)
def test_label_file_wins_but_the_official_flags_stay(tmp_path, place):
    write(tmp_path / "wider_face_split" / "wider_face_train_bbx_gt.txt", "a/one.jpg\n1\n5 6 7 8 2 0 0 1 2 0\n")
    write(tmp_path / place, f"# a/one.jpg\n1 2 10 20 {POINTS}\n5 6 7 8 {POINTS}\n")
    write_photo(tmp_path / "WIDER_train" / "images" / "a" / "one.jpg")
    (sample,) = load_split(str(tmp_path), "train")
    np.testing.assert_array_equal(sample.boxes, [[1, 2, 11, 22], [5, 6, 12, 14]])
    assert np.isfinite(sample.landmarks).all()
    assert sample.counted["all"].tolist() == [True, False]


@pytest.mark.parametrize("folder", ["", "wider_face_split", "ground_truth", "eval_tools/ground_truth"])
def test_difficulty_files_supply_boxes_and_counted_faces(write_difficulty, tmp_path, folder):
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


def test_difficulty_of_a_photo_without_counted_faces(write_difficulty, tmp_path):
    write_difficulty(tmp_path, {"one": ([[1, 2, 3, 4]], {"easy": [], "medium": [], "hard": []})})
    truth = read_difficulty(tmp_path)
    assert list(truth) == ["a/one"]
    assert not any(mask.any() for mask in truth["a/one"].counted.values())


def test_incomplete_difficulty_files(write_difficulty, tmp_path):
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


def test_read_image_ignores_the_orientation_tag_unless_asked(tmp_path):
    plain = write_photo(tmp_path / "plain.jpg")
    content = plain.read_bytes()
    # An EXIF block that says "turn by 90 degrees": boxes refer to the stored pixels.
    tiff = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    exif = b"Exif\0\0" + tiff
    turned = tmp_path / "turned.jpg"
    turned.write_bytes(content[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + content[2:])
    assert cv2.imread(str(turned)).shape == (60, 40, 3)  # the tag is seen by who looks for it
    np.testing.assert_array_equal(read_image(turned), read_image(plain))
    np.testing.assert_array_equal(read_image(turned, upright=True), cv2.imread(str(turned)))
    # Where nobody labelled it, nothing refers to the stored pixels.
    (sample,) = [sample for sample in load_unlabelled(tmp_path, "train") if sample.path == turned] or load_unlabelled(
        tmp_path, "val"
    )
    assert sample.read().shape == (60, 40, 3)
    np.testing.assert_array_equal(replace(sample, labelled=True).read(), read_image(plain))


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
    with pytest.raises(InputError, match=r"page\.jpg: truncated or not a picture"):
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


def test_photos_that_only_the_official_file_lists_stay(tmp_path):
    split = tmp_path / "wider_face_split"
    write(split / "wider_face_train_bbx_gt.txt", f"a/one.jpg\n1\n{FACE}\na/two.jpg\n1\n{FACE}\n")
    write(split / "label_train.txt", f"# a/one.jpg\n1 2 10 20 {POINTS}\n")
    for name in ("one", "two"):
        write_photo(tmp_path / "WIDER_train" / "images" / "a" / f"{name}.jpg")
    one, two = load_split(tmp_path, "train")
    assert (one.name, two.name) == ("a/one", "a/two")
    assert np.isfinite(one.landmarks).all()
    assert np.isnan(two.landmarks).all()
    assert len(two.boxes) == 1


def test_a_link_to_a_folder_above_is_not_followed_forever(tmp_path):
    write_photo(tmp_path / "a" / "one.jpg")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert find_photos(tmp_path) == ["a/one.jpg", "b/one.jpg"]


@pytest.mark.parametrize("index", [0, 4])
def test_a_face_that_is_not_there_in_the_official_lists(write_difficulty, tmp_path, index):
    faces = [[5, 6, 7, 8], [1, 2, 10, 20], [1, 1, 9, 4]]
    write_difficulty(tmp_path, {"one": (faces, {"easy": [2], "medium": [1, index], "hard": [1, 2, 3]})})
    with pytest.raises(InputError, match=r"wider_medium_val\.mat: names face .* of one, which has 3"):
        read_difficulty(tmp_path)


def test_a_limit_takes_samples_from_everywhere():
    assert evenly_spread(range(100), 4) == [0, 25, 50, 75]
    assert evenly_spread(range(5), 3) == [0, 1, 3]
    assert evenly_spread(range(5), 9) == evenly_spread(range(5), None) == [0, 1, 2, 3, 4]
    assert evenly_spread([], 3) == []


def split_names(root):
    return [[sample.name for sample in load_unlabelled(root, split)] for split in ("train", "val")]


def test_one_in_ten_of_photos_without_labels_is_for_validation(tmp_path):
    names = [f"{folder}/{number:02}" for folder in ("a/deep", "b") for number in range(11)] + ["c"]
    for name in reversed(names):
        write(tmp_path / f"{name}.JPG", "not looked at")
    for other in ("notes.txt", ".hidden.jpg"):
        write(tmp_path / other, "no photo")
    train, val = split_names(tmp_path)
    assert val == [names[0], names[11]]
    assert train == [name for name in names if name not in val]
    for sample in load_unlabelled(tmp_path, "train"):
        assert not sample.labelled
        assert sample.path.is_file()
        assert (sample.boxes.shape, sample.landmarks.shape) == ((0, 4), (0, 5, 2))
        assert sample.counted["all"].shape == (0,)
    (tmp_path / "few").mkdir()
    for name in ("one", "two"):
        write(tmp_path / "few" / f"{name}.png", "")
    assert split_names(tmp_path / "few") == [["two"], ["one"]]


def test_labelled_validation_photos_keep_their_labels(tmp_path):
    for name in ("album/one.jpg", "two.jpg"):
        write_photo(tmp_path / name)
    write_photo(tmp_path / "WIDER_val" / "images" / "a" / "three.jpg")
    assert split_names(tmp_path) == [["album/one", "two"], ["a/three"]]
    assert not load_unlabelled(tmp_path, "val")[0].labelled
    write(tmp_path / "wider_face_split" / "wider_face_val_bbx_gt.txt", f"a/three.jpg\n1\n{FACE}\n")
    assert split_names(tmp_path) == [["album/one", "two"], ["a/three"]]
    (sample,) = load_unlabelled(tmp_path, "val")
    assert sample.labelled
    assert len(sample.boxes) == 1
    # With the whole layout, training photos are those of its folder; their labels are not looked at.
    write_photo(tmp_path / "WIDER_train" / "images" / "b" / "four.jpg")
    write(tmp_path / "wider_face_split" / "wider_face_train_bbx_gt.txt", "nonsense")
    (sample,) = load_unlabelled(tmp_path, "train")
    assert (sample.name, len(sample.boxes), sample.labelled) == ("b/four", 0, False)


def test_folders_without_photos_to_learn_from(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder; give a folder with photos"):
        load_unlabelled(tmp_path / "nowhere", "train")
    for split in ("train", "val"):
        with pytest.raises(InputError, match=r"no photos there; expected files that end in \.avif, \.bmp"):
            load_unlabelled(tmp_path, split)
    write(tmp_path / "one.jpg", "")
    for split in ("train", "val"):
        with pytest.raises(InputError, match="holds a single photo; give more"):
            load_unlabelled(tmp_path, split)


def test_absent_labels_tell_of_the_option(tmp_path):
    write_photo(tmp_path / "one.jpg")
    with pytest.raises(InputError, match=r"no such folder.*data\.init_args\.labels: false"):
        load_split(tmp_path, "train")
    write_photo(tmp_path / "WIDER_train" / "images" / "one.jpg")
    with pytest.raises(InputError, match=r"no annotations for train.*data\.init_args\.labels: false"):
        load_split(tmp_path, "train")
