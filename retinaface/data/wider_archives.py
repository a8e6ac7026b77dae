"""The official WIDER FACE archives: found, verified, unpacked and, where wanted, downloaded."""

import hashlib
import logging
import shutil
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from retinaface.data.annotations import DIFFICULTY_FILES, annotation_files, read_difficulty
from retinaface.errors import InputError
from retinaface.progress import with_progress

_log = logging.getLogger(__name__)

_SPLIT_FILES = "wider_face_split.zip"
_EVALUATION = "eval_tools.zip"
_NAMES = (_SPLIT_FILES, "WIDER_val.zip", "WIDER_train.zip", _EVALUATION)  # what is small comes, or fails, first
_HOME = "http://shuoyang1213.me/WIDERFACE/"
_CHUNK = 1 << 22


class _Source(NamedTuple):
    """Where an archive comes from: its MD5 if known, its address for a browser, and its number on Google Drive."""

    md5: str | None
    url: str
    drive_id: str | None = None


def prepare_root(root: Path | str, download: bool = False) -> None:
    """Unpacks the official archives that lie in a data root, and downloads what is absent if asked to.

    The archives are ``WIDER_train.zip``, ``WIDER_val.zip``, ``wider_face_split.zip`` and, for the official
    difficulties, ``eval_tools.zip``, of which the ``.mat`` files are taken. One whose content is there already is not
    looked at, so that a complete root costs nothing. The others are verified (MD5 as known to torchvision; the
    ``.mat`` files by reading them) and unpacked in a scratch folder of the root, so that a folder is there whole or
    not at all. Archives are kept. Several processes may do this at the same time.

    Args:
        root: The data root.
        download: Whether to download (3.5 GB, unpacked as much again) if photos or annotations are absent. The
            optional ``eval_tools.zip`` comes along then; if it alone cannot be had, a warning says so.

    Raises:
        InputError: An archive is damaged or not the official one, there is no space, something is in the way, or a
            download failed: then the message says which files to fetch and where to put them.
    """
    root = Path(root)
    for name in _NAMES:
        if not _is_unpacked(root, name) and (root / name).is_file():
            _verify(root / name)
            _unpack(root / name)
    if download and any(not _is_unpacked(root, name) for name in _NAMES if name != _EVALUATION):
        for name in _NAMES:
            if not _is_unpacked(root, name):
                _fetch(root, name)


def _is_unpacked(root: Path, name: str) -> bool:
    if name == _EVALUATION:
        return any(file.suffix == ".mat" for file in annotation_files(root, "val"))
    if name == _SPLIT_FILES:
        there = (root / "wider_face_split").is_dir()
        return there or all(annotation_files(root, split) for split in ("train", "val"))
    return (root / Path(name).stem / "images").is_dir()


def _source(name: str) -> _Source:
    from torchvision.datasets import WIDERFace  # type: ignore[import-untyped]  # not needed, and so not paid for, once all is unpacked

    if name == _EVALUATION:
        return _Source(None, f"{_HOME}support/eval_script/{_EVALUATION}")
    if name == _SPLIT_FILES:
        url, md5, _ = WIDERFace.ANNOTATIONS_FILE
        return _Source(md5, url)
    drive_id, md5 = next((drive_id, md5) for drive_id, md5, file in WIDERFace.FILE_LIST if file == name)
    return _Source(md5, f"https://drive.google.com/file/d/{drive_id}", drive_id)


def _verify(archive: Path) -> None:
    expected = _source(archive.name).md5
    if expected is None:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with archive.open("rb") as file:
        for _ in with_progress(range(0, archive.stat().st_size, _CHUNK), f"verifying {archive.name}"):
            digest.update(file.read(_CHUNK))
    if digest.hexdigest() != expected:
        raise InputError(
            f"{archive}: not the official file: expected MD5 {expected}, found {digest.hexdigest()}; download it again "
            f"from {_source(archive.name).url}, or unpack it by hand if it holds photos of your own"
        )


def _unpack(archive: Path) -> None:
    """Puts an archive's folder beside it."""
    root = archive.parent
    folder = "ground_truth" if archive.name == _EVALUATION else archive.stem
    try:
        with tempfile.TemporaryDirectory(prefix=f".{archive.stem}-", dir=root) as scratch:
            _extract(archive, Path(scratch))
            if archive.name == _EVALUATION:
                _verify_difficulty(archive, Path(scratch) / folder)
            _move(Path(scratch) / folder, root / folder, archive.name)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise InputError(f"{archive}: damaged ({error}); download it again from {_source(archive.name).url}") from error
    except OSError as error:
        raise InputError(
            f"{archive}: cannot be unpacked ({error.strerror or error}); {root} needs space and must be writable"
        ) from error


def _extract(archive: Path, scratch: Path) -> None:
    with zipfile.ZipFile(archive) as content:
        members = content.infolist()
        if archive.name == _EVALUATION:
            members = [member for member in members if Path(member.filename).name in DIFFICULTY_FILES]
            for member in members:
                member.filename = f"ground_truth/{Path(member.filename).name}"
        needed, free = sum(member.file_size for member in members), shutil.disk_usage(scratch).free
        if needed > free:
            raise InputError(
                f"{archive}: unpacked it takes {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free; make room, or "
                "use a data root on another disk"
            )
        for member in with_progress(members, f"unpacking {archive.name}"):
            content.extract(member, scratch)


def _verify_difficulty(archive: Path, folder: Path) -> None:
    try:
        read_difficulty(folder)
    except InputError as error:
        raise InputError(
            f"{archive}: does not hold the four files {', '.join(DIFFICULTY_FILES)}, or not whole; download it again "
            f"from {_source(archive.name).url}"
        ) from error


def _move(folder: Path, target: Path, name: str) -> None:
    try:
        folder.rename(target)
    except OSError as error:
        if not _is_unpacked(target.parent, name):  # otherwise another process was faster
            raise InputError(f"{target}: in the way of unpacking {name} ({error.strerror}); move it away") from error


def _fetch(root: Path, name: str) -> None:
    """Downloads and unpacks an archive."""
    try:
        _download(root, name)
    except Exception as error:  # no network, a page instead of the file, a quota: each raises another kind
        reason = " ".join(str(error).split())[:200]
        if name != _EVALUATION:
            raise InputError(_by_hand(root, reason)) from error
        _log.warning(
            "%s could not be downloaded (%s), so there are no figures for easy, medium and hard; to have them, "
            "fetch it from %s and put it into %s",
            name,
            reason,
            _source(name).url,
            root,
        )
        return
    _unpack(root / name)


def _download(root: Path, name: str) -> None:
    """Puts an archive into the root, in one step when it is complete."""
    from torchvision.datasets import utils

    source = _source(name)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as scratch:
        if source.drive_id is not None:
            utils.download_file_from_google_drive(source.drive_id, scratch, name, source.md5)
        else:
            utils.download_url(source.url, scratch, name, source.md5)
        (Path(scratch) / name).replace(root / name)


def _by_hand(root: Path, reason: str) -> str:
    """What to say when a download failed: which files, from where, into which folder."""
    absent = [name for name in _NAMES if not _is_unpacked(root, name)]
    files = ", ".join(
        f"{name}{' (optional)' if name == _EVALUATION else ''} from {_source(name).url}" for name in absent
    )
    return (
        f"WIDER FACE could not be downloaded ({reason}); with a browser, fetch {files}, put them as they are into "
        f"{root.absolute()}, and start again (the links are also on {_HOME})"
    )
