import socket
import time
from pathlib import Path
from threading import Event

import pytest
import wandb
from lightning.pytorch.utilities import rank_zero_only

from callbacks import WandbLogger
from retinaface.errors import InputError
from retinaface.evaluation.dashboard import log_model


@pytest.fixture
def begun(monkeypatch):
    """What each new run is begun with."""
    calls = []
    monkeypatch.setattr(wandb, "init", lambda **options: calls.append(options))
    return calls


def test_without_a_login_the_run_stays_here_and_that_is_said_once(wandb_offline, tmp_path, monkeypatch, capsys, begun):
    monkeypatch.delenv("WANDB_SILENT")
    wandb.teardown()  # W&B reads its environment once
    for _ in range(2):
        _ = WandbLogger("faces", save_dir=str(tmp_path)).experiment
    assert [run["mode"] for run in begun] == ["offline"] * 2
    said = capsys.readouterr().err
    assert said.count("nobody is logged in") == 1
    assert f'for run in {tmp_path}/wandb/offline-run-*; do wandb sync "$run"; done' in said


def test_a_login_is_used(wandb_offline, monkeypatch, begun):
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    _ = WandbLogger("faces", entity="team", resume=None, mode=None).experiment  # None: what a configuration leaves out
    assert {name: begun[0][name] for name in ("project", "entity", "mode", "resume")} == {
        "project": "faces", "entity": "team", "mode": None, "resume": "allow"
    }  # fmt: skip


@pytest.mark.parametrize(("mode", "given"), [("offline", "offline"), ("disabled", None)])
def test_the_users_own_mode_holds(mode, given, wandb_offline, monkeypatch, begun):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(wandb, "login", lambda **_: pytest.fail("asks for a login"))
    _ = WandbLogger("faces").experiment
    assert begun[0]["mode"] == given  # W&B itself looks at the environment for others


@pytest.mark.parametrize(("mode", "given"), [("offline", "offline"), ("disabled", None)])
def test_the_mode_in_the_settings_of_wandb_holds(mode, given, wandb_offline, tmp_path, monkeypatch, begun):
    wandb.teardown()  # W&B reads its settings once
    (tmp_path / "wandb_home" / "settings").write_text(f"[default]\nmode = {mode}\n")
    monkeypatch.setattr(wandb, "login", lambda **_: pytest.fail("asks for a login"))
    _ = WandbLogger("faces").experiment
    assert begun[0]["mode"] == given


@pytest.mark.parametrize("function", ["login", "init"])
def test_what_wandb_refuses_is_one_line(function, wandb_offline, monkeypatch):
    def refuse(**_):
        raise wandb.errors.CommError("no such entity")

    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, function, refuse)
    with pytest.raises(InputError, match=r"W&B: no such entity; log in .* WANDB_MODE=offline"):
        _ = WandbLogger("faces").experiment


def test_without_a_network_the_run_goes_on_here_and_that_is_said(wandb_offline, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # nobody answers there from now on
    said, folder = [], tmp_path / "my run"
    wandb.teardown()  # W&B reads its environment once
    for name, value in (("BASE_URL", f"http://127.0.0.1:{port}"), ("API_KEY", "a" * 40), ("INIT_TIMEOUT", "5")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_RUN_ID", "mine-1-pruned")
    monkeypatch.setattr(wandb, "termwarn", lambda text, **_: said.append(text))
    folder.mkdir()
    logger = WandbLogger("faces", save_dir=str(folder))
    logger.log_metrics({"x": 1.0})
    assert logger.experiment.offline
    (line,) = said
    assert "no connection (" in line
    assert "connection refused" in line
    assert f"""for run in '{folder}/wandb'/offline-run-*; do wandb sync "$run"; done""" in line
    assert "\n" not in line
    (run,) = wandb_offline()
    assert run.run.run_id == "mine-1-pruned"
    assert run.history["x"] == [1.0]


def test_all_that_wandb_writes_is_in_the_runs_folder(wandb_offline, tmp_path, monkeypatch):
    home, folder = tmp_path / "home", tmp_path / "mine"
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    wandb.teardown()  # W&B's own process has the environment that it began with
    for path in (home, folder):
        path.mkdir()
    for file in (checkpoint := folder / "last.ckpt", exported := folder / "model.onnx"):
        file.write_text(file.name)
    monkeypatch.chdir(tmp_path)
    logger = WandbLogger("faces", save_dir="mine")
    log_model(logger.experiment, checkpoint, [exported])
    waits = logger.experiment.settings.finish_timeout
    (run,) = wandb_offline()
    assert list(home.rglob("*")) == []
    copies = [entry.local_path for made in run.made for entry in made.manifest.contents]
    assert copies[0] == str(checkpoint)
    assert Path(copies[1]).is_relative_to(folder / "wandb")
    assert Path(copies[1]).read_text() == "model.onnx"  # also when the file itself has moved
    assert waits == 600  # seconds for a network that is gone at the end, where W&B would wait for ever


def test_other_processes_begin_no_run(wandb_offline, monkeypatch, begun):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setattr(wandb, "login", lambda **_: pytest.fail("asks for a login"))
    WandbLogger("faces").log_metrics({"x": 1.0})
    _ = WandbLogger("faces").experiment
    assert begun == []


def test_a_run_ends_before_its_job_is_requeued(wandb_offline, tmp_path):
    logger = WandbLogger("faces", save_dir=str(tmp_path))
    logger.log_metrics({"x": 1.0})
    run = logger.experiment
    logger.finalize("failed")
    assert wandb.run is run
    logger.finalize("requeued")
    assert wandb.run is None
    (found,) = wandb_offline()
    assert found.history["x"] == [1.0]


def test_a_run_that_goes_on_after_its_job_was_requeued_keeps_its_id(wandb_offline, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine-1-pruned")
    for step in (1, 2):
        wandb.teardown()  # another process
        logger = WandbLogger("faces", save_dir=str(tmp_path))
        logger.log_metrics({"x": float(step)}, step=step)
        logger.finalize("requeued")
    before, after = wandb_offline()
    assert [part.run.run_id for part in (before, after)] == ["mine-1-pruned"] * 2
    assert [part.history["x"] for part in (before, after)] == [[1.0], [2.0]]
    assert [part.history["trainer/global_step"] for part in (before, after)] == [[1], [2]]


def test_a_network_that_is_gone_does_not_keep_a_job_from_being_requeued(wandb_offline, tmp_path, monkeypatch):
    logger = WandbLogger("faces", save_dir=str(tmp_path))
    run, asked, back = logger.experiment, Event(), Event()
    monkeypatch.setattr("callbacks.wandb_logger._SECONDS_TO_SEND", 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(type(run), "finish", lambda self: asked.set() or back.wait(60))
        begun = time.monotonic()
        logger.finalize("requeued")
        assert asked.is_set()
        assert time.monotonic() - begun < 20
    back.set()
    run.finish()
