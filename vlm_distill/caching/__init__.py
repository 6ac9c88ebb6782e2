"""Caches of what never changes between runs: one store on disk, three kinds of record."""

from vlm_distill.neighbours import check_neighbours

check_neighbours()
