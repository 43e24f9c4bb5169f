"""Which term of a step's cost the nodes of a graph belong to: norms, attention, head and loss, and so on.

A node's stack trace names lines of the script. The innermost function among them that has a term decides, so helpers
need none, and a new function counts with the one that calls it.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from generated_code import Call

# Functions and classes of the script, by qualified name. A class stands for all its methods.
TERMS = {
    "rms_norm": "norms",
    "rms_norm_plain": "norms",
    "rotate": "rotary",
    "rotate_plain": "rotary",
    "GPT.rotary": "rotary",
    "flash_attention": "attention",
    "attention_packed": "attention",
    "attention_sdpa": "attention",
    "Past.attention": "attention",
    "subtract_own_value": "own value and gates",
    "subtract_own_value_plain": "own value and gates",
    "Block.gate": "own value and gates",
    "Block.attend": "attention's projections",
    "Block.mlp": "MLP",
    "MLPTriton": "MLP",
    "Float8Linear.backward": "head and loss",  # with Triton no other product is one
    "GPT.run_layer": "residual mix",
    "GPT.blend_skip": "skips",
    "SmearGate": "embedding",
    "GPT.embed": "embedding",
    "GPT.layer_weights": "casts of weights",
    "low_rank": "LoRA",
    "GPT.head_logits": "head and loss",
    "GPT.token_losses": "head and loss",
    "SoftcappedCrossEntropyTriton": "head and loss",
}
OTHER = "other"


@functools.cache
def functions(path: str) -> list[tuple[int, int, str]]:
    """First line, last line and qualified name of every function of a file, outer ones first."""
    found: list[tuple[int, int, str]] = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{prefix}.{child.name}".lstrip(".")
                if isinstance(child, ast.FunctionDef):
                    found.append((child.lineno, child.end_lineno or child.lineno, name))
            visit(child, name)

    visit(ast.parse(Path(path).read_text(encoding="utf-8")), "")
    return found


def term_of(stack_trace: str) -> str:
    """The term of a node by its stack trace, as torch.fx keeps it."""
    for path, line in reversed(re.findall(r'File "([^"]+)", line (\d+)', stack_trace)):
        if not Path(path).is_file() or "/torch/" in path:
            continue
        names = [name for first, last, name in functions(path) if first <= int(line) <= last]
        for name in reversed(names):
            parts = name.split(".")
            for end in range(len(parts), 0, -1):
                if ".".join(parts[:end]) in TERMS:
                    return TERMS[".".join(parts[:end])]
    return OTHER


def traced_names(node: Any) -> Iterator[str]:
    """Names that Inductor's code may give a node: its own, or that of the node which it was traced from."""
    for source in (node.meta.get("from_node") or ())[:1]:
        yield source.name
    yield node.name


@dataclasses.dataclass
class Names:
    """Terms of the names that Inductor's code may give a graph's nodes, and of hand-written kernels' names."""

    nodes: dict[str, str]
    products: dict[str, str]  # of nodes with FLOPs
    kernels: dict[str, str]

    @classmethod
    def of(cls, gm: Any, with_flops: Iterable[Any]) -> Names:
        """Names of a graph. `with_flops` are its nodes that have FLOPs."""
        found, counted = cls({}, {}, {}), set(with_flops)
        for node in gm.graph.nodes:
            if node.op != "call_function":
                continue
            term = term_of(node.meta.get("stack_trace") or "")
            for name in traced_names(node):
                found.nodes[name] = term
                if node in counted:
                    found.products[name] = term
            if "triton_kernel_wrapper" in str(node.target):
                found.kernels[kernel_name(node)] = term
        return found

    def term(self, call: Call) -> str:
        """The term of a launch: of its product or hand-written kernel, or of most nodes that are fused in it."""
        if call.kind == "hand-written":
            return self.kernels.get(re.sub(r"_\d+$", "", call.name), OTHER)
        if call.kind == "fused":
            known = [self.nodes[node] for node in call.nodes if node in self.nodes]
            return collections.Counter(known).most_common(1)[0][0] if known else OTHER
        known = [self.products[node] for node in call.nodes if node in self.products]
        known = known or [self.nodes[node] for node in call.nodes if node in self.nodes]
        return known[-1] if known else OTHER


def kernel_name(node: Any) -> str:
    """The name of the hand-written kernel that a node launches."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
    return getattr(kernel, "fn", kernel).__name__
