"""Runs scripts as processes that are forked from one which has imported what they import: none pays for start-up.

A job is a line of JSON on standard input: script, arguments, environment, ranks, current folder, and the folder for
what it writes. The answer is a line with its exit code. Nothing here starts a thread or computes with torch, so that a
child begins as a script does; pytest is not imported, unless one of the modules that the arguments name does. The
process ends with its input.
"""

import importlib
import json
import math
import os
import socket
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path

import brotli  # noqa: F401
import numpy  # noqa: F401
import sentencepiece  # noqa: F401
import torch._dynamo  # noqa: F401  # a model without memory imports it
import torch._meta_registrations  # noqa: F401
import torch.distributed  # noqa: F401
import torch.fx.experimental.symbolic_shapes  # noqa: F401
import torch.optim.adamw  # noqa: F401
import triton.language  # noqa: F401
import zstandard  # noqa: F401

GRACE = 1.0  # seconds in which ranks may still fail after the first one did
CODES = {}  # script's content and name -> code object


def code_of(path):
    """A script's code, compiled once."""
    source = Path(path).read_bytes()
    if (source, path) not in CODES:
        CODES[source, path] = compile(source, path, "exec")
    return CODES[source, path]


def execute(job, code, environment):
    """This process becomes the script. Never returns."""
    path, out, result = job["script"], Path(job["out"]), 1
    try:
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(out / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(file, descriptor)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(job["cwd"])
        sys.argv, sys.path[0] = [path, *job["arguments"]], os.path.dirname(path)
        tempfile.tempdir = None  # an import may have asked for it
        module = types.ModuleType("__main__")
        module.__file__ = path
        sys.modules["__main__"] = module
        try:
            exec(code, module.__dict__)
            result = 0
        except SystemExit as end:
            result = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(result)


def run(job):
    """Runs a job on its ranks. Returns the exit code: the first that is not 0; the other ranks are killed then."""
    path, ranks = job["script"], job["ranks"]
    code, variables = code_of(path), [{}]
    if ranks > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        same = dict(WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        variables = [dict(same, RANK=rank, LOCAL_RANK=rank) for rank in range(ranks)]
    children = set()
    for more in variables:
        child = os.fork()
        if not child:
            words = {name: str(value) for name, value in more.items()}
            execute(job, code, {**job["environment"], **words})
        children.add(child)
    result, deadline = 0, math.inf
    while children:
        ended, status = os.waitpid(-1, os.WNOHANG if result else 0)
        children.discard(ended)
        if ended and status and not result:
            result, deadline = os.waitstatus_to_exitcode(status), time.monotonic() + GRACE
        if result and not ended:
            time.sleep(0.01)
        if time.monotonic() > deadline:
            for child in children:
                os.kill(child, 9)
            deadline = math.inf
    return result


for name in sys.argv[1:]:
    importlib.import_module(name)
for line in sys.stdin:
    print(run(json.loads(line)), flush=True)
