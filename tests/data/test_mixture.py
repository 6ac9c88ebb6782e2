"""The order of samples: complete, weighted, reproducible, and grouped by length without losing a sample."""

import pickle
from collections import Counter

import pytest

from data.errors import UserError
from data.mixture import Mixture


def epoch(mixture, number):
    steps = mixture.steps_per_epoch
    return [mixture.samples_of(step) for step in range(number * steps, (number + 1) * steps)]


def flat(batches):
    return [row for batch in batches for row in batch]


def test_each_row_once_an_epoch_and_no_row_dropped(questions):
    mixture = Mixture([questions(7, "a"), questions(4, "b")], batch_size=3)
    everything = [(0, i) for i in range(7)] + [(1, i) for i in range(4)]
    assert (mixture.epoch_samples, mixture.steps_per_epoch) == (11, 4)
    orders = [flat(epoch(mixture, number)) for number in range(3)]
    for order in orders:
        assert sorted(order) == everything
    assert orders[0] != orders[1] != orders[2]
    assert [len(batch) for batch in epoch(mixture, 1)] == [3, 3, 3, 2]


@pytest.mark.parametrize("window", [0, 2])
def test_rows_are_a_pure_function_of_seed_and_step(questions, window):
    sources = [questions(20, "a", length=lambda i: i % 5), questions(9, "b")]
    mixture = Mixture(sources, [1.0, 0.5], seed=3, batch_size=4, window=window)
    steps = range(3 * mixture.steps_per_epoch)
    in_order = [mixture.samples_of(step) for step in steps]
    again = pickle.loads(pickle.dumps(Mixture(sources, [1.0, 0.5], seed=3, batch_size=4, window=window)))
    assert [again.samples_of(step) for step in reversed(steps)] == in_order[::-1]
    other = Mixture(sources, [1.0, 0.5], seed=4, batch_size=4, window=window)
    assert [other.samples_of(step) for step in steps] != in_order


def test_the_order_survives_upgrades_of_numpy(questions):
    # Golden values: a training resumed by a later version must continue where it stopped.
    mixture = Mixture([questions(6)], seed=1, batch_size=6)
    assert [row for _, row in mixture.samples_of(0)] == [1, 0, 4, 2, 3, 5]


def test_weight_is_passes_over_the_source_in_an_epoch(questions):
    mixture = Mixture([questions(10, "a"), questions(10, "b"), questions(10, "c")], [2.0, 0.5, 1.5], batch_size=8)
    assert mixture.epoch_samples == 40
    counts = [Counter(flat(epoch(mixture, number))) for number in range(2)]
    for count in counts:
        assert all(count[0, i] == 2 for i in range(10))
        assert all(count[1, i] <= 1 for i in range(10))
        assert all(1 <= count[2, i] <= 2 for i in range(10))
    # One half in the first epoch, the other in the second.
    assert all(counts[0][1, i] + counts[1][1, i] == 1 for i in range(10))
    assert all(counts[0][2, i] + counts[1][2, i] == 3 for i in range(10))


def padding(mixture, number, length):
    return sum(len(b) * max(length(i) for _, i in b) - sum(length(i) for _, i in b) for b in epoch(mixture, number))


def test_grouping_lowers_padding_and_keeps_every_row(questions):
    def length(i):
        return 1 + i * 37 % 101

    source = questions(101, length=length)
    plain = Mixture([source], batch_size=4)
    grouped = Mixture([source], batch_size=4, window=8)
    assert padding(grouped, 0, length) < 0.4 * padding(plain, 0, length)
    batches = epoch(grouped, 1)
    assert sorted(flat(batches)) == [(0, i) for i in range(101)]
    assert [len(batch) for batch in batches] == [4] * 25 + [1]
    # Each window holds the samples of the same batches of the plain order.
    for start in range(0, 26, 8):
        assert sorted(flat(batches[start : start + 8])) == sorted(flat(epoch(plain, 1)[start : start + 8]))
    # Batches are shuffled again: a window does not run from short to long.
    means = [sum(length(i) for _, i in batch) / len(batch) for batch in batches[:8]]
    assert means != sorted(means)


def test_mistakes_are_named(questions):
    source = questions(3)
    for arguments, message in [
        (([source], [0.0]), "weight of data source train is 0"),
        (([source], [float("nan")]), "weight of data source train is nan"),
        (([source], [1.0, 1.0]), "1 data sources and 2 weights"),
        (([],), "0 data sources"),
        (([source, questions(3)],), "two data sources are called train"),
    ]:
        with pytest.raises(UserError, match=message):
            Mixture(*arguments, batch_size=2)
    with pytest.raises(UserError, match="batch size 0"):
        Mixture([source], batch_size=0)


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("rows", [100, 101])
def test_the_longest_row_comes_first_and_no_row_is_lost(questions, rows, window):
    def length(i):
        return 1 + i * 37 % 101

    source = questions(rows, length=length)
    plain = Mixture([source], batch_size=4, window=window)
    mixture = Mixture([source], batch_size=4, window=window, longest_first=True)
    before, after = epoch(plain, 0), epoch(mixture, 0)
    full = [batch for batch in before if len(batch) == 4]
    longest = max(length(i) for batch in full for _, i in batch)
    assert max(length(i) for _, i in after[0]) == longest
    # Two batches have changed places, and the smaller one is still the last; later epochs are as they were.
    moved = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert moved == [0, before.index(after[0])]
    assert after[moved[1]] == before[0]
    assert epoch(mixture, 1) == epoch(plain, 1)
