"""The report of a recipe in words: its verdict, its table, what was measured and how."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from retinaface.cpus import DOT_PRODUCTS
from retinaface.evaluation.benchmark_text import RUNTIME_NAMES
from retinaface.evaluation.evaluate import SHOWN_SCORE, describe_data
from retinaface.evaluation.wider_ap import SUBSETS


def kept_share(model: Mapping[str, Any], teacher: Mapping[str, Any]) -> float | None:
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
                        _percent(kept_share(model, models[0])),
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
    title = f"{report['recipe']}: {describe_data(report['data'])}"
    table = Table(title=title, collapse_padding=True, pad_edge=False)  # fits into the 80 columns of a log file
    headings, *rows = report_rows(report["models"])
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "model" else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def report_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown, with what was measured and how."""
    final, compared = report["models"][-1]["name"], report["data"]["faces_by"] == "teacher"
    headings, *rows = report_rows(report["models"])
    table = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    lines = [
        f"# {report['recipe']}",
        "",
        verdict(report),
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
        f"The photos {'on which it differs most from the teacher' if compared else 'with its most errors'}. "
        f"{what_colours_mean(report)}",
        "",
        "![Worst photos](worst_photos.png)",
        "",
        "## How it was measured",
        "",
        *(f"- **{name}:** {what}" for name, what in {**methods(report), **environment(report["machine"])}.items()),
        "",
    ]
    return "\n".join(lines)


def verdict(report: Mapping[str, Any]) -> str:
    """What was kept and gained, how sure that is, and on what data, as sentences of Markdown."""
    models = report["models"]
    return (
        f"The final model ({models[-1]['name']}) {_what_is_kept(report)}, {_how_fast(report)}, and its file is "
        f"**{' '.join(_how_small(models))}**. {_how_fast_at_best(report)} Data: the validation "
        f"photos ({describe_data(report['data'])}), IoU 0.5."
    )


def verdict_figures(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The verdict as three figures, each with what it says."""
    final = report["models"][-1]
    if "agreement" in final:
        kept = (_percent(final["agreement"]), "agreement with the teacher")
    else:
        kept = (_percent(report["retention"]), "of the teacher's AP kept")
    speed = "as fast: no difference measured" if _within_noise(report) else "as fast as the teacher"
    size, change = _how_small(report["models"])
    return [kept, (f"{report['speedup']:.2f}x", speed), (size, f"{change} file")]


def _within_noise(report: Mapping[str, Any]) -> bool:
    low, high = report["speedup_interval"]
    return low is not None and low <= 1 <= high


def _how_fast(report: Mapping[str, Any]) -> str:
    low, high = report["speedup_interval"]
    interval = "too few rounds for an interval" if low is None else f"95 % interval {low:.2f}-{high:.2f}"
    runtime = RUNTIME_NAMES[report["benchmark"]["runtime"]]
    if _within_noise(report):
        return f"**no difference in speed was measured** ({report['speedup']:.2f}x, {interval}) in {runtime}"
    return f"is **{report['speedup']:.2f}x** as fast ({interval}) in {runtime}"


def _how_fast_at_best(report: Mapping[str, Any]) -> str:
    """Compares the teacher in its fastest float runtime with the final model in its fastest: what a user chooses."""
    fastest, models = report["fastest"], report["models"]
    if len(fastest["runtimes"]) == 1:
        why = "runs none of these files" if fastest["failures"] else "is not installed"
        return f"OpenVINO {why}, so it is not known whether the teacher in float is faster there."
    teacher, final = fastest["teacher"], fastest["final"]
    ratio = f"**{final['ratio']:.2f}x** as fast as"
    if not final["differs"]:
        ratio = f"not measurably faster or slower ({final['ratio']:.2f}x) than"
    return (
        f"Each in its fastest runtime, {models[-1]['name']} in {RUNTIME_NAMES[final['runtime']]} "
        f"({final['median_ms']:.2f} ms) is {ratio} {models[0]['name']} in float in {RUNTIME_NAMES[teacher['runtime']]} "
        f"({teacher['median_ms']:.2f} ms)."
    )


def _how_small(models: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    ratio = models[0]["onnx_bytes"] / models[-1]["onnx_bytes"]
    return (f"{ratio:.1f}x", "smaller") if ratio >= 1 else (f"{1 / ratio:.1f}x", "larger")


def what_colours_mean(report: Mapping[str, Any]) -> str:
    """Says what boxes of each colour are on the photos of the report."""
    if report["data"]["faces_by"] == "teacher":
        final = report["models"][-1]["name"]
        return (
            f"At a score of {SHOWN_SCORE}: faces that both find green, those of {final} alone red, those of "
            "the teacher alone orange."
        )
    return (
        f"At a score of {SHOWN_SCORE}: found faces green, false alarms red, missed faces orange, faces that do not "
        "count grey."
    )


def what_is_int8(report: Mapping[str, Any]) -> str:
    """Says which convolutions of the final model are executed in INT8, as Markdown."""
    model = report["models"][-1]
    counted = (
        f"{RUNTIME_NAMES[report['benchmark']['runtime']]} executes {model['int8_convolutions']} of the "
        f"{model['convolutions']} convolutions of {model['name']} in INT8 on this machine"
    )
    if model["keep_float"] is None:
        return f"{counted}: it is a float model."
    kept = ", ".join(f"`{name}`" for name in model["keep_float"])
    return f"{counted}. Its settings leave {kept or 'nothing'} in float (`keep_float`)."


def methods(report: Mapping[str, Any]) -> dict[str, str]:
    """Says what each figure means and how it was measured: name to Markdown."""
    timing, runtimes = report["benchmark"], [RUNTIME_NAMES[name] for name in report["fastest"]["runtimes"]]
    runtime = RUNTIME_NAMES[timing["runtime"]]
    return {
        **_how_faces_were_judged(report["data"]),
        "Time": f"{timing['rounds']} rounds at 1x3x{timing['size']}x{timing['size']}, the models in turns, "
        f"{runtime} on the CPU, {timing['threads']} threads; medians, and the median of the ratio to the first model "
        "per round. Post-processing is not included.",
        "Parameters and GMACs": f"of the float network of the same shape; MACs at {timing['size']}x{timing['size']}.",
        "Fastest runtime": f"of {' and '.join(runtimes)}, which took turns in the same rounds, each with its own "
        "defaults; the teacher is the same float file in each. OpenVINO computes float in bfloat16 where the CPU can.",
        **_what_does_not_run(report["fastest"]["failures"]),
        "INT8 convs": f"how many of the convolutions {runtime} executes in INT8 on this machine: counted in its "
        "graph after all optimizations, not in the file. `report.json` names the others (`float_convolutions`).",
        **_foreign_backends(report),
    }


def environment(machine: Mapping[str, Any]) -> dict[str, str]:
    """Says on which machine and with which software it was measured: name to text."""
    return {
        "Machine": f"{machine['cpu']}, {machine['cores']} cores, {_int8_instructions(machine['flags'])}; "
        f"{machine['os']}.",
        "Versions": f"Python {machine['python']}, torch {machine['torch']}, lightning {machine['lightning']}, "
        f"torchao {machine['torchao']}, onnxruntime {machine['onnxruntime']}, "
        f"openvino {machine['openvino'] or 'absent'}.",
    }


def _int8_instructions(flags: Sequence[str]) -> str:
    dot_products = [flag for flag in flags if flag in DOT_PRODUCTS]
    if dot_products:
        return f"INT8 instructions: {', '.join(dot_products)}"
    return f"no INT8 instructions known ({', '.join(flags) or 'nothing is known of this CPU'})"


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


def _how_faces_were_judged(data: Mapping[str, Any]) -> dict[str, str]:
    where = f"({describe_data(data)}) under `{data['root']}`, which this run did not train on"
    how = "each photo at its own size, score from 0.02, NMS at 0.4; every model as ONNX in ONNX Runtime"
    if data["faces_by"] == "labels":
        return {
            "Accuracy": "average precision at IoU 0.5 with the WIDER FACE protocol on the validation photos "
            f"{where}; {how}. `all` counts every valid face; easy, medium and hard need the official `.mat` files."
        }
    return {
        "Agreement with the teacher": f"the photos {where}, have no labels, so the teacher's detections with a "
        f"score of {SHOWN_SCORE} or more take the place of the faces: what the average precision at IoU 0.5 with the "
        f"WIDER FACE protocol would be if the teacher were always right; {how}. It says how alike two models are, not "
        "how well either finds faces: labelled photos in `WIDER_val/images` would tell. As in the protocol, what is "
        "found on photos without a face (of the teacher) does not count."
    }


def _what_does_not_run(failures: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A line for each model that a runtime does not run."""
    return {
        f"{each['model']} in {RUNTIME_NAMES[each['runtime']]}": f"not timed: {each['reason']}." for each in failures
    }


def _foreign_backends(report: Mapping[str, Any]) -> dict[str, str]:
    """A line for each model that was made for another runtime than the one of the table."""
    measured = report["benchmark"]["runtime"]
    return {
        model[
            "name"
        ]: f"made for {model['backend']}; what {RUNTIME_NAMES[measured]} makes of it (ms, speed-up, INT8 convs) says "
        "nothing about its speed there."
        for model in report["models"]
        if model["backend"] not in (None, measured)
    }
