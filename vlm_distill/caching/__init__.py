"""Caches of what never changes between runs: one store on disk, three kinds of record."""
