"""Checks, without a GPU, that the script will run on an H100 as it should: make check-h100

    python tools/h100/check.py [--full] [--only training,ttt] [--set KNOB=VALUE,...] [--no-inductor] [--out FOLDER]

It needs torch's CUDA build and a C compiler, and neither a GPU nor a driver. The small form has 2 layers; --full has
the record's sizes. Exit code 1 and a line for each check that fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))

import fake_gpu  # noqa: E402

# Of uses.py, which needs the fake libraries.
USES = ("training", "calibration", "evaluation", "ttt", "cached_ttt", "sgd")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--full", action="store_true", help="the record's sizes instead of 2 layers")
    parser.add_argument("--only", default=",".join(USES), help="uses to look at (default: %(default)s)")
    parser.add_argument("--set", default="", dest="settings", help="knobs, KNOB=VALUE,KNOB=VALUE")
    parser.add_argument("--no-inductor", action="store_true", help="trace alone: no code, kernels or table of bytes")
    parser.add_argument("--out", type=Path, help="folder for h100.md, h100.json (the table) and h100_details.json")
    parser.add_argument("--script", type=Path, default=ROOT / "train_gpt.py", help="the training script")
    default = Path(tempfile.gettempdir()) / f"check-h100-{os.getuid()}"
    parser.add_argument(
        "--cache", type=Path, default=default, help="folder for the fake libraries and compiled kernels"
    )
    options = parser.parse_args(argv)
    options.only = options.only.split(",")
    for name in options.only:
        if name not in USES:
            parser.error(f"--only {name}: allowed are {', '.join(USES)}")
    options.settings = [pair for pair in re.split(r",(?=\w+=)", options.settings) if pair]  # values may have commas
    for pair in options.settings:
        if "=" not in pair:
            parser.error(f"--set {pair}: it is not KNOB=VALUE")
    return options


def main(argv: list[str] | None = None) -> int:
    """Runs the checks in a process that has the fake libraries loaded."""
    options = arguments(argv)
    if not fake_gpu.loaded():
        try:
            variables = fake_gpu.environment(options.cache, os.environ)
        except fake_gpu.NoCompiler as error:
            print(f"check-h100: {error}", file=sys.stderr)
            return 2
        os.execve(sys.executable, [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)], variables)
    session = run_session(options)
    import verdicts

    write_report(options, session)
    failed = verdicts.failures(session)
    for line in failed:
        print(f"FAILED {line}")
    graphs, kernels = session.recorder.graphs, session.recorder.cubins
    seen = f"{len(session.results)} uses, {len(graphs)} graphs, {len(kernels)} kernels compiled to cubins"
    print(f"check-h100: {seen}, {len(failed)} checks failed")
    return 1 if failed else 0


def run_session(options: argparse.Namespace) -> Any:
    """Runs the uses of the script that the command line asks for, on a fake H100."""
    fake_gpu.install()
    import fake_flash_attention
    import inductor_backend
    import uses

    fake_flash_attention.install()
    inductor_backend.configure_inductor()
    settings = {} if options.full else dict(uses.SMALL)
    settings |= dict(pair.split("=", 1) for pair in options.settings)
    script = uses.load_script(options.script)
    try:
        session = uses.new_session(script, settings, not options.no_inductor)
    except script.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    uses.run_uses(session, options.only)
    return session


def write_report(options: argparse.Namespace, session: Any) -> None:
    """Prints the table of costs, and writes it with all details into the folder of --out."""
    import torch

    import cost_table

    graphs, costs = session.recorder.graphs, session.costs.costs
    rows = cost_table.table_rows(session.results, graphs, costs)
    memory = {}
    for r in session.results:
        saved = max((g.saved_bytes for g in graphs if g.use == r.use), default=0)
        memory[r.use] = dict(standing=r.standing_bytes, saved=saved, peak=cost_table.peak_memory(r, graphs))
    form = "the record's sizes" if options.full else "2 layers at the record's width"
    remark = (
        f"torch {torch.__version__}, {form}, one rank of 8, ATTENTION={session.config.attention}. Nothing was "
        "measured: FLOPs and bytes are counted in graphs and generated code, attention's FLOPs and times *estimated*."
    )
    text = cost_table.report(rows, memory, remark)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        content = dict(
            torch=torch.__version__,
            form=form,
            attention=session.config.attention,
            config=dataclasses.asdict(session.config),
            rows=[dataclasses.asdict(row) for row in rows],
            terms=cost_table.term_rows(session.results, graphs),
            compiled=cost_table.graph_rows(graphs),
            memory=memory,
            uses=[dataclasses.asdict(r) for r in session.results],
        )
        details = dict(
            graphs=[plain(graph) for graph in graphs],
            eager={name: plain(cost) for name, cost in costs.items()},
        )
        (options.out / "h100.md").write_text(text)
        (options.out / "h100.json").write_text(table_json(content))
        (options.out / "h100_details.json").write_text(json.dumps(details, indent=1) + "\n")


def plain(value: Any) -> Any:
    """A dataclass, or what it holds, for JSON. dataclasses.asdict would make other counters of its counters."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return dict(value) if isinstance(value, dict) else value


def table_json(content: dict[str, Any]) -> str:
    """JSON with one line for each row of a table."""
    fields = []
    for name, value in content.items():
        text = json.dumps(value)
        if isinstance(value, list):
            text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
        fields.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
