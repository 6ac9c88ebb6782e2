"""Stand-ins for the clients of trackers, which keep what they are given; the real ones need not be installed."""

import sys
import types
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

NAMES = ("wandb", "mlflow", "trackio")


class Kept:
    """What the clients were given, by tracker: ``starts``, ``metrics`` as (step, names), and ``ends``."""

    def __init__(self):
        self.starts, self.metrics, self.ends = ({name: [] for name in NAMES} for _ in range(3))
        self.tags, self.parameters = {}, {}  # of MLflow


def install(monkeypatch):
    """Put the stand-ins in place of the clients, and return what they keep."""
    kept = Kept()
    for name, contents in {**_wandb(kept), **_mlflow(kept), **_trackio(kept)}.items():
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)  # it is installed
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return kept


def _wandb(kept):
    def start(**given):
        kept.starts["wandb"].append(given)
        ending = []
        return SimpleNamespace(
            offline=False,
            disabled=False,
            url="https://wandb.test/run",
            log=lambda metrics, step: kept.metrics["wandb"].append((step, sorted(metrics))),
            mark_preempting=lambda: ending.append("preempting"),
            finish=lambda exit_code: kept.ends["wandb"].append((*ending, exit_code)),
        )

    return {"wandb": {"init": start, "Settings": lambda **options: options}}


def _mlflow(kept):
    class Client:
        def __init__(self, tracking_uri):
            self.tracking_uri = tracking_uri or "sqlite:///mlflow.db"

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return name

        def create_run(self, experiment, run_name):
            kept.starts["mlflow"].append({"experiment": experiment, "run_name": run_name})
            return SimpleNamespace(info=SimpleNamespace(run_id=f"id{len(kept.starts['mlflow'])}"))

        def get_run(self, run):
            return SimpleNamespace(data=SimpleNamespace(params=kept.parameters))

        def update_run(self, run, status):
            kept.ends["mlflow"].append(status)

        def log_batch(self, run, metrics=(), params=(), tags=(), synchronous=True):
            kept.parameters |= params
            kept.tags |= tags
            if metrics:
                kept.metrics["mlflow"].append((metrics[0][3], sorted(metric[0] for metric in metrics)))
            return SimpleNamespace(wait=lambda: None)

        def set_terminated(self, run, status):
            kept.ends["mlflow"].append(status)

    def pair(*parts):
        return parts

    entities = {"Metric": pair, "Param": pair, "RunTag": pair}
    return {"mlflow": {}, "mlflow.entities": entities, "mlflow.tracking": {"MlflowClient": Client}}


def _trackio(kept):
    def start(project, **given):
        kept.starts["trackio"].append({"project": project, **given})

    def log(metrics, step):
        kept.metrics["trackio"].append((step, sorted(metrics)))

    def finish():
        kept.ends["trackio"].append("finished")

    return {"trackio": {"init": start, "log": log, "finish": finish}}
