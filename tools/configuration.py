"""What a script would make of an environment, before anything runs: names, values, presets in files.

tools/sweep.py and tools/reproduce.py ask here. A script with `config_from_env`, as train_gpt.py has, is loaded into
this process and asked; of any other script, only the names of the variables that its source has in quotes are known.

A preset in a file is a TOML file of knobs, such as

    preset = "record"
    matrix_lr = 0.028
    ttt_enabled = false

PRESET_FILE names it. What is set in the environment or on the command line overrides what the file says.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import strangers
from runs import ROOT, UserError

PRESET_FILE = "PRESET_FILE"
# Set by these tools for each run, or by a launcher; and what decides where a run computes, but not what.
OWN = frozenset(("ARTIFACT_DIR", "RUN_ID", "STRICT", "CPU_THREADS", "CUDA_VISIBLE_DEVICES", PRESET_FILE))
# Of libraries and the interpreter: a sweep may set them, and no script names them.
LIBRARIES = ("CUDA_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_", "TRITON_", "OMP_", "MKL_", "PYTHON", "HF_", "LD_")
NO_EFFECT = re.compile(r"warning: (\w+)=.* has no effect")


def read_preset_file(path: Path) -> dict[str, str]:
    """The knobs of a TOML file as environment variables. Errors: UserError, in one line that names the file."""
    import train_gpt  # it takes seconds to load

    try:
        return train_gpt.read_preset_file(str(path))
    except train_gpt.ConfigError as error:
        raise UserError(str(error)) from None


def expanded(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with the knobs of its PRESET_FILE where it does not set them itself. Errors: UserError."""
    values = dict(environment)
    path = values.pop(PRESET_FILE, "")
    if not path:
        return values
    kept = {name: value for name, value in values.items() if value != ""}
    return {**values, **read_preset_file(Path(path)), **kept}


def script_of(command: list[str]) -> Path | None:
    """The Python file that a command runs, if there is one."""
    found = (Path(word) for word in command if word.endswith(".py") and not word.startswith("-"))
    return next((path for path in found if path.is_file()), None)


def ranks_of(command: list[str]) -> int:
    """The ranks that a command of torchrun starts on this machine; 1 for any other command, or where it is unclear."""
    text = " ".join(command)
    match = re.search(r"--nproc[-_]per[-_]node[= ](\d+)", text)
    return int(match[1]) if match else 1


def load(script: Path) -> ModuleType | None:
    """A script as a module, if it has `config_from_env`. Errors: UserError if it cannot be loaded."""
    try:
        source = strangers.read_bytes(script, "script")
    except strangers.Unreadable:
        return None
    if script.resolve() != ROOT / "train_gpt.py" and not is_ours(source):
        return None
    name = "script_of_the_runs"
    spec = importlib.util.spec_from_file_location(name, script)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses look there for the names of types
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        raise UserError(f"{script}: cannot be loaded ({type(error).__name__}: {error})") from None
    return module if hasattr(module, "config_from_env") else None


def is_ours(source: bytes) -> bool:
    """Whether a source is train_gpt.py's, readable or packed: no other script is run in this process."""
    import pack_code

    return source.startswith(pack_code.HEADER) or b"\ndef config_from_env(" in source


class Checker:
    """Asks a command's script what it would make of an environment."""

    def __init__(self, script: Path | None, ranks: int = 1):
        self.script, self.ranks = script, ranks
        self.module = load(script) if script else None
        self.knobs = {f.name.upper() for f in dataclasses.fields(self.module.Config)} if self.module else set()
        self.quoted: set[str] = set()
        if script and not self.module and strangers.is_plain(script):
            text = strangers.read_text(script, "script")
            self.quoted = set(re.findall(r"[\"']([A-Z][A-Z0-9_]+)[\"']", text))

    def config(self, environment: Mapping[str, str]) -> tuple[Any, set[str], list[str]]:
        """(config, knobs that are set, remarks) as the script has them. Errors: UserError with the script's line."""
        import torch

        module = self.module
        assert module is not None
        try:
            config, explicit, notes = module.config_from_env(dict(environment), torch.cuda.is_available())
            if config.mode != "eval":
                module.batch_layout(config, self.ranks)
        except module.ConfigError as error:
            raise UserError(str(error)) from None
        return config, set(explicit), list(notes)

    def check(self, environment: Mapping[str, str]) -> None:
        """Refuses an environment that the script would refuse, or of which something has no effect.

        With STRICT=0 what has no effect may stay. Errors: UserError.
        """
        if not self.module:
            return
        _, _, notes = self.config({"STRICT": "1", **environment})
        if environment.get("STRICT", "1") == "0":
            return
        for note in notes:
            if NO_EFFECT.match(note):
                raise UserError(note.removeprefix("warning: ") + " (STRICT=0 goes on)")

    def check_names(self, names: list[str], environment: Mapping[str, str]) -> None:
        """Refuses names that the script does not read. `environment` has a value for each. Errors: UserError."""
        if not self.module:
            return
        for name in names:
            if name in self.knobs or name in OWN or name.startswith(LIBRARIES) or self.acts(name, environment):
                continue
            near = difflib.get_close_matches(name.upper(), sorted(self.knobs), n=1, cutoff=0.7)
            hint = f"did you mean {near[0]}?" if near else "see --help of the script"
            raise UserError(f"{name}={environment.get(name, '')}: no knob of {self.script} has that name; {hint}")

    def acts(self, name: str, environment: Mapping[str, str]) -> bool:
        """Whether a variable that is no knob changes the configuration, as another name of a knob does."""
        lenient = {**environment, "STRICT": "0"}
        without = {key: value for key, value in lenient.items() if key != name}
        try:
            one, other = self.config(lenient), self.config(without)
        except UserError as error:
            return str(error).startswith(f"{name}=")
        said = [note for note in one[2] if name in note and not NO_EFFECT.match(note)]
        return one[:2] != other[:2] or bool(said)

    def relevant(self, environment: Mapping[str, str]) -> dict[str, str]:
        """What of an environment decides the runs' results, sorted: knobs, or names in the script's source."""
        names = self.knobs | self.quoted
        kept = {n: v for n, v in environment.items() if n in names or self.other_name(n)}
        return {name: kept[name] for name in sorted(kept) if name not in OWN and kept[name] != ""}

    def other_name(self, name: str) -> bool:
        """Whether the script has this as another name of a knob."""
        return any(name in getattr(self.module, table, ()) for table in ("ALIASES", "SWITCHES"))

    def strict(self) -> dict[str, str]:
        """The variable that makes the script refuse what has no effect, unless the user has set it."""
        return {"STRICT": os.environ.get("STRICT", "1")} if self.module else {}
