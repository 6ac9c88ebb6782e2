"""A student with its teacher's projector: the same output, frozen, exported with the student, or refused by name."""

import pytest
import tiny
import torch
from pydantic import ValidationError

from data.errors import UserError
from vlm_distill import models
from vlm_distill.config.sections import RunConfig
from vlm_distill.models.teacher import ModelTeacher
from vlm_distill.training.loading import load_student

#: CLIP as in tests/support/tiny.py's LLaVA, whose last layer but one is read.
CLIP = {
    "source": "transformers",
    "config": {
        "model_type": "clip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "image_size": 28,
        "patch_size": 7,
    },
    "layer": -2,
}


def configured(folder, path, **student):
    """Return a run whose student has the teacher's projector, and a decoder of half its width."""
    plain = tiny.config(folder, folder / "data.jsonl", path)
    encoder = tiny.settings(width=24)["vision_encoder"]
    plain["student"] |= {"vision_encoder": encoder, "projector": "teacher"} | student
    plain["student"]["tokenizer"] = str(path)
    return plain


def loaded(plain):
    teacher = models.load_vlm(plain["teacher"]["path"], dtype="fp32")
    torch.manual_seed(0)
    return load_student(RunConfig.model_validate(plain), ModelTeacher(teacher)), teacher


def test_it_computes_what_the_teachers_does_and_only_its_mlp_trains(tmp_path):
    student, teacher = loaded(configured(tmp_path, tiny.write_teacher(tmp_path / "teacher")))
    features = torch.randn(2, 4, 24)
    torch.testing.assert_close(student.projector.inner(features), teacher.projector(features))
    assert student.projector(features).shape == (2, 4, 16)
    trained = {name for name, p in student.projector.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in student.projector.named_parameters() if name.startswith("adapter")} != set()
    assert not any(p.requires_grad for p in student.projector.inner.parameters())


def test_llavas_projector_is_taken_too(tmp_path):
    student, teacher = loaded(
        configured(tmp_path, tiny.write_llava(tmp_path / "llava", 3, size=24), vision_encoder=CLIP)
    )
    features = torch.randn(1, 16, 24)
    expected = teacher.model.base_model.multi_modal_projector(features)
    torch.testing.assert_close(student.projector.inner(features), expected)


def test_equal_widths_need_no_mlp(tmp_path):
    decoder = tiny.settings(width=24)["decoder"]
    student, teacher = loaded(configured(tmp_path, tiny.write_teacher(tmp_path / "teacher"), decoder=decoder))
    features = torch.randn(2, 4, 24)
    torch.testing.assert_close(student.projector(features), teacher.projector(features))


def test_the_exported_student_holds_it(tmp_path):
    student, _ = loaded(configured(tmp_path, tiny.write_teacher(tmp_path / "teacher")))
    student.save_pretrained(tmp_path / "student")
    again = models.load_vlm(tmp_path / "student")
    for name, tensor in student.state_dict().items():
        assert again.state_dict()[name].equal(tensor), name
    again.set_trainable(["projector"])
    assert all(p.requires_grad for p in again.projector.parameters())  # now the student's own


def test_another_vision_encoder_is_refused(tmp_path):
    path = tiny.write_teacher(tmp_path / "teacher")
    plain = configured(tmp_path, path, vision_encoder=tiny.settings(width=16)["vision_encoder"])
    with pytest.raises(UserError, match=r"projector has layers.0.weight of 24×24, .* needs 24×16"):
        loaded(plain)


def test_other_keys_are_refused(tmp_path):
    plain = configured(tmp_path, tiny.write_teacher(tmp_path / "teacher"), projector={"type": "teacher", "width": 3})
    with pytest.raises(UserError, match=r"student\.projector: unknown key 'width'"):
        loaded(plain)


def test_other_projectors_are_refused(tmp_path):
    plain = configured(tmp_path, tiny.write_language_model(tmp_path / "language"))
    with pytest.raises(UserError, match=r"student\.projector: the projectors of models from parts and of LLaVA's kind"):
        loaded(plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "'teacher' needs a teacher section"),
        (
            {"teacher": {"path": "t", "placement": "shard"}},
            "copies whole weights; use teacher.placement",
        ),
        ({"teacher": {"path": "t", "cache": {"folder": "c"}}}, "a served or cached teacher does not load"),
        ({"student": {"path": "s", "projector": None}, "teacher": {"path": "t", "projector": {}}}, ""),
    ],
)
def test_teachers_that_are_not_here_are_refused_before_loading(tmp_path, changes, message):
    plain = configured(tmp_path, tmp_path / "teacher") | changes
    if not message:
        RunConfig.model_validate(plain)
        return
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(plain)
