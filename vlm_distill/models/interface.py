"""VisionLanguageModel: the interface that the suite sees, over assembled and pretrained models alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Cache, LogitsProcessorList

from data.batch import Encoded, ModelInputs, lacks_images
from data.conversation import Conversation, count_images
from data.errors import BadSample

from .answers import Answer, ForcedChoice, Sampling, TokenChoice
from .chat import special_ids
from .decoding import decode, decodes_plainly
from .lm_head import LMHead
from .processor import Processor, Prompt
from .thinking import decode_with_marks, mark_tokens, opening_mark


class Outputs(NamedTuple):
    """The result of a forward; a tuple, so that DeepSpeed sees the tensors in it.

    Attributes:
        hidden: ``[N, H]``, the decoder's last hidden states (after its final norm) at the requested positions.
        features: the requested features, by the names of :meth:`VisionLanguageModel.forward`.
    """

    hidden: Tensor
    features: dict[str, Tensor]


def _last_answer(row: Encoded) -> Tensor:
    """Return the indices of the tokens of a sample's last answer, without end tokens."""
    tokens = (row.supervised & ~row.ends).nonzero().flatten()
    if not len(tokens):
        raise BadSample("empty answer", "the chat template renders it as nothing")
    gaps = (tokens.diff() > 1).nonzero()
    return tokens[int(gaps[-1]) + 1 :] if len(gaps) else tokens


class VisionLanguageModel(nn.Module, ABC):
    """Vision encoder, projector and decoder behind one interface; without the first two, a language model.

    Attributes:
        head: the output layer as the losses read it.
        processor: turns conversations into inputs.
        synced: set if parameters are sharded: all ranks then stay in ``generate`` until the slowest is done.
    """

    processor: Processor
    head: LMHead
    synced: bool = False

    @property
    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """The model's parts by name, those it has: ``vision_encoder``, ``projector``, ``decoder`` (with lm head)."""

    @property
    @abstractmethod
    def body(self) -> nn.Module:
        """The decoder without its lm head: embeddings in, hidden states out."""

    @abstractmethod
    def forward(
        self, inputs: ModelInputs, positions: Tensor, features: Sequence[str] = (), *, cache: Cache | None = None
    ) -> Outputs:
        """Compute hidden states, never logits.

        Args:
            inputs: from ``processor.collate``, on this model's device.
            positions: int64 ``[N]``, indices into the flattened ``[B·L]`` of the sequence.
            features: names of features to return as well; all others are freed.

                - ``hidden.K``: ``[N, H]``, hidden states at ``positions``. 0 is the embeddings (the images' included),
                  K the output of the K-th layer; the last, also −1, is ``Outputs.hidden``, after the final norm.
                - ``vision``: ``[images, tokens, C]``, the vision encoder's output.
                - ``projector``: ``[images, tokens, H]``, the projector's output.
                - ``vision_features``: the output of :attr:`image_parts`, which can replace the images in a later input.
                - ``queries``, ``keys``, ``values``: ``[N, heads · head width]``, the outputs of the projections in the
                  last layer's attention at ``positions``, before rotary positions and norms of single heads. With
                  grouped queries, keys and values have fewer heads.

                Features of images are returned if the batch has an image, those of dummy samples included.
            cache: gets the decoder's keys and values.

        Raises:
            UserError: there is no such feature, or this model cannot give it.
        """

    @abstractmethod
    def feature_shape(self, name: str) -> tuple[int | None, int]:
        """Return (tokens per image, width) of a feature; tokens are ``None`` if not of images or known only by running.

        Raises:
            UserError: as in :meth:`forward`.
        """

    @abstractmethod
    def vision_positions(self, inputs: ModelInputs) -> dict[str, float]:
        """Return how many positions ``vision_encoder`` and ``projector`` process, to count operations.

        An encoder's positions are patches and class tokens, a projector's are its outputs. 0 for a part that does not
        run, and for an encoder whose layers differ in their positions, such as a convolutional one.
        """

    @property
    @abstractmethod
    def image_parts(self) -> dict[str, nn.Module]:
        """The parts whose output can replace images among the inputs, as ``vision_features``.

        Raises:
            UserError: this model sees no images, or takes no features in their place.
        """

    @property
    @abstractmethod
    def vision_settings(self) -> dict[str, Any]:
        """Settings that, with the weights of :attr:`image_parts`, decide an image's features."""

    @abstractmethod
    def encode_images(self, rows: Sequence[Encoded]) -> list[Tensor]:
        """Compute the features ``[tokens, C]`` that :attr:`image_parts` make of each sample's images.

        Args:
            rows: encoded samples, each with at least one image.
        """

    @abstractmethod
    def _generate(self, inputs: ModelInputs, **settings: Any) -> Tensor:
        """Generate; return the new token ids only, ``[B, T]``. Inputs are padded on the left."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Write configuration, safetensors and processor; ``load_vlm`` reads them back bit for bit.

        Args:
            folder: created if needed.
            state: the weights to write, if the model's own are sharded over ranks.
        """

    @abstractmethod
    def checkpoint_activations(self) -> None:
        """Recompute the decoder's and the vision encoder's layers in the backward instead of keeping them."""

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 64) -> list[Answer]:
        """Answer conversations greedily.

        Args:
            prompts: conversations with all of their images; an assistant message at the end is left out.
            max_new_tokens: length of the longest answer.
        """
        return self.answer([self.encode_prompt(*prompt) for prompt in prompts], max_new_tokens=max_new_tokens)

    @torch.no_grad()
    def answer(
        self, rows: Sequence[Encoded], *, max_new_tokens: int = 64, sampling: Sampling | None = None
    ) -> list[Answer]:
        """Answer encoded prompts.

        Drawn answers contain no special tokens but end tokens (an image token would have no image), and no token beyond
        the vocabulary that the head is cut to.

        Args:
            rows: from :meth:`encode_prompt`. If ranks leave ``generate`` together, some may have none.
            max_new_tokens: length of the longest answer.
            sampling: how to draw; ``None``: greedy.
        """
        encoded = list(rows)
        if self.synced and (not encoded or lacks_images(self.processor, encoded)):
            # Sharded parameters are gathered by all ranks together: every part must run here as it does there.
            encoded.append(self.processor.dummy())
        if not encoded:
            return []
        choice = TokenChoice(sampling, self.head.vocabulary, special_ids(self.processor.tokenizer) - self.end_tokens)
        training = self.training
        self.eval()
        try:
            if self.decodes_plainly:
                found = decode(self, encoded, choice, max_new_tokens)
            else:
                found = self._generated(encoded, choice, max_new_tokens)
        finally:
            self.train(training)
        openings = [opening_mark(self.processor.tokenizer, row.input_ids.tolist()) for row in rows]
        marks = mark_tokens(self.processor.tokenizer)
        answers = zip(found, openings, strict=False)  # a dummy row at the end has no opening
        return [self._answer(ids, logprobs, opening, marks) for (ids, logprobs), opening in answers]

    @property
    def decodes_plainly(self) -> bool:
        """Whether :func:`~.decoding.decode` answers as ``generate`` does."""
        return decodes_plainly(self.body)

    def _generated(
        self, rows: Sequence[Encoded], choice: TokenChoice, max_new_tokens: int
    ) -> list[tuple[list[int], list[float]]]:
        """Answer by Transformers' ``generate``; returns what :func:`~.decoding.decode` does."""
        inputs = self.processor.collate(rows, padding_side="left").to(next(self.parameters()).device, self.dtype)
        forced = ForcedChoice(choice)
        new = self._generate(
            inputs,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,  # some models' own generation settings would distort the choice
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self.end_tokens),
            pad_token_id=self.pad_token,
            logits_processor=LogitsProcessorList([forced]),
            synced_gpus=self.synced,
        )
        steps = min(new.shape[1], len(forced.columns))
        logprobs = torch.stack(forced.columns[:steps], 1).tolist() if steps else [[] for _ in rows]
        found = []
        for ids, known in zip(new[:, :steps].tolist(), logprobs, strict=True):
            length = next((i + 1 for i, token in enumerate(ids) if token in self.end_tokens), steps)
            found.append((ids[:length], known[:length]))
        return found

    @torch.no_grad()
    def score_options(self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return the log-likelihoods of given answers in nats: the sum over an answer's tokens, without its end token.

        All are computed in one forward.

        Args:
            prompts: as in :meth:`generate`.
            options: the answers to each prompt, at least one.

        Raises:
            BadSample: the chat template drops or changes an answer.
        """
        rows, answers = [], []
        for (conversation, images), texts in zip(prompts, options, strict=True):
            prompt = conversation.prompt()
            for text in texts:
                message = {"role": "assistant", "content": [{"type": "text", "text": text}]}
                answered = replace(prompt, messages=(*prompt.messages, message))
                row = self.processor.encode(answered, images[: count_images(prompt.messages)])
                rows.append(row)
                answers.append(_last_answer(row))
        if lacks_images(self.processor, rows) and self.synced:
            rows.append(self.processor.dummy())
        inputs = self.processor.collate(rows)
        length = inputs["input_ids"].shape[1]
        positions = torch.cat([row * length + tokens for row, tokens in enumerate(answers)])
        targets = inputs["input_ids"].flatten()[positions]
        device = next(self.parameters()).device
        training = self.training
        self.eval()
        try:
            hidden = self(inputs.to(device, self.dtype), (positions - 1).to(device)).hidden
        finally:
            self.train(training)
        logprobs = self.head.logprobs(hidden, targets.to(device)).cpu()
        lengths = [len(tokens) for tokens in answers]
        scores = [part.sum().item() for part in logprobs.split(lengths)]
        stops = list(accumulate(len(texts) for texts in options))
        return [scores[stop - len(texts) : stop] for texts, stop in zip(options, stops, strict=True)]

    def encode_prompt(self, conversation: Conversation, images: Sequence[Image.Image]) -> Encoded:
        """Encode a conversation for the model to answer; an assistant message at its end is left out."""
        # Only an answer at the very end is left out: earlier answers are the question's history.
        if conversation.messages[-1]["role"] == "assistant":
            conversation = conversation.prompt()
        return self.processor.encode(conversation, images[: count_images(conversation.messages)], generation=True)

    def _answer(self, ids: list[int], logprobs: list[float], opening: str, marks: Mapping[int, str]) -> Answer:
        tokenizer = self.processor.tokenizer
        complete = bool(ids) and ids[-1] in self.end_tokens
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        marked = None
        if opening or not marks.keys().isdisjoint(ids):
            marked = opening + decode_with_marks(tokenizer, ids, marks).strip()
        return Answer(text, ids, logprobs, complete, marked)

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def end_tokens(self) -> set[int]:
        """Ids that end an answer."""
        eos = self.processor.tokenizer.eos_token_id
        return set() if eos is None else {eos}

    @property
    def pad_token(self) -> int:
        tokenizer = self.processor.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)

    def train(self, mode: bool = True) -> Self:
        """As in torch, except that a frozen vision encoder stays in evaluation mode."""
        super().train(mode)
        encoder = self.parts.get("vision_encoder")
        if encoder is not None and not any(p.requires_grad for p in encoder.parameters()):
            encoder.eval()
        return self

    def set_trainable(self, parts: Iterable[str]) -> None:
        """Train the named parts and freeze the others."""
        chosen = set(parts)
        for name, part in self.parts.items():
            part.requires_grad_(name in chosen)
