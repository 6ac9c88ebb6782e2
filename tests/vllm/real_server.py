"""A real vLLM server on loopback, on a CPU, and models small enough for one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import byte_tokenizer
import families
import torch
import transformers as hf

#: The environment that tests/vllm/environment.sh makes.
ENVIRONMENT = Path(os.environ.get("VLLM", ".venv-vllm")).absolute()
#: Seconds that a server may take to start.
START = 420
POOLING = ("--runner", "pooling", "--convert", "embed", "--pooler-config.task", "token_embed")
#: Two heads of 64: vLLM's attention on CPUs was tried with these.
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # /collective_rpc, for rollouts
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Server:
    """A vLLM server of one model, under a name; its log is kept beside the model."""

    def __init__(self, folder: Path, name: str, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.log = folder.with_name(f"{folder.name}_{self.port}.log")
        self.command = [
            *(str(ENVIRONMENT / "bin" / "vllm"), "serve", str(folder), "--served-model-name", name),
            *("--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--max-model-len", "1024"),
            *("--no-enable-prefix-caching", "--enforce-eager", "--gpu-memory-utilization", "0.3", *options),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RANK", "WORLD"))}
        path = f"{ENVIRONMENT / 'bin'}{os.pathsep}{kept['PATH']}"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env={**kept, **SETTINGS, "PATH": path}, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + START
        while time.monotonic() < until:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                assert self.process.poll() is None, self.log.read_text()[-4000:]
                time.sleep(1)
        raise TimeoutError(f"vLLM did not start within {START} s: {self.log.read_text()[-4000:]}")

    def kill(self) -> None:
        """Kill the server and its processes."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextmanager
def serving(folder: Path, name: str, *options: str) -> Iterator[Server]:
    """Serve a model while the context lasts."""
    server = Server(folder, name, *options)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def write_text_model(folder: Path, layers: int, words: int = 0, **sizes: int) -> Path:
    """A Llama of a few layers with a byte tokenizer; with ``words``, one that has other tokens."""
    torch.manual_seed(layers)
    extra = ["<|im_start|>", *(f"<|{number}|>" for number in range(words))]
    tokenizer = byte_tokenizer.make_tokenizer(families.template("", "chatml"), extra=extra)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = hf.LlamaConfig(**SIZES | sizes, vocab_size=len(tokenizer), num_hidden_layers=layers, **ends)
    model = hf.LlamaForCausalLM(config)
    _sharpen(model.model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_vision_model(folder: Path, layers: int, *, tied: bool = True, **sizes: int) -> Path:
    """A Qwen2.5-VL of a few layers with a byte tokenizer."""
    torch.manual_seed(layers)
    maker = families.Maker(byte_tokenizer.make_tokenizer)
    tokenizer = maker.tokenizer("<|image_pad|>")
    text = families.TEXT | SIZES | sizes | {"vocab_size": len(tokenizer), "num_hidden_layers": layers}
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e4}
    vision = {"depth": 2, "num_heads": 2, "hidden_size": 128, "intermediate_size": 192, "patch_size": 14}
    vision |= {"spatial_merge_size": 2, "out_hidden_size": text["hidden_size"], "fullatt_block_indexes": [1]}
    config = hf.Qwen2_5_VLConfig(
        vision_config=vision | {"window_size": 28},
        text_config=text | {"rope_parameters": rope, "tie_word_embeddings": tied},
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    pixels = {"shortest_edge": 28**2, "longest_edge": 6 * 28**2}
    images = hf.Qwen2VLImageProcessor(size=pixels, patch_size=14)
    videos = hf.Qwen2VLVideoProcessor(size=pixels, patch_size=14)
    shown = families.template("<|vision_start|><|image_pad|><|vision_end|>", "chatml")
    model = hf.Qwen2_5_VLForConditionalGeneration(config)
    _sharpen(model.get_decoder())
    model.save_pretrained(folder)
    hf.Qwen2_5_VLProcessor(images, tokenizer, videos, shown).save_pretrained(folder)
    return folder


def _sharpen(decoder: torch.nn.Module) -> None:
    """Make matrices larger, so that distributions are far from flat."""
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)


def write_questions(path: Path) -> Path:
    """Questions that SmolLM2 knows answers to."""
    talks = [("What is the capital of France?", "Paris."), ("What is 2 + 2?", "It is four."), ("Say hello.", "Hello!")]
    lines = []
    for question, answer in talks * 4:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps({"conversations": turns}))
    path.write_text("\n".join(lines) + "\n")
    return path
