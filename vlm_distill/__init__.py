"""vlm-distill: distil a large vision-language model into a small one."""

__version__ = "0.1.0"
