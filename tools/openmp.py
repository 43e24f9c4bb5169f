"""How OpenMP's threads wait for one another, for tools and benchmarks that import torch."""

from __future__ import annotations

import os
import sys


def wait_briefly() -> None:
    """Lets waiting threads spin for a moment before they sleep, as train_gpt.py says and does when it is the main
    script. It must be called before torch is imported. What the user has set stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "ACTIVE" if sys.platform == "linux" else "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
