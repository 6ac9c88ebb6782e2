"""Sweeps: many runs of one configuration that differ in named settings and seeds, and what they show together."""
