"""A loss as users write their own (docs/plugins.md)."""

from vlm_distill.losses import Divergence


class Hellinger(Divergence):
    """Squared Hellinger distance."""

    def value(self, log_p, log_q):
        return 1 - ((log_p + log_q) / 2).exp().sum(-1)
