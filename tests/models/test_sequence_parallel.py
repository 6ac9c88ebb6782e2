"""What cannot be divided is refused; tests/training/test_scenarios.py trains what can."""

import pytest
import tiny
import torch.distributed as dist
from transformers import MistralConfig, MistralForCausalLM

from data.errors import UserError
from vlm_distill.config import RunConfig
from vlm_distill.models import load_vlm
from vlm_distill.models.sequence_parallel import SequenceParallel
from vlm_distill.training.engine import Processes
from vlm_distill.training.trainer import Trainer


@pytest.fixture
def processes():
    opened = Processes("cpu")
    yield opened
    opened.close()


def test_decoders_that_cannot_be_divided(tmp_path, processes):
    folder = tiny.write_language_model(tmp_path / "model")
    model = load_vlm(folder)
    config = MistralConfig(**{**model.decoder.config.to_dict(), "model_type": "mistral", "sliding_window": 4})
    config.layer_types = ["sliding_attention", "full_attention"]
    MistralForCausalLM(config).save_pretrained(folder)
    ranks = SequenceParallel(dist.group.WORLD, 0, 1)
    with pytest.raises(UserError, match="the teacher's decoder cannot be divided: it has layers of sliding_attention"):
        ranks.divide(load_vlm(folder), "teacher")
    ranks.divide(model, "student")  # alone, it has all tokens


@pytest.mark.parametrize(
    ("loss", "data", "message"),
    [
        ([{"name": "hidden_states", "layers": {-1: -1}}], {}, "losses on features and across tokenizers"),
        ([{"name": "forward_kl"}], {"format": "text"}, "rows are packed"),
    ],
)
def test_runs_that_need_whole_sequences(tmp_path, processes, monkeypatch, loss, data, message):
    monkeypatch.setattr(processes, "world", 2)
    monkeypatch.setattr(Processes, "share_sequences", lambda self, size: SequenceParallel(None, 0, size))
    talks = tiny.write_data(tmp_path / "data", text_only=tuple(range(24)))
    source = {"path": str(tiny.write_text(tmp_path / "text")), **data} if data else {"path": str(talks)}
    student = {"decoder": tiny.settings()["decoder"]}
    plain = tiny.config(
        tmp_path / "run",
        talks,
        tiny.write_language_model(tmp_path / "teacher"),
        student=student,
        loss=loss,
        training__sequence_parallel=2,
    )
    plain["data"] |= {"train": [source]}
    with pytest.raises(UserError, match=message):
        Trainer(RunConfig.model_validate(plain), processes)


def test_ranks_that_do_not_come_out_even(tmp_path, processes):
    plain = tiny.config(
        tmp_path, tiny.write_data(tmp_path), tiny.write_teacher(tmp_path / "teacher"), training__sequence_parallel=2
    )
    with pytest.raises(UserError, match=r"sequence_parallel: 1 rank\(s\) are no multiple of 2"):
        Trainer(RunConfig.model_validate(plain), processes)
