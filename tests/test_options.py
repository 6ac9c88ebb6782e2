"""An options model gives a command and an entry point the same options."""

import inspect
from dataclasses import fields
from typing import get_type_hints

import pytest

from data.errors import UserError
from vlm_distill.cli import evaluation, training
from vlm_distill.cli.evaluation import EvalOptions, RankEvalOptions
from vlm_distill.cli.options import RunOptions, parse, words_of
from vlm_distill.cli.training import GenerateOptions, TrainOptions


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (RunOptions, ["run.yaml", "training.steps=3", "loss.0.weight=-0.5"]),
        (GenerateOptions, ["run.yaml", "a.b=1", "--out", "x.jsonl", "--temperature", "0.7", "--samples", "2"]),
        (EvalOptions, ["m", "--data", "a", "--data", "b", "--columns", '{"q": "p"}', "--root", "r", "--shard"]),
        (
            EvalOptions,
            ["m", "--benchmarks", "pope,mme", "--judge", "http://j", "--judge-rate", "2.5", "--limit", "3"],
        ),
    ],
)
def test_words_are_read_back_as_they_were_written(model, words):
    options = parse(model, words)
    assert parse(model, words_of(options)) == options
    assert set(words_of(options)) == set(words)


def test_the_launcher_s_own_argument_is_ignored():
    assert parse(RunOptions, ["--local_rank=1", "run.yaml"]) == parse(RunOptions, ["run.yaml"])


def test_a_rank_takes_the_model_as_an_option():
    options = parse(EvalOptions, ["m", "--data", "d"])
    words = words_of(options, RankEvalOptions)
    assert words == ["--model", "m", "--data", "d"]
    assert vars(parse(RankEvalOptions, words)) == vars(options)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "Missing argument 'config'"),
        (["run.yaml"], "Missing option '--out'"),
        (["run.yaml", "--out", "x", "--samples", "0"], "--samples"),
        (["run.yaml", "--out", "x", "--sample", "1"], "No such option: --sample"),
    ],
)
def test_mistakes_are_one_line(words, says):
    with pytest.raises(UserError, match=says) as caught:
        parse(GenerateOptions, words)
    assert "\n" not in str(caught.value)


def test_help_ends_without_an_error(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(RunOptions, ["--help"], "vlm_distill.train")
    assert not caught.value.code
    assert "python -m vlm_distill.train" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "model"), [(evaluation.evaluate, EvalOptions), (training.train, TrainOptions)])
def test_a_command_has_the_model_s_options_and_its_own(command, model):
    parameters = inspect.signature(command).parameters
    assert [*parameters] == [*(field.name for field in fields(model)), "nproc"]
    assert get_type_hints(command, include_extras=True).keys() == parameters.keys()
