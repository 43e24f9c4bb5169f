"""Watches operators that run eagerly: kernels launched, bytes moved, FLOPs, and everything that waits for the device.

It needs no GPU: tensors may be fake. What is compiled is left out, as Inductor's own count is better.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Operators whose result, or the shape of it, the host must know: each waits until the device has computed it.
WAITING = {
    "_local_scalar_dense": ".item(), float() or bool() of a tensor",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "is_nonzero": "bool() of a tensor",
    "equal": "torch.equal",
    "_unique2": "unique",
    "unique_consecutive": "unique_consecutive",
    "unique_dim": "unique",
    "argwhere": "argwhere",
    "bincount": "bincount",
}
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
NO_KERNEL = ("empty", "empty_strided", "empty_like", "new_empty", "_unsafe_view", "lift_fresh", "detach_", "set_")
NOT_READ = ("copy_", "fill_", "zero_", "uniform_", "normal_", "random_")  # their first argument is only written
PARTS = ("index_copy_",)  # their last argument is read, and written to a part of the first


@dataclasses.dataclass
class Cost:
    """What the operators of one part of a step cost."""

    launches: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    flops: int = 0
    operators: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


@dataclasses.dataclass(frozen=True)
class Wait:
    """One place where the host waits for the device."""

    part: str
    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.what} at {self.where}"


def size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def caller() -> str:
    """The innermost line of Python that is neither torch's nor this module's, as file:line.

    Operators of a backward pass have none: autograd calls them from a thread of its own.
    """
    frame = sys._getframe(1)
    while frame:
        name = frame.f_code.co_filename
        if name != __file__ and "/torch/" not in name and not name.startswith("<"):
            return f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "the backward pass"


class EagerCosts(TorchDispatchMode):
    """Counts by part of a step, while it is entered. `part` names the current one."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Dynamo compiles nothing under other modes."""
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Newer versions of torch ask this instead."""
        return True

    def __init__(self, device: str = "cuda"):
        super().__init__()
        self.device = device
        self.part = "step"
        self.costs: dict[str, Cost] = {}
        self.waits: list[Wait] = []

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Counts under another name."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Counts nothing meanwhile, in this thread."""
        if _get_current_dispatch_mode() is self:
            with _pop_mode_temporarily():
                yield
        else:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        wait = self.waits_for(name, args, kwargs)
        if wait:
            self.waits.append(Wait(self.part, wait, caller()))
            tensors = tree_leaves((args, kwargs))
            if any(isinstance(t, FakeTensor) for t in tensors) and name in (*WAITING, *INDEXING):
                result = stand_in(name, args)
                self.count(func, name, args, kwargs, result)
                return result
        result = func(*args, **kwargs)
        self.count(func, name, args, kwargs, result)
        return result

    def waits_for(self, name: str, args: Any, kwargs: Any) -> str:
        """What makes the host wait for the device in this call, or nothing."""
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        watched = [t for t in tensors if t.device.type == self.device]
        if name in WAITING and watched:
            return WAITING[name]
        if name == "repeat_interleave" and len(tensors) > 0 and kwargs.get("output_size") is None and watched:
            return "repeat_interleave without output_size"
        if name in INDEXING and watched and len(args) > 1:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            return "index by a mask of booleans" if masks else ""
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            to = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
            blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            if blocking and source.device.type != to.type and self.device in (source.device.type, to.type):
                return f"blocking copy from {source.device.type} to {to.type}"
        return ""

    def count(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Adds one operator to the current part, if it launches a kernel."""
        returns = func._schema.returns
        view = bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        query = func._schema.name.startswith("prim::")  # such as a fake tensor's device
        if view or query or name in NO_KERNEL or not any(t.device.type == self.device for t in (*inputs, *outputs)):
            return
        cost = self.costs.setdefault(self.part, Cost())
        cost.launches += 1
        cost.operators[name] += 1
        if name in PARTS:
            cost.bytes_read, cost.bytes_written = (x + size(inputs[-1]) for x in (cost.bytes_read, cost.bytes_written))
            return
        cost.bytes_read += sum(map(size, inputs[1:] if name in NOT_READ else inputs))
        changed = []
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                changed += [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
        known = {id(t) for t in changed}
        cost.bytes_written += sum(map(size, changed)) + sum(size(t) for t in outputs if id(t) not in known)
        if func.overloadpacket in flop_registry:
            cost.flops += int(flop_registry[func.overloadpacket](*args, **kwargs, out_val=result))


@contextlib.contextmanager
def hand_written_launches(costs: EagerCosts) -> Iterator[None]:
    """Counts launches of Triton kernels outside of graphs meanwhile, and launches none.

    A kernel reads each of its tensors once, and writes those that its source stores to.
    """
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def count(kernel: Any, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        tensors = {name: x for name, x in values.items() if isinstance(x, torch.Tensor)}
        stored = set(re.findall(r"tl\.store\((\w+)", kernel.src))
        loaded = set(re.findall(r"tl\.load\((\w+)", kernel.src))
        cost = costs.costs.setdefault(costs.part, Cost())
        cost.launches += 1
        cost.operators[kernel.__name__] += 1
        cost.bytes_read += sum(size(x) for name, x in tensors.items() if name in loaded)
        cost.bytes_written += sum(size(x) for name, x in tensors.items() if name in stored)

    JITFunction.run = count  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        JITFunction.run = run


def stand_in(name: str, args: Any) -> Any:
    """A result for fake tensors, of which nobody knows the values: numbers are 1, masks are true everywhere."""
    x = args[0]
    if name in ("is_nonzero", "equal") or (name == "_local_scalar_dense" and x.dtype == torch.bool):
        return True
    if name == "_local_scalar_dense":
        return 1.0 if x.dtype.is_floating_point else 1
    if name in ("nonzero", "argwhere"):
        return x.new_empty((x.numel(), x.dim()), dtype=torch.int64)
    if name == "masked_select":
        return x.new_empty(x.numel())
    if name in ("index", "_unsafe_index"):
        mask = next(i for i in args[1] if i is not None)
        return x.new_empty((mask.numel(), *x.shape[mask.dim() :]))
    if name.endswith("_"):
        return x
    return torch.empty_like(x)
