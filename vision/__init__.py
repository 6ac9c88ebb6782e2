"""Distillation of image classifiers: the path from ImageNet and two model names to a trained student."""
