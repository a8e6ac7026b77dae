from pathlib import Path

import pytest

from retinaface.delivery.sources import find_sources, is_photo


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
    sources, empty = find_sources(words, Path(out))
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
    sources, _ = find_sources(["photos/deep", "0", "5"], folder)
    assert [is_photo(source) for source in sources] == [True, False, True, False]
