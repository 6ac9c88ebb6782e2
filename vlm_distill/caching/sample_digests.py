"""Digests of samples and images, by which caches recognise them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from PIL import Image

from data.conversation import Conversation, Document


def sample_digest(sample: Conversation | Document, images: Sequence[Image.Image]) -> int:
    """Return 64 bits of a sample's content: its messages and its images' decoded pixels, or its text."""
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(sample, Document):
        digest.update(json.dumps([sample.text, sample.last]).encode())
    else:
        digest.update(json.dumps([sample.messages, sample.tools], sort_keys=True, default=asdict).encode())
    return _with_images(digest, images)


def image_digest(images: Sequence[Image.Image]) -> int:
    """Return 64 bits of the images' decoded pixels."""
    return _with_images(hashlib.blake2b(digest_size=8), images)


def _with_images(digest: Any, images: Sequence[Image.Image]) -> int:
    for image in images:
        digest.update(f"{image.mode} {image.size}".encode())
        digest.update(image.tobytes())
    return int.from_bytes(digest.digest(), "little")
