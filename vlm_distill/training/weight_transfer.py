"""Weights sent into a running vLLM server from GPU to GPU, over its weight-transfer endpoints."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_EXCEPTION, wait
from typing import Any

import torch
from torch import Tensor
from torch.cuda import nccl

from data.errors import UserError
from vlm_distill.endpoint import Endpoint, Refused, in_background

_REMEDY = 'start vLLM again, with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config \'{"backend": "nccl"}\''


class NcclGroup:
    """This process as the first rank of an NCCL group, whose other ranks are a server's.

    PyTorch's own binding of NCCL is all that it needs. Groups are never destroyed, since NCCL would wait for members
    that may be dead.

    Args:
        unique_id: from :meth:`new_id`; the other ranks enter with it at the same time.
        ranks: of the group, this one included.
        device: this process's GPU; no other rank may have the same.
    """

    def __init__(self, unique_id: bytes, ranks: int, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._members = [nccl.init_rank(ranks, unique_id, 0)]
            # Each of vLLM's ranks adds up one number with all others as soon as it has entered.
            nccl.all_reduce([torch.zeros(1, device=device)], comms=self._members)
            torch.cuda.current_stream().synchronize()

    @staticmethod
    def new_id() -> bytes:
        """Return an id for a new group, which tells where its first rank is."""
        return bytes(nccl.unique_id())

    @staticmethod
    def check(device: torch.device) -> None:
        """Raise ``UserError`` if no group can be opened here."""
        if device.type != "cuda":
            raise UserError("on_policy.server.weights: nccl needs a GPU, and this run has none; set it to folder")

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Send tensors to all other ranks, in this order; return when they have been sent."""
        with torch.cuda.device(self.device):
            for tensor in tensors:
                nccl.broadcast([tensor.to(self.device).contiguous()], 0, comms=self._members)
            torch.cuda.current_stream().synchronize()


class WeightTransfer:
    """Exchanges the weights of a vLLM server for others, on the first rank alone.

    Written against vLLM 0.32's own trainer (``vllm/distributed/weight_transfer/nccl_engine.py``), without importing it.
    The server's processes enter an NCCL group after this one (``POST /init_weight_transfer_engine``, with NCCL's unique
    id). For every version of the weights the server begins an update, is sent names, shapes and dtypes, receives one
    broadcast a tensor, and ends the update under the version's name. A server that no longer has the last version,
    since it was started again, enters a new group.

    Args:
        server: its address without ``/v1``.
        device: this process's.

    Raises:
        UserError: this process has no GPU.
    """

    def __init__(self, server: Endpoint, device: torch.device) -> None:
        NcclGroup.check(device)
        # Not tried twice: the second request would wait for tensors that have been sent already.
        self.server, self.once, self.device = server, server.without_retries(), device
        self._group: NcclGroup | None = None
        self._version: str | None = None
        self._name = uuid.uuid4().hex[:8]

    def holds_last(self) -> bool:
        """Return whether the server says that it has the version that it was sent last."""
        if self._version is None:
            return False
        return self.server.ask("weight_info", None, lambda reply: str(reply["weight_version"])) == self._version

    def send(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Let the server have these tensors, by their names in a checkpoint, as the version of a step.

        Raises:
            UserError: it refuses them, or cannot be reached; its weights may be half of one version then.
        """
        if not self.holds_last():
            self._enter_group()
        assert self._group is not None
        info = {
            "names": [*tensors],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            "shapes": [[*tensor.shape] for tensor in tensors.values()],
        }
        self._version, group = None, self._group
        self._tell("start_weight_update", {})
        self._tell_while("update_weights", {"update_info": info}, lambda: group.broadcast(tensors.values()))
        version = f"{self._name}-step-{step}"
        self._tell("finish_weight_update", {"weight_version": version})
        self._version = version

    def _enter_group(self) -> None:
        """Open a new group together with the server's processes."""
        try:
            others = self.server.ask("get_world_size", None, lambda reply: int(reply["world_size"]))
        except Refused as refused:
            raise UserError(f"{refused}; {_REMEDY}") from None
        unique_id, ranks = NcclGroup.new_id(), 1 + others
        info = {
            "nccl_unique_id_b64": base64.b64encode(unique_id).decode(),
            "world_size": ranks,
            "rank_offset": 1,
            "packed": False,
        }

        def enter() -> None:
            self._group = NcclGroup(unique_id, ranks, self.device)

        self._tell_while("init_weight_transfer_engine", {"init_info": info}, enter)

    def _tell(self, path: str, body: Any) -> None:
        """Send a request that must not be sent twice."""
        try:
            self.once.ask(path, body, lambda reply: reply, _REMEDY)
        except Refused as refused:
            raise UserError(f"{refused}; {_REMEDY}") from None

    def _tell_while(self, path: str, body: Any, work: Callable[[], None]) -> None:
        """Send a request that the server answers once both sides have done their part of the work."""
        replied, worked = in_background(lambda: self._tell(path, body)), in_background(work)
        # If one side fails, the other waits for it forever.
        finished, _ = wait([replied, worked], return_when=FIRST_EXCEPTION)
        try:
            for future in finished:
                future.result()
        except RuntimeError as error:
            raise UserError(
                f"on_policy.server.weights: NCCL fails: {error}; does vLLM have GPUs of its own, and the same release "
                "of NCCL?"
            ) from None
