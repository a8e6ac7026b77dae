"""Imports point upwards only: a room uses the rooms before it in the list, never those after it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("data", "model", "compression", "delivery", "evaluation")
LIGHTNING_ROOMS = ("lightning_modules", "datamodules", "callbacks")
PLAIN_FILES = sorted((ROOT / "retinaface").rglob("*.py"))


def imported_modules(file: Path) -> set[str]:
    """Full names of what a file imports, at its top or within its functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_the_rooms_are_there():
    assert {path.name for path in (ROOT / "retinaface").iterdir() if path.is_dir() and path.name != "__pycache__"} == {
        *ROOMS
    }
    assert len(PLAIN_FILES) > 20


@pytest.mark.parametrize("file", PLAIN_FILES, ids=name_of)
def test_plain_code_imports_upwards_and_no_lightning(file):
    room = file.relative_to(ROOT / "retinaface").parts[0]
    later = ROOMS[ROOMS.index(room) + 1 :] if room in ROOMS else ()
    # The command line stands above everything: its commands on training data use what makes them for a training.
    lightning = () if room == "__main__.py" else ("lightning", "pytorch_lightning", *LIGHTNING_ROOMS)
    forbidden = [
        *(f"retinaface.{name}" for name in later),
        *(("retinaface.__main__",) if room in ROOMS else ()),
        *(*lightning, "train", "compress"),
    ]
    wrong = [
        module
        for module in imported_modules(file)
        if any(module == name or module.startswith(f"{name}.") for name in forbidden)
    ]
    assert not wrong


def test_the_command_line_starts_without_lightning_and_torch():
    code = "import sys, retinaface.__main__; print(sorted({'lightning', 'torch', 'matplotlib'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("datamodules", ("lightning_modules", "callbacks", "train", "compress")),
        ("lightning_modules", ("datamodules", "callbacks", "train", "compress")),
        ("callbacks", ("datamodules", "train", "compress")),
    ],
)
def test_lightning_code_imports_upwards(folder, forbidden):
    for file in sorted((ROOT / folder).glob("*.py")):
        wrong = [module for module in imported_modules(file) if module.split(".")[0] in forbidden]
        assert not wrong, name_of(file)
