"""Tiny models, tokenizers, images and conversations, made on the spot."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's package is imported: no test uses the network

import byte_tokenizer
import pytest
import torch
from PIL import Image

from data.conversation import Conversation


@pytest.fixture(scope="session")
def make_tokenizer():
    return byte_tokenizer.make_tokenizer


@pytest.fixture
def tokenizer():
    return byte_tokenizer.make_tokenizer()


@pytest.fixture(scope="session")
def talk():
    return _talk


@pytest.fixture(scope="session")
def picture():
    return _picture


def _talk(*turns, system=None):
    """A conversation of alternating user and assistant turns; ``None`` in a turn's list stands for an image."""
    messages = [] if system is None else [_message("system", system)]
    messages += [_message(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)]
    return Conversation(tuple(messages))


def _message(role, turn):
    parts = turn if isinstance(turn, list) else [turn]
    return {
        "role": role,
        "content": [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts],
    }


def _picture(seed=0, size=(40, 30)):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture
def llama():
    return {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }


@pytest.fixture
def convnet():
    config = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "patch_size": 2}
    return {"source": "timm", "name": "convnext_atto", "config": config, "image_size": 32, "layer": -3}


@pytest.fixture
def settings(convnet, llama):
    return {"vision_encoder": convnet, "projector": {"type": "mlp"}, "decoder": {"config": llama}}
