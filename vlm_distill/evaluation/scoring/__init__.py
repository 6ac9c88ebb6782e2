"""Scoring rules, one file per family of benchmarks; ``scorers.py`` lists them all."""
