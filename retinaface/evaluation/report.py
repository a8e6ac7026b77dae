"""The report of a recipe: what was kept and what was gained, as JSON, Markdown and pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from retinaface.compression.pruning import count_complexity
from retinaface.compression.structure import load_structure
from retinaface.data.annotations import load_unlabelled
from retinaface.evaluation.benchmark import Timing, benchmark, machine_facts
from retinaface.evaluation.describe import describe, kept_channels
from retinaface.evaluation.evaluate import (
    SHOWN_SCORE,
    Evaluation,
    describe_data,
    evaluate,
    evaluate_on,
    labelled_by,
    save_pictures,
    save_worst_photos,
)
from retinaface.evaluation.int8_share import convolutions_in_int8
from retinaface.evaluation.visualize import plot_kept_channels, plot_report
from retinaface.evaluation.wider_ap import SIZE_CLASSES, SUBSETS


def build_report(
    folder: Path,
    recipe: str,
    checkpoints: Mapping[str, Path],
    root: Path,
    size: int = 640,
    threads: int | None = None,
    labels: bool = True,
) -> dict[str, Any]:
    """Measures every model of a run and writes ``report.json``, ``report.md`` and their pictures.

    Accuracy is that of the ONNX files in ONNX Runtime on the validation photos; time is that of the same files in the
    same runtime, in turns.

    Without labelled validation photos there is no accuracy, and each model has an ``agreement`` instead: what its
    average precision would be if the teacher's detections with a score of 0.5 or more were the faces.

    Args:
        folder: The run's folder; holds ``<name>.onnx`` for each model.
        recipe: Name of the recipe.
        checkpoints: Model name to its checkpoint, the teacher first and the final model last.
        root: Data root whose validation photos count.
        size: Side of the picture for MACs and timing, in pixels.
        threads: Threads for the timing; None takes every physical core.
        labels: Whether the root's photos have labels; if not, see
            :func:`retinaface.data.annotations.load_unlabelled`.

    Returns:
        The report: ``recipe``, ``machine``, ``data``, ``models``, ``retention``, ``speedup`` and their details.

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
    timings = dict(zip(files, benchmark(list(files.values()), size=size, threads=threads), strict=True))
    models = [
        {
            "name": name,
            **(_accuracy(evaluations[name]) if labelled else _agreement(evaluations[name])),
            **_costs(checkpoints[name], files[name], timings[name], size),
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
        "retention": _kept(final, teacher),
        "speedup": timing.ratio,
        "speedup_interval": [timing.ratio_low, timing.ratio_high],
        "benchmark": {"size": size, "threads": timing.threads, "rounds": timing.rounds, "runtime": "onnxruntime"},
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(report_markdown(report), encoding="utf-8")
    plot_report(models, folder / "report.png")
    layers = describe(load_structure(checkpoints[final["name"]]), size).layers
    plot_kept_channels(kept_channels(layers), folder / "kept_channels.png")
    photos = evaluations[final["name"]].photos
    if labelled:
        save_pictures({name: evaluation.accuracy for name, evaluation in evaluations.items()}, photos, folder)
    else:
        save_worst_photos(photos, folder / "worst_photos.png")
    return report


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


def _costs(checkpoint: Path, file: Path, timing: Timing, size: int) -> dict[str, Any]:
    structure = load_structure(checkpoint)
    params, macs = count_complexity(structure.build_float(), size)
    share = convolutions_in_int8(file)
    return {
        "backend": None if structure.quantization is None else structure.quantization.backend,
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


def _kept(model: Mapping[str, Any], teacher: Mapping[str, Any]) -> float | None:
    """Share of the teacher's AP (all); None where there is nothing to keep, or no face to find."""
    own, whole = model["ap"]["all"], teacher["ap"]["all"]
    return own / whole if own is not None and whole else None


def report_rows(models: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The report's table: a row of headings, then a row per model, relative figures against the first.

    Subsets that the photos are not labelled for have no column. Without labels there is only the agreement with the
    first model.
    """
    compared = "agreement" in models[0]
    subsets = [name for name in SUBSETS if name == "all" or any(model["ap"][name] is not None for model in models)]
    headings = [
        "model",
        *([f"agreement with {models[0]['name']}"] if compared else [*(f"AP {name}" for name in subsets), "kept"]),
        "params",
        "GMACs",
        "ONNX",
        "INT8 convs",
        "ms",
        "speed-up",
    ]
    return [
        headings,
        *(
            [
                model["name"],
                *(
                    [_percent(model["agreement"])]
                    if compared
                    else [
                        *("-" if (value := model["ap"][name]) is None else f"{value:.3f}" for name in subsets),
                        _percent(_kept(model, models[0])),
                    ]
                ),
                f"{model['params'] / 1e6:.3f} M",
                f"{model['macs'] / 1e9:.3f}",
                f"{model['onnx_bytes'] / 1e6:.2f} MB",
                f"{model['int8_convolutions']}/{model['convolutions']}",
                f"{model['latency_ms_median']:.2f}",
                f"{model['speedup']:.2f}x",
            ]
            for model in models
        ),
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def report_table(report: Mapping[str, Any]) -> Table:
    """The report's table for a terminal."""
    title = escape(f"{report['recipe']}: {describe_data(report['data'])}")
    table = Table(title=title, collapse_padding=True, pad_edge=False)  # fits into the 80 columns of a log file
    headings, *rows = report_rows(report["models"])
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "model" else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def report_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown, with what was measured and how."""
    machine, data, timing = report["machine"], report["data"], report["benchmark"]
    final, compared = report["models"][-1]["name"], data["faces_by"] == "teacher"
    low, high = report["speedup_interval"]
    interval = "" if low is None else f" (95 % interval {low:.2f}-{high:.2f})"
    headings, *rows = report_rows(report["models"])
    table = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    lines = [
        f"# {report['recipe']}",
        "",
        f"The final model ({final}) {_what_is_kept(report)} and is **{report['speedup']:.2f}x** as fast{interval}.",
        "",
        *(f"| {' | '.join(row)} |" for row in table),
        "",
        "![Accuracy, latency, size and computation](report.png)",
        "",
        *([] if compared else _ACCURACY_PICTURES),
        f"What pruning left of {final}, layer by layer (`python -m retinaface describe` says more):",
        "",
        "![Channels kept](kept_channels.png)",
        "",
        f"The photos on which {final} differs most from the teacher at a score of {SHOWN_SCORE}: faces that both find "
        f"green, those of {final} alone red, those of the teacher alone orange."
        if compared
        else f"The photos with the most errors of {final} at a score of {SHOWN_SCORE}: found faces green, false alarms "
        "red, missed faces orange, faces that do not count grey.",
        "",
        "![Worst photos](worst_photos.png)",
        "",
        "## How it was measured",
        "",
        _how_faces_were_judged(data, compared),
        f"- **Time:** {timing['rounds']} rounds at 1x3x{timing['size']}x{timing['size']}, the models in turns, ONNX "
        f"Runtime on the CPU, {timing['threads']} threads; medians, and the median of the ratio to the first model per "
        "round. Post-processing is not included.",
        "- **Parameters and GMACs:** of the float network of the same shape; MACs at "
        f"{timing['size']}x{timing['size']}.",
        "- **INT8 convs:** how many of the convolutions ONNX Runtime executes in INT8 on this machine: counted in its "
        "graph after all optimizations, not in the file. `report.json` names the others (`float_convolutions`).",
        *_foreign_backends(report["models"]),
        f"- **Machine:** {machine['cpu']}, {machine['cores']} cores, INT8 instructions: "
        f"{', '.join(machine['flags']) or 'unknown'}; {machine['os']}.",
        f"- **Versions:** Python {machine['python']}, torch {machine['torch']}, lightning {machine['lightning']}, "
        f"torchao {machine['torchao']}, onnxruntime {machine['onnxruntime']}.",
        "",
    ]
    return "\n".join(lines)


_ACCURACY_PICTURES = (
    "![Precision and recall](precision_recall.png)",
    "",
    "![Average precision by face size](ap_by_size.png)",
    "",
)


def _what_is_kept(report: Mapping[str, Any]) -> str:
    teacher, final = report["models"][0], report["models"][-1]
    nothing = " (the teacher finds no face, so there is nothing to keep)"
    if "agreement" in final:
        share, why = final["agreement"], "" if final["agreement"] is not None else nothing
        return f"agrees with the teacher to **{'an unknown share' if share is None else _percent(share)}**{why}"
    kept = "an unknown share" if report["retention"] is None else _percent(report["retention"])
    why = "" if teacher["ap"]["all"] else nothing
    return f"keeps **{kept}** of the teacher's average precision (all){why}"


def _how_faces_were_judged(data: Mapping[str, Any], compared: bool) -> str:
    where = f"({describe_data(data)}) under `{data['root']}`, which this run did not train on"
    how = "each photo at its own size, score from 0.02, NMS at 0.4; every model as ONNX in ONNX Runtime"
    if not compared:
        return (
            f"- **Accuracy:** average precision at IoU 0.5 with the WIDER FACE protocol on the validation photos "
            f"{where}; {how}. `all` counts every valid face; easy, medium and hard need the official `.mat` files."
        )
    return (
        f"- **Agreement with the teacher:** the photos {where}, have no labels, so the teacher's detections with a "
        f"score of {SHOWN_SCORE} or more take the place of the faces: what the average precision at IoU 0.5 with the "
        f"WIDER FACE protocol would be if the teacher were always right; {how}. It says how alike two models are, not "
        "how well either finds faces: labelled photos in `WIDER_val/images` would tell. As in the protocol, what is "
        "found on photos without a face (of the teacher) does not count."
    )


def _foreign_backends(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each model that was made for another runtime than the one that everything is measured in."""
    return [
        f"- **{model['name']}** was made for {model['backend']}; what ONNX Runtime makes of it (ms, speed-up, INT8 "
        "convs) says nothing about its speed there."
        for model in models
        if model["backend"] not in (None, "onnxruntime")
    ]
