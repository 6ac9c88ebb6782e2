"""One rank of filling a run's caches: ``deepspeed --num_gpus 8 --module vlm_distill.cache CONFIG [key=value …]``."""

from __future__ import annotations

from vlm_distill.runtime.launch import leave
from vlm_distill.train import main

if __name__ == "__main__":
    leave(main(trainer="vlm_distill.caching.fill", work="fill"))
