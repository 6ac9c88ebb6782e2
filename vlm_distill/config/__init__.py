"""The typed configuration of a run, its checks across sections, and the YAML it is read from."""

from vlm_distill.neighbours import check_neighbours

check_neighbours()
