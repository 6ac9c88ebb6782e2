"""Language models: plain text and conversations, measures on held-out data, students that take tokenizers."""

import json
import math

import pytest
import tiny
import torch

from data.errors import UserError
from vlm_distill.config.sections import RunConfig
from vlm_distill.demo import make_tokenizer
from vlm_distill.eval import main as evaluate
from vlm_distill.inspection import Inspection
from vlm_distill.models import build_vlm, load_vlm
from vlm_distill.trainer import Trainer, train


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Folder, conversations, plain text and a teacher."""
    folder = tmp_path_factory.mktemp("language")
    talks = folder / "talks.jsonl"
    with talks.open("w") as file:
        for i in range(24):
            colour = list(tiny.COLOURS)[i % 4]
            texts = ["what color ?", "no", f"say {colour}" + " yes" * (i % 3), f"is it {colour}"]
            messages = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]
            file.write(json.dumps({"prompt": texts[0], "prompt_id": str(i), "messages": messages}) + "\n")
    return folder, talks, tiny.write_text(folder / "text"), tiny.write_language_model(folder / "teacher")


def settings(material, name, sources="both", **changes):
    folder, talks, text, teacher = material
    changes = {"student": {"decoder": tiny.settings()["decoder"]}} | changes
    plain = tiny.config(folder / name, talks, teacher, **changes)
    chosen = [{"path": str(talks), "name": "talks"}, {"path": str(text), "name": "text", "format": "text"}]
    chosen = {"both": chosen, "talks": chosen[:1], "text": chosen[1:]}[sources]
    plain["data"] |= {"train": chosen, "eval": chosen}
    plain["evaluation"] |= {"measures": ["rouge_l", "perplexity", "kl"], "max_new_tokens": 8}
    for path, value in changes.items():
        section, _, key = path.partition("__")
        plain[section] = plain[section] | {key: value} if key else value
    return RunConfig.model_validate(plain)


def lines(folder, kind="eval"):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


@pytest.fixture(scope="module")
def run(material, processes):
    changes = {"training__steps": 6, "evaluation__every": 2, "evaluation__limit": 5, "evaluation__best": "text/kl"}
    return train(settings(material, "run", **changes), processes)


def test_everything_is_measured_and_written(run):
    found = lines(run)
    assert [(line["step"], line["data"]) for line in found] == [(s, d) for s in (2, 4, 6) for d in ("talks", "text")]
    for line in found:
        assert ("rouge_l" in line) == (line["data"] == "talks")
        assert "exact" not in line
        assert line["perplexity"] > 1
        assert line["kl"] > 0
    scores = json.loads((run / "evaluation/talks/student/scores.json").read_text())
    assert scores["perplexity"] == found[-2]["perplexity"]
    assert (scores["n"], scores["measures"]) == (24, ["rouge_l", "perplexity", "kl"])
    teacher = json.loads((run / "evaluation/text/teacher/scores.json").read_text())
    assert "kl" not in teacher
    assert (teacher["n"], teacher["tokens"]) == (16, found[-1]["tokens"])


def test_the_measures_are_those_of_the_definition(material, run):
    """Perplexity and KL from whole logits, one conversation at a time."""
    student, teacher = load_vlm(run / "student"), load_vlm(material[3])
    losses, divergences = [], []
    for line in material[1].read_text().splitlines():
        from data.layouts import to_conversation

        conversation = to_conversation(json.loads(line))
        row = student.processor.encode(conversation, [])
        ids = row.input_ids[None]
        log_q, log_p = (model.decoder(input_ids=ids).logits[0].log_softmax(-1) for model in (student, teacher))
        places = row.supervised.nonzero().flatten()
        losses += (-log_q[places - 1, row.input_ids[places]]).tolist()
        divergences += (log_p.exp() * (log_p - log_q)).sum(-1)[places - 1].tolist()
    scores = json.loads((run / "evaluation/talks/student/scores.json").read_text())
    assert scores["tokens"] == len(losses)
    assert scores["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert scores["kl"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-4)


def test_the_command_measures_the_same(material, run, tmp_path, capsys):
    _, talks, text, teacher = material
    words = ["--model", str(run / "student"), "--teacher", str(teacher), "--out", str(tmp_path), "--max-length", "64"]
    asked = ["--data", str(talks), "--measures", "perplexity,kl,rouge_l", "--max-new-tokens", "8"]
    assert evaluate([*words, *asked]) == 0
    assert evaluate([*words, "--data", str(text), "--format", "text", "--measures", "kl,perplexity"]) == 0
    assert "KL" in capsys.readouterr().out
    for name in ("talks", "text"):
        ours, theirs = (
            json.loads((place / "scores.json").read_text())
            for place in (tmp_path / name, run / "evaluation" / name / "student")
        )
        names = {"n", "tokens", "perplexity", "kl", "rouge_l"}
        assert names & set(ours) == names & set(theirs)
        for measure in names & set(ours):
            assert ours[measure] == pytest.approx(theirs[measure], rel=1e-5), measure


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--measures", "bleu"], "no 'bleu'"),
        (["--measures", "kl"], "kl is measured from a --teacher"),
        (["--format", "text"], "plain text has no questions to answer"),
    ],
)
def test_mistakes_of_the_command(material, capsys, tmp_path, words, says):
    given = ["--model", str(material[3]), "--data", str(material[2]), "--out", str(tmp_path)]
    assert evaluate([*given, *words]) == 2
    assert says in capsys.readouterr().err


def test_the_best_has_the_lowest(run):
    about = json.loads((run / "best/best.json").read_text())
    assert (about["name"], about["measure"]) == ("text", "kl")
    tried = {line["step"]: line["kl"] for line in lines(run) if line["data"] == "text" and line["n"] == 5}
    assert about["score"] <= min(tried.values())
    assert about["step"] == 6 or about["score"] == tried[about["step"]]


def test_a_lower_one_takes_the_place_and_a_resumed_run_knows_it(material, processes, monkeypatch):
    config = settings(
        material,
        "lower",
        "text",
        training__steps=6,
        evaluation__every=2,
        evaluation__best="text/perplexity",
        training__checkpoint_every=2,
    )

    def scripted(values):
        said = iter(values)
        monkeypatch.setattr(
            "vlm_distill.training.evaluations.Evaluations._predict",
            lambda self, model, source, who, limit, problems: {"n": 1, "perplexity": next(said)},
        )

    scripted([9.0, 8.0])
    train(config, processes, until=4)
    scripted([8.0, 8.5, 1.0])  # that of the checkpoint's step again
    folder = train(config, processes)
    assert json.loads((folder / "best/best.json").read_text())["score"] == 8.0


def test_text_is_learnt(material, processes):
    loss = [{"name": "forward_kl"}]
    config = settings(material, "learnt", "text", loss=loss, training__steps=30, evaluation__every=3)
    found = [line["kl"] for line in lines(train(config, processes))]
    assert found[-1] < 0.7 * found[0]


def test_only_the_last_answer_is_learnt(material, processes):
    def supervised(**changes):
        trainer = Trainer(settings(material, "last", "talks", **changes), processes)
        batch = trainer.dataset[0].batches[0]
        return trainer.student.processor.tokenizer.batch_decode(batch.targets[:, None])

    assert "no" in supervised()
    assert "no" not in supervised(data__answers="last")


def test_what_is_too_long_is_counted_and_not_asked(material, processes):
    changes = {"data__max_prompt": 11, "data__max_bad": 1.0, "training__steps": 3}
    folder = train(settings(material, "long", "talks", **changes), processes)
    assert {json.loads(line)["reason"] for line in (folder / "problems.jsonl").read_text().splitlines()} == {"too long"}
    asked = len((folder / "evaluation/talks/student/predictions.jsonl").read_text().splitlines())
    assert 0 < asked < 24
    assert asked == lines(folder)[-1]["n"]


def test_a_student_takes_its_teachers_tokenizer(material, processes):
    folder = material[0]
    torch.manual_seed(3)
    own = build_vlm({"decoder": tiny.settings()["decoder"]}, tokenizer=make_tokenizer(["other", "words"]))
    own.save_pretrained(folder / "own")
    student = {"path": str(folder / "own")}
    with pytest.raises(UserError, match="same tokenizer"):
        Trainer(settings(material, "taken", student=student), processes)
    student["tokenizer"] = "teacher"
    run = train(settings(material, "taken", student=student, training__steps=3), processes)
    assert lines(run)[-1]["kl"] > 0
    exported, teacher = load_vlm(run / "student"), load_vlm(material[3])
    assert exported.processor.tokenizer.get_vocab() == teacher.processor.tokenizer.get_vocab()
    tokens = len(teacher.processor.tokenizer)
    assert exported.decoder.get_input_embeddings().num_embeddings == tokens > len(own.processor.tokenizer)
    named = {"decoder": {"name": str(folder / "own")}, "tokenizer": "teacher"}
    assert len(Trainer(settings(material, "named", student=named), processes).student.processor.tokenizer) == tokens


def test_text_is_shown_before_training(material):
    shown = Inspection(settings(material, "shown", "text")).shown(3)
    assert all(sample.problem is None for sample in shown)
    assert {sum(not s for s in sample.models["student"].supervised) for sample in shown} == {1}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"evaluation__measures": ["exact"]}, "text is plain text and gets no answers"),
        (
            {"evaluation__best": "talks", "evaluation__every": 2},
            "choose from talks/rouge_l, talks/perplexity, talks/kl",
        ),
        ({"evaluation__best": "text/rouge_l", "evaluation__every": 2}, "choose from text/perplexity, text/kl"),
        ({"evaluation__best": "other/kl", "evaluation__every": 2}, "other/kl is not evaluated"),
        ({"student": tiny.settings()}, "student cannot keep documents in one row apart"),
    ],
)
def test_mistakes(material, processes, changes, says):
    with pytest.raises(UserError, match=says):
        Trainer(settings(material, "wrong", **changes), processes)
