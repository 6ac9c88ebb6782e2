"""Distillation of image classifiers: from labelled images and two model names to a trained student."""

from vlm_distill.neighbours import check_neighbours

check_neighbours()
