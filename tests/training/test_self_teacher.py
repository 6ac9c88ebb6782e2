"""A student that learns from itself: with full images in the teacher, where its own are made smaller."""

import json

import families
import pytest
import tiny
from byte_tokenizer import make_tokenizer

from vlm_distill.config.sections import RunConfig
from vlm_distill.trainer import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("self_teacher")
    tiny.write_data(folder / "data", rows=8, text_only=(3,), size=(84, 56))
    families.Maker(make_tokenizer).write("qwen2_5_vl", folder / "model")
    return folder


def trained(folder, processes, name, student, teacher):
    """A run of a student whose images are made smaller, and its losses."""
    student = {"path": str(folder / "model"), "image": {"max_pixels": 784}, **student}
    changes = {"student": student, "data__max_length": 256, "loss": [{"name": "forward_kl"}], "training__steps": 3}
    plain = tiny.config(folder / name, folder / "data" / "data.jsonl", folder / "model", **changes)
    plain["teacher"] = teacher
    run = Trainer(RunConfig.model_validate(plain), processes)
    run.run()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return run, [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("student", [{}, {"lora": {"rank": 2}}], ids=["copy", "base"])
def test_it_learns_from_itself_with_full_images_as_from_a_model_on_disk(folder, processes, student):
    kind = "base" if student else "copy"
    full = {"from_student": True, "view": {"images": "full"}}
    own, losses = trained(folder, processes, f"own_{kind}", student, full)
    _, expected = trained(folder, processes, f"disk_{kind}", student, {"path": str(folder / "model")})
    assert losses == pytest.approx(expected, rel=1e-5)

    # The teacher sees six tokens of an image where the student sees one; with small images it is the student.
    batch = own.dataset[0].batches[0]
    assert batch.teacher.tokens > batch.student.tokens
    _, same = trained(folder, processes, f"same_{kind}", student, {"from_student": True})
    assert abs(same[0]) < 1e-6 < losses[0]
