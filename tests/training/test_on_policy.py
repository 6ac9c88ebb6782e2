"""Steps that learn from the student's own answers: what is drawn, what is learnt of it, what a resumed run does."""

import json
import random
from dataclasses import replace

import pytest
import tiny
import torch

from data.errors import UserError
from data.opening import open_source
from vlm_distill.config.sections import RunConfig
from vlm_distill.models import build_vlm
from vlm_distill.models.answers import Answer, Sampling, TokenChoice
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import Trainer
from vlm_distill.training.on_policy import Kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("on_policy")
    tiny.write_data(folder / "data", text_only=(3, 4), broken=(9,))
    tiny.write_teacher(folder / "teacher")
    tiny.write_pieces_teacher(folder / "pieces")
    return folder


def trainer(folder, name, teacher="teacher", **changes):
    changes = {"loss": [{"name": "jsd"}, {"name": "cross_entropy", "weight": 0.5}], "training__steps": 6} | changes
    plain = tiny.config(folder / name, folder / "data" / "data.jsonl", folder / teacher, **changes)
    return Trainer(RunConfig.model_validate(plain), Processes("cpu"))


def story(trainer):
    lines = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in tiny.TIMES} for line in lines]


def weights(trainer):
    return {name: tensor.tolist() for name, tensor in trainer.student.state_dict().items()}


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    logits, count = torch.randn(8), 20_000
    generators = [random.Random(str(i)) for i in range(count)]
    choice = TokenChoice(Sampling(0.7, generators), 7, {2})
    drawn, logprobs = choice.choose(logits.repeat(count, 1), range(count))
    shares = torch.bincount(drawn, minlength=8) / count
    expected = logits / 0.7
    expected[[2, 7]] = -torch.inf
    assert shares == pytest.approx(expected.softmax(-1), abs=0.015)
    assert not shares[[2, 7]].any()
    # What is told is the model's own log-probability.
    assert logprobs == pytest.approx(logits.log_softmax(-1)[drawn], abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_drawn_token_is_the_first_whose_cumulative_probability_exceeds_the_number(temperature):
    torch.manual_seed(0)
    logits = 8 * torch.randn(50, 300)
    allowed = logits.double()
    allowed[:, [2, 5]] = -torch.inf
    totals = (allowed / temperature).softmax(-1).cumsum(-1)
    numbers = [random.Random(str(i)).random() for i in range(50)]
    generators = [random.Random(str(i)) for i in range(50)]
    choice = TokenChoice(Sampling(temperature, generators), None, {2, 5, 400})
    drawn, _ = choice.choose(logits, range(50))
    expected = [int((total > number * total[-1]).nonzero()[0]) for total, number in zip(totals, numbers, strict=True)]
    assert drawn.tolist() == expected


def test_at_temperature_0_the_likeliest_that_may_be(folder):
    logits = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    choice = TokenChoice(Sampling(0.0, []), None, {2})
    assert choice.choose(logits, [0])[0] == 3


def test_an_answer_does_not_depend_on_those_beside_it():
    torch.manual_seed(0)
    model = build_vlm(tiny.settings(), tokenizer=tiny.make_tokenizer(tiny.WORDS))
    tiny._sharpen(model.decoder)
    parts = [[{"type": "text", "text": text}] for text in ("say red", "what color is it ?")]
    prompts = [model.encode_prompt(tiny_conversation(content), []) for content in parts]

    def answers(rows, seeds):
        sampling = Sampling(1.0, [random.Random(seed) for seed in seeds])
        return [answer.token_ids for answer in model.answer(rows, max_new_tokens=12, sampling=sampling)]

    together = answers(prompts, ["a", "b"])
    assert together == [answers(prompts[:1], ["a"])[0], answers(prompts[1:], ["b"])[0]]
    assert answers(prompts, ["c", "d"]) != together
    assert model.answer([], max_new_tokens=3) == []


def tiny_conversation(content):
    from data.conversation import Conversation

    return Conversation(({"role": "user", "content": content},))


def test_without_a_share_nothing_changes(folder):
    plain, none = trainer(folder, "plain"), trainer(folder, "none", on_policy={"fraction": 0.0})
    plain.run()
    none.run()
    assert weights(none) == weights(plain)
    assert [line["loss"] for line in story(none)] == [line["loss"] for line in story(plain)]


def test_answers_are_the_students(folder):
    run = trainer(folder, "own", on_policy={"fraction": 1.0, "max_new_tokens": 5})
    taken = run.prepare_step(run.dataset[0])
    data = run.dataset[0]
    assert [batch.samples for batch in taken.batches] == [batch.samples for batch in data.batches]
    assert [batch.images for batch in taken.batches] == [batch.images for batch in data.batches]
    prompts = [
        p
        for part in run.dataset.split.micro_batches(run.dataset.mixture.samples_of(0))
        for p in run.on_policy._prompts(data, part)
        if p
    ]
    # A question is encoded once if both models' processors do the same.
    shared = run.dataset.collator.student is run.dataset.collator.teacher
    assert {prompt.asked[""].encoded is prompt.student for prompt in prompts} == {shared}
    drawn = [ids for batch in taken.batches for ids in supervised(batch)]
    # Told again by the model itself, from the same random numbers.
    for prompt, ids in zip(prompts, drawn, strict=True):
        line = f"{prompt.conversation.source} {prompt.conversation.line}"
        sampling = Sampling(1.0, [run.on_policy._random(0, line)])
        (answer,) = run.student.answer([prompt.student], max_new_tokens=5, sampling=sampling)
        assert ids == answer.token_ids
    assert run.student.training
    for batch in taken.batches:
        assert batch.drawn
        teacher_ids = batch.teacher.inputs["input_ids"].flatten()[batch.teacher.positions + 1]
        assert torch.equal(teacher_ids, batch.targets)


def supervised(batch):
    """The supervised tokens of each row."""
    length = batch.student.inputs["input_ids"].shape[1]
    rows = batch.student.positions // length
    return [batch.targets[rows == row].tolist() for row in rows.unique()]


def test_what_is_told_of_a_loss_does_not_depend_on_its_place(folder):
    """Cross-entropy has no rows in an on-policy step; the loss in the log continues as before it."""
    told = []
    for losses in (["jsd", "cross_entropy"], ["cross_entropy", "jsd"]):
        changes = {"loss": [{"name": name} for name in losses], "training__steps": 2}
        run = trainer(folder, losses[0] + "_first", on_policy={"fraction": 1.0, "max_new_tokens": 5}, **changes)
        run.run()
        told.append(story(run))
    assert told[0] == told[1]
    assert told[1][0]["jsd/loss"] > 0


def test_own_answers_are_never_right_ones(folder):
    run = trainer(folder, "half", on_policy={"fraction": 0.5, "max_new_tokens": 4})
    run.run()
    lines = [line for line in story(run) if line["kind"] == "train"]
    kinds = [line["on_policy/step"] for line in lines]
    assert set(kinds) == {0.0, 1.0}
    for line in lines:
        assert ("cross_entropy/loss" in line) == (not line["on_policy/step"])
        assert line["jsd/loss"] > 0
        assert (line["on_policy/tokens"] > 0) == bool(line["on_policy/step"])
        assert line["on_policy/length"] <= 4
    # One rank decides as another would, of the seed alone.
    assert [run.on_policy._kind(step) for step in range(6)] == ["draw" if kind else "data" for kind in kinds]


@pytest.mark.parametrize("name", [pytest.param("gkd", marks=pytest.mark.slow), "distillm", "distillm2"])
def test_resumed_equals_uninterrupted(folder, name):
    section = {"fraction": 0.7, "max_new_tokens": 4}
    changes = {"training__steps": 8, "training__checkpoint_every": 3}
    if name == "distillm":
        section |= {"replay": 8, "adaptive": 0.2, "importance": {"clip": 1.2}}
        changes |= {
            "data__eval": [{"path": str(folder / "data" / "data.jsonl"), "name": "held_out", "limit": 6}],
            "evaluation__every": 2,
            "evaluation__measures": ["perplexity"],
            "evaluation__best": "held_out/perplexity",
            "optimizer__lr": 0.3,  # so that some evaluation is worse than the one before
        }
    if name == "distillm2":
        section |= {"pairs": True, "balance": "gradual"}
        whole = {"mean": "sequences", "adaptive": True}
        changes["loss"] = [*(term | whole for term in SKEWS), {"name": "cross_entropy", "weight": 0.5}]
    straight = trainer(folder, f"{name}_straight", on_policy=section, **changes)
    straight.run()
    trainer(folder, f"{name}_resumed", on_policy=section, **changes).run(until=5)
    resumed = trainer(folder, f"{name}_resumed", on_policy=section, **changes)
    resumed.run()
    assert story(resumed) == story(straight)
    assert weights(resumed) == weights(straight)
    lines = [line for line in story(straight) if line["kind"] == "train"]
    if name == "distillm":
        assert any(line["on_policy/replayed"] for line in lines)
        assert lines[-1]["on_policy/fraction"] > 0.7
        assert any(line["on_policy/clipped"] for line in lines if line["on_policy/replayed"])
        assert len(straight.on_policy.kept) == 8


def test_replay_brings_back_what_was_drawn(folder):
    run = trainer(folder, "replay", on_policy={"fraction": 1.0, "max_new_tokens": 4, "replay": 8})
    own = run.on_policy
    run.prepare_step(run.dataset[0])
    assert own._kind(1) == "draw"  # it is not full: row 9 is broken
    run.prepare_step(run.dataset[1])
    assert len(own.kept) == 8
    replayed = [step for step in range(6) if own._kind(step) == "replay"]
    answers = sorted(entry.ids for entry in own.kept)
    again = run.prepare_step(run.dataset[replayed[0]])
    assert sorted(ids for batch in again.batches for ids in supervised(batch)) == answers
    assert own.counts["answering"] > 0
    # Two answers to one question stay two.
    own.kept[:2] = [Kept(own.kept[2].place, [5, 6], 0), Kept(own.kept[2].place, [7], 0)]
    again = run.prepare_step(run.dataset[replayed[0]])
    assert {(5, 6), (7,)} <= {tuple(ids) for batch in again.batches for ids in supervised(batch)}
    # No share of the steps is taken from the buffer at the run's beginning, all of them at its end.
    assert [own._kind(step) for step in (0, 6)] == ["draw", "replay"]


SKEWS = [
    {"name": "skew_forward_kl", "answers": "data"},
    {"name": "skew_reverse_kl", "answers": "own", "hold": True},
]


def test_a_pair_is_the_datas_answer_and_the_students_own(folder):
    """One step of both gives each term what a step of that kind alone gives it."""
    changes = {"training__steps": 1}
    policy = {"fraction": 1.0, "max_new_tokens": 4}
    both = trainer(folder, "pairs", loss=SKEWS, on_policy=policy | {"pairs": True}, **changes)
    data, taken = both.dataset[0], both.prepare_step(both.dataset[0])
    assert [batch.drawn for batch in taken.batches] == [False, True] * len(data.batches)
    for asked, answered in zip(data.batches, taken.batches[::2], strict=True):
        assert torch.equal(asked.targets, answered.targets)
    assert both.locate_samples(taken, 3) == both.locate_samples(data, 1)
    both.run()
    from_data = trainer(folder, "pairs_data", loss=SKEWS[:1], **changes)
    from_data.run()
    from_own = trainer(folder, "pairs_own", loss=SKEWS[1:], on_policy=policy, **changes)
    from_own.run()
    (line,) = [line for line in story(both) if line["kind"] == "train"]
    for run, name in ((from_data, "skew_forward_kl/loss"), (from_own, "skew_reverse_kl/loss")):
        assert line[name] == pytest.approx(story(run)[0][name], rel=1e-6)
    assert line["supervised_tokens"] == sum(story(run)[0]["supervised_tokens"] for run in (from_data, from_own))
    assert line["loss"] == pytest.approx(line["skew_forward_kl/loss"] + line["skew_reverse_kl/loss"])


def test_a_term_keeps_to_its_answers(folder):
    loss = [*SKEWS, {"name": "hidden_states", "layers": {-1: -1}, "answers": "own"}]
    run = trainer(folder, "kept", loss=loss, on_policy={"fraction": 0.5, "max_new_tokens": 4})
    run.run()
    for line in story(run):
        if line["kind"] == "train":
            own = bool(line["on_policy/step"])
            acted = [f"{term['name']}/loss" in line for term in loss]
            assert acted == [not own, own, own]


def test_weight_moves_to_the_students_answers(folder):
    policy = {"fraction": 1.0, "max_new_tokens": 4, "pairs": True, "balance": "gradual"}
    run = trainer(folder, "gradual", loss=[*SKEWS, {"name": "jsd"}], on_policy=policy, training__steps=8)
    factors = [[run.weight_factor(term, step) for term in run.terms] for step in (0, 2, 4, 7)]
    assert factors == [[1.0, 1.0, 1.0], [0.75, 1.25, 1.0], [0.5, 1.5, 1.0], [0.5, 1.5, 1.0]]
    run.run()
    for line in story(run):
        if line["kind"] == "train":
            weighted = zip(run.terms, ("skew_forward_kl", "skew_reverse_kl", "jsd"), strict=True)
            parts = [run.weight_factor(term, line["step"] - 1) * line[f"{name}/loss"] for term, name in weighted]
            assert line["loss"] == pytest.approx(sum(parts))


def test_cut_and_different_tokenizers(folder):
    student = {**tiny.settings(), "tokenizer": str(folder / "pieces" / "student")}
    loss = [{"name": "uld"}, {"name": "cross_entropy", "weight": 0.5}]
    changes = {"student": student, "loss": loss, "on_policy": {"fraction": 1.0, "max_new_tokens": 3}}
    run = trainer(folder, "pieces_run", teacher="pieces", **changes)
    run.run()
    lines = [line for line in story(run) if line["kind"] == "train"]
    assert all(line["on_policy/step"] == 1.0 for line in lines)
    assert all(line["uld/loss"] > 0 for line in lines)
    # One picture of 24 is broken; an answer that a tokenizer has no tokens for, or of blanks alone, is left out.
    problems = [json.loads(line) for line in (run.folder / "problems.jsonl").read_text().splitlines()]
    assert {problem["reason"] for problem in problems} <= {
        "not an image",
        "misaligned",
        "empty answer",
        "no supervised token",
    }
    assert sum(line["samples"] for line in lines) > 24


def test_an_answer_of_nothing_is_no_mistake_of_the_data(folder, monkeypatch):
    """With data.bad_samples: fail a sample that is none ends the run, but not what the student says to one."""
    tiny.write_data(folder / "whole")
    student = {**tiny.settings(), "tokenizer": str(folder / "pieces" / "student")}
    changes = {"student": student, "loss": [{"name": "uld"}], "on_policy": {"fraction": 1.0, "max_new_tokens": 3}}
    run = trainer(folder, "nothing_said", teacher="pieces", data__bad_samples="fail", **changes)
    run.dataset.mixture.sources[0] = open_source(folder / "whole" / "data.jsonl", name="data")
    end = Answer("", sorted(run.student.end_tokens)[:1], [0.0])
    monkeypatch.setattr(type(run.student), "answer", lambda self, rows, **settings: [end] * len(rows))
    taken = run.prepare_step(run.dataset[0])
    assert len(taken.problems) == 8
    assert [batch.samples for batch in taken.batches] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "changes",
    [
        {"training__dtype": "bf16"},
        {"training__dtype": "bf16", "deepspeed__stage": 2, "training__activation_checkpointing": True},
        {"student": {"lora": {"rank": 2}}},
    ],
    ids=["autocast", "bf16", "lora"],
)
def test_other_precisions_and_adapters(folder, changes, tmp_path):
    if "student" in changes:
        changes = {"student": {"path": str(folder / "teacher"), **changes["student"]}}
    section = {"fraction": 0.3, "max_new_tokens": 4}
    run = trainer(folder, tmp_path.name, on_policy=section, **{"training__steps": 3} | changes)
    run.run()
    lines = [line for line in story(run) if line["kind"] == "train"]
    # The first step learns from the data, so that adapters, which begin as nothing, have something to unlearn.
    assert [line["on_policy/tokens"] > 0 for line in lines] == [False, True, True]
    assert all(line["jsd/loss"] > 0 for line in lines[1:])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": [{"name": "cross_entropy"}, {"name": "dkd"}]}, "no right tokens, which cross_entropy, dkd reads"),
        ({"on_policy": {"fraction": 0.5, "replay": 4}}, "on_policy.replay"),
        ({"on_policy": {"fraction": 0.5, "adaptive": 0.1}}, "evaluation.best"),
        ({"on_policy": {"fraction": 1.5}}, "on_policy.fraction"),
        ({"on_policy": None, "loss": [{"name": "jsd", "answers": "own"}]}, "add that section"),
        ({"loss": [{"name": "jsd"}, {"name": "cross_entropy", "answers": "own"}]}, "leave answers: own out"),
        ({"loss": [{"name": "jsd", "answers": "own"}]}, "every term has answers: own"),
        ({"loss": [{"name": "jsd", "answers": "data"}]}, "every term has answers: data"),
        ({"on_policy": {"fraction": 1.0}, "loss": SKEWS}, "set on_policy"),
        ({"on_policy": {"fraction": 1.0, "replay": 8, "pairs": True}}, "on_policy.replay"),
        ({"on_policy": {"fraction": 1.0, "pairs": True, "balance": "gradual"}}, "on_policy.balance"),
        ({"on_policy": {"fraction": 1.0, "importance": {}}}, "add replay or a server"),
        ({"on_policy": {"fraction": 1.0, "replay": 8, "temperature": 0.7, "importance": {}}}, "at temperature 1 alone"),
    ],
)
def test_mistakes_are_told(folder, changes, words):
    changes = {"on_policy": {"fraction": 0.5}} | changes
    with pytest.raises((UserError, ValueError)) as told:
        trainer(folder, "wrong", **changes)
    assert words.split(".")[-1] in str(told.value)


def test_answers_are_weighed_by_what_their_images_tell_the_teacher(folder):
    settings = {"fraction": 1.0, "max_new_tokens": 4, "visual_advantage": {"images": "none", "temperature": 0.5}}
    changes = {"loss": [{"name": "reverse_kl"}], "on_policy": settings, "training__steps": 2}
    run = trainer(folder, "weighed", **changes)
    step = run.prepare_step(run.dataset[0])
    weights = torch.cat([batch.answer_weights for batch in step.batches])
    assert len(weights) == run.on_policy.counts["answers"]
    assert weights.mean() == pytest.approx(1)

    # The same by the teacher's plain log-probabilities, answer by answer.
    advantages = []
    for source, row in run.on_policy._usable(step, run.dataset.mixture.samples_of(0)):
        conversation = run.sources[source][row].before_last_answer()
        ids = answers_of(step)[len(advantages)]
        seen = log_prob(run.teacher, conversation, [run.parts.load_image(i) for i in conversation.images], ids)
        text = [[part for part in m["content"] if part["type"] != "image"] for m in conversation.messages]
        messages = tuple({**m, "content": parts} for m, parts in zip(conversation.messages, text, strict=True))
        advantages.append(seen - log_prob(run.teacher, replace(conversation, messages=messages, images=()), [], ids))
    expected = (torch.tensor(advantages).double() / 0.5).softmax(0) * len(advantages)
    assert weights.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert weights.std() > 0.01

    # The loss is the weighted mean, and the weights reach the gradient.
    run.run()
    line = next(line for line in story(run) if line["kind"] == "train")
    assert line["on_policy/visual_advantage"] == pytest.approx(sum(advantages) / len(advantages), rel=1e-4)
    even = trainer(folder, "even", **changes | {"on_policy": {"fraction": 1.0, "max_new_tokens": 4}})
    even.run()
    assert story(even)[0]["loss"] != pytest.approx(line["loss"], rel=1e-4)


def answers_of(step):
    """The token ids of a step's answers, in order."""
    found = []
    for batch in step.batches:
        found += [batch.targets[batch.sample_of == number].tolist() for number in range(batch.samples)]
    return found


@torch.no_grad()
def log_prob(teacher, conversation, images, ids):
    """The mean log-probability of an answer's tokens after a question."""
    row = teacher.processor.answered(teacher.processor.encode(conversation, images, generation=True), ids)
    positions = row.supervised.nonzero().flatten() - 1
    hidden = teacher.model(teacher.processor.collate([row]), positions).hidden
    return teacher.model.head.logprobs(hidden, torch.tensor(ids)).mean().item()


def importance_run(folder, name, **section):
    losses = [{"name": "reverse_kl"}, {"name": "policy_gradient", "weight": 0.5}]
    section = {"fraction": 1.0, "max_new_tokens": 4, "replay": 64, **section}
    changes = {"training__steps": 2, "training__micro_batch_size": 4}
    return trainer(folder, name, loss=losses, on_policy=section, **changes)


def test_fresh_answers_have_importance_1(folder):
    told = []
    for name, section in (("without", {}), ("with", {"importance": {}})):
        run = importance_run(folder, name, **section)
        run.run()
        told.append([line for line in story(run) if line["kind"] == "train"])
    for without, line in zip(*told, strict=True):
        assert (line["on_policy/importance"], line["on_policy/clipped"]) == (pytest.approx(1, abs=1e-5), 0)
        for key in ("loss", "reverse_kl/loss", "policy_gradient/k2", "grad_norm"):
            assert line[key] == pytest.approx(without[key], rel=1e-5), key


@pytest.mark.parametrize("over", ["token", "answer"])
def test_stale_answers_are_weighed_by_truncated_ratios(folder, over):
    run = importance_run(folder, f"stale_{over}", importance={"clip": 1.5, "over": over})
    batch = run.prepare_step(run.dataset[0]).batches[0]
    torch.manual_seed(0)
    with torch.no_grad():
        run.student.head.parameters[0].add_(0.3 * torch.randn_like(run.student.head.parameters[0]))

    # The ratios by plain probabilities, answer by answer.
    hidden = run.student(batch.student.inputs, batch.student.positions).hidden
    logits = run.student.head.logits(hidden)
    teacher = run.loss_teacher.outputs(batch).targets
    now = logits.detach().log_softmax(-1)[range(len(logits)), batch.targets]
    expected, ratio, before = [], 1.0, None
    for own, (later, earlier) in zip(batch.sample_of, zip(now, batch.drawn_logprobs, strict=True), strict=True):
        ratio = ratio if over == "answer" and own == before else 1.0
        ratio, before = ratio * float((later - earlier).exp()), own
        expected.append(min(ratio, 1.5))
    weights = torch.tensor(expected)
    assert 1.5 in expected
    assert weights.std() > 0.1

    # Each token's loss is multiplied, and so is its gradient; they are averaged over all tokens.
    plain = torch.zeros(())
    loss, sums = run.engine.task(batch, run.loss_teacher.outputs(batch))
    for term in run.terms:
        rows = weights * term.loss(logits, teacher.head.logits(teacher.hidden), batch.targets)
        plain = plain + term.weight * rows.sum()
        assert float(sums[term.name].loss) == pytest.approx(float(rows.detach().sum()), rel=1e-4)
        assert float(sums[term.name].count) == len(weights)
    names, parameters = zip(*((n, p) for n, p in run.student.named_parameters() if p.requires_grad), strict=True)
    ours = torch.autograd.grad(loss, parameters, allow_unused=True)
    theirs = torch.autograd.grad(plain, parameters, allow_unused=True)
    for name, mine, other in zip(names, ours, theirs, strict=True):
        if other is not None:
            assert torch.allclose(mine, other, rtol=1e-3, atol=1e-5 * float(other.abs().max())), name
    metrics = run.importance.metrics()
    assert metrics["on_policy/importance"] == pytest.approx(float(weights.mean()), rel=1e-4)
    assert metrics["on_policy/clipped"] == pytest.approx(expected.count(1.5) / len(expected))
