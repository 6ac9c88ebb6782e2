"""Transformers' own models behind the interface: the same logits, the right tokens supervised, saved unchanged."""

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from data.conversation import Conversation
from data.errors import BadSample, UserError
from vlm_distill.models import LMHead, PretrainedVLM, build_vlm, load_vlm
from vlm_distill.models.families import FAMILIES
from vlm_distill.models.lm_head import lm_head

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 340, "head_dim": 8, "pad_token_id": 0}
CAUSAL = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 2.0},
    "granitemoe": {"logits_scaling": 4.0, "num_local_experts": 2, "num_experts_per_tok": 1},
    "phi": {},  # has a bias
    "cohere2": {"logit_scale": 0.25, "sliding_window": 16},
    "hyperclovax": {"logits_scaling": 0.5},
    "falcon_h1": {
        "lm_head_multiplier": 0.5,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
    "minicpm3": {"dim_model_base": 16, "num_key_value_heads": 4},
    "recurrent_gemma": {"logits_soft_cap": 0.5, "lru_width": 32, "num_hidden_layers": 3},
}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 7}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("model_type", CAUSAL)
def test_causal_lms_logits(model_type, tokenizer, talk):
    config = {"model_type": model_type, **TINY, **CAUSAL[model_type]}
    torch.manual_seed(0)
    model = build_vlm({"decoder": {"config": config}}, tokenizer).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as drawn, the logits are too small for a cap or a bias to show
            parameter.add_(torch.randn_like(parameter) * 0.2)
        rows = [talk("What colour is the circle?", "red"), talk("How many?", "three blue triangles")]
        inputs = model.processor.collate([model.processor.encode(c, []) for c in rows])
        positions = inputs["attention_mask"].flatten().nonzero().flatten()
        got = model.head.logits(model(inputs, positions).hidden)
        expected = model.decoder(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.flatten(0, 1)
    torch.testing.assert_close(got, expected[positions], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["cohere", "granite", "gemma2"])
def test_scales_and_caps_are_not_one(model_type):
    config = AutoConfig.for_model(model_type, **TINY, **CAUSAL[model_type])
    head = lm_head(AutoModelForCausalLM.from_config(config))
    expected = {"cohere": (0.0625, None), "granite": (0.125, None), "gemma2": (1.0, 0.5)}[model_type]
    assert (head.scale, head.softcap) == expected


def test_head_with_bias_scale_cap_and_a_shared_vocabulary():
    linear = torch.nn.Linear(3, 7)
    hidden = torch.randn(5, 3)
    head = LMHead(linear, scale=0.5, softcap=2.0)
    expected = 2.0 * torch.tanh(0.5 * linear(hidden) / 2.0)
    torch.testing.assert_close(head.logits(hidden), expected)
    head.vocabulary = 4
    torch.testing.assert_close(head.logits(hidden), expected[:, :4])


def paligemma(cap):
    text = Gemma2Config(**TINY, final_logit_softcapping=cap, sliding_window=16)
    vision = SiglipVisionConfig(**VISION, vision_use_head=False)
    config = PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=5, projection_dim=32)
    return PaliGemmaForConditionalGeneration(config)


def test_a_composite_model_that_caps_its_logits():
    head = lm_head(paligemma(3.0))
    assert (head.softcap, head.scale) == (3.0, 1.0)


@pytest.fixture
def llava(make_tokenizer):
    tokenizer = make_tokenizer(eos="<|im_end|>", extra=("<|im_start|>", "<image>"), extra_special_tokens={})
    tokenizer.image_token = "<image>"
    tokenizer.chat_template = CHATML
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TINY),
        image_token_id=image_id,
        vision_feature_layer=-1,
    )
    side = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=side),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATML,
        image_token="<image>",
    )
    return LlavaForConditionalGeneration(config).eval(), processor


@pytest.fixture
def model(llava, tmp_path):
    own, processor = llava
    own.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    return load_vlm(tmp_path / "llava", attn_implementation="eager").eval()


def supervised_runs(model, sample):
    marked = sample.supervised.tolist()
    edges = [i for i in range(len(marked)) if marked[i] and not (i and marked[i - 1])]
    texts = []
    for start in edges:
        stop = next((i for i in range(start, len(marked)) if not marked[i]), len(marked))
        texts.append(model.processor.tokenizer.decode(sample.input_ids[start:stop]))
    return texts


def test_llavas_images_and_answers(model, talk, picture):
    assert isinstance(model, PretrainedVLM)
    talked = talk([None, "What", None], "It is red.", "Sure?", "yes", ["And", None], "red", system="Be brief.")
    sample = model.processor.encode(talked, [picture(1), picture(2), picture(3)])
    assert supervised_runs(model, sample) == ["It is red.<|im_end|>", "yes<|im_end|>", "red<|im_end|>"]
    assert model.processor.tokenizer.decode(sample.input_ids[sample.ends]) == "<|im_end|>" * 3
    assert model.processor.image_tokens(sample).sum() == 3 * 16
    assert sample.tensors["pixel_values"].shape == (3, 3, 28, 28)


def test_llavas_logits(model, talk, picture):
    encode = model.processor.encode
    samples = [
        encode(talk([None, "What colour?"], "It is red."), [picture(1)]),
        encode(talk("Yes?", "no"), []),
        encode(talk(["Compare", None, None], "blue"), [picture(2), picture(3)]),
        model.processor.dummy(),
    ]
    inputs = model.processor.collate(samples)
    assert inputs["pixel_values"].shape[0] == 4
    positions = inputs["attention_mask"].flatten().nonzero().flatten()
    with torch.no_grad():
        got = model.head.logits(model(inputs, positions).hidden)
        expected = model.model(**inputs).logits.flatten(0, 1)[positions]
        alone = []
        for sample in samples:
            one = model.processor.collate([sample])
            alone.append(model(one, torch.arange(len(sample.input_ids))).hidden)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.head.logits(torch.cat(alone)), got, rtol=1e-4, atol=1e-5)


def test_llavas_answers_are_transformers_own(model, talk, picture):
    prompts = [(talk([None, "What colour?"]), [picture(1)]), (talk("Yes?"), [])]
    together = model.generate(prompts, max_new_tokens=5)
    for prompt, answer in zip(prompts, together, strict=True):
        encoded = model.processor.collate([model.processor.encode(*prompt, generation=True)])
        ids = encoded["input_ids"]
        full = model.model.generate(**encoded, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert answer.token_ids == full.tolist()


def test_llavas_parts_train_apart(model, talk, picture):
    assert list(model.parts) == ["vision_encoder", "projector", "decoder"]
    model.set_trainable(["projector"])
    sample = model.processor.encode(talk([None, "What?"], "red"), [picture()])
    inputs = model.processor.collate([sample])
    model(inputs, sample.supervised.nonzero().flatten() - 1).hidden.square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained
    assert all("multi_modal_projector" in name for name in trained)
    names = {id(p) for part in model.parts.values() for p in part.parameters()}
    assert names == {id(p) for p in model.parameters()}


def test_a_dummy_row_gives_llavas_tower_zero_gradients(model, talk):
    samples = [model.processor.encode(talk("What?", "red"), []), model.processor.dummy()]
    inputs = model.processor.collate(samples)
    model(inputs, samples[0].supervised.nonzero().flatten() - 1).hidden.square().sum().backward()
    grads = [p.grad for p in model.parts["projector"].parameters()]
    assert all(g is not None and not g.any() for g in grads)


def test_checkpointing_recomputes(model, talk, picture):
    calls = {"decoder": 0, "tower": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    model.model.get_decoder().layers[0].mlp.register_forward_pre_hook(count("decoder"))
    model.parts["vision_encoder"].encoder.layers[0].mlp.register_forward_pre_hook(count("tower"))
    model.checkpoint_activations()
    sample = model.processor.encode(talk([None, "What?"], "red"), [picture()])
    model.train()
    model(model.processor.collate([sample]), torch.tensor([3, 30])).hidden.square().sum().backward()
    assert calls == {"decoder": 2, "tower": 2}


def test_transformers_loads_what_is_saved(model, talk, picture, tmp_path):
    model.save_pretrained(tmp_path / "again")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "again").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "again")
    own = model.model.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in plain.state_dict().items())
    messages = talk([None, "What?"], "red").messages
    text = processor.apply_chat_template(list(messages), tokenize=False)
    inputs = processor(text=[text], images=[picture(1)], return_tensors="pt")
    sample = model.processor.encode(talk([None, "What?"], "red"), [picture(1)])
    assert inputs["input_ids"][0].tolist() == sample.input_ids.tolist()
    with torch.no_grad():
        positions = torch.arange(len(sample.input_ids))
        got = model.head.logits(model(model.processor.collate([sample]), positions).hidden)
        torch.testing.assert_close(got, plain(**inputs).logits[0], rtol=1e-4, atol=1e-5)


def test_given_weights_are_saved(model, tmp_path):
    state = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path / "zeros", state)
    assert not any(p.any() for p in load_vlm(tmp_path / "zeros").parameters())


def test_dtype_and_attention_are_options(model, tmp_path):
    again = load_vlm(tmp_path / "llava", dtype="bf16", attn_implementation="sdpa")
    assert again.dtype == torch.bfloat16
    assert again.model.get_decoder().config._attn_implementation == "sdpa"
    assert model.model.get_decoder().config._attn_implementation == "eager"
    assert model.dtype == torch.float32


def test_the_placeholder_in_a_persons_text_is_refused(model, talk, picture):
    with pytest.raises(BadSample, match="placeholders"):
        model.processor.encode(talk([None, "what does <image> mean?"], "red"), [picture()])
    with pytest.raises(BadSample, match="images and image parts differ in number"):
        model.processor.encode(talk([None, "?"], "red"), [picture(), picture()])


def test_an_expansion_that_is_not_told_is_refused(model, talk, picture):
    own = model.processor.processor

    class Silent(type(own)):
        def __call__(self, **given):
            inputs = super().__call__(**given)
            inputs.pop("text_replacement_offsets", None)
            return inputs

    own.__class__ = Silent
    with pytest.raises(BadSample, match="image expansion not understood"):
        model.processor.encode(talk([None, "?"], "red"), [picture()])


def test_the_end_token_of_the_template_and_of_the_model_both_end_answers(model):
    model.model.generation_config.eos_token_id = [7, 8]
    end = model.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.end_tokens == {7, 8, end}


def test_a_language_model_with_grown_history(tokenizer, tmp_path, talk):
    config = AutoConfig.for_model("qwen2", **TINY)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config).eval()
    plain.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_vlm(tmp_path).eval()
    assert list(model.parts) == ["decoder"]
    assert not model.processor.has_vision
    answers = model.generate([(talk("What?", "red", "Sure?"), []), (talk("How many shapes?"), [])], max_new_tokens=4)
    for talked, answer in zip((talk("What?", "red", "Sure?"), talk("How many shapes?")), answers, strict=True):
        ids = model.processor.encode(talked, [], generation=True).input_ids[None]
        full = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, eos_token_id=2
        )
        assert answer.token_ids == full[0, ids.shape[1] :].tolist()
    model.save_pretrained(tmp_path / "again")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(v, saved[k]) for k, v in plain.state_dict().items())


def test_missing_models_are_one_line(tmp_path):
    for name in ("no/such-model", str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(UserError, match="no model at") as caught:
            load_vlm(name)
        assert "\n" not in str(caught.value)


def test_models_of_other_kinds_are_refused(tmp_path):
    CLIPVisionConfig(**VISION).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="neither a vision-language model nor a causal LM"):
        load_vlm(tmp_path)


def test_a_vlm_without_chat_template_is_refused(model, tmp_path):
    model.processor.processor.chat_template = None
    model.processor.tokenizer.chat_template = None
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="no chat template"):
        load_vlm(tmp_path / "bare")
    given = load_vlm(tmp_path / "bare", chat_template=CHATML)
    conversation = Conversation(({"role": "user", "content": [{"type": "image"}]},))
    assert given.processor.encode(conversation, [Image.new("RGB", (9, 9))], generation=True).images == 1


def test_every_family_with_a_row_of_facts_is_one_of_transformers():
    assert not FAMILIES.keys() - CONFIG_MAPPING_NAMES.keys()
