"""Read pickles of plain values and byte arrays, such as CIFAR's, without running any code they name."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UserError


def read_plain_pickle(path: Path) -> dict[str, Any]:
    """Return the dictionary in a pickle of Python 2 or 3, with keys as ``str`` and uint8 arrays as NumPy arrays.

    A pickle is a program that calls what it names. Here, the few names that NumPy needs to store an array are replaced
    by plain holders of data; any other name is an error.

    Raises:
        UserError: the file names anything else, is truncated, or holds no dictionary.
    """
    try:
        content = _Reader(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # broken pickles raise almost anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is not a sound pickle ({reason}); fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no dictionary but a {type(content).__name__}; is it the right file?")
    if not all(isinstance(key, str | bytes) for key in content):
        raise UserError(f"{path} has keys that are not texts; is it the right file?")
    plain = {}
    for key, value in content.items():
        name = key.decode("latin1") if isinstance(key, bytes) else key
        plain[name] = value.values if type(value) is _Array else value
    return plain


class _DType:
    """Holds the name of an array's type."""

    __slots__ = ("code",)

    def __init__(self, code: bytes | str, *_: Any) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        """Ignore byte order and the like, which do not apply to bytes."""


class _Array:
    """Stands in for an array while it is read: created empty, then given its shape and bytes."""

    __slots__ = ("values",)
    values: NDArray[np.uint8]

    def __init__(self, *_: Any) -> None:
        self.values = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, by_columns, data = state
        if type(dtype) is not _DType or dtype.code.lstrip("|") != "u1":
            raise UserError("holds an array of another type than uint8; is it the right file?")
        self.values = np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_columns else "C")


class _Latin1:
    """Bytes, which Python 3 writes as Latin-1 text in pickles for Python 2."""

    def __new__(cls, text: str, _: str) -> Any:
        return text.encode("latin1")

    def __setstate__(self, state: Any) -> None:
        """Prevent a pickle from setting attributes of this class."""


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _Latin1,
}


# Python's implementation: in the one in C, a file of ten bytes can request a table of gigabytes.
class _Reader(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            # The message goes to a terminal, and the names come from the file.
            raise UserError(
                f"its pickle asks for {f'{module}.{name}'[:80]!r}, which no plain data needs; do not trust this file"
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise UserError("its pickle refers to something outside; do not trust this file")
