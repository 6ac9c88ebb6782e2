"""A teacher on a server gives the same targets as the same model here, as far as its likeliest tokens go."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from scoring_server import serving
from tokenizers.processors import TemplateProcessing

from data.conversation import Conversation
from data.errors import UserError
from vlm_distill.config.sections import RunConfig
from vlm_distill.endpoint import Endpoint
from vlm_distill.endpoint_pool import open_endpoint
from vlm_distill.losses import TopKTargets
from vlm_distill.models import build_vlm, load_vlm
from vlm_distill.models.answers import Answer
from vlm_distill.models.composed_processor import ComposedProcessor
from vlm_distill.models.served import ServedModel, ServedTeacher, _read_answer
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    tiny.write_data(folder / "data", text_only=tuple(range(24)))
    tiny.write_language_model(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_vlm(folder / "teacher", dtype="float32").eval()


@pytest.fixture
def server(model):
    with serving(model) as server:
        yield server


_PROCESSES = []


def opened():
    """The processes of all trainings here: a second object would wait for the first one's port."""
    if not _PROCESSES:
        _PROCESSES.append(Processes("cpu"))
    return _PROCESSES[0]


@pytest.fixture(scope="module", autouse=True)
def closed():
    yield
    while _PROCESSES:
        _PROCESSES.pop().close()


def served(server, model, name="teacher-1", top=5):
    endpoint = Endpoint("teacher.server", server.url, "OPENAI_API_KEY", wait=0.01, retries=2)
    return ServedTeacher(ServedModel(model.processor, endpoint, name), top, workers=4)


def trainer(folder, server, name, form="topk", **changes):
    plain = tiny.config(folder / name, folder / "data" / "data.jsonl", folder / "teacher", **changes)
    plain["student"] = {"decoder": tiny.settings()["decoder"], "tokenizer": "teacher"}
    if server is not None:
        plain["teacher"]["server"] = {"url": server.url, "model": "teacher-1", "form": form, "top_logprobs": 40}
    return Trainer(RunConfig.model_validate(plain), opened())


def losses(run):
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_targets_are_those_of_the_logits(folder, server, model):
    here = trainer(folder, None, "here", loss=[{"name": "forward_kl"}])
    batch = here.dataset[0].batches[0]
    hidden = here.loss_teacher.outputs(batch).targets
    expected = TopKTargets.of(hidden.head.logits(hidden.hidden), 5)
    found = served(server, model).outputs(batch).targets
    assert torch.equal(found.ids, expected.ids)
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    assert found.tail == pytest.approx(expected.tail, abs=1e-4)
    # After two requests that try the server, each row is one request of its own tokens, without padding.
    bodies = server.bodies[2:]
    assert sorted(len(body["prompt"]) for body in bodies) == sorted(
        batch.teacher.inputs["attention_mask"].sum(1).tolist()
    )
    assert all(body["max_tokens"] == 1 and body["prompt_logprobs"] == 5 for body in bodies)
    assert all((body["temperature"], body["top_k"], body["repetition_penalty"]) == (1, -1, 1) for body in bodies)


def test_ids_that_the_student_lacks_are_left_out_as_a_cut_head_does(folder, server, model):
    here = trainer(folder, None, "cut", loss=[{"name": "forward_kl"}])
    batch = here.dataset[0].batches[0]
    hidden = here.loss_teacher.outputs(batch).targets
    logits = hidden.head.logits(hidden.hidden)
    n = logits.shape[-1] - 3
    teacher = served(server, model, top=logits.shape[-1])
    teacher._vocabulary = n
    found = teacher.outputs(batch).targets
    expected = logits[:, :n].log_softmax(-1)
    assert found.ids.max() < n
    assert found.logprobs == pytest.approx(expected.gather(-1, found.ids), abs=1e-4)


@pytest.mark.parametrize("on_policy", [False, True])
def test_a_student_learns_what_it_learns_from_the_teacher_here(folder, server, on_policy):
    changes = {"loss": [{"name": "forward_kl"}], "evaluation__teacher": False}
    if on_policy:
        changes["on_policy"] = {"fraction": 1.0, "max_new_tokens": 4}
    # The likeliest tokens are the whole vocabulary.
    here = trainer(folder, None, f"here_{on_policy}", **changes)
    there = trainer(folder, server, f"there_{on_policy}", **changes)
    here.run()
    there.run()
    assert losses(there) == pytest.approx(losses(here), rel=1e-3)
    for name, tensor in there.student.state_dict().items():
        assert tensor.numpy() == pytest.approx(here.student.state_dict()[name].numpy(), abs=2e-3), name


@pytest.mark.parametrize(("repeats", "on_policy"), [(False, False), (True, False), (False, True)])
def test_one_log_probability_a_token_is_enough_for_alm(tmp_path, repeats, on_policy):
    """From a teacher with another tokenizer; from a server like vLLM, and from one that only repeats its prompt."""
    data = tiny.write_data(tmp_path / "data", rows=8, text_only=tuple(range(8)))
    parts = {"decoder": tiny.settings(width=24)["decoder"]}
    teacher = build_vlm(parts, tokenizer=tiny.pieces_tokenizer("teacher"))
    teacher.save_pretrained(tmp_path / "teacher")
    tiny.pieces_tokenizer("student").save_pretrained(tmp_path / "student")
    changes = {"loss": [{"name": "alm", "tau": 5.0}], "training__steps": 3, "evaluation__teacher": False}
    changes["student"] = {"decoder": tiny.settings()["decoder"], "tokenizer": str(tmp_path / "student")}
    if on_policy:
        changes["on_policy"] = {"fraction": 1.0, "max_new_tokens": 4}

    def run(name, server=None):
        plain = tiny.config(tmp_path / name, data, tmp_path / "teacher", **changes)
        if server is not None:
            plain["teacher"]["server"] = {"url": server.url, "model": "teacher-1", "form": "token"}
        trainer = Trainer(RunConfig.model_validate(plain), opened())
        trainer.run()
        return losses(trainer)

    with serving(load_vlm(tmp_path / "teacher", dtype="float32").eval()) as server:
        server.told = not repeats
        there = run("there", server)
    assert there == pytest.approx(run("here"), rel=1e-4)
    assert all(body.get("echo") for body in server.bodies[1:]) == repeats


def test_one_log_probability_a_drawn_token_is_enough_for_a_policy_gradient(folder, server):
    changes = {"loss": [{"name": "policy_gradient"}], "evaluation__teacher": False}
    changes["on_policy"] = {"fraction": 1.0, "max_new_tokens": 4}
    here = trainer(folder, None, "pg_here", **changes)
    here.run()
    there = trainer(folder, server, "pg_there", form="token", **changes)
    there.run()
    assert losses(there) == pytest.approx(losses(here), rel=1e-4, abs=1e-5)
    lines = [json.loads(line) for line in (there.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["policy_gradient/k3"] >= 0 for line in lines if line["kind"] == "train")


@pytest.mark.parametrize("on_policy", [False, True])
def test_with_images_as_without_a_server(tmp_path, on_policy):
    # Some rows have a picture, some none; one picture is broken.
    data = tiny.write_data(tmp_path / "data", rows=8, text_only=(2, 5), broken=(3,))
    teacher, student = tiny.write_llava(tmp_path / "teacher", 3), tiny.write_llava(tmp_path / "student", 2)
    changes = {"loss": [{"name": "forward_kl"}], "evaluation__teacher": False, "training__steps": 3}
    changes["student"] = {"path": str(student)}
    if on_policy:
        changes["on_policy"] = {"fraction": 1.0, "max_new_tokens": 3}

    def run(name, server=None):
        plain = tiny.config(tmp_path / name, data, teacher, **changes)
        if server is not None:
            plain["teacher"]["server"] = {"url": server.url, "model": "teacher-1", "top_logprobs": 60}
        trainer = Trainer(RunConfig.model_validate(plain), opened())
        trainer.run()
        return trainer

    with serving(load_vlm(teacher, dtype="float32").eval()) as server:
        there = run("there", server)
    assert sum("messages" in body for body in server.bodies) > sum("prompt" in body for body in server.bodies) > 1
    if not on_policy:
        assert losses(there) == pytest.approx(losses(run("here")), rel=1e-3)
    assert all(0 < loss < 10 for loss in losses(there))


AFTER_QUESTIONS = tiny.TEMPLATE.replace(
    "{% endfor %}{% if", "{% if message['role'] == 'user' %}yes{% endif %}{% endfor %}{% if", 1
)


# For a first token before an image the server returns only its id.
@pytest.mark.parametrize(
    ("template", "tells_ids"),
    [
        (tiny.TEMPLATE + "{{ 'yes no' }}", True),
        (tiny.TEMPLATE + "{{ 'yes no' }}", False),
        ("{{ 'yes' }}" + tiny.TEMPLATE, True),
        (AFTER_QUESTIONS, True),
        (AFTER_QUESTIONS, False),
    ],
)
def test_another_chat_template_there_is_told(tmp_path, template, tells_ids):
    data = tiny.write_data(tmp_path / "data", rows=8)
    teacher = tiny.write_llava(tmp_path / "teacher", 3)
    other = load_vlm(teacher, dtype="float32", chat_template=template).eval()
    plain = tiny.config(tmp_path / "run", data, teacher, loss=[{"name": "forward_kl"}], student={"path": str(teacher)})
    with serving(other) as server:
        server.tells_ids = tells_ids
        plain["teacher"]["server"] = {"url": server.url, "model": "teacher-1", "top_logprobs": 1}
        run = Trainer(RunConfig.model_validate(plain), opened())
        with pytest.raises(UserError, match="chat template is not that of"):
            run.loss_teacher.outputs(run.dataset[0].batches[0])


def test_a_start_token_that_no_template_writes_is_there_too(tmp_path):
    data, teacher = tiny.write_data(tmp_path / "data", rows=4), tiny.write_llava(tmp_path / "teacher", 3)
    processor = load_vlm(teacher).processor
    processor.tokenizer.bos_token = "no"
    start = [("no", processor.tokenizer.bos_token_id)]
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="no $A", special_tokens=start)
    processor.save_pretrained(teacher)
    model = load_vlm(teacher, dtype="float32").eval()
    changes = {"loss": [{"name": "forward_kl"}], "student": {"path": str(teacher)}}
    with serving(model) as server:
        plain = tiny.config(tmp_path / "b", data, teacher, **changes)
        plain["teacher"]["server"] = {"url": server.url, "model": "teacher-1"}
        run = Trainer(RunConfig.model_validate(plain), opened())
        rows = run.dataset[0].batches[0]
        assert rows.teacher.inputs["input_ids"][0, 0] == processor.tokenizer.bos_token_id
        assert len(run.loss_teacher.outputs(rows).targets.ids) == len(rows.teacher.positions)


def test_a_conversation_goes_to_the_server_with_all_that_a_template_reads(tmp_path, talk):
    model = load_vlm(tiny.write_llava(tmp_path / "teacher", 3))
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    first, second = talk("what", "red").messages
    talked = Conversation((first, {**second, "tool_calls": [call], "supervised": False}), tools=({"name": "look"},))
    with serving(model) as server:
        endpoint = Endpoint("teacher.server", server.url, "OPENAI_API_KEY")
        there = ServedModel(model.processor, endpoint, "teacher-1", {"enable_thinking": False})
        _, body = there.chat(talked, [], generation=False)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert body["tools"] == [{"name": "look"}]
    assert body["messages"][1] == {"role": "assistant", "content": second["content"], "tool_calls": [call]}


def test_a_sample_that_the_server_refuses_is_named(tmp_path):
    data, teacher = tiny.write_data(tmp_path / "data", rows=4), tiny.write_llava(tmp_path / "teacher", 3)
    plain = tiny.config(tmp_path / "a", data, teacher, loss=[{"name": "forward_kl"}], student={"path": str(teacher)})
    with serving(load_vlm(teacher, dtype="float32").eval()) as server:
        plain["teacher"]["server"] = {"url": server.url, "model": "teacher-1"}
        run = Trainer(RunConfig.model_validate(plain), opened())
        server.refused = {"messages": 400}
        with pytest.raises(UserError, match=r"^data, line [1-4]: teacher.server: .* HTTP 400 .*; leave it out"):
            run.loss_teacher.outputs(run.dataset[0].batches[0])


def test_a_model_that_no_server_loads_is_told(tmp_path, server):
    model = load_vlm(tiny.write_teacher(tmp_path / "teacher"))
    with pytest.raises(UserError, match="export --format llava"):
        served(server, model)


def test_troubles_pass_and_mistakes_are_told(folder, server, model, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.troubles = [503, 429]
    served(server, model)
    assert [body["key"] for body in server.bodies] == ["Bearer secret"] * 4
    with pytest.raises(UserError, match="serves teacher-1, not teacher-2"):
        served(server, model, "teacher-2")
    server.told = False
    with pytest.raises(UserError, match="returns no prompt_logprobs"):
        served(server, model)
    server.told, server.troubles = True, [400]
    with pytest.raises(UserError, match="refuses: HTTP 400"):
        served(server, model)
    nobody = Endpoint("teacher.server", "http://127.0.0.1:9/v1", "OPENAI_API_KEY", retries=0)
    with pytest.raises(UserError, match="did not answer"):
        ServedModel(model.processor, nobody, "teacher-1")


def test_each_of_several_servers_is_checked_and_the_smallest_context_counts(server, model):
    with serving(model) as other:
        other.context = 64
        endpoint = open_endpoint("teacher.server", [server.url, other.url], "OPENAI_API_KEY", timeout=5)
        there = ServedModel(model.processor, endpoint, "teacher-1")
        assert (there.context, there.tells) == (64, True)
        ServedTeacher(there, 5, workers=4)
        other.told = False
        with pytest.raises(UserError, match=f"{other.url} returns no prompt_logprobs"):
            ServedTeacher(ServedModel(model.processor, endpoint, "teacher-1"), 5, workers=4)


def test_another_tokenizer_there_is_told(server):
    with pytest.raises(UserError, match=r"its tokenizer or chat template is not that of teacher.path"):
        served(server, SimpleNamespace(processor=ComposedProcessor(tiny.pieces_tokenizer("teacher"))))


def test_logits_are_not_taken_for_logprobs(server, model):
    server.shift = 3.0
    with pytest.raises(UserError, match="--logprobs-mode raw_logprobs"):
        served(server, model)


def test_what_reasons_to_its_end_has_no_answer():
    choice = {"message": {"content": None, "reasoning": "well"}, "finish_reason": "stop"}
    assert _read_answer({"choices": [choice]}) == Answer("", [], [], True)
    assert not _read_answer({"choices": [{"text": "so far", "finish_reason": "length"}]}).complete


def test_a_context_that_is_too_short_is_told_before_training(folder, server):
    server.context = 64
    with pytest.raises(UserError, match=r"data.max_length: 64, .* set it to at most 63"):
        trainer(folder, server, "short", loss=[{"name": "forward_kl"}])


def test_requests_are_under_way_at_once_and_while_the_student_learns(folder, server, monkeypatch):
    changes = {"loss": [{"name": "forward_kl"}], "evaluation__teacher": False, "training__steps": 3}
    run = trainer(folder, server, "ahead", **changes)
    server.delay, asked = 0.2, len(server.bodies)
    ahead = []
    forward = Trainer.forward_batch
    monkeypatch.setattr(
        Trainer, "forward_batch", lambda *given: ahead.append(len(run.loss_teacher._ahead)) or forward(*given)
    )
    run.run()
    # A step is four micro-batches of two samples. While one is trained on, the next step's requests are under way.
    assert ahead == [8, 7, 6, 5] * 2 + [4, 3, 2, 1]
    assert server.most > 8
    assert len(server.bodies) - asked == 24


def test_a_step_without_a_sample_leaves_no_reply_behind(folder, server, tmp_path):
    lines = (folder / "data" / "data.jsonl").read_text().splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text("".join(("{" if number % 2 else line) + "\n" for number, line in enumerate(lines)))
    changes = {"training__batch_size": 1, "training__micro_batch_size": 1, "training__steps": 12, "data__max_bad": 0.9}
    changes |= {"data__train": [{"path": str(broken)}], "loss": [{"name": "forward_kl"}], "evaluation__teacher": False}
    run = trainer(folder, server, "empty", **changes)
    asked = len(server.bodies)
    run.run()
    assert 0 < run.tally.empty_steps < 12
    assert len(server.bodies) - asked == 12 - run.tally.empty_steps
    assert not run.loss_teacher._ahead


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loss": [{"name": "kd"}]}, "loss kd needs more than the likeliest tokens"),
        (
            {"loss": [{"name": "alm"}]},
            "alm needs the answers' own .*; set teacher.server.form to token",
        ),
        ({"evaluation__measures": ["kl"]}, "evaluation.measures: 'kl'"),
        ({"training__recompute_logits": True}, "recompute_logits"),
    ],
)
def test_what_a_server_cannot_do_is_refused(folder, server, changes, says):
    with pytest.raises((UserError, ValueError), match=says):
        trainer(folder, server, "refused", **changes)


def test_a_policy_gradient_on_the_datas_answers_is_refused(folder, server):
    with pytest.raises(UserError, match="policy_gradient estimates from answers that the student drew itself; set"):
        trainer(folder, server, "not_drawn", form="token", loss=[{"name": "policy_gradient"}])
