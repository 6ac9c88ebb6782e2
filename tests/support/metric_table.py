"""A fixture that holds the runs of tests to the table of metrics."""

import re

import pytest

from vlm_distill.losses import REGISTRY
from vlm_distill.runtime.metric_names import describe_metric
from vlm_distill.runtime.tracking import Tracker


def is_known(kind, name):
    """Whether the table has a metric, or it is one of a test's own loss, which measures what it likes."""
    first, slash, _ = name.partition("/")
    ours = re.sub(r"_\d+$", "", first) in {*REGISTRY.entries, "on_policy", "teacher"}
    return describe_metric(kind, name) is not None or bool(slash and not ours)


@pytest.fixture(scope="session", autouse=True)
def metrics_are_in_the_table():
    """Every run in this process writes only metrics that ``runtime/metric_names.py`` describes."""
    log = Tracker.log

    def checked(self, kind, step, values):
        missing = [name for name in values if not is_known(kind, name)]
        assert not missing, f"{kind}: not in the table of metrics, vlm_distill/runtime/metric_names.py: {missing}"
        log(self, kind, step, values)

    Tracker.log = checked
    yield
    Tracker.log = log
