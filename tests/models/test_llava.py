"""Assembled students as Transformers' LLaVA: the same logits, tokens and pictures; parts without equal are refused."""

import pytest
import torch
import transformers
from PIL import Image

from data.conversation import Conversation
from data.errors import UserError
from vlm_distill.models import build_vlm, load_vlm
from vlm_distill.models.llava import as_llava

NARROW = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
CLIP = {
    "source": "transformers",
    "config": {"model_type": "clip_vision_model", **NARROW, "image_size": 28, "patch_size": 7},
    "layer": -2,
}
SIGLIP = {
    "source": "transformers",
    "config": {"model_type": "siglip_vision_model", **NARROW, "image_size": 28, "patch_size": 7},
    "layer": -1,
}
TIMM = {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 7}
TOWERS = {
    "clip": CLIP,
    "clip, all tokens": CLIP | {"select": "cls_patch"},
    "clip, final output": CLIP | {"layer": None},
    "siglip": SIGLIP,
    "open_clip": {
        "source": "open_clip",
        "config": {
            "quick_gelu": True,
            "vision_cfg": {"image_size": 28, "patch_size": 7, "width": 16, "layers": 3, "head_width": 8},
        },
        "layer": -2,
    },
    "timm clip": {
        "source": "timm", "name": "vit_base_patch32_clip_quickgelu_224", "config": TIMM, "image_size": 28, "layer": -2
    },
    "timm siglip": {
        "source": "timm", "name": "vit_base_patch16_siglip_224", "config": TIMM, "image_size": 28, "layer": -2
    },
}  # fmt: skip


def decoder(kind="llama", **more):
    narrow = NARROW | {"num_key_value_heads": 1, "num_hidden_layers": 2, "initializer_range": 0.4}
    return {"config": {"model_type": kind, **narrow, "max_position_embeddings": 256, **more}}


def build(tokenizer, tower, kind="llama", projector=None, **more):
    torch.manual_seed(0)
    parts = {"vision_encoder": tower, "projector": projector or {"type": "mlp"}, "decoder": decoder(kind, **more)}
    return build_vlm(parts, tokenizer=tokenizer).eval()


def asked(*content):
    parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in content]
    return Conversation(({"role": "user", "content": parts},))


def picture(width=28, height=28):
    noise = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(1)) * 255
    return Image.fromarray(noise.to(torch.uint8).numpy())


@pytest.mark.parametrize(
    ("tower", "kind", "tied"),
    [*((tower, "llama", False) for tower in TOWERS), ("clip", "qwen2", True), ("siglip", "mistral", False)],
)
def test_logits_and_answers_are_the_same(make_tokenizer, tmp_path, tower, kind, tied):
    model = build(make_tokenizer(), TOWERS[tower], kind, tie_word_embeddings=tied)
    vocabulary = len(model.processor.tokenizer)
    prompts = [
        (asked("What ", None, "\ncolour? ", None), [picture(), picture(28, 28)]),
        (asked("How many shapes?"), []),
    ]
    before = model.generate(prompts, max_new_tokens=8)
    encoded = [model.processor.encode(*prompt, generation=True) for prompt in prompts]
    as_llava(model).save_pretrained(tmp_path)
    made = load_vlm(tmp_path)
    assert type(made.model).__name__ == "LlavaForConditionalGeneration"
    rows = [made.processor.encode(*prompt, generation=True) for prompt in prompts]
    for ours, theirs in zip(encoded, rows, strict=True):
        mask = made.processor.image_tokens(theirs)
        assert torch.equal(mask, model.processor.image_tokens(ours))
        assert torch.equal(theirs.input_ids[~mask], ours.input_ids[~mask])
    inputs = [m.processor.collate(r, padding_side="left") for m, r in ((model, encoded), (made, rows))]
    torch.testing.assert_close(inputs[1]["pixel_values"], inputs[0]["pixel_values"])
    places = inputs[0]["attention_mask"].flatten().nonzero()[:, 0]
    with torch.no_grad():
        hidden = model(inputs[0], places).hidden
        whole = made.model(**inputs[1]).logits.flatten(0, 1)[places]
        expected = model.decoder.lm_head(hidden)
    assert (whole[:, :vocabulary] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (whole[:, vocabulary] < whole.max(-1).values).all()
    assert [a.token_ids for a in made.generate(prompts, max_new_tokens=8)] == [a.token_ids for a in before]


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_pictures_are_resized_alike(make_tokenizer, resize):
    model = build(make_tokenizer(), CLIP | {"resize": resize})
    smooth = picture(8, 4).resize((96, 48), Image.Resampling.BICUBIC)
    made = as_llava(model)
    settings = made.processor.processor.image_processor.to_dict()
    expected = model.vision_encoder.preprocess(smooth)
    step = 1 / 255 / min(model.vision_encoder.std)
    for backend, steps in (("torchvision", 2), ("pil", 1.01)):
        name = settings["image_processor_type"]
        assert name == ("LlavaImageProcessor" if resize == "pad" else "CLIPImageProcessor")
        kind = getattr(transformers, name + ("Pil" if backend == "pil" else ""))
        found = kind(**settings)(smooth, return_tensors="pt")["pixel_values"][0]
        assert (found - expected).abs().max() <= steps * step


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"projector": {"type": "pixel_shuffle_mlp"}}, "projector pixel_shuffle_mlp"),
        ({"projector": {"type": "mlp", "depth": 3}}, "projector mlp is not LLaVA"),
        ({"kind": "gemma"}, "decoder gemma"),
        ({"tower": SIGLIP | {"layer": None}}, "before the final norm; train with vision_encoder.layer"),
        ({"tower": CLIP | {"image_size": 42}}, "positions of 28 pixels are stretched to 42"),
        ({"tower": {"source": "timm", "name": "convnext_atto", "image_size": 32, "layer": -2}}, "convnext_atto"),
        (
            {
                "tower": {
                    "source": "timm",
                    "name": "vit_tiny_patch16_224",
                    "config": TIMM,
                    "image_size": 28,
                    "layer": -2,
                }
            },
            "pre_layrnorm",
        ),
    ],
)
def test_what_has_no_equal_is_refused_by_name(make_tokenizer, changes, says):
    model = build(make_tokenizer(), **({"tower": CLIP} | changes))
    with pytest.raises(UserError, match="--format llava: ") as caught:
        as_llava(model)
    assert says in str(caught.value)


def test_a_language_model_is_no_llava(make_tokenizer):
    with pytest.raises(UserError, match="no vision encoder"):
        as_llava(build_vlm({"decoder": decoder()}, tokenizer=make_tokenizer()))
