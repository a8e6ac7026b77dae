"""What this project asks of a SLURM cluster: jobs in a chain, training processes in a job, a job's second start."""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from retinaface.errors import InputError

SAVED = os.EX_TEMPFAIL
"""Exit status of a training that saved its state because its time was over, and is to go on from there later."""


@dataclass
class Cluster:
    """Where stages run, which changes nothing about what they do.

    Attributes:
        submit: The cluster's system, if jobs are to be submitted instead of running here.
        partition: Where the jobs run; the cluster's default without it.
        gpus: GPUs per node, each with a training process.
        time: Time limit of a job, in the words of ``sbatch``; a training that reaches it goes on in the queue.
        sbatch: More options of ``sbatch``.
        only: The stage to run, or ``report``: what a job does.
        srun: Whether this is a job, so that srun starts the training processes.
    """

    submit: str | None = None
    partition: str | None = None
    gpus: int | None = None
    time: str | None = None
    sbatch: str | None = None
    only: str | None = None
    srun: bool = False

    def options(self) -> list[str]:
        """What ``sbatch`` is told for every job.

        Raises:
            InputError: A quote in ``sbatch`` is not closed.
        """
        given = {"partition": self.partition, "time": self.time}
        if self.gpus:
            given |= {"gpus-per-node": str(self.gpus), "ntasks-per-node": str(self.gpus)}
        try:
            more = shlex.split(self.sbatch or "")
        except ValueError as error:
            raise InputError(f"--sbatch {self.sbatch}: {error}; expected options as sbatch takes them") from error
        return [*(f"--{name}={value}" for name, value in given.items() if value is not None), *more]


def cluster_parser() -> argparse.ArgumentParser:
    """The options of :class:`Cluster`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("cluster")
    group.add_argument("--submit", choices=["slurm"], help="submit a job per stage, and one for the report")
    group.add_argument("--partition", help="of the jobs")
    group.add_argument("--gpus", type=int, metavar="N", help="GPUs per node, each with a training process")
    group.add_argument("--time", help="limit per job, such as 8:00:00; a training that reaches it is queued again")
    group.add_argument("--sbatch", metavar="OPTIONS", help="more, in quotes: --sbatch='--account=x --nodes=2'")
    group.add_argument("--only", metavar="STAGE", help="run this stage alone, or report: what a job does")
    group.add_argument("--srun", action="store_true", help="in a job: start training with srun, a process per task")
    return parser


def read_cluster(arguments: list[str]) -> tuple[Cluster, list[str]]:
    """What a command line says of the cluster, and the rest of the command line.

    Raises:
        InputError: Options contradict each other.
    """
    values, words = cluster_parser().parse_known_args(arguments)
    cluster = Cluster(**vars(values))
    if cluster.submit is None and cluster.options():
        raise InputError("--partition, --gpus, --time and --sbatch are for jobs; add --submit slurm")
    if cluster.submit is not None and (cluster.only is not None or cluster.srun):
        raise InputError("--submit slurm: makes jobs of all that is not done; leave --only and --srun to the jobs")
    return cluster, words


def submit_job(
    script: Path,
    arguments: Sequence[str],
    options: Sequence[str] = (),
    after: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Submits a batch script.

    Args:
        script: The script; its own ``#SBATCH`` lines give way to ``options``.
        arguments: What the script is called with.
        options: Options of ``sbatch``; of two that contradict each other the later one holds.
        after: A job that has to succeed before; if it fails, this one is cancelled.
        environment: Environment variables for the job, beside those of this process.

    Returns:
        The job's number.

    Raises:
        InputError: There is no SLURM here, or it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise InputError("--submit slurm: there is no sbatch here; submit on a machine of the cluster, or leave it out")
    # Two jobs of one name never run at once: submitted twice, a stage must not train twice in one folder.
    waiting = ["--dependency=singleton"]
    if after is not None:  # without the first, jobs behind a failed one would wait for ever
        waiting = ["--kill-on-invalid-dep=yes", f"--dependency=singleton,afterok:{after}"]
    command = ["sbatch", "--parsable", *options, *waiting, str(script), *arguments]
    result = subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise InputError(f"--submit slurm: {result.stderr.strip() or f'sbatch ended with {result.returncode}'}")
    return result.stdout.strip().partition(";")[0]  # the cluster's name may follow


def cancel_jobs(jobs: Sequence[str]) -> None:
    """Cancels jobs; those that have ended are left alone."""
    if jobs:
        subprocess.run(["scancel", *jobs], check=False)


def as_step(command: Sequence[str]) -> list[str]:
    """A training command as a step of the job that this process is in: once per task.

    Args:
        command: ``python train.py fit ...`` with ``configs/slurm/slurm.yaml`` among its configurations.

    Raises:
        InputError: This is no job, or it does not say how many tasks a node has.
    """
    try:
        nodes, tasks = os.environ["SLURM_NNODES"], os.environ["SLURM_NTASKS_PER_NODE"]
    except KeyError as error:
        raise InputError(
            f"{error.args[0]} is not set; --srun belongs into a job that was submitted with --ntasks-per-node"
        ) from error
    # One process that fails would leave the others waiting for it. A job that was submitted with another --export than
    # ALL would hand that on.
    srun = ["srun", "--kill-on-bad-exit=1", "--export=ALL"]
    return [*srun, *command, f"--trainer.num_nodes={nodes}", f"--trainer.devices={tasks}"]


def job_id() -> str:
    """The number of the job that this process is in; of an array job with the task's: ``12_3``.

    It stays the same when the job starts again.
    """
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def is_preempted() -> bool:
    """Whether the job that this process is in still runs, for the time of grace before the cluster takes its place.

    A job that ends by itself within that time has failed: the cluster would neither start it again, nor the jobs behind
    it at all.
    """
    state, time = _state_and_time_of_preemption()
    return state == "RUNNING" and time != "N/A"


def is_running() -> bool:
    """Whether the job that this process is in is neither being ended by the cluster, nor in the queue again already."""
    return _state_and_time_of_preemption()[0] == "RUNNING"


def _state_and_time_of_preemption() -> tuple[str, str]:
    command = ["squeue", "--noheader", f"--jobs={job_id()}", "--Format=State,PreemptTime"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no squeue on this machine
        return "", ""
    state, _, time = result.stdout.strip().partition(" ")
    return state, time.strip()


def requeue_job() -> bool:
    """Ends the job that this process is in, and has it start again later.

    Returns:
        Whether the cluster agreed.
    """
    try:
        # The end of the job may reach the program that asked for it before it is done: a negative status.
        return subprocess.run(["scontrol", "requeue", job_id()], check=False).returncode <= 0
    except OSError:  # no scontrol on this machine
        return False


def is_first_step() -> bool:
    """Whether this process is in the first step that its job runs since it has started, the last time."""
    return os.environ.get("SLURM_STEP_ID", "0") == "0"


def start_again(progress: bool) -> str | None:
    """Ends the job that this process is in, and has it start again later, once more only if that leads further.

    What cannot be interrupted, and takes longer than the time limit, would otherwise begin anew for ever.

    Args:
        progress: Whether the job has done something, since it has started, that it need not do again.

    Returns:
        Why it does not start again; None if it does.
    """
    if not progress and os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and not is_preempted():
        return (
            "the job had started again and came no further: the time limit is too short for what must be done in one "
            "go; submit it again with a longer one (--time)"
        )
    if not requeue_job():
        return "the cluster did not take the job back; submit it again, and it goes on from there"
    return None


class Notice:
    """Answers SIGUSR2, by which the cluster says that the time of a job is nearly over: it starts again, later.

    For the program that the batch script becomes, which alone gets the signal (``#SBATCH --signal=B:USR2@300``). While
    a training runs as a step of the job, that is told, as it saves before it has the job start again.

    Args:
        say: Shows a line to the user.

    Attributes:
        given: Whether the signal has come.
        progress: Whether the job has finished a step since it has started.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.given = self.progress = False
        self._say = say
        self._step: subprocess.Popen[bytes] | None = None

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """A context in which the signal is answered."""
        self.given = self.progress = False
        before = signal.signal(signal.SIGUSR2, self._answer)
        try:
            yield
        finally:
            signal.signal(signal.SIGUSR2, before)

    @contextmanager
    def handed_on_to(self, step: subprocess.Popen[bytes]) -> Iterator[None]:
        """A context in which the answer is left to ``srun``, which hands the signal on to the processes of its step."""
        self._step = step
        try:
            yield
        finally:
            self._step = None

    def requeue(self) -> None:
        """Has the job start again, or says why it does not; then it goes on for as long as the cluster lets it."""
        why_not = start_again(self.progress)
        self._say(f"the time is over: {why_not or 'the job starts again, and goes on here'}")

    def _answer(self, *_: object) -> None:
        self.given = True
        if self._step is None:
            self.requeue()
        else:
            self._step.send_signal(signal.SIGUSR2)
