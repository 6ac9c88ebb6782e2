"""Assembled models: image positions, every projector and part, gradients, generation, saving."""

import copy
import pickle
import weakref

import pytest
import torch
from multiplied import multiplied

from data.batch import ModelBatch
from data.conversation import Conversation
from data.errors import BadSample, UserError
from vlm_distill.models import build_vlm, load_vlm
from vlm_distill.models.lm_head import LMHead
from vlm_distill.models.template_marks import IMAGE
from vlm_distill.training.flops import ModelFlops

PROJECTORS = {
    "linear": {"type": "linear"},
    "mlp": {"type": "mlp", "depth": 3},
    "pixel_shuffle_mlp": {"type": "pixel_shuffle_mlp", "factor": 2},
    "resampler": {"type": "resampler", "tokens": 5, "layers": 1, "heads": 4},
}


@pytest.fixture
def model(settings, tokenizer):
    torch.manual_seed(0)
    return build_vlm(settings, tokenizer).eval()


@pytest.fixture
def batch(talk, picture):
    """Conversations with one image, two images in two turns, and none, with their images."""
    return [
        (talk([None, "What colour?"], "It is red."), [picture(1)]),
        (talk(["Compare", None, "with"], "yes", [None, "How many?"], "three blue"), [picture(2), picture(3)]),
        (talk("What is red?", "a colour"), []),
    ]


def encode(model, batch):
    return [model.processor.encode(c, images) for c, images in batch]


def all_positions(inputs):
    return inputs["attention_mask"].flatten().nonzero().flatten()


def supervised_positions(samples, length):
    return torch.cat([k * length + s.supervised.nonzero().flatten() - 1 for k, s in enumerate(samples)])


def own_logits(model, inputs):
    """The Transformers model's own logits over the same embeddings."""
    embeddings, _ = model._embed(inputs)
    return model.decoder(
        inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], position_ids=inputs["position_ids"]
    ).logits


def test_a_template_of_a_students_own_is_not_its_teachers(settings, tokenizer):
    """A student without a tokenizer takes its teacher's; the teacher keeps its own template."""
    before = tokenizer.chat_template
    own = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    student = build_vlm({**settings, "chat_template": own}, tokenizer)
    assert student.processor.tokenizer.chat_template == own
    assert tokenizer.chat_template == before


def test_images_take_their_place_and_nothing_else_changes(model, talk, picture):
    sample = model.processor.encode(talk(["Compare", None, "and", None, "<image>"], "yes"), [picture(1), picture(2)])
    tokens = model.processor.tokens
    assert tokens == 16
    assert sample.input_ids[~model.processor.image_tokens(sample)].tolist() == (
        [i for text in ("User: Compare", "and", "<image>\nAssistant: yes</s>\n")
         for i in model.processor.tokenizer(text)["input_ids"]]
    )  # fmt: skip
    runs = model.processor.image_tokens(sample).nonzero().flatten().split(tokens)
    assert [len(run) for run in runs] == [tokens, tokens]
    assert all(run[-1] - run[0] == tokens - 1 for run in runs)
    assert sample.images == 2


def test_hidden_states_and_head_give_the_decoders_own_logits(model, batch):
    inputs = model.processor.collate(encode(model, batch))
    positions = all_positions(inputs)
    with torch.no_grad():
        got = model.head.logits(model(inputs, positions).hidden)
        expected = own_logits(model, inputs).flatten(0, 1)[positions]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(model, batch, side):
    samples = encode(model, batch)
    with torch.no_grad():
        inputs = model.processor.collate(samples, padding_side=side)
        together = model(inputs, all_positions(inputs)).hidden
        alone = [model.processor.collate([s]) for s in samples]
        apart = torch.cat([model(i, all_positions(i)).hidden for i in alone])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_the_image_is_seen_where_it_stands(model, talk, picture):
    def hidden(first, second):
        sample = model.processor.encode(talk([None, "left", None, "right"], "yes"), [first, second])
        inputs = model.processor.collate([sample])
        return model(inputs, all_positions(inputs)).hidden

    with torch.no_grad():
        a, b = hidden(picture(1), picture(2)), hidden(picture(1), picture(3))
    same = (a == b).all(-1)
    second = model.processor.image_tokens(
        model.processor.encode(talk([None, "left", None, "right"], "yes"), [picture(1), picture(2)])
    ).nonzero()[model.processor.tokens]
    assert same[:second].all()
    assert not same[second:].any()


@pytest.mark.parametrize("kind", PROJECTORS)
def test_every_projector_runs_trains_and_is_saved(kind, settings, tokenizer, batch, tmp_path):
    settings["projector"] = PROJECTORS[kind]
    model = build_vlm(settings, tokenizer)
    expected = {"linear": 16, "mlp": 16, "pixel_shuffle_mlp": 4, "resampler": 5}[kind]
    assert model.processor.tokens == expected
    samples = encode(model, batch)
    inputs = model.processor.collate(samples)
    out = model(inputs, supervised_positions(samples, inputs["input_ids"].shape[1]), ["vision", "projector"])
    assert out.features["vision"].shape == (3, 16, 16)
    assert out.features["projector"].shape == (3, expected, 32)
    out.hidden.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.projector.parameters())
    model.save_pretrained(tmp_path)
    again = load_vlm(tmp_path)
    assert torch.equal(again(inputs, torch.arange(9)).hidden, model(inputs, torch.arange(9)).hidden)


@pytest.mark.parametrize("kind", PROJECTORS)
@pytest.mark.parametrize("tower", ["vit", "convnet"])
def test_operations_are_those_that_pytorch_counts(kind, tower, settings, tokenizer, talk, picture):
    settings["projector"] = PROJECTORS[kind]
    if tower == "vit":
        config = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
        vit = {"source": "timm", "name": "vit_tiny_patch16_224", "config": config, "image_size": 32, "layer": -2}
        settings["vision_encoder"] = vit
    model = build_vlm(settings, tokenizer).requires_grad_(False)  # PyTorch's counter hooks trained parameters
    rows = [model.processor.encode(talk([None, "What?"], "It is red."), [picture(i)]) for i in range(3)]
    inputs = model.processor.collate(rows)
    real = multiplied(model, inputs)
    costs = ModelFlops(model, trains=False)
    counted = costs.count(ModelBatch(inputs, *[torch.arange(0)] * 7, 0))
    for part, operations in counted.items():
        if part in real and (tower, part) != ("convnet", "vision_encoder"):
            assert operations == pytest.approx(real[part], rel=0.08), part
    assert (counted["vision_encoder"] > 0) == (tower == "vit")  # unknown for a convolutional one
    features = torch.stack(model.encode_images(rows))
    known = costs.count(ModelBatch({**inputs, "vision_features": features}, *[torch.arange(0)] * 7, 0))
    assert known == {**counted, "vision_encoder": 0}


def test_pixel_shuffle_joins_neighbours(settings, tokenizer):
    settings["projector"] = PROJECTORS["pixel_shuffle_mlp"]
    projector = build_vlm(settings, tokenizer).projector
    torch.nn.init.zeros_(projector.layers[3].bias)
    features = torch.zeros(1, 16, 16)
    baseline = projector(features)
    features[0, 6] = torch.randn(16)  # row 1, column 2 of the 4×4 grid: the upper right square
    changed = (projector(features) != baseline).any(-1)
    assert changed.tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("trained", [["projector"], ["decoder"], ["vision_encoder", "projector"], ["vision_encoder"]])
def test_gradients_reach_exactly_the_trained_parts(model, batch, trained):
    model.set_trainable(trained)
    samples = encode(model, batch)
    inputs = model.processor.collate(samples)
    model(inputs, supervised_positions(samples, inputs["input_ids"].shape[1])).hidden.square().sum().backward()
    for name, part in model.parts.items():
        for key, parameter in part.named_parameters():
            assert (parameter.grad is not None) == (name in trained), f"{name}.{key}"


def test_a_dummy_row_keeps_the_vision_tower_in_the_graph(model, talk):
    samples = [model.processor.encode(talk("What is red?", "a colour"), []), model.processor.dummy()]
    assert not samples[1].supervised.any()
    inputs = model.processor.collate(samples)
    model(inputs, supervised_positions(samples, inputs["input_ids"].shape[1])).hidden.square().sum().backward()
    grads = [p.grad for part in (model.vision_encoder, model.projector) for p in part.parameters()]
    assert all(g is not None and not g.any() for g in grads)


def test_no_image_in_the_batch(model, talk):
    inputs = model.processor.collate([model.processor.encode(talk("What is red?", "a colour"), [])])
    assert "pixel_values" not in inputs
    assert model(inputs, torch.tensor([2]), ["projector"]).features == {}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_saved_and_loaded_bit_for_bit(settings, tokenizer, batch, tmp_path, dtype):
    settings["dtype"] = dtype
    model = build_vlm(settings, tokenizer).eval()
    model.save_pretrained(tmp_path)
    again = load_vlm(tmp_path).eval()
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)
    assert again.dtype == (torch.bfloat16 if dtype else torch.float32)
    assert again.decoder.lm_head.weight is again.decoder.get_input_embeddings().weight
    assert again.processor.transform == model.processor.transform
    assert again.end_tokens == model.end_tokens
    sample, same = model.processor.encode(*batch[1]), again.processor.encode(*batch[1])
    assert torch.equal(sample.input_ids, same.input_ids)
    inputs = model.processor.collate([sample])
    assert torch.equal(model(inputs, torch.arange(9)).hidden, again(inputs, torch.arange(9)).hidden)
    # Rotary frequencies are not parameters: they stay float32 in a bfloat16 model.
    assert again.decoder.model.rotary_emb.inv_freq.dtype == torch.float32


def test_batch_norm_keeps_float32_in_a_bfloat16_model(settings, tokenizer, batch, tmp_path):
    settings["vision_encoder"] = {
        "source": "timm",
        "name": "resnet10t",
        "config": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "stem_width": 8},
        "image_size": 32,
    }
    whole = build_vlm(settings, tokenizer).eval()
    whole.save_pretrained(tmp_path)
    half = load_vlm(tmp_path, dtype="bfloat16").eval()
    assert {p.dtype for p in half.vision_encoder.parameters()} == {torch.bfloat16, torch.float32}
    inputs = whole.processor.collate([whole.processor.encode(*batch[1])])
    positions = torch.arange(9)
    expected, found = (model(inputs, positions).hidden for model in (whole, half))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_given_weights_are_saved_instead_of_the_models_own(model, tmp_path):
    state = {k: torch.zeros_like(v, dtype=torch.bfloat16) for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path, state)
    again = load_vlm(tmp_path)
    assert again.dtype == torch.bfloat16
    assert not any(p.any() for p in again.parameters())


def test_a_saved_model_without_its_chat_template_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"chat_template\.jinja is missing"):
        load_vlm(tmp_path)


def test_weights_of_another_model_are_refused(model, tmp_path, settings, tokenizer):
    model.save_pretrained(tmp_path)
    settings["projector"] = {"type": "mlp", "depth": 3}
    build_vlm(settings, tokenizer).save_pretrained(tmp_path / "other")
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"has no place for .*projector"):
        load_vlm(tmp_path)


def test_greedy_answers_are_those_of_a_loop_over_full_forwards(model, batch, talk):
    prompts = [*batch, (talk("red", "yes", "blue?"), [])]  # answers are cut off, earlier turns are not
    together = model.generate(prompts, max_new_tokens=6)
    for prompt, answer in zip(prompts, together, strict=True):
        [alone] = model.generate([prompt], max_new_tokens=6)
        assert alone.token_ids == answer.token_ids
        assert alone.logprobs == pytest.approx(answer.logprobs, abs=1e-4)
        conversation, images = prompt
        if conversation.messages[-1]["role"] == "assistant":
            conversation = conversation.prompt()
        sample = model.processor.encode(conversation, images, generation=True)
        ids, logprobs = [], []
        while len(ids) < 6 and not (ids and ids[-1] in model.end_tokens):
            full = copy.copy(sample)
            full.input_ids = torch.cat([sample.input_ids, torch.tensor(ids, dtype=torch.long)])
            full.tensors = dict(sample.tensors)
            mask = sample.tensors["image_mask"]
            full.tensors["image_mask"] = torch.cat([mask, mask.new_zeros(len(ids))])
            inputs = model.processor.collate([full])
            with torch.no_grad():
                hidden = model(inputs, torch.tensor([len(full.input_ids) - 1])).hidden
            row = model.head.logits(hidden)[0].log_softmax(-1).detach()
            ids.append(int(row.argmax()))
            logprobs.append(row.max().item())
        assert answer.token_ids == ids
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_given_answers_are_as_likely_as_a_full_forward_says(model, batch, talk):
    prompts = [(batch[0][0].prompt(), batch[0][1]), (talk("red", "yes", "blue?"), [])]
    options = [["red", "blue", "red blue"], ["no"]]
    together = model.score_options(prompts, options)
    assert [len(scores) for scores in together] == [3, 1]
    for prompt, texts, scores in zip(prompts, options, together, strict=True):
        for text, score in zip(texts, scores, strict=True):
            assert model.score_options([prompt], [[text]]) == [[pytest.approx(score, abs=1e-4)]]
            conversation, images = prompt
            message = {"role": "assistant", "content": [{"type": "text", "text": text}]}
            answered = Conversation((*conversation.messages, message), conversation.images)
            sample = model.processor.encode(answered, images)
            inputs = model.processor.collate([sample])
            with torch.no_grad():
                hidden = model(inputs, torch.arange(len(sample.input_ids) - 1)).hidden
            chain = model.head.logits(hidden).log_softmax(-1).gather(-1, sample.input_ids[1:, None])[:, 0]
            prompted = model.processor.encode(conversation, images, generation=True)
            places = (sample.supervised & ~sample.ends).nonzero().flatten()
            places = places[places >= len(prompted.input_ids)]
            assert model.processor.tokenizer.decode(sample.input_ids[places]).strip() == text
            assert score == pytest.approx(chain[places - 1].sum().item(), abs=1e-4)


def test_generation_stops_at_the_end_token_that_the_template_writes(settings, make_tokenizer, talk, monkeypatch):
    template = "{% for m in messages %}{{ m['content'] }}<|end|>\n{% endfor %}"
    model = build_vlm(settings, make_tokenizer(template, extra=("<|end|>",)))
    end = model.processor.tokenizer.convert_tokens_to_ids("<|end|>")
    assert end in model.end_tokens
    own_logits = LMHead.own_logits
    monkeypatch.setattr(LMHead, "own_logits", lambda *call: own_logits(*call).index_fill(-1, torch.tensor([end]), 50.0))
    [answer] = model.generate([(talk("hm"), [])], max_new_tokens=5)
    assert answer.token_ids == [end]
    assert answer.text == ""
    assert answer.logprobs == pytest.approx([0.0], abs=1e-6)


def test_checkpointing_recomputes_and_gives_the_same_gradients(model, batch):
    samples = encode(model, batch)
    inputs = model.processor.collate(samples)
    positions = supervised_positions(samples, inputs["input_ids"].shape[1])
    calls = {"decoder": 0, "tower": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    model.decoder.model.layers[1].mlp.register_forward_pre_hook(count("decoder"))
    model.vision_encoder.tower.stages[1].blocks[0].norm.register_forward_pre_hook(count("tower"))
    model.train()

    def gradients():
        model.zero_grad()
        model(inputs, positions).hidden.square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    assert calls == {"decoder": 1, "tower": 1}
    model.checkpoint_activations()
    again = gradients()
    assert calls == {"decoder": 3, "tower": 3}
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_model_without_vision_encoder_is_saved_as_transformers_saves_it(settings, tokenizer, talk, tmp_path, picture):
    from transformers import AutoModelForCausalLM

    model = build_vlm({"decoder": settings["decoder"]}, tokenizer).eval()
    assert list(model.parts) == ["decoder"]
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    sample = model.processor.encode(talk("What?", "red"), [])
    inputs = model.processor.collate([sample])
    again = load_vlm(tmp_path)
    with torch.no_grad():
        logits = plain(inputs["input_ids"]).logits[0]
        torch.testing.assert_close(model.head.logits(model(inputs, torch.arange(len(logits))).hidden), logits)
        torch.testing.assert_close(again.head.logits(again(inputs, torch.arange(len(logits))).hidden), logits)
    assert torch.equal(again.processor.encode(talk("What?", "red"), []).input_ids, sample.input_ids)
    with pytest.raises(BadSample, match="no images"):
        model.processor.encode(talk([None, "?"], "red"), [picture()])


def test_seeded_building_repeats(settings, tokenizer):
    def built():
        torch.manual_seed(3)
        return build_vlm(settings, tokenizer).state_dict()

    assert all(torch.equal(a, b) for a, b in zip(built().values(), built().values(), strict=True))


def test_parts_are_whole_while_zero3_loading_is_on(settings, tokenizer, monkeypatch):
    """Transformers would make empty parameters, which cannot be measured or filled; the mode is on again afterwards."""
    from transformers.integrations import deepspeed as integration

    class Zero3:
        config: dict = {}  # noqa: RUF012

        def is_zero3(self):
            return True

    alive = Zero3()
    monkeypatch.setattr(integration, "_hf_deepspeed_config_weak_ref", weakref.ref(alive))
    model = build_vlm(settings, tokenizer)
    assert integration.is_deepspeed_zero3_enabled()
    assert all(p.numel() for p in model.parameters())


def test_processors_travel_to_worker_processes(model, batch):
    processor = pickle.loads(pickle.dumps(model.processor))
    assert torch.equal(processor.encode(*batch[0]).input_ids, model.processor.encode(*batch[0]).input_ids)


def test_bad_samples_are_named(model, talk, picture):
    with pytest.raises(BadSample, match="differ in number"):
        model.processor.encode(talk([None, "?"], "red"), [])
    with pytest.raises(BadSample, match="private-use"):
        model.processor.encode(talk(f"{IMAGE}?", "red"), [])
    model.processor.tokenizer.chat_template = "{% for m in messages %}{{ m['content'][1:] }}{% endfor %}"
    with pytest.raises(BadSample, match="drops or repeats images"):
        model.processor.encode(talk([None, "?"]), [picture()], generation=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decodr": "x"}, r"unknown key 'decodr'; did you mean 'decoder'"),
        ({"vision_encoder": {"sorce": "timm"}}, r"vision_encoder: unknown key 'sorce'; did you mean 'source'"),
        ({"vision_encoder": {"source": "tim", "name": "x"}}, r"'tim' is not one of timm, open_clip, transformers"),
        ({"vision_encoder": {"source": "timm", "name": "resnet_0"}}, r"timm cannot build 'resnet_0'"),
        ({"projector": {"type": "mpl"}}, r"projector.type: 'mpl' is not one of"),
        ({"projector": {"type": "mlp", "dept": 2}}, r"did you mean 'depth'"),
        ({"projector": {"type": "mlp", "depth": 0}}, r"from 1 to 10,000, got 0"),
        ({"projector": {"type": "pixel_shuffle_mlp", "factor": 3}}, r"factor 3 does not divide the grid of 4×4"),
        ({"projector": {"type": "resampler", "heads": 5}}, r"5 heads do not divide"),
        ({"vision_encoder": None}, r"no vision_encoder to project"),
        ({"decoder": {}}, r"either 'name'.*or 'config'"),
        ({"decoder": {"config": {"hidden_size": 8}}}, r"'model_type' is missing"),
        ({"decoder": {"config": {"model_type": "lama"}}}, r"lama cannot be built"),
        (
            {"decoder": {"config": {"model_type": "gpt2", "vocab_size": 10, "n_embd": 12, "n_layer": 1}}},
            r"10 embeddings",
        ),
        ({"decoder": "no/such-model"}, r"'no/such-model' cannot be loaded"),
        ({"dtype": "float8"}, r"dtype: 'float8' is not one of"),
        ({"attn_implementation": "flash_attention_2"}, r"flash-attn"),
    ],
)
def test_mistakes_in_settings_are_one_line(settings, tokenizer, change, message):
    with pytest.raises(UserError, match=message) as caught:
        build_vlm(settings | change, tokenizer)
    assert "\n" not in str(caught.value)


def test_a_slow_tokenizer_is_refused(settings):
    class Slow:
        is_fast = False
        name_or_path = "some/model"
        bos_token_id = eos_token_id = pad_token_id = 0

        def __len__(self):
            return 10

    with pytest.raises(UserError, match="not a fast tokenizer"):
        build_vlm(settings, Slow())
