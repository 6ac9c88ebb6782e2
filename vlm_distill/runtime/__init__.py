"""What any launched process of ours has: ranks, signals, failures, output, tracking."""

from vlm_distill.neighbours import check_neighbours

check_neighbours()
