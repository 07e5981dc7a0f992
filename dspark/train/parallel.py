"""Training in the processes that torchrun started, by DDP or FSDP2. In one process every function here does nothing.

All processes call the same functions in the same order. Files are read by all of them, written by process 0.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

ParallelKind = Literal["ddp", "fsdp"]
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # unsharded, in process 0
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Join the other processes, if torchrun started some and that is still to be done; yields this one's device."""
    kind, several = device.split(":")[0], int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and kind != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        device = f"{kind}:{os.environ['LOCAL_RANK']}"
    if not several or dist.is_initialized():
        yield device
        return
    dist.init_process_group(dist.get_default_backend_for_device(kind))
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: list[T]) -> list[T]:
    """This process's part of what all have, of equal length give or take one."""
    return items[rank() :: size()]


def total(values: Tensor) -> Tensor:
    """Summed in place over all processes, to the same bits in each."""
    if size() > 1:
        dist.all_reduce(values)
    return values


class LossModule(nn.Module):
    """The loss as a module's forward, which is where DDP and FSDP take hold of a step."""

    def __init__(self, model: nn.Module, loss: Callable[..., tuple[Tensor, ...]]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *args) -> tuple[Tensor, ...]:
        return self.loss(*args)


def wrap(
    model: nn.Module, loss: Callable[..., tuple[Tensor, ...]], kind: ParallelKind
) -> Callable[..., tuple[Tensor, ...]]:
    """`loss`, which uses `model`, so that backward passes leave the mean gradient of all processes.

    FSDP leaves each process a shard of the model's weights, so the optimiser is made after this.
    """
    if size() == 1:
        return loss
    module = LossModule(model, loss)
    if kind == "ddp":
        shared = DistributedDataParallel(module)
        shared.broadcast_buffers = False  # at each step: they are tables that never change
        return shared
    from torch.distributed.device_mesh import init_device_mesh  # FSDP takes half a second to import
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (size(),))
    for layers in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    # Without resharding the weights of an evaluation, which has no backward pass, would stay and grow stale.
    return fully_shard(module, mesh=mesh, reshard_after_forward=True)  # pyright: ignore[reportReturnType]


def exchange_gradients(loss: Callable[..., tuple[Tensor, ...]], on: bool) -> None:
    """Whether the coming backward pass exchanges gradients or adds to them here: once a step is enough."""
    if isinstance(loss, DistributedDataParallel):
        loss.require_backward_grad_sync = on  # what its no_sync() sets
    elif size() > 1:
        loss.set_requires_gradient_sync(on)  # pyright: ignore[reportFunctionMemberAccess]


def gathered(model: M) -> M:
    """The model with its whole weights, in process 0."""
    if size() == 1:
        return model
    weights = get_model_state_dict(model, options=WHOLE)
    if rank() > 0:
        return model
    whole = type(model)(model.config)
    whole.load_state_dict(weights)
    return whole.to(next(model.parameters()).device)
