"""Whether the script that ships is the one that ran, and whether a page names what it needs. Nothing of it is run."""

from __future__ import annotations

import base64
import lzma
import re
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import strangers
from claims import word_set
from strangers import MIB, Unreadable, visible

if TYPE_CHECKING:
    from check_submission import Findings, Folder

IMPORTS = re.compile(r"^[ \t]*(?:import[ \t]+([\w., \t]{1,300})|from[ \t]+(\w+)[\w.]*[ \t]+import\b)", re.M)
INLINE = re.compile(r"(?:^|;)[ \t]*(?:import[ \t]+([\w., \t]{1,300})|from[ \t]+(\w+)[\w.]*[ \t]+import\b)", re.M)
PROGRAMS = re.compile(
    r"(?:subprocess\.\w+|Popen|check_output|check_call|which|os\.system)\(\s*\[?\s*[\"']([A-Za-z][\w.+-]{1,30})"
)
# What the challenge's own machine has, and what comes with it.
USUAL = word_set("torch numpy sentencepiece triton setuptools pip huggingface_hub tqdm")
SHELL = word_set("python python3 torchrun nvidia-smi sh bash pip git cat ls cp mv rm echo nproc which uname")
PACKED = re.compile(rb"[\"']([0-9A-Za-z!#$%&()*+;<=>?@^_`{|}~/-]{200,})[\"']")
LOG_HEAD = 400_000  # characters of a log that are looked at for a copy of its script


def unpacked(source: bytes) -> str:
    """The text of a script, with that of a packed script within it, as far as it unpacks within 8 MiB."""
    text = source.decode("utf-8", "replace")
    for match in list(PACKED.finditer(source))[:3]:
        for decode in (base64.b85decode, base64.b64decode):
            try:
                data = decode(match[1])
            except ValueError:
                continue
            inner = inflated(data)
            if inner:
                return text + "\n" + inner
    return text


def inflated(data: bytes) -> str:
    """The text that LZMA or zlib packed; empty for anything else. It never grows over 8 MiB."""
    raw = [dict(id=lzma.FILTER_LZMA2, preset=9)]
    for make in (
        lambda: lzma.LZMADecompressor(memlimit=128 * MIB),
        lambda: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=raw),
        zlib.decompressobj,
    ):
        try:
            found = make().decompress(data, 8 * MIB)
        except (lzma.LZMAError, zlib.error, MemoryError, EOFError):
            continue
        text = found.decode("utf-8", "replace")
        if "import" in text:
            return text
    return ""


def check_shipped(folder: Folder, findings: Findings, source: bytes) -> None:
    """Checks other people's script against their logs and their page."""
    text = unpacked(source)
    check_size(folder, findings, source)
    check_settings(folder, findings, text, packed=len(text) > len(source) + 10 or b"environ" not in source)
    check_copies(folder, findings, source)
    check_named(folder, findings, text)


def check_size(folder: Folder, findings: Findings, source: bytes) -> None:
    """The bytes of code that the runs counted must be those of a script in the folder."""
    size = len(source)
    sizes = {size, size + 1, size - 1, len(source.replace(b"\r\n", b"\n")), size + source.count(b"\n")}
    sizes |= {*folder.scripts.values(), sum(folder.scripts.values())}
    logged = {run.code_bytes for seed in folder.seeds.values() for _, run in seed.sources if run.code_bytes}
    for value in sorted({x for x in logged if isinstance(x, int)} - sizes):
        text = f"train_gpt.py: has {size} bytes, and the runs counted {value} of code: it is not the script that ran"
        if value < 0.6 * size or re.search(r"lzma|minif|packed|wrapper|compressed code", folder.page, re.I):
            findings.warning(text + ", or not in the form in which it ran")
        else:
            findings.error(text)
    findings.compared += len(logged)


def check_settings(folder: Folder, findings: Findings, text: str, packed: bool) -> None:
    """A setting that a log prints in its block of settings must be in the script."""
    if packed and "environ" not in text:
        return
    for _, log in folder.figures:
        if not log.block:
            continue
        absent = [name for name in sorted(log.block) if name not in text and name.upper() not in text]
        block = [name for name in absent if len(name) > 3]
        if 0 < len(block) <= max(3, len(log.block) // 2):
            names = visible(", ".join(block[:6]), 200)
            findings.error(f"train_gpt.py: has no {names}, which {log.name} prints: it is not the script that ran")
            return


def check_copies(folder: Folder, findings: Findings, source: bytes) -> None:
    """A log that begins with a copy of its script must have that of the folder."""
    ours = [line.rstrip() for line in source.decode("utf-8", "replace").splitlines() if line.strip()]
    for run in folder.logs:
        try:
            head = head_of(Path(run.source), folder.path)
        except Unreadable:
            continue
        if not any(line.startswith("import torch") for line in head) or not any("def " in line for line in head):
            continue
        theirs = {line.rstrip() for line in head}
        differ = [line for line in ours if line not in theirs]
        findings.require(
            not differ,
            f"train_gpt.py: {len(differ)} of its lines are not in {Path(run.source).name}'s copy of the script: it is "
            "not the script that ran",
        )


def head_of(path: Path, inside: Path) -> list[str]:
    """The lines of a log before its first line of many equals signs, where a script may stand; without one, none."""
    lines: list[str] = []
    count = 0
    for line in strangers.read_lines(path, "log", inside):
        if re.match(r"={50,}", line):
            return lines
        lines.append(line.rstrip("\r"))
        count += len(line)
        if count > LOG_HEAD:
            break
    return []


def check_named(folder: Folder, findings: Findings, text: str) -> None:
    """Packages and programs that a script uses must be named on the page or in a list of requirements."""
    named = (folder.page + str(folder.everything)).lower()
    for path in strangers.entries(folder.path):
        if re.fullmatch(r"requirements.*\.txt|.*\.sh|.*\.md|.*\.toml|.*\.ya?ml|Dockerfile", path.name, re.I):
            try:
                named += strangers.read_text(path, "page", folder.path).lower()
            except Unreadable:
                continue
    own = {Path(name).stem for name in folder.scripts}
    packages = imported(text) - own - USUAL - set(sys.stdlib_module_names)
    programs = {name for name in PROGRAMS.findall(text)} - SHELL
    absent = [name for name in sorted(packages) if not is_named(name, named)]
    absent += [name for name in sorted(programs) if name.lower() not in named]
    findings.compared += 1
    if absent:
        names = visible(", ".join(absent[:8]), 200)
        findings.warning(f"train_gpt.py: uses {names}, which neither README.md nor a list of requirements names")


def imported(text: str) -> set[str]:
    """The top-level names of the modules that a text imports."""
    found: set[str] = set()
    for several, one in [*IMPORTS.findall(text[: 8 * MIB]), *INLINE.findall(text[: 8 * MIB])]:
        names = [one] if one else [part.split()[0].split(".")[0] for part in several.split(",") if part.split()]
        found |= {name for name in names if name.isidentifier()}
    return found


def is_named(package: str, named: str) -> bool:
    """Whether a text names a package, or a known part of its name: flash_attn_interface is FlashAttention's."""
    words = [package.lower(), package.lower().replace("_", "-"), package.lower().partition("_")[0]]
    words += {"zstandard": ["zstd"], "flash_attn_interface": ["fa3", "flash"], "brotli": ["brotli"]}.get(package, [])
    return any(word in named for word in words if len(word) > 1)
