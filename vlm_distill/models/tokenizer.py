"""Load tokenizers and chat templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from data.errors import UserError, first_line

from .folder import check_folder


def load_tokenizer(name: str, trust_remote_code: bool = False, **options: Any) -> Any:
    """Load a pretrained tokenizer; ``options`` go to ``from_pretrained``. Raise ``UserError`` if there is none."""
    check_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
        tokenizer("a")  # some settings of the wrong type fail only here
        return tokenizer
    except Exception as error:
        raise UserError(
            f"tokenizer: '{name}' cannot be loaded: {first_line(error)}; check the name or folder"
        ) from error


def read_template(template: str) -> str:
    """Return a chat template that is given as text or as the path of a file."""
    if "{" in template:
        return template
    path = Path(template)
    if not path.is_file():
        raise UserError(f"chat_template: no such file '{template}'; give a file or the template's text")
    return path.read_text(encoding="utf-8")
