"""``python -m vlm_distill.cli``, the same as ``vlm-distill``."""

from vlm_distill.cli import main

main()
