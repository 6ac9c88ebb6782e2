"""What a run is said to cost: against measured tensors, without any weights, and in the report."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import by_path
import pytest
import timm
import tiny
import torch
from typer.testing import CliRunner

from data.errors import UserError
from vlm_distill import cli
from vlm_distill.config.sections import RunConfig
from vlm_distill.models import build_vlm
from vlm_distill.planning import plan
from vlm_distill.planning.models import Models
from vlm_distill.planning.simulation import Meter
from vlm_distill.reporting.report import write_report
from vlm_distill.run import Run
from vlm_distill.runtime.launch import reserved_port
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import Trainer, train

benchmark = by_path.load(Path(__file__).parents[2] / "benchmarks" / "planning.py")
SLOW = pytest.mark.slow
GPU = pytest.mark.gpu


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("composed", "cpu"),
        pytest.param("llava", "cpu", marks=SLOW),
        pytest.param("language", "cpu", marks=SLOW),
        *(pytest.param(name, "cuda", marks=GPU) for name in benchmark.CONFIGURATIONS),
    ],
)
def test_the_peak_is_within_a_tenth_of_what_was_measured(tmp_path, name, device):
    row = benchmark.compare(name, tmp_path, device)
    assert row["measured"] > 10e6
    assert abs(row["error"]) < 0.1, row


@SLOW
def test_the_peak_of_two_ranks_is_within_a_tenth_of_what_was_measured(tmp_path):
    with reserved_port() as port:
        launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
        command = [benchmark.__file__, "--only", "sharded", "--output", str(tmp_path / "row.csv")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-m", *launcher, *command], check=True, env=environment)
    with (tmp_path / "row.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["ranks"] == "2"
    assert abs(float(row["error"])) < 0.1, row


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The plan of a run whose teacher's weights are gone, as the command writes it."""
    folder = tmp_path_factory.mktemp("plan")
    teacher = tiny.write_teacher(folder / "teacher")
    (teacher / "model.safetensors").unlink()
    plain = tiny.config(folder / "run", tiny.write_data(folder / "data"), teacher)
    (folder / "run.yaml").write_text(json.dumps(plain))
    result = CliRunner().invoke(cli.app, ["plan", str(folder / "run.yaml"), "--gpus", "2", "--memory", "24"])
    assert result.exit_code == 0, result.output
    return folder / "run", json.loads((folder / "run" / "plan.json").read_text()), result.output


def test_no_weight_is_read_and_every_parameter_is_counted(planned):
    _, found, _ = planned
    parts = {(part["model"], part["name"]): part for part in found["parts"]}
    real = build_vlm(tiny.settings(), tokenizer=tiny.make_tokenizer(tiny.WORDS))
    assert sum(p["parameters"] for (model, _), p in parts.items() if model == "student") == sum(
        p.numel() for p in real.parameters()
    )
    assert parts["student", "lm_head"]["parameters"] == real.decoder.lm_head.weight.numel()
    assert parts["teacher", "decoder"]["trained"] == 0


def test_stages_and_placements_stand_beside_each_other(planned):
    _, found, output = planned
    rows = {(row["stage"], row["placement"]): row for row in found["memory"]}
    assert set(rows) == {(stage, placement) for stage in range(4) for placement in ("replicate", "shard")}
    trained = sum(part["trained"] for part in found["parts"])
    assert rows[0, "replicate"]["optimizer"] == 8 * trained
    assert rows[2, "replicate"]["optimizer"] == 12 * trained / 2
    assert found["memory"][found["configured"]]["stage"] == 0
    assert found["steps"] == 5
    assert found["sequences"]["sampled"] > 0
    assert found["bytes_read"] > 0
    assert "GPU-hours" in output
    assert "MB per rank at micro-batch 2" in output  # 0.00 GB would say nothing
    assert "micro-batch that fits: ≥ 4096" in " ".join(output.split())


def test_the_report_shows_plan_and_fact(planned):
    folder, found, _ = planned
    (folder / "config.yaml").write_text("output: x\n")
    line = {"kind": "train", "step": 1, "loss": 1.0, "flops": 5e9, "tokens_per_second": 700.0, "waiting": 0.25}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    summary = {"plan": found, "seconds": 100.0, "steps": 5, "memory": {"peak_bytes": 123_000_000}, "device": "cpu: 2"}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = write_report([folder]).read_text()
    section = page.split('aria-label="Plan and measurement"')[1].split("</section>")[0]
    assert "5e+09" in section
    assert f"{found['flops']:.3g}" in section
    assert "25" in section.split("Waiting for data")[1].split("</tr>")[0]


def test_what_is_said_to_fit_is_what_does(tmp_path):
    data, teacher = tiny.write_data(tmp_path / "data", rows=8), tiny.write_teacher(tmp_path / "teacher")
    plain = tiny.config(tmp_path / "run", data, teacher)
    plain["deepspeed"]["stage"], limit = 2, 0.03
    found = plan(RunConfig.model_validate(plain), memory=limit, device="cpu")
    most = _configured(found).largest_micro_batch
    assert most > 16
    plain["training"] |= {"micro_batch_size": most, "batch_size": 2 * most}
    full = plan(RunConfig.model_validate(plain), memory=limit, device="cpu")
    assert 0.93e9 * limit < _configured(full).peak < 1.03e9 * limit


@pytest.mark.parametrize(
    ("name", "parameters", "products"),
    [("resnet50", 25_557_032, 4.09e9), ("vit_base_patch16_224", 86_567_656, 17.56e9)],
)
def test_operations_of_a_forward_are_the_published_ones(name, parameters, products):
    # torchvision's table of weights: parameters, and multiplications with additions of one image of 224 pixels.
    with Meter() as meter:
        model = timm.create_model(name)
        with meter.counting(), torch.no_grad():
            model.eval()(torch.zeros(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert meter.flops == pytest.approx(2 * products, rel=0.01)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("fp8", 8), ("nf4", 4.127)])
def test_weights_of_fewer_bits_are_those_of_linear_layers_but_the_output_layer(kind, bits):
    with Meter():
        model = build_vlm(tiny.settings(), tokenizer=tiny.make_tokenizer(tiny.WORDS)).requires_grad_(False)
        whole = sum(p.nbytes for p in model.parameters())
        layers = [m for m in model.decoder.model.modules() if isinstance(m, torch.nn.Linear)]
        packed = sum(layer.weight.numel() for layer in layers)
        found = Models.teacher_bytes(SimpleNamespace(teacher=model, beside=0, head_alone=False), kind, 2)
    assert packed > 1000
    assert found == whole - 4 * packed + packed * bits / 8


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_count_once(tied):
    settings, tokenizer = tiny.settings(tied=tied), tiny.make_tokenizer(tiny.WORDS)
    with Meter():
        counted = sum(p.numel() for p in build_vlm(settings, tokenizer=tokenizer).parameters())
    assert counted == sum(p.numel() for p in build_vlm(settings, tokenizer=tokenizer).parameters())


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Plans of one run by what is changed in it."""
    folder = tmp_path_factory.mktemp("plans")
    teacher, data = (
        tiny.write_teacher(folder / "teacher"),
        tiny.write_data(folder / "data", text_only=tuple(range(0, 24, 2))),
    )
    plain = tiny.config(folder / "run", data, teacher, loss=[{"name": "forward_kl"}])
    plain["student"]["vision_encoder"] = tiny.settings(width=24)["vision_encoder"]
    plain["training"] |= {"batch_size": 32, "micro_batch_size": 8}
    changed = {
        "live": {},
        "hidden": {"teacher__cache": {"folder": "nowhere"}},
        "topk": {"teacher__cache": {"folder": "nowhere", "form": "topk", "k": 8}},
        "token": {"teacher__cache": {"folder": "nowhere", "form": "token"}, "loss": [{"name": "alm"}]},
        "packed": {"data__packing": True},
        "frozen": {"student__train": ["projector", "decoder"], "teacher__dtype": "bf16"},
        "once": {"student__train": ["projector", "decoder"]},
        "divided": {"training__sequence_parallel": 2},
    }
    found = {}
    for name, changes in changed.items():
        own = json.loads(json.dumps(plain))
        for path, value in changes.items():
            section, _, key = path.partition("__")
            (own[section] if key else own)[key or section] = value
        found[name] = plan(RunConfig.model_validate(own), gpus=2)
    return found


def _configured(found):
    return found.memory[found.configured]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with models of several kinds, and data."""
    folder = tmp_path_factory.mktemp("models")
    tiny.write_data(folder / "data", rows=8)
    tiny.write_data(folder / "talks", rows=8, text_only=tuple(range(8)))
    tiny.write_text(folder / "text")
    tiny.write_teacher(folder / "teacher")
    tiny.write_pieces_teacher(folder / "pieces")
    tiny.write_llava(folder / "llava", 1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1}
    (folder / "empty.jsonl").write_text("")
    for name, options in {"llama": {}, "mixtral": experts}.items():
        decoder = {"config": {"model_type": name} | sizes | options}
        build_vlm({"decoder": decoder}, tokenizer=tiny.make_tokenizer(tiny.WORDS)).save_pretrained(folder / name)
    return folder


def _run(folder, student, teacher, data="talks", **changes):
    """A run between two of these; a model is named, or its section given."""
    path = folder / data / ("text.jsonl" if data == "text" else "data.jsonl")
    plain = tiny.config(folder / "run", path, folder, loss=[{"name": "forward_kl"}])
    for role, model in (("student", student), ("teacher", teacher)):
        name, more = model if isinstance(model, tuple) else (model, {})
        plain[role] = more if name is None else {"path": str(folder / name)} | more
    for key, value in changes.items():
        section, _, inner = key.partition("__")
        plain[section] = value if not inner else plain.get(section, {}) | {inner: value}
    if data == "text":
        plain["data"]["train"][0]["format"] = "text"
    return RunConfig.model_validate(plain)


ASSEMBLED = (None, tiny.settings())
FROZEN = (None, tiny.settings() | {"train": ["projector", "decoder"], "vision_cache": "nowhere"})
ADAPTED = ("llama", {"lora": {"rank": 2}})
SERVED = {"server": {"url": "http://127.0.0.1:9/v1"}}
HIDDEN = {"server": {**SERVED["server"], "form": "hidden"}}
AT_IMAGES = [{"name": "forward_kl"}, {"name": "reverse_kl", "on": "images"}]


@pytest.mark.parametrize(
    ("student", "teacher", "changes", "placement"),
    [
        ("llama", ("llama", SERVED), {}, "served"),
        ("llama", ("llama", SERVED), {"on_policy": {"fraction": 0.5}}, "served"),
        ("llava", ("llava", SERVED), {"data": "data"}, "served"),
        ("llava", ("llava", HIDDEN), {"data": "data", "loss": AT_IMAGES}, "served"),
        (ADAPTED, (None, {"from_student": True}), {"training__sequence_parallel": 2}, "none"),
        ("mixtral", "mixtral", {}, "replicate"),
        (FROZEN, "teacher", {"data": "nowhere", "data__eval": [{"path": "gone.jsonl"}]}, "replicate"),
        ("llava", "llava", {"data": "nowhere", "data__max_length": 256}, "replicate"),
        ("teacher", "pieces", {"data": "nowhere", "loss": [{"name": "uld"}]}, "replicate"),
        ("llama", "llama", {"data": "text"}, "replicate"),
        ("llama", ("llama", {"quantize": "fp8"}), {}, "fp8"),
    ],
)
def test_runs_of_every_kind_are_planned(models, student, teacher, changes, placement):
    found = plan(_run(models, student, teacher, **changes), gpus=2)
    assert _configured(found).placement == placement
    assert _configured(found).activations > 0
    assert found.flops > 0
    if placement == "served":
        heads = [part.parameters for part in found.parts if part.model == "teacher"]
        assert [part.name for part in found.parts if part.model == "teacher"] == ["lm_head"] * len(heads)
        assert bool(heads) == (teacher[1] is HIDDEN)
        assert _configured(found).teacher == 4 * sum(heads)


@pytest.mark.parametrize(
    ("student", "teacher", "changes", "message"),
    [
        (ASSEMBLED, "teacher", {"data": "text"}, "the student cannot keep documents in one row apart"),
        (
            "llama",
            "llama",
            {"on_policy": {"fraction": 0.5}, "loss": [{"name": "cross_entropy"}]},
            "have no right tokens, which",
        ),
        ("llama", "llama", {"on_policy": {"fraction": 0.5}, "data": "text"}, "plain text and has no questions"),
        ("llama", "llama", {"training__sequence_parallel": 2, "data__packing": True}, "a divided one has one sample"),
        ("llama", "llama", {"training__sequence_parallel": 2, "data": "text"}, "a divided one has one sample"),
        (
            "llama",
            "llama",
            {"training__sequence_parallel": 2, "loss": [{"name": "hidden_states", "layers": {-1: -1}}]},
            "need whole sequences",
        ),
        (
            "llama",
            "llama",
            {"training__sequence_parallel": 3, "training__batch_size": 6},
            "its 2 heads are not a multiple of 3 ranks",
        ),
        ("llama", "llama", {"data__eval": [{"path": "gone.jsonl"}]}, "gone.jsonl"),
        ("llama", "llama", {"data__eval": [{"path": "empty.jsonl"}]}, "empty.jsonl has no rows"),
        ("llama", "llama", {"evaluation": {"benchmarks": ["mme"], "benchmark_data": "."}}, "mme: no data in"),
        (
            "llama",
            "llama",
            {"data__eval": [{"path": "talks/data.jsonl"}], "evaluation": {"every": 1, "best": "mme"}},
            "evaluation.best: mme is not evaluated; choose from data",
        ),
        ("llama", "llama", {"optimizer": {"part_lr": {"vision_encoder": 1e-3}}}, "this student has no vision_encoder"),
        (
            (None, tiny.settings() | {"tokenizer": "pieces/student"}),
            "pieces",
            {"data": "data", "loss": [{"name": "uld"}], "evaluation": {"measures": ["kl"]}},
            "kl needs a student with the teacher's tokenizer",
        ),
    ],
)
def test_what_a_run_refuses_is_refused_by_its_plan(models, monkeypatch, student, teacher, changes, message):
    monkeypatch.chdir(models)
    config = _run(models, student, teacher, **changes)
    ranks = config.training.sequence_parallel
    with pytest.raises(UserError, match=message) as planned:
        plan(config, gpus=ranks)
    monkeypatch.setattr(Processes, "neighbours", lambda self, size: None)  # the others are not here
    processes = Processes("cpu")
    processes.world = ranks
    try:
        with pytest.raises(UserError) as trained:
            Trainer(config, processes)
    finally:
        processes.close()
    assert str(planned.value) == str(trained.value)


@pytest.mark.parametrize(
    ("student", "teacher", "changes", "message"),
    [
        (ASSEMBLED, ("teacher", {"quantize": "int8"}), {}, "only models of Transformers load in fewer bits"),
        (
            "llama",
            ("llama", {"cache": {"folder": "c", "form": "topk", "k": 99}}),
            {},
            "k: 99 of 17 tokens; choose fewer",
        ),
        (ASSEMBLED, "teacher", {"data": "data", "data__max_length": 5}, "can be used; the first: too long"),
    ],
)
def test_what_cannot_be_planned_is_told(models, student, teacher, changes, message):
    with pytest.raises(UserError, match=message):
        plan(_run(models, student, teacher, **changes))


def test_data_that_are_there_and_wrong_are_not_taken_to_be_absent(models):
    config = _run(models, "llama", "llama", data__train=[{"path": str(models / "empty.jsonl")}])
    with pytest.raises(UserError, match="has no rows"):
        plan(config)


def test_a_cached_teacher_leaves_its_head_or_nothing(plans):
    live, hidden, topk = plans["live"], plans["hidden"], plans["topk"]
    head = next(part.parameters for part in live.parts if (part.model, part.name) == ("teacher", "lm_head"))
    assert _configured(hidden).teacher == 4 * head < _configured(live).teacher
    assert _configured(topk).teacher == 0
    assert {row.placement for row in hidden.memory} == {"cached"}
    assert [p.name for p in hidden.parts if p.model == "teacher"] == ["lm_head"]
    assert topk.flops < hidden.flops < live.flops
    assert _configured(plans["token"]).teacher == 0
    assert plans["token"].flops == topk.flops


@pytest.mark.parametrize(("dtype", "size", "averages"), [("fp32", 4, 0), ("bf16", 2, 4)])
def test_a_copy_that_follows_has_its_averages_beside_it(models, dtype, size, averages):
    changes = {"training__dtype": dtype, "deepspeed__stage": 2}
    student = ("llama", {"train": ["decoder"]})
    frozen, following = (
        plan(_run(models, student, (None, {"from_student": True} | more), **changes)) for more in ({}, {"ema": 0.9})
    )
    total = sum(part.parameters for part in frozen.parts if part.model == "student")
    assert _configured(frozen).teacher == size * total
    assert _configured(following).teacher == (size + averages) * total


def test_a_student_pruned_by_its_data_has_the_size_that_training_gives_it(models):
    cut = {"layers": 2, "by": "influence", "neurons": 20, "width": 16, "calibrate": 4}
    config = _run(models, (None, {"from_teacher": cut}), "teacher", data="data")
    found = plan(config)
    processes = Processes("cpu")
    real = Run(config, processes).student
    processes.close()
    assert sum(part.parameters for part in found.parts if part.model == "student") == sum(
        parameter.numel() for parameter in real.parameters()
    )
    assert "the student keeps of its teacher: decoder: 2 layers of 3, 20 of 48 neurons, width 16 of 24" in found.remarks


def test_packed_rows_take_less_time(plans):
    live, packed = plans["live"], plans["packed"]
    assert packed.flops < 0.95 * live.flops
    assert packed.tokens == live.tokens


def test_a_shared_vision_encoder_runs_once(plans):
    assert plans["once"].flops < 0.9 * plans["frozen"].flops
    assert "runs once" in plans["once"].remarks[0]
    assert not plans["frozen"].remarks


def test_ranks_that_share_sequences_share_the_decoder_s_activations(plans):
    live, divided = plans["live"], plans["divided"]
    assert _configured(divided).activations < 0.8 * _configured(live).activations
    # Both ranks run the vision encoder on all images, and each half of the rest.
    assert live.flops < divided.flops < 1.6 * live.flops


def test_an_unknown_device_and_an_unknown_model_are_told_in_one_line(tmp_path):
    plain = tiny.config(tmp_path / "run", tiny.write_data(tmp_path / "data", rows=8), None)
    with pytest.raises(UserError, match="--device: abacus is not known"):
        plan(RunConfig.model_validate(plain), device="abacus")
    plain["student"] = {"path": str(tmp_path / "nowhere")}
    with pytest.raises(UserError, match="nowhere") as told:
        plan(RunConfig.model_validate(plain))
    assert "\n" not in str(told.value)


def test_a_run_measures_what_was_planned(tmp_path):
    plain = tiny.config(tmp_path / "run", tiny.write_data(tmp_path / "data", rows=8), None, training__steps=2)
    config = RunConfig.model_validate(plain)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "plan.json").write_text('{"steps": 2}')
    processes = Processes("cpu")
    try:
        train(config, processes)
    finally:
        processes.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == 2
    for line in steps:
        assert line["flops"] > 0
        assert line["flops_per_second"] > 0
        assert line["peak_bytes"] > 10e6
        assert "mfu" not in line  # nobody knows a CPU's peak
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["plan"] == {"steps": 2}
    assert summary["memory"]["peak_bytes"] >= steps[-1]["peak_bytes"]
