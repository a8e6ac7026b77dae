"""Weights & Biases as a logger."""

import os
from pathlib import Path
from threading import Thread
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

_SECONDS_TO_SEND = 60


class WandbLogger(LightningWandbLogger):
    """Lightning's, for those without an account too: where nobody is logged in, the run stays on the disk.

    So it does where there is no network when it begins. Either is said, with the command that sends it. The run's id,
    name, group and job type are those in W&B's environment variables, as ``compress.py`` and the cluster's scripts set
    them: the same id goes on with the same run. Only the first process logs.

    Args:
        project: The W&B project.
        entity: The user or team; by default that of ``WANDB_ENTITY``, or the user's own choice.
        save_dir: Holds the folder ``wandb``, with all that W&B writes; by default that of ``WANDB_DIR``, or the current
            folder.
        **options: Further ones of Lightning's logger.
    """

    def __init__(
        self,
        project: str,
        entity: str | None = None,
        save_dir: str | None = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        # A configuration gives None for what it does not name, which would take away Lightning's `resume="allow"`.
        given = {name: value for name, value in {"entity": entity, **options}.items() if value is not None}
        super().__init__(project=project, save_dir=save_dir or os.environ.get("WANDB_DIR", "."), **given)
        self._wandb_init.pop("anonymous", None)  # no longer an option, and W&B warns of it even as None

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is not None:
            return self._experiment
        from retinaface.evaluation import dashboard  # has W&B imported, which takes a second

        folder = Path(self.save_dir or ".")
        dashboard.prepare_wandb(folder)
        if "mode" not in self._wandb_init:
            self._wandb_init["mode"] = "offline" if self._offline else dashboard.run_mode(folder)
        with dashboard.wandb_refusals():
            try:
                return super().experiment
            except Exception as error:
                dashboard.go_offline(error, folder)
            self._wandb_init["mode"] = "offline"
            return super().experiment

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if status == "requeued" and self._experiment is not None:
            # W&B's own process would be ended together with this one. It would wait for minutes for a network that is
            # gone, and the job not be requeued; what is not sent by then is on the disk.
            ending = Thread(target=self._experiment.finish, daemon=True)
            ending.start()
            ending.join(_SECONDS_TO_SEND)
