from pathlib import Path

import cv2
import pytest

from retinaface.delivery.sources import earlier_results, find_sources, is_photo, note_result, open_video
from retinaface.errors import InputError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Photos, a video and other files, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "photos/b.JPG",
        "photos/a.png",
        "photos/deep/c.jpg",
        "photos/deep/film.MP4",
        "photos/notes.txt",
        "photos/.hidden.jpg",
        "photos/found/a.png",
        "empty/notes.txt",
        "0",
        "[1].jpg",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def found(*words, out="elsewhere"):
    sources, empty, _ = find_sources(words, Path(out))
    return [source if isinstance(source, int) else source.as_posix() for source in sources], empty


def test_folders_are_searched_with_all_below_them(folder):
    everything = ["photos/a.png", "photos/b.JPG", "photos/deep/c.jpg", "photos/deep/film.MP4", "photos/found/a.png"]
    assert found("photos") == (everything, [])
    assert found("photos", out="photos") == (everything, [])
    assert found("photos", out="photos/found") == (everything[:-1], [])
    assert found("photos/found", out="photos/found") == (["photos/found/a.png"], [])
    (folder / "empty" / "link").symlink_to(folder / "photos")
    assert len(found("empty")[0]) == len(everything)


def test_patterns(folder):
    assert found("photos/*.[pJ]*") == (["photos/a.png", "photos/b.JPG"], [])
    assert found("photos/**/*.jpg") == (["photos/deep/c.jpg"], [])
    assert found("**/a.png", out="photos/found") == (["photos/a.png"], [])  # results are no photos
    assert found(f"{folder}/photos/d*") == ([f"{folder}/photos/deep/{name}" for name in ("c.jpg", "film.MP4")], [])
    assert found("[1].jpg") == (["[1].jpg"], [])  # a file of that name goes first


def test_each_source_is_there_once_in_the_order_of_the_words(folder):
    assert found("photos/deep/c.jpg", "photos/deep", "3", "3") == (
        ["photos/deep/c.jpg", "photos/deep/film.MP4", 3],
        [],
    )


def test_numbers_are_cameras_where_no_file_is_called_so(folder):
    assert found("0", "1", "-1") == (["0", 1, "-1"], [])


def test_words_that_nothing_is_found_for_are_named(folder):
    sources, empty = found("empty", "nothing/*.jpg", "absent.jpg", "photos/notes.txt")
    assert sources == ["absent.jpg", "photos/notes.txt"]  # who reads them will say what is wrong
    assert [message.split(":")[0] for message in empty] == ["empty", "nothing/*.jpg"]


def test_photos_and_others(folder):
    sources, _, _ = find_sources(["photos/deep", "0", "5"], folder)
    assert [is_photo(source) for source in sources] == [True, False, True, False]


def test_files_that_are_neither_are_counted_once(folder):
    for name in ("a.HEIC", "b.heic", "README"):
        (folder / "photos" / name).touch()
    assert find_sources(["photos", "photos/deep", "photos/b.heic"], Path("elsewhere")).left_out == {
        ".heic": 2,
        ".txt": 1,
        "without suffix": 1,
    }
    assert Path("photos/b.heic") in find_sources(["photos/b*"], Path("elsewhere")).found  # as asked for


def test_what_earlier_runs_have_written_to_the_folder_is_no_source(folder):
    (folder / "photos" / "a_2.png").touch()
    assert earlier_results(Path("photos")) == set()
    everything = find_sources(["photos"], Path("photos"))
    assert Path("photos/a_2.png") in everything.found
    for name in ("a_2.png", "gone.png"):
        note_result(Path("photos"), name)
    assert earlier_results(Path("photos")) >= {"a_2.png", "gone.png"}
    sources = find_sources(["photos"], Path("photos"))
    assert sources.found == [path for path in everything.found if path != Path("photos/a_2.png")]
    assert sources.left_out == {".txt": 1}


def test_a_folder_that_cannot_be_looked_into_is_named(folder, monkeypatch):
    def walk(path, onerror, **_):
        onerror(PermissionError(13, "Permission denied", f"{path}/secret"))
        yield str(path), ["secret"], ["a.png"]

    monkeypatch.setattr("os.walk", walk)
    sources = find_sources(["photos", "photos", "0"], Path("elsewhere"))
    assert sources.found == [Path("photos/a.png"), Path("0")]
    assert sources.empty == ["photos/secret: cannot be looked into (Permission denied); check its permissions"]


def test_a_camera_that_is_not_there_is_no_occasion_for_opencv_to_speak(capfd):
    before = cv2.utils.logging.getLogLevel()
    with pytest.raises(InputError, match="camera 99: cannot be opened"):
        open_video(99)
    assert capfd.readouterr().err == ""
    assert cv2.utils.logging.getLogLevel() == before
