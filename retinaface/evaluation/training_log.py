"""What a stage logged while it trained, read from its CSV files."""

import csv
from contextlib import suppress
from pathlib import Path


def read_training_log(folder: Path) -> dict[str, dict[int, float]]:
    """Reads what Lightning's CSV logger wrote for a stage.

    A stage that was interrupted goes on in a file of its own; where two say something about a step, the later one
    holds, as its weights do.

    Args:
        folder: The stage's folder; its files are ``lightning_logs/version_<number>/metrics.csv``.

    Returns:
        Name of a figure, such as ``train/loss``, to training step to value; empty where there is no such file, as with
        another logger, or where the stage did not train.
    """
    files = sorted(folder.glob("lightning_logs/version_*/metrics.csv"), key=lambda file: _number(file.parent))
    figures: dict[str, dict[int, float]] = {}
    for file in files:
        with file.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                for name, text in row.items():
                    # A line that was cut off, or a figure that is not in this row.
                    with suppress(TypeError, ValueError, KeyError):
                        step, value = int(row["step"]), float(text)
                        figures.setdefault(name, {})[step] = value
    return {
        name: dict(sorted(values.items()))
        for name, values in figures.items()
        if name.endswith("/loss") or name.startswith(("val/ap_", "lr-"))
    }


def _number(version: Path) -> int:
    with suppress(ValueError):
        return int(version.name.removeprefix("version_"))
    return -1
