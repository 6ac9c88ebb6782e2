"""What every launched process needs: ranks, signals, failures, the output folder, tracking."""

from vlm_distill.neighbours import check_neighbours

check_neighbours()
