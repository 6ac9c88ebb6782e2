"""The ``deepspeed`` section: what the run sets itself must be equal, unknown keys are met with the nearest one."""

import json

import pytest
from run_files import CLASSIFIER, write

from data.errors import UserError
from vision.config import ClassifierConfig
from vlm_distill.config import deepspeed_keys
from vlm_distill.config.batch_split import split_batch
from vlm_distill.config.file import load_config
from vlm_distill.config.sections import RunConfig

TRAINING = {"training": {"steps": 6, "batch_size": 8, "micro_batch_size": 2, "dtype": "fp32"}}
BF16 = {"training": {**TRAINING["training"], "dtype": "bf16"}}
#: A key, the run's value, another one, and what of the run would differ.
SET_BY_RUN = [
    ("train_batch_size", 8, 16, "training.batch_size"),
    ("train_micro_batch_size_per_gpu", 2, 4, "micro_batch_size"),
    ("gradient_accumulation_steps", 4, 1, "micro_batch_size"),
    ("gradient_clipping", 1.0, 0.5, "optimizer.max_grad_norm"),
    ("bf16.enabled", False, True, "training.dtype"),
    ("fp16.enabled", False, True, "training.dtype"),
    ("torch_autocast.enabled", False, True, "training.dtype"),
    ("data_types.grad_accum_dtype", "fp32", "bf16", "fp32"),
    ("data_types.param_dtype", "float32", "bf16", "training.dtype"),
    ("gradient_allreduce_op", "mean", "sum", "trainer"),
    ("zero_optimization.stage", 2, 3, "stage"),
    ("zero_allow_untested_optimizer", True, False, "trainer"),
    ("zero_force_ds_cpu_optimizer", False, True, "trainer"),
    ("optimizer.type", "AdamW", "Adam", "optimizer"),
    ("scheduler.type", "WarmupCosineLR", "WarmupLR", "optimizer.schedule"),
]


def nested(dotted, value):
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


def loaded(tmp_path, section, changes=TRAINING):
    config = load_config(write(tmp_path, {**changes, "deepspeed": {"stage": 2, **section}}))
    split_batch(config, 1)
    return config


@pytest.mark.parametrize(("key", "same", "other", "place"), SET_BY_RUN)
def test_what_the_run_sets_may_be_repeated_and_never_changed(tmp_path, key, same, other, place):
    loaded(tmp_path, nested(key, same))
    auto = loaded(tmp_path, nested(key, "auto"))
    assert auto.deepspeed.stage == 2
    with pytest.raises(UserError) as caught:
        loaded(tmp_path, nested(key, other))
    message = str(caught.value)
    assert key in message
    assert place in message
    assert "\n" not in message


def test_bf16_of_a_run_may_be_repeated(tmp_path):
    assert loaded(tmp_path, {"bf16": {"enabled": True}}, BF16)
    with pytest.raises(UserError, match=r"bf16\.enabled: is false, but this run has true by training\.dtype"):
        loaded(tmp_path, {"bf16": {"enabled": False}}, BF16)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"stge": 2}, "stge: DeepSpeed has no such key here; did you mean stage"),
        ({"gradient_cliping": 1.0}, "did you mean gradient_clipping"),
        ({"zero_optimisation": {"stage": 2}}, "did you mean zero_optimization"),
        ({"offload_optimizer": {"device": "cpu"}}, "it belongs under deepspeed.zero_optimization"),
        ({"pin_memory": True}, "it belongs under deepspeed.zero_optimization.offload_"),
        ({"zero_optimization": {"overlap_com": True}}, "zero_optimization.overlap_com: .*did you mean .*overlap_comm"),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, "offload_param.devise: .*offload_param.device"),
        ({"zero_optimization": {"gradient_clipping": 1.0}}, "it belongs under deepspeed$"),
        ({"zero_optimization": {"cpu_offload": True}}, r"write offload_optimizer: \{device: cpu\}"),
        ({"zero_optimization": {"overlap_comm": "yes please"}}, "overlap_comm: is 'yes please'; give true or false"),
        ({"zero_optimization": {"offload_param": {"device": "gpu"}}}, "device: is 'gpu'; give one of none, cpu, nvme"),
        ({"zero_optimization": True}, "zero_optimization: is True; give a mapping"),
        (
            {"optimizer": {"params": {"lr": 1e-3}}},
            "optimizer.params: lr would do nothing",
        ),
        (
            {"scheduler": {"params": {"warmup_num_steps": 10}}},
            "warmup_num_steps would do nothing.*optimizer.sch",
        ),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "set training.activation_checkpointing"),
        ({"wandb": {"enabled": True}}, "set training.trackers"),
        ({"pipeline": {"stages": 2}}, "this trainer does not use it"),
    ],
)
def test_unknown_and_useless_keys_are_refused_with_what_to_write(tmp_path, section, says):
    for path, kind in (
        (write(tmp_path, {"deepspeed": section}), RunConfig),
        (vision(tmp_path, section), ClassifierConfig),
    ):
        with pytest.raises(UserError, match=says) as caught:
            load_config(path, (), kind)
        assert "\n" not in str(caught.value)


def vision(tmp_path, section):
    return write(tmp_path, {"deepspeed": section}, good=CLASSIFIER, name="vision.yaml")


def test_classifiers_are_held_to_their_run_too_and_stay_at_stage_0(tmp_path):
    config = load_config(vision(tmp_path, {"wall_clock_breakdown": True}), (), ClassifierConfig)
    assert config.deepspeed.stage == 0
    with pytest.raises(
        UserError, match=r"gradient_clipping: is 1\.0, but this run has 0\.0 by optimizer\.max_grad_norm"
    ):
        load_config(vision(tmp_path, {"gradient_clipping": 1.0}), (), ClassifierConfig)


#: What Hugging Face's Trainer is usually given.
HUGGING_FACE = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def test_a_file_of_deepspeed_is_read_and_overrides_lie_on_top(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(HUGGING_FACE))
    path = write(tmp_path, {**TRAINING, "deepspeed": "ds.json"})
    config = load_config(path, ["deepspeed.zero_optimization.sub_group_size=5"])
    assert config.deepspeed.stage == 3
    assert config.deepspeed.offloads_optimizer
    assert config.deepspeed.zero["sub_group_size"] == 5
    assert "reduce_bucket_size" not in config.deepspeed.zero
    assert load_config(path, ["deepspeed.stage=2"]).deepspeed.stage == 2
    plain, named = write(tmp_path, {"deepspeed": {"stage": 1}}, name="plain.yaml"), f"deepspeed={tmp_path / 'ds.json'}"
    assert load_config(plain, [named]).deepspeed.stage == 3
    assert load_config(plain, ["deepspeed.stage=2", named]).deepspeed.stage == 2
    for text, says in (
        ("{", "not readable as JSON"),
        ("[1]", "a mapping"),
        ('{"stage": NaN}', "not a finite number"),
        ('{"stage": 1, "stage": 2}', "stage is given twice"),
    ):
        (tmp_path / "ds.json").write_text(text)
        with pytest.raises(UserError, match=says):
            load_config(path)
    with pytest.raises(UserError, match=r"nowhere\.json: no such file of DeepSpeed"):
        load_config(write(tmp_path, {"deepspeed": "nowhere.json"}))


def test_known_keys_are_those_of_the_installed_deepspeed():
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    levels = dict(deepspeed_keys._levels(deepspeed_keys.KNOWN))
    useless = {name.rpartition(".")[2] for name in deepspeed_keys.ELSEWHERE}

    def compare(model, at):
        names = {name for key, field in model.model_fields.items() for name in (key, field.alias) if name}
        assert names - useless == set(levels[at]), at
        for key, field in model.model_fields.items():
            inner = [a for a in getattr(field.annotation, "__args__", [field.annotation]) if hasattr(a, "model_fields")]
            for one in inner:
                compare(one, f"{at}{key}.")

    compare(DeepSpeedZeroConfig, "zero_optimization.")
    compare(DeepSpeedBF16Config, "bf16.")
    compare(DeepSpeedFP16Config, "fp16.")
