"""Try the first rows of the data before the first step, so that a run does not start on data that it cannot use."""

from __future__ import annotations

from itertools import chain, islice
from typing import Any

from data.errors import BadSample
from data.loader import problem_of

from .intake import FIRST_ROWS, FirstRows


def try_rows(dataset: Any, start: int, stop: int) -> FirstRows:
    """Encode the first rows of the steps ``start`` to ``stop - 1``, and return what came of it."""
    found, mixture = FirstRows(), dataset.mixture
    rows = chain.from_iterable(mixture.samples_of(step) for step in range(start, stop))
    for source, row in islice(rows, min(FIRST_ROWS, mixture.epoch_samples)):
        found.tried += 1
        try:
            images, apart = dataset.try_sample((source, row))
        except BadSample as bad:
            found.problems.append(problem_of(mixture.sources[source], row, bad, "skip"))
            continue
        found.images += images
        found.apart += apart
        found.rows_apart += apart > 0
    for source in mixture.sources:
        keys = getattr(source, "not_read", None)
        if keys:
            found.not_read[source.name] = keys
    return found
