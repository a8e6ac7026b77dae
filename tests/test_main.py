import json

import cv2
import numpy as np
import pytest
from scipy.io import savemat

from retinaface.__main__ import COMMANDS, main


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


# Use


def test_detect(checkpoint_files, tmp_path, capsys):
    photo, small = write_photo(tmp_path / "a.jpg"), write_photo(tmp_path / "b.jpg", 1, (20, 30))
    out = tmp_path / "out"
    main(["detect", str(checkpoint_files["public"]), str(photo), str(small), "--out", str(out), "--score", "0.3"])
    content = json.loads((out / "detections.json").read_text())
    assert list(content) == [str(photo), str(small)]
    assert len(content[str(photo)]["scores"]) > 0
    text = capsys.readouterr().out
    assert f"{photo}: {len(content[str(photo)]['scores'])} faces" in text
    assert {path.name for path in out.iterdir()} == {"a.jpg", "b.jpg", "detections.json"}


def test_detect_thresholds(checkpoint_files, tmp_path):
    photo = write_photo(tmp_path / "a.jpg")
    counts = []
    for limits in (["--score=0.3", "--nms=0.4"], ["--score=0.5", "--nms=0.4"], ["--score=0.3", "--nms=0.8"]):
        main(["detect", str(checkpoint_files["public"]), str(photo), "--out", str(tmp_path / "out"), *limits])
        content = json.loads((tmp_path / "out" / "detections.json").read_text())
        counts.append(len(content[str(photo)]["scores"]))
    usual, strict, overlapping = counts
    assert strict < usual < overlapping


def test_detect_names_what_it_skipped_after_the_rest_is_done(checkpoint_files, tmp_path, capsys):
    photo = write_photo(tmp_path / "good.jpg")
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes(photo.read_bytes()[:-500])
    out = tmp_path / "out"
    line = fails(capsys, "detect", checkpoint_files["public"], truncated, photo, "--out", out)
    assert "1 of 2 photos skipped" in line
    assert "truncated.jpg" in line
    assert list(json.loads((out / "detections.json").read_text())) == [str(photo)]


def test_evaluate(onnx_file, root, tmp_path, capsys):
    file = tmp_path / "new" / "ap.json"
    main(["evaluate", str(onnx_file), "--root", str(root), "--json", str(file)])
    facts = json.loads(file.read_text())
    assert (facts["model"], facts["root"]) == (str(onnx_file), str(root))
    assert (facts["photos"], facts["faces"], facts["runtime"]) == (2, 2, "onnxruntime")
    assert 0 <= facts["ap"]["all"] <= 1
    assert facts["ap"]["easy"] is facts["ap"]["medium"] is facts["ap"]["hard"] is None
    assert f"{facts['ap']['all']:.4f}" in capsys.readouterr().out


def test_export(checkpoint_files, onnx_file, quick_export, tmp_path, capsys):
    out = tmp_path / "new" / "x.onnx"
    main(["export", str(checkpoint_files["float"]), "--out", str(out)])
    assert out.read_bytes() == onnx_file.read_bytes()
    assert f"written to {out}" in capsys.readouterr().out


def test_evaluate_gives_the_same_for_checkpoint_and_export(checkpoint_files, onnx_file, root, tmp_path):
    figures = []
    for model in (checkpoint_files["float"], onnx_file):
        main(["evaluate", str(model), "--root", str(root), "--json", str(tmp_path / "ap.json")])
        figures.append(json.loads((tmp_path / "ap.json").read_text())["ap"]["all"])
    assert figures[0] == pytest.approx(figures[1], abs=1e-3)


def test_benchmark(onnx_file, tmp_path):
    settings = ["--size=32", "--threads=1", "--warmup=0", "--rounds=3", f"--json={tmp_path / 'times.json'}"]
    main(["benchmark", str(onnx_file), str(onnx_file), str(onnx_file), *settings])
    facts = json.loads((tmp_path / "times.json").read_text())
    assert [timing["model"] for timing in facts["timings"]] == [str(onnx_file)] * 3
    assert facts["timings"][0]["ratio"] == 1
    assert facts["timings"][1]["size"] == 32
    assert facts["machine"]["cores"] >= 1


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


# Errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["detect", "absent.pth", "photo.jpg"], "absent.pth: no such file"),
        (["evaluate", "absent.onnx", "--root", "nowhere"], "absent.onnx: no such file"),
        (["export", "absent.ckpt", "--out", "x.onnx"], "absent.ckpt: no such file"),
        (["benchmark", "absent.onnx", "other.onnx"], "absent.onnx"),
        (["wider-ap", "nowhere", "nowhere"], "nowhere: no such folder"),
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
    line = fails(capsys, "evaluate", onnx_file, "--root", root, "--json", tmp_path / "file" / "ap.json")
    assert "cannot be written" in line


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["fly"],
        ["detect", "model.pth"],
        ["detect", "model.pth", "a.jpg", "--score", "high"],
        ["export", "model.pth"],
        ["evaluate", "model.pth", "--rot", "x"],
    ],
    ids=["nothing", "unknown command", "no photo", "no number", "no out", "unknown option"],
)
def test_a_wrong_command_line_is_explained(args, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert "error: " in text
    assert "Traceback" not in text
