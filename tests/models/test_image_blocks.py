"""Image tokens of each image or tile, by family; and a step of two families that are compared tile by tile."""

import families
import pytest
import torch
from PIL import Image

from data.collate import Collator
from data.conversation import Conversation
from data.errors import BadSample
from vlm_distill import losses
from vlm_distill.losses import FeatureTerm, Term, must_be_alike, wanted_features
from vlm_distill.models.family_classes import adapted
from vlm_distill.models.teacher import ModelTeacher
from vlm_distill.training.task import DistillationTask
from vlm_distill.training.terms import prepare_losses

WIDE = Image.linear_gradient("L").resize((60, 40)).convert("RGB")
SQUARE = Image.linear_gradient("L").rotate(90).resize((30, 30)).convert("RGB")
IMAGES = [WIDE, SQUARE]


def talk(images, answer="a cat"):
    parts = [{"type": "image"}] * images + [{"type": "text", "text": "what is it?"}]
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return Conversation(({"role": "user", "content": parts}, said))


def load(make_tokenizer, name, seed=0):
    model, processor = families.Maker(make_tokenizer).build(name, seed=seed)
    return adapted(model.to(torch.bfloat16), processor)


# Images of one size; lines with breaks between them; tiles in one run; tiles with text between them; by their shape.
@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        *[("llava", [16, 16]), ("pixtral", [48, 25]), ("internvl", [4] * 4), ("smolvlm", [4] * 10)],
        *[("qwen2_vl", [2, 1]), ("gemma3", [4, 4]), ("aya_vision", [4] * 6), ("mistral3", [12, 9])],
    ],
)
def test_each_image_or_tile_has_its_number_of_tokens(make_tokenizer, name, blocks):
    processor = load(make_tokenizer, name).processor
    row = processor.encode(talk(2), IMAGES)
    assert processor.image_blocks(row) == blocks
    assert processor.image_tokens(row).sum() == sum(blocks)


def test_images_that_cannot_be_told_apart_are_refused_by_name(make_tokenizer):
    processor = load(make_tokenizer, "llava_next").processor
    assert processor.image_blocks(processor.encode(talk(1), [WIDE])) == [70]
    with pytest.raises(BadSample, match="images stand side by side: 1 runs of tokens for 2 images"):
        processor.image_blocks(processor.encode(talk(2), IMAGES))


@pytest.mark.parametrize("names", [("smolvlm", "internvl"), ("internvl", "smolvlm")])
@pytest.mark.parametrize("match", ["hungarian", "pool"])
def test_families_with_as_many_tiles_learn_from_each_other(make_tokenizer, names, match):
    student, teacher = load(make_tokenizer, names[0]), ModelTeacher(load(make_tokenizer, names[1], seed=1))
    terms = [
        Term("kl", losses.build("forward_kl"), on="images", match=match),
        FeatureTerm("relation", losses.build("vision_relation"), match=match),
        FeatureTerm("affinity", losses.build("vision_language_affinity", text="answers"), match=match),
    ]
    prepare_losses(terms, student, teacher)
    collator = Collator(student.processor, teacher.processor, 4096, alike=must_be_alike(terms))
    with pytest.raises(BadSample, match="image tiles differ"):
        collator.encode(talk(1), [SQUARE])
    batch = collator.batch([*collator.encode(talk(1), [WIDE]), *collator.encode(talk(0, "no"), [])])
    loss, sums = DistillationTask(student, terms)(batch, teacher.outputs(batch, wanted_features(terms)[1]))
    assert {name: found.count for name, found in sums.items()} == {"kl": 20, "relation": 1, "affinity": 1}
    loss.backward()
    gradients = [p.grad for p in student.parts["vision_encoder"].parameters() if p.grad is not None]
    assert torch.isfinite(loss)
    assert any(gradient.any() for gradient in gradients)
