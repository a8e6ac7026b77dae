import numpy as np
import pytest

from retinaface.data.synthetic_person import draw_lookalike, draw_person


def people(number, height, seed=0):
    return [draw_person(np.random.default_rng((seed, index)), height) for index in range(number)]


def test_features_are_in_their_places():
    for person in people(200, 60):
        x1, y1, x2, y2 = person.box
        left_eye, right_eye, nose, left_mouth, right_mouth = person.landmarks
        assert left_eye[0] < right_eye[0]
        assert left_mouth[0] < right_mouth[0]
        eyes, mouth = (left_eye + right_eye) / 2, (left_mouth + right_mouth) / 2
        assert eyes[1] < nose[1] < mouth[1]
        # Inside the box, but for the nose and the far eye of a head that is turned far.
        margin = 0.12 * (y2 - y1)
        assert ((person.landmarks > (x1 - margin, y1)) & (person.landmarks < (x2 + margin, y2))).all()


def test_box_and_area_are_those_of_the_bare_face():
    for person in people(100, 60):
        rows, columns = np.nonzero(person.face)
        bare = len(rows)
        assert bare <= person.area * 1.05  # a polygon of 40 corners, with the pixels on its rim
        if bare > 0.93 * person.area:  # nothing covers it
            seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            np.testing.assert_allclose(seen, person.box, atol=1.5)
    assert min(person.face.astype(bool).sum() / person.area for person in people(100, 60)) < 0.6  # masks and hands


@pytest.mark.parametrize("height", [8, 20, 300])
def test_size(height):
    heights = [person.box[3] - person.box[1] for person in people(30, height)]
    assert np.median(heights) == pytest.approx(height, rel=0.03)
    assert min(heights) > 0.8 * height  # tilted


def test_small_faces_are_shrunk_large_ones():
    for index in range(20):
        small, large = (draw_person(np.random.default_rng(index), height) for height in (10, 40))
        np.testing.assert_allclose(small.landmarks, large.landmarks / 4)
        np.testing.assert_allclose(small.box, large.box / 4)


def test_heads_turn_and_lean():
    turns, leans = [], []
    for person in people(300, 60):
        x1, _, x2, _ = person.box
        right, down = person.landmarks[1] - person.landmarks[0]
        leans.append(np.degrees(np.arctan2(down, right)))
        turns.append((person.landmarks[2, 0] - (x1 + x2) / 2) / (x2 - x1))
    assert max(turns) > 0.35
    assert min(turns) < -0.35
    assert max(leans) > 25
    assert min(leans) < -25
    assert 0.1 < np.mean([person.turned for person in people(300, 60)]) < 0.5


def test_eyes_are_drawn_at_the_landmarks():
    contrasts = []
    for person in people(100, 100):
        x, y = person.landmarks[0].astype(int)
        around = person.picture[y - 4 : y + 5, x - 8 : x + 9, :3].astype(float)
        cheek = person.picture[y + 14 : y + 18, x - 3 : x + 4, :3].astype(float)
        contrasts.append(np.abs(around.mean(axis=2) - cheek.mean()).mean() / max(cheek.mean(), 1))
    assert np.median(contrasts) > 0.2


def test_colours_are_those_of_premultiplied_opacity():
    for cut_out in people(20, 30):
        transparent = cut_out.picture[..., 3] == 0
        assert transparent.any()
        assert (cut_out.picture[transparent] == 0).all()


def test_lookalikes_have_no_face():
    pictures = []
    for index in range(40):
        thing = draw_lookalike(np.random.default_rng(index), 30)
        assert thing.area == 0
        assert not thing.face.any()
        assert thing.picture[..., 3].max() > 200
        pictures.append(thing.picture.tobytes())
    assert len(set(pictures)) == len(pictures)
