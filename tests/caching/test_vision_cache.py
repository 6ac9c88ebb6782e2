"""A run with cached image features equals the run with the encoder, and any other features are refused."""

from pathlib import Path

import byte_tokenizer
import families
import pytest
import tiny
import torch
from counted_runs import trained
from PIL import Image

from data.errors import UserError
from vlm_distill import run as module
from vlm_distill.caching.fill import fill
from vlm_distill.caching.image_features import FeatureCache
from vlm_distill.caching.record_files import RecordWriter
from vlm_distill.config.sections import RunConfig
from vlm_distill.models import load_vlm
from vlm_distill.planning import plan
from vlm_distill.trainer import Trainer

PARTS = ["projector", "decoder"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision_cache")
    # Four pictures, each many times; micro-batches with two images, one, none, and no sample at all.
    tiny.write_data(folder, text_only=(0, 1, 2, 3, 8, 9, 14, 15), broken=(4, 5, 6, 7, 20))
    tiny.write_teacher(folder / "teacher")
    tiny.write_student(folder / "student")
    return folder


def settings(folder, run, cache=None, **changes):
    student = changes.pop("student", {"path": str(folder / "student"), "train": PARTS})
    student = {**student, **({} if cache is None else {"vision_cache": str(cache)})}
    changes = {"training__steps": 3, "evaluation__teacher": False, **changes}
    plain = tiny.config(folder / run, folder / "data.jsonl", folder / "teacher", student=student, **changes)
    return RunConfig.model_validate(plain)


CUT = {"from_teacher": {"layers": 2}, "train": PARTS}


@pytest.mark.parametrize(
    ("name", "changes", "teacher_runs"),
    [
        ("own", {}, True),
        ("same", {"student": CUT, "loss": [{"name": "taid", "t_start": 0.4}, {"name": "projector_features"}]}, False),
        ("packed", {"data__packing": True}, True),
        ("bf16", {"training__dtype": "bf16", "deepspeed__stage": 1, "student": CUT}, False),
    ],
)
def test_the_encoder_does_not_run_and_nothing_else_changes(folder, processes, capsys, name, changes, teacher_runs):
    live = trained(settings(folder, f"{name}_live", **changes), processes)
    cache = folder / f"{name}_cache"
    config = settings(folder, name, cache, **changes)
    fill(config, processes)
    # The four colours, and the blank one of rows without an image.
    assert len(FeatureCache(cache)) == 5
    cached = trained(config, processes)
    assert cached.calls == {"student": 0, "teacher": 12 if teacher_runs else 0}
    assert live.calls == {"student": 12 if teacher_runs else 0, "teacher": 12}
    # In bf16 the encoder sees another number of images at once, whose sums are rounded otherwise on some CPUs.
    tolerance = 1e-2 if name == "bf16" else 1e-5
    assert cached.losses == pytest.approx(live.losses, rel=tolerance)
    for key, weight in cached.weights.items():
        # AdamW makes a whole step of a gradient's sign, which of some numbers is bf16's rounding.
        gap = (weight - live.weights[key]).abs()
        assert gap.float().mean() < 1e-3 if name == "bf16" else gap.max() < tolerance, key
    assert cached.flops < live.flops
    # A shared encoder is stored once; if each model has one, there are two.
    ours, theirs = (m.vision_encoder for m in (cached.trainer.student, cached.trainer.loss_teacher.model))
    together = [a.data_ptr() == b.data_ptr() for a, b in zip(ours.parameters(), theirs.parameters(), strict=False)]
    assert all(together) if not teacher_runs else not any(together)
    capsys.readouterr()
    Trainer(config.model_copy(update={"output": f"{config.output}_said"}), processes).run()
    whose = "student's" if teacher_runs else "student's and the teacher's"
    assert f"the {whose} vision encoder does not run in training" in " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def family(folder):
    """A model whose images have various numbers of features, some of which enter deeper layers."""
    maker = families.Maker(byte_tokenizer.make_tokenizer)
    maker.write("llava", folder / "llava", seed=1)
    return maker.write("qwen3_vl", folder / "qwen3_vl")


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_models_of_transformers_too(folder, family, processes, monkeypatch, same, cached):
    """From the cache, or from the teacher where that is the same, whose rows are packed in their own order."""
    teacher = family if same else folder / "llava"
    student = {"path": str(family), "train": ["decoder"]}

    def run(name, cache=None):
        given = {"student": student, "teacher__path": str(teacher), "data__max_length": 512, "data__packing": same}
        return settings(folder, f"{name}_{same}_{cached}", cache, **given)

    cache = folder / f"family_cache_{same}" if cached else None
    with monkeypatch.context() as patch:
        patch.setattr(module, "has_same_vision", lambda *_: False)
        live = trained(run("live"), processes)
    if cached:
        fill(run("fill", cache), processes)
    got = trained(run("got", cache), processes)
    assert live.calls == {"student": 12, "teacher": 12}
    # Once for a blank image, which tells in what form the model takes its features.
    assert got.calls == {"student": 1 if cached or same else 12, "teacher": 1 if cached and same else 12}
    assert got.losses == pytest.approx(live.losses, rel=1e-5)
    for key, weight in got.weights.items():
        assert (weight - live.weights[key]).abs().max() < 1e-5, key
    assert (got.flops < live.flops) == (cached or same)


def test_a_projector_that_trains_is_refused(folder, family, processes, tmp_path):
    student = {"path": str(family), "train": PARTS}
    config = settings(folder, tmp_path / "run", tmp_path / "cache", student=student, data__max_length=512)
    with pytest.raises(UserError, match=r"student\.vision_cache: .* its projector, which is trained; leave"):
        fill(config, processes)


@pytest.fixture
def filled(folder, processes, tmp_path):
    """A configuration with a complete cache."""
    config = settings(folder, tmp_path / "run", tmp_path / "cache")
    fill(config, processes)
    return config


def test_a_student_of_its_own_is_filled_without_its_teacher(folder, processes, tmp_path):
    fill(settings(folder, tmp_path / "run", tmp_path / "cache", teacher__path=str(tmp_path / "none")), processes)
    assert len(FeatureCache(tmp_path / "cache")) == 5


def test_what_is_there_is_not_run_again(filled, processes, monkeypatch, capsys):
    written = []
    append = RecordWriter.append
    monkeypatch.setattr(
        RecordWriter, "append", lambda self, *data, **rest: written.append(0) or append(self, *data, **rest)
    )
    fill(filled, processes)
    assert not written
    told = capsys.readouterr().err
    # Of width 16 in float32, four tokens each.
    assert "64 bytes a token of an image; 5 images are stored" in told
    assert "5 images in 1.28 kB" in told
    cache = FeatureCache(filled_folder(filled))
    (index,) = cache.folder.glob("*.index")
    index.write_bytes(index.read_bytes()[: 2 * 24 + 7])  # what a kill leaves
    with pytest.raises(UserError, match=r"has no features of images of .* run vlm-distill cache"):
        list(Trainer(filled, processes).batches(0, 3))
    fill(filled, processes)
    assert len(written) == 3
    list(Trainer(filled, processes).batches(0, 3))


def filled_folder(config):
    return Path(config.student.vision_cache)


def test_features_that_are_damaged_are_refused(filled, processes):
    (data,) = filled_folder(filled).glob("*.data")
    raw = bytearray(data.read_bytes())
    raw[300] ^= 1
    data.write_bytes(raw)
    with pytest.raises(UserError, match=r"\.data is damaged; delete it and .*\.index"):
        list(Trainer(filled, processes).batches(0, 3))


def test_an_image_that_changed_has_none(folder, filled, processes, tmp_path):
    tiny.write_data(tmp_path / "other")
    Image.new("RGB", (20, 16), (255, 0, 1)).save(tmp_path / "other/0.png")
    train = [{"path": str(tmp_path / "other/data.jsonl")}]
    config = settings(folder, tmp_path / "run2", filled_folder(filled), data__train=train)
    with pytest.raises(UserError, match=r"no features of images of 20 x 16 pixels"):
        list(Trainer(config, processes).batches(0, 3))


def other_weights(folder, path):
    student = load_vlm(folder / "student")
    with torch.no_grad():
        next(student.vision_encoder.parameters()).flatten()[0] += 1e-3
    student.save_pretrained(path)
    return {"student": {"path": str(path), "train": PARTS}}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (other_weights, "vision encoder"),
        (lambda *_: {"training__dtype": "bf16"}, "dtype"),
        (lambda *_: {"student": {**tiny.settings(width=24), "train": PARTS}}, "vision encoder"),
    ],
)
def test_features_of_something_else_are_refused_by_name(folder, filled, processes, tmp_path, changes, key):
    config = settings(folder, tmp_path / "run2", filled_folder(filled), **changes(folder, tmp_path / "student"))
    for use in (Trainer, fill):
        with pytest.raises(UserError, match=f"features were made with another {key}: ") as caught:
            use(config, processes)
        assert "\n" not in str(caught.value)


def test_models_without_such_features(folder, processes, tmp_path):
    language = {"decoder": tiny.settings()["decoder"], "train": ["decoder"]}
    with pytest.raises(UserError, match=r"student\.vision_cache: a language model sees no images; leave it out"):
        fill(settings(folder, tmp_path / "run", tmp_path / "cache", student=language), processes)
    with pytest.raises(UserError, match=r"holds no cache; fill it: vlm-distill cache CONFIG"):
        Trainer(settings(folder, tmp_path / "run", tmp_path / "cache"), processes)


@pytest.mark.parametrize(
    ("student", "more"),
    [
        ({}, {}),
        ({"train": PARTS, "lora": {"parts": ["vision_encoder"]}}, {}),
        ({"train": PARTS}, {"on_policy": {"fraction": 0.5}}),
    ],
)
def test_configurations_that_a_cache_of_features_cannot_serve(folder, tmp_path, student, more):
    student = {"path": str(folder / "student"), **student}
    with pytest.raises(ValueError, match="vision_cache"):
        settings(folder, tmp_path / "run", tmp_path / "cache", student=student, **more)


def test_the_plan_counts_what_runs(folder, tmp_path):
    live, cached = (
        plan(settings(folder, tmp_path / "run", cache), device="cpu", memory=1) for cache in (None, tmp_path / "cache")
    )
    assert cached.flops < live.flops
    # 256 bytes for each of the images of a sample.
    more = (cached.bytes_read - live.bytes_read) / (cached.steps * cached.batch_size)
    assert more == pytest.approx(256 * live.sequences.images)


def test_the_plan_counts_one_encoder_once(folder, tmp_path):
    # The second is cut from its teacher, whose copies are planned as their originals are.
    own, same = (
        plan(settings(folder, tmp_path / "run", student=student), device="cpu", memory=1)
        for student in ({**tiny.settings(), "train": PARTS}, CUT)
    )
    encoder = sum(part.parameters for part in own.parts if (part.model, part.name) == ("teacher", "vision_encoder"))
    rows = [next(r for r in p.memory if (r.stage, r.placement) == (0, "replicate")) for p in (own, same)]
    assert rows[0].teacher - rows[1].teacher == 4 * encoder > 0


def test_the_plan_of_models_of_transformers(folder, family, monkeypatch, tmp_path):
    def planned(cache=None):
        student = {"path": str(family), "train": ["decoder"]}
        changes = {"student": student, "teacher__path": str(family), "data__max_length": 512}
        return plan(settings(folder, tmp_path / "run", cache, **changes), device="cpu", memory=1)

    once, never = planned(), planned(tmp_path / "cache")
    monkeypatch.setattr(module, "has_same_vision", lambda *_: False)
    twice = planned()
    assert never.flops < once.flops < twice.flops
    # For each of an image's tokens three features of 32 numbers, two of them for deeper layers.
    processor = load_vlm(family).processor
    tokens = int(processor.image_tokens(processor.image_row([Image.new("RGB", (20, 16))])).sum())
    more = (never.bytes_read - once.bytes_read) / (never.steps * never.batch_size)
    assert more == pytest.approx(3 * 32 * 4 * tokens * once.sequences.images)


def test_a_frozen_encoder_drops_no_paths(processes, folder, tmp_path):
    parts = tiny.settings()
    parts["vision_encoder"]["config"]["drop_path_rate"] = 0.9
    trainer = Trainer(settings(folder, tmp_path / "run", student={**parts, "train": PARTS}), processes)
    trainer.student.train()
    encoder = trainer.student.vision_encoder
    assert trainer.student.training
    assert not any(module.training for module in encoder.modules())
    encoder.requires_grad_(True)
    assert trainer.student.train().vision_encoder.training
