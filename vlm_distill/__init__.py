"""vlm-distill: a large vision-language model distilled into a small one."""

from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"


def _check_neighbours() -> None:
    """``data`` is a common name: somebody's own ``data.py`` would otherwise break the suite in puzzling ways."""
    spec = find_spec("data")
    found = Path(spec.origin).parent if spec is not None and spec.origin else None
    if found != Path(__file__).parent.parent / "data":
        raise ImportError(
            f"vlm-distill's package 'data' is shadowed by {spec.origin if spec else 'nothing'}: "
            "rename that file, or start with PYTHONSAFEPATH=1"
        )


_check_neighbours()
