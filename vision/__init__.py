"""Distilling image classifiers: models, data, losses of a batch, training and evaluation."""
