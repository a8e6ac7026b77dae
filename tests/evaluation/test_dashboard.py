import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import wandb

from retinaface.evaluation.dashboard import (
    go_offline,
    log_model,
    model_name,
    precision_recall_chart,
    report_as_table,
    run_mode,
    send_report,
    use_model,
)
from retinaface.evaluation.visualize import plot_precision_recall
from retinaface.evaluation.wider_ap import Curve


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/runs/mine/pruned/checkpoints/last.ckpt", "mine-pruned"),
        ("/runs/my run/int8/checkpoints/last.ckpt", "my-run-int8"),
        ("/w/mobilenet0.25.pth", "w-mobilenet0.25"),
        ("/last.ckpt", "checkpoint"),
    ],
)
def test_name_of_a_model(path, name):
    assert model_name(Path(path)) == name


def stage_file(folder, stage):
    file = folder / stage / "checkpoints" / "last.ckpt"
    file.parent.mkdir(parents=True)
    file.write_bytes(stage.encode())
    return file


def test_the_model_that_a_run_uses_is_the_one_that_another_made(wandb_offline, tmp_path):
    teacher, pruned = (stage_file(tmp_path / "mine", name) for name in ("teacher", "pruned"))
    with wandb.init(project="faces", mode="offline") as run:
        log_model(run, teacher)
        use_model(run, teacher)
        use_model(run, pruned)
    (run,) = wandb_offline()
    (made,), used = run.made, run.used
    # W&B takes artifacts of one name and digest for one.
    assert (used[0].type, used[0].name, used[0].digest) == (made.type, made.name, made.digest)
    assert (used[1].name, used[1].digest) != (made.name, made.digest)


@pytest.fixture
def said(monkeypatch):
    """The warnings."""
    lines = []
    monkeypatch.setattr(wandb, "termwarn", lambda text, **_: lines.append(text))
    return lines


# As W&B 0.31 raises them: from its own process, which hands on what the server or the network says.
@pytest.mark.parametrize(
    ("error", "is_said"),
    [
        (wandb.errors.CommError('Failed to get resume status for run a: context deadline exceeded\nwhile retrying: '
                                'Post "https://w": dial tcp: lookup w: no such host'), "lookup w: no such host)"),
        (wandb.errors.CommError("Timed out while retrying: HTTP 503: busy\nConsider increasing"), "HTTP 503: busy"),
        (wandb.errors.CommError("Timed out initializing run: giving up after 1 attempt(s)"), "1 attempt(s)"),
        (TimeoutError("no answer"), "no answer"),
        (wandb.errors.CommError('Failed to get resume status for run a: returned error 401: {"data":null}'), None),
        (wandb.errors.CommError("entity nobody not found during upsertBucket"), None),
        (wandb.errors.AuthenticationError("API key must be 40 characters long"), None),
        (wandb.errors.UsageError("Timed out attaching to run"), None),
        (OSError("No space left on device"), None),
    ],
)  # fmt: skip
def test_only_for_want_of_a_network_a_run_goes_on_offline(error, is_said, said, tmp_path):
    if is_said is None:
        with pytest.raises(type(error)) as raised:
            go_offline(error, tmp_path)
        assert raised.value is error
        assert said == []
    else:
        go_offline(error, tmp_path)
        (line,) = said
        assert is_said in line
        assert "\n" not in line


REFUSALS = [wandb.errors.CommError("no space left in the plan"), OSError("Disk quota exceeded"), AssertionError()]


def refusing_run(error, offline):
    def refuse(*_, **__):
        raise error

    return SimpleNamespace(
        project="faces", offline=offline, use_artifact=refuse, log_artifact=refuse, _log_artifact=refuse
    )


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
def test_a_model_that_wandb_refuses_does_not_end_a_run(error, offline, said, tmp_path):
    file = stage_file(tmp_path, "teacher")
    use_model(refusing_run(error, offline), file)
    (line,) = said
    assert line == f"{file}: that this run starts from it is not noted ({str(error) or 'AssertionError'})"


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
def test_a_stage_is_done_also_where_wandb_refuses_its_files(error, offline, said, tmp_path):
    file = stage_file(tmp_path / "mine", "int8")
    (exported := tmp_path / "model.onnx").touch()
    log_model(refusing_run(error, offline), file, [exported])
    why = str(error) or "AssertionError"
    put = "to send it later: wandb artifact put --type"
    assert said == [
        f"{file}: not sent ({why}); {put} model --name faces/mine-int8 {file}",
        f"{exported}: not sent ({why}); {put} onnx --name faces/mine-int8-model.onnx FILE",
    ]


def test_one_file_that_cannot_be_read_leaves_the_others(wandb_offline, said, tmp_path):
    (exported := tmp_path / "model.onnx").touch()
    gone = tmp_path / "mine" / "int8" / "last.ckpt"
    with wandb.init(project="faces", mode="offline") as run:
        use_model(run, gone)
        log_model(run, gone, [exported])
    (run,) = wandb_offline()
    assert [made.name for made in run.made] == ["mine-int8-model.onnx"]
    assert [line.partition(": ")[0] for line in said] == [str(gone)] * 2


def test_a_run_that_is_going_on_keeps_its_mode(monkeypatch):
    monkeypatch.setattr(wandb, "run", object())
    monkeypatch.setattr(wandb, "login", lambda **_: pytest.fail("asks for a login"))
    assert run_mode() is None


def model(name, ap=None, agreement=None, **figures):
    costs = {"params": 4, "macs": 8, "onnx_bytes": 9, "convolutions": 3, "int8_convolutions": 0,
             "latency_ms_median": 7.5, "speedup": 1.0}  # fmt: skip
    compared = {} if agreement is None else {"agreement": agreement}
    return {"name": name, "ap": {"all": ap, "easy": None, "medium": None, "hard": None}, **compared, **costs, **figures}


def test_the_result_as_a_table():
    report = {"models": [model("teacher", ap=0.8), model("int8", ap=0.6, speedup=2.5, int8_convolutions=3)]}
    table = report_as_table(report)
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.data]
    assert [row["model"] for row in rows] == ["teacher", "int8"]
    assert rows[1]["kept"] == pytest.approx(0.75)
    assert (rows[1]["speedup"], rows[1]["int8_convolutions"], rows[1]["latency_ms_median"]) == (2.5, 3, 7.5)
    assert not {"ap_easy", "agreement"} & set(table.columns)


def test_the_result_without_labels():
    report = {"models": [model("teacher", agreement=1.0), model("int8", agreement=0.9)]}
    table = report_as_table(report)
    assert table.get_column("agreement") == [1.0, 0.9]
    assert not {"ap_all", "kept"} & set(table.columns)


def test_the_curves_of_a_chart():
    curves = {
        "all": Curve(recall=np.linspace(0, 0.8, 5), precision=np.linspace(1, 0.5, 5)),
        "hard": Curve(recall=np.array([0.1, 0.2]), precision=np.array([0.9, 0.7])),
    }
    table = precision_recall_chart(curves, points=3).table
    # Recall lies on the x axis; the last point of a curve is always there.
    assert table.columns == ["step", "lineKey", "lineVal"]
    assert sorted((name, x, y) for x, name, y in table.data) == [
        ("all", 0.0, 1.0), ("all", 0.4, 0.75), ("all", 0.8, 0.5), ("hard", 0.1, 0.9), ("hard", 0.2, 0.7)
    ]  # fmt: skip


def test_the_report_is_a_run_of_its_own(wandb_offline, tmp_path, monkeypatch):
    assert run_mode() == "offline"  # from here on W&B does not look at its environment
    for name, value in (("RUN_ID", "mine-1-report"), ("RUN_GROUP", "mine-1"), ("JOB_TYPE", "report")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    folder = tmp_path / "mine"
    checkpoints = {name: stage_file(folder, name) for name in ("teacher", "int8")}
    models = [model("teacher", ap=0.8), model("int8", ap=0.6, speedup=2.5)]
    report = {"recipe": "own_photos", "models": models, "retention": 0.75, "speedup": 2.5}
    for suffix in ("html", "md", "json"):
        (folder / f"report.{suffix}").write_text(f"<p>{suffix}</p>")
    plot_precision_recall({"int8": {"all": Curve(np.ones(3), np.ones(3))}}, folder / "precision_recall.png")
    send_report(folder, report, checkpoints, "faces")
    (run,) = wandb_offline()
    assert (run.run.run_id, run.run.run_group, run.run.job_type) == ("mine-1-report", "mine-1", "report")
    assert [artifact.name for artifact in run.used] == ["mine-teacher", "mine-int8"]
    files = run.file.parent / "files"
    table = json.loads((files / run.history["report/models"][0]["path"]).read_text())
    assert [row[0] for row in table["data"]] == ["teacher", "int8"]
    assert "<p>html</p>" in (files / run.history["report/page"][0]["path"]).read_text()
    assert (files / run.history["report/precision_recall"][0]["path"]).is_file()
    assert run.summary["speedup"] == 2.5
    (artifact,) = (made for made in run.made if made.type == "report")  # the table is one by itself
    assert sorted(entry.path for entry in artifact.manifest.contents) == ["report.html", "report.json", "report.md"]


def test_a_report_without_a_network_is_a_run_on_the_disk(wandb_offline, said, tmp_path, monkeypatch):
    begin = wandb.init

    def init(**options):
        if options["mode"] != "offline":
            raise wandb.errors.CommError("Timed out initializing run")
        return begin(**options)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    for suffix in ("html", "md", "json"):
        (tmp_path / f"report.{suffix}").touch()
    report = {"recipe": "own_photos", "models": [model("teacher", ap=0.8)], "retention": None, "speedup": 1.0}
    send_report(tmp_path, report, {}, "faces")
    (run,) = wandb_offline()
    assert run.summary["recipe"] == "own_photos"
    (line,) = said
    assert "no connection (Timed out initializing run), so this run stays on this disk" in line
