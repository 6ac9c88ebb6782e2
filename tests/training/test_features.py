"""Losses on features in the task: which tokens and images they see, whole batches and parts, what is refused."""

import pytest
import tiny
import torch
import yaml
from PIL import Image
from pydantic import ValidationError

from data.collate import Collator, collate
from data.conversation import Conversation, Document, count_images
from data.encoding import encode_pair
from data.errors import UserError
from vlm_distill import models
from vlm_distill.config.file import load_config, save_config
from vlm_distill.config.sections import RunConfig
from vlm_distill.demo import make_tokenizer
from vlm_distill.losses import FeatureTerm, wanted_features
from vlm_distill.models.teacher import ModelTeacher
from vlm_distill.training.task import DistillationTask
from vlm_distill.training.terms import build_terms, prepare_losses

FEATURES = [
    {"name": "hidden_states", "layers": {-1: -1, 0: 1}},
    {"name": "vision_features"},
    {"name": "projector_features", "distance": "cosine"},
    {"name": "minilm", "relation_heads": 2},
]


def talk(question, answer, images=0):
    def message(role, text, pictures):
        return {"role": role, "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}

    return Conversation((message("user", question, images), message("assistant", answer, 0)))


TALKS = [
    talk("what color is it?", "red", 1),
    talk("say no", "no is no"),
    talk("is it blue?", "yes it is", 2),
    talk("say yes", "yes"),
]


class Setting:
    """A teacher, a narrower student, losses on their features, and batches of the talks above."""

    def __init__(self, folder, loss=None, **sections):
        self.teacher = ModelTeacher(models.load_vlm(tiny.write_teacher(folder / "teacher"), dtype="fp32"))
        torch.manual_seed(0)
        self.student = models.build_vlm(tiny.settings(), tokenizer=make_tokenizer(tiny.WORDS))
        plain = tiny.config(folder, folder / "data.jsonl", folder / "teacher", loss=loss or FEATURES, **sections)
        self.config = RunConfig.model_validate(plain)
        self.student.set_trainable(self.config.student.trained_whole)
        self.terms = build_terms(self.config)

    def prepare(self):
        prepare_losses(self.terms, self.student, self.teacher)
        return DistillationTask(self.student, self.terms)

    def batch(self, *numbers):
        processors = self.student.processor, self.teacher.processor
        colours = list(tiny.COLOURS.values())
        pairs = []
        for talked in (TALKS[i] for i in numbers):
            images = [Image.new("RGB", (16, 16), colours[k]) for k in range(count_images(talked.messages))]
            pairs.append(encode_pair(talked, images, *processors, 64))
        return collate(pairs, *processors)

    def outputs(self, batch):
        return self.teacher.outputs(batch, wanted_features(self.terms)[1])

    def run(self, task, batch, scales=None):
        return task(batch, self.outputs(batch), scales)


@pytest.fixture
def setting(tmp_path):
    return Setting(tmp_path)


def gradients(task):
    found = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    task.zero_grad()
    return found


def test_micro_batches_add_up_to_the_batch(setting):
    task = setting.prepare()
    scales = {"hidden_states": 0.1, "vision_features": 1 / 3, "projector_features": 1 / 3, "minilm": 0.1}
    loss, whole = setting.run(task, setting.batch(0, 1, 2, 3), scales)
    loss.backward()
    expected = gradients(task)
    losses, parts = [], []
    # The second has a dummy row for its picture, the last is a dummy row alone.
    for numbers in ((0,), (1, 3), (2,), ()):
        part, sums = setting.run(task, setting.batch(*numbers), scales)
        part.backward()
        losses.append(part)
        parts.append(sums)
    torch.testing.assert_close(sum(losses), loss)
    for name, sums in whole.items():
        assert sum(part[name].count for part in parts) == sums.count
        torch.testing.assert_close(sum(part[name].loss for part in parts), sums.loss)
    # Eight words and the end of each answer; three pictures.
    assert {name: sums.count for name, sums in whole.items()} == {
        "hidden_states": 12,
        "vision_features": 3,
        "projector_features": 3,
        "minilm": 12,
    }
    got = gradients(task)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_dummy_images_do_not_count_and_every_part_hangs_in_the_graph(setting):
    task = setting.prepare()
    batch = setting.batch(1, 3)
    assert (len(batch.student.inputs["pixel_values"]), batch.images) == (1, 0)
    loss, sums = setting.run(task, batch)
    assert sums["vision_features"].count == sums["projector_features"].count == 0
    assert sums["vision_features"].loss == 0
    loss.backward()
    projections = [name for name, _ in task.losses.named_parameters()]
    grads = {name: p.grad for name, p in task.named_parameters()}
    for name in projections:
        assert grads[f"losses.{name}"] is not None
        assert grads[f"losses.{name}"].any() == name.startswith("hidden_states")
    for part in (setting.student.vision_encoder, setting.student.projector):
        assert all(p.grad is not None and not p.grad.any() for p in part.parameters())


def test_tokens_that_are_not_distilled_are_left_out(setting):
    task = setting.prepare()
    batch = setting.batch(1, 2)
    whole = setting.run(task, batch)[1]
    batch.distilled[-1] = False
    loss, sums = setting.run(task, batch)
    assert sums["hidden_states"].count == whole["hidden_states"].count - 1
    assert sums["minilm"].count == whole["minilm"].count - 1
    assert sums["vision_features"].count == whole["vision_features"].count
    # As if the token were not there: relations are between the tokens that are left.
    for rows in (batch.student, batch.teacher):
        rows.positions = rows.positions[:-1]
    for name in ("targets", "distilled", "sample_of"):
        setattr(batch, name, getattr(batch, name)[:-1])
    torch.testing.assert_close(setting.run(task, batch)[0], loss)


def test_packed_documents_are_compared_within_themselves(tmp_path):
    """A row of several documents gives what they give one by one."""
    setting = Setting(tmp_path, loss=[{"name": "minilm", "relation_heads": 2}])
    setting.teacher = ModelTeacher(models.load_vlm(tiny.write_language_model(tmp_path / "reader"), dtype="fp32"))
    torch.manual_seed(0)
    setting.student = models.build_vlm({"decoder": tiny.settings()["decoder"]}, tokenizer=make_tokenizer(tiny.WORDS))
    task = setting.prepare()
    texts = ["what color is it", "say no no", "yes", "red is red is red", "blue black"]
    collator = Collator(setting.student.processor, setting.teacher.processor, 32)
    pairs = [pair for text in texts for pair in collator.encode(Document(text))]
    packed = collator.batch(pairs)
    assert len(packed.student.inputs["input_ids"]) < len(pairs)
    together, sums = setting.run(task, packed)
    alone = [setting.run(task, collator.batch([pair])) for pair in pairs]
    assert sums["minilm"].count == sum(one["minilm"].count for _, one in alone) == 15
    torch.testing.assert_close(together, sum(loss for loss, _ in alone), rtol=1e-4, atol=1e-6)


def test_the_teacher_gets_no_gradient(setting):
    task = setting.prepare()
    batch = setting.batch(0, 1)
    outputs = setting.outputs(batch)
    assert not any(feature.requires_grad for feature in outputs.features.values())
    task(batch, outputs)[0].backward()
    assert all(p.grad is None for p in setting.teacher.model.parameters())


def test_features_alone_leave_the_head_alone(setting):
    task = setting.prepare()
    setting.run(task, setting.batch(0, 1))[0].backward()
    assert setting.student.decoder.lm_head.weight.grad is None
    assert setting.student.decoder.base_model.layers[-1].self_attn.q_proj.weight.grad.any()


def test_projections_are_parameters_of_the_task_before_training(setting):
    with torch.no_grad():
        names = [name for name, p in setting.prepare().named_parameters() if p.requires_grad]
    learned = [name for name in names if name.startswith("losses.")]
    # Two layers, vision and projector, a weight and a bias each; MiniLM learns nothing of its own.
    assert len(learned) == 8
    assert not any("minilm" in name for name in learned)


def test_one_width_needs_no_projection(tmp_path):
    setting = Setting(tmp_path, loss=[{"name": "hidden_states"}])
    prepare_losses(setting.terms, setting.teacher.model, setting.teacher)
    assert list(setting.terms[0].loss.parameters()) == []


def test_autocast_does_not_reach_the_comparison(setting):
    task = setting.prepare()
    with torch.autocast("cpu", torch.bfloat16):
        loss, sums = setting.run(task, setting.batch(0, 1))
    assert loss.dtype == torch.float32
    assert all(s.loss.dtype == torch.float32 for s in sums.values())
    loss.backward()


def test_tiles_are_refused(setting):
    task = setting.prepare()
    batch = setting.batch(0)
    outputs = setting.outputs(batch)
    outputs.features["vision"] = outputs.features["vision"].repeat(3, 1, 1)
    with pytest.raises(UserError, match=r"loss vision_features: the teacher cuts 1 image\(s\) into 3 tiles"):
        task(batch, outputs)


@pytest.mark.parametrize(
    ("loss", "train", "message"),
    [
        (
            {"name": "hidden_states", "layers": {5: -1}},
            None,
            "hidden_states: student: feature hidden.5: .* has 2 layers",
        ),
        (
            {"name": "hidden_states", "layers": {-1: 9}},
            None,
            "hidden_states: teacher: feature hidden.9: .* has 3 layers",
        ),
        ({"name": "minilm", "relation_heads": 5}, None, "5 relation_heads do not divide the student's queries"),
        ({"name": "vision_features"}, ["decoder"], "pulls at the vision_encoder, which student.train freezes"),
        ({"name": "projector_features"}, ["decoder"], "pulls at the vision_encoder and projector, which"),
    ],
)
def test_what_cannot_be_is_refused_before_training(tmp_path, loss, train, message):
    student = tiny.settings() | ({"train": train} if train else {})
    with pytest.raises(UserError, match=message) as caught:
        Setting(tmp_path, [loss], student=student).prepare()
    assert "\n" not in str(caught.value)


def test_a_language_model_has_no_image_features(tmp_path):
    setting = Setting(tmp_path, [{"name": "vision_features"}])
    setting.teacher = ModelTeacher(models.load_vlm(tiny.write_language_model(tmp_path / "language")))
    with pytest.raises(
        UserError, match="loss vision_features: teacher: feature vision: a language model sees no images"
    ):
        setting.prepare()


def test_features_need_a_teacher(tmp_path):
    plain = tiny.config(tmp_path, tmp_path / "data.jsonl", None)
    plain["loss"] = [{"name": "minilm"}]
    with pytest.raises(ValidationError, match="loss minilm needs a teacher"):
        RunConfig.model_validate(plain)


def test_layers_are_written_as_numbers(tmp_path):
    plain = tiny.config(tmp_path, tmp_path / "data.jsonl", tmp_path / "teacher")
    del plain["loss"]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(plain))
    (tmp_path / "run.yaml").write_text("base: base.yaml\nloss:\n  - {name: hidden_states, layers: {-1: -1, 1: 2}}\n")
    config = load_config(tmp_path / "run.yaml", ["loss.0.distance=cosine"])
    save_config(config, tmp_path / "again.yaml")
    for one in (config, load_config(tmp_path / "again.yaml")):
        (term,) = build_terms(one)
        assert term.loss.student_features == ("hidden.-1", "hidden.1")
        assert term.loss.teacher_features == ("hidden.-1", "hidden.2")
        assert term.loss.distance == "cosine"


def test_two_of_one_loss_have_their_own_names(tmp_path):
    setting = Setting(tmp_path, [{"name": "hidden_states"}, {"name": "hidden_states", "layers": {1: 2}, "weight": 0.5}])
    assert [(term.name, term.weight) for term in setting.terms] == [("hidden_states", 1.0), ("hidden_states_2", 0.5)]
    assert all(isinstance(term, FeatureTerm) for term in setting.terms)
