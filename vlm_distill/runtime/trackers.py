"""Services that show a run's metrics: Weights & Biases, MLflow and trackio, each through its own client."""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from data.errors import UserError
from vlm_distill.config.differences import flattened
from vlm_distill.config.fields import TrackerName
from vlm_distill.config.sections import TrackerSection

#: How a run ends: at its last step, before it with a checkpoint, or with an error.
Ending = Literal["finished", "stopped", "failed"]

_PROJECT = "vlm-distill"
#: What to do if a tracker cannot start.
_REMEDIES: dict[TrackerName, str] = {
    "wandb": "log in (wandb login), or give this tracker mode: offline",
    "mlflow": "check its server or MLFLOW_TRACKING_URI, and MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    "trackio": "check its server; a Space needs a login (hf auth login), a server TRACKIO_WRITE_TOKEN",
}


class TrackedRun(ABC):
    """A run in a tracker. It keeps its id in the run's folder, so that a resumed run continues as the same one.

    The constructors of subclasses may raise anything that their clients raise.

    Args:
        folder: the run's folder.
        section: its entry of ``training.trackers``.
        settings: the resolved configuration.

    Attributes:
        address: where to look at the run.
    """

    address: str

    def __init__(self, folder: Path, section: TrackerSection, settings: Mapping[str, Any]) -> None:
        self.id_file = folder / f"{section.name}_id"
        self.id = self.id_file.read_text("utf-8").strip() if self.id_file.is_file() else None
        self.start(folder, section, settings)

    def keep(self, identifier: str) -> str:
        """Write the run's id to its folder, and return it."""
        self.id_file.write_text(identifier, "utf-8")
        return identifier

    @abstractmethod
    def start(self, folder: Path, section: TrackerSection, settings: Mapping[str, Any]) -> None:
        """Start the run, or continue it if ``id`` is not ``None``."""

    @abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Show metrics after ``step`` optimizer steps; the client sends them in the background."""

    @abstractmethod
    def finish(self, ending: Ending) -> None:
        """Wait until everything is sent, and end the run."""


class WandbRun(TrackedRun):
    """A run in Weights & Biases."""

    def start(self, folder: Path, section: TrackerSection, settings: Mapping[str, Any]) -> None:
        import wandb as client

        options = {"base_url": section.server} if section.server is not None else {}
        self._run = client.init(
            dir=str(folder),
            id=self.id or self.keep(secrets.token_hex(8)),
            resume="allow",
            reinit="create_new",  # a run that a notebook has open stays open
            project=_project(section, "WANDB_PROJECT"),
            name=section.run or folder.name,
            group=section.group,
            tags=section.tags,
            entity=section.entity,
            mode=section.mode,
            config=dict(settings),
            settings=client.Settings(silent=True, **options),
        )
        self.address = self._where(folder / "wandb")

    def _where(self, folder: Path) -> str:
        # Asked for its URL, a run that is offline prints a warning.
        if self._run.disabled:
            return "nowhere (mode: disabled)"
        return f"{folder}, until wandb sync sends it" if self._run.offline else str(self._run.url)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self, ending: Ending) -> None:
        if ending == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if ending == "finished" else 1)


class MlflowRun(TrackedRun):
    """A run in MLflow. It uses a client of its own, so that a notebook's active run and server stay as they are."""

    _STATUS: Mapping[Ending, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

    def start(self, folder: Path, section: TrackerSection, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param, RunTag
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=section.server)
        self._sent: deque[Any] = deque(maxlen=1000)
        project = _project(section, "MLFLOW_EXPERIMENT_NAME")
        with _few_retries():
            if self.id is None:
                self.id = self.keep(self._create(project, section.run or folder.name))
            known = self._known_parameters()
        self._client.update_run(self.id, status="RUNNING")
        tags = [RunTag(_allowed(name), "true") for name in section.tags]
        if section.group is not None:
            tags.append(RunTag("group", section.group))
        # A parameter cannot change in MLflow: a resumed run adds those that are new.
        parameters = []
        for key, value in flattened(settings).items():
            if value not in ([], (), {}) and _allowed(key) not in known:
                parameters.append(Param(_allowed(key), str(value)))
        self._client.log_batch(self.id, params=parameters, tags=tags)
        self.address = f"experiment {project}, run {self.id}, at {self._client.tracking_uri}"

    def _create(self, project: str, name: str) -> str:
        """Create the run, and its experiment if there is none of that name; return the run's id."""
        experiment = self._client.get_experiment_by_name(project)
        number = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
        return self._client.create_run(number, run_name=name).info.run_id

    def _known_parameters(self) -> set[str]:
        try:
            return set(self._client.get_run(self.id).data.params)
        except Exception as error:
            raise ValueError(f"{error} (remove {self.id_file} to start it as a new run)") from error

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(_allowed(name), value, now, step) for name, value in metrics.items()]
        self._sent.append(self._client.log_batch(self.id, metrics=batch, synchronous=False))

    def finish(self, ending: Ending) -> None:
        for operation in self._sent:
            operation.wait()
        self._client.set_terminated(self.id, self._STATUS[ending])


class TrackioRun(TrackedRun):
    """A run in trackio, which knows runs by their names: the id is a part of the name."""

    def start(self, folder: Path, section: TrackerSection, settings: Mapping[str, Any]) -> None:
        import trackio as client

        project = section.project or _PROJECT
        resumed = self.id is not None
        name = self.id or f"{section.run or folder.name}-{secrets.token_hex(2)}"
        server = section.server
        place = {} if server is None else {"server_url" if "://" in server else "space_id": server}
        with _quietly():
            client.init(
                project,
                name=name,
                group=section.group,
                config={**settings, "tags": section.tags},
                resume="allow" if resumed else "never",
                embed=False,
                **place,
            )
        self._client = client
        self.keep(name)
        self.address = f"{server or 'this machine'} (trackio show --project {project!r}), run {name}"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._client.log(dict(metrics), step=step)

    def finish(self, ending: Ending) -> None:
        with _quietly():
            self._client.finish()


_KINDS: dict[TrackerName, type[TrackedRun]] = {"wandb": WandbRun, "mlflow": MlflowRun, "trackio": TrackioRun}


def check_installed(sections: Sequence[TrackerSection]) -> None:
    """Raise ``UserError`` if the client of a tracker is not installed."""
    for section in sections:
        if find_spec(section.name) is None:
            raise UserError(
                f"training.trackers: the package {section.name} is not installed; install vlm-distill[{section.name}]"
            )


def start_trackers(
    folder: Path, sections: Sequence[TrackerSection], settings: Mapping[str, Any]
) -> dict[TrackerName, TrackedRun]:
    """Start or continue a run in each tracker.

    Raises:
        UserError: one of them cannot start, for example without a key or a network. Those before it are ended.
    """
    started: dict[TrackerName, TrackedRun] = {}
    for section in sections:
        try:
            started[section.name] = _KINDS[section.name](folder, section, settings)
        except Exception as error:  # the clients' own errors, the network's, the service's
            for other in started.values():
                with contextlib.suppress(Exception):
                    other.finish("failed")
            raise UserError(
                f"training.trackers: {section.name}: {in_one_line(error)}; {_REMEDIES[section.name]}"
            ) from error
    return started


def in_one_line(error: Exception) -> str:
    """Return an error's message in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    """Have MLflow's client give up after a quarter of a minute where a server does not answer, not after four."""
    variable = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    if variable in os.environ:
        yield
        return
    os.environ[variable] = "3"
    try:
        yield
    finally:
        del os.environ[variable]


def _project(section: TrackerSection, variable: str) -> str:
    return section.project or os.environ.get(variable) or _PROJECT


def _allowed(name: str) -> str:
    """Return a name with the characters that MLflow allows."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _quietly() -> contextlib.redirect_stdout[io.StringIO]:
    """Suppress what trackio prints: a Python program's output is its own, and the run shows the address itself."""
    return contextlib.redirect_stdout(io.StringIO())
