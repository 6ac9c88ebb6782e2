"""Mix sources: the samples of optimizer step ``s`` are a pure function of the seed and ``s``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from .batch import SampleId
from .errors import UserError


class Mixable(Protocol):
    """What mixing needs of a source; the samples themselves are not looked at."""

    @property
    def name(self) -> str: ...
    def __len__(self) -> int: ...
    def size(self, index: int, /) -> int:
        """Estimate a sample's length, for grouping by length."""
        ...


S = TypeVar("S", bound=Mixable)

#: How many evenly spaced samples are sized to find the longest; sizing one can take 0.1 ms.
LOOKED_AT = 20_000


class Mixture(Generic[S]):
    """Several sources as one endless, weighted, shuffled and reproducible order of batches.

    Each source is an endless stream of its shuffled passes, and each epoch consumes the next ``weight × len(source)``
    samples of that stream: with weight 1 each sample once an epoch, with 2 twice, with 0.5 one half and the other
    half in the next epoch. (If a pass is not a multiple of an epoch's share, an epoch may span two passes.) What an
    epoch takes of all sources is shuffled together and cut into batches. The last batch of an epoch may be smaller;
    no sample is dropped.

    With ``window`` > 0, the samples of each ``window`` consecutive batches are sorted by length and cut into batches
    of similar length, and these are shuffled: less padding, in an order that is still random beyond the window.

    With ``longest_first``, the first epoch's first batch changes places with the one that holds the longest sample, as
    estimated by ``size``: if memory does not suffice, the run fails at once.

    Args:
        sources: what to mix; each needs a name of its own.
        weights: passes over each source per epoch; 1 for each by default.
        seed: of every shuffle, not negative.
        batch_size: samples of an optimizer step, over all ranks and micro-batches.
        window: batches within which samples are grouped by length; 0 for no grouping.
        longest_first: whether the first epoch begins with the batch of its longest sample.

    Raises:
        UserError: a weight is not positive, or weights and sources do not match.
    """

    def __init__(
        self,
        sources: Sequence[S],
        weights: Sequence[float] | None = None,
        seed: int = 0,
        *,
        batch_size: int,
        window: int = 0,
        longest_first: bool = False,
    ) -> None:
        weights = [1.0] * len(sources) if weights is None else weights
        if not sources or len(weights) != len(sources):
            raise UserError(f"{len(sources)} data sources and {len(weights)} weights; give one weight to each source")
        names = [source.name for source in sources]
        for source, weight in zip(sources, weights, strict=True):
            if not (weight > 0 and math.isfinite(weight)):
                raise UserError(f"weight of data source {source.name} is {weight}; it must be greater than 0")
            if names.count(source.name) > 1:
                raise UserError(f"two data sources are called {source.name}; give one of them another `name`")
        if batch_size < 1 or window < 0 or seed < 0:
            raise UserError(f"batch size {batch_size}, window {window}, seed {seed}: at least 1, 0 and 0 are needed")
        self.sources = list(sources)
        self.seed = seed
        self.batch_size = batch_size
        self.window = window
        self._shares = [max(1, round(weight * len(s))) for s, weight in zip(sources, weights, strict=True)]
        #: The number of each source's first sample, when samples are numbered through all sources.
        self._first = np.cumsum([0, *map(len, sources)])
        self._epoch: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))
        self._window: tuple[int, int, list[NDArray[np.int64]]] = (-1, -1, [])
        # Computed here, so that worker processes inherit it.
        self._longest = self._find_longest() if longest_first else 0

    @property
    def epoch_samples(self) -> int:
        """The number of samples in an epoch, the same in every epoch."""
        return sum(self._shares)

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches in an epoch, the smaller last one included."""
        return math.ceil(self.epoch_samples / self.batch_size)

    def samples_of(self, step: int) -> list[SampleId]:
        """Return the samples of optimizer step ``step``, counted from 0 through all epochs.

        Example: ``a`` has 4 samples and weight 1, ``b`` has 2 and weight 2, so that an epoch takes 8 samples: each of
        ``a`` once and each of ``b`` twice. With a batch size of 3 it has 3 steps, the last one smaller. Each sample is
        (number of the source, index in the source)::

            mixture = Mixture([a, b], [1, 2], seed=0, batch_size=3)
            mixture.samples_of(0)   # [(1, 1), (0, 2), (1, 0)]
            mixture.samples_of(1)   # [(0, 1), (1, 0), (0, 3)]
            mixture.samples_of(2)   # [(0, 0), (1, 1)]
            mixture.samples_of(3)   # [(0, 3), (1, 1), (1, 1)], the second epoch
        """
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch == 0 and batch in (0, self._longest):
            batch = self._longest - batch
        return [self._sample_id(number) for number in self._batch(epoch, batch).tolist()]

    def _batch(self, epoch: int, batch: int) -> NDArray[np.int64]:
        if self.window:
            window, within = divmod(batch, self.window)
            return self._grouped(epoch, window)[within]
        return self._order(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _find_longest(self) -> int:
        """Return the first epoch's batch with the longest sample. A smaller last batch is not considered: it stays."""
        whole = self.epoch_samples // self.batch_size * self.batch_size
        if not whole:
            return 0
        numbers = self._order(0)[:whole]
        looked_at = np.unique(np.linspace(0, whole - 1, min(whole, LOOKED_AT)).astype(np.int64))
        batch = int(looked_at[np.argmax(self._sizes(numbers[looked_at]))]) // self.batch_size
        if not self.window:
            return batch
        # Grouping by length has put the longest samples of its window into another batch.
        window = batch // self.window
        full = [numbers for numbers in self._grouped(0, window) if len(numbers) == self.batch_size]
        return window * self.window + int(np.argmax([self._sizes(numbers).max() for numbers in full]))

    def _sizes(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the estimated lengths of samples numbered through all sources."""
        return np.array([self.sources[source].size(index) for source, index in map(self._sample_id, numbers.tolist())])

    def _sample_id(self, number: int) -> SampleId:
        source = int(np.searchsorted(self._first, number, side="right")) - 1
        return source, number - int(self._first[source])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return all samples of an epoch in order, numbered through all sources. The latest epoch is kept."""
        if self._epoch[0] != epoch:
            taken = [self._first[i] + self._share_of(i, epoch) for i in range(len(self.sources))]
            order = np.concatenate(taken)[self._random(0, epoch).permutation(self.epoch_samples)]
            self._epoch = (epoch, order)
        return self._epoch[1]

    def _share_of(self, source: int, epoch: int) -> NDArray[np.int64]:
        """Return an epoch's share of a source's endless stream of shuffled passes."""
        share, length = self._shares[source], len(self.sources[source])
        start = epoch * share
        passes = range(start // length, math.ceil((start + share) / length))
        stream = np.concatenate([self._random(1, source, p).permutation(length) for p in passes])
        start -= passes.start * length
        return stream[start : start + share]

    def _grouped(self, epoch: int, window: int) -> list[NDArray[np.int64]]:
        """Return the batches of one window, each of samples of similar length. The latest window is kept."""
        if self._window[:2] != (epoch, window):
            span = self.window * self.batch_size
            numbers = self._order(epoch)[window * span : (window + 1) * span]
            numbers = numbers[np.argsort(self._sizes(numbers), kind="stable")]
            batches = [numbers[i : i + self.batch_size] for i in range(0, len(numbers), self.batch_size)]
            # A smaller batch stays the last of its epoch.
            full = len(numbers) // self.batch_size
            order = [*self._random(2, epoch, window).permutation(full), *range(full, len(batches))]
            self._window = (epoch, window, [batches[i] for i in order])
        return self._window[2]

    def _random(self, *key: int) -> np.random.RandomState:
        # Not `default_rng`: only RandomState is guaranteed the same stream in every version of NumPy, and a training
        # that is resumed after an upgrade must find its order again.
        return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, *key])))
