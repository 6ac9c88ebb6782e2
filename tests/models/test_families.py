"""Every family of Transformers' VLMs: its own logits and answers, the right tokens supervised, trained, reloaded."""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import families
import pytest
import tiny
import torch
import transformers as hf
from multiplied import multiplied
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from data.collate import Collator, collate
from data.encoding import encode_pair
from data.errors import BadSample, UserError
from vlm_distill.caching.sample_digests import image_digest
from vlm_distill.models import load_vlm
from vlm_distill.models.answers import Sampling, TokenChoice
from vlm_distill.models.decoder_features import VISION_FEATURES
from vlm_distill.models.decoding import decode
from vlm_distill.models.packing_trial import keeps_samples_apart
from vlm_distill.models.pretrained_processor import Expanded
from vlm_distill.models.shared_vision import with_vision_features
from vlm_distill.training.flops import ModelFlops

HERE = Path(__file__).parent
PALIGEMMA = ("paligemma", "paligemma2")
#: Families whose decoders keep keys and values of every token, at positions 0, 1, 2 …
DECODED = {"llava", "pixtral", "llava_next", "llava_onevision", "internvl", "smolvlm", "idefics3", "mistral3"}
DECODED |= {"phi4_multimodal"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_tokenizer):
    folder = tmp_path_factory.mktemp("families")
    maker = families.Maker(make_tokenizer)
    for seed, name in enumerate(families.FAMILIES):
        maker.write(name, folder / name, seed=seed)
    return folder


@pytest.fixture(scope="module")
def load(folder):
    """Each family's model, loaded once; tests must leave it unchanged."""
    loaded = {}

    def get(name):
        if name not in loaded:
            with families.num2words():
                loaded[name] = load_vlm(folder / name).eval()
        return loaded[name]

    return get


@pytest.fixture
def samples(talk, picture):
    """Conversations of different lengths, with images of different shapes, that a family can take."""

    def get(name):
        wide, tall, flat = picture(1, (60, 30)), picture(2, (30, 60)), picture(3, (90, 20))
        if name in PALIGEMMA:
            return [
                (talk([None, "What colour is it?"], "It is red."), [wide]),
                (talk([None, "Yes?"], "no", system="Be brief."), [picture(4)]),
                (talk(["Compare", None, None], "blue triangles"), [tall, picture(5)]),
            ]
        return [
            (talk([None, "What colour is it?"], "It is red."), [wide]),
            (talk("Yes?", "no"), []),
            (talk(["Compare", None, "with", None], "blue", [None, "And?"], "three", system="Be."), [tall, wide, flat]),
        ]

    return get


def encoded(model, talks):
    return [model.processor.encode(*sample) for sample in talks]


def answers(model, sample, marks):
    edges = [i for i, m in enumerate(marks) if m and not (i and marks[i - 1])]
    stops = [next((j for j in range(i, len(marks)) if not marks[j]), len(marks)) for i in edges]
    return [model.processor.tokenizer.decode(sample.input_ids[i:j]) for i, j in zip(edges, stops, strict=True)]


def close(got, expected):
    """Within 1e-5 of the largest logit, in float32."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", families.FAMILIES)
def test_logits_are_the_models_own(name, load, samples):
    model = load(name)
    rows = [*encoded(model, samples(name)), model.processor.dummy()]
    assert [row.images for row in rows] == [1, 1 if name in PALIGEMMA else 0, 2 if name in PALIGEMMA else 3, 1]
    with torch.no_grad():
        alone = torch.cat([model.model(**model.processor.collate([row])).logits[0] for row in rows])
        assert alone.std() > 0.05
        for side in ("right", "left"):
            inputs = model.processor.collate(rows, padding_side=side)
            positions = inputs["attention_mask"].flatten().nonzero().flatten()
            got = model.head.logits(model(inputs, positions).hidden)
            close(got, model.model(**inputs).logits.flatten(0, 1)[positions])
            close(got, alone)


#: Norms and biases, counted as if they multiplied, add this much in such narrow models; and what else differs.
TOLERANCE = {
    ("pixtral", "vision_encoder"): (0.75, 1.0),  # an image's padding goes through the patch embedding
    ("mistral3", "vision_encoder"): (0.75, 1.0),
    # Linear attention pads a sequence to chunks of 64 tokens; the products of its state are not counted.
    ("qwen3_5", "decoder"): (0.75, 1.07),
    ("qwen3_5_moe", "decoder"): (0.75, 1.07),
    ("phi4_multimodal", "vision_encoder"): (1.0, 1.2),  # its pooling head computes at one position, not at every one
}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_operations_are_those_that_pytorch_counts(name, load, samples):
    model = load(name)
    collator = Collator(model.processor, None, 2048)
    rows = collator.batch([pair for sample in samples(name) for pair in collator.encode(*sample)]).student
    counted = ModelFlops(model, trains=False).count(rows)
    if name == "paligemma2":  # its soft-cap prevents fused attention, so PyTorch counts it
        counted["decoder"] += counted["attention"]
    for part, real in multiplied(model, rows.inputs).items():
        low, high = TOLERANCE.get((name, part), (0.99, 1.07))
        assert low * real <= counted[part] <= high * real, (part, counted[part] / real)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_images_reach_the_answer(name, load, talk, picture):
    model = load(name)
    rows = [model.processor.encode(talk([None, "What?"], "red"), [picture(seed, (60, 30))]) for seed in (1, 2)]
    assert rows[0].input_ids.equal(rows[1].input_ids)
    with torch.no_grad():
        a, b = (model(model.processor.collate([row]), row.supervised.nonzero()[:1, 0] - 1).hidden for row in rows)
    assert (a - b).abs().max() > 1e-4


@pytest.mark.parametrize("name", families.FAMILIES)
def test_features_stand_for_images(name, load, samples):
    """Features given in place of images: in one row, in a padded batch and in a packed row."""
    model = load(name)
    own, seen = model.processor, {}
    if name == "phi4_multimodal":
        with pytest.raises(UserError, match="phi4_multimodal takes no features in place of images"):
            model.encode_images([own.dummy()])
        return
    with torch.no_grad():
        for images in ([own.blank()], *(images for _, images in samples(name))):
            for group in own.image_groups(images):
                row = own.image_row(group)
                (features,) = model.encode_images([row])
                # In packed rows, features are ordered by the images' tokens.
                assert len(features) == own.image_tokens(row).sum()
                seen[image_digest(group)] = features
    blind = own.with_features(lambda images: seen[image_digest(images)])
    rows, given = ([*(p.encode(*sample) for sample in samples(name)), p.dummy()] for p in (own, blind))
    assert not any(tensor.startswith("pixel_") for row in given for tensor in row.tensors)
    batches = [(rows, given), *(((row,), (other,)) for row, other in zip(rows, given, strict=True))]
    if keeps_samples_apart(model):
        batches.append(([own.join(rows)], [blind.join(given)]))
    for live, cached in batches:
        inputs, others = own.collate(live), blind.collate(cached)
        positions = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).flatten().nonzero().flatten()
        with torch.no_grad():
            close(model(others, positions).hidden, model(inputs, positions).hidden)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_what_the_teacher_saw_goes_to_its_place_among_packed_rows(name, load, samples):
    model = load(name)
    if name == "phi4_multimodal" or not keeps_samples_apart(model):
        pytest.skip("takes no features" if name == "phi4_multimodal" else "is never packed")
    own = model.processor
    pairs = [encode_pair(*sample, own, own, 4096) for sample in samples(name)]
    for packed in ((True, False), (False, True)):
        batch = collate(pairs, own, own, packed=packed)
        assert not batch.student.image_tokens.equal(batch.teacher.image_tokens)
        with torch.no_grad():
            seen = model(batch.teacher.inputs, batch.teacher.positions, [VISION_FEATURES]).features[VISION_FEATURES]
            got = model(with_vision_features(batch, seen), batch.student.positions)
            close(got.hidden, model(batch.student.inputs, batch.student.positions).hidden)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_supervised_tokens_are_the_answers(name, load, samples):
    model = load(name)
    end = "<end_of_utterance>" if families.FAMILIES[name][1] == "colon" else "</s>"
    for sample, (conversation, _) in zip(encoded(model, samples(name)), samples(name), strict=True):
        texts = [m["content"][0]["text"] for m in conversation.messages if m["role"] == "assistant"]
        assert answers(model, sample, sample.supervised.tolist()) == [text + end for text in texts]
        assert answers(model, sample, sample.ends.tolist()) == [end] * len(texts)
        own = (sample.supervised & ~sample.ends).sum()
        within = [0 <= a < b <= len(texts[piece // 2]) for piece, a, b in sample.spans.tolist()]
        assert sum(within) == own
        assert not (sample.supervised & model.processor.image_tokens(sample)).any()


@pytest.mark.parametrize(
    "token", ["<|vision_start|>", "<fake_token_around_image>", "<|START_OF_IMG|>", "<row_1_col_1>"]
)
def test_what_frames_an_image_is_refused_in_a_text(load, talk, token):
    with pytest.raises(BadSample, match="text holds a control token"):
        load("llava").processor.encode(talk(f"What is {token}?", "red"), [])


@pytest.mark.parametrize("name", families.FAMILIES)
def test_no_token_sees_those_after_it(name, load, talk, picture):
    """Changing an answer's last token changes no supervised position before it."""
    model = load(name)
    sample = model.processor.encode(talk([None, "What colour?"], "It is red."), [picture(1)])
    positions = sample.supervised.nonzero().flatten() - 1
    inputs = model.processor.collate([sample])
    changed = inputs["input_ids"].clone()
    changed[0, positions[-1]] += 1
    with torch.no_grad():
        one, other = model(inputs, positions).hidden, model({**inputs, "input_ids": changed}, positions).hidden
    # Not to the bit: experts multiply other numbers of tokens if the last one is routed elsewhere.
    torch.testing.assert_close(one[:-1], other[:-1], rtol=0, atol=1e-5)
    assert not torch.allclose(one[-1], other[-1], atol=1e-3)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_parts_hold_every_parameter_once(name, load):
    model = load(name)
    assert list(model.parts) == ["vision_encoder", "projector", "decoder"]
    held = [id(p) for part in model.parts.values() for p in {id(p): p for p in part.parameters()}.values()]
    assert len(held) == len(set(held))
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained <= set(held)
    others = [n for n, p in model.model.named_parameters() if id(p) not in held]
    assert all("audio" in n for n in others)
    assert bool(others) == (name == "phi4_multimodal")


@pytest.mark.parametrize("name", families.FAMILIES)
def test_plain_transformers_loads_what_is_saved(name, load, samples, tmp_path):
    model = load(name)
    model.save_pretrained(tmp_path / "saved")
    kind = AutoModelForCausalLM if name == "phi4_multimodal" else AutoModelForImageTextToText
    plain = kind.from_pretrained(tmp_path / "saved").eval()
    with families.num2words():
        processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    conversation, images = samples(name)[0]
    mine = model.processor.encode(conversation, images)
    if name in PALIGEMMA:
        given = {"text": ["<image>What colour is it?"], "suffix": ["It is red."]}
    else:
        template = processor.chat_template or processor.tokenizer.chat_template
        messages = list(conversation.messages)
        given = {"text": [processor.apply_chat_template(messages, template, tokenize=False)]}
    theirs = processor(images=[images], return_tensors="pt", **given)
    theirs.pop("labels", None)
    assert theirs["input_ids"][0].equal(mine.input_ids)
    with torch.no_grad():
        positions = torch.arange(len(mine.input_ids))
        got = model.head.logits(model(model.processor.collate([mine]), positions).hidden)
        close(got, plain(**theirs).logits[0])


@pytest.mark.parametrize("name", families.FAMILIES)
def test_answers_are_transformers_own(name, load, samples):
    model = load(name)
    prompts = [(conversation.prompt(), images) for conversation, images in samples(name)]
    together = model.generate(prompts, max_new_tokens=5)
    for prompt, answer in zip(prompts, together, strict=True):
        inputs = model.processor.collate([model.processor.encode(*prompt, generation=True)])
        length = inputs["input_ids"].shape[1]
        own = model.model.generate(
            **inputs, max_new_tokens=5, do_sample=False, eos_token_id=sorted(model.end_tokens), pad_token_id=0
        )
        assert answer.token_ids == own[0, length:].tolist()
    # Drawn answers, too: by our own loop where the decoder allows it, by Transformers' generation elsewhere.
    assert model.decodes_plainly == (name in DECODED)
    if name in DECODED:
        rows = [model.processor.encode(*prompt, generation=True) for prompt in prompts]
        drawn = []
        for draw in (partial(decode, model), model._generated):
            sampling = Sampling(1.0, [random.Random(str(seed)) for seed in range(len(rows))])
            drawn.append([ids for ids, _ in draw(rows, TokenChoice(sampling, None, set()), 5)])
        assert drawn[0] == drawn[1]
    # State that generation leaves on a model (Qwen-VL's rope_deltas) changes nothing afterwards.
    row = model.processor.encode(*samples(name)[2])
    inputs = model.processor.collate([row])
    with torch.no_grad():
        got = model.head.logits(model(inputs, torch.arange(len(row.input_ids))).hidden)
        close(got, model.model(**inputs).logits[0])


@pytest.fixture(scope="module")
def runs(folder):
    tiny.write_data(folder / "data")
    paths = os.pathsep.join(map(str, [HERE.parents[1], HERE.parent / "support"]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(HERE / "family_runs.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", families.FAMILIES)
def test_three_steps_as_student_and_as_teacher(name, runs):
    assert name in {run["teacher"] for run in runs.values()}
    run = runs[name]
    assert len(run["lines"]) == 3
    for line in run["lines"]:
        assert line["samples"] == 4
        assert 0 < line["forward_kl/loss"] < 20
        assert 0 < line["cross_entropy/loss"] < 20
    assert run["lines"][-1]["loss"] < run["lines"][0]["loss"]
    assert run["moved"] == {"vision_encoder": True, "projector": True, "decoder": True}


FOUR = ("llava", "qwen2_5_vl", "internvl", "smolvlm")


@pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(FOUR, 2)))
def test_unlike_pairs_align(student, teacher, load, samples, talk, picture):
    pair = load(student).processor, load(teacher).processor
    talks = [
        *samples("any"),
        (talk([None, "What?"], "It is red.", "Sure?", "yes", ["And", None], "no"), [picture(1), picture(2, (90, 20))]),
    ]
    pairs = [encode_pair(*sample, *pair, 2048) for sample in talks]
    assert any(len(p.student.input_ids) != len(p.teacher.input_ids) for p in pairs)
    batch = collate(pairs, *pair)
    ours, theirs = (rows.inputs["input_ids"].flatten()[rows.positions + 1] for rows in (batch.student, batch.teacher))
    assert ours.equal(batch.targets)
    # SmolVLM ends its turns with another token, which is learnt but not distilled.
    assert ours[batch.distilled].equal(theirs[batch.distilled])
    ends = sum(message["role"] == "assistant" for conversation, _ in talks for message in conversation.messages)
    assert (~batch.distilled).sum() == (ends if "smolvlm" in (student, teacher) else 0)
    text = "".join(m["content"][0]["text"] for c, _ in talks for m in c.messages if m["role"] == "assistant")
    assert load(student).processor.tokenizer.decode(ours[batch.distilled], skip_special_tokens=True) == text
    # Nothing is cut off: a sample too long for either model is left out.
    lengths = [len(row.input_ids) for row in (pairs[2].student, pairs[2].teacher)]
    with pytest.raises(BadSample, match="too long"):
        encode_pair(*talks[2], *pair, max(lengths) - 1)
    assert len(encode_pair(*talks[2], *pair, max(lengths)).distilled)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_placeholder_in_a_persons_text_is_refused(name, load, talk, picture):
    processor = load(name).processor
    for token in {processor.placeholder, processor.tokenizer.convert_ids_to_tokens(processor.image_token_id)}:
        with pytest.raises(BadSample, match="placeholders"):
            processor.encode(talk([None, f"what does {token} mean?"], "red"), [picture()])
        with pytest.raises(BadSample, match="placeholders"):
            processor.encode(talk([None, "what?"], f"a {token}"), [picture()])


@pytest.mark.parametrize("name", families.FAMILIES)
def test_images_and_image_parts_must_agree(name, load, talk, picture):
    with pytest.raises(BadSample, match="differ in number"):
        load(name).processor.encode(talk([None, "what?"], "red"), [picture(1), picture(2)])


def test_paligemma_takes_a_question_with_an_image(load, talk, picture):
    processor = load("paligemma").processor
    with pytest.raises(BadSample, match="one question"):
        processor.encode(talk([None, "what?"], "red", "Sure?", "yes"), [picture()])
    with pytest.raises(BadSample, match="needs an image"):
        processor.encode(talk("what?", "red"), [])
    sample = processor.encode(talk([None, "what?"], "red"), [picture()])
    assert sample.tensors["token_type_ids"][0].equal(sample.supervised.long())


def test_onevision_tiles_one_image_and_not_two(load, talk, picture):
    processor = load("llava_onevision").processor
    one = processor.encode(talk([None, "what?"], "red"), [picture(1, (90, 40))])
    two = processor.encode(talk([None, None, "what?"], "red"), [picture(1, (90, 40)), picture(2, (90, 40))])
    assert one.tensors["pixel_values"].shape[1] > 1
    assert two.tensors["pixel_values"].shape[:2] == (2, 1)
    assert processor.image_tokens(two).sum() == 2 * 17
    assert two.tensors["batch_num_images"].tolist() == [2]


@pytest.mark.parametrize(("name", "key"), [("qwen2_5_vl", "mm_token_type_ids"), ("gemma3", "token_type_ids")])
def test_inputs_that_would_be_missed_in_silence_are_asked_for(name, key, load, samples):
    model = load(name)
    inputs = model.processor.collate(encoded(model, samples(name))[:1])
    positions = torch.arange(inputs["input_ids"].shape[1])
    with torch.no_grad():
        right = model.model(**inputs).logits
        del inputs[key]
        assert not torch.allclose(model.model(**inputs).logits, right, atol=1e-4)
    with pytest.raises(UserError, match=key):
        model(inputs, positions)


#: Packed, these would see each other's prefixes, or confuse positions in the row with positions in the sample.
NOT_PACKED = {*PALIGEMMA, "gemma3", "qwen3_5", "qwen3_5_moe"}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_samples_in_one_row_see_nothing_of_each_other(name, load, samples):
    model = load(name)
    assert keeps_samples_apart(model) == (name not in NOT_PACKED)
    if name in NOT_PACKED:
        return  # the result depends on the version of Transformers
    rows = encoded(model, samples(name))
    with torch.no_grad():
        alone = [hidden(model, [row]) for row in rows]
        for order in itertools.permutations(range(len(rows))):
            joined = model.processor.join([rows[i] for i in order])
            found = hidden(model, [joined]).split([len(rows[i].input_ids) for i in order])
            errors = [(got - alone[i]).abs().max() / alone[i].abs().max() for got, i in zip(found, order, strict=True)]
            assert max(errors) < 1e-5
        # Rows of different lengths: padding counts as one more sample.
        found = hidden(model, [model.processor.join(rows[:2]), model.processor.join(rows[2:])])
        third = found[len(found) // 2 :][: len(rows[2].input_ids)]
        assert (third - alone[2]).abs().max() < 1e-5 * third.abs().max()


def hidden(model, rows):
    inputs = model.processor.collate(rows)
    return model(inputs, torch.arange(inputs["input_ids"].numel())).hidden


def test_documentation_names_the_families_that_are_packed():
    lines = (HERE.parents[1] / "docs/models.md").read_text().splitlines()
    rows = [line.split("|") for line in lines if line.startswith("| `") and line.count("|") == 4]
    told = {name: answer.strip() for _, names, answer, *_ in rows for name in re.findall("`([a-z0-9_]+)`", names)}
    expected = {name: "no" if name in NOT_PACKED else "yes" for name in families.FAMILIES}
    assert {name: answer for name, answer in told.items() if name in expected} == expected


def test_caps_and_scales_are_the_models_own(load):
    # Gemma 3's and Aya Vision's classes ignore these fields of their text configurations.
    assert load("paligemma2").head.softcap == 2.0
    assert (load("gemma3").head.softcap, load("gemma3").model.config.text_config.final_logit_softcapping) == (None, 0.5)
    assert (load("aya_vision").head.scale, load("aya_vision").model.config.text_config.logit_scale) == (1.0, 0.25)


@pytest.mark.parametrize("name", ["internvl", "aya_vision", "qwen2_5_vl", "smolvlm", "mistral3", "phi4_multimodal"])
def test_features_of_images_in_tiles_are_refused(name, load):
    with pytest.raises(UserError, match="leave out the losses on images"):
        load(name).feature_shape("projector")


def test_paligemma_takes_no_chat_template(folder):
    with pytest.raises(
        UserError, match=r"^chat_template: .*paligemma' is a paligemma, which has no chat; leave it out$"
    ):
        load_vlm(folder / "paligemma", chat_template="{{ messages }}")


def idefics2(tokenizer):
    config = hf.Idefics2Config(
        vision_config=hf.Idefics2VisionConfig(**families.VISION, image_size=28, patch_size=7),
        text_config=families._text(hf.MistralConfig, tokenizer, head_dim=8).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        perceiver_config={"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_head_dim": 16},
    )
    images = hf.Idefics2ImageProcessor(size={"longest_edge": 28, "shortest_edge": 14}, do_image_splitting=False)
    processor = hf.Idefics2Processor(images, tokenizer, 4, families.template("<image>", "colon"))
    return hf.Idefics2ForConditionalGeneration(config), processor


def kosmos2(tokenizer):
    text = {"embed_dim": 32, "layers": 1, "ffn_dim": 48, "attention_heads": 2, "max_position_embeddings": 64}
    config = hf.Kosmos2Config(
        text_config=text | {"vocab_size": len(tokenizer)},
        vision_config=dict(families.VISION, image_size=28, patch_size=7),
        latent_query_num=4,
    )
    images = hf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=families.SIDE)
    processor = hf.Kosmos2Processor(images, tokenizer)
    processor.chat_template = families.template("<image>")
    return hf.Kosmos2ForConditionalGeneration(config), processor


@pytest.mark.parametrize("build", [idefics2, kosmos2])
def test_a_processor_that_does_not_tell_its_expansion_is_refused_on_loading(build, make_tokenizer, tmp_path):
    model, processor = build(make_tokenizer(extra=families.EXTRA))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^model: {type(processor).__name__} does not report how it expands images"):
        load_vlm(tmp_path)


def test_a_processor_that_rewrites_its_text_is_not_understood():
    with pytest.raises(BadSample, match="not understood"):
        Expanded("a <image> b", [{"span": (1, 8), "text": "<image>", "replacement": "xx"}])


@pytest.mark.parametrize("name", families.FAMILIES)
def test_an_answer_after_its_prompt_is_the_conversation(load, samples, name):
    """Tokens drawn by a student make the same row as the same tokens from the data."""
    model = load(name)
    for conversation, images in samples(name)[:2]:
        whole = model.processor.encode(conversation, images)
        prompt = model.encode_prompt(conversation, images)
        length = len(prompt.input_ids)
        assert torch.equal(whole.input_ids[:length], prompt.input_ids)
        row = model.processor.answered(prompt, whole.input_ids[length:].tolist())
        assert torch.equal(row.input_ids, whole.input_ids)
        assert row.supervised.nonzero().flatten().tolist() == list(range(length, len(whole.input_ids)))
        assert row.tensors.keys() == whole.tensors.keys()
        for key, tensor in whole.tensors.items():
            assert torch.equal(row.tensors[key], tensor), key
