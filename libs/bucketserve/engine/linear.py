"""Linear layers of bfloat16 models with weights laid out once for oneDNN, instead of at every call.

Decode steps have few rows, and there rearranging the weights takes as long as the product. torch.compile with freezing
does the same, but needs a C++ compiler where the worker runs. float32 stays as it is: MKL's own product is as fast over
a whole run (docs/benchmarks.md).
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["PackedLinear", "pack_linears"]


class PackedLinear(nn.Module):
    """Computes what its nn.Linear computed. `weight` is a stand-in that knows shape and type only."""

    def __init__(self, linear: nn.Linear) -> None:
        """Takes over the layer's weights; those of `linear` may be freed."""
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.num_bytes = weight.numel() * weight.element_size()
        # Not a buffer: an opaque tensor of oneDNN can't be moved or saved.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.weight = torch.empty(weight.shape, dtype=weight.dtype, device="meta")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns hidden [..., in_features] times the weights, [..., out_features]."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self._packed, self.bias, "none", [], "")
        return out


@torch.inference_mode()
def pack_linears(model: nn.Module) -> int:
    """Replaces every bfloat16 nn.Linear of a CPU model in place; returns how many.

    Layers whose weights are shared with others, such as a tied LM head, stay as they are: packing would copy them.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    number = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child.weight.device.type != "cpu":
                continue
            if child.weight.dtype is torch.bfloat16 and uses[id(child.weight)] == 1:
                setattr(parent, name, PackedLinear(child))
                number += 1
    return number
