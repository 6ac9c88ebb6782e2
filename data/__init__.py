"""Samples, readers, images, mixtures, collation and loading, for both training paths. Imports no model."""
