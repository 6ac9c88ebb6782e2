"""Files of videos: what each family with an input for them receives is what Transformers itself would give it."""

from dataclasses import replace

import families
import numpy as np
import pytest
import torch
from clips import write_clip

from data.conversation import Conversation, VideoFile
from data.sample_images import ImageLoader, load_images
from data.video import VideoLimits
from vlm_distill.models.video_inputs import video_input

pytest.importorskip("av")

LIMITS = VideoLimits(fps=2, max_frames=4)
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
#: Their models receive frames among the images.
AS_IMAGES = ("internvl", "smolvlm")
VIDEO = (*QWEN, "llava_onevision", "internvl", "smolvlm")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("video") / "clip.mp4")


@pytest.fixture(autouse=True)
def spelled_numbers():
    with families.num2words():
        yield


@pytest.fixture(scope="module")
def family(make_tokenizer):
    made = families.made_once(make_tokenizer)

    def get(name):
        model = made(name)
        model.processor.video_frames = LIMITS.max_frames
        return model

    return get


def asked(clip, fps=2):
    content = [{"type": "text", "text": "Look:"}, {"type": "video"}, {"type": "text", "text": "Which colour?"}]
    messages = (
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    )
    return load_images(Conversation(messages, (VideoFile(str(clip)),)), ImageLoader(video=replace(LIMITS, fps=fps)))


def plain(processor, frames):
    """What Transformers makes of the same moments."""
    content = [{"type": "text", "text": "Look:"}, {"type": "video"}, {"type": "text", "text": "Which colour?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    metadata = {"fps": 10.0, "total_num_frames": 30, "frames_indices": [0, 7, 15, 22], "duration": 3.0}
    metadata |= {"width": 64, "height": 48}
    return processor(
        text=[text],
        videos=[np.stack([np.asarray(frame) for frame in frames])],
        video_metadata=[metadata],
        do_sample_frames=False,
        return_tensors="pt",
    )


def test_these_are_all_families_with_videos(family):
    assert {name for name in families.FAMILIES if video_input(family(name).processor.processor)} == set(VIDEO)


@pytest.mark.parametrize("name", VIDEO)
@torch.no_grad()
def test_a_video_goes_in_as_transformers_would_give_it(family, clip, name):
    model = family(name)
    conversation, images = asked(clip)
    row = model.processor.encode(conversation, images)
    expected = plain(model.processor.processor, images)
    assert torch.equal(row.input_ids, expected["input_ids"][0])
    inputs = model.processor.collate([row])
    for key, tensor in expected.items():
        assert torch.equal(inputs[key], torch.as_tensor(tensor)), key
    assert (row.images, row.videos) == ((4, 0) if name in AS_IMAGES else (0, 1))
    assert model.processor.tokenizer.decode(row.input_ids[row.supervised & ~row.ends]).strip() == "red"
    positions = torch.arange(len(row.input_ids))
    torch.testing.assert_close(model.head.logits(model(inputs, positions).hidden), model.model(**expected).logits[0])
    # Beside another question, it is answered as alone.
    prompts = [model.encode_prompt(conversation, images), model.encode_prompt(*asked(clip, fps=1))]
    both, alone = model.answer(prompts, max_new_tokens=2), model.answer(prompts[:1], max_new_tokens=2)
    assert both[0].token_ids == alone[0].token_ids
