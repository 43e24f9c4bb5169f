"""A torch.compile backend that is Inductor up to the point where a graph would run: there, fake results take its place.

Every graph goes through the real passes, partitioner and code generation, and every Triton kernel to a cubin. What was
seen of a graph is in its `Graph`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import math
import re
import subprocess
import tempfile
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.compile_fx as compile_fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.flop_counter import flop_registry

import terms
from contexts import Context
from eager_costs import EagerCosts
from generated_code import Kernel, kind_of_attention, parse_module, signature_of

Sizes = Mapping[str, int] | None  # values of symbols; None: their hints


def number(value: Any, sizes: Sizes = None) -> int:
    """A size or FLOPs as an integer, with values of symbolic sizes, or their hints."""
    if isinstance(value, torch.SymInt):
        if sizes is not None:
            expression = value.node.expr
            exact = expression.subs({s: sizes[str(s)] for s in expression.free_symbols if str(s) in sizes})
            if exact.is_number:
                return int(exact)
        hint = value.node.hint
        return 0 if hint is None else int(hint)
    return int(value)


def nbytes(value: Any, sizes: Sizes = None) -> int:
    """Bytes of a tensor, or of all in a tuple."""
    if isinstance(value, (tuple, list)):
        return sum(nbytes(part, sizes) for part in value)
    return number(value.numel(), sizes) * value.element_size() if isinstance(value, torch.Tensor) else 0


@dataclasses.dataclass
class Term:
    """What one term of a graph costs, of one kind of kernels."""

    term: str
    kind: str
    launches: int = 0
    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    float8_flops: int = 0  # of the FLOPs, those of FP8 numbers


@dataclasses.dataclass
class Graph:
    """One graph that Inductor compiled, and what is known of it."""

    use: str
    part: str  # forward, backward or inference
    nodes: int = 0
    error: str = ""  # of Inductor, or of a module's kernels
    findings: list[str] = dataclasses.field(default_factory=list)
    flops: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    saved_bytes: int = 0  # kept for the backward pass
    gradient_bytes: int = 0
    inputs: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)  # bytes, and of an element
    symbols: dict[str, int] = dataclasses.field(default_factory=dict)  # values of symbolic sizes
    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    paths: list[str] = dataclasses.field(default_factory=list)  # of generated modules
    launches: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    bytes_read: int = 0
    bytes_written: int = 0
    peak_bytes: int = 0  # of what the graph allocates or frees, weights left out
    terms: list[Term] = dataclasses.field(default_factory=list)
    windows: list[tuple[tuple[int, ...], list[Term]]] = dataclasses.field(default_factory=list)  # of other sizes


def place(node: torch.fx.Node) -> str:
    """The line of the script that a node comes from."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{Path(found[-1][0]).name}:{found[-1][1]}" if found else node.name


def findings_of(gm: torch.fx.GraphModule) -> Iterator[str]:
    """What no graph of the script should hold: float64 tensors, tensors on the CPU, and copies between devices.

    A Python number that Dynamo does not fix becomes an input on the CPU without dimensions, which costs nothing: it,
    and what is computed of such numbers alone, may be there.
    """
    numbers: set[torch.fx.Node] = set()
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        what, inputs = f"{node.name} {list(map(number, value.shape))} at {place(node)}", node.all_input_nodes
        on_cpu = value.device.type == "cpu"
        tensors = [n for n in inputs if isinstance(n.meta.get("val"), torch.Tensor)]
        if on_cpu and value.dim() == 0 and (node.op == "placeholder" or (tensors and numbers.issuperset(tensors))):
            numbers.add(node)
            continue
        if value.dtype == torch.float64:
            yield f"float64 tensor {what}"
        copies = re.search(r"_to_copy|device_put|copy_|clone", str(node.target)) is not None
        if on_cpu or (copies and any(n.meta["val"].device.type == "cpu" for n in tensors)):
            yield f"tensor on the CPU: {what}"


def hand_written_flops(node: torch.fx.Node, sizes: Sizes) -> int:
    """FLOPs of a hand-written kernel: 2MNK where its arguments are called so, for a matrix product; otherwise 0."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    arguments: dict[str, Any] = dict(node.kwargs)
    known = {**kernel_side_table.get_constant_args(arguments["constant_args_idx"]), **arguments["kwargs"]}
    extents = [known.get(name) for name in ("M", "N", "K")]
    values = [s.meta.get("val") if isinstance(s, torch.fx.Node) else s for s in extents]
    return 0 if None in values else 2 * math.prod(number(value, sizes) for value in values)


def flops_of_nodes(gm: Any, context: Context, sizes: Sizes = None) -> Iterator[tuple[torch.fx.Node, str, int]]:
    """Each node with FLOPs: of a matrix product, hand-written, or of attention in documents of these lengths."""
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        args: list[Any] = [a.meta.get("val") if isinstance(a, torch.fx.Node) else a for a in node.args]
        name = str(node.target)
        if kind := kind_of_attention(name):
            backward = "backward" in name
            query, key = args[1:3] if backward else args[:2]
            keys = context.keys(args[-1] if "fake_flash" in name else 0)  # its last argument is the window
            if kind == "masked attention":  # it computes all keys
                keys = number(key.size(2), sizes)
            # Two products forward; backward those of dq, dk, dv and dP, and P again.
            yield node, kind, int((10 if backward else 4) * number(query.numel(), sizes) * keys)
        elif "triton_kernel_wrapper" in name:
            yield node, "hand-written", hand_written_flops(node, sizes)
        elif (packet := getattr(node.target, "overloadpacket", None)) in flop_registry:
            yield node, "matrix product", number(flop_registry[packet](*args, out_val=node.meta.get("val")), sizes)


def has_float8_inputs(node: torch.fx.Node) -> bool:
    """Whether a product, or a hand-written kernel for one, multiplies FP8 numbers: its first tensor is of them."""
    options: dict[str, Any] = dict(node.kwargs)
    arguments = options["kwargs"].values() if "triton_kernel_wrapper" in str(node.target) else node.args
    first = next((a.meta.get("val") for a in arguments if isinstance(a, torch.fx.Node)), None)
    return getattr(first, "dtype", None) == torch.float8_e4m3fn


def count_flops(gm: torch.fx.GraphModule, context: Context) -> collections.Counter[str]:
    """FLOPs of matrix products, of hand-written kernels, and of attention in documents of these lengths.

    "float8" counts those of FP8 numbers once more.
    """
    flops: collections.Counter[str] = collections.Counter()
    for node, kind, count in flops_of_nodes(gm, context):
        flops[{"matrix product": "matrix products", "masked attention": "attention"}.get(kind, kind)] += count
        flops["float8"] += count * has_float8_inputs(node)
    return flops


def fake_results(gm: torch.fx.GraphModule) -> Callable:
    """A function in the place of a compiled graph: takes its inputs, returns fake tensors of its outputs' shapes."""
    output = next(n for n in gm.graph.nodes if n.op == "output")
    values = [x.meta.get("val") if isinstance(x, torch.fx.Node) else x for x in output.args[0]]
    inputs = [n.meta.get("val") for n in gm.graph.nodes if n.op == "placeholder"]

    def known_sizes(args: list) -> dict:
        known = {}
        for value, argument in zip(inputs, args, strict=True):
            pairs = [(value, argument)] if isinstance(value, torch.SymInt) else []
            if isinstance(value, torch.Tensor) and isinstance(argument, torch.Tensor):
                pairs = list(zip(value.shape, argument.shape, strict=True))
            for size, actual in pairs:
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    known[size.node.expr] = int(actual)
        return known

    def size(value: Any, known: dict) -> int:
        if not isinstance(value, torch.SymInt):
            return value
        exact = value.node.expr.subs(known)
        return int(exact) if exact.is_number else number(value)

    def run(args: list) -> list:
        known, results = known_sizes(args), []
        mode = detect_fake_mode(args)
        args.clear()
        with mode or contextlib.nullcontext():
            for value in values:
                if isinstance(value, torch.Tensor):
                    shape, stride = ([size(n, known) for n in part] for part in (value.size(), value.stride()))
                    value = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
                results.append(size(value, known))
        return results

    run._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess] # as AOTAutograd asks for
    return run


class Recorder:
    """Compiles with Inductor and remembers every graph. One at a time may be installed."""

    def __init__(self, costs: EagerCosts, inductor: bool = True):
        self.costs, self.inductor = costs, inductor
        self.graphs: list[Graph] = []
        self.current: Graph | None = None
        self.cubins: dict[str, Kernel] = {}
        self.use = ""
        self.context = Context(np.ones(1))  # the documents of a batch
        self.window: tuple[int, ...] = ()  # sizes of the first call, no two alike, that symbols may stand for
        self.other_windows: list[tuple[int, ...]] = []  # other values of these sizes to count costs at
        self.window_tokens = 0  # with a cache: the second size counts keys, so many of them the window's own
        self.compile_fx_inner = compile_fx.compile_fx_inner

    def backend(self, gm: torch.fx.GraphModule, inputs: list) -> Any:
        """The backend for torch.compile."""
        inner: Any = self.compile_graph
        return compile_fx.compile_fx(gm, inputs, inner_compile=inner)

    def compile_graph(self, gm: torch.fx.GraphModule, inputs: list, **options: Any) -> Callable:
        """Analyses a graph, compiles it, and returns fake results for it."""
        part = "backward" if options.get("is_backward") else "forward"
        graph = Graph(self.use, "inference" if options.get("is_inference") else part)
        self.graphs.append(graph)
        results = fake_results(gm)
        self.analyse(graph, gm)
        before = types.SimpleNamespace(graph=torch.fx.Graph())  # Inductor's passes change the graph in place
        before.graph.graph_copy(gm.graph, {})
        if self.inductor:
            self.current = graph
            try:
                self.compile_fx_inner(gm, inputs, **options)  # pyright: ignore[reportArgumentType]
            except Exception as error:
                last = traceback.format_exception(error)[-1].strip()
                graph.error = (last.splitlines() or [type(error).__name__])[0]
            self.current = None
            self.read_modules(graph)
        graph.terms = self.terms_of(graph, before)
        if self.window and graph.symbols:
            graph.windows = [(window, self.terms_of(graph, before, window)) for window in self.other_windows]
        return results

    def terms_of(self, graph: Graph, gm: Any, window: tuple[int, ...] = ()) -> list[Term]:
        """Costs by term, as compiled for, or with other values of the symbolic sizes."""
        sizes, context = None, self.context
        inputs = graph.inputs
        if window:
            # One more than the first size: the bounds of so many documents.
            pairs = list(zip(self.window, window, strict=True))
            known = {self.window[0] + 1: window[0] + 1} | dict(reversed(pairs))  # of two alike, the first counts
            if self.window_tokens:
                known[self.window[1] - self.window_tokens] = window[1] - self.window_tokens
            sizes = {name: known.get(hint, hint) for name, hint in graph.symbols.items()}
            context = self.context.times(window[1] / self.window[1])
            values = {n.name: n.meta.get("val") for n in gm.graph.nodes if n.op == "placeholder"}
            inputs = {name: (nbytes(values[name], sizes), element) for name, (_, element) in inputs.items()}
        counted = list(flops_of_nodes(gm, context, sizes))
        names = terms.Names.of(gm, (node for node, _, _ in counted))
        found: dict[tuple[str, str], Term] = {}

        def entry(term: str, kind: str) -> Term:
            return found.setdefault((term, kind), Term(term, kind))

        for node, kind, flops in counted:
            row = entry(names.nodes[node.name], kind)
            row.flops += flops
            row.float8_flops += flops * has_float8_inputs(node)
        for path in graph.paths:
            for call in parse_module(Path(path).read_text(), inputs, sizes or graph.symbols).calls:
                row = entry(names.term(call), call.kind)
                row.launches += 1
                row.bytes_read += call.read
                row.bytes_written += call.written
        return list(found.values())

    def analyse(self, graph: Graph, gm: torch.fx.GraphModule) -> None:
        """What is known before Inductor changes the graph."""
        graph.nodes = len(gm.graph.nodes)
        graph.findings = list(dict.fromkeys(findings_of(gm)))
        graph.flops = count_flops(gm, self.context)
        for node in gm.graph.nodes:
            value = node.meta.get("val")
            if node.op == "placeholder":
                element = value.element_size() if isinstance(value, torch.Tensor) else 0
                graph.inputs[node.name] = (nbytes(value), element)
            for size in value.shape if isinstance(value, torch.Tensor) else (value,):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    graph.symbols[str(size.node.expr)] = number(size)
        output = next(n for n in gm.graph.nodes if n.op == "output")
        produced = [n for n in output.args[0] if isinstance(n, torch.fx.Node) and n.op != "placeholder"]
        size = sum(nbytes(n.meta.get("val")) for n in dict.fromkeys(produced))
        if graph.part == "forward":
            graph.saved_bytes = size
        elif graph.part == "backward":
            graph.gradient_bytes = size

    def read_modules(self, graph: Graph) -> None:
        """Launches, bytes and memory, from the generated code."""
        for path in graph.paths:
            module = parse_module(Path(path).read_text(), graph.inputs, graph.symbols)
            for call in module.calls:
                graph.launches[call.kind] += 1
                graph.bytes_read += call.read
                graph.bytes_written += call.written
            graph.peak_bytes = max(graph.peak_bytes, module.peak)

    def add_kernel(self, name: str, source: str) -> None:
        """Compiles a Triton kernel of the current graph to a cubin, if it is not one that was compiled before."""
        digest = hashlib.sha256(source.replace(name, "").encode()).hexdigest()
        if digest not in self.cubins:
            with unset_fake_temporarily():
                self.cubins[digest] = compile_kernel(name, source)
        if self.current is not None:
            self.current.kernels.append(dataclasses.replace(self.cubins[digest], name=name))

    @contextlib.contextmanager
    def installed(self) -> Iterator[Recorder]:
        """Has torch.compile use this backend, whatever the script asks for, and Inductor's hooks tell this object."""
        import torch._inductor.codecache as codecache
        from torch._inductor.async_compile import AsyncCompile

        original, triton = torch.compile, AsyncCompile.triton
        load = codecache.PyCodeCache.__dict__["load_by_key_path"]

        def compiled(model: Any = None, **options: Any) -> Callable:
            inner = original(model, **{**options, "backend": self.backend})

            def call(*args: Any, **kwargs: Any) -> Any:
                with self.costs.suspended():
                    return inner(*args, **kwargs)

            return call

        def load_by_key_path(cls: Any, key: str, path: str, *args: Any, **kwargs: Any) -> Any:
            if self.current is not None and "def call(" in Path(path).read_text():
                self.current.paths.append(path)
            return load.__func__(cls, key, path, *args, **kwargs)

        def record(_: Any, kernel_name: str, source_code: str, device_str: str = "cuda") -> Any:
            self.add_kernel(kernel_name, source_code)
            return None

        torch.compile, AsyncCompile.triton = compiled, record  # pyright: ignore[reportAttributeAccessIssue]
        codecache.PyCodeCache.load_by_key_path = classmethod(load_by_key_path)
        try:
            yield self
        finally:
            torch.compile, AsyncCompile.triton = original, triton
            codecache.PyCodeCache.load_by_key_path = load


def configure_inductor() -> None:
    """Switches off what would make real tensors on the device: examples of patterns, folded constants, a launcher."""
    import torch._inductor.config as config
    import torch._inductor.runtime.triton_helpers as triton_helpers
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm

    for module, name in ((fuse_attention, "_sfdp"), (pad_mm, "_pad_mm"), (misc_patterns, "_misc_patterns")):
        setattr(module, name + "_init", lambda *_, **__: None)
    config.joint_graph_constant_folding = False
    for launcher in ("use_static_cuda_launcher", "use_static_triton_launcher"):  # the name depends on the version
        if hasattr(config, launcher):
            setattr(config, launcher, False)
    triton_helpers.set_driver_to_gpu = lambda *_: None


def compile_kernel(name: str, source: str) -> Kernel:
    """Compiles a generated kernel's first configuration for sm_90, and reads registers and spills from the cubin."""
    import triton
    from torch._inductor import codecache

    arguments = signature_of(source)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    try:
        kernel: Any = codecache._load_triton_kernel_from_source(name, source)
        binary = kernel._precompile_config(kernel.configs[0]).kernel
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise ValueError(f"cuobjdump says nothing of registers: {usage[-200:]}")
        metadata = binary.metadata
        return Kernel(name, arguments, "", int(found[1]), int(found[2]), metadata.shared, metadata.num_warps)
    except Exception as error:  # whatever goes wrong with a kernel is a finding
        return Kernel(name, arguments, f"{type(error).__name__}: {error}".splitlines()[0])
