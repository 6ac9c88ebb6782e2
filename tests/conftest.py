"""Nothing in the tests reaches for the network, and no process takes more than its share of the cores."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu" if "VLM_DISTILL_GPU_TESTS" not in os.environ else "cuda")
