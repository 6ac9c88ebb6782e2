"""Pickles of plain values and byte arrays, such as CIFAR's, read without running anything that they name."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UserError


def read_plain_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle of Python 2 or 3: keys as ``str``, its uint8 arrays as NumPy arrays.

    A pickle is a program that calls what it names. Here the few names by which NumPy stores an array stand for plain
    holders of data; any other ends the reading.

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
        raise UserError(f"{path} has keys that are no texts; is it the right file?")
    return {
        key.decode("latin1") if isinstance(key, bytes) else key: value.values if type(value) is _Array else value
        for key, value in content.items()
    }


class _DType:
    """Holds what an array's type is called."""

    __slots__ = ("code",)

    def __init__(self, code: bytes | str, *_: Any) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which bytes do not have."""


class _Array:
    """Stands where an array is made, and then gets its shape and its bytes."""

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
    """Bytes, which Python 3 writes as such a text where Python 2 must be able to read the pickle."""

    def __new__(cls, text: str, _: str) -> Any:
        return text.encode("latin1")

    def __setstate__(self, state: Any) -> None:
        """Without it, a pickle could set attributes of this class."""


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _Latin1,
}


# The reader in Python, not the one in C, which lets a file of ten bytes ask for a table of gigabytes.
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
