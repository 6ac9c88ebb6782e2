"""Students pruned from their teacher: what is measured and chosen; what plans, resumed runs and exports know of it."""

import json
import shutil

import pytest
import tiny
import torch
from torch.nn import functional as F

from data.batch import Encoded
from data.errors import UserError
from vlm_distill.config.model_sections import FromTeacherSection
from vlm_distill.config.sections import RunConfig
from vlm_distill.export import export_student
from vlm_distill.models import load_vlm
from vlm_distill.models.importance import Importance
from vlm_distill.models.plain_layers import find_stack
from vlm_distill.models.pruning import Kept, pruned
from vlm_distill.models.teacher import ModelTeacher
from vlm_distill.planning import plan
from vlm_distill.run import Run
from vlm_distill.trainer import Trainer
from vlm_distill.training import student_cut

CUT = {
    "layers": 2,
    "by": "influence",
    "neurons": 20,
    "vision_encoder": {"layers": 2, "by": "influence", "neurons": 12},
    "calibrate": 6,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    tiny.write_data(folder)
    tiny.write_llava(folder / "teacher", layers=4)
    return folder


def settings(folder, name, cut=CUT, **changes):
    changes = {"student": {"from_teacher": cut}, "training__steps": 3, **changes}
    return RunConfig.model_validate(tiny.config(folder / name, folder / "data.jsonl", folder / "teacher", **changes))


def row(*ids):
    ids = torch.tensor(ids)
    return Encoded(ids, torch.ones(len(ids), dtype=torch.bool), torch.zeros(len(ids), dtype=torch.bool))


@torch.no_grad()
def test_importance_is_what_a_computation_by_hand_gives(tmp_path):
    teacher = load_vlm(tiny.write_language_model(tmp_path)).double()
    layer, stack = teacher.decoder.model.layers[0], find_stack(teacher, "decoder")
    layer.self_attn.o_proj.weight.zero_()  # the MLP then reads the embeddings
    importance, tokens = Importance(stack, widths=True), [5, 9, 11]
    with importance.watching():
        for token in tokens:
            ModelTeacher(teacher).run_row(row(token), torch.device("cpu"))
    x = teacher.decoder.model.embed_tokens.weight[tokens]
    read, values = layer.input_layernorm(x), layer.input_layernorm(x) @ layer.self_attn.v_proj.weight.T
    normed, mlp = layer.post_attention_layernorm(x), layer.mlp
    neurons = F.silu(normed @ mlp.gate_proj.weight.T) * (normed @ mlp.up_proj.weight.T)
    cosines = F.cosine_similarity(x, x + neurons @ mlp.down_proj.weight.T, dim=-1)
    assert importance.layers[0] == pytest.approx(float(1 - cosines.mean()), abs=1e-6)
    torch.testing.assert_close(importance.neurons(0), neurons.abs().mean(0))
    # A single token attends to itself: a head's output is its value.
    torch.testing.assert_close(importance.groups(0), values.abs().mean(0).reshape(stack.groups, -1).mean(1))
    first = read.abs().mean(0) + normed.abs().mean(0)
    second = sum(importance._mean(kind, 1) for kind in ("attention", "mlp"))
    torch.testing.assert_close(importance.channels, first + second)


@pytest.mark.parametrize(("by", "layers"), [("first", [0, 1]), ("spaced", [0, 3]), ("influence", [1, 2])])
def test_each_rule_chooses_its_layers(folder, by, layers):
    stack = find_stack(load_vlm(folder / "teacher"), "decoder")
    measured = Importance(stack, widths=False)
    for index, value in enumerate([0.1, 0.4, 0.3, 0.2]):
        measured._add(("layers", index), torch.tensor([[value]]))
    section = FromTeacherSection(layers=2, by=by)
    assert student_cut._choose(section, load_vlm(folder / "teacher"), {"decoder": measured}) == {
        "decoder": Kept(layers)
    }


@torch.no_grad()
def test_what_adds_least_is_left_out(folder):
    teacher = load_vlm(folder / "teacher").eval()
    for layer in teacher.model.get_decoder().layers:
        layer.mlp.up_proj.weight[3:7] = 0  # these neurons are never active
    run = Run(settings(folder, "least", {"neurons": 20}), None)
    importance = Importance(find_stack(teacher, "decoder"), widths=True)
    with importance.watching():
        for one in run._teacher_rows(teacher.processor, 4):
            ModelTeacher(teacher).run_row(one, torch.device("cpu"))
    kept = student_cut._choose(FromTeacherSection(neurons=20), teacher, {"decoder": importance})
    assert kept["decoder"].neurons == [[0, 1, 2, *range(7, 24)]] * 4
    student = pruned(teacher, kept).eval()
    inputs = teacher.processor.collate([next(run._teacher_rows(teacher.processor, 1))])
    found = [model(inputs, torch.arange(9)).hidden for model in (teacher, student)]
    torch.testing.assert_close(*found)


def test_a_resumed_run_and_an_export_measure_nothing_again(folder, processes, monkeypatch, tmp_path):
    straight = Trainer(settings(folder, "straight"), processes).run()
    Trainer(settings(folder, "stopped"), processes).run(until=2)
    monkeypatch.setattr(student_cut, "_measure", lambda *_: pytest.fail("measured again"))
    shutil.move(folder / "stopped", tmp_path / "moved")
    exported = load_vlm(export_student(tmp_path / "moved", tmp_path / "exported"))
    assert find_stack(exported, "decoder").neurons == 20
    shutil.move(tmp_path / "moved", folder / "stopped")
    resumed = Trainer(settings(folder, "stopped"), processes).run()
    one, other = (load_vlm(path / "student").state_dict() for path in (straight, resumed))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    written = json.loads((straight / "from_teacher.json").read_text())
    assert len(written["decoder"]["influence"]) == 4
    assert [len(rows) for rows in written["decoder"]["neurons"]] == [20, 20]


def test_a_plan_counts_the_pruned_student(folder, tmp_path):
    teacher = load_vlm(folder / "teacher")
    without = tmp_path / "teacher"
    shutil.copytree(folder / "teacher", without)
    (without / "model.safetensors").unlink()
    plain = tiny.config(tmp_path / "run", folder / "data.jsonl", without, student={"from_teacher": CUT})
    found = plan(RunConfig.model_validate(plain), memory=24)
    kept = {"decoder": Kept([0, 1], [[*range(20)]] * 2), "vision_encoder": Kept([0, 1], [[*range(12)]] * 2)}
    student = sum(p.numel() for p in pruned(teacher, kept).parameters())
    assert sum(part.parameters for part in found.parts if part.model == "student") == student
    assert "2 layers of 4, 20 of 24 neurons; vision_encoder: 2 layers of 3, 12 of 24 neurons" in " ".join(found.remarks)


@pytest.mark.parametrize(
    ("cut", "says"),
    [
        ({"layers": 5}, "layers: 5 layers were asked for, but the decoder has 4"),
        ({"layers": [0, 4]}, "layers: [0, 4] must be ascending indices from 0 to 3"),
        ({"neurons": 25}, "neurons: 25 were asked for, but the decoder has 24"),
        ({"heads": 1}, "heads: 1 heads cut a group of 2"),
        ({"width": 15}, "no llama has these sizes"),
        ({"vision_encoder": {"width": 8}}, "the vision_encoder's width is its heads × 8"),
        ({"vision_encoder": {"heads": 3}}, "from_teacher.vision_encoder.heads: 3 were asked for"),
    ],
)
def test_sizes_that_the_teacher_does_not_have(folder, processes, cut, says):
    with pytest.raises(UserError) as error:
        _ = Run(settings(folder, "wrong", cut), processes).student
    assert says in str(error.value)


def test_a_vision_encoder_of_another_library_is_refused(folder, processes, tmp_path):
    tiny.write_teacher(tmp_path)
    plain = tiny.config(tmp_path / "run", folder / "data.jsonl", tmp_path)
    plain["student"] = {"from_teacher": {"vision_encoder": {"layers": 1}}}
    with pytest.raises(UserError, match="VisionTransformer has no layers that can be chosen or narrowed"):
        _ = Run(RunConfig.model_validate(plain), processes).student


def test_samples_without_images_say_nothing_about_a_vision_encoder(folder, processes, tmp_path):
    data = tiny.write_data(tmp_path, rows=4, text_only=(0, 1, 2, 3))
    plain = tiny.config(tmp_path / "run", data, folder / "teacher", student={"from_teacher": CUT})
    with pytest.raises(UserError, match="none of the first 6 samples has an image"):
        _ = Run(RunConfig.model_validate(plain), processes).student
