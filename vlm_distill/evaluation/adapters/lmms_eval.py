"""The model class that lmms-eval creates. Needs the package ``lmms_eval``; written against version 0.7.3."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms

from data.errors import UserError
from vlm_distill.models import load_vlm
from vlm_distill.models.processor import Prompt

from .harness_prompts import answers, prompt


class VLMDistill(lmms):
    """Gives greedy answers and likelihoods of a model that ``load_vlm`` reads, in one process.

    Args:
        pretrained: folder or name.
        batch_size: questions asked together.
        dtype: of the weights; by default as saved, on a CPU fp32.
        device: ``cuda`` or ``cpu``; by default ``cuda`` if available.
        ignored: other arguments of lmms-eval.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        dtype: str | None = None,
        device: str | None = None,
        **ignored: Any,
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("lmms-eval: this model runs in one process; `vlm-distill eval --nproc` takes several")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or ("fp32" if device == "cpu" else None)
        self.model = load_vlm(pretrained, dtype=dtype).to(device).eval()
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Return greedy answers, cut at the task's stop texts. A task's sampling settings are ignored."""
        groups: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(int(request.args[1].get("max_new_tokens", 1024)), []).append(i)
        found = [""] * len(requests)
        for length, places in groups.items():
            asked = [self._prompt(requests[i].args[0], *requests[i].args[2:]) for i in places]
            told = answers(self.model, asked, batch_size=self.batch_size, max_new_tokens=length)
            for i, text in zip(places, told, strict=True):
                found[i] = cut_at_stops(text, requests[i].args[1].get("until"))
        return found

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood as the answer, and whether it is the greedy answer."""
        found = []
        for request in requests:
            context, continuation, *document = request.args
            if callable(continuation):
                continuation = continuation(self._document(*document[1:]))
            asked = self._prompt(context, *document)
            ((likelihood,),) = self.model.score_options([asked], [[continuation.strip()]])
            (greedy,) = answers(self.model, [asked], batch_size=1, max_new_tokens=64)
            found.append((likelihood, greedy == continuation.strip()))
        return found

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise UserError("lmms-eval: tasks of several rounds are not supported")

    def _document(self, index: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][index]

    def _prompt(self, text: str, visuals: Callable[[Any], Any], index: int, task: str, split: str) -> Prompt:
        images = visuals(self._document(index, task, split)) or []
        return prompt([*images, text])


def cut_at_stops(text: str, until: str | Sequence[str] | None) -> str:
    """Return an answer up to the first of a task's stop texts."""
    # Ignore blank stops: many tasks name a blank line by default, which would end an answer inside its reasoning.
    stops = [until] if isinstance(until, str) else list(until or [])
    for stop in stops:
        if stop.strip():
            text = text.split(stop)[0]
    return text
