"""What teachers on servers have in common: one request for each row of a micro-batch, sent ahead of time."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from PIL import Image

from data.batch import DistillationBatch
from data.conversation import Conversation
from data.errors import UserError
from vlm_distill.endpoint import Refused

from .processor import Processor
from .teacher import Teacher

R = TypeVar("R")

# HTTP statuses that concern one request only: it is too long, or its images are too many or cannot be read.
OF_ONE = (400, 413, 422, 501)


@dataclass(frozen=True)
class Row:
    """A row of a micro-batch, as a server is asked about it.

    Attributes:
        ids: its tokens as the teacher's processor here encodes them, without padding.
        predicting: positions of the tokens before the supervised ones, ascending.
        at_images: positions of its image tokens, ascending.
        conversation: for the server to render, if there are images; otherwise ``None``.
        images: of the conversation, decoded.
    """

    ids: list[int]
    predicting: list[int]
    at_images: list[int]
    conversation: Conversation | None
    images: Sequence[Image.Image]

    @property
    def around_images(self) -> tuple[range, range]:
        """Positions before the first image token, and after the last one, these counted from the end."""
        return range(self.at_images[0]), range(self.at_images[-1] + 1 - len(self.ids), 0)


class ServedRows(Teacher, Generic[R]):
    """A teacher on a server that answers one request for each row; ``R`` is what is read of a reply.

    :meth:`request` sends a micro-batch's requests, and :meth:`replies` waits for them, or sends them if nobody did.
    :meth:`ask` is called on a thread.

    Args:
        processor: the teacher's, here.
        workers: this rank's concurrent requests.
        at_images: whether rows are asked about for their image tokens, even without a supervised token.
    """

    processor: Processor
    asks_ahead = True

    def __init__(self, processor: Processor, workers: int, *, at_images: bool = False) -> None:
        self.processor, self.at_images = processor, at_images
        self.needs_images = processor.has_vision
        self._pool = ThreadPoolExecutor(workers)
        #: Requests under way: the origins of a micro-batch, and its rows' replies.
        self._ahead: deque[tuple[Any, list[Future[R]]]] = deque()

    @abstractmethod
    def ask(self, row: Row) -> R:
        """Ask the server about a row, and return what is needed of the reply."""

    def request(self, batch: DistillationBatch) -> None:
        self._ahead.append((batch.origins, self._requests(batch)))

    def forget(self, batch: DistillationBatch) -> None:
        if self._ahead and self._ahead[0][0] == batch.origins:
            self._ahead.popleft()

    def replies(self, batch: DistillationBatch) -> list[R]:
        """Return the replies for a micro-batch's rows, in their order."""
        ahead = bool(self._ahead) and self._ahead[0][0] == batch.origins
        waiting = self._ahead.popleft()[1] if ahead else self._requests(batch)
        return [future.result() for future in waiting]

    def _requests(self, batch: DistillationBatch) -> list[Future[R]]:
        """Send the requests for a micro-batch's rows, all at once."""
        assert batch.teacher is not None
        inputs = {name: batch.teacher.inputs[name].cpu() for name in ("input_ids", "attention_mask")}
        rows, length = inputs["input_ids"].shape
        predicting, at_images = batch.teacher.positions.cpu(), batch.teacher.image_positions.cpu()
        waiting = []
        for number in range(rows):
            # Padding is on the right, so a position in the row is one in the request.
            wanted = (predicting[predicting // length == number] % length).tolist()
            seen = (at_images[at_images // length == number] % length).tolist()
            if not wanted and not (self.at_images and seen):
                continue
            ids = inputs["input_ids"][number, : int(inputs["attention_mask"][number].sum())].tolist()
            conversation, images = batch.conversations[number] if self.needs_images else (None, ())
            shown = conversation if isinstance(conversation, Conversation) and images else None
            row = Row(ids, wanted, seen, shown, () if shown is None else images)
            waiting.append(self._pool.submit(self._ask_named, row))
        return waiting

    def _ask_named(self, row: Row) -> R:
        """Ask about a row; a refusal that concerns one with images names its sample."""
        try:
            return self.ask(row)
        except Refused as refused:
            if row.conversation is None or refused.status not in OF_ONE:
                raise
            # It may have too many images, or be too long on the server, where images take other numbers of tokens.
            where = f"{row.conversation.source}, line {row.conversation.line}"
            raise UserError(f"{where}: {refused}; leave it out of the data, or change the server") from None
