"""The student's answers drawn by vLLM, whose weights follow the student in training."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from data.batch import Encoded
from data.conversation import Conversation
from data.errors import BadSample, UserError
from vlm_distill.config.sections import RunConfig
from vlm_distill.endpoint import Endpoint, Refused
from vlm_distill.models.answers import Answer
from vlm_distill.models.chat import special_ids
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.lora import save_adapter
from vlm_distill.models.saved_tensors import saved_tensors
from vlm_distill.models.served import KEY_VARIABLE, ServedModel
from vlm_distill.models.served_rows import OF_ONE, Row
from vlm_distill.runtime.processes import Processes

from .weight_transfer import WeightTransfer

# A text whose log-probabilities tell the server's weights from others.
_PROBE = "What is in the picture? A red circle beside 12 blue squares, and a word: yes."
# Mean differences in nats a token between server and student: that rounding in bf16 does not explain at first, and by
# which three times the first one may grow.
_MOST_DIFFERENCE, _GROWTH = 0.25, 0.02
# Largest difference between two replies of a server whose weights are the same.
_SAME = 1e-3
# Bars a token from being drawn.
_NEVER = -100.0


class Question(NamedTuple):
    """A question for the student, as it is encoded here; ``seed`` is hashed for the answer's random numbers."""

    conversation: Conversation
    images: Sequence[Image.Image]
    encoded: Encoded
    seed: str


class Rollouts:
    """Draws the student's answers on a vLLM server.

    In a step with own answers, :meth:`prepare` is called on every rank, then :meth:`draw` on each for its own
    questions. Every ``refresh`` steps, ``prepare`` gives the server the student's weights, and all ranks wait for it.
    They are written into a new folder ``step_N`` in the shared one, which is complete before it has its name, and which
    the server loads (``POST /collective_rpc``, ``reload_weights``). With ``adapter``, it is the LoRA adapter alone,
    under a name of its own for each step (``POST /v1/load_lora_adapter``). With ``weights: nccl``, they are sent
    without a folder (:class:`WeightTransfer`). No request is under way meanwhile: every answer comes from whole weights
    of one step, :attr:`version`. A server that has lost them, since it was started again, gets them again.

    Args:
        config: the run, with a section ``on_policy.server``.
        student: the student in training.
        processes: the ranks.
        whole_state: returns the student's unsharded state on the first rank; collective.

    Attributes:
        version: the step before which the server's weights were taken; ``None``: it has not got any yet.

    Raises:
        UserError: the server cannot be reached, or serves another model.
    """

    def __init__(
        self,
        config: RunConfig,
        student: VisionLanguageModel,
        processes: Processes,
        whole_state: Callable[[], dict[str, Tensor]],
    ) -> None:
        assert config.on_policy is not None
        assert config.on_policy.server is not None
        assert config.student.path is not None
        self.policy, self.section = config.on_policy, config.on_policy.server
        self.student, self.processes, self._whole_state = student, processes, whole_state
        endpoint = Endpoint("on_policy.server", self.section.url, KEY_VARIABLE, timeout=self.section.timeout)
        self.base, self.base_name = config.student.path, self.section.model or config.student.path
        arguments = config.student.template_arguments
        self.served = ServedModel(student.processor, endpoint, self.base_name, arguments, origin="student.path")
        if not self.served.tells:
            raise UserError(f"on_policy.server: {endpoint.url} returns no prompt_logprobs; serve the student with vLLM")
        message = {"role": "user", "content": [{"type": "text", "text": _PROBE}]}
        self._probe = student.encode_prompt(Conversation((message,)), [])
        self._barred = sorted((special_ids(student.processor.tokenizer) - student.end_tokens) | _unshared_ids(student))
        self._pool = ThreadPoolExecutor(self.section.workers)
        over_nccl = self.section.weights == "nccl"
        self._transfer = WeightTransfer(endpoint.above("/v1"), processes.device) if over_nccl else None
        self.version: int | None = None
        self._known: list[float] = []
        self._limit = _MOST_DIFFERENCE

    def prepare(self, step: int) -> None:
        """Let the server have weights that are fresh enough for a step. Collective."""
        due = self.version is None or step - self.version >= self.section.refresh
        if not due and self.processes.on_first(self._has_lost_weights):
            if self.processes.first:
                print(
                    f"vlm-distill: {self.served.endpoint.url} has other weights than it was given (was it started "
                    "again?); it gets the student's again",
                    file=sys.stderr,
                    flush=True,
                )
            due = True
        if due:
            self._refresh(step)

    def draw(self, questions: Sequence[Question]) -> list[Answer | BadSample]:
        """Return an answer to each of this rank's questions, or why there is none."""
        return list(self._pool.map(self._ask, questions))

    def _refresh(self, step: int) -> None:
        """Write the student's weights, let the server load them, and compare the two. Collective."""
        self.processes.watch.phase(f"step {step + 1}, sending weights to the server")
        state = self._whole_state()
        self._known = self.processes.on_first(lambda: self._send(step, state))
        if self.section.adapter:
            self.served.name = self._adapter_name(step)
        own = self._own_logprobs()
        difference = sum(abs(a - b) for a, b in zip(self._known, own, strict=True)) / len(own)
        if not difference < self._limit:
            folder = "" if self._transfer is not None else f"sees {self.section.folder} under this path, "
            raise UserError(
                f"on_policy.server: {self.served.endpoint.url} differs from the student in training by "
                f"{difference:.3f} nats a token after it loaded its weights; check that it {folder}quantizes nothing, "
                "and keeps no old lm head"
            )
        if self.version is None:
            self._limit = min(_MOST_DIFFERENCE, 3 * difference + _GROWTH)
        self.version = step

    def _send(self, step: int, state: dict[str, Tensor]) -> list[float]:
        """Let the server have the weights of a step, and return the probe's log-probabilities there."""
        if self._transfer is not None:
            self._transfer.send(step, saved_tensors(self.student, state))
            self._forget_old()
        else:
            self._send_folder(step, state)
        return self._logprobs_there()

    def _send_folder(self, step: int, state: dict[str, Tensor]) -> None:
        """Write the weights of a step into a new folder, and let the server load them."""
        assert self.section.folder is not None
        root = Path(self.section.folder).absolute()
        place, unfinished = root / f"step_{step}", root / ".unfinished"
        try:
            root.mkdir(parents=True, exist_ok=True)
            for old in (place, unfinished):
                shutil.rmtree(old, ignore_errors=True)
            if self.section.adapter:
                save_adapter(self.student, unfinished, self.base, state=state)
            else:
                self.student.save_pretrained(unfinished, state)
            unfinished.rename(place)
        except OSError as error:
            raise UserError(
                f"on_policy.server.folder: {root} cannot be written ({error}); make room, or name another"
            ) from None
        if self.section.adapter:
            self._load_adapter(step, place)
        else:
            self._load_weights(place)
        for old in root.glob("step_*"):
            if old != place:
                shutil.rmtree(old, ignore_errors=True)

    def _load_weights(self, place: Path) -> None:
        """Let the server load all weights from a folder."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(place)}}
        try:
            self.served.root.ask("collective_rpc", body, _read_results, self.served.advice)
            self._forget_old()
        except Refused as refused:
            missing = refused.status == 404
            remedy = "start vLLM with VLLM_SERVER_DEV_MODE=1" if missing else f"can it read {place}?"
            raise UserError(f"{refused}; {remedy}") from None

    def _forget_old(self) -> None:
        """Let the server forget what it made by the old weights: keys and values, and what it saw in images."""
        # Loading drops the latter in vLLM's worker but not in its scheduler, and an image seen before ends the engine.
        remembered = ["reset_prefix_cache"]
        remembered += ["reset_mm_cache", "reset_encoder_cache"] if self.student.processor.has_vision else []
        for path in remembered:
            self.served.root.ask(path, {}, lambda reply: reply, self.served.advice)

    def _load_adapter(self, step: int, place: Path) -> None:
        """Let the server load a step's adapter, and drop the one before. A new name has no keys and values yet."""
        name, before = self._adapter_name(step), self.served.name
        body = {"lora_name": name, "lora_path": str(place), "load_inplace": True}
        try:
            self.served.endpoint.ask("load_lora_adapter", body, str, self.served.advice, is_json=False)
        except Refused as refused:
            missing = refused.status == 404
            remedy = (
                "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
                if missing
                else f"can it read {place}, and is --max-lora-rank as large as student.lora.rank?"
            )
            raise UserError(f"{refused}; {remedy}") from None
        if before not in (name, self.base_name):
            with suppress(Refused):  # it was started again, and has never had that adapter
                self.served.endpoint.ask(
                    "unload_lora_adapter", {"lora_name": before}, str, self.served.advice, is_json=False
                )
        self.served.name = name

    def _adapter_name(self, step: int) -> str:
        """Return how the server calls a step's adapter; runs differ by their folder."""
        assert self.section.folder is not None
        run = hashlib.sha256(str(Path(self.section.folder).absolute()).encode()).hexdigest()[:8]
        return f"{self.base_name}-{run}-step-{step}"

    def _has_lost_weights(self) -> bool:
        """Return whether the server has other weights than it was given last."""
        if self._transfer is not None and not self._transfer.holds_last():
            return True
        try:
            there = self._logprobs_there()
        except Refused as refused:
            if refused.status == 404 and self.section.adapter:  # it knows no adapter of this name
                return True
            raise
        pairs = zip(there, self._known, strict=True)
        return not all(abs(a - b) < _SAME for a, b in pairs)

    def _logprobs_there(self) -> list[float]:
        """Return the log-probabilities of the probe's tokens on the server."""
        ids = self._probe.input_ids.tolist()

        def read(reply: Any) -> list[float]:
            told = reply["choices"][0]["prompt_logprobs"]
            return [float(seen[str(own)]["logprob"]) for own, seen in zip(ids[1:], told[1:], strict=True)]

        path, body = self.served.text(ids, max_tokens=1, prompt_logprobs=1, temperature=1.0)
        return self.served.endpoint.ask(path, body, read, self.served.advice)

    @torch.no_grad()
    def _own_logprobs(self) -> list[float]:
        """Return the same of the student here. Collective if its parameters are sharded."""
        student, ids = self.student, self._probe.input_ids
        inputs = student.processor.collate([self._probe]).to(self.processes.device, student.dtype)
        training = student.training
        student.eval()
        try:
            hidden = student(inputs, torch.arange(len(ids) - 1, device=self.processes.device)).hidden
        finally:
            student.train(training)
        # The server knows of no shared vocabulary.
        return student.head.uncut().logprobs(hidden, ids[1:].to(self.processes.device)).tolist()

    def _ask(self, question: Question) -> Answer | BadSample:
        """Ask for the answer to one question."""
        temperature = self.policy.temperature
        settings: dict[str, Any] = {
            "max_tokens": self.policy.max_new_tokens,
            "temperature": temperature,
            # The same end tokens as for the model here; vLLM adds those of the model's own generation settings.
            "stop_token_ids": sorted(self.student.end_tokens),
            "logit_bias": {str(token): _NEVER for token in self._barred},
            "return_token_ids": True,
        }
        if temperature:
            settings["seed"] = int.from_bytes(hashlib.sha256(question.seed.encode()).digest()[:4])
        if question.images:
            settings |= {"logprobs": True, "top_logprobs": 0}
            path, body = self.served.chat(question.conversation, question.images, generation=True, **settings)
        else:
            path, body = self.served.text(question.encoded.input_ids.tolist(), logprobs=0, **settings)
        try:
            return self.served.endpoint.ask(path, body, lambda reply: self._read(reply, question), self.served.advice)
        except Refused as refused:
            if refused.status not in OF_ONE:
                raise
            return BadSample("server refuses the question", refused.detail)

    def _read(self, reply: Any, question: Question) -> Answer | BadSample:
        """Return the answer in a reply, with the tokens that were drawn."""
        choice = reply["choices"][0]
        ids = choice.get("token_ids")
        if not ids:
            raise UserError(
                f"on_policy.server: {self.served.endpoint.url} returns no token ids of its answers; vLLM does since "
                "0.10.2"
            )
        if question.images:
            prompt = question.encoded.input_ids
            seen = self.student.processor.image_tokens(question.encoded).nonzero().flatten().tolist()
            row = Row(prompt.tolist(), [], seen, question.conversation, question.images)
            self.served.check_ends(row.ids, reply["prompt_token_ids"], *row.around_images)
        most = self.student.head.vocabulary
        if most is not None and max(ids) >= most:
            return BadSample("drawn token unknown to the teacher", f"id {max(ids)}")
        logprobs = _read_logprobs(choice["logprobs"])
        if len(logprobs) != len(ids):
            raise ValueError(f"{len(logprobs)} log-probabilities of {len(ids)} tokens")
        text = self.student.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(text, [int(token) for token in ids], logprobs, choice["finish_reason"] == "stop")


def _unshared_ids(student: VisionLanguageModel) -> set[int]:
    """Return the ids that the student's head scores and its teacher lacks, such as padding. Collective if sharded."""
    cut = student.head.vocabulary
    with student.head.uncut().weight() as weight:
        return set(range(len(weight) if cut is None else cut, len(weight)))


def _read_results(reply: Any) -> list[Any]:
    """Return what a server's processes answered to a call."""
    return list(reply["results"])


def _read_logprobs(told: Mapping[str, Any]) -> list[float]:
    """Return the log-probabilities of an answer's tokens, of a text or of a chat."""
    if "token_logprobs" in told:
        return [float(value) for value in told["token_logprobs"]]
    return [float(entry["logprob"]) for entry in told["content"]]
