"""Modules outside the packages, loaded from their files."""

import importlib.util
import sys


def load(path):
    """A module from a file. (The folder ``tests`` must not go on ``sys.path``: its ``data`` would hide the package.)"""
    name = "_tests_" + path.stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
