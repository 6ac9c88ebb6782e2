"""Scoring rules, one file per family of benchmarks."""
