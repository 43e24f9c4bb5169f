"""Makes torch's CUDA build see an H100 where there is no GPU, far enough to trace, generate and compile code for it.

`build` compiles the two C libraries of fakes/, and `environment` has a process load them; `install` then replaces what
torch, Dynamo and Triton ask a device. Nothing is ever launched: tensors are fake (torch's FakeTensorMode), with shapes
and types alone.

The names that are replaced are private to torch. They were tested with the versions of requirements-h100.txt.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parent / "fakes"
NAME = "NVIDIA H100 80GB HBM3"
ARCHITECTURE = 90  # compute capability 9.0
# What torch.cuda.get_device_properties says of an H100 with 80 GB (SXM).
PROPERTIES: dict[str, Any] = dict(
    name=NAME,
    major=9,
    minor=0,
    total_memory=84_929_347_584,
    multi_processor_count=132,
    is_integrated=0,
    is_multi_gpu_board=0,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    warp_size=32,
    L2_cache_size=52_428_800,
    gcnArchName="",
    uuid="fake",
    pci_bus_id=0,
    clock_rate=1_980_000,
    memory_clock_rate=2_619_000,
    memory_bus_width=5120,
)


class NoCompiler(Exception):
    """There is no C compiler for the fake libraries."""


def build(folder: Path) -> tuple[Path, Path]:
    """Compiles the fake CUDA runtime and the fake driver library into a folder. Errors: NoCompiler."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        raise NoCompiler("a C compiler is needed: neither cc, gcc nor clang is on PATH")
    folder.mkdir(parents=True, exist_ok=True)
    runtime, driver = folder / "fakecudart.so", folder / "libcuda.so.1"
    for library, source, options in (
        (runtime, "cudart.c", []),
        (driver, "cuda.c", ["-Wl,-soname,libcuda.so.1"]),
    ):
        if not library.exists() or library.stat().st_mtime < (SOURCES / source).stat().st_mtime:
            command = [compiler, "-shared", "-fPIC", "-O1", "-w", *options, "-o", library, SOURCES / source]
            subprocess.run(command, check=True)
    return runtime, driver


def environment(folder: Path, variables: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of a process that loads the fakes, which this builds in a folder. Errors: NoCompiler."""
    runtime, driver = build(folder.resolve())
    path = os.pathsep.join(filter(None, (str(driver.parent), variables.get("LD_LIBRARY_PATH"))))
    return {
        **variables,
        "LD_PRELOAD": str(runtime),
        "LD_LIBRARY_PATH": path,
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # every kernel is compiled here, where the fakes are
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",  # a graph from a cache would be checked by nobody
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
        "TORCHINDUCTOR_CACHE_DIR": variables.get("TORCHINDUCTOR_CACHE_DIR", str(folder.resolve() / "inductor")),
        "TRITON_CACHE_DIR": variables.get("TRITON_CACHE_DIR", str(folder.resolve() / "triton")),
    }


def loaded() -> bool:
    """Whether this process has loaded the fake libraries."""
    return "fakecudart.so" in os.environ.get("LD_PRELOAD", "")


class Anything:
    """A device guard, a stream or an event: it does nothing."""

    def __init__(self, *_: Any):
        import torch

        self.idx = self.cuda_stream = self.device_index = self.stream_id = 0
        self.device_type = 1
        self.device = torch.device("cuda", 0)

    def __enter__(self) -> Anything:
        return self

    def __exit__(self, *_: Any) -> bool:
        return False

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def is_capturing(self) -> bool:
        """No graph is being captured."""
        return False

    def wait_stream(self, other: Any) -> None:
        """There is nothing to wait for."""

    def record(self, *_: Any) -> None:
        """There is nothing to mark."""


def always(value: Any) -> Any:
    """A function of any arguments with this value."""
    return lambda *_, **__: value


def replace(target: Any, values: Mapping[str, Any], static: bool = False) -> None:
    """Sets attributes: a function stays as it is, and any other value becomes a function that returns it."""
    for name, value in values.items():
        function = value if callable(value) else always(value)
        setattr(target, name, staticmethod(function) if static and not isinstance(value, type) else function)


def install() -> None:
    """Has torch.cuda, Dynamo and Triton see one H100 from now on in this process."""
    import torch
    from torch._dynamo import device_interface
    from torch._subclasses import fake_tensor

    properties = types.SimpleNamespace(**PROPERTIES)
    device = dict(
        is_available=True,
        device_count=1,
        current_device=0,
        synchronize=None,
        set_device=None,
        is_bf16_supported=True,
        current_stream=lambda *_, **__: Anything(),
        get_device_properties=always(properties),
    )
    names = dict(get_device_capability=(9, 0), get_device_name=NAME, get_arch_list=always(["sm_80", "sm_90"]))
    state = dict(is_initialized=True, _lazy_init=None, max_memory_allocated=0, memory_allocated=0)
    random = dict(get_rng_state=lambda *_: torch.zeros(16, dtype=torch.uint8), set_rng_state=None)
    replace(torch.cuda, {**device, **names, **state, **random, "get_rng_state_all": always([])})
    torch.cuda._initialized = True
    torch.cuda.device = torch.cuda._DeviceGuard = torch.cuda.Event = Anything
    raw = ("_cuda_getCurrentRawStream", "_cuda_getDevice", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice")
    replace(torch._C, dict.fromkeys((*raw, "_accelerator_getDeviceIndex"), 0) | dict(_cuda_setDevice=None))
    replace(
        torch.accelerator, dict(current_stream=lambda *_, **__: Anything(), current_device_index=0, is_available=True)
    )
    torch.Tensor.pin_memory = lambda self, *_, **__: self

    interface = device_interface.CudaInterface
    triton = dict(is_triton_capable=True, raise_if_triton_unavailable=None, get_raw_stream=0)
    replace(interface, {**device, **triton, "get_compute_capability": ARCHITECTURE}, static=True)
    worker = dict(get_device_properties=always(properties), current_device=0, set_device=None)
    replace(interface.Worker, worker, static=True)
    interface.device = Anything  # pyright: ignore[reportAttributeAccessIssue]
    device_interface.device_interfaces.clear()
    device_interface._device_initialized = False
    fake_tensor.init_gpu_context = always(None)
    install_triton_driver()


def install_triton_driver() -> None:
    """Gives Triton a driver that knows its target and launches nothing."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Utilities:
        """What Triton asks about the device."""

        @staticmethod
        def get_device_properties(_index: int = 0) -> dict[str, int]:
            """Sizes of an H100."""
            sizes = dict(max_shared_mem=232448, max_num_regs=65536, multiprocessor_count=132, warpSize=32)
            return dict(sizes, sm_clock_rate=1_980_000, mem_clock_rate=2_619_000, mem_bus_width=5120)

        @staticmethod
        def load_binary(*_: Any) -> tuple[int, ...]:
            """Module, function, registers, spills and most threads of a kernel that is not loaded."""
            return 0, 0, 0, 0, 1024

    class Driver(DriverBase):
        """One H100."""

        def __init__(self) -> None:
            self.utils, self.binary_ext = Utilities(), "cubin"
            self.launcher_cls = always(always(None))

    answers = dict(
        is_active=True,
        get_current_target=always(GPUTarget("cuda", ARCHITECTURE, 32)),
        get_active_torch_device=always(torch.device("cuda", 0)),
        get_device_interface=always(torch.cuda),
        get_current_device=0,
        get_current_stream=0,
        set_current_device=None,
        map_python_to_cpp_type=lambda kind: kind,
        get_benchmarker=None,
        get_empty_cache_for_benchmark=None,
        clear_cache=None,
    )
    replace(Driver, answers, static=True)
    Driver.__abstractmethods__ = frozenset()
    triton.runtime.driver.set_active(Driver())  # pyright: ignore[reportAbstractUsage] # its methods are `answers`


def fake_parameters(module: Any, device: Any) -> Any:
    """Puts fake tensors in the place of a module's parameters and buffers; call it under a FakeTensorMode."""
    import torch

    for part in module.modules():
        for name, p in list(part._parameters.items()):
            if p is not None:
                data = torch.empty(p.shape, dtype=p.dtype, device=device)
                part._parameters[name] = torch.nn.Parameter(data, requires_grad=p.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return module


def tensors_of(thing: Any, modules: Iterable[str], seen: set[int] | None = None) -> list[Any]:
    """All tensors that an object of these Python modules holds, through containers and attributes, gradients too."""
    import torch

    seen = set() if seen is None else seen
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return [thing, *(() if thing.grad is None else (thing.grad,))]
    if isinstance(thing, Mapping):
        parts = list(thing.values())
    elif isinstance(thing, (list, tuple, set)):
        parts = list(thing)
    elif isinstance(thing, torch.nn.Module) or type(thing).__module__.startswith(tuple(modules)):
        parts = list(getattr(thing, "__dict__", {}).values())
    else:
        return []
    return [tensor for part in parts for tensor in tensors_of(part, modules, seen)]
