"""Perplexity and KL on held-out samples against values computed by hand, of models that know three letters."""

import math
from types import SimpleNamespace

import pytest
import torch
from asking import picked
from torch import nn

from data.batch import Encoded, ModelInputs
from data.collate import Collator
from data.conversation import Document
from data.errors import BadSample
from vlm_distill.evaluation.held_out import measure
from vlm_distill.models.interface import Outputs
from vlm_distill.models.lm_head import LMHead
from vlm_distill.models.teacher import ModelTeacher
from vlm_distill.runtime.rank_share import RankShare

# Row i: what follows the i-th letter, as the model and as its teacher see it.
MODEL = [[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 4, 1 / 2], [1 / 8, 1 / 2, 3 / 8]]
TEACHER = [[1 / 4, 1 / 2, 1 / 4], [1 / 4, 1 / 4, 1 / 2], [5 / 8, 1 / 4, 1 / 8]]


class Letters:
    """The processor of these models: a letter is a token, and all but the first are supervised."""

    has_vision = takes_videos = one_row = False

    def encode_document(self, document):
        ids = torch.tensor(["abc".index(letter) for letter in document.text])
        return Encoded(ids, torch.arange(len(ids)) > 0, torch.zeros(len(ids), dtype=torch.bool))

    def dummy(self):
        return Encoded(torch.zeros(1, dtype=torch.long), torch.zeros(1).bool(), torch.zeros(1).bool())

    def join(self, samples):
        ids, supervised, ends = zip(*((one.input_ids, one.supervised, one.ends) for one in samples), strict=True)
        return Encoded(torch.cat(ids), torch.cat(supervised), torch.cat(ends))

    def collate(self, samples):
        rows = [sample.input_ids for sample in samples]
        return ModelInputs(input_ids=nn.utils.rnn.pad_sequence(rows, batch_first=True))


class Bigrams(nn.Module):
    """The logits after a letter are the logarithms of a row of the table; a constant changes nothing."""

    def __init__(self, table):
        super().__init__()
        self.lm_head = nn.Linear(3, 3, bias=False)
        self.lm_head.weight.data = torch.tensor(table).log().T + 1.5
        self.head = LMHead(self.lm_head)
        self.processor = Letters()
        self.dtype = torch.float32
        self.forwards = 0

    def forward(self, inputs, positions, features=()):
        assert not self.training
        self.forwards += 1
        return Outputs(nn.functional.one_hot(inputs["input_ids"].flatten()[positions], 3).float(), {})


class Texts:
    name = "letters"

    def __init__(self, *rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(self.rows[index], BadSample):
            raise self.rows[index]
        return Document(self.rows[index])

    def size(self, index):
        return len(str(self.rows[index]))

    def line(self, index):
        return index + 1


def measured(*rows, teacher=True, **options):
    model, other = Bigrams(MODEL), ModelTeacher(Bigrams(TEACHER))
    ranks = picked(RankShare, options)
    collator = Collator(model.processor, other.processor if teacher else None, 8)
    return measure(model, other if teacher else None, Texts(*rows), collator, ranks=ranks, **options), model


def divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_perplexity_and_kl_by_hand():
    found, model = measured("aab", "bca", "cb")
    # a→a 1/2, a→b 1/4; b→c 1/2, c→a 1/8; c→b 1/2: their product is 2⁻⁸, of five tokens.
    assert found.perplexity == pytest.approx(2 ** (8 / 5))
    seen = [0, 0, 1, 2, 2]
    assert found.kl == pytest.approx(sum(divergence(TEACHER[i], MODEL[i]) for i in seen) / 5)
    assert divergence(TEACHER[2], MODEL[2]) != pytest.approx(divergence(MODEL[2], TEACHER[2]))
    assert (found.n, found.tokens, found.skipped) == (3, 5, {})
    assert model.training


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_means_are_over_tokens_however_samples_are_batched(batch_size):
    found, model = measured("abcabca", "aa", "cb", batch_size=batch_size)
    whole, _ = measured("abcabca", "aa", "cb", batch_size=8)
    assert found.perplexity == pytest.approx(whole.perplexity)
    assert found.kl == pytest.approx(whole.kl)
    # Six tokens of the first, one of each other: a→b 1/4, b→c 1/2, c→a 1/8, twice; a→a and c→b 1/2 each.
    assert found.perplexity == pytest.approx(2 ** ((2 * (2 + 1 + 3) + 2) / 8))
    assert model.forwards == math.ceil(3 / batch_size)


def test_without_a_teacher_there_is_no_kl():
    found, _ = measured("aab", teacher=False)
    assert found.perplexity == pytest.approx(2**1.5)
    assert found.kl is None
    assert found.values(["perplexity", "kl"]) == {"n": 1, "perplexity": found.perplexity, "tokens": 2}


def test_what_cannot_be_read_is_told_and_counts_nowhere():
    skipped = []
    found, _ = measured("aab", BadSample("torn", "page 7"), "a", skipped=skipped)
    assert (found.n, found.tokens) == (1, 2)
    assert found.perplexity == pytest.approx(2**1.5)
    assert found.skipped == {"torn": 1, "no supervised token": 1}
    assert [(problem.line, problem.reason, problem.detail) for problem in skipped] == [
        (2, "torn", "page 7"),
        (3, "no supervised token", "the document is one token long"),
    ]


def test_nothing_to_measure():
    found, _ = measured(BadSample("torn"))
    assert (found.n, found.tokens, found.perplexity, found.kl) == (0, 0, None, None)


def test_ranks_share_the_batches_and_agree():
    rows = ["abcabca", "aa", "cb", "bb"]
    whole, _ = measured(*rows)
    sent = []
    for rank in range(3):

        def gather(parts, sent=sent):
            sent.append(parts)
            return sent  # those so far

        found, model = measured(*rows, batch_size=2, rank=rank, world=3, all_gather=gather)
        assert model.forwards == 1  # the third has nothing, and goes along
    assert found.n == whole.n == 4
    assert found.perplexity == pytest.approx(whole.perplexity)
    assert found.kl == pytest.approx(whole.kl)


def test_tokens_that_are_not_distilled_count_for_perplexity_alone():
    collator = Collator(Letters(), Letters(), 8)
    pairs = collator.encode(Document("aab"))
    pairs[0].distilled[1] = False
    fixed = SimpleNamespace(encode=lambda *_: pairs, batch=collator.batch)
    found = measure(Bigrams(MODEL), ModelTeacher(Bigrams(TEACHER)), Texts("aab"), fixed)
    assert found.perplexity == pytest.approx(2**1.5)
    assert found.kl == pytest.approx(divergence(TEACHER[0], MODEL[0]))


def test_several_ranks_need_a_way_to_gather():
    with pytest.raises(ValueError, match="all_gather"):
        measured("aab", world=2)
