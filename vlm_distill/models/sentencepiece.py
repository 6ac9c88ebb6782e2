"""Load a sentencepiece BPE model (``tokenizer.model``) as a fast tokenizer, if a checkpoint's own is remote code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors

from data.errors import UserError

MODEL_NAME = "tokenizer.model"
#: Sentencepiece's own numbers for a kind of piece and of model.
_USER_DEFINED, _BPE_MODEL = 4, 2


def load_sentencepiece(folder: Path, **options: Any) -> Any:
    """Load the tokenizer of a folder with ``tokenizer.model`` and ``tokenizer_config.json``.

    Transformers parses the file and builds the tokenizer; only its ``from_pretrained`` would need the sentencepiece
    package. Added tokens keep their ids, behind the pieces or in place of one, like InternLM2's ``<|im_end|>``.

    Args:
        folder: the checkpoint's folder.
        options: go to ``PreTrainedTokenizerFast``.

    Raises:
        UserError: a file is missing, the model is not BPE, or an added token cannot have its id.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import SpmConverter, import_protobuf

    for name in (MODEL_NAME, "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UserError(f"tokenizer: '{folder}' has no {name}; is the copy complete?")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    model = import_protobuf().ModelProto()
    try:
        model.ParseFromString((folder / MODEL_NAME).read_bytes())
    except Exception as error:
        raise UserError(f"tokenizer: '{folder / MODEL_NAME}' is not a sentencepiece model; copy it again") from error
    if model.trainer_spec.model_type != _BPE_MODEL:
        raise UserError(f"tokenizer: '{folder / MODEL_NAME}' is not a BPE model, the only kind that is read")

    added = _added_tokens(folder, config)
    pieces = [added[i].content if i in added else piece.piece for i, piece in enumerate(model.pieces)]
    tokenizer = SpmConverter.build_tokenizer_from_spm_proto(model, {piece: i for i, piece in enumerate(pieces)})
    # User-defined pieces are always whole tokens, whatever is around them.
    symbols = [piece.piece for i, piece in enumerate(model.pieces) if piece.type == _USER_DEFINED and i not in added]
    tokenizer.add_tokens([AddedToken(symbol, normalized=False) for symbol in symbols])
    for i, token in sorted(added.items()):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(token.content) != i:
            raise UserError(
                f"tokenizer: added token {token.content!r} of '{folder}' has id {i}, but the one before it leaves "
                f"{tokenizer.token_to_id(token.content)}; is tokenizer_config.json this model's?"
            )
    named = {
        key: _content(config[key]) for key in ("bos_token", "eos_token", "unk_token", "pad_token") if config.get(key)
    }
    if config.get("add_bos_token", True) and "bos_token" in named:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **({"model_max_length": config["model_max_length"]} if config.get("model_max_length") else {}),
        **named,
        **options,
    )


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """Return the added tokens by id, from the configuration or the older ``added_tokens.json``."""
    if "added_tokens_decoder" in config:
        keys = ("lstrip", "rstrip", "single_word", "normalized", "special")
        found = {}
        for i, token in config["added_tokens_decoder"].items():
            flags = {key: token[key] for key in keys if key in token}
            found[int(i)] = AddedToken(token["content"], **flags)
        return found
    path = folder / "added_tokens.json"
    tokens = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {i: AddedToken(token, normalized=False, special=True) for token, i in tokens.items()}
