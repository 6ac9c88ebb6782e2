"""Runs that are killed anywhere, told to stop, or cannot write: started again they equal the uninterrupted run."""

import json
import random

import pytest
import tiny
import yaml
from forks import Forks

from vlm_distill.training import checkpoint

STEPS = 8
RUN = "vlm_distill.train"


@pytest.fixture(scope="module")
def forks():
    server = Forks()
    yield server
    server.close()


class Runs:
    """Runs of one training, each in a folder of its own."""

    def __init__(self, folder, forks):
        self.folder, self.forks = folder, forks
        self.data = tiny.write_data(folder / "data", text_only=(3, 4), broken=(9,))
        self.teacher = tiny.write_teacher(folder / "teacher")
        self.made = {}

    def config(self, name, **changes):
        plain = tiny.config(
            self.folder / name,
            self.data,
            self.teacher,
            **{
                "training__steps": STEPS,
                "training__checkpoint_every": 2,
                "training__keep_checkpoints": 1,
                "deepspeed__stage": 2,
                "data__eval": [{"path": str(self.data), "name": "questions", "limit": 6}],
                "evaluation__every": 3,
                "evaluation__best": "questions",
                "evaluation__teacher": False,
                "loss": [{"name": "taid", "t_start": 0.2, "alpha": 0.05, "schedule": "paper"}],
                **changes,
            },
        )
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(plain))
        return path

    def straight(self, ranks, **changes):
        """The uninterrupted run's folder."""
        name = f"straight{ranks}_{'_'.join(changes)}"
        if name not in self.made:
            codes, told = self.forks(RUN, self.config(name, **changes), ranks)
            assert not any(codes), told
            self.made[name] = self.folder / name
        return self.made[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, forks):
    return Runs(tmp_path_factory.mktemp("crash"), forks)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def story(out):
    told = [{k: v for k, v in line.items() if k not in tiny.TIMES} for line in lines(out / "metrics.jsonl")]
    return told, lines(out / "problems.jsonl") if (out / "problems.jsonl").exists() else []


def assert_same(out, straight):
    metrics, problems = story(out)
    assert [line["step"] for line in metrics if line["kind"] == "train"] == list(range(1, STEPS + 1))
    assert (metrics, problems) == story(straight)
    for model in ("student", "best"):
        if (straight / model).exists():
            assert (out / model / "model.safetensors").read_bytes() == (
                straight / model / "model.safetensors"
            ).read_bytes()
    assert not list(out.rglob("*.unfinished"))


# In this order: checkpoints are at steps 2, 3, 4, 6 and 8, evaluations after 3, 6 and 8, one improves on the first.
KILLS = (
    "log:2",
    "best:1",
    "checkpoint.begin:2",
    "checkpoint.file:2",
    "checkpoint.rename:1",
    "checkpoint.prune:1",
    "checkpoint.prune:1",  # after step 6, and again after step 8, where no checkpoint follows
    "student:1",
)


@pytest.mark.parametrize("kills", [KILLS[3:5], pytest.param(KILLS, marks=pytest.mark.slow)], ids=["two", "all"])
def test_killed_at_every_point_on_one_rank(runs, forks, kills):
    name = f"killed{len(kills)}"
    config = runs.config(name)
    # One run dies of everything, one after the other; each time it has got a little further or begun anew.
    for fault in kills:
        codes, told = forks(RUN, config, fault=fault)
        assert codes == [-9], (fault, told)
    codes, told = forks(RUN, config)
    assert codes == [0], told
    assert_same(runs.folder / name, runs.straight(1))


def test_a_finished_run_started_again_changes_nothing(runs, forks):
    straight = runs.straight(1)
    before = story(straight)
    codes, told = forks(RUN, runs.folder / f"{straight.name}.yaml")
    assert codes == [0], told
    assert story(straight) == before


def test_checkpoints_of_another_run_are_not_resumed(runs, forks):
    config, out = runs.config("linked"), runs.folder / "linked"
    out.mkdir()
    (out / "checkpoints").symlink_to(runs.straight(1) / "checkpoints")
    codes, told = forks(RUN, config)
    assert codes == [2], told
    assert f"{out / 'checkpoints'}: leads out of the run's folder" in told


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_killed_between_two_ranks_writes(runs, forks, victim):
    config = runs.config(f"killed_rank{victim}")
    for fault in ("checkpoint.file:3", "checkpoint.file:4") if victim == 0 else ("checkpoint.file:2",):
        codes, told = forks(RUN, config, 2, fault=f"{fault}:{victim}")
        assert codes[victim] == -9, told
    codes, told = forks(RUN, config, 2)
    assert codes == [0, 0], told
    assert_same(runs.folder / f"killed_rank{victim}", runs.straight(2))


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 30))])
def test_killed_at_random_moments(runs, forks, seed):
    chance, ranks = random.Random(seed), 1 + seed % 2
    config, out = runs.config(f"random{seed}"), runs.folder / f"random{seed}"
    for _ in range(1 if seed < 5 else 2):
        saved = checkpoint.completed(out / "checkpoints")
        done = saved[-1][0] if saved else 0
        step = chance.randint(done, STEPS)
        # What a run tells after each step, and at first; a delay has room for a step or two.
        begun = f"step {step}/{STEPS} " if step > done else "student: "
        _, told = forks(RUN, config, ranks, after=begun, delay=chance.uniform(0.0, 0.2))
        assert begun in told
    codes, told = forks(RUN, config, ranks)
    assert not any(codes), told
    assert_same(out, runs.straight(ranks))


def losses(out):
    return [line["loss"] for line in lines(out / "metrics.jsonl") if line["kind"] == "train"]


slow = pytest.mark.slow
BF16 = {"training__dtype": "bf16"}
TIED = {"student": tiny.settings(tied=True)}


@pytest.mark.parametrize(
    ("before", "after", "changes"),
    [
        ((2, 2), (1, 2), {}),
        pytest.param((2, 3), (1, 3), TIED, marks=slow),
        pytest.param((1, 2), (2, 3), {}, marks=slow),
        pytest.param((1, 3), (1, 2), {}, marks=slow),
        pytest.param((2, 3), (1, 3), {}, marks=slow),
        pytest.param((1, 0), (1, 2), {}, marks=slow),
        pytest.param((2, 3), (1, 0), {}, marks=slow),
        pytest.param((2, 0), (1, 0), {}, marks=slow),
        pytest.param((2, 1), (1, 3), {}, marks=slow),
        pytest.param((1, 1), (1, 2), {}, marks=slow),
        pytest.param((2, 2), (1, 3), BF16, marks=slow),
        pytest.param((2, 3), (1, 1), BF16, marks=slow),
    ],
)
def test_resumed_on_other_ranks_and_stages(runs, forks, before, after, changes):
    name = f"moved_{before}_{after}_{'_'.join(changes)}".replace(" ", "")
    sharded = {"deepspeed__zero_optimization": {"stage3_param_persistence_threshold": 0}}
    plain = {"evaluation__every": None, "evaluation__best": None, "training__checkpoint_every": 4, **changes}
    (ranks, stage), (more, other) = before, after
    config = runs.config(name, deepspeed__stage=stage, **plain, **sharded)
    codes, told = forks(RUN, config, ranks, fault="log:6")
    assert -9 in codes, told
    assert (runs.folder / name / "checkpoints" / "step_4").is_dir()
    config = runs.config(name, deepspeed__stage=other, **plain, **sharded)
    codes, told = forks(RUN, config, more)
    assert not any(codes), told
    assert "resumed after step 4" in told
    expected = losses(runs.straight(1, **changes))
    # Other ranks round sums differently, in bf16 coarsely.
    tolerance = {"rel": 2e-2} if changes is BF16 else {"abs": 1e-6, "rel": 0}
    assert losses(runs.folder / name) == pytest.approx(expected, **tolerance)


def test_told_to_stop_one_rank_stops_all(runs, forks):
    config = runs.config("stopped")
    # One rank alone in an evaluation, then in a step; then all while they evaluate.
    for asked in (
        {"fault": "evaluate:1:1:SIGTERM"},
        {"after": "step 4/8", "number": "SIGTERM", "to": [0]},
        {"fault": "evaluate:1::SIGTERM"},
    ):
        codes, told = forks(RUN, config, 2, **asked)
        assert codes == [143, 143], told
        assert "stopping: " in told
        assert "start the run again to continue" in told
        assert not (runs.folder / "stopped" / "summary.json").exists()
    codes, told = forks(RUN, config, 2)
    assert codes == [0, 0], told
    assert_same(runs.folder / "stopped", runs.straight(2))


@pytest.mark.parametrize("rank", [pytest.param(0, marks=slow), 1])
def test_a_full_disk_ends_all_ranks_and_leaves_the_checkpoint_before(runs, forks, rank):
    name = f"full{rank}"
    config, out = runs.config(name, evaluation__every=None, evaluation__best=None), runs.folder / name
    forks(RUN, config, 2, fault="log:3:0")
    codes, told = forks(RUN, config, 2, limit=40_000, to=(rank,))
    # The one that is not first to end is killed, if it has not ended by itself.
    assert 2 in codes, told
    assert set(codes) <= {2, -9}, told
    assert "the checkpoint of step 4 could not be written (the one before took " in told
    assert "file too large" in told
    assert "continues from step 2" in told
    assert "Traceback" not in told
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_2"]


def test_metrics_on_a_full_disk_end_the_run_in_one_line(runs, forks):
    plain = {
        "evaluation__every": None,
        "evaluation__best": None,
        "training__checkpoint_every": 100,
        "training__steps": 40,
    }
    config, out = runs.config("full_metrics", **plain), runs.folder / "full_metrics"
    codes, told = forks(RUN, config, limit=8_000)
    assert codes == [2], told
    assert f"{out / 'metrics.jsonl'}: file too large" in told
    assert "Traceback" not in told
