"""Checks, without a GPU, that the script will run on an H100 as it should: make check-h100

    python tools/h100/check.py [--full] [--only training,ttt] [--set KNOB=VALUE,...] [--no-inductor] [--out FOLDER]

It needs torch's CUDA build and a C compiler, and neither a GPU nor a driver. The small form has 2 layers; --full has
the record's sizes. Exit code 1 and a line for each check that fails.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))

import fake_gpu  # noqa: E402


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--full", action="store_true", help="the record's sizes instead of 2 layers")
    parser.add_argument("--only", default="training,evaluation,ttt,sgd", help="uses to look at")
    parser.add_argument("--set", default="", dest="settings", help="knobs, KNOB=VALUE,KNOB=VALUE")
    parser.add_argument("--no-inductor", action="store_true", help="trace alone: no code, kernels or table of bytes")
    parser.add_argument("--out", type=Path, help="folder for h100.md and h100.json")
    parser.add_argument("--script", type=Path, default=ROOT / "train_gpt.py", help="the training script")
    default = Path(tempfile.gettempdir()) / f"check-h100-{os.getuid()}"
    parser.add_argument("--cache", type=Path, default=default, help="folder for the fake libraries and compiled kernels")
    return parser.parse_args(argv)


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
    fake_gpu.install()
    import fake_flash_attention
    import inductor_backend
    import uses

    fake_flash_attention.install()
    inductor_backend.configure_inductor()
    settings = {} if options.full else dict(uses.SMALL)
    settings |= dict(pair.split("=", 1) for pair in options.settings.split(",") if pair)
    session = uses.new_session(uses.load_script(options.script), settings, not options.no_inductor)
    uses.run_uses(session, options.only.split(","))
    for r in session.results:
        print(r)
    for g in session.recorder.graphs:
        print(g.use, g.part, g.nodes, g.error, g.findings, dict(g.flops), len(g.kernels), dict(g.launches), g.bytes_read/1e9, g.bytes_written/1e9, g.peak_bytes/1e9, g.saved_bytes/1e9, [k for k in g.kernels if k.error or k.stack], g.paths)
    print(session.costs.costs)
    print(*session.costs.waits, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
