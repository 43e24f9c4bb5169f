"""Reads the Python modules that Inductor generates: which kernels a graph launches, on how many bytes, in what memory.

Sizes are those of the buffers in the arguments of a call. A kernel that reads a part of a buffer counts all of it, and
one that reads a buffer twice counts it once: for most of them that is what the memory has to move.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

ELEMENT_BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "int64": 8,
    "uint64": 8,
    "int32": 4,
    "uint32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}


@dataclasses.dataclass
class Kernel:
    """A Triton kernel, and what its cubin says."""

    name: str
    arguments: tuple[str, ...]
    error: str = ""
    registers: int = 0
    stack: int = 0  # bytes a thread: what spilled from registers
    shared: int = 0
    warps: int = 0


@dataclasses.dataclass(frozen=True)
class Call:
    """One launch in a generated module."""

    name: str
    kind: str  # fused, hand-written, matrix product, attention or other
    read: int
    written: int


@dataclasses.dataclass
class Module:
    """A generated module."""

    calls: list[Call]
    peak: int  # most bytes at a time of what it allocates, and of the inputs that it frees


def signature_of(source: str) -> tuple[str, ...]:
    """Names of a kernel's arguments."""
    found = re.search(r"@triton\.jit\s+def \w+\(([^)]*)\)", source)
    return tuple(part.split(":")[0].strip() for part in found[1].split(",")) if found else ()


def written_arguments(source: str) -> set[str]:
    """Arguments that a kernel writes: by Inductor's names for its own kernels, by `mutated_arg_names` for others."""
    names = {name for name in signature_of(source) if re.match(r"(in_)?out_ptr", name)}
    found = re.search(r"'mutated_arg_names': \[([^\]]*)\]", source)
    return names | (set(re.findall(r"'(\w+)'", found[1])) if found else set())


def kernel_sources(text: str) -> dict[str, str]:
    """Source of each Triton kernel of a module, by the name that its launches use."""
    return dict(re.findall(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str", text, re.M | re.S))


def product(sizes: str, symbols: Mapping[str, int]) -> int:
    """Number of elements of a shape as generated code writes it, `(24, 2048, s77*2)`."""
    known: dict[str, Any] = {"__builtins__": {}, "max": max, "min": min, "math": math, **symbols}
    return math.prod(eval(sizes, known)) if sizes.strip("() ,") else 1  # noqa: S307 # Inductor wrote it


class Memory:
    """Buffers of a module: names, bytes, and how many bytes are held. Several names may stand for one buffer."""

    def __init__(self, inputs: Mapping[str, int]):
        self.sizes = dict(inputs)  # of each name
        self.owner = {name: name for name in inputs}  # the buffer behind a name
        self.names = {name: {name} for name in inputs}  # the names of a buffer
        self.held = 0
        self.peak = 0

    def hold(self, name: str, size: int) -> None:
        """A new buffer."""
        self.sizes[name], self.owner[name], self.names[name] = size, name, {name}
        self.held += size
        self.peak = max(self.peak, self.held)

    def alias(self, new: str, old: str, size: int | None = None) -> None:
        """Another name for a buffer, of other bytes where it views a part."""
        if old in self.owner:
            self.sizes[new] = self.sizes[old] if size is None else size
            self.owner[new] = self.owner[old]
            self.names[self.owner[old]].add(new)

    def drop(self, name: str, counted: set[str]) -> None:
        """One name less; the buffer is freed with its last. Inputs count where they are `counted`."""
        owner = self.owner.pop(name, None)
        if owner is None:
            return
        self.names[owner].discard(name)
        if not self.names[owner] and owner in counted:
            self.held -= self.sizes[owner]


def permanent(name: str) -> bool:
    """Whether an input is a weight or part of the batch, which the caller holds, and not saved for this graph."""
    return re.match(r"(primals|arg\d+)_\d+|arg\d+", name) is not None


def kind_of(name: str) -> str:
    """What launches: one of Inductor's fused kernels, a hand-written one, a matrix product, attention, or other."""
    if "flash" in name or "attention" in name:
        return "attention"
    if name.startswith(("extern_kernels.", "aten.mm", "aten.bmm")):
        return "matrix product"
    if name.startswith("triton_"):
        return "fused"
    return "other" if "." in name else "hand-written"


LINE = {
    "allocate": re.compile(r"^(\w+) = empty_strided_\w+\((\([^)]*\)), \([^)]*\), torch\.(\w+)\)"),
    "alias": re.compile(r"^(\w+) = (\w+)(?:; del (\w+))?\s*(?:#.*)?$"),
    "view": re.compile(r"^(\w+) = reinterpret_tensor\((\w+), (\([^)]*\))"),
    "item": re.compile(r"^(\w+) = (\w+)\[(\d+)\]"),
    "launch": re.compile(r"^(\w+)\.run\((.*)\)"),
    "extern": re.compile(r"^(?:(\w+) = )?((?:extern_kernels|torch\.ops|aten)\.[\w.]+)\((.*)\)"),
    "check": re.compile(r"^assert_size_stride\((\w+), (\([^)]*\))"),
}


class Reader:
    """Goes through the lines of a module's `call` once."""

    def __init__(self, text: str, inputs: Mapping[str, int], symbols: Mapping[str, int]):
        self.symbols = dict(symbols)
        self.sources = kernel_sources(text)
        self.memory = Memory(inputs)
        self.counted = {name for name in inputs if not permanent(name)}
        self.memory.held = self.memory.peak = sum(inputs[name] for name in self.counted)
        self.calls: list[Call] = []

    def read(self, line: str) -> None:
        """One statement."""
        for kind, pattern in LINE.items():
            found = pattern.match(line)
            if found:
                getattr(self, kind)(*found.groups())
                break
        for names in re.findall(r"\bdel ([\w, ]+)", line):
            for name in names.split(","):
                self.memory.drop(name.strip(), self.counted)

    def allocate(self, name: str, shape: str, kind: str) -> None:
        """A new buffer of Inductor's."""
        self.counted.add(name)
        self.memory.hold(name, product(shape, self.symbols) * ELEMENT_BYTES[kind])

    def alias(self, new: str, old: str, _deleted: str | None) -> None:
        """A buffer that is used again, or an input under its number."""
        self.memory.alias(new, old)

    def view(self, new: str, old: str, _shape: str) -> None:
        """A view of a buffer."""
        self.memory.alias(new, old)

    def item(self, new: str, old: str, index: str) -> None:
        """One of several outputs of an operator that Inductor calls."""
        self.memory.alias(new, f"{old}[{index}]")

    def check(self, name: str, shape: str) -> None:
        """The size of what an operator returned; of an input that nobody knows, in 2-byte elements."""
        if name not in self.memory.sizes:
            self.counted.add(name)
            self.memory.hold(name, 2 * product(shape, self.symbols))

    def launch(self, name: str, arguments: str) -> None:
        """A Triton kernel."""
        source = self.sources.get(name, "")
        signature, writes = signature_of(source), written_arguments(source)
        names = [part.strip() for part in arguments.split(",")]
        read = written = 0
        for i, argument in enumerate(names):
            size = self.memory.sizes.get(argument, 0)
            parameter = signature[i] if i < len(signature) else ""
            written += size if parameter in writes else 0
            read += size if parameter not in writes or parameter.startswith("in_out") else 0
        self.calls.append(Call(name, kind_of(name), read, written))

    def extern(self, result: str | None, name: str, arguments: str) -> None:
        """An operator or a library's kernel. The result of one that allocates it is read as large as a later check."""
        if "assert_" in name or name.endswith((".alloc_from_pool", ".set_")):
            return
        inputs, _, out = arguments.partition("out=")
        read = sum(self.memory.sizes.get(word, 0) for word in dict.fromkeys(re.findall(r"[A-Za-z_]\w*", inputs)))
        written = sum(self.memory.sizes.get(word, 0) for word in re.findall(r"[A-Za-z_]\w*", out)[:2])
        self.calls.append(Call(name, kind_of(name), read, written))


def parse_module(text: str, inputs: Mapping[str, int], symbols: Mapping[str, int]) -> Module:
    """A generated module, given the bytes of its inputs by name, and the values of its symbols."""
    reader = Reader(text, inputs, symbols)
    begin = re.search(r"^\s*def call\(", text, re.M)
    for line in text[begin.end() if begin else 0 :].splitlines():
        reader.read(line.strip())
        if line.strip().startswith("return ("):
            break
    return Module(reader.calls, reader.memory.peak)
