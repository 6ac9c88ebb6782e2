"""A teacher on vLLM's pooling runner, which returns the last hidden states of a prompt; its lm head is here."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.batch import DistillationBatch
from data.errors import UserError
from vlm_distill.endpoint import Endpoint, Refused
from vlm_distill.endpoint_pool import EndpointPool
from vlm_distill.losses import IMAGE_HIDDEN, HiddenTargets

from .interface import VisionLanguageModel
from .lm_head import LMHead
from .served import ServedModel, read_tokens
from .served_rows import Row, ServedRows
from .teacher import TeacherOutputs
from .vocabulary import align_heads, separate_heads
from .weightless import needs_weights

# How vLLM calls the types in which hidden states are sent.
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
# Base64 takes four bytes for three; a server may have more tokens in a prompt than are here, of images.
_ROOM = 2 * 4 / 3
_START = "start vLLM with --runner pooling --convert embed --pooler-config.task token_embed"


class ServedHidden(ServedRows[tuple[Tensor, Tensor]]):
    """Asks vLLM for the hidden states of whole prompts (``POST /pooling``), and keeps those at supervised tokens.

    Text is sent as token ids. A conversation with images is rendered by the server, which may expand the images
    differently: positions after the last image are counted from the end. The tokens before the first image and after
    the last must be the same as here (``POST /tokenize``, with blank images).

    Args:
        served: the teacher.
        head: its lm head, on the device of the losses.
        workers: this rank's concurrent requests.
        dtype: in which hidden states are sent, float32 or bfloat16.
        longest: the most tokens of a row here.
        at_images: whether hidden states at image tokens are needed (losses with ``on: images``).

    Raises:
        UserError: the server returns no hidden states, or those of a model of another width.
    """

    head: LMHead

    def __init__(
        self,
        served: ServedModel,
        head: LMHead,
        workers: int,
        *,
        dtype: torch.dtype = torch.float32,
        longest: int,
        at_images: bool = False,
    ) -> None:
        super().__init__(served.processor, workers, at_images=at_images)
        self.served, self.head, self.dtype = served, head, dtype
        self.width = head.parameters[0].shape[1]
        largest = int(longest * self.width * dtype.itemsize * _ROOM)
        served.root.largest = max(served.root.largest, largest)
        self._try()

    @property
    def end_tokens(self) -> set[int]:
        return self.served.end_tokens

    def align(self, student: VisionLanguageModel) -> int:
        return align_heads(student, self)

    def separate(self, student: VisionLanguageModel) -> None:
        separate_heads(student, self)

    @torch.no_grad()
    def outputs(self, batch: DistillationBatch, features: Sequence[str] = ()) -> TeacherOutputs:
        assert set(features) <= {IMAGE_HIDDEN}, "a server gives no features from inside the model"
        replies = self.replies(batch)
        device = batch.targets.device
        nothing = torch.empty(0, self.width, dtype=self.dtype)
        hidden = torch.cat([nothing, *(own for own, _ in replies)]).to(device)
        found = TeacherOutputs(HiddenTargets(hidden, self.head))
        if features:
            found.features[IMAGE_HIDDEN] = torch.cat([nothing, *(seen for _, seen in replies)]).to(device)
        return found

    def ask(self, row: Row) -> tuple[Tensor, Tensor]:
        if row.conversation is None:
            hidden = self._pool_states({"input": row.ids})
            if len(hidden) != len(row.ids):
                raise self._incomplete(len(hidden), len(row.ids))
            return hidden[row.predicting], hidden[row.at_images]

        self._check_rendering(row)
        rendering = self.served.rendering(row.conversation, row.images, generation=False)
        hidden = self._pool_states(rendering)
        before, after = row.around_images
        if len(hidden) < len(before) + len(after):
            raise self.served.differs(row.ids[after.start :])
        wanted = [self._position(row, position, len(hidden)) for position in row.predicting]
        seen = [self._position(row, position, len(hidden)) for position in row.at_images] if self.at_images else []
        return hidden[wanted], hidden[seen]

    def _position(self, row: Row, position: int, there: int) -> int:
        """Return where the token at a position here is among ``there`` tokens on the server.

        Raises:
            UserError: that is not known, since images take another number of tokens there.
        """
        before, after = row.around_images
        if position in before or there == len(row.ids):
            return position
        if position - len(row.ids) in after:
            return position - len(row.ids) + there
        assert row.conversation is not None
        raise UserError(
            f"{row.conversation.source}, line {row.conversation.line}: images take {there} tokens with their text on "
            f"{self.served.endpoint.url} and {len(row.ids)} here, and tokens at or between images are needed; serve "
            "the teacher with the image sizes of teacher.path (--mm-processor-kwargs)"
        )

    def _check_rendering(self, row: Row) -> None:
        """Raise ``UserError`` if the server renders a conversation with other tokens around its images."""
        assert row.conversation is not None
        blank = [Image.new("RGB", (64, 64))] * len(row.images)
        body = self.served.rendering(row.conversation, blank, generation=False)
        there = self.served.root.ask("tokenize", body, read_tokens, self.served.advice)
        self.served.check_ends(row.ids, there, *row.around_images)

    def _pool_states(self, prompt: dict[str, Any], server: Endpoint | EndpointPool | None = None) -> Tensor:
        """Return the hidden states ``[tokens, H]`` of a whole prompt, by default from any of the servers."""
        server = server or self.served.root
        settings = {
            "model": self.served.name,
            "task": "token_embed",
            "use_activation": False,
            "encoding_format": "base64",
            "embed_dtype": _DTYPES[self.dtype],
            "endianness": "little",
        }

        def read(reply: Any) -> Tensor:
            data = base64.b64decode(reply["data"][0]["data"], validate=True)
            numbers = torch.frombuffer(bytearray(data), dtype=self.dtype)
            tokens = int(reply["usage"]["prompt_tokens"])
            if len(numbers) == tokens * self.width:
                return numbers.view(tokens, self.width)
            whole = len(numbers) % self.width == 0 and len(numbers) < tokens * self.width
            if tokens and len(numbers) % tokens == 0 and not whole:
                raise UserError(
                    f"teacher.server: {server.url} returns hidden states of {len(numbers) // tokens} "
                    f"numbers, but the lm head of teacher.path reads {self.width}; it serves another model"
                )
            raise self._incomplete(len(numbers) // self.width, tokens)

        return server.ask("pooling", {**prompt, **settings}, read, self.served.advice)

    def _incomplete(self, found: int, tokens: int) -> UserError:
        return UserError(
            f"teacher.server: {self.served.endpoint.url} returns hidden states of {found} tokens for a prompt of "
            f"{tokens}; start vLLM with --no-enable-prefix-caching"
        )

    @needs_weights
    def _try(self) -> None:
        """Find out before training whether each server returns hidden states of the head's width."""
        self.served.root.check_each(self._try_server)

    def _try_server(self, server: Endpoint) -> None:
        token = next(iter(self.end_tokens), 0)
        try:
            # Seven: half of the states, or states half as wide, are then told apart.
            self._pool_states({"input": [token] * 7}, server)
        except Refused as refused:
            raise UserError(
                f"teacher.server: {server.url} returns no hidden states ({refused.detail}); {_START}, or "
                "set teacher.server.form to topk"
            ) from None
