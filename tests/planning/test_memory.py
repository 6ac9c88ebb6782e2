"""What ZeRO holds on a rank: against DeepSpeed's own steps, the ZeRO paper, and what fits beside it."""

import pytest

from vlm_distill.config.sections import DeepSpeedSection
from vlm_distill.planning.memory import BUCKET, LIVE, MOST, Sizes, rank_memory
from vlm_distill.planning.simulation import Micro


def _sizes(**changes):
    plain = {"trained": 100, "learned": 0, "total": 100, "largest": 50, "group": 100, "small": 0}
    plain |= {"bucket": BUCKET, "bf16": False, "on_cpu": False, "deepspeed": DeepSpeedSection()}
    bytes_of = {"weights": lambda stage: 400.0, "teacher": lambda placement, stage: 1000.0}
    return Sizes(**plain | bytes_of | changes)


def test_the_largest_micro_batch_is_the_last_that_fits():
    points = {1: Micro(10, 3_000, 3_400, 1, 1), 2: Micro(20, 6_000, 6_400, 1, 1)}
    fits = {}
    for limit in (4_000, 30_000, 32_599, 1_000):
        row = rank_memory(_sizes(), points, 1, 2, "replicate", 1, 1, limit)
        fits[limit] = row.largest_micro_batch
        static = 400 + 1200 + 1000  # weights, masters and states, teacher; gradients come as activations go
        assert row.peak == static + 3_000
        assert static + 3_000 * fits[limit] <= limit or fits[limit] == 0
        assert static + 3_000 * (fits[limit] + 1) > limit
    assert fits == {4_000: 0, 30_000: 9, 32_599: 9, 1_000: 0}
    most = rank_memory(_sizes(), points, 1, 2, "replicate", 1, 1, 1e12).largest_micro_batch
    assert most == MOST  # which is told as that many or more


# A Llama of 3.9 million parameters, fp32 or bf16; the peak of a rank's live tensors in bytes a parameter, as
# `benchmarks/planning.py` counts them, by ZeRO stage, ranks and micro-batches of a step. Its activations take 2.2.
MEASURED = {
    (0, "fp32", 1, 1): 17.10,
    (0, "fp32", 2, 1): 20.11,
    (0, "fp32", 1, 2): 18.13,
    (1, "fp32", 1, 1): 30.93,
    (1, "fp32", 2, 1): 18.13,
    (1, "fp32", 2, 2): 20.13,
    (1, "bf16", 1, 1): 27.27,
    (1, "bf16", 2, 2): 20.06,
    (2, "fp32", 2, 1): 18.11,
    (2, "fp32", 2, 2): 22.51,
    (2, "bf16", 1, 1): 25.27,
    (2, "bf16", 2, 2): 14.26,
    (3, "fp32", 1, 2): 34.93,
    (3, "fp32", 2, 2): 23.70,
    (3, "fp32", 4, 2): 18.70,
    (3, "bf16", 2, 2): 16.46,
    (3, "bf16", 4, 2): 11.35,
}
# The same, where a bucket holds 500,000 parameters.
SMALL_BUCKETS = {
    (1, "fp32", 2, 1): 17.72,
    (2, "fp32", 2, 2): 17.72,
    (2, "bf16", 2, 1): 13.66,
    (3, "fp32", 2, 1): 18.62,
    (3, "bf16", 2, 2): 14.72,
}


@pytest.mark.parametrize(
    ("bucket", "case", "measured"),
    [
        (n, case, value)
        for n, table in ((5 * 10**8, MEASURED), (5 * 10**5, SMALL_BUCKETS))
        for case, value in table.items()
    ],
)
def test_what_zero_holds_is_what_was_measured(bucket, case, measured):
    stage, dtype, gpus, accumulation = case
    total = 3_918_592
    counts = {"trained": total, "total": total, "largest": 385_280, "group": 3_531_008, "small": 788_736}
    working = 2 if dtype == "bf16" and stage > 0 else 4
    kinds = {"bf16": dtype == "bf16", "on_cpu": True, "bucket": bucket}
    bytes_of = {"weights": lambda stage: working * total, "teacher": lambda *_: 0.1 * total}
    student = round(2.2 * total)
    points = {size: Micro(0, student, round(4.1 * total) if working == 4 else student, 1, 1) for size in (2, 16)}
    sizes = _sizes(**counts, **kinds, **bytes_of)
    row = rank_memory(sizes, points, 2, stage, "replicate", gpus, accumulation, 1e12)
    assert row.peak / total == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize(("stage", "published"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_states_of_a_model_are_those_of_the_zero_paper(stage, published):
    # Rajbhandari et al. 2020 (arXiv 1910.02054), figure 1: 7.5 billion parameters on 64 GPUs. Gradients of 2 bytes are
    # theirs; DeepSpeed sums in 4. At stage 0 ours are float32, as many bytes in all.
    total = 7_500_000_000
    bf16 = stage > 0
    bytes_of = {"weights": lambda stage: (2 if bf16 else 4) * total, "teacher": lambda *_: 0}
    sizes = _sizes(trained=total, total=total, largest=1, group=1, bf16=bf16, **bytes_of)
    points = {1: Micro(0, 0, 0, 1, 1), 2: Micro(0, 0, 0, 1, 1)}
    row = rank_memory(sizes, points, 1, stage, "none", 64, 1, 1e12)
    live = 2 * LIVE if stage == 3 else 0  # which the paper leaves out
    gradients = {0: 4, 1: 2}.get(stage, 2 / 64) * total
    assert (row.parameters - live + row.optimizer + gradients) / 1e9 == pytest.approx(published, abs=0.05)


def test_a_shared_or_sharded_teacher_takes_its_share():
    points = {1: Micro(0, 0, 0, 1, 1), 2: Micro(0, 0, 0, 1, 1)}
    many = _sizes(teacher=lambda placement, stage: 8e10)
    sizes = {p: rank_memory(many, points, 1, 2, p, 8, 1, 1e12).teacher for p in ("replicate", "shard")}
    assert sizes == {"replicate": 8e10, "shard": 1e10 + 2e9}  # and what is whole at once of a sharded one
    row = rank_memory(many, points, 1, 2, "offload", 8, 1, 1e12)
    assert (row.teacher, row.host) == (2e9, 1e10)


@pytest.mark.parametrize("prefix", ["", "stage3_"])
@pytest.mark.parametrize(
    ("key", "value", "parameters", "peak"),
    [
        # 400 bytes of weights on two ranks; parameters of 40 bytes stay whole: 240 kept, and up to 360 live.
        ("max_live_parameters", 50, 240 + 160, -200),
        ("max_live_parameters", 5, 240, -360),
        ("prefetch_bucket_size", 10, 600, -360),
    ],
)
def test_a_plan_follows_the_limits_of_zero_3(prefix, key, value, parameters, peak):
    points = {1: Micro(0, 0, 0, 1, 1), 2: Micro(0, 0, 0, 1, 1)}
    rows = []
    for zero in ({}, {prefix + key: value}):
        sizes = _sizes(small=10, deepspeed=DeepSpeedSection(stage=3, zero_optimization=zero))
        rows.append(rank_memory(sizes, points, 1, 3, "none", 2, 1, 1e12))
    default, limited = rows
    assert default.parameters == 600
    assert (limited.parameters, limited.peak - default.peak) == (parameters, peak)


def test_what_is_offloaded_lies_in_main_memory():
    points = {1: Micro(0, 0, 0, 1, 1), 2: Micro(0, 0, 0, 1, 1)}
    plain = rank_memory(_sizes(), points, 1, 3, "replicate", 1, 1, 1e12)
    places = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    offloads = DeepSpeedSection(zero_optimization=places)
    moved = rank_memory(_sizes(deepspeed=offloads), points, 1, 3, "replicate", 1, 1, 1e12)
    assert plain.host == 0
    assert moved.host == plain.optimizer + 400 + plain.parameters  # with sums of gradients
    assert (moved.optimizer, moved.step) == (0, 0)
    assert moved.gradients == plain.gradients - 400 == 400  # a bucket
    assert moved.peak == 1000 + 400 + 400  # the teacher, the bucket, and its copy or the weights that are whole
    here = rank_memory(_sizes(deepspeed=offloads, on_cpu=True), points, 1, 3, "replicate", 1, 1, 1e12)
    assert here.peak > moved.peak  # it is the same memory
