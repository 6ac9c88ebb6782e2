"""Try the first samples of the data before the first step, so that a run does not start on data that it cannot use."""

from __future__ import annotations

from itertools import chain, islice
from typing import Any

from data.errors import BadSample
from data.loader import problem_of

from .intake import FIRST_SAMPLES, FirstSamples


def try_samples(dataset: Any, start: int, stop: int) -> FirstSamples:
    """Encode the first samples of the steps ``start`` to ``stop - 1``, and return what came of it."""
    found, mixture = FirstSamples(), dataset.mixture
    samples = chain.from_iterable(mixture.samples_of(step) for step in range(start, stop))
    for source, row in islice(samples, min(FIRST_SAMPLES, mixture.epoch_samples)):
        found.tried += 1
        try:
            images, apart = dataset.try_sample((source, row))
        except BadSample as bad:
            found.problems.append(problem_of(mixture.sources[source], row, bad, "skip"))
            continue
        found.images += images
        found.apart += apart
        found.samples_apart += apart > 0
    for source in mixture.sources:
        keys = getattr(source, "not_read", None)
        if keys:
            found.not_read[source.name] = keys
    return found
