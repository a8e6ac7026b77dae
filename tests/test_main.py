import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.io import savemat

from retinaface.__main__ import COMMANDS, main
from retinaface.data.annotations import load_split
from retinaface.delivery.onnx_forms import OnnxSettings
from retinaface.errors import InputError
from retinaface.evaluation.footprint import Footprint
from retinaface.evaluation.mixed_precision import MixedPrecision, Trial
from retinaface.evaluation.sensitivity import GroupSensitivity, Point, Sensitivity
from retinaface.evaluation.visualize import GREEN


@pytest.fixture
def onnx_file(onnx_files):
    return onnx_files["float"]


def write_photo(path, seed=0, size=(70, 90)):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))
    return path


@pytest.fixture
def root(tmp_path):
    """Two photos in WIDER FACE layout."""
    root = tmp_path / "root"
    rows = []
    for seed, name in enumerate(("0--Street/a", "0--Street/b")):
        write_photo(root / "WIDER_val" / "images" / f"{name}.jpg", seed)
        rows += [f"{name}.jpg", "1", "20 20 30 30 0 0 0 0 0 0"]
    (root / "wider_face_split").mkdir()
    (root / "wider_face_split" / "wider_face_val_bbx_gt.txt").write_text("\n".join(rows) + "\n")
    return root


def fails(capsys, *args):
    """Runs a command that must end in one line and status 2, and gives the line."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in captured.out
    return line


# Help


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("detect", "evaluate", "export", "benchmark", "wider-ap"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example_and_explains_every_argument(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"Example: python -m retinaface {command} " in text
    function, _ = COMMANDS[command]
    explained = [line.strip() for line in function.__doc__.split("Args:")[1].splitlines() if ": " in line]
    assert len(explained) == len(function.__annotations__) - 1
    for line in explained:
        assert " ".join(line.split(": ", 1)[1].split()) in text


def test_a_warning_is_one_line_without_the_place_in_the_code():
    warn = "import atexit, warnings; atexit.register(lambda: warnings.warn('x.onnx: cut\\noff'))"
    run = "import runpy; runpy.run_module('retinaface', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", f"{warn}; {run}", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert shown.stderr == "warning: x.onnx: cut off\n"


# Use


def test_detect(checkpoint_files, tmp_path, capsys):
    photo, small = write_photo(tmp_path / "a.jpg"), write_photo(tmp_path / "b.jpg", 1, (20, 30))
    out = tmp_path / "out"
    main(["detect", str(checkpoint_files["public"]), str(photo), str(small), "--out", str(out), "--score", "0.3"])
    content = json.loads((out / "detections.json").read_text())
    assert list(content) == [str(photo), str(small)]
    assert len(content[str(photo)]["scores"]) > 0
    text = capsys.readouterr().out
    assert f"{photo}: {len(content[str(photo)]['scores'])} faces\n" in text
    names = {path.name for path in out.iterdir()}
    assert names == {"a.jpg", "b.jpg", "detections.json", "detections.csv", ".detections"}


def test_detect_thresholds(checkpoint_files, tmp_path):
    photo = write_photo(tmp_path / "a.jpg")
    counts = []
    for limits in (["--score=0.3", "--nms=0.4"], ["--score=0.5", "--nms=0.4"], ["--score=0.3", "--nms=0.8"]):
        main(["detect", str(checkpoint_files["public"]), str(photo), "--out", str(tmp_path / "out"), *limits])
        content = json.loads((tmp_path / "out" / "detections.json").read_text())
        counts.append(len(content[str(photo)]["scores"]))
    usual, strict, overlapping = counts
    assert strict < usual < overlapping


@pytest.mark.parametrize("option", ["--score=50", "--score=-1", "--nms=1.1", "--longest=63"])
def test_detect_with_limits_that_make_no_sense(option, checkpoint_files, tmp_path, capsys):
    line = fails(capsys, "detect", checkpoint_files["public"], write_photo(tmp_path / "a.jpg"), option)
    assert f"{option.partition('=')[0]}: expected" in line


def test_detect_names_what_it_skipped_after_the_rest_is_done(checkpoint_files, tmp_path, capsys):
    photo = write_photo(tmp_path / "photos" / "good.jpg")
    truncated = tmp_path / "photos" / "truncated.jpg"
    truncated.write_bytes(photo.read_bytes()[:-500])
    for name in ("a.heic", "b.HEIC", "notes.txt"):
        (tmp_path / "photos" / name).touch()
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main(["detect", *map(str, (checkpoint_files["public"], tmp_path / "photos", tmp_path / "*.png", "--out", out))])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err == "error: 2 of 3 sources not read, not to the end, or not copied: named above\n"
    assert (
        f"NOT READ, not to the end, or not copied (2):\n  {tmp_path / '*.png'}: no photo or video there" in captured.out
    )
    assert f"  {truncated}: truncated or not a picture" in captured.out
    assert "left out in the folders, as neither photo nor video by name: .heic (2), .txt (1)\n" in captured.out
    assert list(json.loads((out / "detections.json").read_text())) == [str(photo)]


def test_detect_in_nothing(checkpoint_files, tmp_path, capsys):
    line = fails(capsys, "detect", checkpoint_files["public"], tmp_path, "--out", tmp_path / "out")
    assert f"{tmp_path}: no photo or video there" in line
    assert list(tmp_path.iterdir()) == []
    assert "--frames: expected at least 1" in fails(capsys, "detect", checkpoint_files["public"], "0", "--frames", "0")


def test_detect_in_a_video_in_a_runtime_of_choice(onnx_file, checkpoint_files, tmp_path, capsys):
    writer = cv2.VideoWriter(str(tmp_path / "film.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (96, 64))
    for seed in range(3):
        writer.write(np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    writer.release()
    command = ["detect", str(onnx_file), str(tmp_path / "film.avi"), "--out", str(tmp_path / "out"), "--frames", "2"]
    main([*command, "--runtime", "onnxruntime", "--providers", "CPU", "--threads", "1", "--score", "0.3"])
    frames = json.loads((tmp_path / "out" / "detections.json").read_text())[str(tmp_path / "film.avi")]["frames"]
    count = sum(len(frame["scores"]) for frame in frames)
    assert f"film.avi: {count} faces in 2 frames" in capsys.readouterr().out
    assert "torch does not run ONNX files" in fails(capsys, *command, "--runtime", "torch")
    assert "toaster" in fails(capsys, "detect", checkpoint_files["public"], "a.jpg", "--device", "toaster")


def test_evaluate(onnx_file, root, tmp_path, capsys):
    file = tmp_path / "new" / "ap.json"
    main(["evaluate", str(onnx_file), "--root", str(root), "--protocol", "vga", "--json", str(file)])
    facts = json.loads(file.read_text())
    assert (facts["model"], facts["root"], facts["protocol"]) == (str(onnx_file), str(root), "vga")
    assert (facts["photos"], facts["faces"], facts["runtime"]) == (2, 2, "onnxruntime")
    assert 0 <= facts["ap"]["all"] <= 1
    assert facts["ap"]["easy"] is facts["ap"]["medium"] is facts["ap"]["hard"] is None
    assert facts["official_photos"] is facts["landmark_error"] is None
    text = capsys.readouterr().out
    assert f"{facts['ap']['all']:.4f}" in text
    assert "AP, vga: 2 photos, 2 faces" in text


def test_evaluate_against_a_teacher_with_results_and_pictures(checkpoint_files, onnx_file, root, tmp_path, capsys):
    sent = []
    options = {"--root": root, "--teacher": checkpoint_files["pruned"], "--wandb": "faces"}
    places = {"--out": tmp_path / "out", "--results": tmp_path / "results", "--json": tmp_path / "ap.json"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retinaface.evaluation.evaluate.send_to_wandb", lambda *arguments: sent.append(arguments))
        main(["evaluate", str(onnx_file), *(str(word) for pair in {**options, **places}.items() for word in pair)])
    facts = json.loads((tmp_path / "ap.json").read_text())
    assert (facts["model"], facts["teacher"]["model"]) == (str(onnx_file), str(checkpoint_files["pruned"]))
    assert facts["teacher"]["runtime"] == "torch"
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"precision_recall", "ap_by_size", "worst_photos"}
    assert {path.name for path in (tmp_path / "results" / "0--Street").iterdir()} == {"a.txt", "b.txt"}
    ((project, sent_facts, pictures),) = sent
    assert (project, sent_facts["ap"], len(pictures)) == ("faces", facts["ap"], 3)
    text = capsys.readouterr().out
    assert "teacher" in text
    assert "pruned.ckpt" in text


def test_export(checkpoint_files, onnx_file, quick_export, tmp_path, capsys):
    out = tmp_path / "new" / "x.onnx"
    main(["export", str(checkpoint_files["float"]), "--out", str(out)])
    assert out.read_bytes() == onnx_file.read_bytes()
    text = capsys.readouterr().out
    assert f"written to {out}" in text
    assert "checked: ONNX Runtime gives what torch gives (noise; --photos for photos)\n" in text


def test_export_of_another_form(checkpoint_files, tmp_path, monkeypatch, capsys):
    calls = []

    def export(network, path, settings, photos, **_):
        calls.append((settings, photos))
        path.touch()

    monkeypatch.setattr("retinaface.delivery.export.export_onnx", export)
    command = ["export", str(checkpoint_files["float"]), "--out", str(tmp_path / "x.onnx")]
    photos = [write_photo(tmp_path / "photos" / name) for name in ("a.jpg", "b.png")]
    (tmp_path / "photos" / "notes.txt").touch()
    form = ["--form=end_to_end", "--input=uint8", "--size=480x640", "--batch=2", "--score=0.3", "--nms=0.5"]
    main([*command, *form, "--photos", str(tmp_path / "photos")])
    main([*command, "--photos", str(photos[1])])
    main([*command[:1], str(checkpoint_files["int8"]), *command[2:], "--least_channels=8"])
    text = capsys.readouterr().out
    assert "(noise and 2 photos)\n" in text
    assert "(noise and 1 photo)\n" in text
    assert [(asdict(settings), found) for settings, found in calls] == [
        (
            {
                "form": "end_to_end",
                "input": "uint8",
                "size": (480, 640),
                "batch": 2,
                "score_threshold": 0.3,
                "nms_threshold": 0.5,
                "least_channels": 16,
            },
            photos,
        ),
        (asdict(OnnxSettings()), photos[1:]),
        (asdict(OnnxSettings(least_channels=8)), []),
    ]


@pytest.mark.parametrize("size", ["640", "480x", "axb", "480x640x3"])
def test_export_of_no_size(checkpoint_files, size, tmp_path, capsys):
    line = fails(capsys, "export", checkpoint_files["float"], "--out", tmp_path / "x.onnx", "--size", size)
    assert f"--size: expected height x width in pixels, such as 480x640, found {size}" in line


@pytest.mark.parametrize(("option", "form"), [("--score=0.3", "raw"), ("--nms=0.3", "decoded")])
def test_export_with_thresholds_that_nothing_would_look_at(checkpoint_files, option, form, tmp_path, capsys):
    line = fails(capsys, "export", checkpoint_files["float"], "--out", tmp_path / "x.onnx", option, "--form", form)
    assert f"a file of the form {form} has neither; leave them out, or add --form end_to_end" in line


@pytest.mark.parametrize(("kind", "suffix"), [("float", ".onnx"), ("int8", ".pte")])
def test_export_with_channels_that_nothing_would_be_filled_up_to(checkpoint_files, kind, suffix, tmp_path, capsys):
    out = tmp_path / f"x{suffix}"
    line = fails(capsys, "export", checkpoint_files[kind], "--out", out, "--least_channels=8")
    assert "--least_channels: only INT8 files for ONNX Runtime are filled up; leave it out" in line


def test_export_to_another_kind_of_file(checkpoint_files, tmp_path, capsys):
    line = fails(capsys, "export", checkpoint_files["float"], "--out", tmp_path / "x.tflite")
    assert "x.tflite: expected a name that ends in .onnx, or in .pte for phones" in line


def test_export_of_what_is_exported_already(onnx_file, tmp_path, capsys):
    line = fails(capsys, "export", onnx_file, "--out", tmp_path / "x.onnx")
    assert f"{onnx_file}: is an ONNX file; expected a checkpoint (.pth or .ckpt)" in line


def test_export_with_a_folder_without_photos(checkpoint_files, tmp_path, capsys):
    line = fails(capsys, "export", checkpoint_files["float"], "--out", tmp_path / "x.onnx", "--photos", tmp_path)
    assert f"--photos: {tmp_path} holds no photos" in line


def test_evaluate_gives_the_same_for_checkpoint_and_export(checkpoint_files, onnx_file, root, tmp_path):
    figures = []
    for model in (checkpoint_files["float"], onnx_file):
        main(["evaluate", str(model), "--root", str(root), "--json", str(tmp_path / "ap.json")])
        figures.append(json.loads((tmp_path / "ap.json").read_text())["ap"]["all"])
    assert figures[0] == pytest.approx(figures[1], abs=1e-3)


def test_benchmark(onnx_file, checkpoint_files, tmp_path, capsys, monkeypatch):
    def pretend(entries, size, batch, threads):  # the real one starts processes, and has a test of its own
        return [Footprint(str(model), runtime, 1000, math.prod(size) * batch * threads) for model, runtime in entries]

    monkeypatch.setattr("retinaface.evaluation.footprint.measure_footprints", pretend)
    models = [str(checkpoint_files["float"]), str(onnx_file)]
    settings = ["--runtime", "onnxruntime", "torch", "--size", "64", "48x96", "--batch", "2", "--threads", "1"]
    files = {option: tmp_path / f"times.{option}" for option in ("json", "markdown", "png")}
    outputs = ["--json", str(files["json"]), "--markdown", str(files["markdown"]), "--plot", str(files["png"])]
    main(["benchmark", *models, *settings, "--warmup", "0", "--rounds", "3", *outputs])
    facts = json.loads(files["json"].read_text())
    pairs = [(models[0], "torch"), (models[1], "onnxruntime")]
    assert [(each["model"], each["runtime"]) for each in facts["timings"]] == pairs * 2
    assert [(each["model"], each["runtime"]) for each in facts["fastest"]] == pairs * 2
    assert [(each["size"], each["batch"], each["ratio"] == 1) for each in facts["timings"]] == [
        (64, 2, True),
        (64, 2, False),
        ([48, 96], 2, True),
        ([48, 96], 2, False),
    ]
    assert [(each["peak_bytes"], each["size"]) for each in facts["footprints"]] == [(9216, [48, 96])] * 2
    assert [(each["model"], each["runtime"]) for each in facts["footprints"]] == pairs
    assert facts["failures"] == []
    assert facts["machine"]["cores"] >= 1
    text = capsys.readouterr().out
    assert "2x3x48x96, 1 thread" in text
    assert "Each in its fastest runtime" in text
    assert "peak memory MB" in files["markdown"].read_text()
    assert files["png"].stat().st_size > 5000


def test_timings_are_not_lost_where_memory_cannot_be_measured(onnx_file, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise InputError("ended by signal 9")

    monkeypatch.setattr("retinaface.evaluation.footprint.measure_footprints", fail)
    settings = ["--runtime", "onnxruntime", "--size", "32", "--threads", "1", "--warmup", "0", "--rounds", "1"]
    files = ["--json", tmp_path / "times.json", "--markdown", tmp_path / "times.md"]
    assert "ended by signal 9" in fails(capsys, "benchmark", onnx_file, *settings, *files)
    facts = json.loads((tmp_path / "times.json").read_text())
    assert (len(facts["timings"]), facts["footprints"]) == (1, [])
    assert "memory" not in (tmp_path / "times.md").read_text()


def test_throughput(onnx_file, checkpoint_files, tmp_path, capsys):
    settings = ["--size=64", "--photos=2", "--rounds=2", "--batches", "1", "2", "--callers", "1", "2", "--threads", "1"]
    main(["throughput", str(onnx_file), *settings, f"--json={tmp_path / 'throughput.json'}"])
    facts = json.loads((tmp_path / "throughput.json").read_text())
    assert [(each["batch"], each["callers"]) for each in facts["results"]] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert (facts["model"], facts["size"]) == (str(onnx_file), 64)
    assert {each["runtime"] for each in facts["results"]} == {"onnxruntime"}
    assert facts["machine"]["cores"] >= 1
    assert "2 callers" in capsys.readouterr().out
    assert "--batches: expected at least 1, found 0" in fails(capsys, "throughput", onnx_file, "--batches", "1", "0")
    assert "--size: expected at least 64" in fails(capsys, "throughput", onnx_file, "--size=32")
    line = fails(capsys, "throughput", checkpoint_files["public"], "--threads", "1", "2")
    assert "threads: torch has one number for the whole process" in line


@pytest.mark.parametrize("name", ["public", "pruned", "int8"])
def test_describe(checkpoint_files, name, tmp_path, capsys):
    main(["describe", str(checkpoint_files[name]), "--size", "64", "--json", str(tmp_path / "layers.json")])
    text = capsys.readouterr().out
    assert "landmark_heads.2" in text
    assert ("256 → 152" in text) == (name != "public")
    facts = json.loads((tmp_path / "layers.json").read_text())
    assert (facts["params"] < facts["params_before"]) == (name != "public")


def test_sensitivity(checkpoint_files, tiny_root, tmp_path, monkeypatch, capsys):
    point = Point(0.5, 0.6, 0.1, 1.25)
    asked = []

    def measure(*arguments):
        asked.append(arguments)
        return Sensitivity(0.7, 3, "l1", [GroupSensitivity("fpn.lateral.0.0", 16, [point] * 3)])

    monkeypatch.setattr("retinaface.evaluation.sensitivity.measure_sensitivity", measure)
    model, out = checkpoint_files["float"], tmp_path / "found"
    main(["sensitivity", str(model), "--root", str(tiny_root), "--for", "pruning", "--limit=3", "--out", str(out)])
    assert asked == [(model, tiny_root, 3, 16, "l1", 640, None)]
    assert "+0.100 1.25x" in capsys.readouterr().out
    facts = json.loads((out / "sensitivity.json").read_text())
    assert (facts["for"], facts["ap"]) == ("pruning", 0.7)
    assert facts["groups"][0]["points"][0] == {"ratio": 0.5, "ap": 0.6, "ap_loss": 0.1, "speedup": 1.25}
    assert (out / "sensitivity.png").is_file()


def test_sensitivity_for_quantization(checkpoint_files, tiny_root, tmp_path, monkeypatch, capsys):
    asked = []

    def measure(*arguments):
        asked.append(arguments)
        whole, int8 = Trial(None, 0.8, 0.5, True), Trial((), 0.7, 1.0, False)
        return MixedPrecision(3, whole, int8, {"fpn": Trial(("fpn",), 0.75, 1.25, True)})

    monkeypatch.setattr("retinaface.evaluation.mixed_precision.measure_mixed_precision", measure)
    model, out = checkpoint_files["float"], tmp_path / "found"
    command = ["sensitivity", str(model), "--root", str(tiny_root), "--for", "quantization", "--out", str(out)]
    main([*command, "--limit=3", "--photos=2", "--threads=1"])
    assert asked == [(model, tiny_root, 3, 2, 640, 1)]
    assert "+0.0500" in capsys.readouterr().out
    facts = json.loads((out / "quantization.json").read_text())
    assert (facts["for"], facts["whole"]["keep_float"]) == ("quantization", None)
    assert facts["units"] == {"fpn": {"keep_float": ["fpn"], "ap": 0.75, "speedup": 1.25, "differs": True}}
    assert (out / "quantization.png").is_file()
    assert "--photos: expected at least 1" in fails(capsys, *command, "--photos=0")


def test_check_data(root, tmp_path, capsys):
    picture, file = tmp_path / "new" / "sizes.png", tmp_path / "check.json"
    main(["check-data", str(root), "--out", str(picture), "--json", str(file)])
    facts = json.loads(file.read_text())
    (val,) = facts["splits"]
    assert (facts["root"], val["split"], val["photos"], val["faces"]) == (str(root), "val", 2, 2)
    assert val["sizes"]["16-32 px"] == 2
    assert val["events"] == {"0--Street": [2, 2]}
    assert cv2.imread(str(picture)).std() > 10
    text = capsys.readouterr().out
    assert f"face sizes drawn in {picture}" in text
    assert "16-32 px" in text
    assert "BROKEN" not in text


def test_check_data_names_every_broken_photo_and_fails(root, tmp_path, capsys):
    photos = root / "WIDER_val" / "images" / "0--Street"
    (photos / "a.jpg").write_bytes((photos / "a.jpg").read_bytes()[:-200])
    (photos / "b.jpg").rename(photos / "c.jpg")
    arguments = ["check-data", str(root), "--out", str(tmp_path / "sizes.png"), "--json", str(tmp_path / "check.json")]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {root}: 2 photos are broken, as listed above; replace them or remove their lines\n"
    for line in (
        "val: BROKEN (2):",
        f"{photos / 'a.jpg'}: truncated or not a picture",
        f"{photos / 'b.jpg'}: listed in the",
    ):
        assert line in captured.out
    assert "there but not annotated (1):\n  0--Street/c.jpg" in captured.out
    assert (tmp_path / "sizes.png").is_file()  # what can be told is told all the same
    assert json.loads((tmp_path / "check.json").read_text())["splits"][0]["absent"] == [str(photos / "b.jpg")]


@pytest.mark.parametrize("name", ["file/sizes.png", "sizes.docx"])
def test_check_data_picture_that_cannot_be_written(root, tmp_path, capsys, name):
    (tmp_path / "file").touch()
    line = fails(capsys, "check-data", root, "--out", tmp_path / name)
    assert f"{tmp_path / name}: cannot be written" in line


def test_wider_ap(tmp_path, capsys):
    def cells(*values):
        array = np.empty((len(values), 1), object)
        array[:, 0] = values
        return array

    truth = {
        "event_list": cells("0--Parade"),
        "file_list": cells(cells("a")),
        "face_bbx_list": cells(cells(np.array([[0, 0, 20, 20], [50, 50, 20, 20]]))),
    }
    (tmp_path / "truth").mkdir()
    savemat(tmp_path / "truth" / "wider_face_val.mat", truth)
    for subset, counted in (("easy", [[1]]), ("medium", [[2]]), ("hard", [[1], [2]])):
        savemat(tmp_path / "truth" / f"wider_{subset}_val.mat", {**truth, "gt_list": cells(cells(np.array(counted)))})
    (tmp_path / "found" / "0--Parade").mkdir(parents=True)
    (tmp_path / "found" / "0--Parade" / "a.txt").write_text("a\n2\n0 0 20 20 0.9\n200 200 20 20 0.1\n")
    file = tmp_path / "ap.json"
    main(["wider-ap", str(tmp_path / "found"), str(tmp_path / "truth"), "--json", str(file)])
    assert json.loads(file.read_text()) == pytest.approx({"easy": 1, "medium": 0, "hard": 0.5}, abs=1e-2)
    assert "easy: 1.0" in capsys.readouterr().out
    (tmp_path / "found" / "0--Parade" / "a.txt").rename(tmp_path / "found" / "0--Parade" / "b.txt")
    assert "1 photos have no result file" in fails(capsys, "wider-ap", tmp_path / "found", tmp_path / "truth")
    main(["wider-ap", str(tmp_path / "found"), str(tmp_path / "truth"), "--partial", "true"])
    assert "hard: nan" in capsys.readouterr().out  # the only photo is left out


def test_make_synthetic(tmp_path, capsys):
    out = tmp_path / "new" / "root"
    arguments = ["make-synthetic", f"--out={out}", "--train=3", "--val=8", "--size=128", "--seed=5"]
    main(arguments)
    samples = load_split(out, "val")
    assert len(samples) == 8
    assert len(load_split(out, "train")) == 3
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("│ val "))
    row = [cell.strip() for cell in line.strip("│").split("│")]
    subsets = [sum(sample.counted[name].sum() for sample in samples) for name in ("all", "easy", "medium", "hard")]
    assert row == ["val", "8", str(sum(len(sample.boxes) for sample in samples)), *map(str, subsets)]
    assert f"written to {out}" in text
    assert "photos/s" in text
    main(arguments)
    assert "was there already" in capsys.readouterr().out


# Errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["detect", "absent.pth", "photo.jpg"], "absent.pth: no such file"),
        (["throughput", "absent.onnx"], "absent.onnx: no such file"),
        (["evaluate", "absent.onnx", "--root=x", "--json=."], ".: cannot be written; choose another --json"),
        (["export", "absent.ckpt", "--out", "x.onnx"], "absent.ckpt: no such file"),
        (["benchmark", "absent.onnx", "other.onnx"], "absent.onnx"),
        (["wider-ap", "nowhere", "nowhere"], "nowhere: no such folder"),
        (["check-data", "nowhere"], "nowhere: no such folder"),
        (["describe", "absent.ckpt"], "absent.ckpt: no such file"),
        (["sensitivity", "absent.ckpt", "--root=x", "--for=pruning"], "absent.ckpt: no such file"),
        (["make-synthetic", "--out=x", "--train=0", "--val=1"], "train >= 1"),
    ],
)
def test_what_is_absent_is_named_in_one_line(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *args)
    assert list(tmp_path.iterdir()) == []


def test_missing_root(onnx_file, tmp_path, capsys):
    assert "nowhere" in fails(capsys, "evaluate", onnx_file, "--root", tmp_path / "nowhere")


def test_a_checkpoint_of_another_network(tmp_path, capsys):
    import torch

    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pth")
    assert "other.pth: not a RetinaFace checkpoint" in fails(
        capsys, "export", tmp_path / "other.pth", "--out", tmp_path / "x.onnx"
    )


def test_json_that_cannot_be_written(onnx_file, root, tmp_path, capsys):
    (tmp_path / "file").touch()
    for option in (["--runtime", "torch"], ["--device", "cuda"], ["--providers", "toaster"], ["--threads", "0"]):
        assert option[0].removeprefix("--")[:6] in fails(capsys, "evaluate", onnx_file, "--root", root, *option)
    line = fails(capsys, "evaluate", "absent.onnx", "--root", root, "--json", tmp_path / "file" / "ap.json")
    assert "cannot be written" in line  # before hours of work, so before anything is read


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["fly"],
        ["detect", "model.pth"],
        ["detect", "model.pth", "a.jpg", "--score", "high"],
        ["export", "model.pth"],
        ["evaluate", "model.pth", "--rot", "x"],
        ["sensitivity", "model.pth", "--root", "x"],
    ],
    ids=["nothing", "unknown command", "no photo", "no number", "no out", "unknown option", "no purpose"],
)
def test_a_wrong_command_line_is_explained(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert "error: " in text
    assert "Traceback" not in text


# Training data


@pytest.fixture
def data_config(tmp_path):
    """A small configuration of training data; it names no existing root."""
    file = tmp_path / "data.yaml"
    file.write_text(
        "data:\n  class_path: datamodules.WiderFaceDataModule\n  init_args:\n    root: nowhere\n    train_size: 64\n"
        "    batch_size: 4\n    num_workers: 0\n"
    )
    return file


def test_show_batch(data_config, tiny_root, tmp_path, capsys):
    out = tmp_path / "deep" / "batch.png"
    main(["show-batch", "--config", str(data_config), "--root", str(tiny_root), "--out", str(out), "--batches", "2"])
    assert str(out) in capsys.readouterr().out
    sheet = cv2.imread(str(out))
    assert sheet.shape[1] == 1600
    assert sheet.shape[0] > 700  # two batches of four, four to a row
    assert (sheet == GREEN).all(axis=-1).any()


def test_show_batch_of_nothing(data_config, tiny_root, tmp_path, capsys):
    assert "nowhere: no such folder" in fails(capsys, "show-batch", "--config", data_config)
    assert "no such" in fails(capsys, "show-batch", "--config", tmp_path / "absent.yaml").lower()
    line = fails(capsys, "show-batch", "--config", data_config, "--root", tiny_root, "--out", tmp_path / "batch.what")
    assert "cannot be written" in line


def test_benchmark_data(data_config, tiny_root, tmp_path, capsys):
    out = tmp_path / "data.json"
    main(["benchmark-data", "--config", str(data_config), "--root", str(tiny_root), "--photos", "2", "--batches", "2",
          "--workers", "0", "1", "--json", str(out)])  # fmt: skip
    text = capsys.readouterr().out
    assert "cv2.imread" in text
    assert "waiting for data" in text
    content = json.loads(out.read_text())
    assert [loader["workers"] for loader in content["loaders"]] == [0, 1]
    assert all(0 < loader["wait_share"] < 1 for loader in content["loaders"])
    assert len(content["samples"]["read"]) == 4
