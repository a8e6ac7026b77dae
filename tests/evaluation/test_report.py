import json
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from retinaface.data.annotations import load_unlabelled
from retinaface.delivery.export import export_onnx
from retinaface.errors import InputError
from retinaface.evaluation import benchmark as benchmark_module
from retinaface.evaluation import report as module
from retinaface.evaluation.evaluate import Accuracy, Evaluation, Photo
from retinaface.evaluation.report import build_report
from retinaface.evaluation.report_text import report_markdown, report_rows, report_table
from retinaface.evaluation.reproduction import Commit, Reproduction
from retinaface.evaluation.wider_ap import SIZE_CLASSES, Curve

NAMES = ("teacher", "pruned", "int8")


def evaluation(ap, root):
    curve = Curve(np.linspace(0, 1, 5), np.ones(5))
    known = {"easy": None, "medium": None, "hard": None}
    accuracy = Accuracy({"all": ap, **known}, dict.fromkeys(SIZE_CLASSES, ap), {} if ap is None else {"all": curve})
    photo = next((root / "WIDER_val").rglob("*.jpg"))
    return Evaluation(
        accuracy,
        landmark_error=0.1,
        landmark_faces=9,
        photos=[Photo(photo, "a/b", np.empty((0, 5)), np.empty((0, 4)), {"all": np.empty(0, bool)})] * 5,
        official_photos=7,
        faces=9,
        images_per_second=1.0,
        runtime="onnxruntime",
        protocol="original",
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory, build_network):
    """A run's folder with a small ONNX file a model."""
    folder = tmp_path_factory.mktemp("run")
    export_onnx(build_network(channels=16), folder / "teacher.onnx")
    for name in NAMES[1:]:
        (folder / f"{name}.onnx").write_bytes((folder / "teacher.onnx").read_bytes())
    return folder


@pytest.fixture
def build(files, tiny_checkpoint, tiny_root, monkeypatch):
    """Builds a report of models with given AP."""

    def call(*ap):
        answers = iter([evaluation(each, tiny_root) for each in ap])
        monkeypatch.setattr(module, "evaluate", lambda model, root: next(answers))
        monkeypatch.setattr(module, "report_html", lambda report, *_: json.dumps(report))  # it has tests of its own
        checkpoints = dict.fromkeys(NAMES[: len(ap)], tiny_checkpoint)
        result = build_report(files, "demo", checkpoints, tiny_root, size=64, threads=1)
        text = (files / "report.json").read_text()
        assert "NaN" not in text
        assert json.loads(text) == result
        assert (files / "report.md").read_text() == report_markdown(result)
        assert json.loads((files / "report.html").read_text()) == result
        return result

    return call


def test_keys_are_those_that_were_promised(build, files):
    report = build(0.8, 0.76, 0.78)
    assert {"recipe", "machine", "models", "retention", "speedup"} <= report.keys()
    assert report["recipe"] == "demo"
    assert {"cpu", "flags", "threads", "torch", "lightning", "torchao", "onnxruntime"} <= report["machine"].keys()
    assert [model["name"] for model in report["models"]] == list(NAMES)
    for model in report["models"]:
        assert {"name", "ap", "params", "macs", "onnx_bytes", "latency_ms_median"} <= model.keys()
        assert list(model["ap"]) == ["all", "easy", "medium", "hard"]
        assert model["onnx_bytes"] == (files / f"{model['name']}.onnx").stat().st_size
        assert model["params"] > 1e5
        assert model["macs"] > 1e6
        assert (model["int8_convolutions"], model["convolutions"]) == (0, 56)
        assert len(model["float_convolutions"]) == 56
        assert model["latency_ms_median"] > 0
    assert report["retention"] == pytest.approx(0.78 / 0.8)
    assert report["speedup"] == report["models"][-1]["speedup"]
    assert report["models"][0]["speedup"] == 1
    assert "5 of 7 official photos, 9 faces" in report_markdown(report)
    for name in ("report.png", "precision_recall.png", "ap_by_size.png", "worst_photos.png", "kept_channels.png"):
        assert (files / name).stat().st_size > 5000
        assert f"]({name})" in report_markdown(report)


@pytest.mark.parametrize(
    ("ap", "retention", "sentence"),
    [
        ((0.8, 0.4), 0.5, "keeps **50.0%** of the teacher's"),
        ((0.8, 0.0), 0.0, "keeps **0.0%** of the teacher's"),
        ((0.0, 0.4), None, "keeps **an unknown share** of the teacher's average precision (all) (the teacher finds no"),
        ((None, None), None, "keeps **an unknown share** of the teacher's"),
    ],
)
def test_retention_and_what_is_said_of_it(ap, retention, sentence, build):
    report = build(*ap)
    assert report["retention"] == retention
    assert sentence in report_markdown(report)


def test_rows_and_tables(build):
    report = build(0.8, None, 0.78)
    rows = report_rows(report["models"])
    assert rows[0][:3] == ["model", "AP all", "kept"]  # no column for what the photos are not labelled for
    assert [row[0] for row in rows[1:]] == list(NAMES)
    assert [row[1] for row in rows[1:]] == ["0.800", "-", "0.780"]
    assert [row[2] for row in rows[1:]] == ["100.0%", "-", "97.5%"]
    assert [row[rows[0].index("INT8 convs")] for row in rows[1:]] == ["0/56"] * 3
    markdown = report_markdown(report)
    for row in rows:
        assert f"| {' | '.join(row)} |" in markdown
    console = Console(width=80)  # what a log file gets
    with console.capture() as shown:
        console.print(report_table(report))
    assert all(cell in shown.get() for row in rows for cell in row)


def test_convolutions_in_int8_are_counted_and_the_others_named(build, files, onnx_files):
    """Those of an INT8 file with heads, pyramid and first convolution in float."""
    before = (files / "int8.onnx").read_bytes()
    (files / "int8.onnx").write_bytes(onnx_files["int8"].read_bytes())
    report = build(0.8, 0.76, 0.78)
    (files / "int8.onnx").write_bytes(before)
    model = report["models"][-1]
    assert (model["int8_convolutions"], model["convolutions"]) == (41, 56)
    assert len(model["float_convolutions"]) == 15
    assert {"backbone.stage1.0.0", "fpn.merge.1.0", "class_heads.2"} < set(model["float_convolutions"])
    assert "| 41/56 |" in report_markdown(report)
    assert "**INT8 convs:**" in report_markdown(report)


def test_a_real_report_of_one_model(files, tiny_checkpoint, tiny_root):
    reproduction = Reproduction("compress.py a b", "stages: []", {"teacher": 3}, Commit("0" * 40, changed=False))
    checkpoints = {"teacher": tiny_checkpoint}
    report = build_report(files, "demo", checkpoints, tiny_root, size=64, threads=1, reproduction=reproduction)
    assert report["reproduction"] == {
        "command": "compress.py a b",
        "recipe": "stages: []",
        "seeds": {"teacher": 3},
        "commit": {"name": "0" * 40, "changed": False},
    }
    page = (files / "report.html").read_text()
    assert "compress.py a b" in page
    subsets = sum(value is not None for value in report["models"][0]["ap"].values())
    assert page.count("<img") == 1 + subsets + 4  # AP against latency, precision and recall, photos
    assert report["data"]["photos"] == 5
    assert 0 <= report["models"][0]["ap"]["all"] <= 1
    assert report["models"][0]["ap"]["easy"] is None


def test_what_openvino_does_not_run_is_told_and_the_rest_is_reported(build, monkeypatch):
    prepare = benchmark_module.prepare

    def fail_on_int8(model, runtime, *shape):
        if (model.stem, runtime) == ("int8", "openvino"):
            raise InputError(f"{model}: OpenVINO cannot load it (too odd)")
        return prepare(model, "onnxruntime", *shape)

    monkeypatch.setattr(benchmark_module, "prepare", fail_on_int8)
    monkeypatch.setattr(module, "usable_runtimes", lambda models: ["onnxruntime", "openvino"])
    structure = module.load_structure

    def made_for_openvino(path):
        found = structure(path)
        found.quantization = SimpleNamespace(backend="openvino", keep_float=())
        return found

    monkeypatch.setattr(module, "load_structure", made_for_openvino)
    report = build(0.8, 0.76, 0.78)
    failure = {"model": "int8", "runtime": "openvino", "reason": "OpenVINO cannot load it (too odd)"}
    assert report["fastest"]["failures"] == [failure]
    assert report["fastest"]["final"]["runtime"] == "onnxruntime"
    assert report["benchmark"]["runtime"] == "onnxruntime"  # where every model runs, though this one is for OpenVINO
    assert "- **int8 in OpenVINO:** not timed: OpenVINO cannot load it (too odd)." in report_markdown(report)


def test_a_model_for_another_runtime_is_told(build):
    report = build(0.9, 0.9, 0.8)
    assert [model["backend"] for model in report["models"]] == [None] * 3
    assert "made for" not in report_markdown(report)
    assert report["models"][2]["keep_float"] is None
    report["models"][2]["backend"] = "openvino"
    assert "**int8:** made for openvino" in report_markdown(report)


def test_without_labels_models_are_compared_with_the_teacher(files, tiny_checkpoint, tiny_root, monkeypatch):
    photos = tiny_root / "WIDER_train" / "images"
    seen = []

    def evaluate_on(model, samples):
        seen.append((model.stem, samples))
        return evaluation({"teacher": 1.0, "pruned": 0.9}[model.stem], tiny_root)

    monkeypatch.setattr(module, "labelled_by", lambda model, samples: [(model.stem, sample.name) for sample in samples])
    monkeypatch.setattr(module, "evaluate_on", evaluate_on)
    checkpoints = dict.fromkeys(NAMES[:2], tiny_checkpoint)
    report = build_report(files, "demo", checkpoints, photos, size=64, threads=1, labels=False)
    (held_out,) = [sample.name for sample in load_unlabelled(photos, "val")]
    assert seen == [("teacher", [("teacher", held_out)]), ("pruned", [("teacher", held_out)])]
    assert json.loads((files / "report.json").read_text()) == report
    assert report["data"]["faces_by"] == "teacher"
    assert report["retention"] is None
    assert all(value is None for model in report["models"] for value in model["ap"].values())
    assert [model["agreement"] for model in report["models"]] == [1.0, 0.9]
    rows = report_rows(report["models"])
    assert rows[0][:3] == ["model", "agreement with teacher", "params"]
    assert [row[1] for row in rows[1:]] == ["100.0%", "90.0%"]
    markdown = (files / "report.md").read_text()
    assert "agrees with the teacher to **90.0%**" in markdown
    assert "**Agreement with the teacher:**" in markdown
    assert "9 faces of the teacher's" in markdown
    assert "precision_recall" not in markdown
    report["models"][-1]["agreement"] = None  # the teacher finds no face
    assert "agrees with the teacher to **an unknown share** (the teacher finds no face" in report_markdown(report)


def test_labelled_validation_photos_are_measured_on_whatever_the_others_are(files, tiny_checkpoint, tiny_root):
    report = build_report(files, "demo", {"teacher": tiny_checkpoint}, tiny_root, size=64, threads=1, labels=False)
    assert (report["data"]["photos"], report["data"]["faces_by"]) == (5, "labels")
    assert report["models"][0]["ap"]["all"] is not None
    assert "agreement" not in report["models"][0]
