"""Teachers on real vLLM servers give what the same models give here; ``make test-vllm`` runs this on a CPU.

One server runs at a time: every class has its own.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import real_server
import tiny
import yaml
from smollm2_study import write_teacher

from data.errors import UserError
from data.images import load_image
from data.opening import open_source
from data.sample_images import load_images
from vlm_distill.config.sections import RunConfig
from vlm_distill.endpoint import Endpoint
from vlm_distill.models import load_vlm
from vlm_distill.models.served import ServedAnswers, ServedModel
from vlm_distill.trainer import Trainer

if not (real_server.ENVIRONMENT / "bin" / "vllm").exists():
    pytest.skip(
        f"no vLLM in {real_server.ENVIRONMENT}: tests/vllm/environment.sh could not install it (is PyPI reachable?)",
        allow_module_level=True,
    )

NAME = "teacher-1"
IMAGES = ("--limit-mm-per-prompt", '{"image": 2, "video": 0}')
MANY = ("--max-logprobs", "500")
FORWARD_KL = [{"name": "forward_kl"}]
#: Losses that need whole distributions, the second one at image tokens too.
WHOLE = [{"name": "kd", "temperature": 2.0}]
AT_IMAGES = [{"name": "forward_kl"}, {"name": "reverse_kl", "on": "images", "weight": 0.5}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Teachers and students that see images or not, and data: some rows have a picture, some none, one a broken one."""
    folder = tmp_path_factory.mktemp("vllm")
    tiny.write_data(folder / "images", rows=16, text_only=(2, 5, 9), broken=(3,))
    tiny.write_data(folder / "text", rows=16, text_only=tuple(range(16)))
    real_server.write_vision_model(folder / "seeing", 2)
    real_server.write_vision_model(folder / "seeing_student", 1, tied=False)  # on a CPU, vLLM reloads no tied head
    real_server.write_text_model(folder / "reading", 2)
    real_server.write_text_model(folder / "reading_student", 1)
    return folder


def settings(folder, out, kind, server=None, keys=None, **changes):
    """A run's configuration, as plain data, with a teacher here or on a server."""
    teacher = {"images": "seeing", "text": "reading"}[kind]
    changes = {"loss": FORWARD_KL, "training__steps": 4, "training__batch_size": 4, **changes}
    changes |= {"evaluation__teacher": False, "data__max_length": 256}
    plain = tiny.config(out, folder / kind / "data.jsonl", folder / teacher, **changes)
    plain["student"] = {"path": str(folder / f"{teacher}_student")}
    if server is not None:
        plain["teacher"]["server"] = {"url": server.url, "model": NAME, **(keys or {})}
    return plain


def on_ranks(plain, folder, number):
    """The losses of a run on several ranks."""
    (folder / "run.yaml").write_text(yaml.safe_dump(plain))
    words = [sys.executable, "-m", "vlm_distill.cli", "train", str(folder / "run.yaml"), "--nproc", str(number)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return losses(plain)


def lines_of(plain, key):
    """A number of every step of a run."""
    lines = [json.loads(line) for line in Path(plain["output"], "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if line["kind"] == "train"]


def losses(plain):
    return lines_of(plain, "loss")


def trained(plain, processes):
    """The losses of all steps of a run."""
    Trainer(RunConfig.model_validate(plain), processes).run()
    return losses(plain)


def first_step(plain, processes):
    """The loss of a run's first step, and its gradients by name."""
    trainer = Trainer(RunConfig.model_validate(plain), processes)
    step, total = trainer.dataset[0], 0.0
    for batch in step.batches:
        loss, _ = trainer.engine.task(batch, trainer.loss_teacher.outputs(batch, trainer.features))
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in trainer.student.named_parameters() if p.grad is not None}


def same_first_step(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-4)
    assert one[1].keys() == other[1].keys()
    for name, gradient in other[1].items():
        scale = float(gradient.abs().max())
        assert float((one[1][name] - gradient).abs().max()) <= 1e-3 * scale, name


class TestScores:
    """A model that sees images on a server that generates."""

    @pytest.fixture(scope="class")
    def server(self, folder):
        with real_server.serving(folder / "seeing", NAME, *IMAGES, *MANY) as server:
            yield server

    def test_likeliest_tokens(self, folder, processes, tmp_path, server):
        here = trained(settings(folder, tmp_path / "here", "images"), processes)
        # All that there are; one more would end vLLM's engine.
        config = json.loads((folder / "seeing" / "config.json").read_text())
        keys = {"top_logprobs": config["text_config"]["vocab_size"]}
        assert trained(settings(folder, tmp_path / "there", "images", server, keys), processes) == pytest.approx(
            here, rel=1e-3
        )

    def test_one_log_probability(self, folder, processes, tmp_path, server):
        changes = {"loss": [{"name": "alm", "tau": 5.0}]}
        here = trained(settings(folder, tmp_path / "here", "images", **changes), processes)
        there = settings(folder, tmp_path / "there", "images", server, {"form": "token"}, **changes)
        assert trained(there, processes) == pytest.approx(here, rel=1e-4)

    def test_answers(self, folder, server):
        model = load_vlm(folder / "seeing", dtype="float32").eval()
        endpoint = Endpoint("teacher.server", server.url, "OPENAI_API_KEY")
        served = ServedAnswers(ServedModel(model.processor, endpoint, NAME), 0.0, "")
        source = open_source(folder / "images" / "data.jsonl")
        prompts = []
        for number in (0, 1, 2, 4, 5):
            question, images = load_images(source[number].before_last_answer(), load_image)
            prompts.append((question, images))
        here = model.generate(prompts, max_new_tokens=8)
        there = served.generate(prompts, max_new_tokens=8)
        assert [answer.complete for answer in there] == [answer.complete for answer in here]
        # vLLM writes bytes that are no text in another way.
        texts = [(a.text, b.text) for a, b in zip(there, here, strict=True) if "\ufffd" not in b.text]
        assert len(texts) > 1
        assert all(a == b for a, b in texts)

    def test_two_ranks(self, folder, processes, tmp_path, server):
        changes = {"training__micro_batch_size": 1}
        one = settings(folder, tmp_path / "one", "images", server, {"top_logprobs": 50}, **changes)
        two = settings(folder, tmp_path / "two", "images", server, {"top_logprobs": 50}, **changes)
        assert on_ranks(two, tmp_path, 2) == pytest.approx(trained(one, processes), rel=1e-4)

    def test_another_model_under_this_name(self, folder, processes, tmp_path, server):
        real_server.write_text_model(tmp_path / "other", 1, words=20)
        plain = settings(folder, tmp_path / "run", "text", server)
        plain["teacher"]["path"] = plain["student"]["path"] = str(tmp_path / "other")
        with pytest.raises(UserError, match=r"its tokenizer or chat template is not that of teacher\.path"):
            Trainer(RunConfig.model_validate(plain), processes)


class TestHiddenStates:
    """The same model on a pooling server."""

    @pytest.fixture(scope="class")
    def server(self, folder):
        with real_server.serving(folder / "seeing", NAME, *IMAGES, *real_server.POOLING) as server:
            yield server

    @pytest.mark.parametrize("packing", [False, True])
    @pytest.mark.parametrize("loss", [WHOLE, AT_IMAGES])
    def test_losses_and_gradients(self, folder, processes, tmp_path, server, loss, packing):
        changes = {"loss": loss, "data__packing": packing}
        here = first_step(settings(folder, tmp_path / "here", "images", **changes), processes)
        there = settings(folder, tmp_path / "there", "images", server, {"form": "hidden"}, **changes)
        same_first_step(first_step(there, processes), here)

    def test_beside_a_dead_server(self, folder, processes, tmp_path, server, capsys):
        here = trained(settings(folder, tmp_path / "here", "images", loss=WHOLE), processes)
        keys = {"form": "hidden", "url": ["http://127.0.0.1:9/v1", server.url]}
        there = trained(settings(folder, tmp_path / "there", "images", server, keys, loss=WHOLE), processes)
        assert there == pytest.approx(here, rel=1e-4)
        assert capsys.readouterr().err.count("http://127.0.0.1:9/v1 does not answer and is left out until it does") == 1

    def test_in_bf16(self, folder, processes, tmp_path, server):
        here = trained(settings(folder, tmp_path / "here", "images", loss=WHOLE), processes)
        keys = {"form": "hidden", "embed_dtype": "bf16"}
        there = trained(settings(folder, tmp_path / "there", "images", server, keys, loss=WHOLE), processes)
        assert there == pytest.approx(here, rel=2e-2)

    def test_a_narrower_model_under_this_name(self, folder, processes, tmp_path, server):
        plain = settings(folder, tmp_path / "run", "images", server, {"form": "hidden"})
        narrow = {"hidden_size": 64, "num_attention_heads": 1}
        plain["teacher"]["path"] = str(real_server.write_vision_model(tmp_path / "narrow", 1, **narrow))
        with pytest.raises(UserError, match=r"hidden states of 128 numbers, but the lm head .* reads 64"):
            Trainer(RunConfig.model_validate(plain), processes)

    def test_killed_in_the_middle_and_started_again(self, folder, processes, tmp_path, server):
        """The run ends in one line, and resumes where it was once the server answers again."""
        changes = {"loss": WHOLE, "training__checkpoint_every": 1}
        straight = trained(settings(folder, tmp_path / "straight", "images", **changes), processes)
        config = settings(folder, tmp_path / "run", "images", server, {"form": "hidden"}, **changes)
        trainer = Trainer(RunConfig.model_validate(config), processes)
        trainer.loss_teacher.served.root.wait = 0.01
        after_update = trainer.after_update

        def kill(step):
            after_update(step)
            if step == 1:
                server.kill()

        trainer.after_update = kill
        with pytest.raises(UserError, match=r"did not answer in 6 tries, .*; start again when it does"):
            trainer.run()
        server.start()
        assert trained(config, processes) == pytest.approx(straight, rel=1e-4)


def with_rollouts(folder, out, server=None, **keys):
    """A run whose student answers greedily, here or on a server."""
    own = {"fraction": 1.0, "max_new_tokens": 8, "temperature": 0.0}
    if server is not None:
        own["server"] = {"url": server.url, "model": NAME, "folder": str(out / "weights"), **keys}
    return settings(folder, out / "run", "images", loss=[{"name": "jsd"}], on_policy=own)


def train_past_a_restart(plain, processes, server, number):
    """Train; after the step of this number, counted from 0, the server is killed and started again."""
    trainer = Trainer(RunConfig.model_validate(plain), processes)
    after_update = trainer.after_update

    def restart(step):
        after_update(step)
        if step == number:
            server.kill()
            server.start()

    trainer.after_update = restart
    trainer.run()


class TestRollouts:
    """A student that sees images on a server that draws its answers."""

    @pytest.fixture(scope="class")
    def server(self, folder):
        with real_server.serving(folder / "seeing_student", NAME, *IMAGES, *MANY) as server:
            yield server

    @pytest.fixture(scope="class")
    def expected(self, folder, processes, tmp_path_factory):
        return trained(with_rollouts(folder, tmp_path_factory.mktemp("here")), processes)

    def test_the_weights_follow_the_student(self, folder, processes, tmp_path, server, expected):
        assert trained(with_rollouts(folder, tmp_path, server), processes) == pytest.approx(expected, rel=1e-3)

    def test_drawn_answers(self, folder, processes, tmp_path, server):
        plain = with_rollouts(folder, tmp_path, server, refresh=2)
        plain["on_policy"] |= {"temperature": 1.0, "importance": {}}
        assert all(0 < loss < 10 for loss in trained(plain, processes))
        # vLLM's probabilities of the drawn tokens are those here, as long as the weights are the same.
        fresh, stale = [lines_of(plain, "on_policy/importance")[number::2] for number in (0, 1)]
        assert fresh == pytest.approx([1, 1], abs=1e-3)
        assert all(abs(mean - 1) > 1e-3 for mean in stale)

    def test_two_ranks(self, folder, tmp_path, server, expected):
        plain = with_rollouts(folder, tmp_path, server)
        plain["training"]["micro_batch_size"] = 1
        assert on_ranks(plain, tmp_path, 2) == pytest.approx(expected, rel=1e-3)

    def test_killed_in_the_middle_and_started_again(self, folder, processes, tmp_path, server, capsys):
        """It starts from the weights that it was first given, and gets the student's before it draws again."""
        plain = with_rollouts(folder, tmp_path, server, refresh=2)
        train_past_a_restart(plain, processes, server, 2)
        assert "has other weights than it was given" in capsys.readouterr().err
        assert lines_of(plain, "on_policy/staleness") == [0, 1, 0, 0]


class TestAdapters:
    """A LoRA student, whose adapter alone is sent to a server of its base."""

    @pytest.fixture(scope="class")
    def server(self, folder):
        with real_server.serving(folder / "seeing_student", NAME, *IMAGES, *MANY, "--enable-lora") as server:
            yield server

    def settings(self, folder, out, server=None, **keys):
        plain = with_rollouts(folder, out, server, **keys)
        plain["student"]["lora"] = {"rank": 8}
        return plain

    def test_the_adapter_follows_the_student(self, folder, processes, tmp_path, server):
        here = trained(self.settings(folder, tmp_path / "here"), processes)
        there = self.settings(folder, tmp_path / "there", server, adapter=True)
        assert trained(there, processes) == pytest.approx(here, rel=1e-3)

    def test_started_again_without_it(self, folder, processes, tmp_path, server, capsys):
        plain = self.settings(folder, tmp_path, server, adapter=True, refresh=4)
        train_past_a_restart(plain, processes, server, 1)
        assert "has other weights than it was given" in capsys.readouterr().err
        assert lines_of(plain, "on_policy/staleness") == [0, 1, 0, 1]


@pytest.fixture(scope="module")
def smollm2(folder):
    write_teacher(folder / "smollm2")
    real_server.write_questions(folder / "questions.jsonl")
    return folder / "smollm2"


def smollm2_settings(folder, out, **changes):
    """Four steps of a small student with SmolLM2's tokenizer."""
    changes |= {"training__steps": 4, "training__batch_size": 4, "evaluation__teacher": False, "data__max_length": 128}
    plain = tiny.config(out, folder / "questions.jsonl", folder / "smollm2", **changes)
    plain["student"] = {"decoder": tiny.settings(width=32)["decoder"], "tokenizer": "teacher"}
    return plain


class TestSmolLM2:
    """A model that people use, on a server that generates."""

    @pytest.fixture(scope="class")
    def server(self, smollm2):
        with real_server.serving(smollm2, NAME) as server:
            yield server

    def test_answers(self, smollm2, server):
        model = load_vlm(smollm2, dtype="float32").eval()
        endpoint = Endpoint("teacher.server", server.url, "OPENAI_API_KEY")
        served = ServedAnswers(ServedModel(model.processor, endpoint, NAME), 0.0, "")
        prompt = open_source(smollm2.parent / "questions.jsonl")[0].before_last_answer()
        (answer,) = served.generate([(prompt, [])], max_new_tokens=24)
        assert "Paris" in answer.text
        assert answer.complete

    def test_the_twenty_likeliest_tokens(self, folder, smollm2, processes, tmp_path, server):
        """Other tokens are one more category: the loss is below that over the whole vocabulary, and near it."""
        whole = trained(smollm2_settings(folder, tmp_path / "here", loss=FORWARD_KL), processes)
        plain = smollm2_settings(folder, tmp_path / "there", loss=FORWARD_KL)
        plain["teacher"]["server"] = {"url": server.url, "model": NAME}
        top = trained(plain, processes)
        assert top[0] < whole[0]
        assert top[0] == pytest.approx(whole[0], rel=0.2)


class TestSmolLM2HiddenStates:
    """The same on a pooling server."""

    @pytest.fixture(scope="class")
    def server(self, smollm2):
        with real_server.serving(smollm2, NAME, *real_server.POOLING) as server:
            yield server

    def test_losses_and_gradients(self, folder, smollm2, processes, tmp_path, server):
        here = first_step(smollm2_settings(folder, tmp_path / "here", loss=WHOLE), processes)
        plain = smollm2_settings(folder, tmp_path / "there", loss=WHOLE)
        plain["teacher"]["server"] = {"url": server.url, "model": NAME, "form": "hidden"}
        same_first_step(first_step(plain, processes), here)
