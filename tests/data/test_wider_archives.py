import errno
import hashlib
import shutil
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import gdown
import pytest
from torchvision.datasets import WIDERFace

from retinaface.data import wider_archives
from retinaface.data.annotations import load_split, read_difficulty
from retinaface.data.wider_archives import prepare_root
from retinaface.errors import InputError

NAMES = ("WIDER_train.zip", "WIDER_val.zip", "wider_face_split.zip", "eval_tools.zip")
FOLDERS = {"WIDER_train", "WIDER_val", "wider_face_split", "ground_truth"}


@pytest.fixture(scope="module")
def archives(write_difficulty, tmp_path_factory):
    """A folder with the four archives as the official ones are laid out, but with one photo per split."""
    folder = tmp_path_factory.mktemp("archives")
    difficulty = tmp_path_factory.mktemp("difficulty")
    write_difficulty(difficulty, {"one": ([[1, 2, 30, 40]], {"easy": [1], "medium": [1], "hard": [1]})})
    text = "a/one.jpg\n1\n1 2 30 40 0 0 0 0 0 0 \n"
    contents = {
        "WIDER_train.zip": {"WIDER_train/images/a/one.jpg": b"photo"},
        "WIDER_val.zip": {"WIDER_val/images/a/one.jpg": b"photo"},
        "wider_face_split.zip": {
            f"wider_face_split/wider_face_{split}_bbx_gt.txt": text.encode() for split in ("train", "val")
        },
        "eval_tools.zip": {
            "eval_tools/wider_eval.m": b"code",
            **{f"eval_tools/ground_truth/{file.name}": file.read_bytes() for file in difficulty.iterdir()},
        },
    }
    for name, files in contents.items():
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for file, content in files.items():
                archive.writestr(file, content)
    return folder


@pytest.fixture(autouse=True)
def _known_sums(archives, monkeypatch):
    """The archives of these tests are the official ones."""

    def md5(name):
        return hashlib.md5((archives / name).read_bytes()).hexdigest()

    photos = [(f"id-of-{name}", md5(name), name) for name in ("WIDER_train.zip", "WIDER_val.zip")]
    monkeypatch.setattr(WIDERFace, "FILE_LIST", [*photos, ("id-of-test", "0", "WIDER_test.zip")])
    url, _, name = WIDERFace.ANNOTATIONS_FILE
    monkeypatch.setattr(WIDERFace, "ANNOTATIONS_FILE", (url, md5(name), name))


@pytest.fixture
def server(archives, tmp_path, monkeypatch):
    """The folder behind every address that is downloaded from, with the four archives in it."""
    folder = shutil.copytree(archives, tmp_path / "served")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    home = f"http://127.0.0.1:{http.server_port}"
    original = wider_archives._source
    monkeypatch.setattr(wider_archives, "_source", lambda name: original(name)._replace(url=f"{home}/{name}"))
    monkeypatch.setattr(
        gdown, "download", lambda id, output, **_: shutil.copy(folder / id.removeprefix("id-of-"), output)
    )
    yield folder
    http.shutdown()
    http.server_close()


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_archives_in_the_root_are_unpacked_once(archives, tmp_path, monkeypatch):
    root = shutil.copytree(archives, tmp_path / "root")
    prepare_root(str(root))
    assert names(root) == {*NAMES, *FOLDERS}  # and no scratch folders
    assert (root / "WIDER_train" / "images" / "a" / "one.jpg").read_bytes() == b"photo"
    assert names(root / "ground_truth") == {f"wider_{name}_val.mat" for name in ("face", "easy", "medium", "hard")}
    assert list(read_difficulty(root / "ground_truth")) == ["a/one"]
    (sample,) = load_split(root, "val")
    assert set(sample.counted) == {"all", "easy", "medium", "hard"}
    monkeypatch.setattr(wider_archives, "_verify", lambda _: pytest.fail("verified again"))
    prepare_root(root, download=True)


def test_a_complete_root_is_left_alone(tiny_root, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in tiny_root.rglob("*")}
    for name in ("_verify", "_unpack", "_fetch"):
        monkeypatch.setattr(wider_archives, name, lambda *_: pytest.fail("nothing was to be done"))
    prepare_root(tiny_root, download=True)
    assert {path: path.stat().st_mtime_ns for path in tiny_root.rglob("*")} == before


def test_own_photos_with_labels_beside_them_are_complete(tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"WIDER_{split}" / "images").mkdir(parents=True)
        (tmp_path / f"WIDER_{split}" / "label.txt").write_text("# one.jpg\n")
    prepare_root(tmp_path, download=True)
    assert names(tmp_path) == {"WIDER_train", "WIDER_val"}


def test_without_being_asked_nothing_is_downloaded(server, tmp_path):
    prepare_root(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_an_archive_of_ones_own_photos_under_an_official_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "WIDER_train.zip", "w") as archive:
        archive.writestr("WIDER_train/images/a/own.jpg", b"photo")
    found = hashlib.md5((tmp_path / "WIDER_train.zip").read_bytes()).hexdigest()
    with pytest.raises(InputError, match=rf"WIDER_train\.zip: not the official file.* found {found}.*by hand"):
        prepare_root(tmp_path, download=True)
    assert names(tmp_path) == {"WIDER_train.zip"}


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><title>Google Drive - Quota exceeded</title>", b""])
def test_a_page_saved_in_place_of_an_archive(archives, tmp_path, content):
    (tmp_path / "WIDER_val.zip").write_bytes(content)
    with pytest.raises(
        InputError, match=r"WIDER_val\.zip: not the official file.*download it again from https://drive"
    ):
        prepare_root(tmp_path)
    (tmp_path / "WIDER_val.zip").unlink()
    (tmp_path / "eval_tools.zip").write_bytes(content)  # its MD5 is not known
    with pytest.raises(InputError, match=r"eval_tools\.zip: damaged.*download it again from http"):
        prepare_root(tmp_path)
    assert names(tmp_path) == {"eval_tools.zip"}


def test_evaluation_files_are_verified_by_reading_them(archives, tmp_path):
    with (
        zipfile.ZipFile(archives / "eval_tools.zip") as whole,
        zipfile.ZipFile(tmp_path / "eval_tools.zip", "w") as bad,
    ):
        for name in whole.namelist():
            bad.writestr(name, whole.read(name)[: 200 if "hard" in name else None])
    with pytest.raises(InputError, match=r"eval_tools\.zip: does not hold the four files") as error:
        prepare_root(tmp_path)
    assert "/.eval_tools" not in str(error.value)
    assert names(tmp_path) == {"eval_tools.zip"}


def test_a_killed_unpacking_leaves_no_half_folder(archives, tmp_path, monkeypatch):
    shutil.copy(archives / "wider_face_split.zip", tmp_path)
    original = zipfile.ZipFile.extract

    def interrupted(self, member, path):
        if "val" in member.filename:
            raise KeyboardInterrupt
        return original(self, member, path)

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extract", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_root(tmp_path)
    assert not (tmp_path / "wider_face_split").exists()
    prepare_root(tmp_path)
    assert len(names(tmp_path / "wider_face_split")) == 2


def test_a_disk_that_is_full(archives, tmp_path, monkeypatch):
    shutil.copy(archives / "WIDER_val.zip", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
        with pytest.raises(InputError, match=r"unpacked it takes .* GB, but 0\.0 GB are free"):
            prepare_root(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extract", full)
    with pytest.raises(InputError, match=r"cannot be unpacked \(No space left on device\)"):
        prepare_root(tmp_path)
    assert names(tmp_path) == {"WIDER_val.zip"}


def test_something_in_the_way(archives, tmp_path):
    shutil.copy(archives / "WIDER_val.zip", tmp_path)
    (tmp_path / "WIDER_val" / "fotos").mkdir(parents=True)
    with pytest.raises(InputError, match=r"WIDER_val: in the way of unpacking WIDER_val\.zip"):
        prepare_root(tmp_path)
    assert names(tmp_path / "WIDER_val") == {"fotos"}


def test_another_process_that_is_faster(archives, tmp_path, monkeypatch):
    shutil.copy(archives / "WIDER_val.zip", tmp_path)
    original = wider_archives._extract

    def slow(archive, scratch):
        original(archive, scratch)
        shutil.copytree(scratch / "WIDER_val", tmp_path / "WIDER_val")

    monkeypatch.setattr(wider_archives, "_extract", slow)
    prepare_root(tmp_path)
    assert names(tmp_path) == {"WIDER_val.zip", "WIDER_val"}


def test_everything_is_downloaded(server, tmp_path):
    root = tmp_path / "new" / "root"
    prepare_root(root, download=True)
    assert names(root) == {*NAMES, *FOLDERS}
    assert len(load_split(root, "train")) == len(load_split(root, "val")) == 1


def test_only_what_is_absent_is_downloaded(server, archives, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(archives / "WIDER_train.zip", root)
    (server / "WIDER_train.zip").unlink()
    prepare_root(root, download=True)
    assert names(root) == {*NAMES, *FOLDERS}


@pytest.mark.parametrize("name", ["WIDER_val.zip", "wider_face_split.zip"])
def test_a_page_in_place_of_a_download_says_what_to_do(server, tmp_path, name):
    (server / name).write_bytes(b"<!DOCTYPE html><title>Virus scan warning</title>")
    root = tmp_path / "root"
    with pytest.raises(InputError) as error:
        prepare_root(root, download=True)
    message = str(error.value)
    assert "File not found or corrupted" in message
    assert "\n" not in message
    assert str(root) in message
    still_absent = [name for name in NAMES if not (root / name).is_file()]
    assert name in still_absent
    assert all(f"{name}{' (optional)' if 'eval' in name else ''} from http" in message for name in still_absent)
    assert ("wider_face_split.zip from" in message) == (name == "wider_face_split.zip")
    assert not any(path.name.startswith(".") for path in root.iterdir())


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(WIDERFace, "ANNOTATIONS_FILE", ("http://127.0.0.1:9/wider_face_split.zip", "0", "x"))
    with pytest.raises(InputError, match=r"could not be downloaded \(.*refused.*fetch wider_face_split\.zip from http"):
        prepare_root(tmp_path, download=True)


def test_the_optional_archive_may_be_missing(server, tmp_path, caplog):
    (server / "eval_tools.zip").unlink()
    prepare_root(tmp_path / "root", download=True)
    assert "eval_tools.zip could not be downloaded (HTTP Error 404" in caplog.text
    assert set(load_split(tmp_path / "root", "val")[0].counted) == {"all"}
    caplog.clear()
    prepare_root(tmp_path / "root", download=True)
    assert not caplog.text


def test_the_official_archives_are_known_to_torchvision(monkeypatch):
    monkeypatch.undo()
    for name in NAMES[:3]:
        source = wider_archives._source(name)
        assert len(source.md5) == 32
        assert (source.drive_id is None) == (name == "wider_face_split.zip")
