"""The line beside the progress bar, and which numbers count as finite."""

import math

import pytest

from vlm_distill.training.intake import SampleTally
from vlm_distill.training.step_metrics import finite_norm, headline, not_finite_terms

VALUES = {"loss": 1.23456, "taid/loss": 2.0, "taid/t": 0.4, "waiting": 0.0116, "tokens_per_second": 10_278.0}


def test_the_headline_is_short_and_has_units():
    assert headline(VALUES, "tokens_per_second", SampleTally()) == "loss 1.235  t 0.4  data wait 1.2%  10.3k tok/s"


def test_the_headline_names_rows_left_out_and_empty_steps():
    values = {"waiting": 0.0, "images_per_second": 999.7}
    text = headline(values, "images_per_second", SampleTally(samples=40, left_out=7, empty_steps=2))
    assert text == "data wait 0.0%  1k images/s  left out 17.5%  empty steps 2"


@pytest.mark.parametrize(("norm", "finite"), [(None, True), (0.0, True), (2.5, True), (-1.0, False), (math.nan, False)])
def test_a_norm_that_is_not_finite_is_recognised(norm, finite):
    assert finite_norm(norm) is finite


def test_terms_that_are_not_finite_are_named():
    assert not_finite_terms({"a": {"loss": 1.0}, "b": {"loss": math.inf}, "c": {"loss": math.nan}}) == ["b", "c"]
