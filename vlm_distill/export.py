"""A run's student as a folder of its own: the finished one, or the latest checkpoint's."""

from __future__ import annotations

from pathlib import Path

from data.errors import UserError


def is_classifier(run: Path) -> bool:
    """Whether a run trained an image classifier, whose student is named where others have a path or parts."""
    import yaml

    config = run / "config.yaml"
    content = yaml.safe_load(config.read_text("utf-8")) if config.is_file() else None
    return isinstance(content, dict) and "name" in (content.get("student") or {})


def export_student(run: Path, folder: Path, dtype: str | None = None) -> Path:
    """Writes the student of a run, whole: adapters are merged.

    Args:
        run: the folder of a run that has finished, or has a checkpoint.
        folder: where the student goes; made if need be.
        dtype: ``fp32``, ``bf16``, ``fp16`` or ``None`` for the one it was trained in.

    Returns:
        ``folder``, which ``load_vlm`` reads.

    Raises:
        UserError: no run, or nothing in it to export.
    """
    from vlm_distill.config import load_config
    from vlm_distill.models import load_vlm
    from vlm_distill.models.common import as_dtype
    from vlm_distill.models.composed import cast_parameters
    from vlm_distill.training import checkpoint

    wanted = as_dtype(dtype)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: not a run's folder (it has no config.yaml)")
    if (run / "student").is_dir():
        model = load_vlm(run / "student")
    else:
        found = checkpoint.completed(run / "checkpoints")
        if not found:
            raise UserError(f"{run}: nothing to export yet, neither a finished student nor a checkpoint")
        from vlm_distill.training.build import load_models
        from vlm_distill.training.engine import Processes, checkpoint_weights

        config = load_config(run / "config.yaml")
        processes = Processes("cpu")
        model, _ = load_models(config, processes)
        weights = checkpoint_weights(found[-1][1], config.deepspeed.stage)
        prefix = "student."
        model.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        processes.close()
    cast_parameters(model, wanted)
    model.save_pretrained(folder)
    return folder
