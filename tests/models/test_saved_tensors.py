"""Weights have the names that they have in the files, without any file."""

import families
import pytest
import tiny
import torch
from safetensors.torch import load_file

from vlm_distill.models import build_vlm, load_vlm
from vlm_distill.models.saved_tensors import saved_tensors


def same(model, folder):
    model.save_pretrained(folder)
    written, ours = load_file(folder / "model.safetensors"), saved_tensors(model)
    assert ours.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(ours[name], tensor), name


# Tied and not, renamed in files and not, experts that files hold one by one.
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl_moe", "gemma3", "smolvlm"])
def test_families(tmp_path, make_tokenizer, name):
    with families.num2words():
        same(load_vlm(families.Maker(make_tokenizer).write(name, tmp_path / "model")), tmp_path / "again")


def test_a_decoder_alone(tmp_path):
    section = {"decoder": tiny.settings()["decoder"]}
    same(build_vlm(section, tokenizer=tiny.make_tokenizer(tiny.WORDS)), tmp_path / "text")
