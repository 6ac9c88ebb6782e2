"""Packed conversations give the same loss as separate ones, whichever families learn and teach."""

import families
import pytest
import tiny

from data.collate import Collator
from vlm_distill.config.sections import RunConfig
from vlm_distill.losses import CrossEntropy, ForwardKL, Term
from vlm_distill.models import load_vlm
from vlm_distill.models.teacher import ModelTeacher
from vlm_distill.training.packing_plan import WINDOW, plan_packing
from vlm_distill.training.task import DistillationTask

#: Student, teacher, and which of them keeps samples in one row apart.
PAIRS = [
    ("smolvlm", "qwen2_5_vl", (True, True)),
    ("qwen2_5_vl", "internvl", (True, True)),
    ("llava", "gemma3", (True, False)),
    ("gemma3", "qwen2_vl", (False, True)),
]


@pytest.fixture(scope="module")
def load(tmp_path_factory, make_tokenizer):
    folder, maker = tmp_path_factory.mktemp("packing"), families.Maker(make_tokenizer)

    def get(name, role):
        with families.num2words():
            return load_vlm(maker.write(name, folder / role / name, seed=len(role)))

    return get


def section(**changes):
    plain = tiny.config("run", "data.jsonl", "teacher", data__packing=True, **changes)
    return RunConfig.model_validate(plain).data


@pytest.mark.parametrize(("student_name", "teacher_name", "packs"), PAIRS)
def test_packed_equals_padded(load, talk, picture, student_name, teacher_name, packs):
    student, model = load(student_name, "student"), load(teacher_name, "teacher")
    plan = plan_packing(section(), student, model)
    assert plan.packed == packs
    assert plan.window == (0 if all(packs) else WINDOW)
    padded = [role for role, packed in zip(("student", "teacher"), packs, strict=True) if not packed]
    assert [line.split()[2] for line in plan.remarks] == padded

    teacher = ModelTeacher(model)
    samples = [
        (talk("Yes?", "no"), []),
        (talk([None, "What colour is it?"], "It is red."), [picture(1, (60, 30))]),
        (talk(["Compare", None, "with", None], "blue", "And?", "three"), [picture(2), picture(3, (30, 60))]),
        (talk("How many?", "three"), []),
        (talk("Is it red?", "yes"), []),
    ]
    task = DistillationTask(student.eval(), [Term("kl", ForwardKL()), Term("ce", CrossEntropy(), 0.5)])
    # All of them, those without an image, whose row has a blank one, and none.
    for chosen in (samples, [samples[0], samples[3]], []):
        results = []
        for packed in ((False, False), plan.packed):
            collator = Collator(student.processor, teacher.processor, 2048, packed=packed)
            batch = collator.batch([pair for sample in chosen for pair in collator.encode(*sample)])
            loss, sums = task(batch, teacher.outputs(batch))
            loss.backward()
            gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
            task.zero_grad()
            results.append((loss.item(), {name: term.count for name, term in sums.items()}, gradients, batch))
        (expected, counts, grads, apart), (found, other, got, together) = results
        assert found == pytest.approx(expected, rel=1e-5)
        assert other == counts
        if chosen:
            for side, packed in zip((together.student, together.teacher), packs, strict=True):
                whole = apart.student if side is together.student else apart.teacher
                shorter = side.inputs["input_ids"].numel() < whole.inputs["input_ids"].numel()
                assert not shorter if not packed else shorter or chosen is not samples
        assert grads.keys() == got.keys()
        for name, gradient in grads.items():
            assert (got[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max().clamp(min=1e-2), name


def test_a_window_that_was_asked_for_stays(load):
    plan = plan_packing(section(data__length_window=5), load("gemma3", "student"), None)
    assert (plan.packed, plan.window) == ((False, False), 5)
    assert "within 5 batches" in plan.remarks[0]
    off = tiny.config("run", "data.jsonl", "teacher", data__length_window=5)
    assert plan_packing(RunConfig.model_validate(off).data, None, None).window == 5
