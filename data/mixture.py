"""The order of a training: the rows that make up optimizer step ``s``, a pure function of seed and ``s``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import UserError


class Rows(Protocol):
    """What a source needs to be mixed; its samples are nobody's business here."""

    @property
    def name(self) -> str: ...
    def __len__(self) -> int: ...
    def size(self, index: int, /) -> int:
        """About how long a sample is, for grouping by length."""
        ...


S = TypeVar("S", bound=Rows)

#: Rows, evenly spaced over the epoch, of which the longest is looked for: of some sources each takes a tenth of a
#: millisecond.
LOOKED_AT = 20_000


class Mixture(Generic[S]):
    """Several sources as one endless, weighted, shuffled and repeatable order of batches.

    Each source is dealt from its own endless stream of shuffles, pass after pass: an epoch takes the next
    ``weight × rows`` of it. Weight 1 gives each row once an epoch, 2 twice, and 0.5 one half and in the next epoch the
    other. (Where rows are not a multiple of an epoch's share, an epoch may span the end of one shuffle and the start of
    the next.) What an epoch takes of all sources is shuffled together and cut into batches; the last batch of an epoch
    may be smaller, and no row is dropped.

    With ``window`` > 0, the rows of each ``window`` consecutive batches are sorted by length and cut into batches of
    similar rows, and these are shuffled: less padding, and an order that is still random beyond the window.

    With ``longest_first``, the first epoch begins with the batch that holds the longest row, as far as sizes tell, and
    the first batch takes its place: where memory does not suffice, it fails at once.

    Args:
        sources: what to mix; each needs a name of its own.
        weights: passes over each source per epoch; 1 for each by default.
        seed: of every shuffle, not negative.
        batch_size: rows of an optimizer step, over all ranks and micro-batches.
        window: batches within which rows are grouped by length; 0 for no grouping.
        longest_first: whether the first epoch begins with the batch of its longest row.

    Raises:
        UserError: a weight is not positive, or weights and sources do not fit.
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
        #: The first row of each source when the rows of all sources are numbered through.
        self._first = np.cumsum([0, *map(len, sources)])
        self._epoch: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))
        self._window: tuple[int, int, list[NDArray[np.int64]]] = (-1, -1, [])
        # Here, so that worker processes inherit it.
        self._longest = self._find_longest() if longest_first else 0

    @property
    def epoch_samples(self) -> int:
        """Rows of one epoch, the same in every epoch."""
        return sum(self._shares)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch, the smaller last one counted."""
        return math.ceil(self.epoch_samples / self.batch_size)

    def samples_of(self, step: int) -> list[tuple[int, int]]:
        """The (source, row) pairs of optimizer step ``step``, counted from 0 through all epochs."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch == 0 and batch in (0, self._longest):
            batch = self._longest - batch
        return [self._split(row) for row in self._batch(epoch, batch).tolist()]

    def _batch(self, epoch: int, batch: int) -> NDArray[np.int64]:
        if self.window:
            window, place = divmod(batch, self.window)
            return self._grouped(epoch, window)[place]
        return self._order(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _find_longest(self) -> int:
        """The batch of the first epoch with the longest row. The smaller last batch is none: it stays the last."""
        whole = self.epoch_samples // self.batch_size * self.batch_size
        if not whole:
            return 0
        rows = self._order(0)[:whole]
        places = np.unique(np.linspace(0, whole - 1, min(whole, LOOKED_AT)).astype(np.int64))
        batch = int(places[np.argmax(self._sizes(rows[places]))]) // self.batch_size
        if not self.window:
            return batch
        # Grouped by length, the longest rows of its window are in another batch.
        window = batch // self.window
        longest = [self._sizes(rows).max() for rows in self._grouped(0, window) if len(rows) == self.batch_size]
        return window * self.window + int(np.argmax(longest))

    def _sizes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([self.sources[source].size(row) for source, row in map(self._split, rows.tolist())])

    def _split(self, row: int) -> tuple[int, int]:
        source = int(np.searchsorted(self._first, row, side="right")) - 1
        return source, row - int(self._first[source])

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """All rows of an epoch in order, numbered through all sources; the latest epoch is kept."""
        if self._epoch[0] != epoch:
            taken = [self._first[i] + self._deal(i, epoch) for i in range(len(self.sources))]
            order = np.concatenate(taken)[self._random(0, epoch).permutation(self.epoch_samples)]
            self._epoch = (epoch, order)
        return self._epoch[1]

    def _deal(self, source: int, epoch: int) -> NDArray[np.int64]:
        """The share of an epoch in a source's endless stream of shuffles."""
        share, length = self._shares[source], len(self.sources[source])
        start = epoch * share
        passes = range(start // length, math.ceil((start + share) / length))
        stream = np.concatenate([self._random(1, source, p).permutation(length) for p in passes])
        start -= passes.start * length
        return stream[start : start + share]

    def _grouped(self, epoch: int, window: int) -> list[NDArray[np.int64]]:
        """The batches of one window, each of rows of similar length; the latest window is kept."""
        if self._window[:2] != (epoch, window):
            span = self.window * self.batch_size
            rows = self._order(epoch)[window * span : (window + 1) * span]
            rows = rows[np.argsort(self._sizes(rows), kind="stable")]
            batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            # The smaller batch stays the last of its epoch.
            full = len(rows) // self.batch_size
            order = [*self._random(2, epoch, window).permutation(full), *range(full, len(batches))]
            self._window = (epoch, window, [batches[i] for i in order])
        return self._window[2]

    def _random(self, *key: int) -> np.random.RandomState:
        # Not `default_rng`: NumPy promises the same stream in every version for RandomState alone, and a training that
        # is resumed after an upgrade must find its order again.
        return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, *key])))
