"""Weights & Biases without Lightning: runs that need no account, models with their lineage, the report."""

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import wandb
from wandb.sdk import wandb_setup

from retinaface.errors import InputError, one_line
from retinaface.evaluation.report_text import kept_share
from retinaface.evaluation.wider_ap import SUBSETS, Curve

# Arguments of wandb.init, and what they are called in the environment.
_ENVIRONMENT = {
    "id": "WANDB_RUN_ID",
    "name": "WANDB_NAME",
    "group": "WANDB_RUN_GROUP",
    "job_type": "WANDB_JOB_TYPE",
    "dir": "WANDB_DIR",
}

# What W&B's own waiting ends with, for a network that is gone or a server in trouble: it tries again for as long as its
# settings say. A wrong key or an unknown project is said at once, in the server's words.
_OUTAGE = re.compile("timed out|deadline exceeded", re.IGNORECASE)

# How long the end of a run waits for the network.
_SECONDS_TO_SEND = 600

# Figures of a model in the report, as they are called there.
_COSTS = ("params", "macs", "onnx_bytes", "convolutions", "int8_convolutions", "latency_ms_median", "speedup")


@contextmanager
def wandb_refusals() -> Iterator[None]:
    """Makes one line of what W&B raises.

    Raises:
        InputError: W&B refuses, for want of a connection or the right to the project.
    """
    try:
        yield
    except wandb.errors.Error as error:
        raise InputError(f"W&B: {error}; log in with `wandb login`, or set WANDB_MODE=offline") from error


def prepare_wandb(folder: Path) -> None:
    """Has W&B keep its copies of files and its logs beside its runs, and a run's end not wait for a network for ever.

    By itself it puts them into the user's home folder, where many clusters leave little room, though a run on the disk
    cannot be sent without them. To be called before W&B is asked for anything; the user's own environment holds.

    Args:
        folder: Where the run's ``wandb`` folder is or will be.
    """
    place = folder.resolve() / "wandb"
    os.environ.setdefault("WANDB_DATA_DIR", str(place / "data"))
    os.environ.setdefault("WANDB_CACHE_DIR", str(place / "cache"))
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(_SECONDS_TO_SEND))


def go_offline(error: Exception, folder: Path) -> None:
    """Makes ready for a run on the disk where one could not begin for want of a network, which is said.

    Args:
        error: What ``wandb.init`` raised.
        folder: Where the run's ``wandb`` folder is.

    Raises:
        Exception: The given one, where it is another: W&B refuses, and no waiting mends that.
    """
    if not isinstance(error, TimeoutError) and not (
        isinstance(error, wandb.errors.CommError) and _OUTAGE.search(str(error))
    ):
        raise error
    wandb.teardown()  # its process would say that a run of this id has begun
    wandb.termwarn(
        f"no connection ({one_line(error)}), so this run stays on this disk. To send it later, after what was made "
        f"before it: {_sending(folder)}"
    )


def _sending(folder: Path) -> str:
    """The command that sends the runs on the disk, in the order in which they were made."""
    return f'for run in {shlex.quote(str(folder.resolve() / "wandb"))}/offline-run-*; do wandb sync "$run"; done'


@wandb_refusals()
def run_mode(folder: Path | None = None) -> Literal["offline"] | None:
    """Where a new run is to go: it stays on the disk if nobody is logged in, which is said, with the remedy.

    Args:
        folder: Where the run's ``wandb`` folder is or will be; by default that of ``WANDB_DIR``, or the current one.

    Returns:
        ``offline`` without a login, or where ``WANDB_MODE`` or W&B's settings say so; None leaves it to W&B.

    Raises:
        InputError: As :func:`wandb_refusals`.
    """
    if wandb.run is not None:  # that one goes on as it began
        return None
    wanted = os.environ.get("WANDB_MODE") or wandb_setup.singleton().settings.mode
    if wanted == "offline":
        return "offline"
    if wanted != "online" or wandb.login(prompt=False, verify=False):
        return None
    wandb.termwarn(
        "nobody is logged in, so runs stay on this disk. To send them, in the order in which they were made: "
        f"wandb login; {_sending(folder or _folder())}",
        repeat=False,
    )
    return "offline"


def _folder() -> Path:
    return Path(os.environ.get("WANDB_DIR", "."))


@wandb_refusals()
def start_run(project: str, **options: Any) -> wandb.Run:  # noqa: ANN401
    """Starts a run, or goes on with the one whose id the environment has.

    Args:
        project: The W&B project.
        **options: Further ones of ``wandb.init``.

    Returns:
        The run, on the disk where nobody is logged in or there is no network.

    Raises:
        InputError: As :func:`wandb_refusals`.
    """
    # W&B reads its environment once in a process, and that may have been before these were set.
    named = {name: os.environ.get(variable) for name, variable in _ENVIRONMENT.items()}
    given = {"project": project, "resume": "allow", **named, **options}
    prepare_wandb(_folder())
    try:
        return wandb.init(mode=run_mode(), **given)
    except Exception as error:
        go_offline(error, _folder())
    return wandb.init(mode="offline", **given)


def model_name(checkpoint: Path) -> str:
    """What the W&B artifact of a checkpoint is called.

    Whoever makes it and whoever uses it know its path, so both find the same name without asking the other.

    Args:
        checkpoint: Such as ``runs/mine/pruned/checkpoints/last.ckpt``.

    Returns:
        Such as ``mine-pruned``: what the path ends with, without what all checkpoints share.
    """
    parts = [part for part in checkpoint.resolve().with_suffix("").parts[1:] if part not in ("checkpoints", "last")]
    return re.sub(r"[^\w.-]", "-", "-".join(parts[-2:])) or "checkpoint"


def log_model(run: wandb.Run, checkpoint: Path, exported: Iterable[Path] = ()) -> None:
    """Sends what a stage ends with: its checkpoint as an artifact, and each ONNX file as another.

    What cannot be sent is said, with how to send it by hand: the stage is done all the same.

    Args:
        run: The stage's.
        checkpoint: It must stay where it is until it is sent, for a run on the disk too.
        exported: ONNX files, which may move.
    """
    with _only_said(f"{checkpoint}: not sent", _by_hand(run, model_name(checkpoint), "model", checkpoint)):
        run.log_artifact(_checkpoint_artifact(checkpoint))
    for file in exported:
        name = f"{model_name(checkpoint)}-{file.name}"
        with _only_said(f"{file}: not sent", _by_hand(run, name, "onnx")):
            artifact = wandb.Artifact(name, type="onnx")
            artifact.add_file(str(file))
            run.log_artifact(artifact)


def use_model(run: wandb.Run, checkpoint: Path) -> None:
    """Notes that a run starts from a checkpoint, so that W&B draws where a model comes from.

    W&B knows an artifact by its name and its content: this one is the one of the stage that made it, and nothing is
    uploaded again. One that no run has made, such as public weights, is uploaded. Where W&B refuses, that is said.

    Args:
        run: The run that uses it.
        checkpoint: A file as given to :func:`log_model`, unchanged.
    """
    with _only_said(f"{checkpoint}: that this run starts from it is not noted"):
        artifact = _checkpoint_artifact(checkpoint)
        if run.offline:
            # use_artifact() insists on a server, though what it would record can be synchronised like everything else.
            run._log_artifact(artifact, aliases=[], is_user_created=True, use_after_commit=True)
        else:
            run.use_artifact(artifact)


@contextmanager
def _only_said(what: str, remedy: str = "") -> Iterator[None]:
    """Makes a warning of whatever W&B raises: its own errors, those of the disk and of its process, of a name."""
    try:
        yield
    except Exception as error:
        wandb.termwarn(f"{what} ({one_line(error) or type(error).__name__}){remedy}")


def _by_hand(run: wandb.Run, name: str, kind: str, file: Path = Path("FILE")) -> str:
    put = ["wandb", "artifact", "put", "--type", kind, "--name", f"{run.project}/{name}", str(file)]
    return f"; to send it later: {shlex.join(put)}"


def _checkpoint_artifact(checkpoint: Path) -> wandb.Artifact:
    artifact = wandb.Artifact(model_name(checkpoint), type="model")
    # Not copied: the file stays, and may be large.
    artifact.add_file(str(checkpoint), name=f"model{checkpoint.suffix}", policy="immutable", skip_cache=True)
    return artifact


def precision_recall_chart(curves: Mapping[str, Curve], points: int = 200) -> Any:  # noqa: ANN401
    """Precision against recall as a chart that shows its figures.

    Args:
        curves: Subset to its curve.
        points: Points per curve at most.

    Returns:
        What a run logs, with a line per subset.
    """
    thinned = [Curve(*(np.asarray(axis)[:: -(-len(axis) // points)] for axis in curve)) for curve in curves.values()]
    return wandb.plot.line_series(
        xs=[curve.recall.tolist() for curve in thinned],
        ys=[curve.precision.tolist() for curve in thinned],
        keys=list(curves),
        title="precision against recall",
        xname="recall",
    )


def send_report(
    folder: Path, report: Mapping[str, Any], checkpoints: Mapping[str, Path], project: str, entity: str | None = None
) -> None:
    """Sends a recipe's report as a run of its own, which uses every model in it.

    The run's group, name and id are those in the environment, as ``compress.py`` sets them.

    Args:
        folder: Where :func:`retinaface.evaluation.report.build_report` wrote it.
        report: What that returned.
        checkpoints: Model name to its checkpoint.
        project: The W&B project.
        entity: The W&B user or team; None for the user's own choice.

    Raises:
        InputError: As :func:`wandb_refusals`.
    """
    with start_run(project, entity=entity) as run:
        for checkpoint in checkpoints.values():
            use_model(run, checkpoint)
        pictures = {path.stem: wandb.Image(str(path)) for path in sorted(folder.glob("*.png"))}
        run.log(
            {
                "report/models": report_as_table(report),
                "report/page": wandb.Html(folder / "report.html"),
                **{f"report/{name}": picture for name, picture in pictures.items()},
            }
        )
        run.summary.update({name: report[name] for name in ("recipe", "retention", "speedup")})
        artifact = wandb.Artifact(f"{folder.name}-report", type="report")
        for suffix in ("html", "md", "json"):
            artifact.add_file(str(folder / f"report.{suffix}"))
        run.log_artifact(artifact)


def report_as_table(report: Mapping[str, Any]) -> wandb.Table:
    """The recipe's result, a row per model, in figures that can be sorted and plotted.

    Args:
        report: Of :func:`retinaface.evaluation.report.build_report`.

    Returns:
        Columns without any figure, such as those of subsets that the photos are not labelled for, are left out.
    """
    models = report["models"]
    rows = [
        {
            "model": model["name"],
            **{f"ap_{subset}": model["ap"][subset] for subset in SUBSETS},
            "kept": kept_share(model, models[0]),
            "agreement": model.get("agreement"),
            **{name: model[name] for name in _COSTS},
        }
        for model in models
    ]
    columns: list[str | int] = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return wandb.Table(columns=columns, data=[[row[str(name)] for name in columns] for row in rows])
