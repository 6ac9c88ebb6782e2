"""DeepSpeed: ZeRO engines, sharded teachers, checkpoints, Muon. No other file imports it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn
from torch.serialization import get_crc32_options, set_crc32_options
from transformers.integrations import HfDeepSpeedConfig

from data.errors import UserError, first_line
from vlm_distill.config.batch_split import split_batch
from vlm_distill.config.sections import AnyRun
from vlm_distill.models.interface import VisionLanguageModel
from vlm_distill.models.loading import not_finite
from vlm_distill.runtime import faults
from vlm_distill.runtime.failures import out_of_memory
from vlm_distill.runtime.manifest import Entry, HashedWriter
from vlm_distill.runtime.processes import Processes

from .engine_settings import deepspeed_config
from .shards import Whole, read_whole, written_by

SAVED_BY = "engine"
#: Optimizers whose state can only be restored on as many ranks, and at the ZeRO stage, that saved it.
_BOUND_TO_RANKS = ("adamw8bit", "muon")


# DeepSpeed's own all-reduce for CPUs needs a compiler on its first use, and 69 MB of shared memory a rank: more than a
# container has by default, and it is never freed. gloo does without.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Which optimizers work at which stage is checked by `training.optimizers`.
logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in str(record.msg))


def _adopt_group(processes: Processes) -> None:
    """Have DeepSpeed use the process group that ``processes`` has opened."""
    # DeepSpeed 0.19 calls what torch 2.14 has renamed.
    renamed = "`torch.distributed.(all_gather_into|reduce_scatter)_tensor`"
    warnings.filterwarnings("ignore", renamed, FutureWarning)
    backend = "nccl" if processes.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    groups = deepspeed.utils.groups
    try:
        dist.get_rank(groups._WORLD_GROUP)
    except ValueError:  # DeepSpeed 0.19 keeps its copy of an earlier run's group, which is closed
        groups._WORLD_GROUP = None


def accelerator() -> str:
    """Return the kind of device that DeepSpeed has chosen for this process, ``cpu`` or ``cuda``."""
    return deepspeed.accelerator.get_accelerator().device_name()


class Engine:
    """A task under DeepSpeed ZeRO.

    A step has any number of micro-batches: ``begin_micro_batch``, forward, ``backward`` and ``step`` for each of them.

    Args:
        task: what is trained; a step calls its ``forward``.
        optimizer: of its parameters. A group's ``lr_scale``, if given, is a factor on its learning rate.
        config: the run's.
        processes: the ranks.
        read_parameters: parameters that the task's forward reads without calling their module.
        autocast: with bf16, keep parameters and buffers in float32 under torch's autocast at every ZeRO stage.
            Otherwise stage 0 does so, and other stages hold bf16 parameters with float32 masters.
    """

    def __init__(
        self,
        task: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: AnyRun,
        processes: Processes,
        *,
        read_parameters: Sequence[nn.Parameter] = (),
        autocast: bool = False,
    ) -> None:
        _adopt_group(processes)
        self.task = task
        self.processes = processes
        self.stage = config.deepspeed.stage
        micro, accumulation = split_batch(config, processes.world)
        on_policy = getattr(config, "on_policy", None)
        if on_policy is not None and on_policy.pairs:
            accumulation *= 2  # DeepSpeed only has to know that gradients accumulate
        settings = deepspeed_config(config, micro, accumulation, sum(p.numel() for p in task.parameters()), autocast)
        name = getattr(config.optimizer, "name", None)
        self._bound_to_ranks = name if name in _BOUND_TO_RANKS else None
        names = {id(parameter): name for name, parameter in task.named_parameters()}
        self._names: list[list[str]] = []
        for group in optimizer.param_groups:
            self._names.append([names[id(parameter)] for parameter in group["params"]])
        self._engine = _initialize(task, optimizer, settings)
        # At stage 0 DeepSpeed 0.19 copies all gradients into a buffer and back, even on a single rank.
        self._alone = self.stage == 0 and processes.world == 1
        if self._alone:
            self._engine.enable_backward_allreduce = False
            self._trained = [p for p in task.parameters() if p.requires_grad]
        if self.stage == 3:
            # DeepSpeed 0.19 finds such a parameter by itself only in a forward where it happens to be partitioned. That
            # may be after it has fixed the order of fetching parameters, and the next forward fails.
            for parameter in read_parameters:
                deepspeed.zero.register_external_parameter(task, parameter)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def begin_micro_batch(self, *, last: bool) -> None:
        """Say before a micro-batch's forward whether it is the step's last one, after which the weights are updated."""
        self._engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate one micro-batch's share of the step's loss; DeepSpeed only averages over ranks."""
        # `* 1.0` makes a new tensor: at stage 0 DeepSpeed 0.19 divides the gradient of a forward's own output by the
        # accumulation in spite of scale_wrt_gas=False, because its hook on that tensor was registered first.
        self._engine.backward(loss * 1.0, scale_wrt_gas=False)

    def step(self, lr: float) -> float | None:
        """End a micro-batch; after the last one of an optimizer step, update with this learning rate.

        Returns:
            The gradient's norm before clipping; between updates, that of the previous one, or ``None``.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        if self._alone:
            # As on several ranks: weight decay and momentum also move a parameter that no loss has reached.
            for parameter in self._trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        norm = self._own_norm()
        self._engine.step()
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def _own_norm(self) -> Tensor | None:
        """Return the gradient's norm at stage 0, where DeepSpeed 0.19 clips by it and does not report it.

        After the last micro-batch's backward, all ranks have the whole gradient there.
        """
        if self.stage > 0 or not self._engine.is_gradient_accumulation_boundary():
            return None
        gradients = [p.grad for p in self.task.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(gradients) if gradients else None

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def share_statistics(self, module: nn.Module) -> None:
        """Average batch norm's running statistics over ranks, which normalise by their own micro-batches.

        All ranks then save and evaluate the same model (timm's ``--dist-bn reduce``).
        """
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if self.processes.world == 1:
            return
        for norm in norms:
            for statistic in (norm.running_mean, norm.running_var):
                if statistic is not None:
                    dist.all_reduce(statistic)
                    statistic /= self.processes.world

    def save(self, folder: Path, state: dict[str, Any]) -> dict[str, Entry]:
        """Write weights and optimizer of all ranks, and ``state``, into an existing folder.

        Returns:
            The manifest's entries of the files that this rank wrote, by their paths in the folder.

        Raises:
            OSError, RuntimeError: this rank could not write; others may have.
        """
        files = _Files(folder)
        self._engine.checkpoint_engine = files
        self._engine.save_checkpoint(str(folder), tag=SAVED_BY, client_state={"run": state}, save_latest=False)
        if files.error is not None:
            raise files.error
        return files.entries

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore what :meth:`save` wrote, and return its ``state``.

        The number of ranks and the ZeRO stage may have changed: each rank then reads all files.

        Raises:
            UserError: the checkpoint holds other parameters than this run trains, or its optimizer's state cannot be
                split anew.
        """
        try:
            return self._load(folder)
        except (KeyError, ValueError, RuntimeError) as error:
            if out_of_memory(error) or isinstance(error, dist.DistError):
                raise
            # The files are intact, so the parameters differ: their names, shapes or groups.
            raise UserError(
                f"{folder}: does not fit this run's student, losses or optimizer ({first_line(error)}); put back what "
                "it was written with, or choose another output"
            ) from error

    def _load(self, folder: Path) -> dict[str, Any]:
        third, ranks = written_by(folder / SAVED_BY)
        if (third, ranks) == (self.stage == 3, self.processes.world if self.stage else None):
            # For 4-bit weights, bitsandbytes writes scales that it does not read: the base has them.
            strict = all(parameter.is_floating_point() for parameter in self.task.parameters())
            path, client = self._engine.load_checkpoint(str(folder), tag=SAVED_BY, load_module_strict=strict)
            if path is None:
                raise UserError(
                    f"{folder}: DeepSpeed finds no checkpoint in it; remove it to continue from an earlier one"
                )
            return client["run"]
        if self._bound_to_ranks is not None:
            raise UserError(
                f"{folder}: other ranks or another ZeRO stage wrote it, which {self._bound_to_ranks} cannot be "
                "restored from; use as many ranks and the same deepspeed.stage"
            )
        whole = read_whole(folder / SAVED_BY, self._names)
        self._restore(folder, whole)
        return whole.client

    @torch.no_grad()
    def _restore(self, folder: Path, whole: Whole) -> None:
        """Split whole tensors into this engine's shards."""
        optimizer = self._engine.optimizer
        trained = {name: p for name, p in self.task.named_parameters() if p.requires_grad}
        if trained.keys() != whole.weights.keys():
            odd = sorted(trained.keys() ^ whole.weights.keys())[0]
            raise UserError(f"{folder}: trains other parameters than this run ({odd}); choose another output")
        if getattr(optimizer, "swap_optimizer", False):
            raise UserError(f"{folder}: other ranks wrote it, which cannot be read with an optimizer on NVMe")
        with _whole_for_writing(list(self.task.parameters())):
            for name, parameter in self.task.named_parameters():
                source = whole.weights.get(name, whole.rest.get(name))
                if source is not None:
                    parameter.data.copy_(source)
        # A tied parameter is also there under its other name, and empty where ZeRO-3 wrote it.
        names = {name for name, _ in self.task.named_parameters(remove_duplicate=False)}
        self.task.load_state_dict({k: v for k, v in whole.rest.items() if k not in names}, strict=False)
        inner = optimizer if self.stage == 0 else optimizer.optimizer
        for group, saved in zip(inner.param_groups, whole.groups, strict=True):
            group |= saved
        if self.stage == 0:
            for name, parameter in trained.items():
                tensors = {kind: tensor.to(parameter.device).clone() for kind, tensor in whole.states[name].items()}
                optimizer.state[parameter] = tensors | _own(whole.scalars[name])
            return
        flats = next(
            getattr(optimizer, name)
            for name in (
                "fp32_partitioned_groups_flat",
                "single_partition_of_fp32_groups",
                "fp32_groups_flat_partition",
            )
            if hasattr(optimizer, name)
        )
        first = next(iter(whole.states))
        kinds = list(whole.states[first])
        for flat in flats:
            inner.state[flat] = {kind: torch.zeros_like(flat) for kind in kinds} | _own(whole.scalars[first])
        if self.stage < 3:
            optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in trained.items():
            for kind, tensor in [(None, whole.weights[name]), *whole.states[name].items()]:
                self._put(parameter, tensor, kind)

    def _put(self, parameter: Any, tensor: Tensor, kind: str | None) -> None:
        """Copy this rank's share of a whole tensor into the float32 weights (``None``) or the optimizer's state."""
        if self.stage < 3:
            parameter.set_full_hp_param(tensor.to(self.processes.device), kind)
            return
        share, _ = self._engine.optimizer._get_fp32_opt_state_partition(parameter, False, kind)
        piece = tensor.flatten()[self.processes.rank * share.numel() :][: share.numel()]
        share.zero_()
        share[: len(piece)].copy_(piece)

    def whole_weights(self, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Yield a module's trained weights by name, whole on every rank, in float32 where ZeRO keeps masters.

        Collective from stage 1 on: every rank must take them all.
        """
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            whole = parameter.dtype == torch.float32 and self.stage < 3
            yield name, parameter.detach() if whole else deepspeed.utils.safe_get_full_fp32_param(parameter)

    def whole_state(self, module: nn.Module) -> dict[str, Tensor]:
        """Return a module's whole state dict on the CPU, gathered from all shards; empty on ranks other than the first.

        Collective under ZeRO-3: every rank must call it.
        """
        # Tied weights stay one tensor under two names, by which writers recognise them.
        tensors = module.state_dict(keep_vars=True)
        copies: dict[int, Tensor] = {}
        for key, tensor in {id(tensor): tensor for tensor in tensors.values()}.items():
            with deepspeed.zero.GatheredParameters([tensor] if hasattr(tensor, "ds_id") else []):
                if self.processes.first:
                    copies[key] = _on_cpu(tensor)
        return {name: copies[id(tensor)] for name, tensor in tensors.items()} if self.processes.first else {}


def _whole_for_writing(parameters: list[nn.Parameter]) -> Any:
    """Context manager: inside it sharded parameters are whole; what was written into them is sharded again."""
    return deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")], modifier_rank=0)


def _own(scalars: dict[str, Any]) -> dict[str, Any]:
    """Return a copy for one parameter: an optimizer counts its steps in place."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in scalars.items()}


class _Files(TorchCheckpointEngine):
    """Writes a rank's files for DeepSpeed. Errors are kept: raised between two barriers, they would hang the others."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.error: Exception | None = None

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        if self.error is not None:
            return
        try:
            # Opened here, since PyTorch does not say why it could not write a file that it opened itself.
            with open(path, "wb") as file, _without_crc32():
                hashed = HashedWriter(file)
                torch.save(state_dict, cast(IO[bytes], hashed))
            self.entries[Path(path).relative_to(self.folder).as_posix()] = hashed.entry
        except (OSError, RuntimeError) as error:
            self.error = error
        faults.point("checkpoint.file")


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Context manager: ``torch.save`` computes no CRC-32. ``torch.load`` never reads it; the manifest's is faster."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def checkpoint_weights(folder: Path, stage: int) -> dict[str, Tensor]:
    """Return the task's whole weights from a checkpoint of any number of ranks, in float32 where ZeRO kept masters."""
    if stage == 0:
        # Pickled by DeepSpeed: a checkpoint is trusted like code.
        saved = torch.load(folder / SAVED_BY / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        return saved["module"]
    return get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=SAVED_BY)


def _on_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU; a copy if ZeRO-3 has gathered it, since it will be partitioned again."""
    plain = tensor.detach().cpu()
    return plain.clone() if hasattr(tensor, "ds_id") else plain


def _initialize(task: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
    """Return DeepSpeed's engine. Raise ``UserError`` for settings that DeepSpeed refuses."""
    try:
        DeepSpeedConfig(settings)
    except Exception as error:  # assertions, pydantic's errors and its own
        raise _refused(error) from None
    try:
        return deepspeed.initialize(model=task, optimizer=optimizer, config=settings)[0]
    except (AssertionError, NotImplementedError, ValueError) as error:  # settings that contradict each other
        raise _refused(error) from error


def _refused(error: Exception) -> UserError:
    return UserError(f"deepspeed: DeepSpeed refuses this section: {' '.join(str(error).split())[:300]}")


def muon(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return DeepSpeed's Muon, whose ZeRO stages 1 and 2 reassemble each matrix before its update.

    Args:
        groups: of parameters; ``use_muon`` says whether Muon or AdamW updates a group.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in groups:
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]  # ZeRO looks for it there
    return MuonWithAuxAdam(groups)


class ShardedModel:
    """A frozen model in an inference engine of its own, its parameters sharded over the ranks by ZeRO-3."""

    def __init__(self, model: nn.Module, settings: dict[str, Any]) -> None:
        self._engine, *_ = deepspeed.initialize(model=model, config=settings)
        self._engine.eval()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)


def load_sharded(
    load: Callable[[], VisionLanguageModel], dtype: torch.dtype, processes: Processes, *, offload: bool = False
) -> tuple[VisionLanguageModel, ShardedModel]:
    """Load a frozen model, sharded over the ranks. Collective.

    Args:
        load: loads the model; Transformers then loads only each rank's share.
        dtype: of its parameters.
        processes: the ranks.
        offload: keep the shares in main memory, from where layers are fetched when they run.

    Returns:
        The model, whose ``generate`` and ``score_options`` all ranks must call together, and a callable for its
        forward.
    """
    _adopt_group(processes)
    settings = _inference_config(dtype, offload)
    with loading_in_shards(settings):
        model = load()
    # Each rank sees its own share only: all must end if one finds such a number.
    wrong = sorted(set(chain.from_iterable(processes.gather(not_finite(model)))))
    if wrong:
        raise UserError(
            f"model: NaN or infinite numbers in {len(wrong):,} weights, first {wrong[0]}; is the copy damaged?"
        )
    model.requires_grad_(False)
    model.synced = processes.world > 1
    model.head.gather = gather_parameters
    return model, ShardedModel(model, settings)


def gather_parameters(parameters: list[nn.Parameter]) -> Any:
    """Context manager: inside it sharded parameters are whole; others are left alone."""
    sharded = [p for p in parameters if getattr(p, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE]
    return deepspeed.zero.GatheredParameters(sharded)


@contextmanager
def loading_in_shards(settings: dict[str, Any]) -> Iterator[None]:
    """Context manager: inside it, Transformers' ``from_pretrained`` loads only each rank's share of the weights."""
    # The object is registered process-wide while it lives: no other model may be loaded meanwhile.
    alive = HfDeepSpeedConfig(settings)
    try:
        yield
    finally:
        del alive


def _inference_config(dtype: torch.dtype, offload: bool = False) -> dict[str, Any]:
    # Pinned, so that a layer's share is copied to the GPU while the previous layer runs.
    place = {"offload_param": {"device": "cpu", "pin_memory": torch.cuda.is_available()}} if offload else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, **place},
        "bf16": {"enabled": dtype is torch.bfloat16},
        "steps_per_print": 2**31,
    }
