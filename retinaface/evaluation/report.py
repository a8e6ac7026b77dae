"""The report of a recipe: what was kept and what was gained, measured and written down."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retinaface.compression.pruning import count_complexity
from retinaface.compression.structure import Structure, load_structure
from retinaface.data.annotations import load_unlabelled
from retinaface.evaluation.benchmark import Rounds, Timing, machine_facts, time_in_turns
from retinaface.evaluation.describe import describe, kept_channels
from retinaface.evaluation.evaluate import (
    Evaluation,
    evaluate,
    evaluate_on,
    labelled_by,
    save_pictures,
    save_worst_photos,
)
from retinaface.evaluation.int8_share import RuntimeName, convolutions_in_int8
from retinaface.evaluation.raw_call import usable_runtimes
from retinaface.evaluation.report_html import report_html
from retinaface.evaluation.report_text import kept_share, report_markdown
from retinaface.evaluation.reproduction import Reproduction
from retinaface.evaluation.visualize import plot_kept_channels, plot_report
from retinaface.evaluation.wider_ap import SIZE_CLASSES, SUBSETS
from retinaface.whole_file import whole_file


def build_report(
    folder: Path,
    recipe: str,
    checkpoints: Mapping[str, Path],
    root: Path,
    size: int = 640,
    threads: int | None = None,
    labels: bool = True,
    reproduction: Reproduction | None = None,
) -> dict[str, Any]:
    """Measures every model of a run and writes ``report.html``, ``report.json``, ``report.md`` and its pictures.

    Accuracy is that of the ONNX files in ONNX Runtime on the validation photos. Time is that of the same files, all in
    one runtime, in turns: OpenVINO if the final model was made for it and it is installed, else ONNX Runtime. What a
    user would choose between is there too: the teacher in its fastest runtime, in float, and the final model in its
    own. What OpenVINO does not run is said, with the reason.

    Without labelled validation photos there is no accuracy, and each model has an ``agreement`` instead: what its
    average precision would be if the teacher's detections with a score of 0.5 or more were the faces.

    Args:
        folder: The run's folder; holds ``<name>.onnx`` for each model, and for the training curves the folder
            ``<name>`` of its stage.
        recipe: Name of the recipe.
        checkpoints: Model name to its checkpoint, the teacher first and the final model last.
        root: Data root whose validation photos count.
        size: Side of the picture for MACs and timing, in pixels.
        threads: Threads for the timing; None takes every physical core.
        labels: Whether the root's photos have labels; if not, see
            :func:`retinaface.data.annotations.load_unlabelled`.
        reproduction: How the run was started; None leaves it out.

    Returns:
        The report: ``recipe``, ``machine``, ``data``, ``models``, ``retention``, ``speedup``, ``fastest`` and their
        details.

    Raises:
        InputError: A model or the data cannot be read.
    """
    files = {name: folder / f"{name}.onnx" for name in checkpoints}
    samples = [] if labels else load_unlabelled(root, "val")
    labelled = all(sample.labelled for sample in samples)
    if labelled:
        evaluations = {name: evaluate(file, root) for name, file in files.items()}
    else:
        samples = labelled_by(next(iter(files.values())), samples)
        evaluations = {name: evaluate_on(file, samples) for name, file in files.items()}
    in_turns = list(files.values())
    rounds = time_in_turns(in_turns, usable_runtimes(in_turns), size, threads, optional=["openvino"])
    structures = {name: load_structure(checkpoint) for name, checkpoint in checkpoints.items()}
    runtime = _runtime_of(list(structures.values())[-1], rounds)
    timings = dict(zip(files, rounds.within(runtime), strict=True))
    models = [
        {
            "name": name,
            **(_accuracy(evaluations[name]) if labelled else _agreement(evaluations[name])),
            **_costs(structures[name], files[name], timings[name], size, runtime),
        }
        for name in checkpoints
    ]
    teacher, final = models[0], models[-1]
    timing = timings[final["name"]]
    report = {
        "recipe": recipe,
        "machine": machine_facts(),
        "data": {
            "root": str(root),
            "split": "val",
            "photos": len(evaluations[teacher["name"]].photos),
            "official_photos": evaluations[teacher["name"]].official_photos,
            "faces": evaluations[teacher["name"]].faces,
            "faces_by": "labels" if labelled else "teacher",
        },
        "models": models,
        "retention": kept_share(final, teacher),
        "speedup": timing.ratio,
        "speedup_interval": [timing.ratio_low, timing.ratio_high],
        "benchmark": {"size": size, "threads": timing.threads, "rounds": timing.rounds, "runtime": runtime},
        "fastest": _fastest(rounds),
        "reproduction": reproduction and asdict(reproduction),
    }
    _write(folder / "report.json", json.dumps(report, indent=2) + "\n")
    _write(folder / "report.md", report_markdown(report))
    plot_report(models, folder / "report.png")
    layers = describe(structures[final["name"]], size).layers
    plot_kept_channels(kept_channels(layers), folder / "kept_channels.png")
    photos = evaluations[final["name"]].photos
    if labelled:
        save_pictures({name: evaluation.accuracy for name, evaluation in evaluations.items()}, photos, folder)
    else:
        save_worst_photos(photos, folder / "worst_photos.png")
    _write(folder / "report.html", report_html(report, evaluations, layers, folder))
    return report


def _write(path: Path, text: str) -> None:
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def _accuracy(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "ap": evaluation.accuracy.ap,
        "ap_by_size": evaluation.accuracy.ap_by_size,
        "landmark_error": evaluation.landmark_error,
    }


def _agreement(evaluation: Evaluation) -> dict[str, Any]:
    """The same keys without figures, and how far the model agrees with the one that said where the faces are."""
    unknown = {"ap": dict.fromkeys(SUBSETS), "ap_by_size": dict.fromkeys(SIZE_CLASSES), "landmark_error": None}
    return {**unknown, "agreement": evaluation.accuracy.ap["all"]}


def _runtime_of(final: Structure, rounds: Rounds) -> RuntimeName:
    """The runtime to report: the one that the final model was made for, if every model was timed in it."""
    made_for = final.quantization and final.quantization.backend
    in_openvino = len(rounds.within("openvino")) == len(rounds.models)
    return "openvino" if made_for == "openvino" and in_openvino else "onnxruntime"


def _fastest(rounds: Rounds) -> dict[str, Any]:
    """The teacher and the final model, each in its fastest runtime; the latter's ratio is to the former."""
    fastest = rounds.fastest()
    return {
        "runtimes": list(dict.fromkeys(runtime for _, runtime in rounds.entries)),
        "teacher": asdict(fastest[0]),
        "final": asdict(fastest[-1]),
        "failures": [{**asdict(each), "model": Path(each.model).stem} for each in rounds.failures],
    }


def _costs(structure: Structure, file: Path, timing: Timing, size: int, runtime: RuntimeName) -> dict[str, Any]:
    params, macs = count_complexity(structure.build_float(), size)
    share = convolutions_in_int8(file, runtime)
    return {
        "backend": None if structure.quantization is None else structure.quantization.backend,
        "keep_float": None if structure.quantization is None else list(structure.quantization.keep_float),
        "params": params,
        "macs": macs,
        "onnx_bytes": file.stat().st_size,
        "convolutions": share.total,
        "int8_convolutions": share.int8,
        "float_convolutions": list(share.float_names),
        "latency_ms_median": timing.median_ms,
        "latency_ms_p10": timing.p10_ms,
        "latency_ms_p90": timing.p90_ms,
        "speedup": timing.ratio,
    }
