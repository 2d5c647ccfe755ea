"""Linear layers of a frozen model on a CPU, with weights packed once for oneDNN's matrix products.

torch multiplies float32 by MKL, which reads the weights in their usual layout. oneDNN's products with weights in its own layout
are faster where there are few rows, as in decoding, and where MKL does not know the processor. The last digits differ.
"""

from __future__ import annotations

import torch
from torch import nn

_ROWS = 32  # the layout is chosen for so many rows; other numbers were measured to be as fast with it


class PackedLinear(nn.Module):
    """`nn.Linear` for inference. Its weight is held once, packed; reading `weight` unpacks a copy."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)

    @property
    def weight(self) -> torch.Tensor:
        """The weight `[out_features, in_features]`."""
        return self._packed.to_dense()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        return torch.ops.mkldnn._linear_pointwise(states, self._packed, self.bias, "none", [], "")


def pack_linears(model: nn.Module) -> None:
    """Replace the float32 linear layers of a model on a CPU. It cannot be trained or saved afterwards."""
    if not torch.backends.mkldnn.is_available():
        return
    with torch.inference_mode():
        for module in list(model.modules()):
            for name, layer in list(module.named_children()):
                if (
                    type(layer) is nn.Linear
                    and layer.weight.device.type == "cpu"
                    and layer.weight.dtype == torch.float32
                ):
                    setattr(module, name, PackedLinear(layer))
