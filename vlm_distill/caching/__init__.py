"""Caches of outputs that never change between runs: one store on disk, three kinds of record, one fill loop."""

from vlm_distill.neighbours import check_neighbours

check_neighbours()
