"""Data parallel training: ``torchrun --nproc_per_node N resnet-20-cifar-10/main.py ...``, gloo on the CPU, NCCL on GPUs.

Every process runs the whole program on the same data in the same order, and of each batch trains on an equal part: batch
size, sampler and augmentation are those of one process. After the backward pass gradients are averaged, before any
lifelong method sees them, so that what a method gathers is that of the whole batch, and all processes stay the same.
Importances, evaluation and the model at a task's end are computed by parts, or by all alike.

The first process alone writes to job_dir and to the terminal; each other one has a scratch folder, so that nothing in the
program needs to know who it is. Gradients are averaged here and not by DistributedDataParallel, since the loss is compiled
as one function of the run, and is more than the network's forward.

BatchNorm takes the statistics of all parts together on GPUs (torch's SyncBatchNorm); torch has none for the CPU, where each
process normalizes by its own part, and the running statistics are averaged at every step.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lifequant.common.errors import UserError
from lifequant.config import RESUME_JOB_DIR, Config
from lifequant.data.task import Batch

T = TypeVar("T")


def world_size() -> int:
    """The number of processes that train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int | None:
    """This process's number on its machine; None without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def join(device: torch.device) -> None:
    """Join the other processes if torchrun started this one. Only the first process prints."""
    if local_rank() is None or int(os.environ["WORLD_SIZE"]) == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # The first process may decode the images for an hour while the others wait.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=3))
    atexit.register(dist.destroy_process_group)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (to the process's end)


def check(config: Config, splits: bool, what: str) -> None:
    """Raises UserError if several processes can't share this run."""
    processes = world_size()
    if config.train_batch_size % processes:
        raise UserError(
            f"--train_batch_size {config.train_batch_size}: it can't be shared out evenly among {processes} processes"
        )
    if processes > 1 and not splits:
        raise UserError(
            f"{what}: its loss is no mean over images, so a batch can't be shared out: use one process instead of {processes}"
        )


def one_first(load: Callable[[], T]) -> T:
    """Call ``load()`` in the first process, which may write a cache, and then in the others, which read it."""
    if rank() > 0:
        barrier()
    found = load()
    if rank() == 0:
        barrier()
    return found


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def follow(config: Config, scratch: str) -> Config:
    """The config of a process that is not the first. It writes to ``scratch`` and resumes from the first process's files."""
    folder = Path(config.job_dir) / "checkpoint"
    resume = config.resume
    if resume == RESUME_JOB_DIR:
        resume = str(folder / "last.pt") if any((folder / n).is_file() for n in ("last.pt", "previous.pt")) else None
    return replace(config, job_dir=str(Path(scratch) / "run"), resume=resume, reset=False)


def synchronized(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with BatchNorm over all processes' parts of a batch, which torch offers on GPUs."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if world_size() > 1 and device.type == "cuda" else model


def batch_size(size: int) -> int:
    """The largest batch size up to ``size`` that gives each process as many images, and at least one."""
    return max(size - size % world_size(), world_size())


def share(batch: Batch) -> Batch:
    """This process's part of a batch."""
    if (processes := world_size()) == 1:
        return batch
    part = len(batch.y) // processes
    here = slice(rank() * part, (rank() + 1) * part)
    return type(batch)(*(value if value is None else value[here] for value in batch))


def average_gradients(model: nn.Module) -> None:
    """Average all gradients and BatchNorm's running statistics over processes, in one message."""
    if (processes := world_size()) == 1:
        return
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    values = [p.grad for p in model.parameters() if p.grad is not None]
    values += [b for norm in norms for b in norm.buffers(recurse=False) if b.is_floating_point()]
    with torch.no_grad():
        flat = torch.cat([value.flatten() for value in values])
        dist.all_reduce(flat)
        parts = (flat / processes).split([value.numel() for value in values])
        torch._foreach_copy_(values, [part.view_as(value) for part, value in zip(parts, values, strict=True)])


def total(values: Tensor) -> Tensor:
    """Sum ``values`` over processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def is_own(index: int) -> bool:
    """Whether part ``index`` of some work belongs to this process."""
    return index % world_size() == rank()


def own_parts(parts: Sequence[T]) -> list[tuple[int, T]]:
    """[(index, part)] of the parts that belong to this process."""
    return [(index, part) for index, part in enumerate(parts) if is_own(index)]


def gather(found: dict[int, Tensor], device: torch.device) -> Tensor:
    """All parts [n, C] in the order of their indices, in one tensor. Each process gives the results of its ``own_parts``."""
    if world_size() == 1:
        return torch.cat(list(found.values()))
    everyone: list[dict[int, Tensor]] = [{} for _ in range(world_size())]
    dist.all_gather_object(everyone, {index: part.cpu() for index, part in found.items()})
    parts = {index: part for process in everyone for index, part in process.items()}
    return torch.cat([parts[index] for index in sorted(parts)]).to(device)


def of_first(value: T) -> T:
    """The first process's ``value``."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def check_agreement(model: nn.Module) -> None:
    """Raises RuntimeError if this process's model differs from the first one's by a bit."""
    if world_size() == 1:
        return
    flat = torch.cat([value.detach().flatten().double() for value in model.state_dict().values()])
    first = flat.clone()
    dist.broadcast(first, 0)
    if not torch.equal(first, flat):
        raise RuntimeError(f"process {rank()} has another model than the first: their training has come apart")
