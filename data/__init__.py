"""What both training paths read: samples, images, mixtures and batches. Knows no model."""
