"""Questions, and the student's own answers to them, encoded for the student and its teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image

from data.batch import Encoded, SampleId
from data.collate import Collator
from data.conversation import Conversation
from data.encoding import Pair, Turns, encode_pair
from data.errors import BadSample
from data.teacher_view import Seen
from vlm_distill.models.chat import whole_thought
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.processor import Processor
from vlm_distill.models.teacher import Teacher


@dataclass(frozen=True)
class Asked:
    """A question as a teacher receives it: its tokens, and what the teacher sees."""

    encoded: Encoded
    seen: Seen


@dataclass(frozen=True)
class Prompt:
    """A question, encoded for the student and for those who teach its source.

    Attributes:
        place: the question's sample.
        conversation, images: as the student sees them.
        student: the student's tokens.
        asked: the same for each teacher, by name; a single teacher's name is empty.
    """

    place: SampleId
    conversation: Conversation
    images: list[Image.Image]
    student: Encoded
    asked: Mapping[str, Asked]


class OwnAnswers:
    """Encodes questions for all models, then the answers that the student has drawn.

    Args:
        collator: of the run's samples.
        student: draws the answers.
        teacher: judges them; none is cached.
    """

    def __init__(self, collator: Collator, student: VisionLanguageModel, teacher: Teacher) -> None:
        self.collator, self.student, self.teachers = collator, student, teacher.members

    def ask(self, place: SampleId, sample: Conversation, images: list[Image.Image]) -> Prompt:
        """Encode a sample's question. Raise ``BadSample`` if it leaves a model no room for an answer."""
        conversation = sample.before_last_answer()
        student = self.student.encode_prompt(conversation, images)
        self._check_room("student", student)
        asked = {}
        for name, collator in self.collator.collators_of(place[0]).items():
            view = collator.view
            seen: Seen = (conversation, images) if view is None else view.before_last_answer(sample, images)
            encoded = student
            if view is not None or collator.teacher is not collator.student:
                encoded = self._asks(name).encode(*seen, generation=True)
            self._check_room("teacher", encoded)
            collator.check_alike(student, encoded)
            asked[name] = Asked(encoded, seen)
        return Prompt(place, conversation, images, student, asked)

    def pair(self, prompt: Prompt, ids: list[int]) -> Pair:
        """Encode a question with its answer.

        If all teachers share the student's tokenizer, all models get exactly the tokens that were drawn, as many as
        fit: even the beginning of an answer that is cut is learned. If one does not, or if one is sent text, all encode
        the answer's text.

        Raises:
            BadSample: the models' tokens of the text differ, or do not fit.
        """
        collators = self.collator.collators_of(prompt.place[0])
        texts = [
            collator.grouped or (self.teachers[name].needs_images and bool(prompt.asked[name].seen[1]))
            for name, collator in collators.items()
        ]
        if any(texts):
            pairs = {name: self._of_text(prompt, ids, name, collator) for name, collator in collators.items()}
        else:
            pairs = self._of_tokens(prompt, ids)
        for name, pair in pairs.items():
            if self.teachers[name].needs_images:
                conversation, images = prompt.asked[name].seen
                pairs[name] = replace(pair, seen=(self._answered(conversation, ids), images))
        return self.collator.join_pairs(prompt.place[0], pairs)

    def _of_text(self, prompt: Prompt, ids: list[int], name: str, collator: Collator) -> Pair:
        """Return the pair with one teacher where both encode the answer's text."""
        seen = None
        if collator.view is not None:
            question, images = prompt.asked[name].seen
            seen = self._answered(question, ids), images
        return encode_pair(
            self._answered(prompt.conversation, ids),
            prompt.images,
            collator.student,
            collator.teacher,
            collator.max_length,
            turns=Turns(last_only=True, ends=ids[-1] in self.student.end_tokens),
            grouped=collator.grouped,
            seen=seen,
        )

    def _of_tokens(self, prompt: Prompt, ids: Sequence[int]) -> dict[str, Pair]:
        """Return the pairs with all teachers where every model gets the drawn tokens."""
        rows = [prompt.student]
        rows += [asked.encoded for asked in prompt.asked.values()]
        longest = max(len(row.input_ids) for row in rows)
        ids = ids[: self.collator.max_length - longest]
        student = self.student.processor.answered(prompt.student, ids)
        ours = student.supervised.nonzero().flatten()
        pairs = {}
        for name, asked in prompt.asked.items():
            teacher, theirs = student, ours
            if asked.encoded is not prompt.student:
                teacher = self._asks(name).answered(asked.encoded, ids)
                theirs = teacher.supervised.nonzero().flatten()
            ends = self.student.end_tokens - self.teachers[name].end_tokens
            pairs[name] = Pair(student, teacher, ours, theirs, torch.tensor([token not in ends for token in ids]))
        return pairs

    def _asks(self, name: str) -> Processor:
        """Return what encodes questions for a teacher."""
        processor = self.teachers[name].processor
        assert isinstance(processor, Processor)  # a cache cannot know answers yet to be drawn
        return processor

    def _check_room(self, role: str, row: Encoded) -> None:
        if len(row.input_ids) >= self.collator.max_length:
            raise BadSample("too long", f"a prompt of {len(row.input_ids)} tokens for the {role}")

    def _answered(self, conversation: Conversation, ids: list[int]) -> Conversation:
        """Return the conversation with the student's answer."""
        text = whole_thought(self.student.processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
        message = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        return replace(conversation, messages=(*conversation.messages, message))
