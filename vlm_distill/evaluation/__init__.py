"""Evaluation on visual question answering: answers, scores and paired comparisons."""
