"""Write a run's student as a folder with a model card, and upload it to the Hugging Face hub."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import UserError, first_line
from vlm_distill.runtime import manifest

if TYPE_CHECKING:
    from vlm_distill.reporting.card import Publication
    from vlm_distill.training.resume import Record

FORMATS = ("native", "llava")


def is_classifier(run: Path) -> bool:
    """Return whether a run trained an image classifier: only those have ``student.name``."""
    from vlm_distill.config.file import read_yaml

    config = run / "config.yaml"
    content = read_yaml(config) if config.is_file() else None
    student = content.get("student") if isinstance(content, Mapping) else None
    return isinstance(student, Mapping) and "name" in student


def export_student(
    run: Path,
    folder: Path,
    dtype: str | None = None,
    format: str = "native",
    publication: Publication | None = None,
) -> Path:
    """Write the student of a run, finished or at its latest checkpoint, with adapters merged, and a model card.

    Args:
        run: the folder of a run that is finished or has a checkpoint.
        folder: where to write the student; created if missing.
        dtype: ``fp32``, ``bf16`` or ``fp16``; ``None``: as trained.
        format: ``native`` writes Transformers' models in their own format and assembled ones in this suite's;
            ``llava`` writes an assembled student as a LLaVA model of Transformers.
        publication: what the model card says beyond the run: licence, name on the hub, further evaluations.

    Returns:
        ``folder``, which ``load_vlm`` reads.

    Raises:
        UserError: there is no run or nothing in it to export, the folder holds a model in another format, or no LLaVA
            model is equal to the student.
    """
    from vlm_distill.models.common import as_dtype, cast_parameters, choose
    from vlm_distill.models.composed import CONFIG_NAME, ComposedVLM
    from vlm_distill.models.llava import as_llava

    wanted = as_dtype(dtype)
    choose("--format", format, FORMATS)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run's folder (it has no config.yaml)")
    model, record = _student(run)
    cast_parameters(model, wanted)
    if format == "llava":
        if not isinstance(model, ComposedVLM):
            raise UserError("--format llava: the student is one of Transformers' models already; leave --format out")
        model = as_llava(model)
    ours = isinstance(model, ComposedVLM) and model.processor.has_vision
    if (folder / ("config.json" if ours else CONFIG_NAME)).is_file():
        raise UserError(f"{folder}: holds a model in another format; choose another folder, or empty it")
    _set_end_tokens(model)
    model.save_pretrained(folder)
    (folder / "README.md").write_text(_card(model, run, record, publication), encoding="utf-8")
    return folder


def finished_student(run: Path) -> Path | None:
    """Return the folder of a finished run's student; ``None`` if there is none or the run is being extended.

    Raises:
        UserError: the student differs from what the run wrote.
    """
    folder = run / "student"
    longer = not (run / "summary.json").is_file() and (run / "checkpoints").is_dir()
    if not folder.is_dir() or longer:
        return None
    if (folder / manifest.NAME).is_file():  # a student from elsewhere has no manifest
        try:
            manifest.check(folder, manifest.read(folder))
        except manifest.Damaged as error:
            again = "delete that folder and start the run again, which writes it from its last checkpoint"
            raise UserError(f"{error}; {again}") from None
    return folder


def _student(run: Path) -> tuple[Any, Record | None]:
    """Return a run's student, and the run's record from when it was written."""
    from pydantic import ValidationError

    from vlm_distill.config.file import explain
    from vlm_distill.config.sections import RunConfig
    from vlm_distill.models import load_vlm
    from vlm_distill.training import checkpoint
    from vlm_distill.training.resume import NAME, Record

    finished = finished_student(run)
    if finished is not None:
        return load_vlm(finished), Record.read(run) if (run / NAME).is_file() else None
    found = checkpoint.find(run / "checkpoints")
    if found is None:
        raise UserError(f"{run}: nothing to export yet, neither a finished student nor a checkpoint")
    for path, reason in found.damaged.items():
        print(f"vlm-distill: {path.name} is damaged ({reason}); exporting {found.path.name}", file=sys.stderr)
    from vlm_distill.run import Run
    from vlm_distill.runtime.processes import Processes
    from vlm_distill.training.engine import checkpoint_weights

    # Use the checkpoint's record: the run may since have been restarted with another ZeRO stage.
    record = Record.read(found.path)
    try:
        config = RunConfig.model_validate(record.configuration)
    except ValidationError as error:
        raise UserError(f"{found.path / NAME}: {explain(error, RunConfig)}") from None
    processes = Processes("cpu")
    # What a pruned student keeps is written in the run's folder, which may have been moved.
    model = Run(config.model_copy(update={"output": str(run)}), processes).student
    weights = checkpoint_weights(found.path, config.deepspeed.stage)
    prefix = "student."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    processes.close()
    return model, record


def _set_end_tokens(model: Any) -> None:
    """Make a plain ``generate`` stop where ours does: the chat template's end token may differ from the tokenizer's."""
    settings = getattr(model, "model", None) or model.decoder
    settings.generation_config.eos_token_id = sorted(model.end_tokens) or None
    settings.generation_config.pad_token_id = model.pad_token


def _card(model: Any, run: Path, record: Record | None, publication: Publication | None) -> str:
    from vlm_distill.config.file import read_saved
    from vlm_distill.models.composed import ComposedVLM
    from vlm_distill.reporting.card import Publication
    from vlm_distill.reporting.run_card import CardModel, CardRun, run_card

    # Not validated: a plug-in that the run used may be installed no more.
    known = CardRun(run, read_saved(run / "config.yaml"))
    if record is not None:
        rows = [source["rows"] for source in record.data]
        known = CardRun(run, record.configuration, record.comments(), rows)
    sees, library, code = model.processor.has_vision, "transformers", _IMAGES
    if isinstance(model, ComposedVLM):
        library, code = ("vlm-distill", _OURS) if sees else ("transformers", _TEXT)
    size = sum(p.numel() for p in model.parameters())
    return run_card(known, CardModel(sees, size, library, code), publication or Publication())


_IMAGES = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("path/to/this/folder")
processor = AutoProcessor.from_pretrained("path/to/this/folder")
content = [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs, do_sample=False, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))""".splitlines()

_TEXT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs, do_sample=False, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))""".splitlines()

_OURS = """\
from data.conversation import Conversation  # of vlm-distill
from PIL import Image
from vlm_distill.models import load_vlm

model = load_vlm("path/to/this/folder")
content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
question = Conversation(({"role": "user", "content": content},))
print(model.generate([(question, [Image.open("picture.png").convert("RGB")])])[0].text)""".splitlines()


def check_hub(name: str) -> None:
    """Raise ``UserError`` if an upload would fail: ``name`` is not ``owner/name``, or there is no token."""
    import re

    from huggingface_hub import get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"--push-to-hub: '{name}' is not a name on the hub; write owner/name")
    if get_token() is None:
        raise UserError("--push-to-hub: no Hugging Face token found; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str, public: bool = False) -> str:
    """Upload a folder to the hub, and return its address.

    Args:
        folder: an exported student.
        name: ``owner/name``; created if missing. An existing one keeps its visibility.
        public: whether everyone can see it, or only its owner.

    Raises:
        UserError: see :func:`check_hub`, or the hub refuses.
    """
    from huggingface_hub import create_repo, upload_folder

    check_hub(name)
    try:
        address = create_repo(name, private=not public, exist_ok=True)
        upload_folder(repo_id=name, folder_path=folder, commit_message="Export of vlm-distill")
    except Exception as error:  # no network, no permission, no space: errors of many kinds
        raise UserError(f"--push-to-hub: {name}: {first_line(error)}; {folder} is written and complete") from error
    return str(address)
