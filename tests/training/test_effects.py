"""Settings that do nothing are refused, or named when the run begins."""

import re

import pictures
import pytest
import tiny

from data.errors import UserError
from vision.config import ClassifierConfig
from vision.trainer import Trainer as ClassifierTrainer
from vlm_distill.config.sections import RunConfig
from vlm_distill.run import Run
from vlm_distill.trainer import Trainer
from vlm_distill.training.effects import idle_settings, late_warmup


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("effects")
    images = pictures.make_images(folder / "images", per_class=2)
    return folder, tiny.write_data(folder / "data"), tiny.write_teacher(folder / "teacher"), images


def language(material, **changes):
    folder, data, teacher, _ = material
    return RunConfig.model_validate(tiny.config(folder / "out", data, teacher, **changes))


def classifier(material, **changes):
    return ClassifierConfig.model_validate(pictures.config(material[0] / "classes", material[3], None, **changes))


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        (language, {"evaluation__every": 2}, "evaluation.every: there is nothing to evaluate"),
        (classifier, {"evaluation": {"every_epochs": 1}}, "evaluation.every_epochs: there is nothing to evaluate"),
        (language, {"loss": [{"name": "taid", "weight": 0}]}, "loss: every weight is 0"),
        (classifier, {"loss": [{"name": "cross_entropy", "weight": 0.0}]}, "loss: every weight is 0"),
    ],
)
def test_a_run_that_could_do_nothing_is_refused(material, kind, changes, says):
    with pytest.raises(ValueError, match=says):
        kind(material, **changes)


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        (language, {"evaluation__limit": 3}, "evaluation.limit: is for evaluations during training"),
        (language, {"evaluation__rules": "official"}, "evaluation.rules: is for benchmarks"),
        (language, {"evaluation__benchmark_data": "x"}, "evaluation.benchmark_data: is for benchmarks"),
        (language, {"data__eval": [{"path": "x", "weight": 2.0}]}, "data.eval.0.weight: is for training data"),
        (language, {"data__train": [{"path": "x", "weight": 2.0}]}, "data.train.0.weight: with a single source"),
        (language, {"data__prefetch": 4}, "data.prefetch: nothing is read ahead"),
        (
            language,
            {"optimizer__schedule": "constant", "optimizer__min_lr_ratio": 0.1},
            "optimizer.min_lr_ratio: has no effect with schedule: constant",
        ),
        (language, {"on_policy": {"fraction": 0.0}}, "on_policy: with fraction 0"),
        (
            language,
            {
                "deepspeed": {
                    "stage": 0,
                    "zero_optimization": {"overlap_comm": True, "offload_param": {"device": "none"}},
                }
            },
            "deepspeed.zero_optimization: overlap_comm has no effect at stage 0",
        ),
        (
            language,
            {"deepspeed": {"stage": 2, "zero_optimization": {"stage3_max_live_parameters": 9}}},
            "deepspeed.zero_optimization: stage3_max_live_parameters has no effect at stage 2, only at 3",
        ),
        (
            language,
            {"deepspeed": {"stage": 2, "zero_optimization": {"offload_param": {"device": "cpu"}}}},
            "deepspeed.zero_optimization: offload_param has no effect at stage 2",
        ),
        (
            language,
            {"deepspeed": {"stage": 1, "zero_optimization": {"offload_optimizer": {"device": "nvme"}}}},
            "deepspeed.zero_optimization.offload_optimizer: at stage 1 nvme means main memory",
        ),
        (classifier, {"optimizer__decay_epochs": 3.0}, "optimizer.decay_epochs: has no effect with schedule: cosine"),
        (classifier, {"evaluation": {"limit": 3}}, "evaluation.limit: is for evaluations during training"),
    ],
)
def test_a_setting_without_effect_is_named(material, kind, changes, says):
    said = idle_settings(kind(material, **changes))
    assert len(said) == 1
    assert said[0].startswith(says)


@pytest.mark.parametrize("kind", [language, classifier])
def test_a_plain_run_needs_no_remark(material, kind):
    assert idle_settings(kind(material)) == []


def test_a_warmup_longer_than_the_run_is_named(material, processes, capsys):
    assert late_warmup("optimizer.warmup", 5, 5, "steps") == []
    config = language(material, optimizer__warmup=50)
    Trainer(config, processes).run()
    told = " ".join(capsys.readouterr().err.split())
    assert (
        "optimizer.warmup: the warm-up (50 steps) is longer than the run (5): its full value is never reached" in told
    )
    trainer = ClassifierTrainer(classifier(material, optimizer__warmup_epochs=20), processes)
    assert re.match(
        r"optimizer.warmup_epochs: the warm-up \(20 epochs\) is longer than the run \(2\.5", trainer.remarks[0]
    )


def test_a_student_larger_than_its_teacher_is_told_of(material, processes, capsys):
    config = language(material, student=tiny.settings(width=32, layers=3), output=str(material[0] / "large"))
    trainer = Trainer(config, processes)
    trainer.run()
    assert trainer.parameters["student"] > trainer.parameters["teacher"]
    assert "the student is larger than its teacher" in capsys.readouterr().err


def test_a_frozen_student_is_refused(material, processes):
    with pytest.raises(UserError, match=r"student\.train: nothing is left to train"):
        Trainer(
            language(material, student={**tiny.settings(), "train": []}, output=str(material[0] / "frozen")), processes
        )


BATCH_NORM = {
    "source": "timm",
    "name": "resnet10t",
    "config": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "stem_width": 8},
    "image_size": 32,
}


@pytest.mark.parametrize("stage", [0, 2])
def test_a_student_with_batch_norm_trains_in_bf16_at_stage_0_alone(material, stage):
    run = language(material, student__vision_encoder=BATCH_NORM, training__dtype="bf16", deepspeed__stage=stage)
    if stage == 0:
        Run(run).prepare()
    else:
        with pytest.raises(UserError, match="batch norm does not run in bf16 at deepspeed"):
            Run(run).prepare()
