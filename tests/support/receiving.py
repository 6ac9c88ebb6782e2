"""A server's side of weights that are sent over a group of processes: gloo here, where a run itself uses NCCL."""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from scoring_server import ScoringServer

from vlm_distill.models import load_vlm
from vlm_distill.training import weight_transfer

ENTER, *UPDATE = "init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"


class GlooGroup:
    """What ``NcclGroup`` is to a run, between two threads of this process."""

    stores: ClassVar[dict[bytes, dist.Store]] = {}

    def __init__(self, unique_id: bytes, ranks: int, device: torch.device | None, rank: int = 0) -> None:
        self.group = dist.ProcessGroupGloo(self.stores[unique_id], rank, ranks, timedelta(seconds=30))
        self.group.allreduce([torch.zeros(1)]).wait()

    @classmethod
    def new_id(cls) -> bytes:
        unique_id = os.urandom(128)
        cls.stores[unique_id] = dist.HashStore()
        return unique_id

    @staticmethod
    def check(device: torch.device) -> None:
        """Any device will do."""

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            self.group.broadcast(tensor.contiguous(), 0).wait()


def receive(server: ScoringServer | None, student: Path, out: Path) -> dict[str, Any]:
    """Prepare a rank for sending weights to a server, which only the first one has; return what the section says."""
    weight_transfer.NcclGroup = GlooGroup  # type: ignore[assignment, misc]
    if server is not None:
        Receiver(server, student, out.with_name(f"{out.name}_received"))
    return {"weights": "nccl"}


class Receiver:
    """Gives a server the paths of vLLM's weight transfer; what it receives, it loads as a checkpoint of the student.

    Args:
        server: which draws the answers.
        student: the folder of the student that it starts with.
        folder: for what it has received.

    Attributes:
        calls: the paths that change something, in the order of the requests.
        updates: what each update said of its tensors.
    """

    def __init__(self, server: ScoringServer, student: Path, folder: Path) -> None:
        self.server, self.student, self.folder = server, student, folder
        self.calls: list[str] = []
        self.updates: list[dict[str, Any]] = []
        self.received: dict[str, torch.Tensor] = {}
        self.version = "default"
        self.group: GlooGroup | None = None
        server.more |= {f"/{path}": self._noted(path) for path in (ENTER, *UPDATE)}
        server.more["/get_world_size"] = lambda _: {"world_size": 1}
        server.more["/weight_info"] = lambda _: {"weight_version": self.version}

    def _noted(self, path: str) -> Callable[[Any], Any]:
        def answer(body: Any) -> Any:
            self.calls.append(path)
            getattr(self, path)(body)
            return {"message": "done"}

        return answer

    def init_weight_transfer_engine(self, body: Any) -> None:
        info = body["init_info"]
        assert (info["packed"], info["rank_offset"], info["world_size"]) == (False, 1, 2)
        self.group = GlooGroup(base64.b64decode(info["nccl_unique_id_b64"]), info["world_size"], None, rank=1)

    def start_weight_update(self, body: Any) -> None:
        self.received = {}

    def update_weights(self, body: Any) -> None:
        info = body["update_info"]
        self.updates.append(info)
        assert self.group is not None, "a server that was started again is in no group"
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            self.received[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.group.broadcast(self.received[name], 0).wait()

    def finish_weight_update(self, body: Any) -> None:
        shutil.copytree(self.student, self.folder, dirs_exist_ok=True)
        save_file(self.received, self.folder / "model.safetensors", metadata={"format": "pt"})
        self.server.load({"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}})
        self.version = body["weight_version"]

    def start_again(self) -> None:
        """Be as after a restart."""
        self.version, self.group = "default", None
        self.server.model.load_state_dict(load_vlm(self.student, dtype="float32").state_dict())
