"""Imports point one way: the layers of ARCHITECTURE.md, without a circle, those for type checking included."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "vision", "vlm_distill")

BASE = {"data", "vlm_distill.losses", "vlm_distill.neighbours"}
SUPPORT = BASE | {"vlm_distill.config", "vlm_distill.runtime", "vlm_distill.endpoint", "vlm_distill.endpoint_pool"}
#: What a package may import of ours beside itself.
ALLOWED = {
    "vlm_distill.losses": set(),
    "data": {"vlm_distill.losses"},
    "vlm_distill.integrations": {"vlm_distill.losses"},
    "vlm_distill.config": BASE,
    "vlm_distill.runtime": BASE | {"vlm_distill.config"},
    "vlm_distill.models": SUPPORT | {"vlm_distill.caching"},
    "vlm_distill.evaluation": SUPPORT | {"vlm_distill.models"},
    "vlm_distill.training": SUPPORT | {"vlm_distill.caching", "vlm_distill.evaluation", "vlm_distill.models"},
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported_by(module):
    """Return the full names that a module imports, wherever in it."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - max(0, node.level - 1)] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def own(name):
    """Return the module of ours that an imported name is, or is from; ``None`` if it is another's."""
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name or None


IMPORTS = {module: {found for name in imported_by(module) if (found := own(name))} - {module} for module in FILES}


def reached_from(module):
    found, waiting = set(), [module]
    while waiting:
        new = IMPORTS[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def test_no_circles():
    assert [module for module in FILES if module in reached_from(module)] == []


@pytest.mark.parametrize("layer", ALLOWED)
def test_layers(layer):
    def belongs(module, to):
        return module == to or module.startswith(f"{to}.")

    wrong = {
        f"{module} imports {other}"
        for module in FILES
        for other in IMPORTS[module]
        if belongs(module, layer) and not any(belongs(other, to) for to in {layer, *ALLOWED[layer]})
    }
    assert sorted(wrong) == []


@pytest.mark.parametrize(
    ("library", "only"),
    [("deepspeed", {"vlm_distill.training.engine"}), ("open_clip", {"vision", "vlm_distill.models"})],
)
def test_libraries_of_one_place(library, only):
    users = {m for m in FILES if any(name.split(".")[0] == library for name in imported_by(m))}
    assert {m for m in users if not any(m == place or m.startswith(f"{place}.") for place in only)} == set()


def test_nothing_imports_vision():
    assert [
        m for m in FILES if m.split(".")[0] != "vision" and any(i.split(".")[0] == "vision" for i in IMPORTS[m])
    ] == []
