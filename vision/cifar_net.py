"""What timm expects of a network, for those of the distillation papers: levels, pooling and a linear layer."""

from __future__ import annotations

from typing import Any

from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

#: The group of what comes between the last block and the pooling, in timm's order of layers.
_LAST = 99999


class CifarNet(nn.Module):
    """Methods that timm expects of a network.

    A subclass sets ``feature_info`` and the layer ``head_name``, and answers :meth:`level` and, if something comes
    between the last level and the pooling, :meth:`finish`.
    """

    head_name, stem_name = "fc", "conv1"
    #: Standard deviation of the classification layer's first weights, with biases of 0; ``None``: PyTorch's.
    head_std: float | None = None
    feature_info: list[dict[str, Any]]

    def __init__(self, num_classes: int, num_features: int, global_pool: str) -> None:
        super().__init__()
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool is 'avg' or '' here, not '{global_pool}'")
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = num_features
        self.global_pool = global_pool
        self.grad_checkpointing = False

    def level(self, index: int, x: Tensor) -> Tensor:
        """Return the output of a level of ``feature_info`` from that of the level before."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """Apply what comes between the last level and the pooling."""
        return x

    def initialise(self) -> None:
        """Draw the weights of convolutions from a normal distribution that depends on their outputs."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def make_head(self, num_classes: int) -> nn.Module:
        """Return a classification layer, or the identity for no classes."""
        if num_classes <= 0:
            return nn.Identity()
        head = nn.Linear(self.num_features, num_classes)
        if self.head_std is not None:
            nn.init.normal_(head.weight, 0.0, self.head_std)
            nn.init.zeros_(head.bias)
        return head

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the final features and the levels at ``indices``, or only the levels, as timm does."""
        assert output_fmt == "NCHW"
        count = len(self.feature_info)
        wanted, last = feature_take_indices(count, indices)
        found = []
        for index in range(last + 1 if stop_early and intermediates_only else count):
            again = self.grad_checkpointing and self.training
            x = checkpoint(self.level, index, x) if again else self.level(index, x)
            if index in wanted:
                found.append(self.finish(x) if norm and index == count - 1 else x)
        return found if intermediates_only else (self.finish(x), found)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.forward_intermediates(x, indices=[0])[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool:
            x = x.mean((2, 3))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return getattr(self, self.head_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        old = next(self.parameters())
        setattr(self, self.head_name, self.make_head(num_classes).to(old.device, old.dtype).train(self.training))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^(?:layer|block|blocks\.)(\d+)" if coarse else r"^(?:layer|block|blocks\.)(\d+)\.\D*(\d+)"
        return {"stem": r"^(?:conv1|bn1)", "blocks": [(blocks, None), (r"^(?:conv2|bn2)", (_LAST,))]}
