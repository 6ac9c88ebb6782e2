"""The table of metrics: complete, and each entry says what it is."""

import pytest
from metric_table import metrics_are_in_the_table  # noqa: F401

from vision.losses import REGISTRY as CLASSIFIER_LOSSES
from vlm_distill.losses import REGISTRY
from vlm_distill.runtime.metric_names import METRICS, describe_metric
from vlm_distill.runtime.tracking import Tracker


@pytest.mark.parametrize(
    ("kind", "name"), [("train", "loss"), ("train", "taid_2/t"), ("train", "teacher/A+B/jsd"), ("eval", "score")]
)
def test_a_metric_is_found_by_its_name(kind, name):
    assert describe_metric(kind, name).meaning


@pytest.mark.parametrize(
    ("kind", "name"), [("train", "score"), ("eval", "loss"), ("train", "taid/"), ("train", "a/b/t")]
)
def test_what_is_no_metric_is_not_found(kind, name):
    assert describe_metric(kind, name) is None


@pytest.mark.parametrize("registry", [REGISTRY, CLASSIFIER_LOSSES], ids=["vlm", "vision"])
def test_what_losses_measure_is_in_the_table(registry):
    signals = [entry.load().signals for entry in registry.entries.values()]
    measured = {name for names in signals if isinstance(names, tuple) for name in names}
    assert [signal for signal in measured if describe_metric("train", f"x/{signal}") is None] == []
    assert measured


def test_meanings_are_sentences():
    metrics = [metric for groups in METRICS.values() for group in groups.values() for metric in group]
    assert [metric.name for metric in metrics if not metric.meaning.endswith(".")] == []
    assert len(metrics) == len({(kind, m.name) for kind in METRICS for g in METRICS[kind].values() for m in g})


def test_a_run_in_the_tests_that_writes_another_metric_fails(tmp_path):
    with Tracker(tmp_path, 1, 0, first=True, settings={}) as tracker:
        tracker.log("train", 1, {"loss": 1.0, "my_loss/anything": 2.0})
        with pytest.raises(AssertionError, match=r"train: not in .* \['speed'\]"):
            tracker.log("train", 1, {"speed": 1.0})
