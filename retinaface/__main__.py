"""The command line: ``python -m retinaface COMMAND``; a function per command."""

import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from inspect import Parameter, signature
from io import TextIOWrapper
from itertools import islice, product
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Column, Table

from retinaface.errors import InputError, one_line

_console = Console(markup=False, highlight=False, soft_wrap=True)


def detect(
    model: Path,
    sources: list[Path],
    out: Path = Path("detections"),
    score: float = 0.5,
    nms: float = 0.4,
    frames: int | None = None,
    longest: int = 1024,
    runtime: Literal["auto", "torch", "onnxruntime", "openvino"] = "auto",
    providers: list[str] | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> None:
    """Find faces in photos, videos or what a camera sees: annotated copies, detections.json and detections.csv.

    What cannot be read is named and skipped; the command then ends with status 2.

    Example: python -m retinaface detect int8.onnx photo.jpg folder "more/**/*.png" film.mp4 --out found

    Args:
        model: Detector (.pth, .ckpt or .onnx).
        sources: Photos, videos, folders (with all below them), patterns in quotes, or the number of a camera, which
            Ctrl-C stops.
        out: Folder to write to.
        score: Faces with a lower score are dropped.
        nms: Of two boxes with a higher overlap (IoU) the one with the lower score is dropped.
        frames: Of a video or camera, look at this many frames at most.
        longest: Pictures whose long side is above this many pixels are shrunk to it for the model, which sees faces
            where none are in those of 600 pixels and more, and misses those of 1,300; more than the default, the width
            of WIDER FACE's photos, finds smaller faces in large pictures.
        runtime: What runs the model; auto takes torch for .pth and .ckpt, ONNX Runtime for .onnx.
        providers: ONNX Runtime's execution providers, the preferred one first, such as CUDA or CoreML; behind the other
            arguments, as all that follow are taken for providers.
        device: Where torch (cpu, cuda, mps) or OpenVINO (CPU, GPU) computes.
        threads: Threads to compute with; by default one per CPU that this process may use, or the runtime's choice.
    """
    from retinaface.delivery.detect import VideoDetections, detect_files
    from retinaface.delivery.runtime import load_detector
    from retinaface.delivery.sources import find_sources, is_photo
    from retinaface.evaluation.visualize import draw_detections

    _require_at_least({"frames": (1 if frames is None else frames, 1), "longest": (longest, 64)})
    _require_share({"score": score, "nms": nms})
    there, empty, left_out = find_sources(list(map(str, sources)), out)
    if left_out:
        kinds = ", ".join(f"{suffix} ({count})" for suffix, count in left_out.most_common())
        _console.print(f"left out in the folders, as neither photo nor video by name: {kinds}")
    if not there:
        raise InputError("; ".join(empty))
    many = len(there) > 1 and all(map(is_photo, there))  # the frames of a video come one after the other
    detector = load_detector(model, threads, runtime=runtime, providers=providers, device=device, many=many)
    found, unreadable = detect_files(detector, there, out, draw_detections, score, nms, frames, longest)
    for source, each in found.items():
        if isinstance(each, VideoDetections):
            count = sum(len(faces.scores) for faces in each.frames)
            _console.print(f"{source}: {_count(count, 'face')} in {_count(len(each.frames), 'frame')}")
        else:
            _console.print(f"{source}: {_count(len(each.scores), 'face')}")
    _console.print(f"written to {out}")
    unread = [*empty, *unreadable]
    _print_list("NOT READ, not to the end, or not copied", unread, most=len(unread))
    if unread:
        raise InputError(
            f"{len(unread)} of {len(there) + len(empty)} sources not read, not to the end, or not copied: named above"
        )


def evaluate(
    model: Path,
    root: Path,
    protocol: Literal["original", "vga", "long640", "multiscale"] = "original",
    teacher: Path | None = None,
    out: Path | None = None,
    results: Path | None = None,
    wandb: str | None = None,
    json: Path | None = None,
    runtime: Literal["auto", "torch", "onnxruntime", "openvino"] = "auto",
    providers: list[str] | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> None:
    """Measure average precision on the validation photos of a data root.

    Example: python -m retinaface evaluate int8.onnx --root data/wider_face --teacher teacher.onnx --out pictures

    Args:
        model: Detector (.pth, .ckpt or .onnx).
        root: Data root in WIDER FACE layout.
        protocol: At which size it sees the photos: their own, fitted in 640 x 480, with a long side of 640, or at five
            sizes and mirrored with their boxes voting.
        teacher: Detector to compare with, in the tables, the pictures and the JSON file.
        out: Draw precision and recall, average precision by face size and the worst photos in this folder.
        results: Write what the model found to this folder, in the WIDER result format that wider-ap reads.
        wandb: Send figures and the pictures of --out to this Weights & Biases project.
        json: Also write the figures to this file.
        runtime: What runs model and teacher; auto takes torch for .pth and .ckpt, ONNX Runtime for .onnx.
        providers: ONNX Runtime's execution providers, the preferred one first, such as CUDA or CoreML; behind the other
            arguments, as all that follow are taken for providers.
        device: Where torch (cpu, cuda, mps) or OpenVINO (CPU, GPU) computes.
        threads: Threads to compute with; by default one per CPU that this process may use, or the runtime's choice.
    """
    from retinaface.delivery.runtime import load_detector
    from retinaface.evaluation.evaluate import evaluate as measure
    from retinaface.evaluation.evaluate import evaluation_tables, save_pictures, save_results, send_to_wandb

    load = partial(load_detector, threads=threads, runtime=runtime, providers=providers, device=device, many=True)
    compared = {} if teacher is None else {f"teacher {teacher.name}": measure(teacher, root, protocol, load)}
    evaluation = measure(model, root, protocol, load)
    evaluations = {**compared, model.name: evaluation}
    for table in evaluation_tables(evaluations):
        _console.print(table)
    facts = {"model": str(model), "root": str(root), **evaluation.figures()}
    for reference in compared.values():
        facts["teacher"] = {"model": str(teacher), **reference.figures()}
    _write_json(json, facts)
    if results is not None:
        save_results(evaluation, results)
        _console.print(f"results written to {results}")
    pictures = {}
    if out is not None:
        accuracies = {name: each.accuracy for name, each in evaluations.items()}
        pictures = save_pictures(accuracies, evaluation.photos, out, protocol)
        _console.print(f"pictures written to {out}")
    if wandb is not None:
        send_to_wandb(wandb, facts, pictures)


def export(
    ckpt: Path,
    out: Path,
    form: Literal["raw", "decoded", "end_to_end"] = "raw",
    input: Literal["normalized", "uint8", "bgr", "rgb"] = "normalized",
    size: str | None = None,
    batch: int | None = None,
    score: float | None = None,
    nms: float | None = None,
    photos: Path | None = None,
    least_channels: int | None = None,
) -> None:
    """Write a checkpoint as ONNX, INT8 if it was trained for it, and check the file against torch.

    A name that ends in .pte gives a file for phones instead: a program for ExecuTorch (pip install executorch), which
    XNNPACK runs; of one size, 640x640 by default, and one batch, 1 by default, raw or decoded.

    Example: python -m retinaface export last.ckpt --out faces.onnx --form end_to_end --input uint8

    Args:
        ckpt: Checkpoint (.ckpt) or public weights (.pth).
        out: The file to write, .onnx or .pte.
        form: What it gives: raw outputs, which the other commands take; boxes in pixels, scores and landmarks of every
            anchor; or the faces that are left after score threshold and suppression.
        input: What it takes: BGR in batch, channel, height, width, as float32 minus the mean colour (normalized) or as
            uint8; or, as programs have it, uint8 in batch, height, width, channel (bgr of OpenCV, rgb of Pillow).
        size: Height and width in pixels that it takes, such as 480x640; by default any from 33.
        batch: Pictures per call that it takes; by default any number.
        score: For end_to_end: faces with a lower score are dropped; by default 0.5.
        nms: For end_to_end: of two boxes with a higher overlap (IoU) the lower-scored one is dropped; by default 0.4.
        photos: Photo, or folder of photos, to check the file on besides noise.
        least_channels: For INT8 for ONNX Runtime: narrower float layers are filled up to it with zeros: 16, as by
            default, for CPUs with AVX-512, 8 for those with AVX2 alone, 1 for browsers.
    """
    from retinaface.compression.quantization import FakeQuantizedRetinaFace
    from retinaface.compression.structure import load_network
    from retinaface.delivery.export import export_onnx, recorded_facts
    from retinaface.delivery.mobile import export_mobile
    from retinaface.delivery.onnx_forms import OnnxSettings

    if (score is not None or nms is not None) and form != "end_to_end":
        raise InputError(
            f"--score and --nms: a file of the form {form} has neither; leave them out, or add --form end_to_end"
        )
    if out.suffix not in (".onnx", ".pte"):
        raise InputError(f"--out {out}: expected a name that ends in .onnx, or in .pte for phones")
    given_size = None if size is None else _height_and_width(size)
    given = {"score_threshold": score, "nms_threshold": nms, "least_channels": least_channels}
    more: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings = OnnxSettings(form, input, given_size, batch, **more)
    found = [] if photos is None else _photos_in(photos)
    network, _ = load_network(ckpt)
    int8 = network.settings.backend if isinstance(network, FakeQuantizedRetinaFace) else None
    if least_channels is not None and (out.suffix == ".pte" or int8 != "onnxruntime"):
        raise InputError("--least_channels: only INT8 files for ONNX Runtime are filled up; leave it out")
    if out.suffix == ".pte":
        export_mobile(network, out, settings, found)
    else:
        export_onnx(network, out, settings, found, **recorded_facts(ckpt))
    runtime = "ExecuTorch" if out.suffix == ".pte" else "ONNX Runtime"
    compared = f"noise and {_count(len(found), 'photo')}" if found else "noise; --photos for photos"
    _console.print(f"written to {out} ({out.stat().st_size / 1e6:.2f} MB)")
    _console.print(f"checked: {runtime} gives what torch gives ({compared})")


def web(model: Path, out: Path = Path("web"), runtime: Path | None = None) -> None:
    """Write a static page that runs a detector in the visitor's browser: drop a photo, or use the camera.

    Any static server can offer the folder, without a network too; nothing that is looked at leaves the browser.

    Example: python -m retinaface web int8.onnx --out page

    Args:
        model: ONNX file with raw outputs, as export writes it by default.
        out: Folder to write; a page that was written before is replaced.
        runtime: Folder of the unpacked npm package onnxruntime-web; by default npm downloads it.
    """
    from retinaface.delivery.web import write_page

    write_page(model, out, runtime)
    megabytes = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    _console.print(f"written to {out} ({megabytes:.1f} MB); look at it with: python -m http.server --directory {out}")


def benchmark(
    models: list[Path],
    runtime: tuple[Literal["onnxruntime", "openvino", "torch"], ...] = (),
    size: tuple[str, ...] = ("640",),
    batch: tuple[int, ...] = (1,),
    threads: tuple[int, ...] = (),
    warmup: int = 10,
    rounds: int = 100,
    json: Path | None = None,
    markdown: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Time models in runtimes, in turns, at every combination of size, batch and threads; file size and peak memory.

    The ratios are to the first model in its first runtime. With several runtimes, each model in its fastest one is
    also compared with the first model in its own: the choice that a user has.

    Example: python -m retinaface benchmark teacher.onnx pruned.onnx int8.onnx --size 320 640 --threads 1 2

    Args:
        models: ONNX files, and for torch checkpoints (.ckpt, .pth); the first is what the others are compared with.
        runtime: What runs them; by default each one that is installed and takes a file of their kind, and where
            OpenVINO does not run one, that is said.
        size: Sides of a square picture in pixels, or height and width such as 480x640.
        batch: Numbers of photos per call.
        threads: Numbers of threads to compute with; by default one per physical core that this process may use.
        warmup: Rounds before the timing starts.
        rounds: Rounds timed, per combination.
        json: Also write the figures to this file.
        markdown: Also write them to this file as text.
        plot: Also plot the times to this file (.png, .svg, .pdf).
    """
    from retinaface.cpus import physical_cores
    from retinaface.evaluation.benchmark import machine_facts, time_in_turns
    from retinaface.evaluation.benchmark_text import (
        benchmark_markdown,
        benchmark_table,
        describe_failures,
        describe_fastest,
        describe_input,
        describe_rounds,
        footprint_table,
    )
    from retinaface.evaluation.footprint import measure_footprints
    from retinaface.evaluation.raw_call import Runtime, height_and_width, usable_runtimes
    from retinaface.evaluation.visualize import plot_benchmark

    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot: {plot} is no picture that can be written; expected .png, .svg or .pdf")
    runtimes, counts = runtime or usable_runtimes(models), threads or (physical_cores(),)
    optional: tuple[Runtime, ...] = () if runtime else ("openvino",)
    every = []
    sizes = [int(each) if each.isdecimal() else _height_and_width(each) for each in size]
    for one_size, photos, count in product(sizes, batch, counts):
        every.append(time_in_turns(models, runtimes, one_size, count, warmup, rounds, photos, optional))
        _console.print(benchmark_table(every[-1]))
        for sentence in describe_failures(every[-1]) + describe_fastest(every[-1]):
            _console.print(sentence)
    ran = [entry for entry in every[0].entries if all(entry in each.entries for each in every)]
    entries = [(models[index], name) for index, name in ran]
    largest = max(sizes, key=lambda each: math.prod(height_and_width(each)))
    failure = None
    try:
        footprints = measure_footprints(entries, largest, max(batch), max(counts))
    except InputError as error:  # the timings are not lost for it
        footprints, failure = [], error
    computing = f"{max(counts)} thread{'s' * (max(counts) > 1)}"
    conditions = f"at {describe_input(max(batch), largest)} with {computing}, each in a fresh process"
    if footprints:
        _console.print(footprint_table(footprints, f"File size, and peak memory {conditions}"))
    machine = machine_facts()
    figures = {
        "timings": [asdict(timing) for each in every for timing in each.timings()],
        "fastest": [asdict(timing) for each in every for timing in each.fastest()],
        "failures": [asdict(failure) for each in every for failure in each.failures],
        "footprints": [{**asdict(each), "size": largest, "batch": max(batch)} for each in footprints],
    }
    _write_json(json, {"machine": machine, **figures})
    if markdown is not None:
        _write_text(markdown, benchmark_markdown(every, footprints, conditions, machine), "--markdown")
    if plot is not None:
        try:
            plot_benchmark({describe_rounds(each): each.timings() for each in every}, plot)
        except OSError as error:
            raise InputError(f"--plot: {plot} cannot be written ({error.strerror}); choose another file") from error
    if failure:
        raise failure


def throughput(
    model: Path,
    batches: list[int] | None = None,
    callers: list[int] | None = None,
    threads: list[int] | None = None,
    size: int = 640,
    photos: int = 16,
    rounds: int = 10,
    runtime: Literal["auto", "torch", "onnxruntime", "openvino"] = "auto",
    providers: list[str] | None = None,
    device: str | None = None,
    json: Path | None = None,
) -> None:
    """Measure photos per second, from photos in memory to faces: photos per call by callers at once.

    Example: python -m retinaface throughput int8.onnx --batches 1 4 --callers 1 2 --threads 1 2

    Args:
        model: Detector (.pth, .ckpt or .onnx).
        batches: Numbers of photos per call; by default 1, 2, 4 and 8.
        callers: Numbers of threads that call the detector at once; by default 1, 2 and 4.
        threads: Numbers of threads that the runtime computes with; by default 1 and one per physical core, for torch,
            which takes one number only, the latter.
        size: Side in pixels of the photos, which are rendered.
        photos: Photos per combination and round, at least.
        rounds: Rounds timed.
        runtime: What runs the model; auto takes torch for .pth and .ckpt, ONNX Runtime for .onnx.
        providers: ONNX Runtime's execution providers, the preferred one first, such as CUDA or CoreML; behind the other
            arguments, as all that follow are taken for providers.
        device: Where torch (cpu, cuda, mps) or OpenVINO (CPU, GPU) computes.
        json: Also write the figures to this file.
    """
    from retinaface.cpus import physical_cores
    from retinaface.delivery.runtime import load_detector
    from retinaface.evaluation.benchmark import machine_facts
    from retinaface.evaluation.throughput import measure_throughput, throughput_table

    batches, callers = batches or [1, 2, 4, 8], callers or [1, 2, 4]
    threads = threads or sorted({1, physical_cores()} if model.suffix == ".onnx" else {physical_cores()})
    least = {"batches": min(batches), "callers": min(callers), "threads": min(threads)}
    _require_at_least({name: (value, 1) for name, value in {**least, "photos": photos, "rounds": rounds}.items()})
    _require_at_least({"size": (size, 64)})
    results = measure_throughput(
        lambda count: load_detector(model, count, runtime=runtime, providers=providers, device=device),
        batches,
        callers,
        threads,
        size,
        photos,
        rounds,
    )
    _console.print(throughput_table(results, f"{model.name}, {size}x{size}"))
    facts = {"machine": machine_facts(), "model": str(model), "size": size}
    _write_json(json, {**facts, "results": list(map(asdict, results))})


def describe(ckpt: Path, size: int = 640, json: Path | None = None) -> None:
    """List a checkpoint's layers: what pruning left of them, their parameters and their computation.

    Example: python -m retinaface describe runs/own_photos/int8/checkpoints/last.ckpt

    Args:
        ckpt: Checkpoint (.ckpt) or public weights (.pth).
        size: Side in pixels of the picture for the multiply-accumulate operations (MACs).
        json: Also write the figures to this file.
    """
    from retinaface.compression.structure import load_structure
    from retinaface.evaluation.describe import describe as look
    from retinaface.evaluation.describe import description_table

    description = look(load_structure(ckpt), size)
    _console.print(description_table(description, str(ckpt)))
    _write_json(json, {"ckpt": str(ckpt), **asdict(description)})


def sensitivity(
    model: Path,
    root: Path,
    purpose: Literal["pruning", "quantization"],
    out: Path = Path("sensitivity"),
    limit: int | None = None,
    recalibrate: int = 16,
    importance: Literal["l1", "l2", "bn_scale", "lamp", "fpgm", "random"] = "l1",
    photos: int = 32,
    size: int = 640,
    threads: int | None = None,
) -> None:
    """Measure what each part of the network loses and gains when it alone is compressed, or alone is not.

    For pruning it writes sensitivity.json, which callbacks.ChannelPruning takes
    (--trainer.callbacks.init_args.sensitivity), and sensitivity.png; for quantization quantization.json and
    quantization.png, which say what to name in keep_float.

    Example: python -m retinaface sensitivity teacher.ckpt --root data/wider_face --for pruning --limit 200

    Args:
        model: Float detector (.pth or .ckpt).
        root: Data root in WIDER FACE layout.
        purpose: The compression: pruning removes 25, 50 and 75 % of each group's channels; quantization leaves each
            block in float, the rest in INT8 without training.
        out: Folder to write to.
        limit: Use only this many validation photos, spread over all of them.
        recalibrate: For pruning: training photos over which batch statistics are estimated anew after each surgery; 0
            for none.
        importance: For pruning: how channels are scored.
        photos: For quantization: training photos that the ranges of INT8 come from.
        size: Side in pixels of the picture for the timing.
        threads: Threads for the timing; by default every physical core that this process may use.
    """
    from retinaface.evaluation.mixed_precision import measure_mixed_precision, mixed_precision_table
    from retinaface.evaluation.sensitivity import measure_sensitivity, sensitivity_table
    from retinaface.evaluation.visualize import plot_mixed_precision, plot_sensitivity

    _require_at_least({"photos": (photos, 1)})
    _require_place(out / "sensitivity.json", "--out")
    facts = {"for": purpose, "model": str(model), "root": str(root)}
    if purpose == "pruning":
        measured = measure_sensitivity(model, root, limit, recalibrate, importance, size, threads)
        _console.print(sensitivity_table(measured))
        _write_json(out / "sensitivity.json", {**facts, **asdict(measured)})
        plotted = {
            group.name: {point.ratio: (point.ap_loss, point.speedup) for point in group.points}
            for group in measured.groups
        }
        plot_sensitivity(plotted, out / "sensitivity.png")
    else:
        found = measure_mixed_precision(model, root, limit, photos, size, threads)
        _console.print(mixed_precision_table(found))
        _write_json(out / "quantization.json", {**facts, **asdict(found)})
        against_int8 = {
            name: (trial.ap - found.int8.ap, 1 / trial.speedup - 1)
            for name, trial in {**found.units, "everything": found.whole}.items()
        }
        plot_mixed_precision(against_int8, out / "quantization.png")
    _console.print(f"written to {out}")


def check_data(root: Path, out: Path = Path("check-data.png"), json: Path | None = None) -> None:
    """Look through a data root: counts, face sizes, and every broken file. Ends with status 2 if there is one.

    Example: python -m retinaface check-data data/wider_face --json check.json

    Args:
        root: Data root in WIDER FACE layout, with training photos, validation photos or both.
        out: Picture of the face sizes to write.
        json: Also write the figures and all file names to this file.
    """
    from retinaface.data.check import check_root, check_tables
    from retinaface.data.wider_archives import prepare_root
    from retinaface.evaluation.visualize import plot_face_sizes
    from retinaface.model.network import NetworkConfig

    prepare_root(root)
    checks = check_root(root)
    for table in check_tables(checks):
        _console.print(table)
    for check in checks:
        _print_list(f"{check.split}: annotated and absent, left out", check.absent if check.absent_is_fine else [])
        _print_list(f"{check.split}: there but not annotated", check.unlisted)
        _print_list(f"{check.split}: photos with faces wholly outside, and their number", check.outside_photo)
        _print_list(f"{check.split}: BROKEN", check.broken, most=len(check.broken))
    smallest_anchor = min(side for sides in NetworkConfig().anchor_sizes for side in sides)
    try:
        plot_face_sizes({check.split: check.short_sides for check in checks}, out, smallest_anchor)
    except (OSError, ValueError) as error:  # matplotlib raises ValueError for a suffix that it does not know
        raise InputError(f"{out}: cannot be written ({error}); choose another --out") from error
    _console.print(f"face sizes drawn in {out}")
    facts = [{name: value for name, value in vars(check).items() if name != "short_sides"} for check in checks]
    _write_json(json, {"root": str(root), "splits": facts})
    if broken := sum(len(check.broken) for check in checks):
        raise InputError(f"{root}: {broken} photos are broken, as listed above; replace them or remove their lines")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _print_list(title: str, names: list[str], most: int = 20) -> None:
    if names:
        _console.print(f"{title} ({len(names)}):")
        for name in names[:most]:
            _console.print(f"  {name}")
        if len(names) > most:
            _console.print(f"  ... and {len(names) - most} more; --json writes all")


def wider_ap(predictions: Path, ground_truth: Path, partial: bool = False, json: Path | None = None) -> None:
    """Compute the official WIDER FACE average precisions of result files.

    Example: python -m retinaface wider-ap predictions ground_truth --json ap.json

    Args:
        predictions: Folder of <event>/<image>.txt files in the WIDER result format.
        ground_truth: Folder with the official .mat files.
        partial: Leave out photos without a result file (--partial true) instead of naming them and stopping.
        json: Also write easy, medium and hard to this file.
    """
    from retinaface.evaluation.wider_ap import evaluate_predictions

    result = evaluate_predictions(predictions, ground_truth, skip_missing=partial)
    for subset, value in result.items():
        _console.print(f"{subset}: {value:.6f}")
    _write_json(json, {subset: None if math.isnan(value) else value for subset, value in result.items()})


def show_batch(config: list[Path], root: Path | None = None, out: Path = Path("batch.jpg"), batches: int = 1) -> None:
    """Draw augmented training batches with their boxes, landmarks and ignored faces.

    Example: python -m retinaface show-batch --config configs/data/wider_face.yaml --root data/wider_face

    Args:
        config: Configuration with a data section; several, or the config.yaml of a run, will do as well.
        root: Data root to use instead of the configuration's.
        out: Picture to write.
        batches: Number of batches.
    """
    import cv2

    from datamodules.configuration import load_datamodule
    from retinaface.evaluation.visualize import contact_sheet, draw_training_batch

    _require_at_least({"batches": (batches, 1)})
    if not cv2.haveImageWriter(str(out)):
        raise InputError(f"{out}: cannot be written as a picture; give a name that ends in .jpg or .png")
    _require_place(out, "--out")
    datamodule = load_datamodule(config, root)
    datamodule.prepare_data()
    datamodule.setup("fit")
    drawn = [draw_training_batch(batch) for batch in islice(datamodule.train_dataloader(), batches)]
    out.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(out), contact_sheet([picture for pictures in drawn for picture in pictures])):
        raise InputError(f"{out}: cannot be written; choose another --out")
    _console.print(f"written to {out}: faces green with landmarks, ignored faces crossed out in grey")


def benchmark_data(
    config: list[Path],
    root: Path | None = None,
    workers: list[int] | None = None,
    photos: int = 50,
    batches: int = 20,
    json: Path | None = None,
) -> None:
    """Time the training data: each step of a photo, the loader, and what a training waits for them.

    The training is that of a mobilenet0.25 on labels, on the GPU where there is one.

    Example: python -m retinaface benchmark-data --config configs/data/wider_face.yaml --root data/wider_face

    Args:
        config: Configuration with a data section; several, or the config.yaml of a run, will do as well.
        root: Data root to use instead of the configuration's.
        workers: Numbers of loader processes to compare; by default none and the one that a training would choose.
        photos: Photos to time step by step.
        batches: Batches to time per number of workers.
        json: Also write the figures to this file.
    """
    from datamodules.configuration import load_datamodule
    from lightning_modules import RetinaFaceModule
    from lightning_modules.bare_step import make_bare_step
    from retinaface.data.loading import TrainLoader, default_workers
    from retinaface.data.transforms import TrainTransform
    from retinaface.evaluation.benchmark import machine_facts
    from retinaface.evaluation.benchmark_data import loader_table, sample_table, time_loader, time_samples

    _require_at_least({"photos": (photos, 1), "batches": (batches, 1), "workers": (min(workers or [0]), 0)})
    datamodule = load_datamodule(config, root)
    datamodule.prepare_data()
    datamodule.setup("fit")
    transform = TrainTransform(datamodule.train_size, datamodule.transform)
    samples = time_samples(datamodule.train_samples, transform, datamodule.batch_size, photos)
    _console.print(sample_table(samples))

    def make_loader(number: int) -> TrainLoader:
        datamodule.num_workers = number
        return datamodule.train_dataloader()

    train_step = make_bare_step(RetinaFaceModule())
    loaders = [
        time_loader(make_loader, number, train_step, batches) for number in workers or sorted({0, default_workers()})
    ]
    _console.print(loader_table(loaders, f"batches of {datamodule.batch_size} at {datamodule.train_size} pixels"))
    _write_json(json, {"machine": machine_facts(), "samples": asdict(samples), "loaders": list(map(asdict, loaders))})


def make_synthetic(out: Path, train: int, val: int, size: int = 640, seed: int = 0) -> None:
    """Render photos with drawn faces as a data root in WIDER FACE layout, ground truth included.

    Example: python -m retinaface make-synthetic --out data/synthetic --train 1000 --val 200 --seed 1

    Args:
        out: Folder to make; one that was rendered with the same settings is kept, with others replaced.
        train: Number of training photos.
        val: Number of validation photos.
        size: Side of the photos in pixels.
        seed: Same seed, same photos.
    """
    from retinaface.data.annotations import DIFFICULTIES, load_split
    from retinaface.data.synthetic import MARKER, write_synthetic_root

    marker = out / MARKER
    before = marker.stat().st_mtime_ns if marker.is_file() else None
    started = time.perf_counter()
    write_synthetic_root(out, train, val, size, seed)
    seconds = time.perf_counter() - started
    table = Table("split", *(Column(name, justify="right") for name in ("photos", "faces", "valid", *DIFFICULTIES)))
    for split in ("train", "val"):
        samples = load_split(out, split)
        counts = [len(samples), sum(len(sample.boxes) for sample in samples)]
        subsets = [subset for subset in ("all", *DIFFICULTIES) if subset in samples[0].counted]
        counts += [sum(int(sample.counted[subset].sum()) for sample in samples) for subset in subsets]
        table.add_row(split, *map(str, counts))
    _console.print(table)
    if before == marker.stat().st_mtime_ns:
        _console.print(f"{out}: was there already, with these settings")
    else:
        _console.print(f"written to {out} in {seconds:.1f} s ({(train + val) / seconds:.0f} photos/s)")


def _height_and_width(size: str) -> tuple[int, int]:
    height, _, width = size.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise InputError(f"--size: expected height x width in pixels, such as 480x640, found {size}")
    return int(height), int(width)


def _photos_in(place: Path) -> list[Path]:
    from retinaface.data.annotations import find_photos

    if not place.is_dir():
        return [place]
    found = [place / name for name in find_photos(place)]
    if not found:
        raise InputError(f"--photos: {place} holds no photos; give a photo, or the folder that they are in")
    return found


def _require_at_least(limits: dict[str, tuple[int, int]]) -> None:
    for name, (value, least) in limits.items():
        if value < least:
            raise InputError(f"--{name}: expected at least {least}, found {value}")


def _require_share(values: dict[str, float]) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise InputError(f"--{name}: expected 0 to 1, found {value}")


def _require_place(path: Path, option: str) -> None:
    """Before hours of work, rather than behind them."""
    place = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if place.is_dir() == (place == path.absolute()) or not os.access(place, os.W_OK):
        raise InputError(f"{path}: cannot be written; choose another {option}")


def _write_json(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        _write_text(path, json.dumps(content, indent=2) + "\n", "--json")


def _write_text(path: Path, text: str, option: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another {option}") from error


# Each command, and its arguments that are required or take several values without brackets, with the number of values;
# those without dashes go by position.
COMMANDS: dict[str, tuple[Callable[..., None], dict[str, str | None]]] = {
    "detect": (detect, {"model": None, "sources": "+", "--providers": "+"}),
    "evaluate": (evaluate, {"model": None, "--providers": "+"}),
    "export": (export, {"ckpt": None}),
    "web": (web, {"model": None}),
    "benchmark": (benchmark, {"models": "+", "--runtime": "+", "--size": "+", "--batch": "+", "--threads": "+"}),
    "throughput": (
        throughput,
        {"model": None, **dict.fromkeys(("--batches", "--callers", "--threads", "--providers"), "+")},
    ),
    "describe": (describe, {"ckpt": None}),
    "sensitivity": (sensitivity, {"model": None}),
    "show-batch": (show_batch, {"--config": "+"}),
    "benchmark-data": (benchmark_data, {"--config": "+", "--workers": "+"}),
    "check-data": (check_data, {"root": None}),
    "make-synthetic": (make_synthetic, {}),
    "wider-ap": (wider_ap, {"predictions": None, "ground_truth": None}),
}


def _parser() -> ArgumentParser:
    """Every command's arguments are those of its function; its help is the docstring."""
    parser = ArgumentParser(prog="python -m retinaface", description="Use, measure and deliver a RetinaFace detector.")
    subcommands = parser.add_subcommands(dest="command")
    for title, (function, listed) in COMMANDS.items():
        docstring = docstring_parser.parse(function.__doc__ or "")
        command = ArgumentParser(description=f"{docstring.short_description} {docstring.long_description}")
        for argument, count in listed.items():
            name = argument.removeprefix("--")
            description = next(param.description for param in docstring.params if param.arg_name == name)
            kind, default = get_type_hints(function)[name], signature(function).parameters[name].default
            flags: dict[str, Any] = {"required": True} if argument.startswith("--") else {}
            if default is not Parameter.empty:
                flags = {"default": None if default is None else list(default)}
                kind = get_args(kind)[0] if default is None else kind  # of list[int] | None
            kind = get_args(kind)[0] if count else kind
            command.add_argument(argument, type=kind, nargs=count, help=description, **flags)
        if "purpose" in get_type_hints(function):  # no parameter can be called `for`
            description = next(param.description for param in docstring.params if param.arg_name == "purpose")
            kind = get_type_hints(function)["purpose"]
            command.add_argument("--for", dest="purpose", type=kind, required=True, help=description)
        skip: set[str | int] = {"purpose", *(arg.removeprefix("--") for arg in listed)}
        command.add_function_arguments(function, skip=skip, as_group=False)
        subcommands.add_subcommand(title, command, help=docstring.short_description)
    return parser


def main(args: list[str] | None = None) -> None:
    """Runs one command.

    Args:
        args: Command-line arguments; by default those of the process.

    Raises:
        SystemExit: With status 2 and a one-line message when the input is wrong.
    """
    config = _parser().parse_args(args)
    signal.signal(signal.SIGTERM, _end)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        options = config[config.command].as_dict()
        for name in ("json", "markdown", "plot"):
            if options.get(name) is not None:
                _require_place(options[name], f"--{name}")
        COMMANDS[config.command][0](**options)
    except InputError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _end(number: int, _: FrameType | None) -> None:
    """As Ctrl-C does, so that what is found is kept and parts of files are removed."""
    raise KeyboardInterrupt


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """One line, without the place in the code, which says nothing to who runs a command."""
    return f"warning: {' '.join(str(message).split())}\n"


if __name__ == "__main__":
    warnings.formatwarning = _format_warning
    main()
