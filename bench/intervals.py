"""Confidence intervals over seeds, for every benchmark that reports one."""

from __future__ import annotations

import math
import statistics

# Two-sided 95% quantiles of Student's t by number of seeds; the normal distribution's beyond them.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def half_width(values: list[float]) -> float:
    """Half the width of the 95% interval of two values' mean, or more values'."""
    return STUDENT.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))
