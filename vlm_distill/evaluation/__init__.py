"""Evaluation on visual question answering: answers, scores and paired comparisons."""

from vlm_distill.neighbours import check_neighbours

check_neighbours()
