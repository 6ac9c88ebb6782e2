"""Decoders that cannot be sharded are refused; tests/training/test_scenarios.py trains those that can."""

import pytest
import tiny
import torch
import torch.distributed as dist
from transformers import MistralConfig, MistralForCausalLM

from data.batch import Encoded
from data.errors import UserError
from vlm_distill.config.sections import RunConfig
from vlm_distill.models import load_vlm
from vlm_distill.models.sequence_parallel import SequenceParallel
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import Trainer


def test_decoders_that_cannot_be_divided(tmp_path, processes):
    folder = tiny.write_language_model(tmp_path / "model")
    model = load_vlm(folder)
    config = MistralConfig(**{**model.decoder.config.to_dict(), "model_type": "mistral", "sliding_window": 4})
    config.layer_types = ["sliding_attention", "full_attention"]
    MistralForCausalLM(config).save_pretrained(folder)
    ranks = SequenceParallel(dist.group.WORLD, 0, 1)
    with pytest.raises(UserError, match="the teacher's decoder cannot be divided: it has layers of sliding_attention"):
        ranks.divide(load_vlm(folder), "teacher", 64)
    ranks.divide(model, "student", 64)  # alone, it has all tokens


ROPE = {"rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = {"rope_parameters": ROPE | {"rope_type": "dynamic"}, "max_position_embeddings": 32}
FACTORS = {"short_factor": [1.0] * 2, "long_factor": [3.0] * 2, "original_max_position_embeddings": 16}
LONG = {"rope_parameters": ROPE | FACTORS | {"rope_type": "longrope"}, "max_position_embeddings": 64, "head_dim": 4}


@pytest.mark.parametrize(
    ("settings", "longest", "says"),
    [
        ({"sliding_window": 8}, 9, "sliding window of 8 tokens, and data.max_length is 9"),
        ({"sliding_window": 8}, 8, None),
        ({"sliding_window": None}, 64, None),
        (DYNAMIC, 33, r"\(dynamic\) change after 32 tokens, and data.max_length is 33"),
        (DYNAMIC, 32, None),
        (LONG, 17, r"\(longrope\) change after 16 tokens, and data.max_length is 17"),
        (LONG, 16, None),
        ({"rope_parameters": ROPE | {"rope_type": "linear"}, "max_position_embeddings": 32}, 64, None),
    ],
)
def test_what_only_long_sequences_would_show_is_known(tmp_path, processes, settings, longest, says):
    """A trial with a short row would miss a window, or frequencies that change with the length."""
    folder = tiny.write_language_model(tmp_path / "model")
    own = load_vlm(folder).decoder.config.to_dict()
    kept = {name: value for name, value in own.items() if name not in ("model_type", "rope_parameters", "rope_scaling")}
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(**(kept | settings))).save_pretrained(folder)
    model, ranks = load_vlm(folder).eval(), SequenceParallel(dist.group.WORLD, 0, 1)
    if says is not None:
        with pytest.raises(UserError, match=f"the student's decoder cannot be divided: it.* {says}"):
            ranks.divide(model, "student", longest)
        return
    ranks.divide(model, "student", longest)
    ids, nothing = torch.arange(longest) % 7, torch.zeros(longest, dtype=torch.bool)
    inputs = model.processor.collate([Encoded(ids, nothing, nothing)])
    with torch.no_grad():
        whole = model(inputs, torch.arange(longest)).hidden
        with ranks.shared():
            divided = model(inputs, torch.arange(longest)).hidden
    assert torch.allclose(whole, divided, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "data", "message"),
    [
        ([{"name": "hidden_states", "layers": {-1: -1}}], {}, "losses on features and across tokenizers"),
        ([{"name": "forward_kl"}], {"format": "text"}, "rows are packed"),
    ],
)
def test_runs_that_need_whole_sequences(tmp_path, processes, monkeypatch, loss, data, message):
    monkeypatch.setattr(processes, "world", 2)
    monkeypatch.setattr(Processes, "neighbours", lambda self, size: None)
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
    with pytest.raises(UserError, match=r"sequence_parallel: 1 rank\(s\) are not a multiple of 2"):
        Trainer(RunConfig.model_validate(plain), processes)
