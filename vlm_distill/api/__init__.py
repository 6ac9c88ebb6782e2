"""The Python API: distil from a notebook or a program, with models and samples that are in memory.

Nothing is printed unless asked for, mistakes are exceptions, and the process is left as it was found. Evaluation is the
module :mod:`vlm_distill.evaluate`, which can be called.
"""

from __future__ import annotations

from vlm_distill.neighbours import check_neighbours

check_neighbours()  # before anything of `data` is imported

from data.errors import UserError

from .distilling import DistilledRun, distill

__all__ = ["DistilledRun", "UserError", "distill"]
