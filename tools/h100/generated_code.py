"""Reads the Python modules that Inductor generates: which kernels a graph launches, on how many bytes, in what memory.

Sizes are those of the buffers, or views of them, in the arguments of a call, and for Inductor's kernels at most what
their loads and stores can touch. What a kernel reads twice counts once: for most of them that is what the memory moves.
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
    nodes: tuple[str, ...] = ()  # of the graph, in order


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
    """Arguments that a kernel of Inductor's writes, by their names. A hand-written kernel's say nothing."""
    return {name for name in signature_of(source) if re.match(r"(in_)?out_ptr", name)}


def kernel_sources(text: str) -> dict[str, str]:
    """Source of each Triton kernel of a module, by the name that its launches use."""
    return dict(re.findall(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str", text, re.M | re.S))


def split_arguments(text: str) -> list[str]:
    """Arguments of a call, parted at the commas that are in no parentheses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def product(sizes: str, symbols: Mapping[str, int]) -> int:
    """Number of elements of a shape as generated code writes it, `(24, 2048, s77*2)`."""
    known: dict[str, Any] = {"__builtins__": {}, "max": max, "min": min, "math": math, **symbols}
    return math.prod(eval(sizes, known)) if sizes.strip("() ,") else 1  # noqa: S307 # Inductor wrote it


class Memory:
    """Buffers of a module: names, bytes, and how many bytes are held. Several names may stand for one buffer."""

    def __init__(self, inputs: Mapping[str, tuple[int, int]]):
        self.sizes = {name: size for name, (size, _) in inputs.items()}
        self.elements = {name: element for name, (_, element) in inputs.items()}  # bytes of one
        self.owner = {name: name for name in inputs}  # the buffer behind a name
        self.names = {name: {name} for name in inputs}  # the names of a buffer
        self.held = 0
        self.peak = 0
        self.unwritten: dict[str, str] = {}  # "new" and "reused" buffers that nothing has used yet

    def hold(self, name: str, count: int, element: int) -> None:
        """A new buffer of so many elements."""
        size = count * element
        self.sizes[name], self.elements[name] = size, element
        self.owner[name], self.names[name] = name, {name}
        self.held += size
        self.peak = max(self.peak, self.held)
        self.unwritten[name] = "new"

    def alias(self, new: str, old: str, count: int | None = None) -> None:
        """Another name for a buffer, of fewer elements where it views a part."""
        if old in self.owner:
            self.sizes[new], self.elements[new] = self.view_size(old, count), self.elements[old]
            self.owner[new] = self.owner[old]
            self.names[self.owner[old]].add(new)

    def view_size(self, name: str, count: int | None = None) -> int:
        """Bytes of a name, or of a view of it with so many elements; 0 for a name that is no buffer."""
        size = self.sizes.get(name, 0)
        return size if count is None else min(size, count * self.elements.get(name, 1))

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


def kind_of_attention(name: str) -> str:
    """Whether an operator is attention inside of documents, or attention of all keys under a mask; "" for others."""
    if re.search(r"(efficient|cudnn)_attention", name):
        return "masked attention"
    return "attention" if "flash" in name or "attention" in name else ""


def kind_of(name: str) -> str:
    """What launches: one of Inductor's fused kernels, a hand-written one, a matrix product, attention, or other."""
    if kind := kind_of_attention(name):
        return kind
    if name.startswith(("extern_kernels.", "aten.mm", "aten.bmm")):
        return "matrix product"
    if name.startswith("triton_"):
        return "fused"
    return "other" if "." in name else "hand-written"


LINE = {
    "allocate": re.compile(r"^(\w+) = empty_strided_\w+\((\([^)]*\)), \([^)]*\), torch\.(\w+)\)"),
    "alias": re.compile(r"^(\w+) = (\w+)(?:; del (\w+))?\s*(?:#.*)?$"),
    "view": re.compile(r"^(\w+) = reinterpret_tensor\((\w+), (\([^)]*\))"),
    "descriptor": re.compile(
        r"^(\w+) = .*\bTensorDescriptor\.from_tensor\((?:reinterpret_tensor\()?(\w+)(?:, (\([^)]*\)))?"
    ),
    "numel": re.compile(r"^(\w+_[xyzr]\d?_?numel) = (.+)$"),
    "item": re.compile(r"^(\w+) = (\w+)\[(\d+)\]"),
    "launch": re.compile(r"^(\w+)\.run\((.*)\)"),
    "extern": re.compile(r"^(?:(\w+) = )?((?:extern_kernels|torch\.ops|aten)\.[\w.]+)\((.*)\)"),
    "check": re.compile(r"^assert_size_stride\((\w+), (\([^)]*\))"),
}
VIEW_ARGUMENT = re.compile(r"^reinterpret_tensor\((\w+), (\([^)]*\))")
NODES = re.compile(r"# Topologically Sorted Source Nodes: \[([^\]]*)\]")


class Reader:
    """Goes through the lines of a module's `call` once."""

    def __init__(self, text: str, inputs: Mapping[str, tuple[int, int]], symbols: Mapping[str, int]):
        self.symbols = dict(symbols)
        self.sources = kernel_sources(text)
        self.memory = Memory(inputs)
        self.counted = {name for name in inputs if not permanent(name)}
        self.memory.held = self.memory.peak = sum(inputs[name][0] for name in self.counted)
        self.calls: list[Call] = []
        self.origin: dict[str, int] = {}  # of a result, the call that allocated it
        self.nodes: tuple[str, ...] = ()  # of the next launch

    def read(self, line: str) -> None:
        """One statement."""
        nodes = NODES.match(line)
        if nodes:
            self.nodes = tuple(nodes[1].split(", "))
        for kind in LINE:
            found = LINE[kind].match(line)
            if found:
                getattr(self, kind)(*found.groups())
                break
        if line.endswith("# reuse") and (reused := self.memory.owner.get(line.partition(" ")[0])):
            self.memory.unwritten[reused] = "reused"
        for names in re.findall(r"\bdel ([\w, ]+)", line):
            for name in names.split(","):
                self.memory.drop(name.strip(), self.counted)

    def allocate(self, name: str, shape: str, kind: str) -> None:
        """A new buffer of Inductor's."""
        self.counted.add(name)
        self.memory.hold(name, product(shape, self.symbols), ELEMENT_BYTES[kind])

    def alias(self, new: str, old: str, _deleted: str | None) -> None:
        """A buffer that is used again, or an input under its number."""
        self.memory.alias(new, old)

    def view(self, new: str, old: str, shape: str) -> None:
        """A view of a buffer."""
        self.memory.alias(new, old, product(shape, self.symbols))

    def numel(self, name: str, value: str) -> None:
        """How many elements a kernel goes over, where that follows from symbols."""
        self.symbols[name] = product(f"({value},)", self.symbols)

    def descriptor(self, new: str, old: str, shape: str | None) -> None:
        """A tensor descriptor of a buffer, or of a view of one. It holds the buffer."""
        self.memory.alias(new, old, product(shape, self.symbols) if shape else None)

    def item(self, new: str, old: str, _index: str) -> None:
        """One of several results of an operator that Inductor calls."""
        if old in self.origin:
            self.origin[new] = self.origin[old]

    def check(self, name: str, shape: str) -> None:
        """The shape of what an operator allocated. Its type is not said, so elements count 2 bytes."""
        if name in self.memory.sizes:
            return
        self.counted.add(name)
        self.memory.hold(name, product(shape, self.symbols), 2)
        self.memory.unwritten.pop(name, None)
        if name in self.origin:
            call = self.calls[self.origin[name]]
            written = call.written + self.memory.sizes[name]
            self.calls[self.origin[name]] = dataclasses.replace(call, written=written)

    def touched(self, argument: str, accesses: int, elements: int) -> int:
        """Bytes of an argument that so many loads or stores of so many elements can reach."""
        found = VIEW_ARGUMENT.match(argument)
        return accesses * elements * self.memory.elements.get(found[1] if found else argument, 1)

    def argument_bytes(self, argument: str) -> tuple[int, str]:
        """Bytes of an argument, a buffer or a view of one; and "new" or "reused" if nothing has used the buffer yet."""
        found = VIEW_ARGUMENT.match(argument)
        name = found[1] if found else argument
        owner = self.memory.owner.get(name)
        state = self.memory.unwritten.pop(owner, "") if owner else ""
        return self.memory.view_size(name, product(found[2], self.symbols) if found else None), state

    def launch(self, name: str, arguments: str) -> None:
        """A Triton kernel."""
        source = self.sources.get(name, "")
        signature, writes = signature_of(source), written_arguments(source)
        values = dict(zip(signature, split_arguments(arguments), strict=False))
        elements = product(f"({', '.join(v for key, v in values.items() if key.endswith('numel'))},)", self.symbols)
        read = written = 0
        for parameter, argument in values.items():
            size, state = self.argument_bytes(argument)
            accesses = len(re.findall(rf"tl\.(?:load|store|atomic_add)\({parameter}\b", source)) if writes else 0
            if accesses:
                size = min(size, self.touched(argument, accesses, elements))
            if parameter.startswith("in_out"):
                reads, stores = state != "new", True
            elif writes:
                reads, stores = parameter not in writes, parameter in writes
            else:
                reads, stores = not state, bool(state)
            written += size * stores
            read += size * reads
        self.calls.append(Call(name, kind_of(name), read, written, self.nodes))

    def extern(self, result: str | None, name: str, arguments: str) -> None:
        """A library's kernel, or an operator that allocates its results, which later lines check."""
        if "assert_" in name or name.endswith(".set_"):
            return
        read = written = 0
        for argument in split_arguments(arguments):
            key, _, value = argument.rpartition("out=")
            size, _ = self.argument_bytes(value)
            written += size if "out=" in argument and not key else 0
            read += 0 if "out=" in argument else size
        if result:
            self.origin[result] = len(self.calls)
        self.calls.append(Call(name, kind_of(name), read, written, self.nodes))


def parse_module(text: str, inputs: Mapping[str, tuple[int, int]], symbols: Mapping[str, int]) -> Module:
    """A generated module, given the values of its symbols, and of each input its bytes and those of an element."""
    reader = Reader(text, inputs, symbols)
    begin = re.search(r"^\s*def call\(", text, re.M)
    for line in text[begin.end() if begin else 0 :].splitlines():
        reader.read(line.strip())
        if line.strip().startswith("return ("):
            break
    return Module(reader.calls, reader.memory.peak)
