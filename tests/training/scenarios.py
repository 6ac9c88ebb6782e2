"""Training runs that tests compare, several in one launch because a launch costs twenty seconds.

    deepspeed --num_gpus 2 tests/training/scenarios.py FOLDER          two ranks
    python tests/training/scenarios.py FOLDER                          one

With FOLDER's name ending in ``slow``, those that ``make test`` leaves out (see ``slow``).

Writes FOLDER/ranks{world}/{scenario}.json: the metrics of every step, the weights' digest, and what each rank saw.
"""

import gc
import json
import shutil
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import clips
import families
import tiny
import torch
from byte_tokenizer import make_tokenizer
from launches import is_slow
from receiving import receive
from safetensors.torch import load_file
from scoring_server import ScoringServer

from vlm_distill.config.sections import RunConfig
from vlm_distill.models import load_vlm
from vlm_distill.runtime.launch import leave
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import Trainer
from vlm_distill.training import engine

# ZeRO-3 shards the smallest parameters too, which DeepSpeed would keep whole.
WHOLLY_SHARDED = {"stage3_param_persistence_threshold": 0}
FEATURES = [
    {"name": "taid", "t_start": 0.4},
    {"name": "hidden_states", "layers": {-1: -1, 1: 2}},
    {"name": "vision_features", "distance": "cosine"},
    {"name": "projector_features", "distance": "normalised_mse", "weight": 0.5},
    {"name": "minilm", "relation_heads": 2},
]
IMAGES, RELATIONS = FEATURES[2:3], FEATURES[4:]
#: Losses at image tokens, beside one on the answers.
AT_IMAGES = [
    {"name": "forward_kl"},
    {"name": "taid", "on": "images", "t_start": 0.4},
    {"name": "vision_relation", "weight": 0.5},
    {"name": "visual_attention"},
    {"name": "vision_language_affinity", "text": "answers"},
]
#: The same where the student's images are more tokens than the teacher's. Which tokens of a plain square are paired is
#: almost a tie, which rounding decides: such terms weigh little here. The student has its teacher's projector.
MATCHED = [
    {"name": "reverse_kl"},
    {"name": "reverse_kl", "on": "images", "match": "pool", "weight": 0.25},
    {"name": "vision_language_affinity", "match": "pool", "weight": 25},
    {"name": "reverse_kl", "on": "images", "match": "hungarian", "weight": 0.003},
    {"name": "vision_relation", "match": "hungarian", "weight": 0.003},
]
FINE = {**tiny.settings(), "vision_encoder": tiny.settings(width=24)["vision_encoder"], "projector": "teacher"}
FINE["vision_encoder"]["image_size"] = 32


def features(stage, loss=FEATURES, **changes):
    """A run with losses on features."""
    return {"deepspeed__stage": stage, "loss": loss, **changes}


UNLIKE_TOKENIZERS = [
    {"name": "uld"},
    {"name": "alm", "tau": 5.0},
    {"name": "overlap_kl", "divergence": "jsd"},
    {"name": "uld", "tokens": "unshared", "weight": 0.25},
    {"name": "cross_entropy", "weight": 0.5},
]
SELF = {
    "family": "self",
    "teacher": {"from_student": True, "ema": 0.9, "view": {"question": "{question} say {answer}"}},
    "training__steps": 20,
}
#: What a student keeps of its teacher, chosen by its data.
CUT = {"layers": 2, "by": "influence", "neurons": 20, "width": 16, "calibrate": 4}
#: Two teachers of two families; the second teaches so little that many micro-batches and some steps have none of it.
SEVERAL = {
    "teachers": {"big": {"path": "teacher"}, "other": {"path": "llava_teacher"}},
    "lessons": [("plain", "big", "losses", 24), ("mixed", "other", "losses", 4)],
}
#: Both teach the same samples.
BOTH = {"big": 2.0, "other": 1.0}
TOGETHER = {**SEVERAL, "lessons": [("plain", BOTH, "losses", 24), ("mixed", "other", "losses", 8)]}
MIXTURES = {**SEVERAL, "lessons": [("plain", BOTH, "probabilities", 24), ("mixed", BOTH, "logits", 8)]}
#: Four samples a micro-batch: of two, the shorter never fits beside the longer.
PACKED = {"data__packing": True, "training__micro_batch_size": 4}
SHARED = {
    **{f"zero{stage}": {"deepspeed__stage": stage} for stage in range(4)},
    **{f"tied_zero{stage}": {"deepspeed__stage": stage, "student": tiny.settings(tied=True)} for stage in (0, 2, 3)},
    # One rank's micro-batch has no picture, another's holds nothing at all, and the tower trains.
    **{f"mixed_zero{stage}": {"deepspeed__stage": stage, "data": "mixed"} for stage in (0, 2, 3)},
    # Transformers' own LLaVA, a model of text alone, and a student pruned from its teacher.
    **{f"llava_zero{stage}": {"deepspeed__stage": stage, "family": "llava"} for stage in (0, 2, 3)},
    **{f"language_zero{stage}": {"deepspeed__stage": stage, "family": "language"} for stage in (0, 3)},
    **{f"cut_zero{stage}": {"deepspeed__stage": stage, "student": {"from_teacher": CUT}} for stage in (0, 3)},
    # A loss with a parameter of its own.
    **{
        f"ctkd_zero{stage}": {
            "deepspeed__stage": stage,
            "loss": [{"name": "ctkd", "t_range": 4.0, "grl_coefficient": -1.0}],
        }
        for stage in (0, 2, 3)
    },
    **{
        f"ctkd_instance_zero{stage}": {
            "deepspeed__stage": stage,
            "loss": [{"name": "ctkd", "t_range": 4.0, "grl_coefficient": -1.0, "instance": True, "width": 8}],
        }
        for stage in (0, 3)
    },
    # A loss from outside the suite.
    **{f"own_zero{s}": {"deepspeed__stage": s, "loss": [{"name": "own_loss:Hellinger"}]} for s in (0, 2, 3)},
    # Losses on features, with learned projections since the models' widths differ; some micro-batches have no picture.
    **{f"features_zero{s}": features(s, data="mixed") for s in range(4)},
    **{f"features_llava_zero{s}": features(s, family="llava") for s in (0, 3)},
    **{
        f"features_checkpointing_zero{s}": features(s, data="mixed", training__activation_checkpointing=True)
        for s in (0, 3)
    },
    # No loss on logits: the head gets no gradient, nor do layers above those compared, nor the decoder at all.
    **{f"layer_zero{s}": features(s, [{"name": "hidden_states", "layers": {1: 2}}]) for s in range(4)},
    **{f"images_zero{s}": features(s, IMAGES, data="mixed") for s in range(4)},
    **{f"at_images_zero{s}": features(s, AT_IMAGES, data="mixed") for s in (0, 3)},
    **{f"matched_zero{s}": features(s, MATCHED, data="mixed", student=FINE) for s in (0, 3)},
    "packed_at_images_zero0": features(0, AT_IMAGES, data="mixed", **PACKED),
    **{f"relations_zero{s}": features(s, RELATIONS, family="language") for s in (0, 3)},
    # Plain text in packed rows and conversations whose last answer is learnt; everything is measured on both.
    **{f"text_zero{s}": {"deepspeed__stage": s, "family": "language", "data": "text"} for s in (0, 3)},
    # The same samples in shared rows: as mixed, features, uld and llava in rows of their own.
    **{f"packed_mixed_zero{s}": {"deepspeed__stage": s, "data": "mixed", **PACKED} for s in (0, 2, 3)},
    "packed_features_zero0": features(0, data="mixed", **PACKED),
    "packed_llava_zero3": {"deepspeed__stage": 3, "family": "llava", **PACKED},
    "packed_uld_zero0": {
        "deepspeed__stage": 0,
        "family": "pieces",
        "data": "mixed",
        **PACKED,
        "loss": UNLIKE_TOKENIZERS,
    },
    # As DeepSpeed does by itself, parameters as small as these stay whole between the first forward and a gathering.
    "persistent_zero3": {"deepspeed__stage": 3, "persistent": True},
    # Student and teacher with different tokenizers: groups of tokens are compared.
    **{
        f"uld_zero{stage}": {
            "deepspeed__stage": stage,
            "family": "pieces",
            "data": "mixed",
            "loss": UNLIKE_TOKENIZERS,
        }
        for stage in (0, 2, 3)
    },
    # The student's own answers on some steps, drawn or from a buffer, also where a rank has no picture or sample.
    **{
        f"replay_zero{stage}": {
            "deepspeed__stage": stage,
            "data": "mixed",
            "loss": [{"name": "jsd"}, {"name": "cross_entropy", "weight": 0.5}],
            "on_policy": {"fraction": 0.7, "max_new_tokens": 4, "batch_size": 3, "replay": 8, "importance": {}},
            "training__steps": 5,  # of the data's answers, new ones and old ones
        }
        for stage in (0, 3)
    },
    # The data's answers and the student's own in one step, with losses of their own.
    **{
        f"pairs_zero{stage}": {
            "deepspeed__stage": stage,
            "data": "mixed",
            "loss": [
                {"name": "skew_forward_kl", "answers": "data", "mean": "sequences", "adaptive": True},
                {"name": "skew_reverse_kl", "answers": "own", "mean": "sequences", "adaptive": True, "hold": True},
                {"name": "cross_entropy", "weight": 0.5},
            ],
            "on_policy": {"fraction": 0.7, "max_new_tokens": 4, "pairs": True, "balance": "gradual"},
        }
        for stage in (0, 2, 3)
    },
    # LoRA on the decoder and the vision encoder, the projector trained whole; and adapters alone, on the output layer
    # too, whose base is their teacher: once a second copy of it, and else the student's own.
    **{f"lora_zero{s}": {"deepspeed__stage": s, "family": "lora"} for s in (0, 2, 3)},
    **{f"own_base_zero{s}": {"deepspeed__stage": s, "family": "adapters", "teacher": "student"} for s in (0, 3)},
    "copied_base_zero0": {"deepspeed__stage": 0, "family": "adapters"},
    **{f"several_zero{s}": {"deepspeed__stage": s, **SEVERAL} for s in (0, 2, 3)},
    **{f"together_zero{s}": {"deepspeed__stage": s, **TOGETHER} for s in (0, 3)},
    **{
        f"several_own_zero{s}": {
            "deepspeed__stage": s,
            **SEVERAL,
            "loss": [{"name": "jsd"}, {"name": "cross_entropy", "weight": 0.5}],
            "on_policy": {"fraction": 0.7, "max_new_tokens": 4},
        }
        for s in (0, 3)
    },
    **{f"mixtures_zero{s}": {"deepspeed__stage": s, **MIXTURES} for s in (0, 3)},
    # The student's own moving average teaches it, and sees the answers.
    **{f"ema_zero{s}": {"deepspeed__stage": s, **SELF} for s in (0, 2, 3)},
    # Videos among images and texts, some broken; the student and its teacher of another family take them as such.
    **{
        f"videos_zero{s}": {
            "deepspeed__stage": s,
            "family": "videos",
            "data": "videos",
            "data__max_length": 512,
            "data__video": {"fps": 1, "max_frames": 4},
        }
        for s in (0, 3)
    },
    "checkpointing_zero2": {"deepspeed__stage": 2, "training__activation_checkpointing": True},
    # A frozen vision encoder that is the teacher's runs in the teacher alone, in rows of their own and in shared ones.
    **{
        f"seeing_{way}_zero{s}": {
            "deepspeed__stage": s,
            "data": "mixed",
            **(PACKED if way == "packed" else {}),
            "student": {"from_teacher": {"layers": 2}, "train": ["projector", "decoder"]},
        }
        for way, stages in (("once", (0, 2, 3)), ("packed", (0,)))
        for s in stages
    },
    "frozen_zero2": {"deepspeed__stage": 2, "student": {**tiny.settings(), "train": ["projector", "decoder"]}},
    # Other optimizers than AdamW; ZeRO reassembles Muon's matrices.
    "sgd_zero2": {"deepspeed__stage": 2, "optimizer__name": "sgd", "optimizer__lr": 0.1},
    **{
        f"muon_zero{s}": {
            "deepspeed__stage": s,
            "optimizer__name": "muon",
            "optimizer__muon_lr": 0.01,
            "optimizer__max_grad_norm": None,
            "training__steps": 5,  # docs/training.md says how near they are then
        }
        for s in (0, 2)
    },
}
GREEDY = {"loss": [{"name": "jsd"}], "on_policy": {"fraction": 1.0, "max_new_tokens": 4, "temperature": 0.0}}
DROPOUT = tiny.settings()
DROPOUT["decoder"]["config"]["attention_dropout"] = 0.2
BATCH_NORM = tiny.settings()
BATCH_NORM["vision_encoder"] = {
    "source": "timm",
    "name": "resnet10t",
    "config": {"channels": [8, 8, 8, 8], "stem_width": 8},
    "image_size": 32,
}
TWO_RANKS = {
    "llava_shard_zero3": {"deepspeed__stage": 3, "family": "llava", "teacher": "shard"},
    "language_shard_zero2": {"deepspeed__stage": 2, "family": "language", "teacher": "shard"},
    "uld_shard_zero3": {**SHARED["uld_zero3"], "teacher": "shard", "data": "mixed_eval"},
    "replay_shard_zero3": {**SHARED["replay_zero3"], "teacher": "shard"},
    "dropout_zero2": {"deepspeed__stage": 2, "student": DROPOUT},
    # A checkpoint averages the ranks' running statistics, so that both runs have to write it.
    "batchnorm_zero2": {"deepspeed__stage": 2, "student": BATCH_NORM, "training__checkpoint_every": 2},
    "shard_zero2": {"deepspeed__stage": 2, "teacher": "shard"},
    "shard_zero3": {"deepspeed__stage": 3, "teacher": "shard"},
    "hidden_llava_zero3": {"deepspeed__stage": 3, "family": "llava", "teacher": "hidden"},
    # A server draws the answers that the student itself would.
    **{
        f"{name}_zero3": {"deepspeed__stage": 3, "family": "llava", "data": "mixed", **GREEDY, "drawn_on_server": way}
        for name, way in (("greedy", ""), ("rollouts", "folder"), ("sent", "nccl"))
    },
    "cut_shard_zero3": {"deepspeed__stage": 3, "teacher": "shard", "student": {"from_teacher": CUT}},
    "text_shard_zero3": {"deepspeed__stage": 3, "family": "language", "data": "text", "teacher": "shard"},
    # Shares in main memory: the teacher's, and the student's optimizer and parameters; and what ZeRO++ does.
    "offload_teacher_zero2": {"deepspeed__stage": 2, "teacher": "offload"},
    "offload_teacher_llava_zero3": {"deepspeed__stage": 3, "family": "llava", "teacher": "offload"},
    "offload_zero2": {"deepspeed__stage": 2, "zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
    "offload_zero3": {
        "deepspeed__stage": 3,
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
    },
    "hpz_zero3": {"deepspeed__stage": 3, "zero_optimization": {"zero_hpz_partition_size": 2}},
    # Both ranks share the samples' tokens.
    **{f"sequence_zero{s}": {"deepspeed__stage": s, "training__sequence_parallel": 2} for s in (0, 2, 3)},
    "sequence_mixed_zero2": {"deepspeed__stage": 2, "data": "mixed", "training__sequence_parallel": 2},
    "sequence_llava_zero3": {"deepspeed__stage": 3, "family": "llava", "training__sequence_parallel": 2},
    "sequence_checkpointing_zero2": {
        "deepspeed__stage": 2,
        "training__sequence_parallel": 2,
        "training__activation_checkpointing": True,
    },
    # The second teacher in shards: it runs on both ranks in every micro-batch.
    **{
        f"{name}_shard_zero{s}": {
            **SHARED[f"{name}_zero{s}"],
            "teachers": {"big": {"path": "teacher"}, "other": {"path": "llava_teacher", "placement": "shard"}},
            "data": "eval",
        }
        for name, s in (("several", 2), ("several", 3), ("together", 3), ("mixtures", 3))
    },
    "bf16_zero0": {"deepspeed__stage": 0, "training__dtype": "bf16"},
    "bf16_zero2": {"deepspeed__stage": 2, "training__dtype": "bf16"},
    "bf16_zero3": {"deepspeed__stage": 3, "training__dtype": "bf16"},
    "bf16_ema_zero2": {"deepspeed__stage": 2, "training__dtype": "bf16", **SELF},
    "features_shard_zero2": features(2, teacher="shard", data="mixed"),
    "at_images_shard_zero3": features(3, AT_IMAGES, teacher="shard", data="mixed"),
    "features_llava_shard_zero3": features(3, teacher="shard", family="llava"),
    **{f"bf16_features_zero{s}": features(s, training__dtype="bf16", data="mixed") for s in (0, 2, 3)},
    "eval_zero3": {"deepspeed__stage": 3, "data": "eval"},
    "eval_frozen_zero3": {
        "deepspeed__stage": 3,
        "data": "eval",
        "student": {**tiny.settings(), "train": ["projector", "decoder"]},
        "evaluation__every": 2,
    },
    "lora_checkpointing_zero3": {
        "deepspeed__stage": 3,
        "family": "lora",
        "training__activation_checkpointing": True,
    },
    "lora_bf16_zero2": {"deepspeed__stage": 2, "family": "lora", "training__dtype": "bf16"},
    "shard_mixed_zero3": {"deepspeed__stage": 3, "teacher": "shard", "data": "mixed_eval"},
}
# Stopped after two steps and started again, to be compared with the run that was not.
RESUMED = [*(f"zero{stage}" for stage in range(4)), "bf16_zero0", "bf16_zero2", "bf16_zero3"]
RESUMED += [
    "own_base_zero3",
    "lora_bf16_zero2",
    "persistent_zero3",
    "dropout_zero2",
    "batchnorm_zero2",
    "ctkd_instance_zero3",
    "replay_zero3",
]
RESUMED += ["at_images_zero3", "matched_zero3", "pairs_zero2", "ema_zero3", "several_zero3"]
RESUMED += [*(f"features_zero{stage}" for stage in range(4)), "bf16_features_zero2"]
TWO_RANKS |= {f"resumed_{name}": {**(SHARED | TWO_RANKS)[name], "stop": 2} for name in RESUMED}

#: Near to another one, on any number of ranks.
NEAR = {
    *("zero1", "language_zero0", "language_zero3", "packed_llava_zero3", "language_shard_zero2", "text_shard_zero3"),
    *("offload_teacher_llava_zero3", "hpz_zero3", "sequence_zero0", "sequence_zero3", "sequence_checkpointing_zero2"),
    *("bf16_features_zero0", "bf16_features_zero2", "features_shard_zero2", "features_llava_shard_zero3"),
    *("lora_checkpointing_zero3", "cut_shard_zero3", "bf16_zero3", "eval_zero3", "frozen_zero2"),
    *("features_llava_zero0", "features_llava_zero3", "relations_zero0", "relations_zero3", "seeing_packed_zero0"),
    *("packed_features_zero0", "packed_uld_zero0", "packed_at_images_zero0", "sequence_mixed_zero2"),
    *("sequence_llava_zero3", "pairs_zero2", "pairs_zero3", "ema_zero3", "bf16_ema_zero2", "shard_zero2"),
    *("several_shard_zero2", "together_zero0", "together_zero3", "together_shard_zero3", "mixtures_zero0"),
    *("mixtures_zero3", "mixtures_shard_zero3", "offload_zero3", "llava_shard_zero3", "uld_shard_zero3"),
    *("greedy_zero3", "rollouts_zero3", "sent_zero3", "own_base_zero3", "ctkd_instance_zero3", "several_own_zero3"),
    *("at_images_shard_zero3", "bf16_features_zero3", "own_zero3", "shard_mixed_zero3"),
    *(f"resumed_{name}" for name in RESUMED if name != "zero3"),
}


def slow(world: int, name: str) -> bool:
    """Return whether ``make test`` skips a scenario on this number of ranks."""
    return is_slow(world, name, SHARED.keys(), NEAR)


def sharded_inference(dtype: torch.dtype, offload: bool = False, settings: Any = engine._inference_config) -> dict:
    config = settings(dtype, offload)
    return {**config, "zero_optimization": {**config["zero_optimization"], **WHOLLY_SHARDED}}


def start_server(model: Path, *, pools: bool = False) -> ScoringServer:
    """Serve a model from a thread until the process ends."""
    server = ScoringServer(load_vlm(model, dtype="float32").eval(), pools=pools)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main(folder: Path) -> None:
    engine._inference_config = sharded_inference
    processes = Processes("cpu")
    if processes.first:
        tiny.write_data(folder / "plain")
        tiny.write_data(folder / "mixed", text_only=(0, 1, 2, 3, 8, 9, 14, 15), broken=(4, 5, 6, 7, 20))
        tiny.write_data(folder / "language", text_only=tuple(range(24)))
        tiny.write_data(folder / "text", text_only=tuple(range(24)))
        tiny.write_text(folder / "text")
        tiny.write_teacher(folder / "teacher")
        tiny.write_language_model(folder / "language_teacher")
        tiny.write_pieces_teacher(folder / "pieces_teacher")
        tiny.write_llava(folder / "llava_teacher", layers=3)
        tiny.write_llava(folder / "llava_student", layers=2)
        clips.write_data(folder / "videos", rounds=6)
        maker = families.Maker(make_tokenizer)
        maker.write("llava_onevision", folder / "videos_teacher")
        maker.write("qwen2_5_vl", folder / "videos_student")
    processes.barrier()
    torch.compiler.set_stance("force_eager")  # compiling Muon's iteration takes longer than all else
    gc.freeze()  # ZeRO-3 collects garbage when it starts: a second for what is imported, which lives anyway
    for name, changes in (SHARED | (TWO_RANKS if processes.world > 1 else {})).items():
        if slow(processes.world, name) != folder.name.endswith("slow"):
            continue
        out = folder / f"ranks{processes.world}" / name
        if processes.first:
            shutil.rmtree(out, ignore_errors=True)
        try:
            result = run(folder, out, dict(changes), processes)
        except Exception:
            result = {"error": traceback.format_exc()}
        if processes.first:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.with_suffix(".json").write_text(json.dumps(result))
        if "error" in result:
            print(name, result["error"], file=sys.stderr, flush=True)
            sys.exit(1)
    processes.close()


def run(folder: Path, out: Path, changes: dict, processes: Processes) -> dict:
    family, stop = changes.pop("family", ""), changes.pop("stop", None)
    more = changes.pop("zero_optimization", {})
    teachers, lessons = changes.pop("teachers", {}), changes.pop("lessons", [])
    if not changes.pop("persistent", False):
        changes["deepspeed__zero_optimization"] = WHOLLY_SHARDED | more
    kind = changes.pop("data", "language" if family == "language" else "plain")
    if family in ("llava", "videos"):
        changes["student"] = {"path": str(folder / f"{family}_student")}
    elif family == "language":
        changes["student"] = {"decoder": tiny.settings()["decoder"]}
    elif family == "lora":
        lora = {"rank": 2, "parts": ["vision_encoder", "decoder"]}
        changes["student"] = {"path": str(folder / "teacher"), "lora": lora, "train": ["projector"]}
    elif family == "self":
        changes["student"] = {"path": str(folder / "teacher")}
    elif family == "adapters":
        lora = {"rank": 2, "target": ["q_proj", "down_proj", "lm_head"]}
        changes["student"] = {"path": str(folder / "teacher"), "lora": lora}
    elif family == "pieces":
        changes["student"] = {**tiny.settings(), "tokenizer": str(folder / "pieces_teacher" / "student")}
    data = folder / kind.removesuffix("_eval").replace("eval", "plain") / "data.jsonl"
    placement, drawn_on_server = changes.pop("teacher", "replicate"), changes.pop("drawn_on_server", "")
    teacher = folder / (f"{family}_teacher" if family in ("llava", "language", "pieces", "videos") else "teacher")
    changes.setdefault("training__steps", 3)
    plain = tiny.config(out, data, teacher, **changes)
    if isinstance(placement, dict):
        plain["teacher"] = placement
    elif placement == "hidden":
        url = processes.gather(start_server(teacher, pools=True).url if processes.first else "")[0]
        plain["teacher"]["server"] = {"url": url, "model": "teacher-1", "form": "hidden"}
        plain["evaluation"]["teacher"] = False
    elif placement == "student":
        plain["teacher"] = {"from_student": True}
        kind = "eval"
    else:
        plain["teacher"]["placement"] = placement
    if drawn_on_server:
        student = folder / "llava_student"
        server = start_server(student) if processes.first else None
        section = {"url": processes.gather(server.url if server else "")[0], "model": "teacher-1"}
        section |= receive(server, student, out) if drawn_on_server == "nccl" else {"folder": str(out / "weights")}
        plain["on_policy"] = {**plain["on_policy"], "server": section}
    if teachers:
        del plain["teacher"]
        plain["teachers"] = {n: {**section, "path": str(folder / section["path"])} for n, section in teachers.items()}
        named = [dict(zip(("name", "teacher", "combine", "limit"), lesson, strict=True)) for lesson in lessons]
        plain["data"]["train"] = [{"path": str(folder / one["name"] / "data.jsonl"), **one} for one in named]
    if kind.endswith("eval"):
        plain["data"]["eval"] = [{"path": str(data), "name": "questions", "limit": 13}]
    if kind == "text":
        text = {"path": str(data.with_name("text.jsonl")), "format": "text", "name": "text"}
        plain["data"] |= {"train": [*plain["data"]["train"], text], "eval": [text, {"path": str(data), "limit": 13}]}
        plain["data"] |= {"answers": "last", "max_length": 16}
        plain["evaluation"] |= {"measures": ["rouge_l", "perplexity", "kl"], "every": 2, "best": "text/kl", "limit": 5}
    config = RunConfig.model_validate(plain)
    if stop:
        Trainer(config, processes).run(stop)
    trainer = Trainer(config, processes)
    before = {name: tensor.clone() for name, tensor in trainer.engine.whole_state(trainer.student).items()}
    averages = plain_averages(trainer) if trainer.teacher is not None and trainer.teacher.ema else {}
    trainer.run()
    state = {name: tensor.clone() for name, tensor in trainer.engine.whole_state(trainer.student).items()}
    learned = torch.nn.ModuleList(m for m in trainer.engine.task.losses.modules() if isinstance(m, torch.nn.Linear))
    weights = state | {f"losses.{name}": tensor for name, tensor in trainer.engine.whole_state(learned).items()}
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] if processes.first else []
    return {
        "metrics": metrics,
        "statistics": processes.gather([b.tolist() for n, b in trainer.student.named_buffers() if "running_" in n]),
        "held_out": held_out(trainer, processes),
        "weights": {name: tensor.float().flatten()[:64].tolist() for name, tensor in weights.items()},
        "exported": sorted(load_file(out / "student" / "model.safetensors")) if processes.first else [],
        "evaluated": sorted(path.parent.name for path in out.glob("evaluation/*/*/scores.json")),
        "t": processes.gather([t.loss.metrics()["t"] for t in trainer.terms if "t" in t.loss.metrics()]),
        "moved": {name: not torch.equal(tensor, before[name]) for name, tensor in state.items()},
        "averages": {
            n: [(trainer.teacher.averages[n] - a).abs().max().item(), a.std().item()] for n, a in averages.items()
        },
        "teacher_keys": [k for k in trainer.engine.task.state_dict() if "teacher" in k],
    }


def plain_averages(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Averages of the weights after every step, on the first rank, in float64, beside those of the teacher."""
    decay, follow = trainer.teacher.ema, trainer.after_update
    averages = {n: tensor.double() for n, tensor in trainer.engine.whole_state(trainer.student).items()}

    def after_update(step: int) -> None:
        follow(step)
        for name, tensor in trainer.engine.whole_state(trainer.student).items():
            averages[name] = decay * averages[name] + (1 - decay) * tensor.double()

    trainer.after_update = after_update
    return averages


@torch.no_grad()
def held_out(trainer: Trainer, processes: Processes) -> float:
    """The trained student's loss on the first step's samples, without a gradient."""
    trainer.engine.train(False)
    sums = []
    for batch in trainer.dataset[0].batches:
        targets = trainer.loss_teacher.outputs(batch, trainer.features) if trainer.loss_teacher is not None else None
        loss, _ = trainer.engine(batch, targets)
        assert not loss.requires_grad
        sums.append(loss)
    return processes.sum([sum(sums)])[0]


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)
    main(Path(sys.argv[-1]))
    leave(0)
