"""Trackers: W&B, MLflow and trackio, with stand-ins for their clients, and with the real ones if they are installed."""

import pictures
import pytest
import tracker_clients

from data.errors import UserError
from vision.config import ClassifierConfig
from vision.trainer import Trainer
from vlm_distill.config.sections import TrackerSection, TrainingSection
from vlm_distill.runtime import trackers
from vlm_distill.runtime.tracking import Tracker

SETTINGS = {"loss": [{"name": "taid"}], "training": {"seed": 1}}


def section(name, **keys):
    return TrackerSection(name=name, project="p", group="g", tags=["a", "b"], **keys)


@pytest.fixture
def clients(monkeypatch):
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    return tracker_clients.install(monkeypatch)


def track(folder, lines, *sections, start=0, steps=4, settings=SETTINGS):
    folder.mkdir(exist_ok=True)
    with Tracker(folder, steps, start, first=True, trackers=sections, settings=settings) as tracker:
        for kind, step in lines:
            tracker.log(kind, step, {"exact": 1.0, "data": "A+B", "n": 2} if kind == "eval" else {"loss": 1.0})


def test_project_group_tags_and_settings_are_passed_on(tmp_path, clients, capsys):
    server = {"wandb": "https://w.test", "mlflow": "http://m.test", "trackio": "me/space"}
    track(tmp_path / "run", [("train", 1)], *(section(name, server=place) for name, place in server.items()))
    (wandb,), (mlflow,), (trackio,) = clients.starts.values()
    expected = {"project": "p", "group": "g", "tags": ["a", "b"], "name": "run", "config": SETTINGS}
    assert {key: wandb[key] for key in expected} == expected
    assert wandb["settings"]["base_url"] == "https://w.test"
    assert mlflow == {"experiment": "p", "run_name": "run"}
    assert clients.tags == {"a": "true", "b": "true", "group": "g"}
    assert clients.parameters == {"loss.0.name": "taid", "training.seed": "1"}
    assert (trackio["project"], trackio["group"], trackio["space_id"]) == ("p", "g", "me/space")
    assert trackio["config"] == SETTINGS | {"tags": ["a", "b"]}
    told = capsys.readouterr().err
    assert "wandb shows the run: https://wandb.test/run" in told
    assert "at http://m.test" in told


def test_a_resumed_run_is_the_same_one_in_each_tracker(tmp_path, clients):
    for folder, start in (("run", 0), ("run", 2), ("other", 0)):
        track(tmp_path / folder, [("train", start + 1)], *map(section, tracker_clients.NAMES), start=start)
    first, resumed, other = (start["id"] for start in clients.starts["wandb"])
    assert first == resumed != other
    assert len(clients.starts["mlflow"]) == 2
    first, resumed, other = clients.starts["trackio"]
    assert first["name"] == resumed["name"] != other["name"]
    assert [first["resume"], resumed["resume"]] == ["never", "allow"]


@pytest.mark.parametrize("name", tracker_clients.NAMES)
def test_what_is_repeated_after_a_crash_is_shown_once(tmp_path, clients, name):
    lines = [("train", 1), ("train", 2), ("eval", 2), ("train", 3)]
    track(tmp_path, lines, section(name))
    track(tmp_path, [("eval", 2), ("train", 3), ("train", 4), ("eval", 4)], section(name), start=2)
    assert [step for step, _ in clients.metrics[name]] == [1, 2, 2, 3, 4, 4]
    curve = "eval/A_B" if name == "mlflow" else "eval/A+B"
    assert clients.metrics[name][-1] == (4, [f"{curve}/exact", f"{curve}/n"])


@pytest.mark.parametrize(
    ("last", "error", "ends"),
    [
        (4, None, [(0,), "FINISHED"]),
        (2, None, [("preempting", 1), "KILLED"]),
        (2, KeyboardInterrupt, [("preempting", 1), "KILLED"]),
        (2, RuntimeError, [(1,), "FAILED"]),
    ],
)
def test_a_run_ends_as_it_did(tmp_path, clients, last, error, ends):
    def run():
        with Tracker(tmp_path, 4, 0, first=True, trackers=map(section, tracker_clients.NAMES), settings={}) as tracker:
            tracker.log("train", last, {"loss": 1.0})
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    assert [clients.ends["wandb"][-1], clients.ends["mlflow"][-1]] == ends
    assert clients.ends["trackio"] == ["finished"]


def test_a_tracker_that_fails_is_left_out_with_a_warning(tmp_path, clients, monkeypatch, capsys):
    def broken(*_):
        raise OSError("the connection\nis lost")

    monkeypatch.setattr(trackers.WandbRun, "log", broken)
    track(tmp_path, [("train", 1), ("train", 2)], section("wandb"), section("mlflow"))
    assert capsys.readouterr().err.count("wandb failed, and is not used any more: the connection is lost") == 1
    assert [step for step, _ in clients.metrics["mlflow"]] == [1, 2]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_tracker_that_cannot_start_ends_those_before_it(tmp_path, clients, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no key\nis configured.")

    monkeypatch.setattr(trackers.WandbRun, "start", refuse)
    with pytest.raises(UserError, match=r"^training.trackers: wandb: no key is configured; .*wandb login.*offline$"):
        track(tmp_path, [], section("mlflow"), section("wandb"))
    assert clients.ends["mlflow"] == ["RUNNING", "FAILED"]


def test_a_tracker_that_is_not_installed_is_a_persons_mistake(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the package mlflow is not installed; install vlm-distill\[mlflow\]"):
        trackers.check_installed([TrackerSection(name="mlflow")])


def test_a_name_alone_is_an_entry():
    found = TrainingSection(steps=1, trackers=["trackio", {"name": "wandb", "mode": "offline"}]).trackers
    assert found == [TrackerSection(name="trackio"), TrackerSection(name="wandb", mode="offline")]


def test_a_classifiers_run_is_shown_with_its_settings(tmp_path, clients, processes):
    pictures.make_images(tmp_path / "images")
    plain = pictures.config(tmp_path / "run", tmp_path / "images", None, training__trackers=["wandb", "mlflow"])
    Trainer.train(ClassifierConfig.model_validate(plain), processes, until=2)
    assert [step for step, _ in clients.metrics["wandb"]] == [1, 2]
    assert clients.parameters["student.name"] == plain["student"]["name"]
    assert clients.ends == {"wandb": [("preempting", 1)], "mlflow": ["RUNNING", "KILLED"], "trackio": []}


# The real clients


def test_wandb_keeps_both_parts_of_a_resumed_run(tmp_path):
    wandb = pytest.importorskip("wandb")
    for start in (0, 2):
        track(tmp_path, [("train", start + 1)], section("wandb", mode="offline"), start=start)
    wandb.teardown()  # its process writes on after `finish`
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert {run.name.rpartition("-")[2] for run in runs} == {(tmp_path / "wandb_id").read_text()}
    assert all(b"train/loss" in next(run.glob("*.wandb")).read_bytes() for run in runs)


def test_mlflow_keeps_one_run(tmp_path):
    tracking = pytest.importorskip("mlflow.tracking")
    server = f"sqlite:///{tmp_path / 'mlflow.db'}"
    settings = SETTINGS | {"long": "x" * 10_000, "data": {str(number): number for number in range(300)}}
    for start in (0, 2):
        track(
            tmp_path / "run",
            [("train", start + 1), ("eval", start + 2)],
            section("mlflow", server=server),
            start=start,
            settings=settings,
        )
    client = tracking.MlflowClient(server)
    (run,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(metric.step for metric in history) == [1, 3]
    assert run.data.metrics["eval/A_B/n"] == 2
    assert (run.info.status, run.data.tags["group"], run.data.tags["a"]) == ("KILLED", "g", "true")
    assert (run.data.params["training.seed"], len(run.data.params)) == ("1", 303)


def test_trackio_keeps_one_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    for start in (0, 2):
        track(tmp_path / "run", [("train", start + 1)], section("trackio"), start=start)
    (run,) = SQLiteStorage.get_runs("p")
    logs = SQLiteStorage.get_logs("p", run)
    assert [(log["step"], log["train/loss"]) for log in logs] == [(1, 1.0), (3, 1.0)]
    assert SQLiteStorage.get_run_config("p", run)["tags"] == ["a", "b"]
    assert capsys.readouterr().out == ""
