"""vlm-distill: a large vision-language model distilled into a small one."""

__version__ = "0.1.0"
