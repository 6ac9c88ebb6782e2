"""DistillationTrainer: our own loop's losses inside Transformers' trainer, on text and on images."""

import copy
import json

import pytest
import tiny
import torch
from plain_batches import batches
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments

from vlm_distill import losses, models
from vlm_distill.config.sections import RunConfig
from vlm_distill.demo import make_tokenizer
from vlm_distill.integrations.transformers import STATE, DistillationTrainer
from vlm_distill.trainer import Trainer

STEPS = 4
LOSS = [{"name": "taid", "t_start": 0.2, "schedule": "adaptive"}, {"name": "cross_entropy", "weight": 0.5}]


class InOrder(DistillationTrainer):
    """Takes the batches in the order of our loop."""

    def _get_train_sampler(self, *_, **__):
        return SequentialSampler(self.train_dataset)


def arguments(folder, **changes):
    plain = {
        "per_device_train_batch_size": 1,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **plain | changes)


class Material:
    """A student and a teacher, batches in steps of one and of four, and what our loop makes of them."""

    def __init__(self, folder, kind, processes):
        folder.mkdir()
        if kind == "llava":
            tiny.write_llava(folder / "teacher", layers=3)
            tiny.write_llava(folder / "student", layers=2)
            data = tiny.write_data(folder / "data", text_only=(3, 5))
        else:
            tiny.write_language_model(folder / "teacher")
            torch.manual_seed(5)
            student = models.build_vlm({"decoder": tiny.settings()["decoder"]}, tokenizer=make_tokenizer(tiny.WORDS))
            student.save_pretrained(folder / "student")
            data = tiny.write_data(folder / "data", text_only=range(24))
        config = tiny.config(
            folder / "own",
            data,
            folder / "teacher",
            student={"path": str(folder / "student")},
            loss=LOSS,
            optimizer={"lr": 1e-2, "schedule": "constant", "weight_decay": 0.0},
            training__steps=STEPS,
        )
        self.batches = {}
        for accumulation in (4, 1):
            config["training"]["micro_batch_size"] = 8 // accumulation
            self.batches[accumulation], run = batches(config, processes)
        self._student, self._teacher = run.student, run.teacher.model
        self.tokenizer = run.student.processor.tokenizer
        self.kind = kind
        self.own = self._own_losses(config, processes)

    @staticmethod
    def _own_losses(config, processes):
        path = Trainer(RunConfig.model_validate(config), processes).run() / "metrics.jsonl"
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        return [entry for entry in entries if entry["kind"] == "train"]

    @property
    def student(self):
        """Transformers' own model, as it begins."""
        return self._plain(self._student)

    @property
    def teacher(self):
        return self._plain(self._teacher)

    def _plain(self, model):
        return copy.deepcopy(model.model if self.kind == "llava" else model.decoder).requires_grad_(True)

    def trainer(self, folder, accumulation=4, kind=InOrder, model=None, data=None, **changes):
        named = {name: changes.pop(name) for name in ("loss", "teacher", "eval_dataset") if name in changes}
        given = arguments(folder, gradient_accumulation_steps=accumulation, **changes)
        return kind(
            self.student if model is None else model,
            given,
            train_dataset=self.batches[accumulation] if data is None else data,
            data_collator=lambda rows: dict(rows[0]),
            processing_class=self.tokenizer,
            **{"teacher": self.teacher, "loss": LOSS} | named,
        )


@pytest.fixture(scope="module", params=["text", "llava"])
def material(request, tmp_path_factory, processes):
    return Material(tmp_path_factory.mktemp("integration") / request.param, request.param, processes)


def steps_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


NAMES = ("taid/loss", "taid/t", "cross_entropy/loss", "grad_norm")


@pytest.mark.parametrize("accumulation", [1, 4])
def test_losses_are_those_of_our_own_loop(material, tmp_path, accumulation):
    trainer = material.trainer(tmp_path, accumulation)
    widths = set()
    trainer.model.lm_head.register_forward_hook(lambda module, given, output: widths.add(output.shape[-1]))
    trainer.train()
    found = steps_of(trainer)
    assert len(found) == STEPS
    for ours, theirs in zip(material.own, found, strict=True):
        assert [theirs[name] for name in NAMES] == pytest.approx([ours[name] for name in NAMES], rel=1e-5, abs=1e-6)
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-4)  # Transformers rounds it
    assert found[-1]["taid/t"] > 0.2
    assert widths == {5}  # never a logit for each token of the vocabulary


def test_a_resumed_run_repeats_the_losses_and_checkpoints_hold_no_teacher(material, tmp_path):
    whole = material.trainer(tmp_path / "whole")
    whole.train()
    first = material.trainer(tmp_path / "cut", save_strategy="steps", save_steps=2)
    first.train()
    saved = tmp_path / "cut" / "checkpoint-2"
    weights = load_file(saved / "model.safetensors").values()
    assert sum(weight.numel() for weight in weights) == sum(p.numel() for p in material.student.parameters())
    assert (saved / STATE).is_file()

    resumed = material.trainer(tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(saved))
    found = [[entry[name] for name in NAMES] for entry in steps_of(resumed)[-2:]]
    assert found == [[entry[name] for name in NAMES] for entry in steps_of(whole)[-2:]]
    assert not resumed.teacher.training
    assert not any(p.requires_grad for p in resumed.teacher.parameters())

    (saved / STATE).unlink()
    with pytest.raises(ValueError, match=r"has no distillation\.pt"):
        material.trainer(tmp_path / "lost").train(resume_from_checkpoint=str(saved))


def test_inputs_of_the_teacher_s_own(material, tmp_path):
    """A teacher that sees two more tokens, and is compared at the same answers."""
    batch = material.batches[1][0]
    more = torch.ones_like(batch["input_ids"][:, :2])
    own = {
        "teacher_input_ids": torch.cat([more, batch["input_ids"]], 1),
        "teacher_attention_mask": torch.cat([more, batch["attention_mask"]], 1),
        "teacher_labels": torch.cat([-100 * more, batch["labels"]], 1),
    }
    if "pixel_values" in batch:
        own["teacher_pixel_values"] = batch["pixel_values"]
    trainer = material.trainer(tmp_path, 1, loss="forward_kl", max_steps=1, data=[{**batch, **own}])
    mask = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        theirs = {name.removeprefix("teacher_"): x for name, x in own.items() if name != "teacher_labels"}
        tokens = len(material.tokenizer)  # LLaVA's lm head is padded
        teacher = material.teacher.eval()(**theirs).logits[:, 2:-1, :tokens][mask].log_softmax(-1)
        shown = {name: x for name, x in batch.items() if name != "labels"}
        student = material.student.eval()(**shown).logits[:, :-1, :tokens][mask].log_softmax(-1)
    expected = (teacher.exp() * (teacher - student)).sum(-1).mean()
    trainer.train()
    assert steps_of(trainer)[0]["forward_kl/loss"] == pytest.approx(float(expected), rel=1e-5)


def test_evaluation_is_the_mean_over_each_batch_and_teaches_nothing(material, tmp_path):
    trainer = material.trainer(tmp_path, 1, eval_dataset=material.batches[1][:2], per_device_eval_batch_size=1)
    values = trainer.evaluate()
    with torch.no_grad():
        each = [float(trainer.compute_loss(trainer.model.eval(), batch)) for batch in material.batches[1][:2]]
    assert values["eval_loss"] == pytest.approx(sum(each) / 2, rel=1e-5)
    assert trainer._step_sums == []


def test_a_loss_s_own_parameters_are_trained_and_saved(material, tmp_path):
    loss = {"name": "ctkd", "grl_coefficient": -1.0}
    trainer = material.trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2, loss=loss)
    before = [p.detach().clone() for p in trainer.distillation_losses.parameters()]
    trainer.train()
    after = list(trainer.distillation_losses.parameters())
    assert before
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    saved = torch.load(tmp_path / "checkpoint-2" / STATE, weights_only=True)
    assert all(torch.equal(saved[name], p) for name, p in trainer.distillation_losses.named_parameters())


def test_a_loss_object_and_columns_of_a_data_set(material, tmp_path):
    trainer = material.trainer(tmp_path, loss=losses.build("reverse_kl"), remove_unused_columns=True)
    trainer._set_signature_columns_if_needed()
    assert {"input_ids", "teacher_input_ids", "labels", "teacher_labels"} <= set(trainer._signature_columns)
    assert [term.name for term in trainer.terms] == ["ReverseKL"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "hidden_states"}, "loss hidden_states: needs more than both models' logits"),
        ({"loss": {"name": "taid", "t_strat": 1}}, "loss taid has no parameter 't_strat'"),
        ({"loss": "tiad"}, "tiad"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: acts on a loss"),
        ({"teacher": None}, "teacher"),
    ],
)
def test_mistakes_are_named(material, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        material.trainer(tmp_path, **changes)


def test_a_student_is_not_its_own_teacher(material, tmp_path):
    model = material.student
    with pytest.raises(ValueError, match="teacher: is the student itself"):
        material.trainer(tmp_path, model=model, teacher=model)
