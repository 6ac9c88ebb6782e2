"""Find keys, tokens and passwords in configurations and command lines, which are saved with a run."""

from __future__ import annotations

import os
import re
from pathlib import Path

_NAME = r"(?:\w*_)?(?:api)?(?:token|key|secret|password|passwd|credentials?)s?(?:_\w*)?"
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_FROM_ENVIRONMENT = re.compile(rf"\$\{{\s*oc\.env\s*:\s*['\"]?({_NAME})['\"]?\s*[,}}]", re.IGNORECASE)
_USER_IN_URL = re.compile(r"\w://[^/\s@]+@")
_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[opsur]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16})\b")
# Shorter values, such as `true`, occur in many places that have nothing to do with the variable.
_SHORTEST = 8


def secret_in(text: str) -> str | None:
    """Return which secret a text contains, in words that do not repeat it; ``None`` if none is found.

    Recognised are interpolations of environment variables named like secrets (``HF_TOKEN``, ``WANDB_API_KEY``), the
    values of such variables, user and password in a URL, and tokens of known forms.
    """
    if named := _FROM_ENVIRONMENT.search(text):
        return f"the environment variable {named[1]}"
    if _USER_IN_URL.search(text):
        return "user and password in a URL"
    if _TOKEN.search(text):
        return "an access token"
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _SECRET_NAME.fullmatch(name) and not Path(value).exists():
            return f"the value of the environment variable {name}"
    return None
