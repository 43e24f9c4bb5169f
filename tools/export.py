"""Writes a run's model for other programs: safetensors, or a folder for Hugging Face's transformers.

    python tools/export.py logs/RUN --to safetensors
    python tools/export.py logs/RUN --to hf --out my-model

The weights are those that the artifact holds, as float32; --float takes those of before quantization, which
SAVE_WEIGHTS=1 keeps. The tokenizer goes with them. docs/model.md says how to load each form.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from openmp import wait_briefly  # noqa: E402

wait_briefly()
import torch  # noqa: E402

import train_gpt as tg  # noqa: E402
from golf import Model, load_model  # noqa: E402
from runs import Parser, UserError, command_line, write_atomic  # noqa: E402

TEMPLATES = ROOT / "tools" / "hf"
WEIGHTS = "model.safetensors"
# What a forward pass of an exported model never reaches: kernels for GPUs, FP8, training's noise.
LEFT_OUT = {
    "attention_blocked",
    "attention_kernels_support",
    "attention_packed",
    "document_blocks",
    "fake_quantize",
    "flash_attention",
    "float8_linear",
    "head_output_triton",
    "mlp_float8",
    "mlp_float8_triton",
    "mlp_triton",
    "query_key_triton",
    "rms_norm_scale",
    "triton_supports",
    "uniform_noise",
}
METHODS = {
    "__init__",
    "layer_weights",
    "blend_skip",
    "embed",
    "rotary",
    "run_layer",
    "trunk",
    "head_logits",
}
HF_IMPORTS = """from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_golf import GolfConfig
"""


def safetensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """A file in the form of safetensors (huggingface.co/docs/safetensors), of float32 tensors."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    parts, end = [], 0
    for name, tensor in tensors.items():
        parts.append(bytes(tg.host_bytes(tensor.detach().float().cpu())))
        begin, end = end, end + len(parts[-1])
        table[name] = dict(dtype="F32", shape=list(tensor.shape), data_offsets=[begin, end])
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + b"".join(parts)


class Names(ast.NodeVisitor):
    """The names that code uses when it runs: not those of annotations."""

    def __init__(self):
        self.found: set[str] = set()

    def visit_Name(self, node: ast.Name) -> None:
        self.found.add(node.id)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for part in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults), *node.body):
            self.visit(part)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)


def names_in(node: ast.AST) -> set[str]:
    """The names that a definition uses when it runs."""
    visitor = Names()
    visitor.visit(node)
    return visitor.found


def definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """The statement that defines each of a module's names."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id: node for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return found


def begin_of(node: ast.stmt) -> int:
    """The line in which a statement begins, from 0, decorators included."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)]) - 1


def model_source(text: str) -> tuple[str, str]:
    """What of train_gpt.py a forward pass needs, in its order, so that the two cannot differ.

    Returns a line for names that it mentions and never reaches, and the code.
    """
    tree, lines = ast.parse(text), text.splitlines()
    known = definitions(tree)
    gpt = known["GPT"]
    assert isinstance(gpt, ast.ClassDef)
    dropped = [n for n in gpt.body if isinstance(n, ast.FunctionDef) and n.name not in METHODS]
    gpt.body = [n for n in gpt.body if n not in dropped]
    wanted, todo = set(), ["GPT", "ModelConfig", "Runtime", "Documents", "BOS_ID", "softcap_plain", "rotary_tables"]
    while todo:
        name = todo.pop()
        if name not in wanted:
            wanted.add(name)
            todo += (names_in(known[name]) & set(known)) - LEFT_OUT
    hidden = {line for node in dropped for line in range(begin_of(node), node.end_lineno or node.lineno)}
    parts = []
    for node in sorted({known[name] for name in wanted}, key=begin_of):
        own = range(begin_of(node), node.end_lineno or node.lineno)
        parts.append("\n".join(lines[i] for i in own if i not in hidden).rstrip())
    used = set().union(*(names_in(known[name]) for name in wanted))
    stubs = [f"{name} = None" for name in sorted(used & LEFT_OUT)]
    return "\n".join(("# What only training and GPUs use is not in this file.", *stubs, "")), "\n\n\n".join(parts)


def imports_for(tree: ast.Module, code: str) -> str:
    """The module's imports, as far as the code names what they bring."""
    mentioned = {n.id for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Name)}
    found = ["from __future__ import annotations\n"]
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, "module", "") != "__future__":
            kept = [alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in mentioned]
            names = [
                alias for alias in kept if alias.asname or isinstance(node, ast.ImportFrom) or "." not in alias.name
            ]
            if names:
                node.names = names
                found.append(ast.unparse(node))
    return "\n".join(found) + "\n"


def modeling_source() -> str:
    """modeling_golf.py, whole: imports, the model's code, and the class that transformers loads."""
    text = Path(tg.__file__).read_text()
    template = (TEMPLATES / "modeling_golf.py").read_text()
    says = '"""A Parameter Golf model for transformers. tools/export.py cut its forward pass out of train_gpt.py."""\n'
    stubs, model = model_source(text)
    wrapper = template[template.index("class GolfForCausalLM") :]
    code = f"{model}\n\n\n{wrapper}"
    return "\n".join((says, imports_for(ast.parse(text), code), HF_IMPORTS, stubs, code))


def weights_of(model: Model, run: Path, floats: bool) -> dict[str, torch.Tensor]:
    """The weights to export: the artifact's, or those of before quantization. Errors: UserError."""
    own: dict[str, torch.Tensor] = dict(model.gpt.named_parameters())
    if not floats:
        return own
    path = run / tg.WEIGHTS_FILE
    try:
        found, _ = tg.read_tensors(path)
    except FileNotFoundError:
        raise UserError(f"--float: {path} does not exist; a run with SAVE_WEIGHTS=1 writes it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--float: {path} cannot be read: {error}") from None
    if {name: w.shape for name, w in found.items()} != {name: w.shape for name, w in own.items()}:
        raise UserError(f"--float: {path} is not of the model in {run}")
    return found


def hf_files(model: Model, weights: Mapping[str, torch.Tensor]) -> dict[str, bytes | str]:
    """The files of a folder that transformers loads with trust_remote_code=True."""
    settings = dataclasses.asdict(model.gpt.config)
    automatic = {
        "AutoConfig": "configuration_golf.GolfConfig",
        "AutoModelForCausalLM": "modeling_golf.GolfForCausalLM",
    }
    config = dict(
        model_type="golf",
        architectures=["GolfForCausalLM"],
        auto_map=automatic,
        settings=settings,
        max_position_embeddings=model.config.eval_context,
        dtype="float32",
    )
    tokenizer = dict(
        tokenizer_class="GolfTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_golf.GolfTokenizer", None]},
        model_max_length=model.config.eval_context,
    )
    return {
        "config.json": json.dumps(config, indent=1) + "\n",
        "generation_config.json": json.dumps(dict(bos_token_id=1, eos_token_id=1, use_cache=False), indent=1) + "\n",
        "tokenizer_config.json": json.dumps(tokenizer, indent=1) + "\n",
        "modeling_golf.py": modeling_source(),
        "configuration_golf.py": (TEMPLATES / "configuration_golf.py").read_text(),
        "tokenization_golf.py": (TEMPLATES / "tokenization_golf.py").read_text(),
        "caseops.py": (ROOT / "data" / "caseops.py").read_text(),
        tg.TOKENIZER_FILE: model.tokenizer.content,
        WEIGHTS: safetensors({f"golf.{name}": w for name, w in weights.items()}, dict(format="pt")),
    }


def safetensors_files(model: Model, weights: Mapping[str, torch.Tensor]) -> dict[str, bytes | str]:
    """The weights under train_gpt.py's names, the model's settings and the tokenizer."""
    return {
        "config.json": json.dumps(dataclasses.asdict(model.gpt.config), indent=1) + "\n",
        tg.TOKENIZER_FILE: model.tokenizer.content,
        WEIGHTS: safetensors(weights, dict(format="pt")),
    }


def write(files: Mapping[str, bytes | str], out: Path) -> None:
    """Writes the files of a folder."""
    for name, content in files.items():
        write_atomic(out / name, content)


def gguf_problem(c: tg.ModelConfig) -> str:
    """Why no GGUF file can hold this model: what of it none of llama.cpp's architectures computes."""
    parts = ["every layer mixes the token's embedding in", "queries and keys are normed without weights, with a gain"]
    parts += ["U-Net skips join the layers"] if c.num_layers > 1 else []
    named = {
        "layers are repeated": c.loops,
        "residual streams run in parallel": c.parallel_residual,
        "tokens smear into their successors": c.smear_gate_enabled,
        "pairs of tokens have embeddings": c.bigram_vocab_size,
        "attention subtracts a token's own value": c.xsa_last_n,
    }
    parts += [words for words, there in named.items() if there]
    return f"GGUF holds no graph, and no architecture of llama.cpp computes this model's: {', '.join(parts)}"


def main(arguments: list[str]) -> int:
    """Writes the export's folder. Returns the exit code."""
    parser = Parser(prog="export.py", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help=f"a run's folder, or its {tg.CONTAINER_FILE}")
    add("--to", choices=("safetensors", "hf", "gguf"), required=True, help="form of the export")
    add("--out", type=Path, metavar="FOLDER", help="folder to write, new or empty (default: RUN/FORM)")
    add("--tokenizer", type=Path, metavar="FILE", help="SentencePiece model (default: that of the run's folder)")
    add("--float", action="store_true", help="the weights of before quantization, which SAVE_WEIGHTS=1 keeps")
    options = parser.parse_args(arguments)
    folder = options.run if options.run.is_dir() else options.run.parent
    out = options.out or folder / options.to
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out}: is there already, and must be new or an empty folder")
    try:
        model, _ = load_model(options.run, options.tokenizer or "", device="cpu", compute_dtype="float32")
    except tg.ConfigError as error:
        raise UserError(str(error)) from None
    if options.to == "gguf":
        raise UserError(f"--to gguf: {gguf_problem(model.gpt.config)}")
    weights = weights_of(model, folder, options.float)
    files = (hf_files if options.to == "hf" else safetensors_files)(model, weights)
    write(files, out)
    size = sum(len(content) for content in files.values())
    print(f"{out}: {len(files)} files, {sum(w.numel() for w in weights.values())} parameters, {size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(command_line(main))
