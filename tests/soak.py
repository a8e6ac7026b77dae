"""Kills a small recipe again and again, and checks that nothing is lost: ``make soak``, or ``python tests/soak.py``.

The recipe (teacher, pruned, ptq, int8, report; rendered photos, a few steps) first runs undisturbed, and what happens
in it is noted with its time: what Lightning calls its callbacks for, and which files are opened for writing or
renamed in the run's folder. From these notes moments are drawn, with a seed: in every stage one of each kind (start,
training, validation, checkpoint, export, other files), between stages, in the report, and a few more. A
second run is started, and at each of these moments all its processes, the loader's included, are killed with SIGKILL
from outside, wherever they are by then. After each kill all files under their final names must be whole, and the same
command is given again. In the end both runs must have the same weights, optimizer states and learning rates, bit for
bit, the same ONNX files, training curves, and figures in the report, but for times.

Importing everything takes longer than such a stage, so the processes are forked from this one, which has imported all
and computed nothing; a stage is still a process of its own. What this leaves out is a kill while Python imports, when
nothing has been read or written yet, and how ``compress.py`` starts a stage, for which see tests/test_compress.py. The
networks are not timed before and after pruning, either.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnx
import torch
import yaml

import compress
import train
from lightning_modules.checkpoint_io import read_resumable
from retinaface.evaluation.training_log import read_training_log

for module in ("compression.calibration", "delivery.export", "evaluation.report", "evaluation.reproduction"):
    importlib.import_module(f"retinaface.{module}")  # what compress.py and the stages import when they need it

STAGES = ("teacher", "pruned", "ptq", "int8")
TRAINED = ("teacher", "pruned", "int8")
EPOCHS = {"teacher": 3, "pruned": 2, "int8": 2}
OUT = "run"
BETWEEN = "between stages"
RESUMING = "resuming"
KINDS = {
    "checkpoint": (".ckpt",),
    "export": (".onnx",),
    "end": ("on_fit_end", "on_train_end"),
    "other files": ("writing", "renaming"),
    "validation": ("validation",),
    "training": ("train_", "before_", "after_backward"),
}
"""Of the events of a stage; the first part that fits decides."""
LONGEST = 600
"""Seconds without an event after which an attempt counts as stuck."""


@dataclass(frozen=True)
class Event:
    """Something that happened in a run.

    Attributes:
        seconds: Since the attempt began.
        stage: Where.
        what: A hook, or a file that is written or renamed.
        place: Epoch and step.
    """

    seconds: float
    stage: str
    what: str
    place: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from others, in every attempt."""
        return self.stage, self.what, self.place

    @property
    def kind(self) -> str:
        """What goes on until the next event."""
        if self.stage == compress.REPORT:
            return "writing" if self.what.startswith(("writing", "renaming")) else "measuring"
        if self.stage == BETWEEN:
            return "run.json, finished models"
        for kind, parts in KINDS.items():
            if any(part in self.what for part in parts):
                return kind
        return "start"

    def __str__(self) -> str:
        return f"{self.what}{f', {self.place}' if self.place else ''}"


@dataclass(frozen=True)
class Moment:
    """When to kill: some seconds after an event; ``index`` is its place among those of the undisturbed run."""

    event: Event
    delay: float
    index: int


@dataclass
class Attempt:
    """One start of the recipe: what happened, what stages went on from, and behind which event it was killed."""

    events: list[Event]
    resumed: dict[str, str]
    killed: Event | None = None
    code: int | None = None


# In the child: the recipe, with every event sent to the parent.


class Reporter:
    """Sends events from the processes of an attempt, but not from those of the loader."""

    def __init__(self, pipe: int, folder: Path) -> None:
        self.pipe = pipe
        self.folder = f"{folder}{os.sep}"
        self.begin = time.monotonic()
        self.stage = BETWEEN
        self.trainer: Any = None
        self.process = os.getpid()

    def send(self, what: str, **more: str) -> None:
        if os.getpid() != self.process:
            return
        trainer = self.trainer
        place = f"epoch {trainer.current_epoch}, step {trainer.global_step}" if trainer is not None else ""
        content = {"seconds": time.monotonic() - self.begin, "stage": self.stage, "what": what, "place": place, **more}
        os.write(self.pipe, f"{json.dumps(content)}\n".encode())

    def audit(self, name: str, arguments: tuple[Any, ...]) -> None:
        """A hook of Python's own, called before files are opened and renamed."""
        if name == "open":
            path, _, flags = arguments
            if str(path).startswith(self.folder) and flags & (os.O_WRONLY | os.O_RDWR):
                self.send(f"writing {Path(path).name}")
        elif name == "os.rename" and str(arguments[1]).startswith(self.folder):
            self.send(f"renaming to {Path(arguments[1]).name}")


def run_recipe(pipe: int, folder: Path, recipe: Path) -> None:
    """``python compress.py RECIPE --out run`` in a folder; events go through the pipe, output to ``log``."""
    os.setsid()
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(folder)
    sys.argv = ["compress.py"]
    reporter = Reporter(pipe, folder / OUT)
    watch(reporter)
    compress._run = lambda command: run_stage(command, reporter)
    compress.main([str(recipe), "--out", OUT])


def watch(reporter: Reporter) -> None:
    call = sys.modules["lightning.pytorch.trainer.call"]
    call_hooks, newest, report = call._call_callback_hooks, train.newest_checkpoint, compress._report

    def call_hooks_aloud(trainer: Any, hook: str, *arguments: Any, **options: Any) -> None:
        reporter.trainer = trainer
        reporter.send(hook)
        call_hooks(trainer, hook, *arguments, **options)

    def newest_aloud(folder: Path) -> Path | None:
        path = newest(folder)
        if path is not None:
            content = read_resumable(path)
            reporter.send(RESUMING, resumed=f"epoch {content['epoch']}, step {content['global_step']} ({path.name})")
        return path

    def report_aloud(run: compress.Run) -> None:
        reporter.stage = compress.REPORT
        reporter.send("report begins")
        report(run)

    # Timing both networks is most of what pruning does here, and decides nothing.
    speedup = sys.modules["retinaface.evaluation.speedup"]
    speedup.export_onnx = lambda network, path: None
    speedup.benchmark = lambda *_, **__: [SimpleNamespace(median_ms=10.0, ratio=1.0)] * 2
    exporting = sys.modules["callbacks.export"]
    export = exporting.export_onnx

    def export_aloud(network: Any, path: Path, *arguments: Any, **options: Any) -> None:
        reporter.send(f"exporting {path.name}")
        export(network, path, *arguments, **options)

    exporting.export_onnx = export_aloud
    call._call_callback_hooks = call_hooks_aloud
    train.newest_checkpoint = newest_aloud
    compress._report = report_aloud
    sys.addaudithook(reporter.audit)


def run_stage(command: list[str], reporter: Reporter) -> None:
    """In place of ``compress._run``: the same ``train.py`` command in a process that need not import everything."""
    option = next(word for word in command if word.startswith("--trainer.default_root_dir="))

    def train_it() -> None:
        reporter.process, reporter.stage = os.getpid(), Path(option.partition("=")[2]).name
        sys.argv = ["train.py"]
        reporter.send("stage begins")
        train.main(command[2:])

    process = multiprocessing.get_context("fork").Process(target=train_it)
    process.start()
    process.join()
    if process.exitcode:
        raise compress.subprocess.CalledProcessError(process.exitcode, command)


# In the parent: attempts, kills, comparison.


class Events:
    """Reads what the processes of an attempt send.

    Args:
        pipe: Where from; closed in the end.
    """

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe
        self.rest = b""

    def next(self, until: float | None) -> dict[str, Any] | None:
        """The next event, or None when the time has come.

        Raises:
            EOFError: No process is left that could send one.
        """
        while b"\n" not in self.rest:
            patience = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self.pipe], [], [], patience)[0]:
                return None
            content = os.read(self.pipe, 65536)
            if not content:
                os.close(self.pipe)
                raise EOFError
            self.rest += content
        line, _, self.rest = self.rest.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event


def attempt(folder: Path, recipe: Path, kill_at: Callable[[Event], float | None]) -> Attempt:
    """Starts the recipe; kills all its processes as many seconds after an event as ``kill_at`` says for it."""
    receive, send = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=run_recipe, args=(send, folder, recipe))
    process.start()
    assert process.pid is not None
    os.close(send)
    events, done, met = Events(receive), Attempt([], {}), None
    until: float | None = time.monotonic() + LONGEST
    with suppress(EOFError):
        while True:
            content = events.next(until)
            if content is None:
                os.killpg(process.pid, signal.SIGKILL)
                assert met, f"{folder}: stuck after {done.events[-1]}; see its log"
                done.killed, until = met, None
                continue
            event = Event(*(content[name] for name in ("seconds", "stage", "what", "place")))
            done.events.append(event)
            if met is None:
                until = time.monotonic() + LONGEST
            if "resumed" in content:
                done.resumed[event.stage] = content["resumed"]
            if met is None and (delay := kill_at(event)) is not None:
                met, until = event, time.monotonic() + delay
    process.join()
    done.code = process.exitcode
    return done


def draw_moments(events: list[Event], more: int, chance: random.Random) -> list[Moment]:
    """Moments of an undisturbed run, in order: one of each kind in each stage, and some more of any.

    Then one more for each stage that trains, while it reads the checkpoint that the kill before has left.
    """
    lasts = [later.seconds - event.seconds for event, later in pairwise(events)]
    first = {event.key: index for index, event in reversed(list(enumerate(events[:-1])))}
    groups: dict[tuple[str, str], list[int]] = {}
    for index in sorted(first.values()):
        groups.setdefault((events[index].stage, events[index].kind), []).append(index)
    drawn = [*groups.values(), *chance.choices(list(groups.values()), k=more)]
    chosen = [chance.choices(group, [lasts[index] for index in group])[0] for group in drawn]
    delays = sorted((index, chance.random() * lasts[index]) for index in chosen)
    moments = [Moment(events[index], delay, index) for index, delay in delays]
    for stage in TRAINED:
        within = [index for index, moment in enumerate(moments) if moment.event.stage == stage]
        start, end = (
            next(event.seconds for event in events if event.stage == stage and event.what == what)
            for what in ("setup", "on_train_start")
        )
        again = Event(0.0, stage, RESUMING, "")
        moments.insert(within[-1] + 1, Moment(again, chance.random() * (end - start), moments[within[-1]].index))
    return moments


def when_to_kill(moment: Moment, events: list[Event]) -> Callable[[Event], float | None]:
    """At a moment; or at the first later one, as not all that happens once in a run happens again when it goes on."""
    first = {event.key: index for index, event in reversed(list(enumerate(events)))}

    def kill_at(event: Event) -> float | None:
        if moment.event.what == RESUMING:
            met = (event.stage, event.what) == (moment.event.stage, RESUMING)
        else:
            met = first.get(event.key, -1) >= moment.index
        return moment.delay if met else None

    return kill_at


def check_whole(folder: Path) -> None:
    """Every file that bears its final name must be complete; those that are being written have other names."""
    for path in [*folder.rglob("*.ckpt"), *folder.rglob("*.ckpt.previous")]:
        read_resumable(path)
    for path in [*folder.glob("[!.]*.onnx"), *folder.glob("*/model.onnx")]:
        onnx.checker.check_model(onnx.load(path), full_check=True)
    for path in folder.glob("[!.]*.json"):
        json.loads(path.read_text(encoding="utf-8"))


def differences(whole: Path, cut: Path) -> dict[str, list[str]]:
    """What differs between two runs, by stage."""
    found: dict[str, list[str]] = {}
    for stage in STAGES:
        first, second = (read_resumable(folder / stage / "checkpoints" / "last.ckpt") for folder in (whole, cut))
        found[stage] = [
            key
            for key in ("epoch", "global_step", "structure", "state_dict", "optimizer_states", "lr_schedulers")
            if not same(first[key], second[key])
        ]
        if (whole / f"{stage}.onnx").read_bytes() != (cut / f"{stage}.onnx").read_bytes():
            found[stage].append("ONNX file")
        if not same(*(read_training_log(folder / stage) for folder in (whole, cut))):
            found[stage].append("training curves")
    first, second = (untimed(json.loads((folder / "report.json").read_text())) for folder in (whole, cut))
    found[compress.REPORT] = [key for key in first | second if not same(first.get(key), second.get(key))]
    return found


def same(first: Any, second: Any) -> bool:
    """Equality to the last bit; no number equals no number."""
    if isinstance(first, torch.Tensor):
        if not isinstance(second, torch.Tensor) or (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        return first.numpy().tobytes() == second.numpy().tobytes()
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second or (first != first and second != second))


def untimed(report: dict[str, Any]) -> dict[str, Any]:
    """A report without times, what follows from them, and where it is."""
    timed = {"speedup", "speedup_interval", "benchmark", "fastest", "machine", "reproduction"}
    kept = {key: value for key, value in report.items() if key not in timed}
    kept["models"] = [
        {key: value for key, value in model.items() if key != "speedup" and not key.startswith("latency")}
        for model in report["models"]
    ]
    kept["data"] = {key: value for key, value in report["data"].items() if key != "root"}
    return kept


def write_recipe(path: Path) -> Path:
    """A recipe of every stage, as small as it goes."""
    photos = {"train_photos": 12, "val_photos": 4, "photo_size": 96, "train_size": 64, "batch_size": 4}
    common: dict[str, Any] = {f"data.init_args.{key}": value for key, value in {**photos, "num_workers": 1}.items()}
    common["trainer.log_every_n_steps"] = 1
    both = {f"model.init_args.{role}": "${teacher}" for role in ("student", "teacher")}
    data = "data/synthetic_faces.yaml"
    stages: list[tuple[str, list[str], dict[str, Any]]] = [
        (
            "teacher",
            [data, "model/mobilenet025.yaml", "stage/teacher.yaml"],
            {"model.init_args.network.channels": 16, "trainer.max_epochs": EPOCHS["teacher"]},
        ),
        (
            "pruned",
            [data, "stage/prune.yaml"],
            # With batch statistics of its own photos a network that has learnt nothing yet answers with mere noise,
            # which INT8 rounds too coarsely for the check of the exported file.
            {**both, "trainer.max_epochs": EPOCHS["pruned"], "trainer.callbacks.init_args.recalibrate": 0},
        ),
        ("ptq", [data, "stage/ptq.yaml"], {"model.init_args.student": "${previous}"}),
        (
            "int8",
            [data, "stage/qat.yaml"],
            {**both, "model.init_args.student": "${pruned}", "trainer.max_epochs": EPOCHS["int8"]},
        ),
    ]
    content = {
        "description": "for the soak",
        "root": "photos",
        "size": 64,
        "stages": [
            {"name": name, "config": config, "options": {**common, **options}} for name, config, options in stages
        ],
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def soak(folder: Path, more: int, seed: int) -> bool:
    """Runs everything in a folder and prints the table.

    Returns:
        Whether nothing was lost.
    """
    recipe = write_recipe(folder / "recipe.yaml")
    runs = {name: folder / name for name in ("whole", "cut")}
    for run in runs.values():
        run.mkdir()
    begin = time.monotonic()
    whole = attempt(runs["whole"], recipe, lambda _: None)
    assert whole.code == 0, f"the undisturbed run failed; see {runs['whole']}/log"
    undisturbed = time.monotonic() - begin
    moments = draw_moments(whole.events, more, random.Random(seed))
    print(f"undisturbed: {undisturbed:.0f} s, {len(whole.events)} events; now {len(moments)} kills", file=sys.stderr)
    rows: list[list[str]] = []
    for moment in moments:
        done = attempt(runs["cut"], recipe, when_to_kill(moment, whole.events))
        assert done.killed, f"{moment.event} in {moment.event.stage} was never reached; see {runs['cut']}/log"
        check_whole(runs["cut"] / OUT)
        note_resumed(rows, done)
        what = f"{moment.delay * 1000:.0f} ms after: {done.killed}"
        rows.append([str(len(rows) + 1), done.killed.stage, done.killed.kind, what])
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    done = attempt(runs["cut"], recipe, lambda _: None)
    assert done.code == 0, f"the last attempt failed; see {runs['cut']}/log"
    note_resumed(rows, done)
    found = differences(*(run / OUT for run in runs.values()))
    print("| kill | in | during | moment | started again, it went on from | in the end |")
    print("|---:|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} | {', '.join(found.get(row[1], [])) or 'equal'} |")
    counts = ", ".join(f"{count} in {stage}" for stage, count in Counter(row[1] for row in rows).items())
    print(f"\n{len(rows)} kills ({counts}) in {time.monotonic() - begin:.0f} s, seed {seed}.")
    print(
        f"Against an undisturbed run ({undisturbed:.0f} s): weights, optimizer and learning rate of every stage bit for"
    )
    print("bit, ONNX files byte for byte, training curves, and the report's figures but times:", end=" ")
    print("all equal." if not any(found.values()) else f"different: {found}")
    return not any(found.values())


def note_resumed(rows: list[list[str]], done: Attempt) -> None:
    """Completes the row of the last kill with what the next attempt made of it."""
    if not rows:
        return
    stage = rows[-1][1]
    begun = list(dict.fromkeys(event.stage for event in done.events if event.stage != BETWEEN))
    if stage == BETWEEN:
        rows[-1].append(f"the next: {begun[0]}")
    elif stage in done.resumed:
        rows[-1].append(done.resumed[stage])
    elif stage in begun:
        rows[-1].append(f"the beginning of {stage}")
    else:
        rows[-1].append(f"{begun[0] if begun else 'the end'}: {stage} was done")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--more", type=int, default=5, help="kills besides one of every kind in every stage")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--keep", type=Path, help="a new folder for both runs and their logs, not deleted")
    options = parser.parse_args()
    if options.keep is not None and options.keep.exists():
        parser.error(f"--keep {options.keep}: is there already; name a new folder")
    torch.set_num_threads(1)
    folder = options.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    equal = False
    try:
        equal = soak(folder.resolve(), options.more, options.seed)
    finally:
        if options.keep is None and equal:
            shutil.rmtree(folder)
    sys.exit(not equal)


if __name__ == "__main__":
    main()
