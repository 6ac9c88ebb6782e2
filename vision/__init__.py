"""Image classification: classifiers, their views, losses on batches and features, training and evaluation."""
