"""Data layouts from outside: functions from a record to a conversation, which a source names under ``layout``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_distill.losses.plugins import Plugins

from .errors import BadSample, UserError

PLUGINS = Plugins("layout", "vlm_distill.layouts", UserError)
register = PLUGINS.register


class PluginLayout:
    """Turns records of any layout into records of one of ours, which are then checked and read as all are::

        def read_record(record):        # {"picture": "7.png", "ask": "what is it?", "say": "a cat"}
            question = {"role": "user", "content": record["ask"]}
            answer = {"role": "assistant", "content": record["say"]}
            return {"messages": [question, answer], "images": [record["picture"]]}

    Args:
        name: of a registered or installed function, or its ``module:attribute``.

    Raises:
        UserError: there is no such function.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._read = PLUGINS.find(name)
        if not callable(self._read):
            raise UserError(f"layout {name}: is a {type(self._read).__name__}, not a function that takes a record")

    def read(self, record: Any) -> Mapping[str, Any]:
        """Return the record in one of our layouts.

        Args:
            record: as stored, with the keys of the data.

        Raises:
            BadSample: the function failed, or returned something else.
        """
        try:
            # A copy: samples in memory are read again in the next epoch.
            found = self._read(dict(record) if isinstance(record, Mapping) else record)
        except BadSample:
            raise
        except Exception as error:
            raise BadSample(f"layout {self.name} failed", f"{type(error).__name__}: {error}") from error
        if not isinstance(found, Mapping):
            raise BadSample(f"layout {self.name} returned no record", f"a {type(found).__name__}")
        return dict(found)
