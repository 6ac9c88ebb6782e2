"""A run with a cache equals the run with the teacher itself, and any other cache is refused."""

import json
import shutil
import struct
from pathlib import Path

import cache_scenarios
import pytest
import tiny
import torch
import yaml
from launches import on_one_rank_and_two
from PIL import Image

from data.errors import UserError
from vlm_distill.caching import fill_loop
from vlm_distill.caching.fill import fill
from vlm_distill.caching.store import _checksum
from vlm_distill.caching.token_records import TokenCache, TokenWriter
from vlm_distill.config.checks import check_caches
from vlm_distill.config.file import load_config
from vlm_distill.config.sections import RunConfig
from vlm_distill.inspection import Inspection
from vlm_distill.models import build_vlm
from vlm_distill.models.fingerprint import fingerprint
from vlm_distill.trainer import Trainer
from vlm_distill.training import loading
from vlm_distill.training.flops import StepFlops


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    return on_one_rank_and_two(Path(cache_scenarios.__file__), tmp_path_factory.mktemp("cached"))


def same(a, b, tolerance):
    assert len(a["metrics"]) == len(b["metrics"]) == 3
    for mine, other in zip(a["metrics"], b["metrics"], strict=True):
        # Gradients sum differences of either sign, so that rounding shows more in their norm than in the loss.
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=2 * tolerance)
        assert mine == pytest.approx({**other, "grad_norm": mine["grad_norm"]}, rel=tolerance)
    assert a["problems"] == b["problems"]
    assert a["parameters"] == b["parameters"]


# float32 rounds otherwise where rows are padded to another length; bf16 keeps 8 bits of a hidden state, and
# log-probabilities are kept with 11.
TOLERANCE = {"bf16": 1e-2, "topk": 2e-3}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", sorted(cache_scenarios.LIVE))
def test_a_cached_run_equals_the_live_one(results, world, name):
    live, cached = results(world, name), results(world, f"{name}_cached")
    same(live, cached, TOLERANCE.get(name, 1e-5))
    if name == "alone":
        # Every sample was padded as it is in training, to its own length: bit for bit.
        assert live["metrics"] == cached["metrics"]
        assert live["weights"] == cached["weights"]
    assert cached["shards"] == world
    assert live["problems"] or name == "text"


@pytest.mark.parametrize("name", sorted(cache_scenarios.BY_ONE))
def test_a_cache_is_filled_and_read_on_any_number_of_ranks(results, name):
    same(results(2, f"{name}_cached"), results(2, f"{name}_by_one"), TOLERANCE.get(name, 1e-5))
    assert results(1, f"{name}_cached")["tokens"] == results(2, f"{name}_cached")["tokens"] > 30


def test_an_image_that_several_ranks_show_is_seen_by_one(results):
    images = [results(world, "seen_cached")["images"] for world in (1, 2)]
    # Four colours, and the blank one of rows without an image.
    assert sorted(images[0]) == sorted(images[1])
    assert len(set(images[1])) == len(images[1]) == 5


def test_a_teacher_in_shards_fills_it(results):
    same(results(2, "shard"), results(2, "shard_cached"), 1e-5)
    # At another ZeRO stage, from the same teacher.
    losses = [[line["loss"] for line in results(2, f"{name}_cached")["metrics"]] for name in ("mixed", "shard")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    tiny.write_data(folder / "data", rows=10, text_only=(1, 4), broken=(7,))
    return folder, tiny.write_teacher(folder / "teacher")


@pytest.fixture
def own(material, tmp_path):
    """A copy of data and teacher that a test may damage, and a maker of configurations for it."""
    for part in ("data", "teacher"):
        shutil.copytree(material[0] / part, tmp_path / part)

    def make(cache=None, **changes):
        plain = tiny.config(tmp_path / "run", tmp_path / "data/data.jsonl", tmp_path / "teacher", **changes)
        plain["training"] |= {"steps": 2, "batch_size": 4}
        plain["teacher"]["cache"] = {"folder": str(tmp_path / "cache")} | (cache or {})
        return RunConfig.model_validate(plain)

    return tmp_path, make


@pytest.fixture(scope="module")
def filled(material, processes, tmp_path_factory):
    """A complete cache of the material."""
    folder = tmp_path_factory.mktemp("filled") / "cache"
    plain = tiny.config(folder.parent / "run", material[0] / "data/data.jsonl", material[1])
    plain["teacher"]["cache"] = {"folder": str(folder)}
    fill(RunConfig.model_validate(plain), processes)
    return folder


@pytest.fixture
def cached(own, filled):
    """The same with a complete cache."""
    shutil.copytree(filled, own[0] / "cache")
    return own


def test_the_teacher_itself_is_never_loaded(cached, processes, monkeypatch, capfd):
    folder, make = cached
    (folder / "teacher/model.safetensors").unlink()
    loaded = []
    load = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda *words: loaded.append(words[0]) or load(*words))
    config = make(data__eval=[{"path": str(folder / "data/data.jsonl"), "name": "questions"}])
    trainer = Trainer(config, processes)
    assert [section.path for section in loaded] == [None]  # the student's
    trainer.run()
    told = " ".join(capfd.readouterr().err.split())
    assert "the teacher is not evaluated: with teacher.cache it is never loaded" in told
    assert "the teacher's weights cannot be compared with the cache's: no such files here" in told
    # Without any file of the teacher: everything needed is in the cache.
    shutil.rmtree(folder / "teacher")
    shutil.rmtree(folder / "run")
    Trainer(make(), processes)


def test_its_head_is_all_of_the_teacher_that_is_counted(cached, processes):
    trainer = Trainer(cached[1](), processes)
    batch = trainer.dataset[0].batches[0]
    student = StepFlops(trainer.student, None, processes.device, bf16=False).count(batch)
    assert trainer.flops.count(batch) - student == 2 * len(batch.targets) * trainer.teacher.head.parameters[0].numel()


def spoil_weights(folder):
    path = folder / "teacher/model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


def edit(path, a, b):
    text = path.read_text()
    assert a in text
    path.write_text(text.replace(a, b))


@pytest.mark.parametrize(
    ("spoil", "key"),
    [
        (spoil_weights, "weights"),
        (lambda folder: edit(folder / "teacher/tokenizer.json", '"red"', '"rot"'), "tokenizer"),
        (lambda folder: edit(folder / "teacher/chat_template.jinja", "user", "User"), "tokenizer"),
        (
            lambda folder: edit(folder / "teacher/vlm_distill.json", '"patch_size": 8', '"patch_size": 4'),
            "configuration",
        ),
        (lambda folder: edit(folder / "data/data.jsonl", '{"id": "9"', '\n{}\n{"id": "9"'), "data"),
    ],
)
def test_a_cache_of_something_else_is_refused_by_name(cached, processes, spoil, key):
    folder, make = cached
    if key == "tokenizer" and not (folder / "teacher/chat_template.jinja").exists():
        pytest.skip("the template lies in another file")
    spoil(folder)
    for use in (lambda: Trainer(make(), processes), lambda: fill(make(), processes)):
        with pytest.raises(UserError, match=f"contents were made with another {key}: ") as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cache", "changes", "key"),
    [
        ({"form": "topk", "k": 4}, {"loss": [{"name": "forward_kl"}]}, "form: hidden there, topk 4 here"),
        ({}, {"training__dtype": "bf16"}, "dtype: float32 there, bfloat16 here"),
        ({}, {"data__max_length": 63}, "data.max_length: 64 there, 63 here"),
        ({}, {"data__answers": "last"}, "data.answers: all there, last here"),
        ({}, {"data__max_response": 9}, "data.max_response: None there, 9 here"),
    ],
)
def test_a_cache_of_other_settings_is_refused_by_name(cached, processes, cache, changes, key):
    with pytest.raises(UserError, match=f"contents were made with another {key}"):
        Trainer(cached[1](cache, **changes), processes)


def changed_image(folder):
    Image.new("RGB", (20, 16), (255, 0, 1)).save(folder / "data/0.png")


def mended_image(folder):
    Image.new("RGB", (20, 16), (255, 0, 1)).save(folder / "data/7.png")


@pytest.mark.parametrize(
    ("spoil", "row"),
    [
        (changed_image, 1),
        (mended_image, 8),
        (lambda folder: edit(folder / "data/data.jsonl", "say green", "say  green"), 2),
    ],
)
def test_a_sample_that_changed_is_refused_with_its_place(cached, processes, spoil, row):
    folder, make = cached
    spoil(folder)
    trainer = Trainer(make(), processes)
    with pytest.raises(UserError, match=rf"data, sample {row}: not the sample that the teacher saw"):
        list(trainer.batches(0, trainer.epoch_steps))


def test_a_mended_image_is_tried_again_when_the_cache_is_filled_again(own, processes):
    folder, make = own
    fill(make(), processes)
    cache = TokenCache(folder / "cache")
    assert cache.missing(left_out=True) == [7]
    # Something must be missing for the teacher to be loaded at all.
    mended_image(folder)
    (index,) = (folder / "cache").glob("*.index")
    index.write_bytes(index.read_bytes()[:-40])
    fill(make(), processes)
    assert TokenCache(folder / "cache").missing(left_out=True) == []


def test_what_was_killed_goes_on_and_the_rest_is_not_run_again(own, processes, monkeypatch, capfd):
    make = own[1]
    written = []
    write = TokenWriter.write

    def dies(self, sample_id, *rest):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(sample_id)
        write(self, sample_id, *rest)

    monkeypatch.setattr(TokenWriter, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        fill(make(), processes)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"holds [45] of 10 samples; fill it: vlm-distill cache CONFIG"):
        Trainer(make(), processes)
    before = set(written)

    def goes_on(self, sample_id, *rest):
        written.append(sample_id)
        write(self, sample_id, *rest)

    monkeypatch.setattr(TokenWriter, "write", goes_on)
    fill(make(), processes)
    assert len(written) == len(set(written)) == 9
    assert set(written[4:]).isdisjoint(before)
    Trainer(make(), processes)
    # Complete: nothing is loaded.
    monkeypatch.setattr("vlm_distill.run.load_teacher", None)
    fill(make(), processes)
    assert "is complete: " in capfd.readouterr().err


def test_ranks_that_fill_it_stay_together(own, processes, monkeypatch):
    where = []
    monkeypatch.setattr(fill_loop, "_TOGETHER", 2)
    monkeypatch.setattr(processes, "barrier", lambda: where.append(processes.watch.where))
    fill(own[1](training__micro_batch_size=2), processes)
    assert where[-2:] == [f"writing micro-batch {done} of 5 into the cache" for done in (2, 4)]


def test_what_it_will_take_is_told_before_and_needs_room(own, processes, monkeypatch, capfd):
    folder, make = own
    fill(make(data__bad_samples="skip"), processes)
    told = capfd.readouterr().err
    # A hidden state of width 24 in float32; ids and marks of 3 tokens, spans of 2 tokens, and 40 bytes a sample.
    assert "96 bytes a token, 136 with ids" in told
    data = sum(path.stat().st_size for path in (folder / "cache").glob("*.[di]*"))
    assert data == pytest.approx(18 * 135.5, rel=0.1)
    # Likeliest tokens: 4 bytes each and 4 for the tail, and the same in addition.
    fill(make({"folder": str(folder / "likeliest"), "form": "topk", "k": 4}, loss=[{"name": "forward_kl"}]), processes)
    assert "20 bytes a token, 60 with ids" in capfd.readouterr().err
    shutil.rmtree(folder / "cache")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100})())
    with pytest.raises(UserError, match="make room, choose another folder, or choose form topk, or form token for alm"):
        fill(make(), processes)


def test_a_bad_sample_that_must_not_be_ends_the_filling(own, processes):
    with pytest.raises(UserError, match="data, line 8: not an image"):
        fill(own[1](data__bad_samples="fail"), processes)


@pytest.mark.parametrize(
    ("cache", "changes", "message"),
    [
        (
            {},
            {"loss": [{"name": "hidden_states", "layers": {1: 2}}]},
            "hidden_states: no cache holds a teacher's features",
        ),
        ({"form": "topk"}, {"loss": [{"name": "dkd"}]}, "dkd: the likeliest tokens are not enough; .*to hidden"),
        ({"form": "topk"}, {"loss": [{"name": "alm"}]}, "alm: the likeliest tokens are not enough; .*to token"),
        ({"form": "token"}, {"loss": [{"name": "alm"}, {"name": "taid"}]}, "taid needs more .*to hidden"),
        ({"form": "topk"}, {"loss": [{"name": "forward_kl"}], "training__recompute_logits": True}, "recompute_logits"),
    ],
)
def test_losses_that_need_more_than_is_cached_are_refused(own, processes, cache, changes, message):
    for use in (Trainer, fill):
        with pytest.raises(UserError, match=message):
            use(own[1](cache, **changes), processes)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("student", {"from_teacher": {"layers": 1}}, "which teacher.cache never loads"),
        ("evaluation", {"measures": ["kl"]}, "'kl' runs the teacher, which teacher.cache never loads"),
        ("teacher", {"decoder": {"name": "x"}, "cache": {"folder": "y"}}, "a cache records its teacher by path"),
        ("teacher", {"from_student": True, "cache": {"folder": "y"}}, "leave cache out"),
        ("teacher", {"path": "x", "cache": {"folder": "y", "form": "logits"}}, "teacher.cache.form"),
    ],
)
def test_configurations_that_a_cache_cannot_serve(own, section, values, message):
    folder, make = own
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(make().model_dump(exclude_none=True, mode="json") | {section: values}))
    with pytest.raises(UserError, match=message) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_holds_no_cache(own, processes):
    with pytest.raises(UserError, match=r"holds no cache; fill it: vlm-distill cache CONFIG"):
        Trainer(own[1](), processes)
    with pytest.raises(UserError, match=r"set teacher\.cache\.folder"):
        check_caches(own[1]().model_copy(update={"teacher": None}))


def test_a_tokens_own_probability_takes_four_bytes(own, processes, capfd):
    """With the same tokenizer, too; the run equals the teacher's own, with a step left out and resumed."""
    folder, make = own
    changes = {"loss": [{"name": "alm", "tau": 5.0}]}
    form = {"form": "token"}
    fill(make(form, **changes), processes)
    assert "4 bytes a token" in " ".join(capfd.readouterr().err.split())
    assert not (folder / "cache/head.safetensors").exists()
    losses = []
    for teacher in (form, None):
        shutil.rmtree(folder / "run", ignore_errors=True)
        config = make(form, **changes)
        if teacher is None:
            plain = config.teacher.model_copy(update={"cache": None})
            config = config.model_copy(update={"teacher": plain})
        Trainer(config, processes).run()
        lines = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_likeliest_tokens_among_others_are_refused(own, processes):
    folder, make = own
    topk, kl = {"form": "topk", "k": 4}, [{"name": "forward_kl"}]
    fill(make(topk, loss=kl), processes)
    about = json.loads((folder / "cache/cache.json").read_text())
    del about["checksum"]
    about["teacher"]["vocabulary"] += 1
    (folder / "cache/cache.json").write_text(json.dumps(about | {"checksum": _checksum(about)}))
    with pytest.raises(UserError, match="holds probabilities over"):
        Trainer(make(topk, loss=kl), processes)
    with pytest.raises(UserError, match=r"of .* tokens; choose fewer, or form hidden"):
        fill(make({"form": "topk", "k": 64, "folder": str(folder / "other")}, loss=kl), processes)


@pytest.mark.parametrize("name", ["head.safetensors", "tokenizer/tokenizer.json", "cache.json"])
def test_a_flipped_byte_of_what_a_cache_holds_once_is_noticed(cached, processes, name):
    folder, make = cached
    path = folder / "cache" / name
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1  # a weight, or a letter
    path.write_bytes(raw)
    for use in (Trainer, fill):
        with pytest.raises(UserError, match="fill it again") as caught:
            use(make(), processes)
        assert str(path) in str(caught.value)


def test_inspection_shows_what_the_teacher_itself_receives(own):
    shown = Inspection(own[1]()).shown(2)
    assert all({"student", "teacher"} == set(sample.models) for sample in shown if sample.problem is None)


def test_a_fingerprint_reads_little_of_large_files_and_all_of_small_ones(tmp_path, monkeypatch):
    header = json.dumps({"a": {"dtype": "U8", "shape": [2**21], "data_offsets": [0, 2**21]}}).encode()

    def write(change=None, header=header):
        body = bytearray(2**21)
        if change is not None:
            body[change] = 1
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + body)
        return fingerprint(str(tmp_path))["weights"]

    monkeypatch.setattr("vlm_distill.models.fingerprint._BLOCKS", 256)
    base = write()
    assert base == write()
    assert base != write(0)
    assert base != write(2**21 - 1)
    assert base != write(header=header.replace(b'"a"', b'"b"'))
    seen = [base != write(place) for place in range(0, 2**21, 2**16 + 4099)]
    assert any(seen)
    assert not all(seen)
    assert fingerprint(str(tmp_path / "nothing/here")) == {}
    code = tmp_path / "modeling_own.py"
    digests = [(code.write_text(text), fingerprint(str(tmp_path))["configuration"])[1] for text in ("a = 1", "a = 2")]
    assert digests[0] != digests[1]


def test_a_fingerprint_of_an_adapter_is_of_its_base_too(tmp_path):
    model = build_vlm({"decoder": tiny.settings()["decoder"]}, tokenizer=tiny.make_tokenizer(tiny.WORDS))
    model.save_pretrained(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    (adapter / "adapter_model.safetensors").write_bytes(b"12345678")
    before = fingerprint(str(adapter))
    with torch.no_grad():
        model.decoder.get_input_embeddings().weight[0, 0] += 1
    model.save_pretrained(tmp_path / "base")
    after = fingerprint(str(adapter))
    assert before["weights"] != after["weights"]
    assert {k: v for k, v in before.items() if k != "weights"} == {k: v for k, v in after.items() if k != "weights"}
