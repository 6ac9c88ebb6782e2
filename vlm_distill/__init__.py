"""vlm-distill: a large vision-language model distilled into a small one."""

from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"


def _check_neighbours() -> None:
    """``data`` is a common name: somebody's own ``data.py`` would otherwise break the suite in puzzling ways."""
    spec = find_spec("data")
    found = [] if spec is None else [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
    ours = str(Path(__file__).parent.parent / "data" / "__init__.py")
    if found != [ours]:
        raise ImportError(
            f"vlm-distill's package 'data' is shadowed by {', '.join(map(str, found)) or 'nothing'}: "
            "start from another folder, rename that one, or set PYTHONSAFEPATH=1"
        )


_check_neighbours()
