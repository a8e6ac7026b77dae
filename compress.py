"""Runs a recipe: ``python compress.py RECIPE [--data.root DIR] [--weights FILE] [--out DIR] [train.py options]``.

A recipe is an ordered list of stages, each a ``train.py fit`` of its own whose input is the checkpoint of a stage
before. Finished stages are skipped, an interrupted one goes on from its last checkpoint, and a report ends it. With
``--submit slurm`` every stage, and the report, becomes a job of a cluster that waits for the one before.
"""

import argparse
import json
import os
import re
import shlex
import signal
import string
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser
from rich.console import Console

from retinaface.errors import InputError, one_line
from retinaface.processes import die_with_parent
from retinaface.slurm import (
    SAVED,
    Cluster,
    Notice,
    as_step,
    cancel_jobs,
    cluster_parser,
    is_preempted,
    is_running,
    read_cluster,
    requeue_job,
    submit_job,
)
from retinaface.whole_file import whole_file

if TYPE_CHECKING:
    from retinaface.data.annotations import Sample

PROJECT = Path(__file__).resolve().parent
CONFIGS = PROJECT / "configs"

# A log file has room for whole tables.
_console = Console(markup=False, highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)

_notice = Notice(_console.print)

REPORT = "report"

# Placeholders, the report, and what options of train.py start with: no stage can have such a name.
_RESERVED = {
    "weights",
    "previous",
    REPORT,
    "trainer",
    "model",
    "data",
    "checkpoint",
    "optimizer",
    "lr_scheduler",
    "seed_everything",
    "ckpt_path",
}


@dataclass
class Stage:
    """One ``train.py fit``.

    Attributes:
        name: ``teacher``, ``pruned``, ``int8`` or another; of its folder, its ONNX file and its row in the report.
        config: Files under ``configs/``, after ``default.yaml``, in order.
        options: Options of ``train.py`` by dotted name, as on its command line. ``${weights}``, ``${previous}`` and
            ``${<stage>}`` stand for the given weights, the checkpoint of the stage before and that of a named stage.
    """

    name: str
    config: list[str]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Recipe:
    """What ``compress.py`` runs.

    Attributes:
        description: What it is for.
        root: Data root where ``--data.root`` does not say.
        stages: In order; the first is the teacher's, unless the given weights are the teacher; the last makes the final
            model.
        size: Side of the picture for MACs and timing in the report, in pixels.
        needs_weights: Whether ``--weights`` must be given.
    """

    description: str
    root: str
    stages: list[Stage]
    size: int = 640
    needs_weights: bool = False


@dataclass
class Run:
    """A recipe with what the user said.

    Attributes:
        name: The recipe's.
        recipe: The recipe.
        out: The run's folder.
        root: The data root.
        weights: The public weights, or None.
        overrides: More ``train.py`` options, for every stage, or for one with its name in front.
        command: What the user typed, without the cluster's options.
        text: The recipe's file.
        words: The arguments in ``command``.
        cluster: Where the stages run.
        group: What W&B and a cluster know the run by, also when it goes on; empty until ``run.json`` is there.
    """

    name: str
    recipe: Recipe
    out: Path
    root: Path
    weights: Path | None
    overrides: list[str]
    command: str
    text: str
    words: list[str] = field(default_factory=list)
    cluster: Cluster = field(default_factory=Cluster)
    group: str = ""

    def checkpoint(self, stage: str) -> Path:
        """Where a stage leaves its result."""
        return self.out / stage / "checkpoints" / "last.ckpt"

    def begun(self, stage: str) -> bool:
        """Whether a stage has left something to go on from."""
        folder = self.checkpoint(stage).parent
        return any(folder.glob("*.ckpt")) or any(folder.glob("*.ckpt.previous"))

    def exported(self, stage: str) -> Path:
        """The ONNX file that says that a stage is done."""
        return self.out / f"{stage}.onnx"

    def arguments(self, stage: Stage) -> list[str]:
        """The ``train.py`` command of a stage, without what resumes it."""
        folder = self.out / stage.name
        configs = [CONFIGS / "default.yaml", *(CONFIGS / name for name in stage.config)]
        options = {
            "trainer.default_root_dir": folder,
            "checkpoint.dirpath": folder / "checkpoints",
            "data.init_args.root": self.root,
            **self._filled_in(stage),
        }
        return [
            "fit",
            *(word for config in configs for word in ("--config", str(config))),
            *(
                f"--{name}={value if isinstance(value, str | Path) else json.dumps(value)}"
                for name, value in options.items()
            ),
            *self._overrides(stage),
        ]

    def _overrides(self, stage: Stage) -> list[str]:
        """The user's options for a stage: those for all, and those that start with its name."""
        names = {each.name for each in self.recipe.stages}
        chosen: list[str] = []
        wanted = True
        for word in self.overrides:
            if word.startswith("--"):  # what follows up to the next option are its values
                name, _, rest = word[2:].partition(".")
                wanted = name not in names or name == stage.name
                word = f"--{rest}" if name in names else word
            if wanted:
                chosen.append(word)
        return chosen

    def _filled_in(self, stage: Stage) -> dict[str, Any]:
        before = self.recipe.stages[: self.recipe.stages.index(stage)]
        known = {"weights": "null" if self.weights is None else str(self.weights)}
        known |= {earlier.name: str(self.checkpoint(earlier.name)) for earlier in before}
        if before:
            known["previous"] = known[before[-1].name]
        try:
            return {
                name: string.Template(value).substitute(known) if isinstance(value, str) else value
                for name, value in stage.options.items()
            }
        except (KeyError, ValueError) as error:
            raise InputError(
                f"recipe {self.name}, stage {stage.name}: unknown placeholder {error}; expected one of "
                f"{', '.join('${' + name + '}' for name in known)}"
            ) from error


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe.

    Raises:
        InputError: No such file, not YAML, or keys that a recipe does not have.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(str(p.relative_to(PROJECT)) for p in (CONFIGS / "recipes").glob("*.yaml")))
        raise InputError(f"{path}: cannot be read ({error.strerror}); the recipes here are {known}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, as_group=False)
    try:
        recipe: Recipe = parser.instantiate(parser.parse_object(content if isinstance(content, dict) else {}))
        recipe = Recipe(**vars(recipe))
    except Exception as error:  # jsonargparse raises several kinds
        raise InputError(
            f"{path}: {' '.join(str(error).split())}; see configs/recipes for what a recipe holds"
        ) from error
    names = [stage.name for stage in recipe.stages]
    if not names or len(set(names)) < len(names) or not all(n.isidentifier() and n not in _RESERVED for n in names):
        raise InputError(
            f"{path}: stages are named {names}; expected at least one, each with a name of its own, of letters, digits "
            "and underscores, other than train.py's own options"
        )
    for stage in recipe.stages:
        for name in stage.config:
            if not (CONFIGS / name).is_file():
                raise InputError(f"{path}: stage {stage.name} names configs/{name}, which does not exist")
    return recipe


def run_recipe(run: Run) -> None:
    """Runs the stages that are not done, then writes the report; or of that only what the run's ``cluster`` names.

    Raises:
        InputError: The input is wrong, or the folder holds a different run.
        subprocess.CalledProcessError: A stage failed; it has said why.
    """
    _check_data(run)
    _remember(run)
    only = run.cluster.only
    for number, stage in enumerate(run.recipe.stages, start=1):
        if only in (None, stage.name):
            _run_stage(run, stage, title=f"[{number}/{len(run.recipe.stages)}] {stage.name}")
    if only in (None, REPORT):
        todo = [stage.name for stage in run.recipe.stages if not run.exported(stage.name).is_file()]
        if todo:
            raise InputError(f"--only {REPORT}: {', '.join(todo)} must be done before; leave --only out")
        _report(run)


def _run_stage(run: Run, stage: Stage, title: str) -> None:
    if run.exported(stage.name).is_file():
        _console.print(f"{title}: done before")
        return
    resumes = run.begun(stage.name)
    _console.print(f"{title}: {'resuming' if resumes else 'starting'}")
    _name_for_wandb(run, stage.name)
    command = [sys.executable, str(PROJECT / "train.py"), *run.arguments(stage)]
    if run.cluster.srun:
        overlay = ["--config", str(CONFIGS / "slurm" / "slurm.yaml")]
        command = as_step([*command, *overlay])
    try:
        _run([*command, *(["--ckpt_path=last"] if resumes else [])])
    except subprocess.CalledProcessError as error:
        if run.cluster.srun:
            _answer_for(title, error.returncode)
        raise
    _finish(run.out / stage.name / "model.onnx", run.exported(stage.name))
    _notice.progress = True
    # The stage was just in time; the next one would not be.
    if run.cluster.srun and run.cluster.only is None and _notice.given and is_running():
        _notice.requeue()


def _answer_for(title: str, status: int) -> None:
    """Has the job start again if that is why a stage has ended and it has not seen to it; else says what follows."""
    if is_preempted():  # before there was a step to save after, or when there was none left
        requeue_job()
    elif _notice.given and (status < 0 or status > 128):  # ended by a signal: it was just beginning, and did not listen
        if is_running():
            _notice.requeue()
    elif status != SAVED:
        _console.print(
            f"{title}: failed with status {status}; jobs that wait for it are cancelled. Submitted again, the recipe "
            "goes on here"
        )


def submit_recipe(run: Run) -> None:
    """Submits what is not done as jobs, each waiting for the one before, and says how to follow them.

    Raises:
        InputError: The input is wrong, the folder holds a different run, or the cluster refuses a job; then none is
            left.
    """
    _check_data(run)
    _remember(run)
    script, logs = CONFIGS / "slurm" / "compress.sbatch", run.out / "slurm"
    logs.mkdir(exist_ok=True)
    jobs: list[str] = []
    written: list[str] = []
    # What trains nothing has nothing to share out.
    single = [REPORT, *(stage.name for stage in run.recipe.stages if _trains_nothing(run.arguments(stage)))]
    for name in [*(stage.name for stage in run.recipe.stages), REPORT]:
        if name != REPORT and run.exported(name).is_file():
            _console.print(f"{name}: done before")
            continue
        # Only jobs of one name wait for each other, so no other run may have it. In a file's name % is sbatch's own.
        names = [f"--job-name={run.group}-{name}", f"--output={str(logs / name).replace('%', '%%')}-%j.log"]
        options = [*names, *run.cluster.options()]
        if name in single:
            options += ["--nodes=1", "--ntasks-per-node=1", *(["--gpus-per-node=1"] if run.cluster.gpus else [])]
        try:
            before = jobs[-1] if jobs else None
            environment = {"VENV": sys.prefix, "PROJECT": str(PROJECT)}
            jobs.append(submit_job(script, [*run.words, "--only", name], options, before, environment))
            written.append(str(logs / f"{name}-{jobs[-1]}.log"))
        except InputError:
            cancel_jobs(jobs)
            raise
        _console.print(f"{name}: job {jobs[-1]}{f', after {before}' if before else ''}")
    _console.print(f"their state: squeue --jobs={','.join(jobs)}")
    _console.print(f"their logs:  tail -F {shlex.join(written)}")
    _console.print(f"to stop:     scancel {' '.join(jobs)}")


def _run(command: list[str]) -> None:
    """Runs a stage in a process group of its own, which does not outlive this process.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    stage = subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent)
    try:
        with _notice.handed_on_to(stage):
            code = stage.wait()
    except BaseException:  # Ctrl-C or SIGTERM: end the stage and the processes that it started, gently first
        try:
            with suppress(ProcessLookupError):
                os.killpg(stage.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                stage.wait(timeout=20)
        finally:  # also when Ctrl-C comes again
            with suppress(ProcessLookupError):
                os.killpg(stage.pid, signal.SIGKILL)
        raise
    if code:
        with suppress(ProcessLookupError):  # with several processes, those that would wait for the failed one for ever
            os.killpg(stage.pid, signal.SIGKILL)
        raise subprocess.CalledProcessError(code, command)


def _finish(model: Path, exported: Path) -> None:
    """Moves a stage's ONNX file to where its name says that the stage is done; so this comes last."""
    if not model.is_file():
        raise InputError(
            f"{model}: not written by its stage; leave callbacks.ExportOnnx in, and trainer.fast_dev_run out of the "
            "options"
        )
    model.replace(exported)


def _check_data(run: Run) -> None:
    """Finds what is wrong with the input before minutes have passed."""
    if not any("synthetic" in name for stage in run.recipe.stages for name in stage.config):
        from retinaface.data.wider_archives import prepare_root

        commands = [run.arguments(stage) for stage in run.recipe.stages]
        prepare_root(run.root, download=any(_switched_on(command, "download", default=False) for command in commands))
        if not _has_labels(run) and run.out.is_relative_to(run.root):
            raise InputError(f"{run.out}: lies within {run.root}, whose photos are all read; choose another --out")
        _load(run, "train")
        _load(run, "val")
    if run.weights is not None:
        from retinaface.compression.structure import load_float_network

        load_float_network(run.weights)


def _load(run: Run, split: Literal["train", "val"]) -> "Sequence[Sample]":
    from retinaface.data.annotations import load_split, load_unlabelled

    return (load_split if _has_labels(run) else load_unlabelled)(run.root, split)


def _switched_on(arguments: Sequence[str], name: str, default: bool) -> bool:
    """An option of a stage's data."""
    return (
        _setting(arguments, ("data", "init_args", name), (f"--data.init_args.{name}", f"--data.{name}"), default)
        is True
    )


def _options(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """The options of a stage with their values, after a space or ``=``, in order."""
    words = [part for argument in arguments for part in argument.split("=", 1)]
    return [(option, value) for option, value in pairwise(words) if option.startswith("--")]


def _read_yaml(path: Path) -> Any:  # noqa: ANN401
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a YAML file that can be read ({' '.join(str(error).split())})") from error


def _setting(arguments: Sequence[str], keys: Sequence[str], options: Sequence[str], default: Any = None) -> Any:  # noqa: ANN401
    """A setting of a stage; as in ``train.py`` the last configuration file or option that has it counts."""
    setting = default
    for option, value in _options(arguments):
        if option == "--config":
            content: Any = _read_yaml(Path(value))
            for key in keys:
                content = content.get(key) if isinstance(content, dict) else None
            setting = setting if content is None else content
        elif option in options:
            setting = yaml.safe_load(value)
    return setting


def _trains_nothing(arguments: Sequence[str]) -> bool:
    """Whether its callbacks quantize to INT8 from a few photos."""
    files = (_read_yaml(Path(value)) for option, value in _options(arguments) if option == "--config")
    trainers = (content.get("trainer") for content in files if isinstance(content, dict))
    added = (callback for trainer in trainers if trainer for callback in trainer.get("callbacks+") or [])
    # A callback is written as its name, or as a mapping with its arguments.
    names = (callback["class_path"] if isinstance(callback, dict) else callback for callback in added)
    return "callbacks.PostTrainingQuantization" in names


def _seed(arguments: Sequence[str]) -> int | bool | None:
    seed: int | bool | None = _setting(arguments, ("seed_everything",), ("--seed_everything",))
    return seed


def _has_labels(run: Run) -> bool:
    """Whether the training photos have labels; one stage that says no means all photos."""
    return all(_switched_on(run.arguments(stage), "labels", default=True) for stage in run.recipe.stages)


def _remember(run: Run) -> None:
    """Notes what the folder's run is, or checks that it is this one."""
    note = run.out / "run.json"
    facts: dict[str, Any] = {
        "recipe": run.name,
        "stages": {stage.name: run.arguments(stage) for stage in run.recipe.stages},
    }
    try:
        there = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else facts
        facts["group"] = run.group = there.get("group") or _new_group(run)
        # A stage that never got as far as a checkpoint, for a mistyped option perhaps, may be started differently.
        begun = {name: words for name, words in there["stages"].items() if run.begun(name)}
        same = not begun or there["recipe"] == run.name
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{note}: damaged; choose another --out, or delete it if the folder is this run's") from error
    for name, words in begun.items():
        if not same or words != facts["stages"].get(name):
            raise InputError(
                f"{run.out}: its stage {name} ran with another recipe, data or options; choose another --out"
            )
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        with whole_file(note) as part:
            part.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{run.out}: cannot be written to ({error.strerror}); choose another --out") from error


def _report(run: Run) -> None:
    from retinaface.evaluation.report import build_report
    from retinaface.evaluation.report_text import report_table
    from retinaface.evaluation.reproduction import Reproduction, current_commit

    _console.print("evaluating and timing")
    checkpoints = {**_given_teacher(run), **{stage.name: run.checkpoint(stage.name) for stage in run.recipe.stages}}
    seeds = {stage.name: _seed(run.arguments(stage)) for stage in run.recipe.stages}
    reproduction = Reproduction(run.command, run.text, seeds, current_commit(PROJECT))
    report: Mapping[str, Any] = build_report(
        run.out,
        run.name,
        checkpoints,
        run.root,
        run.recipe.size,
        labels=_has_labels(run),
        reproduction=reproduction,
    )
    _console.print(report_table(report))
    if report["retention"] is not None:
        _console.print(f"AP kept: {report['retention']:.1%}, speed-up: {report['speedup']:.2f}x")
    if report["models"][-1].get("agreement") is not None:
        agreement = report["models"][-1]["agreement"]
        _console.print(f"agreement with the teacher: {agreement:.1%}, speed-up: {report['speedup']:.2f}x")
    _console.print(f"report: {run.out / 'report.html'}")
    _console.print(f"the same as Markdown: {run.out / 'report.md'}")
    _send_to_wandb(run, report, checkpoints)


def _send_to_wandb(run: Run, report: Mapping[str, Any], checkpoints: Mapping[str, Path]) -> None:
    """Sends the report to where the last stage's W&B logger sent it, if it has one; an error is only said."""
    try:
        place = _wandb_place(run)
        if place is not None:
            from retinaface.evaluation.dashboard import send_report

            _name_for_wandb(run, REPORT)
            send_report(run.out, report, checkpoints, *place)
    except Exception as error:  # W&B raises many kinds, and the report is there whatever it does
        why = one_line(error) or type(error).__name__
        _console.print(f"the report was not sent: {why}; the same command tries again")


def _new_group(run: Run) -> str:
    """A name that no other run has."""
    return f"{re.sub('[^a-zA-Z0-9_.-]', '-', run.out.name)[:40]}-{uuid4().hex[:6]}"


def _name_for_wandb(run: Run, stage: str) -> None:
    """Tells W&B, where that is a logger, which run a stage begins or goes on with: its environment variables do."""
    for name, value in (("WANDB_DIR", str(run.out)), ("WANDB_RUN_GROUP", run.group)):
        os.environ.setdefault(name, value)
    os.environ |= {"WANDB_JOB_TYPE": stage, "WANDB_NAME": stage, "WANDB_RUN_ID": f"{run.group}-{stage}"}
    loggers = _setting(run.arguments(run.recipe.stages[-1]), ("trainer", "logger"), ("--trainer.logger",))
    if "WandbLogger" in str(loggers):
        from retinaface.evaluation.dashboard import prepare_wandb, run_mode

        prepare_wandb(Path(os.environ["WANDB_DIR"]))
        os.environ |= {"WANDB_MODE": mode} if (mode := run_mode()) else {}  # said here, and not in every stage


def _wandb_place(run: Run) -> tuple[str, str | None] | None:
    """Project and entity of the last stage's W&B logger, as Lightning saved its settings; None if it has none."""
    folder = run.out / run.recipe.stages[-1].name
    # In W&B's folder where that is the only logger; W&B itself has files of that name too.
    files = [*folder.rglob("config.yaml"), *Path(os.environ.get("WANDB_DIR", run.out)).glob("config.yaml")]
    for file in sorted(files, key=_attempt, reverse=True):
        trainer = _read_yaml(file).get("trainer", {})
        loggers = trainer.get("logger") if trainer.get("default_root_dir") == str(folder) else None
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if isinstance(logger, dict) and logger["class_path"].endswith("WandbLogger"):
                return logger["init_args"]["project"], logger["init_args"].get("entity")
    return None


def _attempt(file: Path) -> int:
    """Number of the folder of a stage's attempt, as Lightning counts them; -1 where it makes none."""
    name, _, number = file.parent.name.partition("_")
    return int(number) if name == "version" and number.isdecimal() else -1


def _given_teacher(run: Run) -> dict[str, Path]:
    """The given weights by the name ``teacher``, and their ONNX file, where they teach and no stage has that name."""
    names = {stage.name for stage in run.recipe.stages}
    teaches = any(stage.options.get("model.init_args.teacher") == "${weights}" for stage in run.recipe.stages)
    if run.weights is None or "teacher" in names or not teaches:
        return {}
    from retinaface.compression.structure import load_network
    from retinaface.data.annotations import evenly_spread
    from retinaface.delivery.export import export_onnx

    exported = run.out / "teacher.onnx"
    if not exported.is_file():
        network, _ = load_network(run.weights)
        export_onnx(network, exported, photos=[sample.path for sample in evenly_spread(_load(run, "val"), 2)])
    return {"teacher": run.weights}


def parse_arguments(args: list[str] | None) -> Run:
    """Reads the command line.

    Raises:
        InputError: The recipe is wrong, a placeholder in it included, weights are missing, or options contradict each
            other.
    """
    program, *given = sys.argv if args is None else ["compress.py", *args]
    cluster, words = read_cluster(given)
    parser = argparse.ArgumentParser(
        prog="compress.py",
        allow_abbrev=False,
        usage="%(prog)s RECIPE [--data.root DIR] [--weights FILE] [--out DIR] [--submit slurm] [train.py options]",
        parents=[cluster_parser()],
        description="Run a recipe: train a teacher, prune, quantize, export, report.",
        epilog="Any further option goes to train.py in every stage, such as --trainer.max_epochs 3; with a stage's "
        "name in front, in that one only: --pruned.trainer.max_epochs 3. "
        "Example: python compress.py configs/recipes/own_photos.yaml --data.root photos --weights retinaface.pth",
    )
    parser.add_argument("recipe", type=Path, help="a file such as configs/recipes/quickstart.yaml")
    parser.add_argument(
        "--data.root",
        dest="root",
        type=Path,
        help="data root in WIDER FACE layout; for distill_only.yaml any folder with photos",
    )
    parser.add_argument("--weights", type=Path, help="public RetinaFace weights (.pth) or a checkpoint (.ckpt)")
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/<recipe>)")
    known, overrides = parser.parse_known_args(words)
    recipe = load_recipe(known.recipe)
    name = known.recipe.stem
    uses_weights = any("${weights}" in str(value) for stage in recipe.stages for value in stage.options.values())
    if known.weights is not None and not uses_weights:
        raise InputError(f"recipe {name}: uses no weights; leave --weights out")
    if recipe.needs_weights and known.weights is None:
        raise InputError(f"recipe {name}: starts from trained weights; give them with --weights FILE")
    out = known.out or Path("runs") / name
    root = known.root or Path(recipe.root)
    run = Run(
        name,
        recipe,
        out.resolve(),
        root.resolve(),
        known.weights and known.weights.resolve(),
        overrides,
        command=shlex.join(["python", program, *words]),
        text=known.recipe.read_text(encoding="utf-8"),
        words=words,
        cluster=cluster,
    )
    for word in overrides:
        if (cluster.submit or cluster.srun) and word.partition("=")[0].endswith(
            ("trainer.devices", "trainer.num_nodes")
        ):
            raise InputError(f"{word}: a job trains with a process per task; give --gpus, or --sbatch='--nodes=2'")
        if not cluster.submit and word.partition("=")[0].endswith("trainer.num_nodes"):
            raise InputError(f"{word}: several machines take --submit slurm --sbatch='--nodes=2', or train.py on each")
    names = [*(stage.name for stage in recipe.stages), REPORT]
    if cluster.only is not None and cluster.only not in names:
        raise InputError(f"--only {cluster.only}: recipe {name} has no such stage; expected one of {', '.join(names)}")
    for stage in recipe.stages:
        run.arguments(stage)  # names unknown placeholders now, not when the stage comes
    return run


def main(args: list[str] | None = None) -> None:
    """Runs a recipe.

    Args:
        args: Command-line arguments; by default those of the process.

    Raises:
        SystemExit: With status 2 and a one-line message when the input is wrong; with a stage's own status if it fails.
    """
    try:
        run = parse_arguments(args)
        if run.cluster.submit:
            submit_recipe(run)
        else:
            with _notice.awaited() if run.cluster.srun else nullcontext():
                run_recipe(run)
    except InputError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode if error.returncode > 0 else 128 - error.returncode)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the running stage ends as well
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # until it is answered, and when all is done: see retinaface.slurm
    main()
