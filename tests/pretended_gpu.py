"""Tensors that say they are on a GPU, on machines without one: a mixture with tensors of the CPU is an error, as there.

Numbers are computed on the CPU. C++ takes these tensors for the CPU's, so nothing of CUDA is needed; Python code sees
`device`, and whatever makes or moves tensors is watched by a mode. What it cannot notice: operations that only CUDA
lacks, and numbers.
"""

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
# A copy may cross over, and an index may be the CPU's. `stack` gets gradients of nothing, which C++ makes by itself.
MIXED = {"aten::copy_", "aten::index", "aten::stack"}
MOVES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda}


class OnGPU(torch.Tensor):
    """A tensor that says it is on the GPU; `elem` has its numbers."""

    @staticmethod
    def __new__(cls, elem):
        layout = dict(strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype, device=CPU)
        return torch.Tensor._make_wrapper_subclass(cls, elem.size(), **layout)

    def __init__(self, elem):
        self.elem = elem

    device = property(lambda self: GPU)  # pyright: ignore[reportAssignmentType]
    is_cuda = property(lambda self: True)  # pyright: ignore[reportAssignmentType]
    is_cpu = property(lambda self: False)  # pyright: ignore[reportAssignmentType]

    def numpy(self, **_):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self):
        return self.elem.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name not in MIXED and any(x.dim() for x in tensors if not isinstance(x, OnGPU)):
            raise RuntimeError(f"{name}: expected all tensors on one device, and found cuda:0 and cpu")
        if kwargs.get("device") is not None:
            kwargs["device"] = CPU
        plain = tree_map(lambda x: x.elem if isinstance(x, OnGPU) else x, (args, kwargs))
        out = func(*plain[0], **plain[1])
        if name == "aten::copy_":
            return args[0]
        known = {id(x.elem): x for x in tensors if isinstance(x, OnGPU)}  # what works in place gives its own tensor
        return tree_map(lambda x: on_gpu(known.get(id(x), x)), out)


def on_gpu(x):
    """A tensor as one of the GPU; anything else as it is."""
    return OnGPU(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnGPU) else x


class ToGPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return OnGPU(x.detach())

    @staticmethod
    def backward(ctx, grad):
        return grad.elem


class ToCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.elem

    @staticmethod
    def backward(ctx, grad):
        return OnGPU(grad)


def kind(device):
    return None if device is None else torch.device(device).type


def destination(func, rest, kwargs):
    """The kind of device that a call of `to`, `cpu` or `cuda` names, or None; its other arguments are left in place."""
    if func is not torch.Tensor.to:
        return "cpu" if func is torch.Tensor.cpu else "cuda"
    for place, value in enumerate(rest):
        if isinstance(value, (str, torch.device)):
            return kind(rest.pop(place))
        if isinstance(value, torch.Tensor):
            rest[place] = value.dtype
            return value.device.type
    return kind(kwargs.pop("device", None))


class Watch(TorchFunctionMode):
    """Makes what is made on the GPU, and moves what moves there or back."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in MOVES:
            x, rest = args[0], list(args[1:])
            kwargs.pop("non_blocking", None)
            where = destination(func, rest, kwargs)
            if where == "cuda" and not isinstance(x, OnGPU):
                x = ToGPU.apply(x)
            elif where == "cpu" and isinstance(x, OnGPU):
                x = ToCPU.apply(x)
            return func(x, *rest, **kwargs) if rest or kwargs else x
        if kind(kwargs.get("device")) == "cuda":
            return on_gpu(func(*args, **{**kwargs, "device": CPU}))
        out = func(*args, **kwargs)
        return out.elem if kind(kwargs.get("device")) == "cpu" and isinstance(out, OnGPU) else out


OnCPU = torch.Generator


class Generator(OnCPU):
    """A random generator of any device is the CPU's."""

    def __new__(cls, device="cpu"):
        return OnCPU.__new__(OnCPU, "cpu")


@contextlib.contextmanager
def pretended_gpu():
    """Within, "cuda" is a device of this machine, for the thread that enters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch.Tensor, "pin_memory", lambda x: x)
        for name in ("set_device", "synchronize"):
            patch.setattr(torch.cuda, name, lambda *_: None)
        with Watch():
            yield


def move_model(model):
    """A model with all that it has on the pretended GPU."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(parameter.detach().to(GPU), parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(GPU))
    return model
