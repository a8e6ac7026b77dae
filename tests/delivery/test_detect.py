import csv
import json
import os
from contextlib import nullcontext
from dataclasses import replace
from itertools import repeat

import cv2
import numpy as np
import pytest
import torch

from retinaface.delivery.detect import detect_files
from retinaface.delivery.runtime import Detector
from retinaface.delivery.sources import find_sources
from retinaface.errors import InputError
from retinaface.model.network import NetworkConfig

RESULTS = ("detections.json", "detections.csv", ".detections")


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
        assert set(faces) == {"copy", "boxes", "scores", "landmarks"}
        count = len(faces["scores"])
        assert count > 0
        assert np.shape(faces["boxes"]) == (count, 4)
        assert np.shape(faces["landmarks"]) == (count, 5, 2)
        assert faces["scores"] == sorted(faces["scores"], reverse=True)
        np.testing.assert_allclose(faces["boxes"], found[path].boxes.numpy(), rtol=1e-6)
        assert faces["copy"] == path.rsplit("/", 1)[1]
        copy = cv2.imread(str(out / faces["copy"]))
        np.testing.assert_array_equal(copy, 255 - cv2.imread(path))
    assert {path.name for path in out.iterdir()} == {
        "a.png",
        "b.png",
        *RESULTS,
    }


def test_no_faces_give_empty_lists(detector, tmp_path):
    photo = write_photo(tmp_path / "a.png")
    detect_files(detector, [photo], tmp_path / "out", draw, score_threshold=1.0)
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert content == {str(photo): {"copy": "a.png", "boxes": [], "scores": [], "landmarks": []}}


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
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "good.jpg",
        *RESULTS,
    }


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
    with pytest.raises(InputError, match="cannot be written to as a folder"):
        detect_files(detector, [photo], photo / "out", draw)
    (tmp_path / "out" / ".detections.part.json").mkdir(parents=True)
    with pytest.raises(InputError, match=r"detections.json: cannot be written"):
        detect_files(detector, [photo], tmp_path / "out", draw)


@pytest.mark.parametrize("name", ["detections.json", "detections.csv"])
def test_results_of_something_else_are_not_overwritten(name, detector, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}of somebody")
    with pytest.raises(InputError, match=rf"{name}: is not of an earlier run; choose another --out"):
        detect_files(detector, [write_photo(tmp_path / "a.png")], tmp_path / "out", draw)
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["{}of somebody"]


def test_the_photos_themselves_are_left_alone_in_their_own_folder(detector, tmp_path):
    photos = [write_photo(tmp_path / "a.png", 1), write_photo(tmp_path / "a_2.png", 2)]
    before = [photo.read_bytes() for photo in photos]
    detect_files(detector, photos, tmp_path, draw)
    assert [photo.read_bytes() for photo in photos] == before
    assert {path.name for path in tmp_path.iterdir()} == {
        "a.png",
        "a_2.png",
        "a_3.png",
        "a_2_2.png",
        *RESULTS,
    }


def test_results_are_known_again_after_other_runs_and_killed_ones(detector, tmp_path):
    """They neither become sources nor get in the way of their next version."""
    photos = [write_photo(tmp_path / name, seed) for seed, name in enumerate(("a.png", "b.png", "c.png"))]

    everything = {"a.png", "b.png", "c.png", "a_2.png", "b_2.png", "c_2.png"}
    for draw_them, sources in ((draw, photos), (fail_at_once, photos), (draw, photos[1:]), (draw, photos)):
        with nullcontext() if draw_them is draw else pytest.raises(MemoryError):
            detect_files(detector, sources, tmp_path, draw_them)
        assert {path.name for path in tmp_path.glob("*.png")} == everything
        assert find_sources([str(tmp_path)], tmp_path).found == photos
    (tmp_path / "detections.json").unlink()  # as if killed before it was written
    assert find_sources([str(tmp_path)], tmp_path).found == photos


@pytest.mark.parametrize("place", [".", "sources"])
def test_nothing_of_others_is_overwritten_and_everything_of_an_earlier_run(place, detector, tmp_path):
    (tmp_path / place).mkdir(exist_ok=True)
    photo, video = write_photo(tmp_path / place / "A.png"), write_video(tmp_path / place / "film.avi")
    others = [tmp_path / "film.mp4", tmp_path / "a_2.png"]
    for other in others:
        other.write_text("of somebody")
    copies = {"film_2.mp4", "A_3.png" if place == "." else "A.png"}
    for _ in range(2):
        detect_files(detector, [photo, video], tmp_path, draw, frames=1)
        assert [other.read_text() for other in others] == ["of somebody"] * 2
        files = {path.name for path in tmp_path.iterdir() if path.is_file()} - {"A.png", "film.avi"}
        assert files - copies == {"film.mp4", "a_2.png", *RESULTS}
        content = json.loads((tmp_path / "detections.json").read_text())
        assert {faces["copy"] for faces in content.values()} == copies


def test_csv_has_a_row_per_face(detector, tmp_path):
    photos = [write_photo(tmp_path / "a, b.png", 1), write_photo(tmp_path / "c.png", 2)]
    found, _ = detect_files(detector, photos, tmp_path / "out", draw, score_threshold=0.3)
    with (tmp_path / "out" / "detections.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["source"] for row in rows] == [path for path, faces in found.items() for _ in faces.scores]
    assert {row["frame"] for row in rows} == {""}
    faces = found[str(photos[0])]
    first = {name: float(value) for name, value in rows[0].items() if name not in ("source", "frame")}
    names = ["left_eye", "right_eye", "nose", "left_mouth", "right_mouth"]
    assert list(first) == ["x1", "y1", "x2", "y2", "score", *(f"{name}_{axis}" for name in names for axis in "xy")]
    np.testing.assert_allclose([first[name] for name in ("x1", "y1", "x2", "y2")], faces.boxes[0], atol=0.006)
    np.testing.assert_allclose(list(first.values())[5:], faces.landmarks[0].flatten(), atol=0.006)
    assert first["score"] == pytest.approx(float(faces.scores[0]), abs=6e-5)


def test_what_was_found_before_a_run_stops_is_kept_and_files_are_whole(detector, tmp_path):
    photo, video = write_photo(tmp_path / "a.png"), write_video(tmp_path / "b.avi")
    out = tmp_path / "out"
    detect_files(detector, [photo, video], out, draw)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    drawn = iter([photo, video, None])

    def fail(image, *faces):
        if next(drawn) is None:
            raise MemoryError
        return image

    with pytest.raises(MemoryError):
        detect_files(detector, [photo, video], out, fail)
    assert set(before) == {path.name for path in out.iterdir()}
    assert (out / "a.png").read_bytes() == photo.read_bytes()
    assert (out / "b.mp4").read_bytes() == before["b.mp4"]
    assert list(json.loads((out / "detections.json").read_text())) == [str(photo)]
    with (out / "detections.csv").open(newline="") as file:
        assert {row["source"] for row in csv.DictReader(file)} <= {str(photo)}
    with pytest.raises(MemoryError):  # at the first photo: what there is stays
        detect_files(detector, [photo], out, fail_at_once)
    assert list(json.loads((out / "detections.json").read_text())) == [str(photo)]


def fail_at_once(*_):
    raise MemoryError


def test_a_picture_that_its_kind_of_file_cannot_hold_is_found_in_but_not_copied(detector, tmp_path):
    wide, narrow = tmp_path / "wide.webp", write_photo(tmp_path / "narrow.webp")
    wide.write_bytes(write_photo(tmp_path / "wide.png", size=(2, 16400)).read_bytes())
    found, messages = detect_files(detector, [wide, narrow], tmp_path / "out", draw)
    assert list(found) == [str(wide), str(narrow)]
    assert messages == [f"{wide}: no copy, as a .webp file cannot hold it; convert it to PNG"]
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [faces["copy"] for faces in content.values()] == [None, "narrow.webp"]


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"x" * 251 + b".png"], ids=["not UTF-8", "as long as can be"])
def test_odd_names(name, detector, tmp_path):
    photo = tmp_path / os.fsdecode(name)
    photo.write_bytes(write_photo(tmp_path / "a.png").read_bytes())
    detect_files(detector, [photo], tmp_path / "out", draw, score_threshold=0.3)
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert list(content) == [str(photo)]
    assert (tmp_path / "out" / content[str(photo)]["copy"]).is_file()
    assert name in (tmp_path / "out" / "detections.csv").read_bytes()


def test_large_pictures_are_shrunk_for_the_detector_alone(detector, tmp_path):
    photo = write_photo(tmp_path / "a.png", size=(150, 300))
    found, _ = detect_files(detector, [photo], tmp_path / "out", draw, 0.3, longest=100)
    expected = detector.detect(cv2.resize(cv2.imread(str(photo)), (100, 50)), 0.3)
    assert len(expected.scores) > 0
    torch.testing.assert_close(found[str(photo)].boxes, expected.boxes * 3)
    torch.testing.assert_close(found[str(photo)].scores, expected.scores)
    assert cv2.imread(str(tmp_path / "out" / "a.png")).shape == (150, 300, 3)


# Videos and cameras


def frames_of(count, size=(64, 96)):
    """Frames of one colour, each brighter than the one before."""
    return [np.full((*size, 3), min(20 * number, 255), np.uint8) for number in range(count)]


def write_video(path, count=8, codec="MJPG", fps=12.5):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, (96, 64))
    for frame in frames_of(count):
        writer.write(frame)
    writer.release()
    return path


def read_video(path):
    capture = cv2.VideoCapture(str(path))
    frames = [frame for there, frame in (capture.read() for _ in range(100)) if there]
    return frames, capture.get(cv2.CAP_PROP_FPS)


@pytest.mark.parametrize(("limit", "count"), [(None, 8), (3, 3), (20, 8)])
def test_video(detector, tmp_path, limit, count):
    video, photo = write_video(tmp_path / "film.avi"), write_photo(tmp_path / "a.png")
    out = tmp_path / "out"
    found, unreadable = detect_files(detector, [photo, video, photo], out, draw, 0.3, frames=limit)
    assert unreadable == []
    content = json.loads((out / "detections.json").read_text())
    assert list(content) == [str(photo), str(video)]
    assert set(content[str(photo)]) == {"copy", "boxes", "scores", "landmarks"}
    in_video = content[str(video)]
    assert in_video["copy"] == "film.mp4"
    assert in_video["frames_per_second"] == found[str(video)].frames_per_second == 12.5
    assert len(in_video["frames"]) == count
    alone = detector.detect(read_video(video)[0][2], 0.3)
    assert len(alone.scores) > 0
    np.testing.assert_allclose(in_video["frames"][2]["boxes"], alone.boxes, rtol=1e-5)
    frames, fps = read_video(out / "film.mp4")
    assert (len(frames), fps) == (count, 12.5)
    for copy, frame in zip(frames, frames_of(count), strict=True):
        assert abs(float(copy.mean()) - (255 - float(frame.mean()))) < 4
    with (out / "detections.csv").open(newline="") as file:
        numbers = [row["frame"] for row in csv.DictReader(file) if row["source"] == str(video)]
    assert numbers == [str(number) for number, each in enumerate(in_video["frames"]) for _ in each["scores"]]
    assert {path.name for path in out.iterdir()} == {
        "a.png",
        "film.mp4",
        *RESULTS,
    }


@pytest.mark.parametrize(("whole", "share"), [(60, 0.5), (40, 0.75)])  # of the second less than a second is missing
def test_videos_that_cannot_be_read_or_not_to_their_end(detector, tmp_path, whole, share):
    cut = write_video(tmp_path / "cut.avi", whole)
    cut.write_bytes(cut.read_bytes()[: int(cut.stat().st_size * share)])
    text = tmp_path / "text.mp4"
    text.write_text("hello")
    found, unreadable = detect_files(detector, [text, tmp_path / "absent.mov", cut], tmp_path / "out", draw)
    assert [name in message for name, message in zip(("text", "absent", "cut"), unreadable, strict=True)] == [True] * 3
    count = len(found[str(cut)].frames)
    assert whole * share / 3 < count < whole * (1 + share) / 2
    assert f"ends after {count} of {whole} frames" in unreadable[2]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "cut.mp4",
        *RESULTS,
    }


def test_videos_of_the_same_name_do_not_overwrite_each_other(detector, tmp_path):
    (tmp_path / "x").mkdir()
    videos = [write_video(tmp_path / name) for name in ("a.avi", "x/a.avi", "a.mp4", "a_2.mp4")]
    before = [video.read_bytes() for video in videos]
    detect_files(detector, videos, tmp_path, draw, frames=1)
    assert [video.read_bytes() for video in videos] == before
    copies = {f"{tmp_path.name}_a.mp4", "x_a.mp4", "a_3.mp4", "a_2_2.mp4"}
    assert {path.name for path in tmp_path.glob("*.mp4")} == {"a.mp4", "a_2.mp4", *copies}


class FakeCamera:
    """Gives what it is told to; an exception is raised, None is the end."""

    def __init__(self, given):
        self.given = iter(given)
        self.released = False

    def isOpened(self):
        return not self.released

    def get(self, _):
        return 0.0

    def read(self):
        frame = next(self.given)
        if isinstance(frame, type):
            raise frame
        return frame is not None, frame

    def release(self):
        self.released = True


@pytest.mark.parametrize(
    ("given", "limit", "count", "messages"),
    [
        (repeat(frames_of(2)[1]), 5, 5, []),
        ([*frames_of(3), KeyboardInterrupt], None, 3, []),
        ([*frames_of(3), KeyboardInterrupt], 5, 3, []),
        ([*frames_of(3), None], None, 3, []),
        ([*frames_of(3), None], 4, 3, ["1: ends after 3 of 4 frames"]),
        ([None], 2, 0, ["1: ends after 0 of 2 frames"]),
    ],
    ids=["limit", "interrupted", "interrupted before the limit", "unplugged", "unplugged too early", "nothing"],
)
def test_camera(detector, tmp_path, monkeypatch, given, limit, count, messages):
    camera = FakeCamera(given)
    monkeypatch.setattr(cv2, "VideoCapture", lambda number: {1: camera}[number])
    found, unreadable = detect_files(detector, [1], tmp_path / "out", draw, frames=limit)
    assert unreadable == messages
    assert camera.released
    assert len(found["1"].frames if found else []) == count
    monkeypatch.undo()
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {source: len(each["frames"]) for source, each in content.items()} == ({"1": count} if count else {})
    if count:
        assert len(read_video(tmp_path / "out" / "camera_1.mp4")[0]) == count


def test_a_camera_that_is_not_there(detector, tmp_path, monkeypatch):
    camera = FakeCamera([])
    camera.release()
    monkeypatch.setattr(cv2, "VideoCapture", lambda _: camera)
    assert detect_files(detector, [7], tmp_path / "out", draw)[1] == [
        "camera 7: cannot be opened; check that it is connected and not in use"
    ]


def test_a_video_that_cannot_be_written(detector, tmp_path):
    (tmp_path / "out" / ".a.part.mp4").mkdir(parents=True)
    with pytest.raises(InputError, match=r"a.mp4: cannot be written"):
        detect_files(detector, [write_video(tmp_path / "a.avi")], tmp_path / "out", draw)


def test_ctrl_c_stops_everything_but_a_camera_and_keeps_what_was_found(detector, tmp_path, monkeypatch):
    video = write_video(tmp_path / "a.avi")
    monkeypatch.setattr(cv2, "VideoCapture", lambda _: FakeCamera([*frames_of(2), KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):
        detect_files(detector, [video, write_photo(tmp_path / "b.png")], tmp_path / "out", draw)
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert len(content[str(video)]["frames"]) == 2
    monkeypatch.undo()
    assert len(read_video(tmp_path / "out" / "a.mp4")[0]) == 2


def test_several_callers_write_what_one_does(detector, tmp_path):
    photos = [write_photo(tmp_path / f"{number}.png", number) for number in range(6)]
    photos.insert(2, tmp_path / "absent.png")
    written = []
    for callers in (1, 3):
        out = tmp_path / f"out{callers}"
        _, messages = detect_files(replace(detector, callers=callers), photos, out, draw)
        assert [str(tmp_path / "absent.png") in message for message in messages] == [True]
        written.append({path.name: path.read_bytes() for path in out.iterdir() if path.name != ".detections"})
    assert written[0] == written[1]
    assert written[0].keys() == {*(f"{number}.png" for number in range(6)), *RESULTS} - {".detections"}


def test_memory_that_ends_with_several_callers_leaves_what_was_found(detector, tmp_path):
    photos = [write_photo(tmp_path / f"{number}.png", number) for number in range(6)]
    last = cv2.imread(str(photos[-1]))

    def draw_but_one(image, *_):
        if np.array_equal(image, last):
            raise MemoryError
        return image

    with pytest.raises(MemoryError):
        detect_files(replace(detector, callers=2), photos, tmp_path / "out", draw_but_one)
    assert list(json.loads((tmp_path / "out" / "detections.json").read_text())) == [str(photo) for photo in photos[:-1]]
