"""Check that the packages ``data`` and ``vision`` are this project's own.

Both are common names. A project with a ``data`` package of its own can still use ``vlm_distill.losses``, which needs
neither; whatever does need them calls :func:`check_neighbours` before it imports them.
"""

from importlib.util import find_spec
from pathlib import Path


def check_neighbours(*names: str) -> None:
    """Raise ``ImportError`` if another package shadows one of ours.

    Args:
        names: of ``data`` and ``vision``; by default ``data``, which every command needs.
    """
    for name in names or ("data",):
        spec = find_spec(name)
        if spec is None:
            found = []
        elif spec.origin:
            found = [spec.origin]
        else:
            found = list(spec.submodule_search_locations or [])
        ours = str(Path(__file__).parent.parent / name / "__init__.py")
        if found != [ours]:
            raise ImportError(
                f"vlm-distill's package {name!r} is shadowed by {', '.join(map(str, found)) or 'nothing'}: "
                "start from another folder, rename that one, or set PYTHONSAFEPATH=1"
            )
