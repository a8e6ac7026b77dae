import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from callbacks.wandb_models import _checkpoints
from retinaface.evaluation.dashboard import model_name
from retinaface.evaluation.wider_ap import SUBSETS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pruned_on_wandb(start_wandb_offline, make_stage_arguments, run_stage, tiny_root, tiny_checkpoint, tmp_path_factory):
    """The pruning stage of a recipe: its CLI, its folder, and the run that W&B has of it."""
    home = tmp_path_factory.mktemp("dashboard")
    folder = home / "mine" / "pruned"
    start = [f"--model.init_args.{role}={tiny_checkpoint}" for role in ("student", "teacher")]
    more = ["--trainer.max_epochs=1", f"--config={ROOT / 'configs' / 'wandb.yaml'}",
            "--trainer.logger.init_args.project=faces", "--trainer.callbacks.init_args.ratio=0.3",
            "--trainer.callbacks.init_args.recalibrate=0"]  # fmt: skip
    with start_wandb_offline(home) as read, pytest.MonkeyPatch.context() as patch:
        for name, value in (("RUN_ID", "mine-1-pruned"), ("RUN_GROUP", "mine-1"), ("JOB_TYPE", "pruned")):
            patch.setenv(f"WANDB_{name}", value)
        patch.setattr("callbacks.export.export_onnx", lambda network, path, *_, **__: path.write_bytes(b"onnx"))
        # A threshold that boxes of an untrained network pass.
        patch.setattr("callbacks.ImageLogging.__init__.__defaults__", (8, 0.02))
        cli = run_stage([*make_stage_arguments("prune", tiny_root, *start), *more], folder)
        (run,) = read()
    return cli, folder, run


def test_a_stage_is_on_the_dashboard(pruned_on_wandb, tiny_checkpoint):
    cli, folder, run = pruned_on_wandb
    assert (run.run.run_id, run.run.run_group, run.run.job_type) == ("mine-1-pruned", "mine-1", "pruned")
    assert run.run.project == "faces"
    # Curves: a figure a step, or an epoch.
    losses = [
        f"{source}/{part}"
        for source, scores in (("train", "classes"), ("distillation", "logits"))
        for part in (scores, "boxes", "landmarks", "loss")
    ]
    for name in (*losses, "lr-AdamW/pg1", "train/images_per_second"):
        assert len(run.history[name]) == 2, name
    for subset in SUBSETS:  # the photos are labelled for all, though they have no easy face
        name = f"val/ap_{subset}"
        assert run.history[name] == [pytest.approx(float(cli.trainer.callback_metrics[name]), nan_ok=True)], name
    # What pruning did.
    names = ("macs", "macs_before", "params", "params_before", "ms", "ms_before", "speedup")
    figures = {name: run.history[f"pruning/{name}"][0] for name in names}
    assert 0 < figures["macs"] < figures["macs_before"]
    assert 0 < figures["params"] < figures["params_before"]
    assert (figures["ms_before"], figures["ms"], figures["speedup"]) == (10.0, 5.0, 2.0)
    # Pictures, as files beside the record.
    for name in ("pruning/kept_channels", "val/detections", "evaluation/precision_recall", "evaluation/worst_photos"):
        (value,) = run.history[name]
        for file in value["filenames"]:
            assert Image.open(run.file.parent / "files" / file).size == (value["width"], value["height"])
    # Precision and recall as a chart.
    assert run.history["evaluation/curves_table"][0]["nrows"] > 0
    # Photos with boxes that a person can sort out by score.
    (photos,) = run.history["val/faces"]
    assert photos["count"] == 5
    files = [run.file.parent / "files" / each["detections"]["path"] for each in photos["all_boxes"]]
    boxes = [box for file in files for box in json.loads(file.read_text())["box_data"]]
    assert min(box["scores"]["score"] for box in boxes) > 0.02
    # The report's training curves come from these.
    assert "train/images_per_second" in (folder / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    # All settings.
    assert run.config["trainer"]["max_epochs"] == 1
    assert run.config["model"]["init_args"]["student"] == str(tiny_checkpoint)


def test_where_a_model_comes_from(pruned_on_wandb, tiny_checkpoint):
    _, folder, run = pruned_on_wandb
    (used,) = run.used  # student and teacher are the same file
    assert (used.type, used.name) == ("model", model_name(tiny_checkpoint))
    assert used.manifest.contents[0].local_path == str(tiny_checkpoint)
    checkpoint, exported = (made for made in run.made if made.type != "run_table")  # a chart's figures are one too
    assert (checkpoint.type, checkpoint.name) == ("model", "mine-pruned")
    assert checkpoint.manifest.contents[0].local_path == str(folder / "checkpoints" / "last.ckpt")
    assert (exported.type, exported.name) == ("onnx", "mine-pruned-model.onnx")
    assert Path(exported.manifest.contents[0].local_path).read_bytes() == b"onnx"
    # From the one to the others by this run.
    assert {artifact.run_id for artifact in (used, checkpoint, exported)} == {run.run.run_id}


@pytest.mark.parametrize(("trained", "file"), [(False, "last.ckpt"), (True, "best.ckpt")])
def test_the_checkpoint_of_a_stage_also_of_one_that_trains_nothing(trained, file, tmp_path):
    callback = ModelCheckpoint(dirpath=tmp_path)
    trainer = SimpleNamespace(checkpoint_callbacks=[callback])
    assert _checkpoints(trainer) == []  # stopped before there is one
    for name in ("last.ckpt", "best.ckpt"):
        (tmp_path / name).touch()
    callback.best_model_path = str(tmp_path / "best.ckpt") if trained else ""
    assert _checkpoints(trainer) == [tmp_path / file]
