"""Loads an artifact in a process of its own: prints the MiB by which the process grows, and the file's refusal."""

import os
import resource
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import torch  # noqa: E402

import train_gpt as tg  # noqa: E402


def main(path):
    c = tg.config_from_env(dict(os.environ), False)[0]
    tg.parameter_count(c)  # what is imported for it is no file's doing
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        tg.load_artifact(Path(path).read_bytes(), c, set(), torch.device("cpu"))
        message = "loaded"
    except tg.ConfigError as error:
        message = str(error)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, message)


if __name__ == "__main__":
    main(sys.argv[1])
