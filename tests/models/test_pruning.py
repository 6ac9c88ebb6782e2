"""Students cut from teachers: the right layers, an unchanged teacher, a working key-value cache."""

import families
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from vlm_distill.models import PretrainedVLM, build_vlm, load_vlm
from vlm_distill.models.common import count_parameters
from vlm_distill.models.family_classes import adapted
from vlm_distill.models.plain_layers import find_stack
from vlm_distill.models.pruning import Kept, pruned, spaced_layers


@pytest.mark.parametrize(
    ("count", "total", "layers"),
    [(1, 4, [0]), (2, 4, [0, 3]), (4, 4, [0, 1, 2, 3]), (3, 5, [0, 2, 4]), (5, 12, [0, 3, 6, 8, 11])],
)
def test_layers_are_evenly_spaced_with_both_ends(count, total, layers):
    assert spaced_layers(count, total) == layers


@pytest.fixture
def teacher(settings, tokenizer):
    torch.manual_seed(0)
    return build_vlm(settings, tokenizer).eval()


def test_the_student_has_the_teachers_layers_and_the_teacher_keeps_them(teacher):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = pruned(teacher, {"decoder": Kept([0, 2])})
    assert len(teacher.decoder.model.layers) == teacher.decoder.config.num_hidden_layers == 4
    assert len(student.decoder.model.layers) == student.decoder.config.num_hidden_layers == 2
    old, new = teacher.decoder.model.layers, student.decoder.model.layers
    for mine, its in ((0, 0), (1, 2)):
        for a, b in zip(new[mine].parameters(), old[its].parameters(), strict=True):
            assert torch.equal(a, b)
    assert [layer.self_attn.layer_idx for layer in old] == [0, 1, 2, 3]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_the_student_equals_the_teacher_with_its_layers_skipped(teacher, talk, picture):
    student = pruned(teacher, {"decoder": Kept([0, 3])})
    inputs = teacher.processor.collate([teacher.processor.encode(talk([None, "What?"], "red"), [picture()])])
    positions = torch.arange(inputs["input_ids"].shape[1])
    hidden = student(inputs, positions).hidden
    for layer in (1, 2):
        teacher.decoder.model.layers[layer].forward = lambda hidden_states, **_: hidden_states
    torch.testing.assert_close(hidden, teacher(inputs, positions).hidden)


def test_the_students_cache_head_and_ties_work(teacher, talk, picture, tmp_path):
    student = pruned(teacher, {"decoder": Kept([0, 2, 3])})
    assert student.head._linear is student.decoder.lm_head
    assert student.decoder.lm_head.weight is student.decoder.get_input_embeddings().weight
    prompt = (talk([None, "What?"]), [picture()])
    [answer] = student.generate([prompt], max_new_tokens=5)
    embeddings, _ = student._embed(student.processor.collate([student.processor.encode(*prompt, generation=True)]))
    slow = student.decoder.generate(
        inputs_embeds=embeddings, max_new_tokens=5, do_sample=False, use_cache=False, eos_token_id=2
    )
    assert answer.token_ids == slow[0].tolist()
    student.save_pretrained(tmp_path)
    again = load_vlm(tmp_path)
    assert again.generate([prompt], max_new_tokens=5)[0].token_ids == answer.token_ids


def test_lists_with_an_entry_a_layer_are_cut_too(tokenizer, talk, tmp_path):
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    tiny |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 340, "sliding_window": 4}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **tiny)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    teacher = load_vlm(tmp_path)
    kinds = teacher.decoder.config.layer_types
    assert kinds[0] != kinds[1]
    student = pruned(teacher, {"decoder": Kept([0, 1, 3])})
    assert student.decoder.config.layer_types == [kinds[0], kinds[1], kinds[3]]
    assert teacher.decoder.config.layer_types == kinds
    prompt = (talk("What colour is the circle?"), [])
    [answer] = student.generate([prompt], max_new_tokens=6)
    student.save_pretrained(tmp_path / "student")
    again = load_vlm(tmp_path / "student")
    assert again.generate([prompt], max_new_tokens=6)[0].token_ids == answer.token_ids
    [slow] = student.decoder.generate(
        student.processor.encode(*prompt, generation=True).input_ids[None],
        max_new_tokens=6,
        do_sample=False,
        use_cache=False,
        eos_token_id=2,
    )[:, -len(answer.token_ids) :].tolist()
    assert answer.token_ids == slow


def test_a_student_of_llava(tmp_path, make_tokenizer, talk, picture):
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = make_tokenizer(extra=("<image>",))
    template = (
        "{% for m in messages %}{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}"
        "{% endfor %}{{ eos_token }}{% endfor %}"
    )
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    text = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 4, "vocab_size": 340, "layer_types": None}
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_id, vision_feature_layer=-1)
    size = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    teacher = load_vlm(tmp_path)
    student = pruned(teacher, {"decoder": Kept([0, 3])})
    assert isinstance(student, PretrainedVLM)
    assert len(student.model.get_decoder().layers) == student.model.config.text_config.num_hidden_layers == 2
    assert student.model.config.vision_config.num_hidden_layers == 4
    assert len(teacher.model.get_decoder().layers) == 4
    prompt = (talk([None, "What?"]), [picture()])
    [answer] = student.generate([prompt], max_new_tokens=4)
    student.save_pretrained(tmp_path / "student")
    assert load_vlm(tmp_path / "student").generate([prompt], max_new_tokens=4)[0].token_ids == answer.token_ids


def test_tied_parameters_count_once(settings, tokenizer):
    tied = count_parameters(build_vlm(settings, tokenizer).parts)
    settings["decoder"]["config"]["tie_word_embeddings"] = False
    untied = count_parameters(build_vlm(settings, tokenizer).parts)
    assert untied["decoder"] - tied["decoder"] == 330 * 32
    assert list(tied) == ["vision_encoder", "projector", "decoder"]
    assert tied["projector"] == (16 * 32 + 32) + (32 * 32 + 32)


# Every family: sizes, the same logits whatever the order of what is kept, a plain model afterwards.

#: Families whose decoder or vision encoder is of another kind.
OTHER_DECODERS = ("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "phi4_multimodal")
OTHER_TOWERS = OTHER_DECODERS
#: Attention takes its head width from the width, so that both are narrowed together.
BOUND = ("qwen2_vl", "qwen2_5_vl")


@pytest.fixture(scope="module")
def family(make_tokenizer):
    return families.made_once(make_tokenizer)


def shuffled(kept):
    """The same indices in another order."""
    turned = {
        name: None if found is None else [row[::-1] for row in found]
        for name, found in (("neurons", kept.neurons), ("groups", kept.groups))
    }
    return Kept(kept.layers, channels=None if kept.channels is None else kept.channels[::-1], **turned)


def decoder_cut(name):
    """Half of the neurons, one of two key-value heads, three quarters or half of the width."""
    layers = 2
    width = 16 if name in BOUND else 24
    return Kept(None, [sorted({*range(1, 48, 2)})] * layers, [[1], [0]], [*range(3, 3 + width)])


def tower_cut(name):
    neurons = range(48) if name == "qwen2_vl" else range(0, 48, 3)  # a multiple of the width
    return Kept(None, [[*neurons]] * 2, [[1], [0]], [*range(1, 32, 2)])


def logits(model, sample):
    inputs = model.processor.collate([model.processor.encode(*sample)])
    hidden = model(inputs, torch.arange(inputs["input_ids"].shape[1])).hidden
    with model.head.weight() as weight:
        return hidden @ weight.T


@pytest.fixture
def sample(talk, picture):
    return talk([None, "What colour is it?"], "It is red."), [picture(1, (60, 30))]


@pytest.mark.parametrize("name", families.FAMILIES)
@torch.no_grad()
def test_a_student_pruned_by_nothing_has_the_teachers_logits(family, name, sample):
    teacher = family(name)
    student = pruned(teacher, {})
    assert torch.equal(logits(student, sample), logits(teacher, sample))
    assert student.model.config.to_dict().keys() == teacher.model.config.to_dict().keys()


@pytest.mark.parametrize("part", ["decoder", "vision_encoder"])
@pytest.mark.parametrize("name", [name for name in families.FAMILIES if name not in OTHER_DECODERS])
@torch.no_grad()
def test_every_plain_family_is_narrowed(family, name, part, sample, tmp_path):
    teacher = family(name)
    cut = decoder_cut(name) if part == "decoder" else tower_cut(name)
    student = pruned(teacher, {part: cut})
    stack = find_stack(student, part)
    assert (stack.width, stack.groups, stack.neurons) == (len(cut.channels), 1, len(cut.neurons[0]))
    assert stack.head_width == find_stack(teacher, part).head_width
    # The order in which anything is kept does not matter: every weight is cut along the right dimension.
    found = logits(student, sample)
    torch.testing.assert_close(logits(pruned(teacher, {part: shuffled(cut)}), sample), found, rtol=1e-4, atol=1e-4)
    student.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(adapted(again, student.processor.processor), sample), found)


TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8}
TINY |= {"num_key_value_heads": 2, "vocab_size": 340, "pad_token_id": 0}


@pytest.mark.parametrize("kind", ["cohere2", "gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen3", "smollm3"])
@torch.no_grad()
def test_language_models_are_narrowed(kind, tokenizer, talk, tmp_path):
    torch.manual_seed(0)
    teacher = build_vlm({"decoder": {"config": {"model_type": kind, **TINY}}}, tokenizer).eval()
    cut = Kept([0, 2], [[*range(1, 48, 2)], [*range(24)]], [[1], [0]], [*range(3, 27)])
    student = pruned(teacher, {"decoder": cut}).eval()
    sample = talk("What colour is it?", "It is red."), []
    found = logits(student, sample)
    torch.testing.assert_close(logits(pruned(teacher, {"decoder": shuffled(cut)}).eval(), sample), found)
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert again.config.num_hidden_layers == 2
    assert torch.equal(logits(load_vlm(tmp_path).eval(), sample), found)


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
@pytest.mark.parametrize("layer", [-2, None, 3])
@torch.no_grad()
def test_an_assembled_models_vision_encoder_is_narrowed(kind, layer, settings, tokenizer, sample, tmp_path):
    torch.manual_seed(0)
    tower = {"model_type": kind, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    tower |= {"num_attention_heads": 4, "image_size": 28, "patch_size": 7}
    settings["vision_encoder"] = {"source": "transformers", "config": tower, "layer": layer, "select": "patch"}
    settings["projector"] = {"type": "pixel_shuffle_mlp"}
    teacher = build_vlm(settings, tokenizer).eval()
    assert torch.equal(logits(pruned(teacher, {}).eval(), sample), logits(teacher, sample))
    cut = Kept([0, 2], [[*range(1, 48, 2)], [*range(24)]], [[1, 3], [0, 2]], [*range(5, 21)])
    student = pruned(teacher, {"vision_encoder": cut}).eval()
    found = logits(student, sample)
    torch.testing.assert_close(logits(pruned(teacher, {"vision_encoder": shuffled(cut)}).eval(), sample), found)
    assert student.vision_encoder.width == 16
    assert len(find_stack(student, "vision_encoder")) == 2
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(load_vlm(tmp_path).eval(), sample), found)
