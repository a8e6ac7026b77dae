import json
import sys
from pathlib import Path

import pytest
import torch

import train
from lightning_modules import RetinaFaceModule, step_benchmark
from lightning_modules.step_benchmark import StepProfiler

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def benchmark(tiny_root, tmp_path, monkeypatch):
    """Runs ``train.py benchmark`` for a stage, in an empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def run(stage, *options):
        train.main(
            [
                "benchmark",
                *(f"--config={CONFIGS / name}" for name in ("default.yaml", "data/wider_face.yaml", stage)),
                f"--data.init_args.root={tiny_root}",
                "--data.init_args.train_size=64",
                "--data.init_args.batch_size=4",
                "--data.init_args.num_workers=0",
                *options,
            ]
        )
        return folder

    return run


def test_every_part_of_a_stages_step_is_timed(benchmark, tiny_checkpoint, tmp_path, capsys):
    """Over more than one epoch of 2 batches; nothing but the figures is written."""
    start = [f"--model.init_args.{role}={tiny_checkpoint}" for role in ("student", "teacher")]
    file = tmp_path / "figures" / "step.json"
    sizes = ["--trainer.accelerator=cpu", "--trainer.accumulate_grad_batches=2", "--warmup=2", "--steps=4"]
    folder = benchmark("stage/prune.yaml", *start, *sizes, f"--json={file}")
    assert not list(folder.iterdir())
    figures = json.loads(file.read_text())
    parts = figures["parts"]
    assert list(parts) == ["data", "transfer", "forward", "teacher", "loss", "backward", "optimizer", "other"]
    assert all(part["share"] > 0 for part in parts.values())
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    assert (figures["steps"], figures["batch_size"], figures["processes"], figures["gpu"]) == (4, 4, 1, None)
    assert figures["machine"]["torch"] == torch.__version__.partition("+")[0]
    shown = capsys.readouterr().out
    assert "4 steps with 1 x 4 pictures, 32-true, 1 threads of" in shown
    assert f"{figures['images_per_second']:.1f} images/s" in shown


def test_a_step_is_a_batch_where_gradients_are_accumulated_over_the_end_of_an_epoch(benchmark, tmp_path):
    """Epochs of 2 batches, each of which ends with an optimizer step."""
    file = tmp_path / "step.json"
    options = ["--trainer.accelerator=cpu", "--trainer.accumulate_grad_batches=3", "--warmup=1", "--steps=4"]
    benchmark("stage/teacher.yaml", *options, f"--json={file}")
    assert json.loads(file.read_text())["steps"] == 4


def test_a_stage_without_steps_is_one_line(benchmark, monkeypatch, capsys):
    # As callbacks.PostTrainingQuantization does.
    monkeypatch.setattr(
        RetinaFaceModule,
        "setup",
        lambda module, stage: setattr(module.trainer.fit_loop, "max_epochs", 0),
        raising=False,
    )
    with pytest.raises(SystemExit):
        benchmark("stage/teacher.yaml")
    assert "error: benchmark: this stage trains no steps; give" in capsys.readouterr().err


def test_bad_numbers_are_one_line(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark("stage/teacher.yaml", "--steps=0")
    assert "error: steps: expected at least 1, found 0" in capsys.readouterr().err


def test_no_mark_before_the_process_has_its_gpu(monkeypatch):
    marks = []
    monkeypatch.setattr(step_benchmark, "_gpu_mark", lambda: marks.append("mark"))
    profiler = StepProfiler(torch.device("cuda", 1))
    assert not marks
    profiler.setup("fit")
    assert marks


def test_parts_within_others_are_taken_out(monkeypatch):
    times = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(times) / 1e3)
    profiler = StepProfiler(torch.device("cpu"))
    profiler.setup("fit")
    with profiler.profile("[_TrainingEpochLoop].train_dataloader_next"):  # 1 to 2
        pass
    with profiler.profile("run_training_batch"), profiler.profile("[LightningModule]Module.optimizer_step"):  # 3 to 10
        with profiler.profile("[Strategy]Single.training_step"), profiler.profile("forward"):  # 4, 5 to 6, 7
            pass
        with profiler.profile("[Strategy]Single.backward"):  # 8 to 9
            pass
        with profiler.profile("[Callback]Other.optimizer_step"):
            pass
    timings = profiler.timings(warmup=0, images_per_step=1)
    assert timings.parts == {
        "data": [pytest.approx(1)],
        "forward": [pytest.approx(1)],
        "backward": [pytest.approx(1)],
        "optimizer": [pytest.approx(3)],
        "other": [pytest.approx(5)],
    }
