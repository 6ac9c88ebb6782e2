"""Answers drawn by a server are those that the student itself would draw, by weights that follow it."""

import json

import pytest
import tiny
import torch
from pydantic import ValidationError
from receiving import ENTER, UPDATE, GlooGroup, Receiver
from safetensors import safe_open
from scoring_server import serving

from data.errors import UserError
from vlm_distill.config.sections import RunConfig
from vlm_distill.demo import make_tokenizer
from vlm_distill.models import build_vlm, load_vlm
from vlm_distill.trainer import Trainer
from vlm_distill.training import weight_transfer
from vlm_distill.training.on_policy import Kept


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    tiny.write_data(folder / "images", rows=16, text_only=(2, 5), broken=(3,))
    tiny.write_llava(folder / "teacher", layers=3)
    tiny.write_llava(folder / "student", layers=2)
    return folder


@pytest.fixture
def server(folder):
    with serving(load_vlm(folder / "student", dtype="float32").eval()) as server:
        yield server


def config(folder, out, server=None, keys=None, **on_policy):
    """Five steps of greedy answers, drawn here or on a server."""
    own = {"fraction": 1.0, "max_new_tokens": 4, "temperature": 0.0, **on_policy}
    if server is not None:
        own["server"] = {"url": server.url, "model": "teacher-1", "folder": str(out / "weights"), **(keys or {})}
    changes = {"loss": [{"name": "jsd"}], "on_policy": own, "training__steps": 5, "evaluation__teacher": False}
    plain = tiny.config(out / "run", folder / "images" / "data.jsonl", folder / "teacher", **changes)
    return plain | {"student": {"path": str(folder / "student")}}


def trainer(processes, plain):
    return Trainer(RunConfig.model_validate(plain), processes)


def steps(out):
    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def versions(server):
    return [int(folder.rpartition("_")[2]) for folder in server.loaded]


def test_the_drawn_tokens_are_learnt_and_the_weights_follow_every_step(folder, processes, tmp_path, server):
    server.garbles = True  # the text is not read
    trainer(processes, config(folder, tmp_path / "here")).run()
    trainer(processes, config(folder, tmp_path / "there", server)).run()
    for key in ("loss", "on_policy/tokens", "supervised_tokens"):
        there, here = ([line[key] for line in steps(tmp_path / name)] for name in ("there", "here"))
        assert there == pytest.approx(here, rel=1e-5), key
    assert versions(server) == [0, 1, 2, 3, 4]
    assert [line["on_policy/staleness"] for line in steps(tmp_path / "there")] == [0] * 5
    assert [path.name for path in (tmp_path / "there" / "weights").iterdir()] == ["step_4"]
    asked = [body for body in server.bodies if body.get("return_token_ids")]
    assert any("messages" in body for body in asked)
    assert any("prompt" in body for body in asked)


def adapted(plain):
    """The same with adapters on the student's decoder."""
    plain["student"]["lora"] = {"rank": 2}
    return plain


def test_adapters_are_sent_alone(folder, processes, tmp_path, server, capsys):
    trainer(processes, adapted(config(folder, tmp_path / "here"))).run()
    run = trainer(processes, adapted(config(folder, tmp_path / "there", server, {"adapter": True})))
    after_update = run.after_update

    def restart(step):
        after_update(step)
        if step == 2:  # it starts without any adapter
            server.names = ["teacher-1"]
            server.model.load_state_dict(load_vlm(folder / "student", dtype="float32").state_dict())

    run.after_update = restart
    run.run()
    there, here = ([line["loss"] for line in steps(tmp_path / name)] for name in ("there", "here"))
    assert there == pytest.approx(here, rel=1e-5)
    (last,) = (tmp_path / "there" / "weights").iterdir()
    assert (last.name, (last / "adapter_config.json").is_file()) == ("step_4", True)
    # The adapter of the step before was dropped, and a new name was given in each step.
    assert len(server.names) == 2
    assert server.names[1].endswith("-step-4")
    assert versions(server) == [0, 1, 2, 3, 4]


def test_a_server_without_adapters_is_told(folder, processes, tmp_path, server):
    server.adapts = False
    run = trainer(processes, adapted(config(folder, tmp_path, server, {"adapter": True})))
    with pytest.raises(UserError, match="start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        run.run()


def test_weights_are_sent_again_after_so_many_steps(folder, processes, tmp_path, server):
    trainer(processes, config(folder, tmp_path, server, {"refresh": 2, "max_staleness": 1})).run()
    assert versions(server) == [0, 2, 4]
    assert [line["on_policy/staleness"] for line in steps(tmp_path)] == [0, 1, 0, 1, 0]


def test_kept_answers_that_are_too_old_are_dropped(folder, processes, tmp_path, server):
    keys = {"refresh": 2, "max_staleness": 1}
    run = trainer(processes, config(folder, tmp_path, server, keys, fraction=0.9, replay=8))
    run.run()
    own = run.on_policy
    assert {entry.version for entry in own.kept} <= {3, 4}
    own.kept = [Kept((0, 0), [5], 2), Kept((0, 0), [6], 3), Kept((0, 0), [7], 4)]
    own._drop_stale(4)
    assert [entry.version for entry in own.kept] == [3, 4]


def test_drawn_answers_have_seeds_of_their_own(folder, processes, tmp_path, server):
    trainer(processes, config(folder, tmp_path, server, temperature=1.0)).run()
    seeds = [body["seed"] for body in server.bodies if body.get("return_token_ids")]
    assert len(set(seeds)) == len(seeds) > 8


def test_a_server_that_was_started_again_gets_the_weights_again(folder, processes, tmp_path, server, capsys):
    run = trainer(processes, config(folder, tmp_path, server, {"refresh": 4}))
    first = {name: tensor.clone() for name, tensor in server.model.state_dict().items()}
    after_update = run.after_update

    def restart(step):
        after_update(step)
        if step == 1:
            server.model.load_state_dict(first)
            with torch.no_grad():
                server.model.head.parameters[0].mul_(1.5)

    run.after_update = restart
    run.run()
    assert versions(server) == [0, 2]
    assert "has other weights than it was given" in capsys.readouterr().err


def test_a_question_that_the_server_refuses_is_left_out(folder, processes, tmp_path, server):
    server.refused = {"messages": 400}  # those with an image
    trainer(processes, config(folder, tmp_path, server)).run()
    problems = [json.loads(line) for line in (tmp_path / "run" / "problems.jsonl").read_text().splitlines()]
    assert "server refuses the question" in {problem["reason"] for problem in problems}


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"controlled": False}, "HTTP 404 .*; start vLLM with VLLM_SERVER_DEV_MODE=1"),
        ({"loads": False}, r"differs from the student in training by \d+\.\d+ nats a token"),
        ({"tells_drawn": False}, "returns no token ids of its answers"),
        ({"told": False}, "returns no prompt_logprobs; serve the student with vLLM"),
    ],
)
def test_a_server_that_cannot_follow_is_told(folder, processes, tmp_path, server, fault, says):
    for name, value in fault.items():
        setattr(server, name, value)
    with torch.no_grad():
        server.model.head.parameters[0].normal_(std=3.0)  # it starts from other weights
    with pytest.raises(UserError, match=says):
        trainer(processes, config(folder, tmp_path, server)).run()


def test_another_chat_template_there_is_told(folder, processes, tmp_path):
    other = load_vlm(folder / "student", dtype="float32", chat_template="{{ 'yes' }}" + tiny.TEMPLATE).eval()
    with serving(other) as server:
        run = trainer(processes, config(folder, tmp_path, server))
        with pytest.raises(UserError, match=r"on_policy.server: .* chat template is not that of student.path"):
            run.run()


def test_a_folder_that_cannot_be_written_is_told(folder, processes, tmp_path, server):
    (tmp_path / "file").write_text("")
    run = trainer(processes, config(folder, tmp_path, server, {"folder": str(tmp_path / "file" / "weights")}))
    with pytest.raises(UserError, match=r"on_policy.server.folder: .* cannot be written"):
        run.run()


def test_what_no_server_can_draw_is_refused(folder, processes, tmp_path, server):
    keys = {"refresh": 3, "max_staleness": 1}
    with pytest.raises(ValidationError, match="become 2 steps old, more than max_staleness allows; set refresh to at"):
        RunConfig.model_validate(config(folder, tmp_path, server, keys))
    plain = config(folder, tmp_path, server) | {"student": tiny.settings()}
    with pytest.raises(ValidationError, match=r"vLLM starts from the student's own files; name student.path"):
        RunConfig.model_validate(plain)
    plain = config(folder, tmp_path, server, {"adapter": True})
    with pytest.raises(ValidationError, match=r"adapter: the student has no adapter; give it student\.lora"):
        RunConfig.model_validate(plain)
    plain["student"] |= {"lora": {"rank": 2}, "train": ["projector"]}
    with pytest.raises(ValidationError, match=r"takes adapters on the decoder alone; let nothing else train"):
        RunConfig.model_validate(plain)
    tiny.write_student(tmp_path / "composed")
    build_vlm(tiny.settings(width=24), tokenizer=make_tokenizer(tiny.WORDS)).save_pretrained(tmp_path / "teacher")
    plain = config(folder, tmp_path, server) | {"student": {"path": str(tmp_path / "composed")}}
    plain["teacher"] = {"path": str(tmp_path / "teacher")}
    with pytest.raises(UserError, match=r"student.path: is assembled from parts, which no server loads"):
        trainer(processes, plain)


@pytest.fixture
def receiver(folder, tmp_path, server, monkeypatch):
    """The server's side of weights that are sent, with gloo in place of NCCL."""
    monkeypatch.setattr(weight_transfer, "NcclGroup", GlooGroup)
    return Receiver(server, folder / "student", tmp_path / "received")


def sent(folder, out, server, **keys):
    """The same steps with weights that are sent from GPU to GPU."""
    plain = config(folder, out, server, keys)
    plain["on_policy"]["server"] |= {"weights": "nccl", "folder": None}
    return plain


@pytest.mark.parametrize("lora", [False, True])
def test_sent_weights_follow_every_step(folder, processes, tmp_path, server, receiver, lora):
    change = adapted if lora else dict
    trainer(processes, change(config(folder, tmp_path / "here"))).run()
    trainer(processes, change(sent(folder, tmp_path / "there", server))).run()
    there, here = ([line["loss"] for line in steps(tmp_path / name)] for name in ("there", "here"))
    assert there == pytest.approx(here, rel=1e-5)
    assert receiver.calls == [ENTER, *UPDATE * 5]
    with safe_open(folder / "student" / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for told in receiver.updates:
        assert dict(zip(told["names"], told["shapes"], strict=True)) == shapes
        assert set(told["dtype_names"]) == {"float32"}


@pytest.mark.parametrize(("refresh", "staleness"), [(1, [0, 0, 0, 0, 0]), (4, [0, 1, 0, 1, 2])])
def test_a_server_that_was_started_again_enters_a_new_group(
    folder, processes, tmp_path, server, receiver, refresh, staleness
):
    run = trainer(processes, sent(folder, tmp_path, server, refresh=refresh))
    after_update = run.after_update

    def restart(step):
        after_update(step)
        if step == 1:
            receiver.start_again()

    run.after_update = restart
    run.run()
    assert [line["on_policy/staleness"] for line in steps(tmp_path)] == staleness
    assert receiver.calls.count(ENTER) == 2


def test_a_server_that_cannot_receive_is_told(folder, processes, tmp_path, server, receiver):
    server.refused = {"update_info": 500}
    with pytest.raises(UserError, match=r"did not answer: HTTP 500 .*; start vLLM again, with VLLM_SERVER_DEV_MODE=1"):
        trainer(processes, sent(folder, tmp_path / "refused", server)).run()
    server.more = {}
    with pytest.raises(UserError, match=r"HTTP 404 .*; start vLLM again, with VLLM_SERVER_DEV_MODE=1 and --weight-tra"):
        trainer(processes, sent(folder, tmp_path / "none", server)).run()


def test_what_cannot_be_sent_is_refused(folder, processes, tmp_path, server):
    plain = sent(folder, tmp_path, server)
    with pytest.raises(UserError, match=r"on_policy\.server\.weights: nccl needs a GPU, and this run has none"):
        trainer(processes, plain)
    for keys, says in (
        ({"folder": "/shared"}, "leave one of the two out"),
        ({"adapter": True}, "vLLM loads adapters from a folder"),
        ({"weights": "folder"}, "name it as folder, or set weights to nccl"),
    ):
        section = plain["on_policy"]["server"] | keys
        with pytest.raises(ValidationError, match=says):
            RunConfig.model_validate(plain | {"on_policy": plain["on_policy"] | {"server": section}})
