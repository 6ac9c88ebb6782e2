"""Matched image tokens: which are paired, block by block, what they cost, and what is refused."""

import copy
from itertools import permutations
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image
from pydantic import ValidationError
from test_features import TALKS, Setting, gradients
from torch.nn import functional as F

from data.collate import Collator
from data.conversation import count_images
from data.errors import BadSample, UserError
from vlm_distill import losses, models
from vlm_distill.config.sections import RunConfig
from vlm_distill.demo import make_tokenizer
from vlm_distill.losses import HiddenTargets
from vlm_distill.models.lm_head import LMHead
from vlm_distill.training import image_matching
from vlm_distill.training.image_matching import ImageMatching

MATCHED = [
    {"name": "forward_kl"},
    {"name": "reverse_kl", "on": "images", "match": "hungarian", "weight": 0.25},
    {"name": "taid", "on": "images", "match": "pool"},
    {"name": "vision_relation", "match": "hungarian"},
    {"name": "vision_relation", "match": "pool"},
    {"name": "projector_features", "match": "hungarian"},
    {"name": "vision_language_affinity", "match": "hungarian", "weight": 25},
    {"name": "vision_language_affinity", "match": "pool", "text": "answers"},
]
PICTURES = [Image.linear_gradient("L").rotate(90 * k).convert("RGB") for k in range(3)]


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head(width, seed, vocabulary=7):
    linear = torch.nn.Linear(width, vocabulary, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(draw(vocabulary, width, seed=seed))
    return LMHead(linear)


def matching(mine, theirs, seed=0):
    """Return a matching of drawn hidden states, with these numbers of tokens in each block."""
    sides = [SimpleNamespace(image_blocks=torch.tensor(blocks)) for blocks in (mine, theirs)]
    sides[0].image_samples = torch.arange(len(mine)).repeat_interleave(torch.tensor(mine))
    hidden, other = draw(sum(mine), 3, seed=seed), draw(sum(theirs), 5, seed=seed + 1)
    pairs = torch.minimum(*(side.image_blocks for side in sides))
    batch = SimpleNamespace(student=sides[0], teacher=sides[1], image_pairs=pairs)
    found = ImageMatching(batch, hidden, head(3, 8), HiddenTargets(other, head(5, 9)))
    return found, hidden @ draw(7, 3, seed=8).T, other @ draw(7, 5, seed=9).T


def cheapest(student, teacher):
    """Return the best assignment of fewer rows to more by trying all: the pairs' summed L1 distance."""
    if len(student) > len(teacher):
        return cheapest(teacher, student)
    return min(
        sum(float((student[i] - teacher[j]).abs().sum()) for i, j in enumerate(order))
        for order in permutations(range(len(teacher)), len(student))
    )


@pytest.mark.parametrize(("mine", "theirs"), [([4, 2], [4, 5]), ([3], [5]), ([5, 1], [2, 1])])
def test_pairs_have_the_least_distance_of_logits_within_their_block(mine, theirs, monkeypatch):
    monkeypatch.setattr(image_matching, "_LOGIT_BYTES", 200)  # a few tokens of the vocabulary at a time
    found, student, teacher = matching(mine, theirs)
    rows, columns = found.indices
    assert len(rows) == sum(min(pair) for pair in zip(mine, theirs, strict=True))
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == len(rows)
    first = [0, 0]
    for n, m in zip(mine, theirs, strict=True):
        inside = (rows >= first[0]) & (rows < first[0] + n)
        assert inside.sum() == min(n, m)
        assert ((columns[inside] >= first[1]) & (columns[inside] < first[1] + m)).all()
        cost = (student[rows[inside]] - teacher[columns[inside]]).abs().sum()
        best = cheapest(student[first[0] : first[0] + n], teacher[first[1] : first[1] + m])
        assert float(cost) == pytest.approx(best)
        first = [first[0] + n, first[1] + m]


def test_pooling_averages_the_finer_grid_of_each_block():
    found, *_ = matching([16, 4, 9], [4, 4, 4])
    features = draw(29, 2, seed=3).requires_grad_()
    pooled = found.student("pool", features)
    squares = features[:16].view(2, 2, 2, 2, 2).mean((1, 3)).flatten(0, 1)
    torch.testing.assert_close(pooled[:4], squares)
    assert pooled[4:8].equal(features[16:20])
    assert pooled[8:].shape == (4, 2)
    assert found.teacher("pool", features[:12]).equal(features[:12])
    assert found.samples("pool").tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.autograd.gradcheck(lambda x: found.student("pool", x), features)


class Unlike(Setting):
    """A student whose images become more tokens than the teacher's; reversed, fewer."""

    def __init__(self, folder, loss, *, size=32, teacher_size=None):
        super().__init__(folder, loss)
        for role, pixels in (("student", size), ("teacher", teacher_size)):
            if pixels is None:
                continue
            settings = tiny.settings() if role == "student" else tiny.settings(width=24, layers=3)
            settings["vision_encoder"]["image_size"] = pixels
            torch.manual_seed(3)
            model = models.build_vlm(settings, tokenizer=make_tokenizer(tiny.WORDS))
            if role == "student":
                self.student = model
            else:
                self.teacher = type(self.teacher)(model)

    def batch(self, *numbers, packed=False):
        both = self.student.processor, self.teacher.processor
        collator = Collator(*both, 256, packed=(packed, packed), alike=losses.must_be_alike(self.terms))
        pairs = []
        for talk in (TALKS[i] for i in numbers):
            pairs += collator.encode(talk, PICTURES[: count_images(talk.messages)])
        return collator.batch(pairs)


def logits(model, hidden):
    with model.head.weight() as weight:
        return hidden @ weight.detach().T


@pytest.mark.parametrize("sizes", [{"size": 32}, {"size": 16, "teacher_size": 32}])
def test_losses_compare_what_is_paired(tmp_path, sizes):
    """Every term equals its definition on tokens paired here by hand."""
    setting = Unlike(tmp_path, MATCHED, **sizes)
    task, batch = setting.prepare(), setting.batch(0, 1, 2)
    _, sums = setting.run(task, batch)
    sides = [(setting.student, batch.student), (setting.teacher.model, batch.teacher)]
    hidden = [model(side.inputs, side.image_positions).hidden.detach() for model, side in sides]
    counts = [len(x) // 3 for x in hidden]  # three images
    grids = [x.view(3, count, -1) for x, count in zip(hidden, counts, strict=True)]

    from scipy.optimize import linear_sum_assignment

    student, teacher, pooled = [], [], ([], [])
    for mine, theirs in zip(*grids, strict=True):
        distances = torch.cdist(logits(setting.student, mine), logits(setting.teacher.model, theirs), p=1)
        rows, columns = linear_sum_assignment(distances.numpy())
        student.append(mine[rows])
        teacher.append(theirs[columns])
        for found, x in zip(pooled, (mine, theirs), strict=True):
            side = int(len(x) ** 0.5)
            found.append(F.avg_pool2d(x.T.unflatten(1, (side, side)), side // 2).flatten(1).T)
    paired = [(student, teacher), pooled]
    for name, (mine, theirs) in zip(("reverse_kl", "taid"), paired, strict=True):
        both = logits(setting.student, torch.cat(mine)), logits(setting.teacher.model, torch.cat(theirs))
        expected = setting.terms[1 if name == "reverse_kl" else 2].loss(*both)
        assert sums[name].count == len(expected) == 12
        torch.testing.assert_close(sums[name].loss, expected.sum().detach(), rtol=1e-4, atol=1e-5)
    for name, (mine, theirs) in zip(("vision_relation", "vision_relation_5"), paired, strict=True):
        expected = 0.0
        for images in ([0], [1, 2]):  # of the first sample, and of the third
            a, b = (torch.cat([x[i] for i in images]) for x in (mine, theirs))
            expected += 1 - F.cosine_similarity((a @ a.T).flatten(), (b @ b.T).flatten(), dim=0)
        torch.testing.assert_close(sums[name].loss, expected, rtol=1e-4, atol=1e-6)
    for name, (mine, theirs) in zip(("vision_language_affinity", "vision_language_affinity_8"), paired, strict=True):
        expected = 0.0
        for number, images in ((0, [0]), (2, [1, 2])):
            cosines = []
            for (model, side), x in zip(sides, (mine, theirs), strict=True):
                start, stop = side.extents[number, 0], side.extents[number].sum()
                at = torch.arange(start, stop)
                at = at[~torch.isin(at, side.image_positions)]
                if name.endswith("8"):
                    at = side.positions[(side.positions >= start) & (side.positions < stop)]
                text = model(side.inputs, at).hidden.detach()
                cosines.append(F.cosine_similarity(torch.cat([x[i] for i in images]).unsqueeze(1), text, dim=-1))
            expected += F.smooth_l1_loss(*cosines)
        torch.testing.assert_close(sums[name].loss, expected, rtol=1e-4, atol=1e-6)


def test_rows_and_parts_of_a_batch_change_nothing(tmp_path):
    setting = Unlike(tmp_path, MATCHED)
    task = setting.prepare()
    loss, whole = setting.run(task, setting.batch(0, 1, 2, 3))
    loss.backward()
    expected = gradients(task)
    for batches in ([setting.batch(0, 1, 2, 3, packed=True)], [setting.batch(*n) for n in ((0, 3), (1,), (2,), ())]):
        parts = [setting.run(task, batch) for batch in batches]
        sum(part for part, _ in parts).backward()
        for name, sums in whole.items():
            torch.testing.assert_close(sum(found[name].loss for _, found in parts), sums.loss, rtol=1e-4, atol=1e-6)
        got = gradients(task)
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_equal_models_are_matched_with_themselves(tmp_path):
    setting = Unlike(tmp_path, MATCHED)
    setting.student = copy.deepcopy(setting.teacher.model)
    setting.student.set_trainable(["vision_encoder", "projector", "decoder"])
    _, sums = setting.run(setting.prepare(), setting.batch(0, 2))
    for name in ("reverse_kl", "vision_relation", "projector_features", "vision_language_affinity"):
        assert sums[name].loss.abs() < 1e-5, name


def test_features_that_are_not_the_image_tokens_are_refused(tmp_path):
    setting = Unlike(tmp_path, [{"name": "vision_features", "match": "hungarian"}])
    settings = tiny.settings() | {"projector": {"type": "pixel_shuffle_mlp", "factor": 2}}
    setting.student = models.build_vlm(settings, tokenizer=make_tokenizer(tiny.WORDS))
    with pytest.raises(UserError, match="vision_features: the student's 4 features an image are not its image tokens"):
        setting.run(setting.prepare(), setting.batch(0))


@pytest.mark.parametrize(
    ("match", "blocks", "message"),
    [
        ("hungarian", ([4, 4], [4]), "image tiles differ: 2 for the student, 1 for the teacher"),
        ("pool", ([12], [4]), r"image grids are not square: 12 tokens for the student, .* match: hungarian"),
    ],
)
def test_samples_that_cannot_be_matched_are_left_out_by_name(tmp_path, match, blocks, message):
    setting = Unlike(tmp_path, [{"name": "forward_kl", "on": "images", "match": match}])
    collator = Collator(
        setting.student.processor, setting.teacher.processor, 64, alike=losses.must_be_alike(setting.terms)
    )
    for processor, counts in zip((collator.student, collator.teacher), blocks, strict=True):
        processor.image_blocks = lambda sample, counts=counts: counts
    with pytest.raises(BadSample, match=message):
        collator.encode(TALKS[0], [Image.new("RGB", (16, 16))])


@pytest.mark.parametrize("name", ["forward_kl", "minilm", "visual_attention", "cross_entropy"])
def test_match_is_for_losses_at_image_tokens(tmp_path, name):
    plain = tiny.config(tmp_path, tmp_path / "data.jsonl", tmp_path / "teacher")
    plain["loss"] = [{"name": name, "match": "pool"}]
    with pytest.raises(ValidationError, match=f"loss {name} compares no image tokens; leave match: pool out"):
        RunConfig.model_validate(plain)
