"""The output layer as the losses read it, with the scale and soft-cap that a model applies to its logits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import with_adapters
from .families import LOGIT_CAPS, LOGIT_FACTORS, family


class LMHead:
    """A decoder's output layer, read but not owned: ``softcap(scale · (h Wᵀ + b))`` with softcap(z) = c·tanh(z/c).

    Args:
        linear: the output layer; its parameters stay registered where they are (they may be tied to the embedding).
            With LoRA on it (peft), the weight is that of the layer plus its active adapters' products.
        scale: factor on the logits (Cohere's ``logit_scale``, Granite's ``1 / logits_scaling``).
        softcap: c, or ``None`` for no cap (Gemma 2's ``final_logit_softcapping``).

    ``vocabulary`` cuts the head to its first ids. ``gather``, which the training engine installs, makes sharded
    parameters whole.
    """

    def __init__(self, linear: nn.Linear, scale: float = 1.0, softcap: float | None = None) -> None:
        self._linear = linear
        self.scale = scale
        self.softcap = softcap
        self.vocabulary: int | None = None
        self.gather: Callable[[list[nn.Parameter]], AbstractContextManager[Any]] = lambda parameters: nullcontext()
        self._adapters = True

    def rebind(self, linear: nn.Linear) -> None:
        """Read this layer from now on: the output layer with adapters around it, or without them again."""
        self._linear = linear

    def without_adapters(self) -> LMHead:
        """Return the same head, ignoring the adapters on its layer."""
        plain = copy.copy(self)
        plain._adapters = False
        return plain

    def uncut(self) -> LMHead:
        """Return the same head over its whole vocabulary."""
        whole = copy.copy(self)
        whole.vocabulary = None
        return whole

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that :meth:`weight` and :attr:`bias` read."""
        return list(self._linear.parameters())

    @contextmanager
    def weight(self) -> Iterator[Tensor]:
        """Give the weight ``[V, H]``, whole and cut to ``vocabulary``; :attr:`bias` can be read inside."""
        with self.gather(self.parameters):
            weight = with_adapters(self._linear) if self._adapters else self._linear.weight
            yield weight[: self.vocabulary]

    @property
    def bias(self) -> Tensor | None:
        """``[V]`` or ``None``; read it inside :meth:`weight`."""
        return None if self._linear.bias is None else self._linear.bias[: self.vocabulary]

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute float32 logits ``[N, V]`` of ``hidden [N, H]``: the definition that the chunked losses must match."""
        with self.weight() as weight:
            return self.logits_with(hidden, weight)

    def own_logits(self, hidden: Tensor) -> Tensor:
        """Compute float32 logits ``[N, V]`` as the model does: in its own dtype, and beyond ``vocabulary``."""
        weight = self._linear.weight
        if type(self._linear) is nn.Linear and weight.device.type == "cpu" and weight.dtype == hidden.dtype:
            # Of few rows, this order takes a CPU about two thirds of the time.
            logits = (weight @ hidden.T).T.contiguous()
            logits = logits if self._linear.bias is None else logits.add_(self._linear.bias)
        else:
            logits = self._linear(hidden)
        return self._shaped(logits.float())

    def logprobs(self, hidden: Tensor, targets: Tensor, rows: int = 256) -> Tensor:
        """Compute log-probabilities ``[N]`` of the tokens ``targets [N]``, from the logits of ``rows`` at a time."""
        found = [hidden.new_zeros(0, dtype=torch.float32)]
        with self.weight() as weight:
            for part, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
                logits = self.logits_with(part, weight)
                found.append(logits.gather(-1, wanted.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1))
        return torch.cat(found)

    def logits_with(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Compute logits with a weight from :meth:`weight`, for callers that work chunk by chunk."""
        logits = hidden.float() @ weight.float().T
        if self.bias is not None:
            logits = logits + self.bias.float()
        return self._shaped(logits)

    def _shaped(self, logits: Tensor) -> Tensor:
        """Apply the scale and the soft-cap."""
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def fixed_head(tensors: Mapping[str, Tensor], scale: float, softcap: float | None) -> LMHead:
    """Return a head of its own, not trained, with these tensors: ``weight`` ``[V, H]`` and, optional, ``bias``."""
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = nn.Parameter(tensors["weight"], requires_grad=False)
    if "bias" in tensors:
        linear.bias = nn.Parameter(tensors["bias"], requires_grad=False)
    return LMHead(linear, scale, softcap)


def lm_head(model: Any) -> LMHead:
    """Return a Transformers model's output layer, with the scale and soft-cap that its class applies to the logits."""
    config, text = model.config, model.config.get_text_config()
    composite = text is not config
    scale, softcap = 1.0, None
    if not composite or family(config.model_type).softcap:
        softcap = next((cap for name in LOGIT_CAPS if (cap := getattr(text, name, None))), None)
    if not composite or family(config.model_type).scale:
        scale = _scale(text, config.model_type)
    return LMHead(model.get_output_embeddings(), scale, softcap)


def _scale(text: Any, model_type: str) -> float:
    scale = 1.0
    for name in LOGIT_FACTORS:
        scale *= getattr(text, name, None) or 1.0
    scaling = getattr(text, "logits_scaling", None) or 1.0
    return scale * scaling if family(model_type).multiplies else scale / scaling
