"""What the tests of training share."""

from metric_table import metrics_are_in_the_table  # noqa: F401
