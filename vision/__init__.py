"""Distillation of image classifiers: from labelled images and two model names to a trained student."""
