"""Hidden states from a server: losses and gradients are those of the same model here, over the whole vocabulary."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from scoring_server import serving

from data.errors import UserError
from vlm_distill.config.sections import RunConfig
from vlm_distill.models import build_vlm, load_vlm
from vlm_distill.models.head_alone import read_head
from vlm_distill.models.weightless import Weightless
from vlm_distill.trainer import Trainer

#: Losses that need whole distributions, one of them at image tokens.
WHOLE = [{"name": "kd", "temperature": 2.0}, {"name": "cross_entropy", "weight": 0.5}]
AT_IMAGES = [{"name": "forward_kl"}, {"name": "reverse_kl", "on": "images", "weight": 0.5}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served_hidden")
    tiny.write_data(folder / "text", text_only=tuple(range(24)))
    # Some rows have a picture, some none; one picture is broken.
    tiny.write_data(folder / "images", rows=16, text_only=(2, 5), broken=(3,))
    tiny.write_language_model(folder / "language")
    tiny.write_llava(folder / "llava", layers=3)
    tiny.write_llava(folder / "student", layers=2)
    return folder


def trainer(folder, processes, out, kind, server=None, keys=None, **changes):
    """A run on text alone or with images, whose teacher is here or on a server."""
    teacher = folder / ("llava" if kind == "images" else "language")
    changes = {"evaluation__teacher": False, **changes}
    plain = tiny.config(out, folder / kind / "data.jsonl", teacher, **changes)
    if kind == "images":
        plain["student"] = {"path": str(folder / "student")}
    else:
        plain["student"] = {"decoder": tiny.settings()["decoder"], "tokenizer": "teacher"}
    if server is not None:
        plain["teacher"]["server"] = {"url": server.url, "model": "teacher-1", "form": "hidden", **(keys or {})}
    return Trainer(RunConfig.model_validate(plain), processes)


def first_step(trainer):
    """The losses of the first step's micro-batches, and the gradients that they add up to."""
    losses = []
    step = trainer.dataset[0]
    for number, batch in enumerate(step.batches):
        if number < len(step.conversations):
            assert len(batch.conversations) == batch.samples
        loss, _ = trainer.engine.task(batch, trainer.loss_teacher.outputs(batch, trainer.features))
        loss.backward()
        losses.append(float(loss.detach()))
    return losses, {name: p.grad.clone() for name, p in trainer.student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("kind", "loss"), [("text", WHOLE), ("images", WHOLE), ("images", AT_IMAGES)])
def test_losses_and_gradients_are_those_of_a_teacher_here(folder, processes, tmp_path, kind, loss, packing):
    changes = {"loss": loss, "data__packing": packing, "training__micro_batch_size": 4}
    here, gradients = first_step(trainer(folder, processes, tmp_path / "here", kind, **changes))
    model = load_vlm(folder / ("llava" if kind == "images" else "language"), dtype="float32").eval()
    with serving(model, pools=True) as server:
        # Where only answers are compared, images may be other numbers of tokens.
        server.makes_fewer = loss is WHOLE
        run = trainer(folder, processes, tmp_path / "there", kind, server, **changes)
        assert run.teacher.parameters is None
        assert run.parts.packing.packed[0] == packing
        there, found = first_step(run)
    assert there == pytest.approx(here, rel=1e-5)
    assert found.keys() == gradients.keys()
    for name, expected in gradients.items():
        scale = float(expected.abs().max()) or 1.0
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5 * scale, msg=name)
    asked = [body for body in server.bodies if "task" in body]
    assert any("messages" in body for body in asked) == (kind == "images")
    assert {body["embed_dtype"] for body in asked} == {"float32"}


def test_a_whole_run_learns_the_same_and_reports_the_teachers_own_loss(folder, processes, tmp_path):
    changes = {"loss": WHOLE, "training__steps": 3}
    lines = {}
    with serving(load_vlm(folder / "llava", dtype="float32").eval(), pools=True) as server:
        for name, there in (("here", None), ("there", server)):
            run = trainer(folder, processes, tmp_path / name, "images", there, **changes)
            (own,) = run._teacher_losses(run.loss_teacher).values()
            run.run()
            read = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            lines[name] = [own[0], *(line["loss"] for line in read if line["kind"] == "train")]
        assert server.most > 1
    assert lines["there"] == pytest.approx(lines["here"], rel=1e-5)


def test_several_servers_share_the_rows_and_one_may_die(folder, processes, tmp_path, capsys):
    here, _ = first_step(trainer(folder, processes, tmp_path / "here", "images", loss=WHOLE))
    model = load_vlm(folder / "llava", dtype="float32").eval()
    with serving(model, pools=True) as one:
        with serving(model, pools=True) as other:
            keys = {"url": [one.url, other.url]}
            run = trainer(folder, processes, tmp_path / "there", "images", one, keys, loss=WHOLE)
            counts = [len(server.bodies) for server in (one, other)]
            assert first_step(run)[0] == pytest.approx(here, rel=1e-5)
            assert all(len(server.bodies) > count for server, count in zip((one, other), counts, strict=True))
        assert first_step(run)[0] == pytest.approx(here, rel=1e-5)
    root = other.url.removesuffix("/v1")
    assert capsys.readouterr().err.count(f"{root} does not answer and is left out until it does") == 1


def test_a_narrower_model_on_one_of_several_servers_is_reported_by_its_address(folder, processes, tmp_path):
    model = load_vlm(folder / "language", dtype="float32").eval()
    narrow = build_vlm({"decoder": tiny.settings(width=16)["decoder"]}, tokenizer=model.processor.tokenizer)
    with serving(model, pools=True) as one, serving(narrow.eval(), pools=True) as other:
        keys = {"url": [one.url, other.url]}
        with pytest.raises(UserError, match=rf"{other.url.removesuffix('/v1')} returns hidden states of 16 numbers"):
            trainer(folder, processes, tmp_path / "run", "text", one, keys, loss=WHOLE)


def test_the_students_own_answers_are_judged_too(folder, processes, tmp_path):
    changes = {"loss": [{"name": "jsd"}], "training__steps": 3, "on_policy": {"fraction": 1.0, "max_new_tokens": 4}}
    with serving(load_vlm(folder / "language", dtype="float32").eval(), pools=True) as server:
        found = {}
        for name, there in (("here", None), ("there", server)):
            run = trainer(folder, processes, tmp_path / name, "text", there, **changes)
            run.run()
            read = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            found[name] = [line["loss"] for line in read if line["kind"] == "train"]
    assert found["there"] == pytest.approx(found["here"], rel=1e-5)


def test_bf16_takes_half_the_bytes(folder, processes, tmp_path):
    model = load_vlm(folder / "language", dtype="float32").eval()
    with serving(model, pools=True) as server:
        keys = {"embed_dtype": "bf16"}
        run = trainer(folder, processes, tmp_path / "bf16", "text", server, keys, loss=WHOLE)
        batch = run.dataset[0].batches[0]
        hidden = run.loss_teacher.outputs(batch).targets.hidden
    exact = model(batch.teacher.inputs, batch.teacher.positions).hidden
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(hidden, exact.to(torch.bfloat16))
    assert server.bodies[-1]["embed_dtype"] == "bfloat16"


def test_only_the_head_is_read(folder, tmp_path):
    """From one file or from several, from tied embeddings, in the precision in which it is stored."""
    for tied in (False, True):
        torch.manual_seed(1)
        source = load_vlm(tiny.write_llava(tmp_path / f"tied_{tied}", 2), dtype="float32")
        model = source.model
        if tied:
            model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
            model.tie_weights()
        for name, size in (("whole", "1GB"), ("parts", "8KB")):
            out = tmp_path / f"{name}_{tied}"
            model.to(torch.bfloat16).save_pretrained(out, max_shard_size=size)
            source.processor.processor.save_pretrained(out)
            with Weightless():
                shapes = load_vlm(out)
            head = read_head(shapes, str(out), "cpu")
            with head.weight() as weight:
                assert weight.dtype == torch.bfloat16
                assert torch.equal(weight, model.get_output_embeddings().weight)
        assert (tmp_path / f"parts_{tied}" / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda head: {}, "no file of .* holds its lm head"),
        (lambda head: {"lm_head.weight": head * torch.nan}, "holds NaN or infinite numbers"),
        (lambda head: {"lm_head.weight": head, "other.lm_head.weight": head + 1}, "holds several lm heads that differ"),
    ],
)
def test_a_head_that_cannot_be_read_is_told(tmp_path, damage, says):
    folder = tiny.write_llava(tmp_path / "model", 2)
    with Weightless():
        shapes = load_vlm(folder)
    tensors = load_file(folder / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith("lm_head.weight")]
    head = tensors.pop(name)
    save_file(tensors | damage(head), folder / "model.safetensors")
    with pytest.raises(UserError, match=says):
        read_head(shapes, str(folder), "cpu")


def test_mistakes_are_told_before_training(folder, processes, tmp_path):
    def told(server, says, loss=WHOLE, **keys):
        with pytest.raises((UserError, ValueError), match=says):
            trainer(folder, processes, tmp_path / "told", "text", server, keys, loss=loss)

    language = load_vlm(folder / "language", dtype="float32").eval()
    with serving(language) as server:
        told(server, "returns no hidden states .*; start vLLM with --runner pooling")
    with serving(language, pools=True) as server:
        told(server, "generates nothing .*; start vLLM without --runner pooling", [AT_IMAGES[0]], form="topk")
        told(server, "hidden_states compares features from inside the teacher", [{"name": "hidden_states"}])
        server.drops = 1
        told(server, "hidden states of 6 tokens for a prompt of 7; start vLLM with --no-enable-prefix-caching")
        server.drops, server.context = 0, 63
        told(server, "data.max_length: 64, .* set it to at most 63")
    student = load_vlm(folder / "student", dtype="float32").eval()
    with serving(student, pools=True) as server:
        told(server, "hidden states of 16 numbers, but the lm head of teacher.path reads 24; it serves another model")


def test_images_of_other_numbers_of_tokens_are_told_where_these_are_compared(folder, processes, tmp_path):
    with serving(load_vlm(folder / "llava", dtype="float32").eval(), pools=True) as server:
        run = trainer(folder, processes, tmp_path / "fewer", "images", server, loss=AT_IMAGES)
        with pytest.raises(UserError, match=r"^data, line \d+: images take \d+ tokens .* and \d+ here"):
            run.loss_teacher.outputs(run.dataset[0].batches[0], run.features)


@pytest.mark.parametrize("template", [tiny.TEMPLATE + "{{ 'yes no' }}", "{{ 'yes' }}" + tiny.TEMPLATE])
def test_another_chat_template_there_is_told(folder, processes, tmp_path, template):
    other = load_vlm(folder / "llava", dtype="float32", chat_template=template).eval()
    with serving(other, pools=True) as server:
        run = trainer(folder, processes, tmp_path / "template", "images", server, loss=WHOLE)
        with pytest.raises(UserError, match="chat template is not that of"):
            run.loss_teacher.outputs(run.dataset[0].batches[0])


def test_a_sample_that_the_server_refuses_is_named(folder, processes, tmp_path):
    with serving(load_vlm(folder / "llava", dtype="float32").eval(), pools=True) as server:
        run = trainer(folder, processes, tmp_path / "refused", "images", server, loss=WHOLE)
        server.refused = {"messages": 400}
        with pytest.raises(UserError, match=r"^data, line \d+: teacher.server: .* HTTP 400 .*; leave it out"):
            run.loss_teacher.outputs(run.dataset[0].batches[0])
