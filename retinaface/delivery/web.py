"""Writes a static page that runs a detector in the visitor's browser, with ONNX Runtime's build for browsers."""

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
import warnings
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any

from retinaface.data.annotations import MEAN_BGR
from retinaface.delivery.export import INPUT_NAME
from retinaface.delivery.runtime import Detector, load_detector
from retinaface.errors import InputError
from retinaface.model.boxes import VARIANCES
from retinaface.model.network import SMALLEST_PICTURE

PACKAGE = "onnxruntime-web"
PACKAGE_VERSION = "1.30.0"
# Of the package as npm gives it, by npm's own way of writing it down.
_INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="

# What of the package is needed, and its name in the page: not every server knows that .mjs is a script.
_RUNTIME_FILES = {
    "dist/ort.wasm.bundle.min.mjs": "ort.js",
    "dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
}

_PAGE = Path(__file__).with_name("web_page")
_MODEL, _FACTS = "model.onnx", "model.json"
_NPM_SECONDS = 600


def write_page(model: Path, out: Path, runtime: Path | None = None) -> None:
    """Writes a folder that any static server can offer: the page, the detector and what runs it.

    The page asks nobody else for anything. ``model.json`` in it holds what a browser cannot read from an ONNX file: the
    ``name`` of the file, its ``input``, fixed ``size`` or null, ``anchor_sizes``, ``strides``, ``variances``,
    ``mean_bgr``, ``smallest_picture`` in pixels, and the ``defaults`` of :meth:`Detector.detect`.

    Args:
        model: ONNX file with raw outputs, float or INT8.
        out: The folder to make; a page that was written before is replaced. It appears only when it is complete.
        runtime: The unpacked npm package ``onnxruntime-web``; None has npm download it.

    Raises:
        InputError: The model is not such a file, the package cannot be had or is another one, or the folder holds
            something else or cannot be written.
    """
    facts = _facts(model)
    _require_page_or_nothing(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            new, old = Path(scratch) / "new", Path(scratch) / "old"
            package = runtime or _download_runtime(Path(scratch))
            shutil.copytree(_PAGE, new)
            _copy_runtime(package, new)
            shutil.copyfile(model, new / _MODEL)
            (new / _FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            if out.exists():
                out.rename(old)
            new.rename(out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error}); choose another --out") from error


def _require_page_or_nothing(out: Path) -> None:
    """What the page replaces must be a page alone: a person's photos may lie beside it."""
    ours = {_MODEL, _FACTS, *_RUNTIME_FILES.values(), *(file.name for file in _PAGE.iterdir())}
    there = {file.name for file in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    if others := sorted(there - ours):
        raise InputError(
            f"{out}: holds {others[0]}, which is not part of such a page; move it, or choose another --out"
        )
    if there and not {_FACTS, "page.js"} <= there:
        raise InputError(f"{out}: holds something that is not such a page; choose another --out")


def _facts(model: Path) -> dict[str, Any]:
    if model.suffix.lower() != ".onnx":
        raise InputError(
            f"{model}: browsers run ONNX files only; write one with `python -m retinaface export {model} --out FILE`"
        )
    with warnings.catch_warnings():
        # What this machine's CPU does to sums of INT8 is no matter to a browser, which does not cut them off.
        warnings.simplefilter("ignore")
        detector = load_detector(model)
    if detector.batch not in (None, 1):
        raise InputError(
            f"{model}: takes {detector.batch} pictures per call; expected 1 or any, export it without --batch"
        )
    network = asdict(detector.config)
    arguments = signature(Detector.detect).parameters.values()
    return {
        "name": model.name,
        "input": INPUT_NAME,
        "size": detector.size,
        "anchor_sizes": network["anchor_sizes"],
        "strides": network["strides"],
        "variances": VARIANCES,
        "mean_bgr": MEAN_BGR,
        "smallest_picture": SMALLEST_PICTURE,
        # But `longest`, which is None: the page has its own choice of sizes.
        "defaults": {each.name: each.default for each in arguments if each.default not in (each.empty, None)},
    }


def _download_runtime(folder: Path) -> Path:
    """Has npm download the package, or take it from its cache, and unpacks what is needed of it."""
    remedy = f"unpack the npm package {PACKAGE} {PACKAGE_VERSION} and name its folder with --runtime"
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(f"{PACKAGE}: npm is not installed; install it, or {remedy}")
    command = [
        npm,
        "pack",
        f"{PACKAGE}@{PACKAGE_VERSION}",
        "--pack-destination=.",
        "--prefer-offline",
        "--ignore-scripts",
        "--silent",
    ]
    try:
        subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=_NPM_SECONDS)
    except subprocess.CalledProcessError as error:
        reason = " ".join((error.stderr or error.stdout or f"status {error.returncode}").split())[:160]
        raise InputError(f"{PACKAGE}: npm cannot download it ({reason}); check the network, or {remedy}") from error
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{PACKAGE}: npm took longer than {_NPM_SECONDS} s; check the network, or {remedy}") from error
    archive = folder / f"{PACKAGE}-{PACKAGE_VERSION}.tgz"
    _require_integrity(archive, remedy)
    with tarfile.open(archive) as content:
        for name in ("package.json", *_RUNTIME_FILES):
            content.extract(f"package/{name}", folder, filter="data")
    return folder / "package"


def _require_integrity(archive: Path, remedy: str) -> None:
    digest = hashlib.sha512(archive.read_bytes()).digest()
    if f"sha512-{base64.b64encode(digest).decode()}" != _INTEGRITY:
        raise InputError(f"{PACKAGE}: what npm downloaded is not version {PACKAGE_VERSION} as published; {remedy}")


def _copy_runtime(package: Path, page: Path) -> None:
    try:
        found = json.loads((package / "package.json").read_text(encoding="utf-8"))
        there = (found["name"], found["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{package}: no npm package; expected the unpacked {PACKAGE} {PACKAGE_VERSION}") from error
    if there != (PACKAGE, PACKAGE_VERSION):
        raise InputError(
            f"{package}: holds {' '.join(there)}; expected {PACKAGE} {PACKAGE_VERSION}, which this page was tested with"
        )
    for source, name in _RUNTIME_FILES.items():
        if not (package / source).is_file():
            raise InputError(f"{package}: lacks {source}; unpack {PACKAGE} {PACKAGE_VERSION} again")
        shutil.copyfile(package / source, page / name)
