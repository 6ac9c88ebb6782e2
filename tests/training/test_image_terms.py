"""Losses at image tokens: what they compare, how they add up, what they cost, and what is refused."""

import pytest
import tiny
import torch
import yaml
from PIL import Image
from test_features import TALKS, Setting, gradients

from data.collate import Collator
from data.errors import BadSample, UserError
from vlm_distill import losses, models
from vlm_distill.config.file import load_config
from vlm_distill.config.sections import RunConfig
from vlm_distill.demo import make_tokenizer
from vlm_distill.models.teacher import ModelTeacher
from vlm_distill.planning.simulation import HeadCost, Meter, simulate
from vlm_distill.training.compatibility import pair_vocabularies
from vlm_distill.training.flops import StepFlops
from vlm_distill.training.terms import build_terms

TERMS = [
    {"name": "forward_kl"},
    {"name": "reverse_kl", "on": "images", "weight": 0.5},
    {"name": "vision_relation"},
    {"name": "visual_attention"},
    {"name": "vision_language_affinity"},
    {"name": "hidden_states"},
]
IMAGES_ALIKE = frozenset({"image tokens"})


@pytest.fixture
def setting(tmp_path):
    return Setting(tmp_path, TERMS)


def logits_at_images(model, side):
    """Compute a model's whole logits at the image tokens of real samples, one row after the other."""
    inputs = side.inputs
    hidden = model(inputs, torch.arange(inputs["input_ids"].numel())).hidden.unflatten(0, inputs["input_ids"].shape)
    with model.head.weight() as weight:
        return hidden[inputs["image_mask"]] @ weight.T


def test_a_term_on_images_compares_the_heads_at_the_image_tokens(setting):
    task, batch = setting.prepare(), setting.batch(0, 1, 2)
    _, sums = setting.run(task, batch)
    student, teacher = setting.student, setting.teacher.model
    rows = logits_at_images(student, batch.student), logits_at_images(teacher, batch.teacher)
    assert len(rows[0]) == sums["reverse_kl"].count == 3 * 4  # three images of four tokens
    expected = losses.build("reverse_kl")(*rows).sum()
    torch.testing.assert_close(sums["reverse_kl"].loss, expected.detach(), rtol=1e-4, atol=1e-6)


def test_micro_batches_add_up_and_dummy_images_add_nothing(setting):
    task = setting.prepare()
    scales = {"forward_kl": 0.1, "reverse_kl": 0.2, "vision_relation": 0.5, "hidden_states": 0.1}
    scales |= {"visual_attention": 0.5, "vision_language_affinity": 0.5}
    loss, whole = setting.run(task, setting.batch(0, 1, 2, 3), scales)
    loss.backward()
    expected = gradients(task)
    parts = [setting.run(task, setting.batch(*numbers), scales) for numbers in ((0, 3), (1,), (2,), ())]
    for part, _ in parts:
        part.backward()
    torch.testing.assert_close(sum(part for part, _ in parts), loss)
    assert {name: sums.count for name, sums in whole.items()} == {
        "forward_kl": 12,
        "reverse_kl": 12,
        "vision_relation": 2,
        "visual_attention": 2,
        "vision_language_affinity": 2,
        "hidden_states": 12,
    }
    for name, sums in whole.items():
        assert [sum(found[name].count for _, found in parts)] == [sums.count]
    got = gradients(task)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_terms_on_the_text_do_not_notice_a_term_on_images(tmp_path):
    values = {}
    for kept in (TERMS, [TERMS[0], TERMS[-1]]):
        setting = Setting(tmp_path, kept)
        values[len(kept)] = setting.run(setting.prepare(), setting.batch(0, 1, 2, 3))[1]
    for name in ("forward_kl", "hidden_states"):
        assert values[len(TERMS)][name].loss.equal(values[2][name].loss)


def test_the_heads_at_image_tokens_are_counted_and_planned(setting):
    batch, device = setting.batch(0, 2), torch.device("cpu")
    models_ = setting.student, setting.teacher.model
    plain, more = (StepFlops(*models_, device, bf16=False, at_images=at).count(batch) for at in (False, True))
    sizes = [model.head.parameters[0].numel() for model in models_]
    assert more - plain == 12 * (6 * sizes[0] + 2 * sizes[1])
    with Meter() as meter:
        student = models.build_vlm(tiny.settings(), tokenizer=make_tokenizer(tiny.WORDS))
        at = [None, HeadCost(1 << 20, 7)]
        planned = [simulate(meter, student, None, batch, HeadCost(0, 0), autocast=False, at_images=cost) for cost in at]
    assert planned[1].student_flops - planned[0].student_flops == 7
    assert planned[1].student > planned[0].student


def test_a_sample_with_unlike_numbers_of_image_tokens_is_left_out_by_name(setting):
    finer = tiny.settings()
    finer["vision_encoder"] = {**finer["vision_encoder"], "image_size": 32}
    student = models.build_vlm(finer, tokenizer=make_tokenizer(tiny.WORDS))
    both = student.processor, setting.teacher.processor
    image = [Image.new("RGB", (16, 16))]
    with pytest.raises(BadSample, match="image tokens differ: 16 for the student, 4 for the teacher"):
        Collator(*both, 64, alike=IMAGES_ALIKE).encode(TALKS[0], image)
    assert Collator(*both, 64).encode(TALKS[0], image)
    assert Collator(*both, 64, alike=IMAGES_ALIKE).encode(TALKS[1])


def test_a_sample_with_other_text_is_left_out_by_name(setting):
    class Wordy(type(setting.teacher.processor)):
        def encode(self, conversation, images, *, generation=False):
            row = super().encode(conversation, images, generation=generation)
            row.input_ids[0] += 1
            return row

    teacher = setting.teacher.processor
    other = Wordy(teacher.tokenizer, teacher.transform, teacher.tokens)
    image = [Image.new("RGB", (16, 16))]
    alike = losses.must_be_alike(setting.terms)
    assert alike == {"image tokens", "text tokens"}
    with pytest.raises(BadSample, match=r"text tokens differ: token 1 is .* compare at the answers alone"):
        Collator(setting.student.processor, other, 64, alike=alike).encode(TALKS[0], image)
    answers = losses.FeatureTerm("a", losses.build("visual_attention", queries="answers"))
    alike = losses.must_be_alike([answers])
    assert Collator(setting.student.processor, other, 64, alike=alike).encode(TALKS[0], image)


ON = {"on": "images"}
CACHE = {"cache": {"folder": "kept"}}
SERVER = {"server": {"url": "http://localhost:1/v1", "model": "m"}}


@pytest.mark.parametrize(
    ("loss", "teacher", "message"),
    [
        ({"name": "cross_entropy", **ON}, {}, "cross_entropy reads the right tokens, and images have none"),
        ({"name": "dkd", **ON}, {}, "dkd reads the right tokens, and images have none"),
        ({"name": "minilm", **ON}, {}, "minilm: on is for losses on logits"),
        ({"name": "forward_kl", **ON}, CACHE, "forward_kl: a cache holds nothing at image tokens"),
        ({"name": "vision_relation"}, CACHE, "vision_relation: a cache holds nothing at image tokens"),
        ({"name": "visual_attention"}, CACHE, "visual_attention: a cache holds nothing at image tokens"),
        ({"name": "forward_kl", **ON}, SERVER, "forward_kl: a server returns nothing at image tokens unless"),
    ],
)
def test_what_cannot_be_compared_at_image_tokens_is_refused(tmp_path, loss, teacher, message):
    plain = tiny.config(tmp_path, tmp_path / "data.jsonl", tmp_path / "teacher", loss=[loss])
    plain["teacher"] |= teacher
    with pytest.raises(UserError, match=message) as caught:
        build_terms(RunConfig.model_validate(plain))
    assert "\n" not in str(caught.value)


def test_a_model_without_eyes_is_refused(setting, tmp_path):
    setting.teacher = ModelTeacher(models.load_vlm(tiny.write_language_model(tmp_path / "language")))
    with pytest.raises(UserError, match="loss reverse_kl: the teacher sees no images"):
        setting.prepare()


def test_unlike_tokenizers_are_refused_for_logits_at_images(setting, tmp_path):
    teacher = ModelTeacher(models.load_vlm(tiny.write_pieces_teacher(tmp_path / "pieces")))
    with pytest.raises(UserError, match=r"without forward_kl, .* visual_attention, .*, hidden_states$"):
        pair_vocabularies(setting.config, setting.student, teacher, setting.terms)


@pytest.mark.parametrize("written", ["on: images", '"on": images'])
def test_on_needs_no_quotes_in_yaml(tmp_path, written):
    plain = tiny.config(tmp_path, tmp_path / "data.jsonl", tmp_path / "teacher")
    del plain["loss"]
    text = yaml.safe_dump(plain) + f"loss: [{{name: forward_kl, {written}}}]\n"
    (tmp_path / "run.yaml").write_text(text)
    assert [term.on for term in load_config(tmp_path / "run.yaml").loss] == ["images"]
    assert load_config(tmp_path / "run.yaml", ["loss.0.on=text"]).loss[0].on == "text"
    words = f"loss=[{{name: jsd}}, {{name: forward_kl, {written}}}]"
    assert [term.on for term in load_config(tmp_path / "run.yaml", [words]).loss] == ["text", "images"]
