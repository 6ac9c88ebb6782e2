"""The Python API: distil from a notebook or a program, with models and samples that are in memory.

Nothing is printed unless asked for, mistakes are exceptions, and the process is left as it was found.
"""

from __future__ import annotations

from vlm_distill.neighbours import check_neighbours

check_neighbours()  # before anything of `data` is imported

from data.errors import UserError

from .distilling import DistilledRun, distill
from .evaluating import evaluate

__all__ = ["DistilledRun", "UserError", "distill", "evaluate"]
