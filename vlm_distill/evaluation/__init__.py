"""Ask a model questions, score its answers, and compare models on the same questions."""

from vlm_distill.neighbours import check_neighbours

check_neighbours()
