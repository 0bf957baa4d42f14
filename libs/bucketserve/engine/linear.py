"""Linear layers of a CPU model, done by whoever is fastest here (engine.native.products)."""

from __future__ import annotations

import torch
from torch import nn

from bucketserve.engine.native.products import Products

__all__ = ["PlacedLinear", "place_linears", "shared_weights"]


class PlacedLinear(nn.Module):
    """Computes what its nn.Linear computed. `weight` is a stand-in that knows shape and type only."""

    def __init__(self, linear: nn.Linear, products: Products) -> None:
        """Takes over the layer's weights; those of `linear` may be freed."""
        super().__init__()
        weight = linear.weight.detach()
        self._product = products.linear([weight], linear.bias)
        self.num_bytes = self._product.num_bytes
        self.weight = torch.empty(weight.shape, dtype=weight.dtype, device="meta")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns hidden [..., in_features] times the weights, [..., out_features]."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        out = torch.empty(rows.shape[0], self._product.columns, dtype=hidden.dtype)
        return self._product.write(rows, out).view(*hidden.shape[:-1], -1)


@torch.inference_mode()
def place_linears(model: nn.Module, products: Products) -> list[PlacedLinear]:
    """Replaces every nn.Linear of a CPU model in place; returns the new ones.

    Layers whose weights are shared with others, such as a tied LM head, stay as they are: there would be two copies.
    """
    shared = shared_weights(model)
    placed = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and id(child.weight) not in shared:
                placed.append(PlacedLinear(child, products))
                setattr(parent, name, placed[-1])
    return placed


def shared_weights(model: nn.Module) -> set[int]:
    """Returns id() of each parameter that several modules use."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return {key for key, number in uses.items() if number > 1}
