import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retinaface.data.annotations import MEAN_BGR
from retinaface.data.transforms import FACE, IGNORED, TrainTransform, TransformOptions
from retinaface.errors import InputError

SIZE = 128


def only(**options) -> TransformOptions:
    """Nothing at random but the place and side of the crop, and what the options name."""
    nothing = {"flip": 0.0, "affine": 0.0, "colour": 0.0, "grayscale": 0.0, "blur": 0.0, "jpeg": 0.0}
    return TransformOptions(**{**nothing, **options})


PLAIN = only(crop_scale=(1.0, 1.0))
GEOMETRY = only(crop_scale=(0.3, 1.5), balanced=0.3, balanced_faces=(30.0, 100.0), flip=0.5, affine=0.8)
ALL = TransformOptions(crop_scale=(0.3, 1.5), balanced=0.3, affine=1.0, colour=1.0, grayscale=0.5, blur=0.5, jpeg=0.5)
POINT_COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255]])
seeds = st.integers(0, 2**32 - 1)


def no_landmarks(count: int) -> np.ndarray:
    return np.full((count, 5, 2), np.nan, dtype=np.float32)


def faces_of(boxes: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    array = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return array, no_landmarks(len(array)), np.full(len(array), FACE)


@st.composite
def annotated_photos(draw):
    """A photo of any shape with faces anywhere, some beyond it, some empty, some without landmarks."""
    height, width = draw(st.integers(20, 200)), draw(st.integers(20, 200))
    rng = np.random.default_rng(draw(seeds))
    count = draw(st.integers(0, 12))
    corner = rng.uniform(-20, [width, height], (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0, 90, (count, 2)) * rng.integers(0, 2, (count, 1))], axis=1)
    landmarks = rng.uniform(-30, 220, (count, 5, 2))
    landmarks[rng.random((count, 5)) < 0.1] = np.nan
    labels = rng.choice([FACE, IGNORED], count, p=[0.8, 0.2])
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, boxes.astype(np.float32), landmarks.astype(np.float32), labels


@settings(max_examples=150, deadline=None)
@given(annotated_photos(), seeds)
def test_whatever_comes_in_valid_faces_come_out(photo, seed):
    result = TrainTransform(SIZE, ALL)(*photo, seed)
    boxes, landmarks, labels = result["boxes"], result["landmarks"], result["labels"]
    count = len(boxes)
    assert result["image"].shape == (SIZE, SIZE, 3)
    assert (result["image"].dtype, boxes.dtype, landmarks.dtype) == (np.uint8, np.float32, np.float32)
    assert (labels.dtype, result["has_landmarks"].dtype) == (np.int64, np.bool_)
    assert boxes.shape == (count, 4)
    assert landmarks.shape == (count, 5, 2)
    assert labels.shape == result["has_landmarks"].shape == (count,)
    assert count <= len(photo[1])
    assert ((boxes >= 0) & (boxes <= SIZE)).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert ((landmarks >= 0) & (landmarks <= SIZE)).all()  # which NaN is not
    assert not landmarks[~result["has_landmarks"]].any()
    assert set(labels) <= {FACE, IGNORED}
    assert ((boxes[labels == FACE, 2:] - boxes[labels == FACE, :2]) >= ALL.min_face - 1e-3).all()
    assert (labels == FACE).sum() <= (photo[3] == FACE).sum()


@settings(max_examples=50, deadline=None)
@given(annotated_photos(), seeds, st.lists(seeds, max_size=3))
def test_same_seed_same_result_whatever_came_before(photo, seed, earlier_seeds):
    first = TrainTransform(SIZE, ALL)(*photo, seed)
    used = TrainTransform(SIZE, ALL)
    for earlier in earlier_seeds:
        used(*photo, earlier)
    for key, value in used(*photo, seed).items():
        np.testing.assert_array_equal(value, first[key])


def test_other_seeds_give_other_pictures_and_global_seeds_do_not_matter():
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    transform = TrainTransform(SIZE, ALL)
    pictures = []
    for seed in range(6):
        np.random.seed(0)
        pictures.append(transform(image, *faces_of([]), seed)["image"].tobytes())
    assert len(set(pictures)) == 6


def face_with_marked_landmarks() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A white face on black whose landmarks are discs of five colours."""
    image = np.zeros((160, 200, 3), dtype=np.uint8)
    box = np.array([[60, 30, 140, 130]], dtype=np.float32)
    landmarks = np.array([[[80, 60], [120, 60], [100, 80], [85, 105], [115, 105]]], dtype=np.float32)
    cv2.ellipse(image, (100, 80), (40, 50), 0, 0, 360, (255, 255, 255), -1)
    for point, colour in zip(landmarks[0].astype(int).tolist(), POINT_COLOURS.tolist(), strict=True):
        cv2.circle(image, point, 5, colour, -1)
    return image, box, landmarks, np.array([FACE])


@settings(max_examples=150, deadline=None)
@given(seeds)
def test_landmarks_stay_on_their_marks_and_left_stays_left(seed):
    result = TrainTransform(SIZE, GEOMETRY)(*face_with_marked_landmarks(), seed)
    if not (len(result["boxes"]) and result["has_landmarks"][0]):
        return
    points = result["landmarks"][0]
    assert points[0, 0] < points[1, 0]
    assert points[3, 0] < points[4, 0]
    assert points[:2, 1].max() < points[2, 1] < points[3:, 1].min()
    x, y = points.astype(int).clip(0, SIZE - 1).T
    found = result["image"][y, x].astype(int)
    distances = np.abs(found[:, None] - POINT_COLOURS).sum(axis=2)
    assert distances.argmin(axis=1).tolist() in ([0, 1, 2, 3, 4], [1, 0, 2, 4, 3])


def test_flip_exchanges_left_and_right():
    image, boxes, landmarks, labels = face_with_marked_landmarks()
    square = np.ascontiguousarray(image[:, 20:180])
    shift = np.array([20, 0], dtype=np.float32)
    options = only(crop_scale=(1.0, 1.0), flip=1.0)
    result = TrainTransform(160, options)(square, boxes - np.tile(shift, 2), landmarks - shift, labels, 0)
    np.testing.assert_array_equal(result["image"], square[:, ::-1])
    expected = landmarks[0] - shift
    expected[:, 0] = 160 - expected[:, 0]
    np.testing.assert_allclose(result["landmarks"][0], expected[[1, 0, 2, 4, 3]], atol=1e-3)


@settings(max_examples=50, deadline=None)
@given(seeds)
def test_flip_twice_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    corner = rng.uniform(0, SIZE - 40, (4, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (4, 2))], axis=1).astype(np.float32)
    landmarks = rng.uniform(0, SIZE, (4, 5, 2)).astype(np.float32)
    transform = TrainTransform(SIZE, only(crop_scale=(1.0, 1.0), flip=1.0))
    once = transform(image, boxes, landmarks, np.full(4, FACE), seed)
    twice = transform(once["image"], once["boxes"], once["landmarks"], once["labels"], seed)
    np.testing.assert_array_equal(twice["image"], image)
    np.testing.assert_allclose(twice["boxes"], boxes, atol=1e-3)
    np.testing.assert_allclose(twice["landmarks"], landmarks, atol=1e-3)


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_boxes_fit_the_pixels_exactly(flip, size):
    image = np.zeros((128, 128, 3), dtype=np.uint8)
    image[40:72, 16:48] = 255
    options = only(crop_scale=(1.0, 1.0), flip=flip)
    result = TrainTransform(size, options)(image, *faces_of([[16, 40, 48, 72]]), 0)
    rows, columns = np.nonzero(result["image"][..., 0] > 127)
    seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(result["boxes"][0], seen, atol=1e-3)


@settings(max_examples=150, deadline=None)
@given(seeds)
def test_what_is_called_a_face_is_there_to_be_seen(seed):
    """Also after a translation moved the place of a face that the crop had cut off back into the picture."""
    rng = np.random.default_rng(seed)
    image = np.full((150, 150, 3), MEAN_BGR, dtype=np.uint8)
    boxes = []
    for x in range(3):
        for y in range(3):
            half = rng.integers(6, 22, 2)
            centre = np.array([25 + 50 * x, 25 + 50 * y])
            cv2.ellipse(image, centre.tolist(), half.tolist(), 0, 0, 360, (255, 255, 255), -1)
            boxes.append([*(centre - half), *(centre + half)])
    options = only(flip=0.5, affine=1.0, rotate=20, translate=0.4)
    result = TrainTransform(SIZE, options)(image, *faces_of(boxes), seed)
    for box in np.rint(result["boxes"][result["labels"] == FACE]).astype(int):
        part = result["image"][box[1] : box[3], box[0] : box[2], 0]
        assert (part > 180).mean() > 0.5  # an ellipse fills 79 % of its box


@pytest.mark.parametrize("min_visible", [0.3, 0.7])
def test_crop_and_translation_together_may_not_hide_more_than_allowed(min_visible):
    image = np.full((100, 300, 3), MEAN_BGR, dtype=np.uint8)
    image[20:80, 120:180] = 255
    options = only(crop_scale=(1.0, 1.0), min_visible=min_visible, affine=1.0, rotate=0.0, translate=0.4)
    transform = TrainTransform(100, options)
    labels = []
    for seed in range(300):
        result = transform(image, *faces_of([[120, 20, 180, 80]]), seed)
        visible = (result["image"][..., 0] > 180).sum() / 3600
        labels += result["labels"].tolist()
        assert visible > min_visible - 0.03 or FACE not in result["labels"]
    assert labels.count(FACE) > 20
    assert labels.count(IGNORED) > 20


def test_rotated_boxes_follow_the_head():
    image = np.zeros((201, 201, 3), dtype=np.uint8)
    cv2.ellipse(image, (100, 100), (30, 60), 0, 0, 360, (255, 255, 255), -1)
    options = only(crop_scale=(1.0, 1.0), affine=1.0, rotate=45.0, translate=0.0)
    for seed in range(10):
        result = TrainTransform(201, options)(image, *faces_of([[70, 40, 131, 161]]), seed)
        rows, columns = np.nonzero(result["image"][..., 0] > 127)
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(result["boxes"][0], seen, atol=1.5)


def test_cut_tiny_and_invalid_faces_are_ignored_and_absent_ones_dropped():
    image = np.zeros((100, 300, 3), dtype=np.uint8)
    options = only(crop_scale=(1.0, 1.0), crop_tries=1)
    wholly, invalid, tiny, no_width = [120, 20, 140, 60], [150, 20, 170, 60], [120, 70, 123, 90], [130, 70, 130, 90]
    labels = np.array([FACE, IGNORED, FACE, FACE])
    boxes, landmarks, _ = faces_of([wholly, invalid, tiny, no_width])
    transform = TrainTransform(100, options)
    for seed in range(200):
        result = transform(image, boxes, landmarks, labels, seed)
        if len(result["labels"]) == 3 and result["boxes"][:, 0].min() > 0 and result["boxes"][:, 2].max() < 100:
            break
    assert result["labels"].tolist() == [FACE, IGNORED, IGNORED]
    seen = set()
    for seed in range(200):
        result = transform(image, *faces_of([wholly]), seed)
        if not len(result["boxes"]):
            seen.add("dropped")
            continue
        width = result["boxes"][0, 2] - result["boxes"][0, 0]
        assert result["labels"][0] == (FACE if width > 10 else IGNORED) or width == 10
        seen.add(int(result["labels"][0]))
    assert seen == {FACE, IGNORED, "dropped"}


def test_a_photo_with_faces_rarely_gives_a_crop_without():
    image = np.zeros((200, 400, 3), dtype=np.uint8)
    transform = TrainTransform(SIZE, only())
    faces = faces_of([[10, 10, 40, 50]])
    with_face = sum((transform(image, *faces, seed)["labels"] == FACE).any() for seed in range(100))
    once = TrainTransform(SIZE, only(crop_tries=1))
    with_face_once = sum((once(image, *faces, seed)["labels"] == FACE).any() for seed in range(100))
    assert with_face > 80 > 20 > with_face_once


def test_one_landmark_out_of_sight_leaves_the_face_without_landmarks():
    image = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    boxes, landmarks, labels = faces_of([[20, 20, 60, 60], [70, 20, 110, 60], [0, 70, 40, 110]])
    landmarks[0] = 30
    landmarks[1] = 80
    landmarks[1, 4] = np.nan
    landmarks[2] = 20
    landmarks[2, 0, 0] = -3
    result = TrainTransform(SIZE, PLAIN)(image, boxes, landmarks, labels, 0)
    assert result["has_landmarks"].tolist() == [True, False, False]
    assert result["labels"].tolist() == [FACE] * 3


def test_what_lies_outside_the_photo_has_the_mean_colour():
    image = np.zeros((50, 50, 3), dtype=np.uint8)
    options = only(crop_scale=(2.0, 2.0))
    picture = TrainTransform(100, options)(image, *faces_of([]), 0)["image"]
    colours, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    assert colours.tolist() == [[0, 0, 0], list(MEAN_BGR)]
    assert counts.tolist() == [2500, 7500]


def test_one_pixel_photo():
    result = TrainTransform(32)(np.zeros((1, 1, 3), dtype=np.uint8), *faces_of([[0, 0, 1, 1]]), 0)
    assert result["image"].shape == (32, 32, 3)


@pytest.mark.parametrize(
    "options",
    [{"crop_scale": (1.0, 0.5)}, {"crop_scale": (0.0, 0.5)}, {"crop_tries": 0}, {"flip": 1.5}, {"hue": 0.7},
     {"affine": -0.1}, {"min_visible": 2.0}, {"balanced": 1.1}, {"balanced_faces": (0, 3)}, {"jpeg_quality": (9, 101)},
     {"blur_size": 4}],
)  # fmt: skip
def test_impossible_options_are_named(options):
    with pytest.raises(InputError, match=next(iter(options))):
        TransformOptions(**options)


def test_zoom_is_the_range_of_training_pixels_per_photo_pixel():
    transform = TrainTransform(64, only(zoom=(0.5, 2.0), min_visible=0, min_face=0))
    boxes = np.array([[400, 400, 420, 420]], dtype=np.float32)
    zooms = []
    for seed in range(200):
        sample = transform(
            np.zeros((500, 600, 3), np.uint8), boxes, np.full((1, 5, 2), np.nan, np.float32), np.array([FACE]), seed
        )
        zooms += [(x2 - x1) / 20 for x1, y1, x2, y2 in sample["boxes"] if min(x1, y1) > 0 and max(x2, y2) < 64]
    assert len(zooms) > 20
    assert 0.49 <= min(zooms) < 0.7
    assert 1.4 < max(zooms) <= 2.02
    with pytest.raises(InputError, match="zoom"):
        TransformOptions(zoom=(2.0, 1.0))


def test_balanced_crops_show_any_face_at_a_size_of_the_range():
    """A photo with one huge and one tiny face: each is chosen half of the time, and shown at any size."""
    huge, tiny = [40, 40, 440, 440], [600, 300, 616, 316]
    image = np.zeros((500, 700, 3), np.uint8)
    image[40:440, 40:440, 0] = image[300:316, 600:616, 1] = 255
    transform = TrainTransform(256, only(balanced=1.0, balanced_faces=(16.0, 64.0)))
    shown = {"huge": [], "tiny": []}
    for seed in range(300):
        result = transform(image, *faces_of([huge, tiny]), seed)
        for box in result["boxes"]:
            x, y = ((box[:2] + box[2:]) / 2).astype(int)
            if result["image"][y, x].argmax() == 1:
                shown["tiny"].append(box[2] - box[0])
            elif box.min() > 0 and box.max() < 256:
                shown["huge"].append(box[2] - box[0])
    # Together with the tiny face the huge one is too large to be seen whole, or the tiny one is far below its range.
    chosen_tiny = [size for size in shown["tiny"] if size > 15.5]
    assert 110 < len(chosen_tiny) < 190
    assert max(chosen_tiny) <= 64.5
    assert min(chosen_tiny) < 20
    assert max(chosen_tiny) > 50
    # 700 pixels are never shown on fewer than 128, so a face of 400 never on fewer than 73.
    assert 72.5 <= min(shown["huge"]) < 74


@settings(max_examples=150, deadline=None)
@given(annotated_photos(), seeds)
def test_what_lies_beyond_the_photo_is_never_a_face(photo, seed):
    """The photo is white and its surroundings are filled: a face to learn is white where it is said to be."""
    image, boxes, landmarks, labels = photo
    options = only(crop_scale=(0.5, 2.0), balanced=0.5, min_visible=0.5)
    result = TrainTransform(SIZE, options)(np.full_like(image, 255), boxes, landmarks, labels, seed)
    for box in result["boxes"][result["labels"] == FACE]:
        x1, y1, x2, y2 = np.concatenate([np.floor(box[:2]), np.ceil(box[2:])]).astype(int)
        assert (result["image"][y1:y2, x1:x2, 0] > 180).mean() > 0.6  # of a small box the border is a large part


@settings(max_examples=100, deadline=None)
@given(annotated_photos(), seeds)
def test_balanced_crops_hold_their_face(photo, seed):
    """Whatever fits is wholly inside; nothing is enlarged more than four times."""
    image, boxes, _, labels = photo
    transform = TrainTransform(SIZE, only(balanced=1.0, balanced_faces=(8.0, 40.0)))
    height, width = image.shape[:2]
    boxes = boxes.clip(0, np.tile([width, height], 2))
    boxes, labels = boxes[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)], labels[(boxes[:, 2:] > boxes[:, :2]).all(axis=1)]
    crop = transform._choose_crop(height, width, boxes, labels, np.random.default_rng(seed))
    candidates = boxes[labels == FACE]
    if not len(candidates):
        return
    assert SIZE / 4 - 1 <= crop.side <= 2 * max(height, width) + 1
    inside = (candidates[:, :2] >= np.array([crop.left, crop.top]) - 1) & (
        candidates[:, 2:] <= np.array([crop.left, crop.top]) + crop.side + 1
    )
    larger = candidates[:, 2:] - candidates[:, :2] > crop.side
    assert (inside | larger).all(axis=1).any()


@pytest.mark.parametrize("name", ["grayscale", "blur", "jpeg", "colour"])
def test_changes_of_the_pixels_leave_the_faces_where_they_are(name):
    image, boxes, landmarks, labels = face_with_marked_landmarks()
    expected = TrainTransform(SIZE, only(crop_scale=(1.0, 1.0)))(image, boxes, landmarks, labels, 3)
    result = TrainTransform(SIZE, only(crop_scale=(1.0, 1.0), **{name: 1.0}))(image, boxes, landmarks, labels, 3)
    assert not np.array_equal(result["image"], expected["image"])
    for key in ("boxes", "landmarks", "labels"):
        np.testing.assert_allclose(result[key], expected[key], atol=1e-4)
    # The middle of the white face has not moved either.
    middles = [np.argwhere(sample["image"].min(axis=2) > 127).mean(axis=0) for sample in (result, expected)]
    if name != "colour":
        np.testing.assert_allclose(*middles, atol=1.5)


def test_grayscale_takes_the_colour_away():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    picture = TrainTransform(64, only(crop_scale=(1.0, 1.0), grayscale=1.0))(image, *faces_of([]), 0)["image"]
    assert np.ptp(picture, axis=2).max() == 0
