import numpy as np
import pytest

from retinaface.data.synthetic_photo import Attributes, render_photo


def photos(number, size):
    return [render_photo(np.random.default_rng(index), size) for index in range(number)]


@pytest.fixture(scope="module")
def many():
    return photos(80, 320)


def test_same_source_same_photo():
    first, second, other = (render_photo(np.random.default_rng(seed), 96) for seed in (1, 1, 2))
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)
    assert (first.image != other.image).mean() > 0.5


def test_scenes_are_varied(many):
    counts = [len(photo.boxes) for photo in many]
    heights = np.concatenate([photo.boxes[:, 3] - photo.boxes[:, 1] for photo in many])
    brightness = [photo.image.mean() for photo in many]
    assert 0.03 < np.mean(np.array(counts) == 0) < 0.25
    assert max(counts) >= 15
    assert heights.min() <= 9
    assert heights.max() > 120
    assert min(brightness) < 45
    assert max(brightness) > 140
    described = Attributes(*np.concatenate([photo.attributes for photo in many]).T)
    for name, values in described._asdict().items():
        assert set(values.tolist()) == ({0, 1, 2} if name in ("blur", "occlusion") else {0, 1}), name


def test_large_photos_hold_crowds_and_faces_from_8_to_300_pixels():
    rendered = photos(40, 640)
    heights = np.concatenate([photo.boxes[:, 3] - photo.boxes[:, 1] for photo in rendered])
    assert max(len(photo.boxes) for photo in rendered) >= 40
    assert heights.min() <= 9
    assert 200 < heights.max() <= 305


def test_boxes_are_whole_pixels_in_the_photo_and_all_different(many):
    for photo in many:
        assert len(photo.boxes) == len(photo.landmarks) == len(photo.visible) == len(photo.attributes)
        np.testing.assert_array_equal(photo.boxes, np.rint(photo.boxes).clip(0, 320))
        assert (photo.boxes[:, 2:] > photo.boxes[:, :2]).all()
        assert len(np.unique(photo.boxes, axis=0)) == len(photo.boxes)


def test_landmarks_belong_to_their_boxes(many):
    for photo in many:
        for box, points in zip(photo.boxes, photo.landmarks, strict=True):
            cut = (box[:2] == 0).any() or (box[2:] == 320).any()
            margin = 1 + 0.12 * (box[3] - box[1])
            inside = (points[:, 0] > box[0] - margin) & (points[:, 0] < box[2] + margin)
            assert cut or (inside & (points[:, 1] > box[1] - 1) & (points[:, 1] < box[3] + 1)).all()


def test_hidden_and_cut_faces_are_known(many):
    visible = np.concatenate([photo.visible for photo in many])
    described = Attributes(*np.concatenate([photo.attributes for photo in many]).T)
    assert ((visible >= 0) & (visible <= 1)).all()
    assert (visible > 0.95).mean() > 0.4
    assert ((visible > 0.3) & (visible < 0.7)).mean() > 0.03
    np.testing.assert_array_equal(described.invalid, visible < np.float32(0.3))
    np.testing.assert_array_equal(described.occlusion == 0, visible >= np.float32(0.95))


def test_a_nearer_person_hides_the_one_behind(monkeypatch):
    """Two people at one place: the second is all that is seen."""
    monkeypatch.setattr("retinaface.data.synthetic_photo._draw_cast", lambda *_: [(40.0, True), (90.0, True)])
    monkeypatch.setattr("retinaface.data.synthetic_photo._draw_object", lambda *_: None)
    monkeypatch.setattr(
        "retinaface.data.synthetic_photo._find_place",
        lambda _rng, box, _taken, size: np.rint(size / 2 - (box[:2] + box[2:]) / 2).astype(np.int64),
    )
    rendered = photos(20, 320)
    visible = np.array([photo.visible for photo in rendered])
    assert (visible[:, 0] < 0.05).all()
    assert np.median(visible[:, 1]) > 0.9
    assert all(photo.attributes[0, 3] == 1 for photo in rendered)


def test_the_border_cuts_faces(monkeypatch):
    """Half of a face outside the photo is half visible, and its box ends at the border."""
    monkeypatch.setattr("retinaface.data.synthetic_photo._draw_cast", lambda *_: [(90.0, True)])
    monkeypatch.setattr("retinaface.data.synthetic_photo._draw_object", lambda *_: None)
    monkeypatch.setattr(
        "retinaface.data.synthetic_photo._find_place",
        lambda _rng, box, _taken, size: np.array([-(box[0] + box[2]) / 2, size / 2 - box[1]]).astype(np.int64),
    )
    rendered = photos(20, 320)
    assert np.median([photo.visible[0] for photo in rendered]) == pytest.approx(0.5, abs=0.06)
    assert all(photo.boxes[0, 0] == 0 for photo in rendered)
