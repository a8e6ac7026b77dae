import json

import cv2
import numpy as np
import pytest
import torch

from retinaface.delivery.detect import detect_files
from retinaface.delivery.runtime import Detector
from retinaface.errors import InputError
from retinaface.model.network import NetworkConfig


@pytest.fixture
def detector(tiny_network):
    def run(images):
        with torch.no_grad():
            return tiny_network(images)

    return Detector(NetworkConfig(channels=16), run, "torch")


def draw(image, boxes, scores, landmarks):
    assert boxes.shape == (len(scores), 4)
    assert landmarks.shape == (len(scores), 5, 2)
    return 255 - image


def write_photo(path, seed=0, size=(70, 90)):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))
    return path


def test_json_and_annotated_copies(detector, tmp_path):
    photos = [write_photo(tmp_path / "a.png", 1), write_photo(tmp_path / "b.png", 2, (20, 30))]
    out = tmp_path / "deep" / "out"
    found, unreadable = detect_files(detector, photos, out, draw, score_threshold=0.3)
    assert unreadable == []
    content = json.loads((out / "detections.json").read_text())
    assert list(content) == list(found) == [str(photo) for photo in photos]
    for path, faces in content.items():
        assert set(faces) == {"boxes", "scores", "landmarks"}
        count = len(faces["scores"])
        assert count > 0
        assert np.shape(faces["boxes"]) == (count, 4)
        assert np.shape(faces["landmarks"]) == (count, 5, 2)
        assert faces["scores"] == sorted(faces["scores"], reverse=True)
        np.testing.assert_allclose(faces["boxes"], found[path].boxes.numpy(), rtol=1e-6)
        copy = cv2.imread(str(out / path.rsplit("/", 1)[1]))
        np.testing.assert_array_equal(copy, 255 - cv2.imread(path))
    assert {path.name for path in out.iterdir()} == {"a.png", "b.png", "detections.json"}


def test_no_faces_give_empty_lists(detector, tmp_path):
    photo = write_photo(tmp_path / "a.png")
    detect_files(detector, [photo], tmp_path / "out", draw, score_threshold=1.0)
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert content == {str(photo): {"boxes": [], "scores": [], "landmarks": []}}


def test_unreadable_photos_are_named_and_skipped(detector, tmp_path):
    good = write_photo(tmp_path / "good.jpg")
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes(good.read_bytes()[:-500])
    text = tmp_path / "text.jpg"
    text.write_text("hello")
    found, unreadable = detect_files(
        detector, [truncated, good, text, tmp_path / "absent.jpg"], tmp_path / "out", draw, 0.3
    )
    assert list(found) == [str(good)]
    assert len(unreadable) == 3
    assert all(name in message for name, message in zip(("truncated", "text", "absent"), unreadable, strict=True))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"good.jpg", "detections.json"}


def test_photos_of_the_same_name_do_not_overwrite_each_other(detector, tmp_path):
    """Not even where the folders' names are the same too, or a photo is called like folder and photo of another."""
    photos = [
        write_photo(tmp_path / path, seed)
        for seed, path in enumerate(("x/a/1.png", "y/a/1.png", "b/1.png", "x/a_1.png", "b/B_1.png", "z/2.png"))
    ]
    found, _ = detect_files(detector, [*photos, photos[0]], tmp_path / "out", draw)
    assert len(found) == len(photos)
    copies = {path.name: cv2.imread(str(path)) for path in (tmp_path / "out").glob("*.png")}
    assert set(copies) == {"a_1.png", "a_1_2.png", "b_1.png", "a_1_3.png", "B_1_2.png", "2.png"}
    for photo in photos:
        original = 255 - cv2.imread(str(photo))
        assert sum(np.array_equal(copy, original) for copy in copies.values()) == 1, photo


def test_a_photo_in_a_format_that_cannot_be_written(detector, tmp_path):
    photo = write_photo(tmp_path / "a.png").rename(tmp_path / "photo")
    detect_files(detector, [photo], tmp_path / "out", draw)
    assert (tmp_path / "out" / "photo.png").is_file()


def test_places_that_cannot_be_written(detector, tmp_path):
    photo = write_photo(tmp_path / "a.png")
    with pytest.raises(InputError, match="cannot be made a folder"):
        detect_files(detector, [photo], photo / "out", draw)
    (tmp_path / "out" / "detections.json").mkdir(parents=True)
    with pytest.raises(InputError, match=r"detections.json: cannot be written"):
        detect_files(detector, [photo], tmp_path / "out", draw)


def test_the_photos_themselves_are_left_alone_in_their_own_folder(detector, tmp_path):
    photos = [write_photo(tmp_path / "a.png", 1), write_photo(tmp_path / "a_2.png", 2)]
    before = [photo.read_bytes() for photo in photos]
    detect_files(detector, photos, tmp_path, draw)
    assert [photo.read_bytes() for photo in photos] == before
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "a_2.png", "a_3.png", "a_2_2.png", "detections.json"}
