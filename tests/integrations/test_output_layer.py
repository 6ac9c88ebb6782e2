"""What models do to their logits is learned from their outputs, without knowing their family."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from vlm_distill.integrations.output_layer import OutputLayer, Shaping, intercepted, output_linear

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 23,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("kind", "settings", "shaping"),
    [
        ("llama", {}, Shaping()),
        ("gemma2", {"final_logit_softcapping": 3.0}, Shaping(1.0, 3.0)),
        ("granite", {"logits_scaling": 13.0}, Shaping(1 / 13)),
        ("cohere", {"logit_scale": 0.0625}, Shaping(0.0625)),
    ],
)
def test_scale_and_soft_cap_are_learned(kind, settings, shaping):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **settings)).eval()
    ids, seen = torch.arange(6).reshape(2, 3), []
    linear = output_linear(model, "student")
    with torch.no_grad():
        with torch.no_grad(), intercepted(linear, seen.append):
            found = Shaping.of(model(ids).logits)
        whole = model(ids).logits
    assert "forward" not in vars(linear)
    assert found.scale == pytest.approx(shaping.scale, rel=1e-6)
    assert found.softcap == (None if shaping.softcap is None else pytest.approx(shaping.softcap))
    head = OutputLayer(linear, found, 23)
    with head.weight() as weight:
        logits = seen[0] @ weight.T * head.scale
    logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    torch.testing.assert_close(logits, whole)


def test_other_changes_are_refused():
    linear = nn.Linear(3, 7)
    with intercepted(linear, lambda hidden: None):
        logits = linear(torch.zeros(1, 2, 3))
    assert Shaping.of(logits) == Shaping()
    for changed in (logits + 1, logits**2, logits.clamp(max=3), logits[..., :2]):
        with pytest.raises(ValueError, match="by more than a scale and a soft-cap"):
            Shaping.of(changed)


def test_an_output_layer_with_adapters_is_refused():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    model.set_output_embeddings(nn.Sequential(model.lm_head))
    with pytest.raises(ValueError, match="student: the output layer of a LlamaForCausalLM is a Sequential"):
        output_linear(model, "student")
