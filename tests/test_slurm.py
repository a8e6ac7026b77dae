import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import yaml

import compress
from retinaface.errors import InputError
from retinaface.slurm import SAVED, Notice, as_step, is_preempted, is_running, job_id, requeue_job

ROOT = Path(__file__).parents[1]
SBATCH = """#!{python}
import os, sys
from pathlib import Path

folder = Path({folder!r})
with (folder / "submitted").open("a") as file:
    file.write(repr((sys.argv[1:], os.environ["VENV"], os.environ["PROJECT"])) + "\\n")
number = len((folder / "submitted").read_text().splitlines())
if (folder / "refuse").exists() and number == int((folder / "refuse").read_text()):
    sys.exit("sbatch: error: QOSMaxSubmitJobPerUserLimit")
print(f"{{100 + number}};cluster")
"""
RECIPE = """
description: for tests
root: photos
stages:
  - {name: teacher, config: [data/synthetic_faces.yaml, stage/teacher.yaml]}
  - {name: pruned, config: [data/synthetic_faces.yaml, stage/prune.yaml]}
"""
PTQ = "  - {name: ptq, config: [data/synthetic_faces.yaml, stage/ptq.yaml]}\n"


def program(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A recipe in the current folder, and programs in place of SLURM's that note what they are asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    program(tmp_path / "bin" / "sbatch", SBATCH.format(python=sys.executable, folder=str(tmp_path)))
    for name in ("scancel", "scontrol"):
        program(tmp_path / "bin" / name, f'#!/bin/sh\necho "$@" >> {tmp_path / name}\n')
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def submitted(folder):
    return [eval(line) for line in (folder / "submitted").read_text().splitlines()]


def test_a_chain_of_jobs(cluster, capsys):
    options = ["--submit", "slurm", "--partition", "fast", "--gpus=2", "--time", "8:00:00", "--sbatch=--account='a b'"]
    compress.main(["recipe.yaml", "--out", "out", "--trainer.max_epochs", "3", *options])
    script = str(ROOT / "configs" / "slurm" / "compress.sbatch")
    group = json.loads((cluster / "out" / "run.json").read_text())["group"]
    assert group.startswith("out-")
    recipe = ["recipe.yaml", "--out", "out", "--trainer.max_epochs", "3"]
    for number, (name, (words, venv, project)) in enumerate(
        zip(("teacher", "pruned", "report"), submitted(cluster), strict=True)
    ):
        log = f"--output={cluster / 'out' / 'slurm' / name}-%j.log"
        own = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1"] if name == "report" else []
        waits = ["--dependency=singleton"]
        if number:
            waits = ["--kill-on-invalid-dep=yes", f"--dependency=singleton,afterok:{100 + number}"]
        gpus = ["--gpus-per-node=2", "--ntasks-per-node=2"]
        common = ["--partition=fast", "--time=8:00:00", *gpus, "--account=a b"]
        assert words == [
            *("--parsable", f"--job-name={group}-{name}", log, *common, *own, *waits, script),
            *(*recipe, "--only", name),
        ]
        assert (venv, project) == (sys.prefix, str(ROOT))
    shown = capsys.readouterr().out
    assert "pruned: job 102, after 101" in shown
    assert "squeue --jobs=101,102,103" in shown
    logs = [cluster / "out" / "slurm" / log for log in ("teacher-101.log", "pruned-102.log", "report-103.log")]
    assert f"tail -F {' '.join(map(str, logs))}\n" in shown


def test_what_trains_nothing_takes_one_process(cluster):
    (cluster / "recipe.yaml").write_text(RECIPE + PTQ)
    compress.main(["recipe.yaml", "--out", "out", "--submit", "slurm", "--gpus=8", "--sbatch=--nodes=2"])
    shares = [[word for word in words if re.match("--(nodes|ntasks|gpus)", word)] for words, *_ in submitted(cluster)]
    all_of_them = ["--gpus-per-node=8", "--ntasks-per-node=8", "--nodes=2"]
    one = [*all_of_them, "--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1"]  # the last ones count
    assert shares == [all_of_them, all_of_them, one, one]


def test_what_is_done_is_not_submitted(cluster, capsys):
    (cluster / "out").mkdir()
    (cluster / "out" / "teacher.onnx").touch()
    compress.main(["recipe.yaml", "--out", "out", "--submit", "slurm"])
    assert [words[-1] for words, *_ in submitted(cluster)] == ["pruned", "report"]
    assert "--dependency=singleton" in submitted(cluster)[0][0]
    assert "teacher: done before" in capsys.readouterr().out


def test_a_folder_with_signs_that_mean_something_to_the_cluster(cluster, capsys):
    compress.main(["recipe.yaml", "--out", "a, 50%", "--submit", "slurm"])
    words = submitted(cluster)[0][0]
    assert f"--output={cluster}/a, 50%%/slurm/teacher-%j.log" in words
    assert re.fullmatch(r"--job-name=a--50--\w{6}-teacher", words[1])
    assert f"tail -F '{cluster}/a, 50%/slurm/teacher-101.log' " in capsys.readouterr().out


def one_line_error(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        compress.main(["recipe.yaml", "--out", "out", *arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_refused_job_leaves_none(cluster, capsys):
    (cluster / "refuse").write_text("3")
    assert "--submit slurm: sbatch: error: QOSMax" in one_line_error(capsys, "--submit", "slurm")
    assert (cluster / "scancel").read_text() == "101 102\n"


def test_no_slurm_is_one_line(cluster, capsys):
    (cluster / "bin" / "sbatch").unlink()
    assert "there is no sbatch here" in one_line_error(capsys, "--submit", "slurm")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--partition=fast"], "add --submit slurm"),
        (["--submit=slurm", "--only=teacher"], "leave --only and --srun to the jobs"),
        (["--submit=slurm", "--sbatch='a"], "No closing quotation"),
        (["--trainer.num_nodes=2"], "several machines take --submit slurm"),
        (["--teacher.trainer.num_nodes", "2"], "several machines take --submit slurm"),
        (["--only=int8"], "no such stage; expected one of teacher, pruned, report"),
        (["--only=report"], "teacher, pruned must be done before"),
    ],
)
def test_wrong_options_are_one_line(options, message, cluster, capsys):
    assert message in one_line_error(capsys, *options)
    assert not (cluster / "submitted").exists()


@pytest.fixture
def commands(monkeypatch):
    """What would run, instead of running it."""
    seen = []

    def run(command):
        seen.append(command)
        folder = next(word for word in command if word.startswith("--trainer.default_root_dir=")).partition("=")[2]
        Path(folder).mkdir(parents=True)
        (Path(folder) / "model.onnx").touch()

    monkeypatch.setattr(compress, "_run", run)
    monkeypatch.setattr(compress, "_report", lambda run: seen.append(run.command))
    return seen


def test_a_job_runs_its_stage_with_srun(cluster, commands, monkeypatch):
    for name, value in (("SLURM_NNODES", "3"), ("SLURM_NTASKS_PER_NODE", "2"), ("SLURM_JOB_ID", "7")):
        monkeypatch.setenv(name, value)
    compress.main(["recipe.yaml", "--out", "out", "--only", "teacher", "--srun"])
    (command,) = commands
    assert command[:3] == ["srun", "--kill-on-bad-exit=1", "--export=ALL"]
    assert command[-4:] == [
        *("--config", str(ROOT / "configs" / "slurm" / "slurm.yaml")),
        *("--trainer.num_nodes=3", "--trainer.devices=2"),
    ]
    compress.main(["recipe.yaml", "--out", "out", "--only", "pruned", "--srun"])
    compress.main(["recipe.yaml", "--out", "out", "--only", "report", "--srun"])
    # What the report tells its reader to type is what gives the same without the cluster.
    assert commands[2] == "python compress.py recipe.yaml --out out"


def test_a_recipe_may_go_on_without_the_cluster(cluster, commands, monkeypatch):
    for name, value in (("SLURM_NNODES", "1"), ("SLURM_NTASKS_PER_NODE", "1"), ("SLURM_JOB_ID", "7")):
        monkeypatch.setenv(name, value)
    compress.main(["recipe.yaml", "--out", "out", "--only", "teacher", "--srun"])
    (cluster / "out" / "teacher" / "checkpoints").mkdir()
    (cluster / "out" / "teacher" / "checkpoints" / "last.ckpt").touch()
    compress.main(["recipe.yaml", "--out", "out"])
    assert commands[1][0] == sys.executable


@pytest.mark.parametrize("preempted", [True, False])
def test_a_stage_that_pre_emption_ends_is_started_again(preempted, cluster, monkeypatch, capsys):
    for name, value in (("SLURM_NNODES", "1"), ("SLURM_NTASKS_PER_NODE", "1"), ("SLURM_JOB_ID", "7")):
        monkeypatch.setenv(name, value)

    def run(command):
        raise subprocess.CalledProcessError(143, command)

    monkeypatch.setattr(compress, "_run", run)
    monkeypatch.setattr(compress, "is_preempted", lambda: preempted)
    with pytest.raises(SystemExit, match="143"):
        compress.main(["recipe.yaml", "--out", "out", "--only", "teacher", "--srun"])
    assert (cluster / "scontrol").exists() is preempted
    assert ("failed with status 143" in capsys.readouterr().out) is not preempted


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("RUNNING             2026-11-25T20:46:32 ", True),
        ("RUNNING             N/A                 ", False),
        ("COMPLETING          2026-11-25T20:46:32 ", False),  # it is cancelled, or in the queue again already
        ("", False),
    ],
)
def test_a_time_of_grace(answer, expected, cluster, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    program(cluster / "bin" / "squeue", f'#!/bin/sh\necho "$@" >> {cluster / "squeue"}\necho "{answer}"\n')
    assert is_preempted() is expected
    assert is_running() is answer.startswith("RUNNING")
    assert "--jobs=7" in (cluster / "squeue").read_text()
    (cluster / "bin" / "squeue").unlink()
    assert not is_preempted()
    assert not is_running()


@pytest.fixture
def job(cluster, monkeypatch):
    """This process is what the batch script of job 7 became, which has started for the first time."""
    for name, value in (("SLURM_NNODES", "1"), ("SLURM_NTASKS_PER_NODE", "1"), ("SLURM_JOB_ID", "7")):
        monkeypatch.setenv(name, value)
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    squeue(cluster, "RUNNING N/A")
    return cluster


def squeue(folder, answer):
    program(folder / "bin" / "squeue", f'#!/bin/sh\necho "{answer}"\n')


def notify():
    os.kill(os.getpid(), signal.SIGUSR2)


def requeued(folder):
    return (folder / "scontrol").read_text().splitlines() if (folder / "scontrol").exists() else []


@pytest.mark.parametrize(
    ("restarts", "progress", "asked"), [("0", False, True), ("1", False, False), ("1", True, True)]
)
def test_the_time_is_over_outside_of_a_training(restarts, progress, asked, job, monkeypatch):
    """A part that is longer than the time limit is not begun for ever."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    before = signal.getsignal(signal.SIGUSR2)
    said = []
    notice = Notice(said.append)
    with notice.awaited():
        notice.progress = progress
        notify()
    assert signal.getsignal(signal.SIGUSR2) == before
    assert notice.given
    assert requeued(job) == (["requeue 7"] if asked else [])
    assert [("--time" in line) for line in said] == [not asked]


def test_who_is_pre_empted_starts_again_however_often(job, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "5")
    squeue(job, "RUNNING 2026-11-25T20:46:32")
    with Notice(print).awaited():
        notify()
    assert requeued(job) == ["requeue 7"]


def test_a_cluster_that_does_not_take_the_job_back(job):
    program(job / "bin" / "scontrol", "#!/bin/sh\nexit 1\n")
    said = []
    with Notice(said.append).awaited():
        notify()
    assert "the cluster did not take the job back; submit it again" in said[0]


@pytest.mark.parametrize("only", [[], ["--only", "report"]])
def test_the_time_is_over_in_the_report(only, job, commands, monkeypatch):
    for name in ("teacher", "pruned"):
        (job / "out").mkdir(exist_ok=True)
        (job / "out" / f"{name}.onnx").touch()
    monkeypatch.setattr(compress, "_report", lambda run: notify())
    compress.main(["recipe.yaml", "--out", "out", *only, "--srun"])
    assert requeued(job) == ["requeue 7"]


SAVES = f"""
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGUSR2}})
os.kill(os.getppid(), signal.SIGUSR2)
signal.sigwait({{signal.SIGUSR2}})
sys.exit({SAVED})
"""
DOES_NOT_LISTEN = "import os, signal, time; os.kill(os.getppid(), signal.SIGUSR2); time.sleep(60)"


FAILS = SAVES.replace(f"sys.exit({SAVED})", "sys.exit(2)")


def run_as_stage(monkeypatch, script):
    monkeypatch.setattr(compress, "as_step", lambda command: [sys.executable, "-c", script])
    with pytest.raises(SystemExit) as stop:
        compress.main(["recipe.yaml", "--out", "out", "--only", "teacher", "--srun"])
    return stop.value.code


def test_a_training_is_told_that_the_time_is_over(job, monkeypatch):
    assert run_as_stage(monkeypatch, SAVES) == SAVED
    assert requeued(job) == []  # it has seen to that


@pytest.mark.parametrize(("state", "asked"), [("RUNNING", True), ("COMPLETING", False)])
def test_a_training_that_does_not_listen_yet(state, asked, job, monkeypatch, capsys):
    squeue(job, f"{state} N/A")
    assert run_as_stage(monkeypatch, DOES_NOT_LISTEN) == 128 + signal.SIGUSR2
    assert requeued(job) == (["requeue 7"] if asked else [])  # else it is in the queue already
    assert "failed with status" not in capsys.readouterr().out


def test_a_training_that_fails_after_the_notice_has_failed(job, monkeypatch, capsys):
    assert run_as_stage(monkeypatch, FAILS) == 2
    assert requeued(job) == []
    assert "teacher: failed with status 2; jobs that wait" in capsys.readouterr().out


@pytest.mark.parametrize(("only", "asked"), [([], True), (["--only", "teacher"], False)])
def test_a_stage_that_ends_after_the_notice_is_the_last_one_of_the_job(only, asked, job, commands, monkeypatch):
    run = compress._run

    def run_and_notice(command):
        run(command)
        monkeypatch.setattr(compress._notice, "given", True)

    monkeypatch.setattr(compress, "_run", run_and_notice)
    compress.main(["recipe.yaml", "--out", "out", *only, "--srun"])
    assert requeued(job)[:1] == (["requeue 7"] if asked else [])


def test_a_stage_that_was_finished_is_progress(job, commands, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(compress, "_report", lambda run: notify())
    compress.main(["recipe.yaml", "--out", "out", "--srun"])
    assert requeued(job) == ["requeue 7"]


def test_without_a_cluster_the_signal_is_left_alone(cluster, commands, monkeypatch):
    seen = []
    monkeypatch.setattr(compress, "_report", lambda run: seen.append(signal.getsignal(signal.SIGUSR2)))
    compress.main(["recipe.yaml", "--out", "out"])
    assert seen == [signal.getsignal(signal.SIGUSR2)]


@pytest.fixture
def start_tasks(cluster):
    """Starts a program as srun would, with two tasks on this machine; gives the two processes, the first one first."""
    started = []

    def start(script, *arguments):
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "test", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "PYTHONPATH": str(ROOT)}
        tasks = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
        for rank in ("0", "1"):
            own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
            command = [sys.executable, "-c", script, *map(str, arguments)]
            environment = {**os.environ, **job, **place, **tasks, **own}
            with (cluster / f"task_{rank}").open("w") as log:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


FULL_DISK = """
import os, signal, sys
import lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.environments import SLURMEnvironment
from callbacks import Requeue
from lightning_modules import AtomicCheckpointIO
from retinaface.errors import InputError

class FullDisk(AtomicCheckpointIO):
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        raise InputError(f"{path}: cannot be written")

class Ask(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGUSR2)

L.Trainer(
    accelerator="cpu", strategy="ddp", devices=2, logger=False, default_root_dir=sys.argv[1],
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    plugins=[FullDisk(), SLURMEnvironment(auto_requeue=False)], callbacks=[Ask(), Requeue()],
).fit(BoringModel())
"""


@pytest.mark.slow
def test_a_full_disk_leaves_no_process_waiting(job, start_tasks):
    tasks = start_tasks(FULL_DISK, job)
    assert [task.wait(timeout=300) for task in tasks] == [SAVED, SAVED], (job / "task_0").read_text()
    assert requeued(job) == ["requeue 7"]
    assert "it goes on from the checkpoint before" in (job / "task_0").read_text()


SAYS_WHAT_IT_TAKES = """
import sys
import lightning as L
import train

L.Trainer._fit_impl = lambda trainer, *_, **__: print("takes", trainer.ckpt_path)
train.main(sys.argv[1:])
"""
HOLDS_A_FOLDER = """
import sys
from pathlib import Path
from lightning_modules.checkpoint_io import keep_for_this_process
keep_for_this_process(Path(sys.argv[1]))
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_training(cluster):
    """A process that trains into the folder ``checkpoints``."""
    command = [sys.executable, "-c", HOLDS_A_FOLDER, str(cluster / "checkpoints")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout.readline()
        yield other
        other.kill()


def save(path, steps):
    torch.save({"structure": {}, "global_step": steps, "pytorch-lightning_version": "2"}, path)


@pytest.mark.slow
def test_all_processes_go_on_from_one_checkpoint(cluster, other_training, start_tasks):
    """Of the training before the first one has to await the end, in which that may save once more."""
    folder = cluster / "checkpoints"
    save(folder / "last.ckpt", 10)
    configs = ("default.yaml", "data/synthetic_faces.yaml", "model/mobilenet025.yaml", "stage/teacher.yaml")
    folders = [f"--data.init_args.root={cluster}", f"--trainer.default_root_dir={cluster}"]
    options = ["--trainer.accelerator=cpu", "--trainer.devices=2", f"--checkpoint.dirpath={folder}"]
    tasks = start_tasks(
        SAYS_WHAT_IT_TAKES,
        *("fit", *(f"--config={ROOT / 'configs' / name}" for name in configs), *folders, *options, "--ckpt_path=last"),
    )
    logs = [cluster / "task_0", cluster / "task_1"]
    assert wait_until(lambda: "waiting for its end" in logs[0].read_text(), 300), logs[0].read_text()
    wait_until(lambda: "takes" in logs[1].read_text(), 10)  # as it must not
    save(folder / "requeued.ckpt", 20)
    other_training.kill()
    assert [task.wait(timeout=300) for task in tasks] == [0, 0], logs[0].read_text()
    assert all(f"takes {folder / 'requeued.ckpt'}\n" in log.read_text() for log in logs)


def test_srun_outside_of_a_job(monkeypatch):
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    monkeypatch.setenv("SLURM_NNODES", "1")
    with pytest.raises(InputError, match=r"SLURM_NTASKS_PER_NODE is not set; --srun belongs into a job"):
        as_step(["python"])


def test_the_job_is_asked_for_again(cluster, monkeypatch):
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert job_id() == "7"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert requeue_job()
    assert (cluster / "scontrol").read_text() == "requeue 5_2\n"
    program(cluster / "bin" / "scontrol", "#!/bin/sh\nkill -TERM $$\n")
    assert requeue_job()
    program(cluster / "bin" / "scontrol", "#!/bin/sh\nexit 1\n")
    assert not requeue_job()
    (cluster / "bin" / "scontrol").unlink()
    assert not requeue_job()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_batch_scripts_save_in_time_and_start_again(path):
    lines = path.read_text().splitlines()
    # compress.py must hear of it where no step runs, and hands it on to the one that does.
    notice = "#SBATCH --signal=USR2@300" if path.name == "train.sbatch" else "#SBATCH --signal=B:USR2@300"
    assert {notice, "#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(lines)
    # as_step and train.sbatch need the variable that this one sets.
    assert "#SBATCH --ntasks-per-node=1" in lines


@pytest.fixture
def run_script(tmp_path):
    """Runs a command in a folder where python and srun are programs that say what they were called with."""
    for name in ("python", "srun"):
        program(tmp_path / "bin" / name, '#!/bin/sh\nprintf "%s\\n" "$@" "WANDB_DIR=$WANDB_DIR" "id=$WANDB_RUN_ID"\n')

    def run(*command, **variables):
        path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VENV": str(tmp_path)}
        result = subprocess.run(
            command, cwd=tmp_path, env={**path, **variables}, capture_output=True, text=True, check=True
        )
        return result.stdout.splitlines()

    return run


JOB = {"SLURM_JOB_NAME": "name", "SLURM_JOB_ID": "8", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "2"}


@pytest.mark.parametrize(("given", "folder"), [({}, "runs/name-8"), ({"RUN": "mine/run/"}, "mine/run")])
def test_a_single_training(given, folder, run_script, tmp_path):
    script = ROOT / "configs" / "slurm" / "train.sbatch"
    words = run_script("bash", str(script), "--config", "a b.yaml", **JOB, **given)
    assert words[:3] == ["--kill-on-bad-exit=1", "--export=ALL", str(tmp_path / "bin" / "python")]
    assert "a b.yaml" in words
    assert {f"--trainer.default_root_dir={folder}", f"--checkpoint.dirpath={folder}/checkpoints"} <= set(words)
    assert words[-2] == f"WANDB_DIR={folder}"
    assert re.fullmatch(r"id=[0-9a-f]{14}", words[-1])
    assert (tmp_path / folder).is_dir()  # W&B would take another one
    assert run_script("bash", str(script), **JOB, **given)[-2:] == words[-2:]  # requeued, it is the same run
    assert run_script("bash", str(script), **JOB, RUN=f"other/{folder}")[-1] != words[-1]  # of the same name


@pytest.mark.parametrize(("given", "folder"), [({}, "runs/name-5"), ({"RUN": "mine/"}, "mine")])
def test_every_task_of_the_array_has_a_folder(given, folder, run_script):
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1"}
    script = str(ROOT / "configs" / "slurm" / "ratios.sbatch")
    words = run_script("bash", script, "recipe.yaml", **JOB, **array, **given)
    ratio = "--pruned.trainer.callbacks.init_args.ratio=0.3"
    assert words[:6] == ["compress.py", "recipe.yaml", "--out", f"{folder}/ratio-0.3", ratio, "--srun"]


def test_every_run_of_the_sweep_has_a_folder(run_script):
    sweep = yaml.safe_load((ROOT / "configs" / "slurm" / "sweep.yaml").read_text())
    ((name, values),) = sweep["parameters"].items()
    macros = {"${program}": sweep["program"], "${args}": f"--{name}={values['values'][0]}"}
    command = [macros.get(word, word) for word in sweep["command"]]
    assert sweep["command"][1] == "-c"
    words = run_script(*command, WANDB_RUN_ID="abc")
    assert words[:2] == ["train.py", "fit"]
    assert all((ROOT / word.partition("=")[2]).is_file() for word in words if word.startswith("--config="))
    ratio = "--trainer.callbacks.init_args.ratio=0.2"
    assert words[-5:-2] == [
        ratio,
        *("--trainer.default_root_dir=runs/sweep/abc", "--checkpoint.dirpath=runs/sweep/abc/checkpoints"),
    ]


SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmUser={user}
SlurmdUser={user}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdSpoolDir={folder}/slurmd
StateSaveLocation={folder}/slurmctld
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=grace Nodes=ALL MaxTime=INFINITE State=UP GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""
SLOW = """
import os, time
from pathlib import Path
import lightning as L
from callbacks import Requeue

class WaitForTheEnd(L.Callback):
    # Until the time limit is near, in the third step of four, when the job runs for the first time.
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        (requeue,) = [each for each in trainer.callbacks if isinstance(each, Requeue)]
        while trainer.global_step == 2 and "SLURM_RESTART_COUNT" not in os.environ and not requeue._asked:
            Path(trainer.default_root_dir, "waiting").touch()
            time.sleep(0.1)
"""
PHOTOS = {"train_photos": 16, "val_photos": 3, "photo_size": 96, "train_size": 64, "batch_size": 2, "num_workers": 1}


def free_ports(number):
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(1)
    return condition()


def ask(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


@pytest.fixture(scope="module")
def real_cluster():
    """A cluster of one node, this machine, which runs as this user."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "srun") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"SLURM is not installed ({', '.join(missing)} not found)")
    host = socket.gethostname().partition(".")[0]
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, pytest.MonkeyPatch.context() as patch:
        user, cpus = getpass.getuser(), max(2, len(os.sched_getaffinity(0)))
        conf = Path(folder) / "slurm.conf"
        conf.write_text(SLURM_CONF.format(host=host, ports=free_ports(2), user=user, cpus=cpus, folder=folder))
        patch.setenv("SLURM_CONF", str(conf))
        daemons = [subprocess.Popen([name, "-D"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                   for name in ("slurmctld", "slurmd")]  # fmt: skip
        try:
            if not wait_until(lambda: "idle" in ask("sinfo", "-h", "-o", "%t"), 60):
                pytest.skip(f"SLURM does not start here: {(Path(folder) / 'slurmctld.log').read_text()[-500:]}")
            yield
        finally:
            subprocess.run(["scancel", "--user", user], check=False)
            wait_until(lambda: not ask("squeue", "-h"), 60)
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(timeout=60)


def write_real_recipe(folder):
    common = {"trainer.accelerator": "cpu", **{f"data.init_args.{name}": value for name, value in PHOTOS.items()}}
    teacher = {"trainer.max_epochs": 2, "model.init_args.network.channels": 16}
    pruned = {f"model.init_args.{role}": "${teacher}" for role in ("student", "teacher")}
    int8 = {"model.init_args.student": "${pruned}", "model.init_args.teacher": "${teacher}"}
    synthetic = "data/synthetic_faces.yaml"
    stages = [
        {
            "name": "teacher",
            "config": [synthetic, "model/mobilenet025.yaml", "stage/teacher.yaml"],
            "options": {**common, **teacher},
        },
        {
            "name": "pruned",
            "config": [synthetic, "stage/prune.yaml"],
            "options": {**common, **pruned, "trainer.max_epochs": 1},
        },
        {
            "name": "ptq",
            "config": [synthetic, "stage/ptq.yaml"],
            "options": {**common, "model.init_args.student": "${pruned}"},
        },
        {
            "name": "int8",
            "config": [synthetic, "stage/qat.yaml"],
            "options": {**common, **int8, "trainer.max_epochs": 1},
        },
    ]
    content = {"description": "for tests", "root": str(folder / "photos"), "size": 64, "stages": stages}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))


def run_compress(folder, *arguments):
    command = [sys.executable, str(ROOT / "compress.py"), "recipe.yaml", *arguments]
    path = {"PYTHONPATH": f"{folder}:{ROOT}"}
    result = subprocess.run(
        command, cwd=folder, env={**os.environ, **path}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return re.findall(r"^(?:\w+): job (\d+)", result.stdout, flags=re.MULTILINE)


TWO_TASKS = ["--submit", "slurm", "--time=60", "--sbatch=--ntasks-per-node=2 --cpus-per-task=1 --signal=B:USR2@60"]


def end_soon(job):
    """Sets the job's time limit to the end of the minute after next, as SLURM counts in minutes."""
    minutes, _, _ = ask("squeue", "-h", f"--jobs={job}", "-o", "%M").rpartition(":")
    subprocess.run(["scontrol", "update", f"jobid={job}", f"TimeLimit={int(minutes) + 2}"], check=True)


STAGES = ("teacher", "pruned", "ptq", "int8", "report")


@pytest.fixture
def submit_cut(real_cluster, tmp_path):
    """Submits a recipe as a chain of jobs, whose first one waits in its third step for an end."""

    def submit(*options):
        write_real_recipe(tmp_path)
        (tmp_path / "slow.py").write_text(SLOW)
        jobs = run_compress(
            tmp_path, "--out", "cut", "--teacher.trainer.callbacks+=slow.WaitForTheEnd", *TWO_TASKS, *options
        )
        assert wait_until((tmp_path / "cut" / "teacher" / "waiting").exists, 400), ask("squeue")
        return jobs

    return submit


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of the same recipe, run without a cluster and to the end."""
    folder = tmp_path_factory.mktemp("whole")
    write_real_recipe(folder)
    run_compress(folder, "--out", "whole", "--trainer.devices=2")
    return folder / "whole"


def restarts(job):
    return "Restarts=1" in ask("scontrol", "show", "job", job)


def start_again(job):
    assert wait_until(lambda: "JobState=PENDING" in ask("scontrol", "show", "job", job), 60)
    now = ["StartTime=now", "TimeLimit=60"]  # instead of in two minutes, and for as long as was left
    subprocess.run(["scontrol", "update", f"jobid={job}", *now], check=True)


def finish(jobs, folder):
    """Starts the first job again, waits for the end of all, and gives their logs."""
    start_again(jobs[0])
    assert wait_until(lambda: not ask("squeue", "-h", f"--jobs={','.join(jobs)}"), 1200), ask("squeue")
    logs = folder / "cut" / "slurm"
    output = {name: (logs / f"{name}-{job}.log").read_text() for name, job in zip(STAGES, jobs, strict=True)}
    assert "did not take the job back" not in output["teacher"]
    assert "Traceback" not in output["teacher"]
    assert "report.md" in output["report"]
    assert (folder / "cut" / "report.json").is_file()
    return output


def require_equal(cut_run, whole_run):
    for name, steps in (("teacher", 8), ("pruned", 4), ("ptq", 0), ("int8", 4)):
        require_equal_stage(cut_run / name, whole_run / name, steps)


def require_equal_stage(cut_stage, whole_stage, steps):
    first, second = (
        torch.load(stage / "checkpoints" / "last.ckpt", weights_only=True) for stage in (cut_stage, whole_stage)
    )
    assert first["global_step"] == second["global_step"] == steps
    assert first["state_dict"].keys() == second["state_dict"].keys()
    assert all(torch.equal(first["state_dict"][key], value) for key, value in second["state_dict"].items()), cut_stage


@pytest.mark.slow
def test_a_job_whose_time_is_over_goes_on_and_the_chain_ends(submit_cut, whole, tmp_path):
    jobs = submit_cut()
    end_soon(jobs[0])
    assert wait_until(lambda: restarts(jobs[0]), 200), ask("squeue")
    saved = tmp_path / "cut" / "teacher" / "checkpoints" / "requeued.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 3  # with the step that it was in
    output = finish(jobs, tmp_path)
    assert "requeue: the time is over in epoch 0, step 3" in output["teacher"]
    assert "[1/4] teacher: resuming" in output["teacher"]
    assert not saved.exists()
    require_equal(tmp_path / "cut", whole)


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["grace", "test"])
def test_a_job_that_is_pre_empted_goes_on_and_the_chain_ends(partition, submit_cut, whole, tmp_path):
    """By a job that needs the whole machine: after a time of grace, of which it takes what it needs, or at once."""
    jobs = submit_cut(f"--partition={partition}")
    urgent = ["--partition=urgent", "--exclusive", "--parsable", f"--output={tmp_path / 'urgent.log'}"]
    other = ask("sbatch", *urgent, "--wrap=sleep 1")
    assert wait_until(lambda: restarts(jobs[0]), 100), ask("squeue")
    assert wait_until(lambda: not ask("squeue", "-h", f"--jobs={other}"), 60), ask("squeue")
    output = finish(jobs, tmp_path)
    if partition == "grace":  # else it depends on who is faster
        assert "requeue: the time is over in epoch 0, step 3" in output["teacher"]
        assert "[1/4] teacher: resuming" in output["teacher"]
    require_equal(tmp_path / "cut", whole)


@pytest.mark.slow
def test_a_single_training_whose_time_is_over_goes_on(real_cluster, whole, tmp_path):
    """By the batch script for one training, from the project's folder."""
    write_real_recipe(tmp_path)
    teacher = yaml.safe_load((tmp_path / "recipe.yaml").read_text())["stages"][0]
    configs = [f"--config=configs/{config}" for config in teacher["config"]]
    options = {"data.init_args.root": tmp_path / "photos", **teacher["options"]}
    (tmp_path / "slow.py").write_text(SLOW)
    run, log = tmp_path / "run", tmp_path / "job.log"
    resources = ["--time=60", "--ntasks-per-node=2", "--cpus-per-task=1", "--signal=USR2@60", f"--output={log}"]
    submitted = subprocess.run(
        ["sbatch", "--parsable", *resources, "configs/slurm/train.sbatch", *configs]
        + [f"--{name}={value}" for name, value in options.items()]
        + ["--trainer.callbacks+=slow.WaitForTheEnd"],
        cwd=ROOT,
        env={**os.environ, "RUN": str(run), "VENV": sys.prefix, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    job = submitted.stdout.strip()
    assert wait_until((run / "waiting").exists, 200), ask("squeue")
    end_soon(job)
    assert wait_until(lambda: restarts(job), 200), ask("squeue")
    start_again(job)
    assert wait_until(lambda: not ask("squeue", "-h", f"--jobs={job}"), 400), ask("squeue")
    assert "requeue: the time is over in epoch 0, step 3" in log.read_text()
    require_equal_stage(run, whole / "teacher", 8)


@pytest.mark.slow
def test_a_stage_that_fails_stops_the_chain(real_cluster, tmp_path):
    write_real_recipe(tmp_path)
    wrong = "--teacher.model.init_args.optimizer.learning_rate=-1"
    jobs = run_compress(tmp_path, "--out", "out", wrong, "--submit", "slurm", "--sbatch=--cpus-per-task=1")
    assert wait_until(lambda: not ask("squeue", "-h", f"--jobs={','.join(jobs)}"), 200), ask("squeue")
    log = (tmp_path / "out" / "slurm" / f"teacher-{jobs[0]}.log").read_text()
    assert "error: optimizer: learning_rate is -1" in log
    assert "[1/4] teacher: failed with status 2" in log
    assert {file.name for file in (tmp_path / "out" / "slurm").iterdir()} == {f"teacher-{jobs[0]}.log"}
