"""The losses inside other training libraries. Nothing here imports more of ours than :mod:`vlm_distill.losses`."""
