import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import lightning as L
import pytest
import yaml
from lightning.pytorch.cli import SaveConfigCallback

import compress
import train
from retinaface.errors import InputError

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "configs" / "recipes"
SMALL = [
    "--data.init_args.train_size=64",
    "--data.init_args.batch_size=4",
    "--data.init_args.num_workers=0",
]
NARROW = "--teacher.model.init_args.network.channels=16"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compress.py"])


def write_recipe(folder, **changes):
    """A recipe of two stages whose training is faked."""
    content = {
        "description": "for tests",
        "root": str(folder / "photos"),
        "stages": [
            {"name": "teacher", "config": ["data/synthetic_faces.yaml", "stage/teacher.yaml"]},
            {
                "name": "pruned",
                "config": ["data/synthetic_faces.yaml", "stage/prune.yaml"],
                "options": {"model.init_args.student": "${previous}", "model.init_args.teacher": "${teacher}"},
            },
        ],
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


class FakeTraining:
    """Stands in for ``train.py``: notes the stages and leaves what it would leave, unless it is to be cut off."""

    def __init__(self):
        self.calls = []
        self.options = {}
        self.refused_in = None
        self.cut_off_in = None
        self.exports = True

    def __call__(self, command):
        option = next(word for word in command if word.startswith("--trainer.default_root_dir="))
        folder = Path(option.partition("=")[2])
        resumed = [word for word in command if word.startswith("--ckpt_path=")]
        self.calls.append((folder.name, bool(resumed)))
        self.options[folder.name] = [word for word in command if word.startswith("--trainer.max_epochs=")]
        if folder.name == self.refused_in:
            raise subprocess.CalledProcessError(2, command)
        checkpoint = folder / "checkpoints" / "last.ckpt"
        assert not resumed or (resumed == ["--ckpt_path=last"] and checkpoint.is_file())
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text("state")
        if folder.name == self.cut_off_in:
            raise subprocess.CalledProcessError(-9, command)
        if self.exports:
            (folder / "model.onnx").write_text("model")


@pytest.fixture
def training(monkeypatch):
    fake = FakeTraining()
    monkeypatch.setattr(compress, "_run", fake)
    monkeypatch.setattr(compress, "_report", lambda run: fake.calls.append(("report", False)))
    return fake


def test_stages_run_in_order_and_once(training, tmp_path):
    arguments = [str(write_recipe(tmp_path)), "--out", str(tmp_path / "out")]
    compress.main(arguments)
    assert training.calls == [("teacher", False), ("pruned", False), ("report", False)]
    assert {path.name for path in (tmp_path / "out").glob("*.onnx")} == {"teacher.onnx", "pruned.onnx"}
    training.calls.clear()
    compress.main(arguments)
    assert training.calls == [("report", False)]


def test_interrupted_stage_goes_on(training, tmp_path):
    arguments = [str(write_recipe(tmp_path)), "--out", str(tmp_path / "out")]
    training.cut_off_in = "pruned"
    with pytest.raises(SystemExit) as stop:
        compress.main(arguments)
    assert stop.value.code == 128 + 9
    training.calls.clear()
    training.cut_off_in = None
    compress.main(arguments)
    assert training.calls == [("pruned", True), ("report", False)]


def test_stage_that_exports_nothing_is_one_line(training, tmp_path, capsys):
    training.exports = False
    error = one_line_error([write_recipe(tmp_path), "--out", tmp_path / "out"], capsys)
    assert "ExportOnnx" in error


def test_another_run_in_the_same_folder_is_refused(training, tmp_path, capsys):
    recipe, out = write_recipe(tmp_path), ["--out", str(tmp_path / "out")]
    compress.main([str(recipe), *out])
    done = list(training.calls)
    other = tmp_path / "other.yaml"
    shutil.copy(recipe, other)
    for arguments in ([str(recipe), "--trainer.max_epochs=3"], [str(other)], [str(recipe), "--data.root", "elsewhere"]):
        assert "stage teacher ran with another recipe, data or options" in one_line_error([*arguments, *out], capsys)
    assert training.calls == done


@pytest.mark.parametrize("stage", ["teacher", "pruned"])
def test_a_stage_that_never_began_may_be_corrected(stage, training, tmp_path, capsys):
    arguments = [str(write_recipe(tmp_path)), "--out", str(tmp_path / "out")]
    training.refused_in = stage
    with pytest.raises(SystemExit) as stop:
        compress.main([*arguments, f"--{stage}.trainer.max_epoch=3"])
    assert stop.value.code == 2
    training.refused_in = None
    training.calls.clear()
    corrected = f"--{stage}.trainer.max_epochs=3"
    compress.main([*arguments, corrected])
    todo = ["teacher", "pruned", "report"]
    assert training.calls == [(name, False) for name in todo[todo.index(stage) :]]
    assert training.options[stage] == ["--trainer.max_epochs=3"]
    # Now that it has begun, it must stay so.
    training.calls.clear()
    assert f"stage {stage} ran with" in one_line_error(arguments, capsys)
    compress.main([*arguments, corrected])
    assert training.calls == [("report", False)]


def test_correction_of_a_later_stage_leaves_the_earlier_ones_alone(training, tmp_path, capsys):
    arguments = [str(write_recipe(tmp_path)), "--out", str(tmp_path / "out")]
    training.refused_in = "pruned"
    with pytest.raises(SystemExit):
        compress.main(arguments)
    note = (tmp_path / "out" / "run.json").read_text()
    training.calls.clear()
    assert "stage teacher ran with" in one_line_error([*arguments, "--trainer.max_epochs=3"], capsys)
    assert training.calls == []
    assert (tmp_path / "out" / "run.json").read_text() == note


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"recipe": "recipe", "stages": 3}', "\x00\xff"])
def test_damaged_note_of_a_run_is_one_line(content, training, tmp_path, capsys):
    arguments = [str(write_recipe(tmp_path)), "--out", str(tmp_path / "out")]
    compress.main(arguments)
    training.calls.clear()
    note = tmp_path / "out" / "run.json"
    note.write_bytes(content.encode("latin-1"))
    error = one_line_error(arguments, capsys)
    assert f"{note}: damaged" in error
    assert training.calls == []
    assert note.read_bytes() == content.encode("latin-1")


def test_wandb_knows_the_stages_of_a_run_again(training, tmp_path, monkeypatch):
    told = []

    def run(command):
        told.append({name: os.environ[f"WANDB_{name}"] for name in ("RUN_GROUP", "JOB_TYPE", "RUN_ID", "DIR")})
        training(command)

    monkeypatch.setattr(compress, "_run", run)
    arguments = [str(write_recipe(tmp_path)), "--out", str(tmp_path / "my run")]
    training.cut_off_in = "pruned"
    with pytest.raises(SystemExit):
        compress.main(arguments)
    training.cut_off_in = None
    compress.main(arguments)
    teacher, cut_off, resumed = told
    assert cut_off == resumed
    group = teacher["RUN_GROUP"]
    assert re.fullmatch(r"my-run-[0-9a-f]{6}", group)
    wanted = {"RUN_GROUP": group, "DIR": str(tmp_path / "my run")}
    assert teacher == {**wanted, "JOB_TYPE": "teacher", "RUN_ID": f"{group}-teacher"}
    assert resumed == {**wanted, "JOB_TYPE": "pruned", "RUN_ID": f"{group}-pruned"}


def test_that_nobody_is_logged_in_is_said_once(training, tmp_path, monkeypatch):
    for name in ("MODE", "DATA_DIR", "CACHE_DIR"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setattr("wandb.login", lambda **_: False)
    said, told = [], []
    monkeypatch.setattr("wandb.termwarn", lambda text, repeat: said.append(text))
    names = ("WANDB_MODE", "WANDB_DATA_DIR", "WANDB_CACHE_DIR")
    monkeypatch.setattr(
        compress, "_run", lambda command: (told.append([os.environ[name] for name in names]), training(command))
    )
    compress.main([str(write_recipe(tmp_path)), "--out", "out", "--config", str(ROOT / "configs" / "wandb.yaml")])
    place = tmp_path / "out" / "wandb"
    assert told == [["offline", str(place / "data"), str(place / "cache")]] * 2
    (line,) = said
    assert f"{tmp_path / 'out' / 'wandb'}/offline-run-*" in line


@pytest.mark.parametrize(
    ("options", "place"),
    [([], None), (["--config=wandb.yaml", "--trainer.logger.project=faces"], ("faces", None)),
     (["--trainer.logger=callbacks.WandbLogger", "--trainer.logger.project", "faces", "--trainer.logger.entity=team"],
      ("faces", "team"))],
)  # fmt: skip
def test_the_report_goes_where_the_last_stage_goes(options, place, training, tmp_path, monkeypatch):
    """Read from what ``train.py`` made of the options."""
    shutil.copy(ROOT / "configs" / "wandb.yaml", tmp_path)
    stage = {"name": "teacher", "config": ["data/synthetic_faces.yaml", "stage/teacher.yaml"]}
    run = compress.parse_arguments([str(write_recipe(tmp_path, stages=[stage])), "--out", "out", *options])
    assert compress._wandb_place(run) is None  # nothing is there yet
    monkeypatch.setenv("WANDB_DIR", str(run.out))

    def save_settings(trainer, model, *_, **__):
        (callback,) = (each for each in trainer.callbacks if isinstance(each, SaveConfigCallback))
        callback.setup(trainer, model, "fit")

    monkeypatch.setattr(L.Trainer, "_fit_impl", save_settings)
    train.main(run.arguments(run.recipe.stages[0]))
    assert compress._wandb_place(run) == place


def test_the_report_goes_where_the_last_attempt_went_whatever_the_clock_says(tmp_path):
    run = compress.parse_arguments([str(write_recipe(tmp_path)), "--out", "out"])
    folder = run.out / "pruned"
    for age, version in enumerate((10, 9, 2)):
        logger = {"class_path": "callbacks.WandbLogger", "init_args": {"project": f"faces-{version}"}}
        file = folder / "lightning_logs" / f"version_{version}" / "config.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(yaml.safe_dump({"trainer": {"default_root_dir": str(folder), "logger": [logger]}}))
        os.utime(file, (age, age))
    assert compress._wandb_place(run) == ("faces-10", None)


@pytest.mark.parametrize("content", [None, "trainer: ["])
def test_a_configuration_that_cannot_be_read_is_one_line(content, training, tmp_path, capsys):
    if content is not None:
        (tmp_path / "own.yaml").write_text(content)
    error = one_line_error([write_recipe(tmp_path), "--out", "out", "--config", "own.yaml"], capsys)
    assert "own.yaml: not a YAML file that can be read" in error


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (InputError("W&B: no such project"), "W&B: no such project"),
        (OSError("Disk quota exceeded"), "Disk quota exceeded"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_a_report_that_wandb_refuses_is_there_all_the_same(error, why, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise error

    run = compress.parse_arguments([str(write_recipe(tmp_path)), "--out", "out"])
    monkeypatch.setattr(compress, "_wandb_place", lambda run: ("faces", None))
    monkeypatch.setattr("retinaface.evaluation.dashboard.send_report", refuse)
    compress._send_to_wandb(run, {}, {})
    assert f"the report was not sent: {why}; the same command tries again" in capsys.readouterr().out


def test_the_logs_of_jobs_can_be_followed_before_there_are_any(training, tmp_path, monkeypatch, capsys):
    out, jobs = tmp_path / "a run, 50%", iter(("7", "8", "9"))
    monkeypatch.setattr(compress, "submit_job", lambda *_: next(jobs))
    compress.main([str(write_recipe(tmp_path)), "--out", str(out), "--submit", "slurm"])
    (line,) = re.findall("^their logs: *(.*)$", capsys.readouterr().out, flags=re.MULTILINE)
    shown = tmp_path / "shown"
    with shown.open("w") as file:
        follow = subprocess.Popen(["bash", "-c", f"exec {line}"], stdout=file, stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.2)
        (out / "slurm" / "report-9.log").write_text("evaluating\n")
        assert wait_until(lambda: "evaluating" in shown.read_text(), 20)
    finally:
        follow.kill()
        follow.wait()


def test_arguments_fill_in_checkpoints_and_overrides(tmp_path):
    recipe = write_recipe(tmp_path)
    run = compress.parse_arguments(
        [str(recipe), "--out", "out", "--trainer.max_epochs", "3", "--pruned.trainer.max_epochs=5", "--teacher.x", "1"]
    )
    teacher, pruned = (run.arguments(stage) for stage in run.recipe.stages)
    last = tmp_path / "out" / "teacher" / "checkpoints" / "last.ckpt"
    assert f"--model.init_args.student={last}" in pruned
    assert f"--model.init_args.teacher={last}" in pruned
    assert f"--checkpoint.dirpath={last.parent}" in teacher
    assert f"--data.init_args.root={tmp_path / 'photos'}" in teacher
    assert teacher[-4:] == ["--trainer.max_epochs", "3", "--x", "1"]
    assert pruned[-3:] == ["--trainer.max_epochs", "3", "--trainer.max_epochs=5"]


@pytest.fixture(scope="module")
def resnet50_checkpoint(build_network, save_checkpoint, tmp_path_factory):
    network = build_network(backbone="resnet50", channels=16)
    return save_checkpoint(network, tmp_path_factory.mktemp("resnet50") / "resnet50.ckpt")


def recipe_stages():
    for path in sorted(RECIPES.glob("*.yaml")):
        backbones = ["resnet50" if "resnet50" in path.stem else "mobilenet0.25"]
        if path.stem == "own_photos":  # for either
            backbones.append("resnet50")
        for backbone in backbones:
            for stage in compress.load_recipe(path).stages:
                # In INT8 these take long, and other recipes have the same stages.
                again = backbones[1:] == [backbone]
                repeats = path.stem in ("own_photos_gradual", "widerface_mobilenet025") or again
                long = ("ptq", "int8") if repeats or backbone == "resnet50" else ()
                if again:
                    long += ("pruned",)
                slow = [pytest.mark.slow] if stage.name in long else []
                yield pytest.param(path, backbone, stage.name, id=f"{path.stem}-{backbone}-{stage.name}", marks=slow)


@pytest.mark.parametrize(("path", "backbone", "name"), list(recipe_stages()))
def test_every_stage_of_every_recipe_trains_a_step(path, backbone, name, tiny_root, tiny_checkpoint, tmp_path, request):
    """Both the recipe's own options and the configurations that it names; the photos are tiny."""
    resnet = backbone == "resnet50"
    trained = request.getfixturevalue("resnet50_checkpoint") if resnet else tiny_checkpoint
    weights = ["--weights", str(trained)]
    if path.stem == "widerface_resnet50":
        weights = ["--teacher.model.init_args.backbone_weights=null", NARROW]
    if path.stem.startswith("quickstart"):
        weights = [NARROW]
        photos = ["--data.init_args.train_photos=4", "--data.init_args.val_photos=2", "--data.init_args.photo_size=96"]
        root = tmp_path / "rendered"
    else:
        photos, root = [], tiny_root
    if path.stem in ("distill_only", "quantize_only"):  # photos alone, without the layout and the labels
        root = tiny_root / "WIDER_train" / "images"
    run = compress.parse_arguments(
        [str(path), "--data.root", str(root), "--out", "out", *weights, *SMALL, *photos, "--trainer.fast_dev_run=1"]
    )
    for stage in run.recipe.stages:  # what the earlier stages would have left
        checkpoint = run.checkpoint(stage.name)
        checkpoint.parent.mkdir(parents=True)
        shutil.copy(trained, checkpoint)
    stage = next(stage for stage in run.recipe.stages if stage.name == name)
    cli = train.main(run.arguments(stage))
    assert cli.trainer.global_step == (0 if name == "ptq" else 1)
    assert cli.trainer.default_root_dir == str(tmp_path / "out" / name)


def one_line_error(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        compress.main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_unknown_recipe_file(capsys):
    error = one_line_error(["nowhere.yaml"], capsys)
    assert "nowhere.yaml" in error
    assert "configs/recipes/quickstart.yaml" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "colour"),
        ({"stages": [{"name": "teacher", "config": [], "epochs": 3}]}, "epochs"),
        ({"stages": []}, r"stages are named \[\]"),
        ({"stages": [{"name": "a", "config": []}] * 2}, "each with a name of its own"),
        ({"stages": [{"name": "a", "config": ["stage/none.yaml"]}]}, "configs/stage/none.yaml, which does not exist"),
        (
            {"stages": [{"name": "a", "config": [], "options": {"x": "${before}"}}]},
            r"'before'; expected .*\$\{weights\}",
        ),
        ({"size": "large"}, "size"),
        *(
            ({"stages": [{"name": name, "config": []}]}, f"stages are named .*{re.escape(name)}.*; expected")
            for name in (
                *("", "1st", "a-b", "a.b", "a b", "../a", "trainer", "model", "data", "checkpoint"),
                *("seed_everything", "ckpt_path", "optimizer", "lr_scheduler"),
            )
        ),
    ],
)
def test_wrong_recipe_is_one_line(changes, message, tmp_path, capsys):
    path = write_recipe(tmp_path, **changes)
    error = one_line_error([path], capsys)
    assert re.search(message, error), error
    assert not (tmp_path / "runs").exists()


def test_text_that_is_no_recipe(tmp_path, capsys):
    for text in ("just words", "stages: [", "- a list"):
        (tmp_path / "text.yaml").write_text(text)
        assert "text.yaml" in one_line_error([tmp_path / "text.yaml"], capsys)


def test_wrong_input_is_found_before_anything_runs(tiny_root, tmp_path, capsys, training):
    own_photos = RECIPES / "own_photos.yaml"
    assert "--weights FILE" in one_line_error([own_photos, "--data.root", tiny_root], capsys)
    nowhere = ["--data.root", "/nowhere", "--weights", tmp_path / "weights.pth"]
    assert "/nowhere: no such folder" in one_line_error([own_photos, *nowhere], capsys)
    given = ["--data.root", tiny_root, "--weights"]
    assert "absent.pth: no such file" in one_line_error([own_photos, *given, tmp_path / "absent.pth"], capsys)
    (tmp_path / "text.pth").write_text("not weights")
    assert "text.pth: not a checkpoint" in one_line_error([own_photos, *given, tmp_path / "text.pth"], capsys)
    empty = Path(shutil.copytree(tiny_root, tmp_path / "empty"))
    for file in (empty / "wider_face_split").iterdir():
        file.write_text("")
    assert "empty" in one_line_error([own_photos, "--data.root", empty, "--weights", tmp_path / "x.pth"], capsys)
    assert training.calls == []
    assert not (tmp_path / "runs").exists()


def test_weights_for_a_recipe_without_any_are_refused(tiny_checkpoint, tmp_path, capsys, training):
    for recipe in (RECIPES / "quickstart.yaml", write_recipe(tmp_path)):
        error = one_line_error([recipe, "--weights", tiny_checkpoint], capsys)
        assert f"recipe {recipe.stem}: uses no weights" in error
    assert training.calls == []


def test_folder_that_cannot_be_written_to(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    error = one_line_error([write_recipe(tmp_path), "--out", tmp_path / "file" / "out"], capsys)
    assert "choose another --out" in error


def run_compress(*arguments):
    command = [sys.executable, str(ROOT / "compress.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_line_prints_one_line(tmp_path):
    result = run_compress(tmp_path / "nowhere.yaml")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


SLEEPER = """
import os, subprocess, sys, time
from pathlib import Path

helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])  # as a loader process would be
folder = next(word for word in sys.argv if word.startswith("--trainer.default_root_dir="))
pids = Path(folder.partition("=")[2]) / "pids"
pids.parent.mkdir(parents=True)
pids.with_suffix(".part").write_text(f"{os.getpid()} {helper.pid}")
pids.with_suffix(".part").replace(pids)
time.sleep(120)
"""


def is_running(pid):
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_no_process_of_a_failed_stage_goes_on(tmp_path):
    """With several processes, the others would wait for the one that failed."""
    script = """
import subprocess, sys
from pathlib import Path

child = subprocess.Popen(["sleep", "60"])
Path(sys.argv[1]).write_text(str(child.pid))
sys.exit(3)
"""
    with pytest.raises(subprocess.CalledProcessError) as error:
        compress._run([sys.executable, "-c", script, str(tmp_path / "pid")])
    assert error.value.returncode == 3
    assert wait_until(lambda: not is_running(int((tmp_path / "pid").read_text())), 10)


@pytest.fixture
def sleeping_stage(tmp_path):
    """compress.py in a process, and the processes of the stage that it runs: the stage itself and a helper."""
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(ROOT / "compress.py", project)
    for name in ("configs", "retinaface"):
        (project / name).symlink_to(ROOT / name)
    (project / "train.py").write_text(SLEEPER)
    command = [
        sys.executable,
        str(project / "compress.py"),
        str(write_recipe(tmp_path)),
        "--out",
        str(tmp_path / "out"),
    ]
    started = []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        pids = tmp_path / "out" / "teacher" / "pids"
        assert wait_until(lambda: pids.exists() or process.poll() is not None, 30)
        assert process.poll() is None, process.stderr.read()
        started += map(int, pids.read_text().split())
        assert all(map(is_running, started))
        yield process, started
    finally:
        process.kill()
        for pid in filter(is_running, started):  # before the next line, which waits until nobody can write any more
            os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=lambda value: str(value)
)
def test_interrupted_run_ends_its_stage(number, code, sleeping_stage):
    process, (stage, helper) = sleeping_stage
    assert len({os.getpgid(pid) for pid in (stage, helper)} - {os.getpgid(process.pid)}) == 1  # a group of its own
    process.send_signal(number)
    _, errors = process.communicate(timeout=40)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert wait_until(lambda: not is_running(stage) and not is_running(helper), 5)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_killed_run_ends_its_stage(sleeping_stage):
    process, (stage, _) = sleeping_stage
    process.kill()
    process.wait()
    assert wait_until(lambda: not is_running(stage), 5)


def test_two_stages_from_photos_to_report(tmp_path):
    photos = {"train_photos": 8, "val_photos": 3, "photo_size": 96, "train_size": 64, "batch_size": 4, "num_workers": 0}
    common = {"trainer.max_epochs": 1, **{f"data.init_args.{name}": value for name, value in photos.items()}}
    before = {f"model.init_args.{role}": "${teacher}" for role in ("student", "teacher")}
    stages = [
        {
            "name": "teacher",
            "config": ["data/synthetic_faces.yaml", "model/mobilenet025.yaml", "stage/teacher.yaml"],
            "options": {**common, "model.init_args.network.channels": 16},
        },
        {"name": "int8", "config": ["data/synthetic_faces.yaml", "stage/qat.yaml"], "options": {**common, **before}},
    ]
    result = run_compress(write_recipe(tmp_path, stages=stages, size=64), "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "out" / "report.md") in result.stdout
    assert str(tmp_path / "out" / "report.html") in result.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("teacher", "int8", "teacher.onnx", "int8.onnx", "run.json"),
        *("report.json", "report.md", "report.png", "precision_recall.png", "ap_by_size.png", "worst_photos.png"),
        *("kept_channels.png", "report.html"),
    }
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {"recipe", "machine", "models", "retention", "speedup"} <= report.keys()
    assert report["recipe"] == "recipe"
    assert report["data"]["photos"] == 3
    assert report["speedup"] > 0
    assert [model["name"] for model in report["models"]] == ["teacher", "int8"]
    for model in report["models"]:
        assert {"name", "ap", "params", "macs", "onnx_bytes", "latency_ms_median"} <= model.keys()
        assert model["ap"].keys() == {"all", "easy", "medium", "hard"}
        assert model["onnx_bytes"] == (tmp_path / "out" / f"{model['name']}.onnx").stat().st_size
        assert model["params"] == report["models"][0]["params"] > 0
    assert "| int8 |" in (tmp_path / "out" / "report.md").read_text()
    for name in ("report.png", "precision_recall.png"):
        assert cv2.imread(str(tmp_path / "out" / name)).std() > 1


@pytest.mark.slow
def test_quickstart_from_start_to_report(tmp_path):
    """`make demo`, smaller: a second call trains nothing again."""
    options = [
        *SMALL,
        NARROW,
        *("--data.init_args.train_photos=16", "--data.init_args.val_photos=6", "--data.init_args.photo_size=128"),
        "--trainer.max_epochs=1",
    ]
    arguments = [RECIPES / "quickstart.yaml", "--data.root", tmp_path / "photos", "--out", tmp_path / "out", *options]
    result = run_compress(*arguments)
    assert result.returncode == 0, result.stderr
    assert str(tmp_path / "out" / "report.md") in result.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["teacher", "pruned", "ptq", "int8"]
    sizes = {model["name"]: model["onnx_bytes"] for model in report["models"]}
    assert sizes["int8"] < sizes["pruned"] < sizes["teacher"]
    assert all((tmp_path / "out" / f"{name}.onnx").stat().st_size == size for name, size in sizes.items())
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.ckpt")}
    again = run_compress(*arguments)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == 4
    assert changed == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.ckpt")}


@pytest.mark.slow
def test_a_whole_recipe_is_on_the_dashboard(wandb_offline, tmp_path):
    """As a group of runs, a stage each, of which each starts from models that another one made."""
    photos = ("--data.init_args.train_photos=16", "--data.init_args.val_photos=6", "--data.init_args.photo_size=128")
    folders = ("--data.root", tmp_path / "photos", "--out", tmp_path / "mine")
    epochs = ("--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1")
    options = [*SMALL, NARROW, *photos, *epochs, "--config", ROOT / "configs" / "wandb.yaml"]
    result = run_compress(RECIPES / "quickstart.yaml", *folders, *options)
    assert result.returncode == 0, result.stderr
    found = wandb_offline()
    assert [run.run.job_type for run in found] == ["teacher", "pruned", "ptq", "int8", "report"]
    runs = {run.run.job_type: run for run in found}
    assert len({run.run.run_group for run in runs.values()}) == 1

    def models(artifacts):
        # W&B takes artifacts of one name and digest for one.
        return {artifact.name: artifact.digest for artifact in artifacts if artifact.type == "model"}

    made = {name: digest for run in runs.values() for name, digest in models(run.made).items()}
    assert [*made] == ["mine-teacher", "mine-pruned", "mine-ptq", "mine-int8"]
    used = {name: models(run.used) for name, run in runs.items()}
    assert {name: [*each] for name, each in used.items()} == {
        "teacher": [],
        "pruned": ["mine-teacher"],
        "ptq": ["mine-pruned"],
        "int8": ["mine-pruned", "mine-teacher"],
        "report": [*made],
    }
    assert all(made[name] == digest for each in used.values() for name, digest in each.items())
    files_made = {name: [each.name for each in run.made if each.type == "onnx"] for name, run in runs.items()}
    assert files_made == {name: [f"mine-{name}-model.onnx"] if name != "report" else [] for name in runs}
    for name in ("teacher", "pruned", "int8"):
        assert len(runs[name].history["val/ap_all"]) == 1, name
    files = runs["report"].file.parent / "files"
    table = json.loads((files / runs["report"].history["report/models"][0]["path"]).read_text())
    assert [row[0] for row in table["data"]] == ["teacher", "pruned", "ptq", "int8"]
    assert (files / runs["report"].history["report/page"][0]["path"]).is_file()
    assert runs["report"].summary["speedup"] == json.loads((tmp_path / "mine" / "report.json").read_text())["speedup"]


def test_weights_that_teach_are_the_first_model_of_the_report(tiny_checkpoint, tiny_root, tmp_path, monkeypatch):
    seen = {}

    def build_report(out, name, checkpoints, root, size, labels, reproduction):
        seen[name] = (list(checkpoints), labels)
        assert reproduction.recipe == (RECIPES / f"{name}.yaml").read_text()
        assert reproduction.command.startswith(f"python compress.py {RECIPES / name}.yaml --data.root ")
        assert list(reproduction.seeds) == list(checkpoints)[-len(reproduction.seeds) :]
        assert set(reproduction.seeds.values()) == {0}
        return {"retention": None, "speedup": 1.5, "models": [{"agreement": 0.97}]}

    monkeypatch.setattr("retinaface.evaluation.report.build_report", build_report)

    def export_onnx(network, path, photos):
        assert len(photos) == 2
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(type(network).__name__)

    monkeypatch.setattr("retinaface.delivery.export.export_onnx", export_onnx)
    monkeypatch.setattr("retinaface.evaluation.report_text.report_table", lambda report: "")
    for recipe in ("distill_only", "own_photos"):
        path, out = RECIPES / f"{recipe}.yaml", tmp_path / recipe
        arguments = ["--data.root", str(tiny_root), "--weights", str(tiny_checkpoint), "--out", str(out)]
        compress._report(compress.parse_arguments([str(path), *arguments]))
    stages = ["teacher", "pruned", "ptq", "int8"]
    assert seen == {"distill_only": (stages, False), "own_photos": (stages, True)}
    # What no stage exports is exported here.
    assert list(tmp_path.rglob("*.onnx")) == [tmp_path / "distill_only" / "teacher.onnx"]


def test_photos_without_labels_are_looked_for_before_anything_runs(tiny_checkpoint, tmp_path, capsys, training):
    recipe = [RECIPES / "distill_only.yaml", "--weights", tiny_checkpoint, "--data.root"]
    (tmp_path / "empty").mkdir()
    assert "no photos there" in one_line_error([*recipe, tmp_path / "empty"], capsys)
    assert training.calls == []


@pytest.mark.slow
def test_photos_without_labels_from_start_to_report(tiny_checkpoint, tiny_root, tmp_path):
    photos = tiny_root / "WIDER_train" / "images"
    given = ["--weights", tiny_checkpoint, "--data.root", photos, "--out", tmp_path / "out"]
    result = run_compress(RECIPES / "distill_only.yaml", *given, *SMALL, "--trainer.max_epochs=1")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["teacher", "pruned", "ptq", "int8"]
    assert report["data"]["photos"] == 1
    assert report["data"]["faces_by"] == "teacher"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [([], False), (["--data.init_args.download=true"], True), (["--data.init_args.download", "true"], True),
     (["--data.init_args.download=true", "--data.init_args.download=false"], False),
     (["--data.init_args.download=True"], True), (["--data.init_args.batch_size=true"], False)],
)  # fmt: skip
def test_the_last_wish_to_download_counts(arguments, wanted, tmp_path):
    (tmp_path / "x.yaml").write_text("data: datamodules.WiderFaceDataModule")
    (tmp_path / "y.yaml").write_text("data: {init_args: {download: true}}")
    words = ["fit", "--config", str(tmp_path / "x.yaml"), *arguments]
    assert compress._switched_on(words, "download", default=False) is wanted
    assert compress._switched_on([*words, "--config", str(tmp_path / "y.yaml")], "download", default=False)
    assert not compress._switched_on(["--config", str(tmp_path / "y.yaml"), "--data.download=false"], "download", False)


def test_the_last_seed_counts(tmp_path):
    (tmp_path / "a.yaml").write_text("seed_everything: 1")
    (tmp_path / "b.yaml").write_text("model: {}")
    (tmp_path / "empty.yaml").write_text("")
    files = [word for name in ("a", "b", "empty") for word in ("--config", str(tmp_path / f"{name}.yaml"))]
    assert compress._seed(["fit", "--data.init_args.root=x"]) is None
    assert compress._seed(["fit", *files]) == 1
    assert compress._seed(["fit", *files, "--seed_everything=7"]) == 7
    assert compress._seed(["fit", "--seed_everything", "7", *files]) == 1
    assert compress._seed(["fit", *files, "--seed_everything", "true"]) is True


def test_the_command_is_kept_as_typed(tmp_path, monkeypatch):
    given = [str(write_recipe(tmp_path)), "--out", "a folder", "--trainer.max_epochs=1"]
    command = f"python compress.py {given[0]} --out 'a folder' --trainer.max_epochs=1"
    assert compress.parse_arguments(given).command == command
    monkeypatch.setattr(sys, "argv", ["compress.py", *given])
    assert compress.parse_arguments(None).command == command
