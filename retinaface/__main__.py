"""The command line: ``python -m retinaface COMMAND``; a function per command."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import docstring_parser
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from retinaface.errors import InputError, one_line

_console = Console(markup=False, highlight=False, soft_wrap=True)


def detect(
    model: Path, images: list[Path], out: Path = Path("detections"), score: float = 0.5, nms: float = 0.4
) -> None:
    """Find faces in photos: annotated copies and detections.json.

    Example: python -m retinaface detect int8.onnx photo.jpg another.jpg --out found

    Args:
        model: Detector (.pth, .ckpt or .onnx).
        images: Photos.
        out: Folder to write to.
        score: Faces with a lower score are dropped.
        nms: Of two boxes with a higher overlap (IoU) the lower-scored one is dropped.
    """
    from retinaface.delivery.detect import detect_files
    from retinaface.delivery.runtime import load_detector
    from retinaface.evaluation.visualize import draw_detections

    found, unreadable = detect_files(load_detector(model), images, out, draw_detections, score, nms)
    for path, faces in found.items():
        _console.print(f"{path}: {len(faces.scores)} faces")
    _console.print(f"written to {out}")
    if unreadable:
        raise InputError(f"{len(unreadable)} of {len(images)} photos skipped: {'; '.join(unreadable)}")


def evaluate(model: Path, root: Path, json: Path | None = None) -> None:
    """Measure average precision on the validation photos of a data root.

    Example: python -m retinaface evaluate int8.onnx --root data/wider_face

    Args:
        model: Detector (.pth, .ckpt or .onnx).
        root: Data root in WIDER FACE layout.
        json: Also write the figures to this file.
    """
    from retinaface.evaluation.evaluate import evaluate as measure

    result = measure(model, root)
    table = Table(title=escape(f"{model} in {result.runtime}: {result.photos} photos, {result.faces} faces"))
    for heading in (*result.ap, "images/s"):
        table.add_column(heading, justify="right")
    table.add_row(*("-" if ap is None else f"{ap:.4f}" for ap in result.ap.values()), f"{result.images_per_second:.1f}")
    _console.print(table)
    facts = asdict(result)
    del facts["curves"]
    _write_json(json, {"model": str(model), "root": str(root), **facts})


def export(ckpt: Path, out: Path) -> None:
    """Write a checkpoint as ONNX, INT8 if it was trained for it, and check the file against torch.

    Example: python -m retinaface export runs/own_photos/int8/checkpoints/last.ckpt --out int8.onnx

    Args:
        ckpt: Checkpoint (.ckpt) or public weights (.pth).
        out: The ONNX file to write.
    """
    from retinaface.compression.structure import load_network
    from retinaface.delivery.export import export_onnx

    export_onnx(load_network(ckpt)[0], out)
    _console.print(f"written to {out} ({out.stat().st_size / 1e6:.2f} MB)")


def benchmark(
    baseline: Path,
    candidates: list[Path],
    size: int = 640,
    threads: int | None = None,
    warmup: int = 10,
    rounds: int = 100,
    json: Path | None = None,
) -> None:
    """Time ONNX models in ONNX Runtime, in turns, against a baseline.

    Example: python -m retinaface benchmark teacher.onnx pruned.onnx int8.onnx --size 640 --threads 2

    Args:
        baseline: ONNX file that the others are compared with.
        candidates: ONNX files.
        size: Side of the picture in pixels.
        threads: Threads to compute with; by default every physical core that this process may use.
        warmup: Rounds before the timing starts.
        rounds: Rounds timed.
        json: Also write the figures to this file.
    """
    from retinaface.evaluation.benchmark import benchmark as measure
    from retinaface.evaluation.benchmark import benchmark_table, machine_facts

    timings = measure([baseline, *candidates], size, threads, warmup, rounds)
    _console.print(benchmark_table(timings))
    _write_json(json, {"machine": machine_facts(), "timings": [asdict(timing) for timing in timings]})


def wider_ap(predictions: Path, ground_truth: Path, json: Path | None = None) -> None:
    """Compute the official WIDER FACE average precisions of result files.

    Example: python -m retinaface wider-ap predictions ground_truth --json ap.json

    Args:
        predictions: Folder of <event>/<image>.txt files in the WIDER result format.
        ground_truth: Folder with the official .mat files.
        json: Also write easy, medium and hard to this file.
    """
    from retinaface.evaluation.wider_ap import evaluate_predictions

    result = evaluate_predictions(predictions, ground_truth)
    for subset, value in result.items():
        _console.print(f"{subset}: {value:.6f}")
    _write_json(json, {subset: None if math.isnan(value) else value for subset, value in result.items()})


def _write_json(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --json") from error


# Each command, and its positional arguments with the number of values they take.
COMMANDS: dict[str, tuple[Callable[..., None], dict[str, str | None]]] = {
    "detect": (detect, {"model": None, "images": "+"}),
    "evaluate": (evaluate, {"model": None}),
    "export": (export, {"ckpt": None}),
    "benchmark": (benchmark, {"baseline": None, "candidates": "+"}),
    "wider-ap": (wider_ap, {"predictions": None, "ground_truth": None}),
}


def _parser() -> ArgumentParser:
    """Every command's arguments are those of its function; its help is the docstring."""
    parser = ArgumentParser(prog="python -m retinaface", description="Use, measure and deliver a RetinaFace detector.")
    subcommands = parser.add_subcommands(dest="command")
    for name, (function, positional) in COMMANDS.items():
        docstring = docstring_parser.parse(function.__doc__ or "")
        command = ArgumentParser(description=f"{docstring.short_description} {docstring.long_description}")
        for argument, count in positional.items():
            description = next(param.description for param in docstring.params if param.arg_name == argument)
            command.add_argument(argument, type=Path, nargs=count, help=description)
        command.add_function_arguments(function, skip=set(positional), as_group=False)
        subcommands.add_subcommand(name, command, help=docstring.short_description)
    return parser


def main(args: list[str] | None = None) -> None:
    """Runs one command.

    Args:
        args: Command-line arguments; by default those of the process.

    Raises:
        SystemExit: With status 2 and a one-line message when the input is wrong.
    """
    config = _parser().parse_args(args)
    try:
        COMMANDS[config.command][0](**config[config.command].as_dict())
    except InputError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
