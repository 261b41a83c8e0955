"""Weights & Biases and MLflow, through their own libraries, for who asks for them by report.trackers.

Where they listen, and as whom, is said by the libraries' own environment variables. Without any, nothing goes over the
network: runs are kept as files in the job's report, to be sent later. A tracker that fails is left out with a warning:
no run ends because somebody else's server does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from services.finetune.errors import FailedPrecondition

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}


class Tracker(Protocol):
    """One of them, open for one attempt at a job."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, succeeded: bool) -> None: ...


class _Wandb:
    def __init__(self, job: str, config: Mapping[str, float | str], folder: Path) -> None:
        import wandb

        offline = not os.environ.get("WANDB_API_KEY") and "WANDB_MODE" not in os.environ
        # One run for all attempts at a job.
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "quartet"),
            id=job.replace("/", "."),
            name=job.rpartition("/")[2],
            resume="allow",
            dir=str(folder.parent),  # in which it makes its own
            config=dict(config),
            mode="offline" if offline else None,
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)


class _Mlflow:
    def __init__(self, job: str, config: Mapping[str, float | str], folder: Path) -> None:
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not uri:
            # Its other local store wants a database's libraries, and runs are read from files as well.
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
            uri = folder.absolute().as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "quartet")
        known = self._client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        self._run = self._client.create_run(experiment, run_name=job.rpartition("/")[2], tags={"job": job}).info.run_id
        for key, value in config.items():
            self._client.log_param(self._run, key, value)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self, succeeded: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if succeeded else "FAILED")


class Trackers:
    """All that a run tells its numbers to."""

    def __init__(
        self,
        names: Sequence[str],
        job: str,
        config: Mapping[str, float | str],
        folder: Path,
        warn: Callable[[str], None],
    ) -> None:
        """FailedPrecondition (TRACKER_MISSING) if a library is not installed."""
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        kinds: dict[str, Callable[..., Tracker]] = {"wandb": _Wandb, "mlflow": _Mlflow}
        for name in names:
            (folder / name).mkdir(parents=True, exist_ok=True)
            try:
                self._open[name] = kinds[name](job, config, folder / name)
            except ImportError as error:
                raise FailedPrecondition(
                    f"report.trackers names {name}, which is not installed where the job runs: "
                    f"pip install {PACKAGES[name]}, or leave it out",
                    reason="TRACKER_MISSING",
                    metadata={"tracker": name},
                ) from error
            except Exception as error:  # its library's own, of which there are many kinds
                warn(f"{name} is left out: {error}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, values))

    def close(self, succeeded: bool) -> None:
        self._each(lambda tracker: tracker.close(succeeded))

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                do(tracker)
            except Exception as error:  # as above
                del self._open[name]
                self._warn(f"{name} is left out from here: {error}")
