import pytest

from retinaface.whole_file import whole_file


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with whole_file(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
        assert part.suffix == path.suffix
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def write_half(path):
    path.write_text("half")
    raise KeyboardInterrupt


def test_what_was_there_stays_where_writing_fails(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as part:
        write_half(part)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_written_is_no_file(tmp_path):
    (tmp_path / ".result.part.json").write_text("left by a process that was killed")
    with whole_file(tmp_path / "result.json"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_its_place_stays(tmp_path):
    (tmp_path / "result.json" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match=r"result\.json"), whole_file(tmp_path / "result.json") as part:
        part.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
