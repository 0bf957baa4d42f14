"""Linear layers of a CPU model, done by whoever is fastest here (engine.native.products)."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import nn

from bucketserve.engine.native.products import Lookup, Product, Products

__all__ = ["PlacedEmbedding", "PlacedLinear", "num_multiplied", "place_linears"]

TRIED_ROWS = 64
"""Of an embedding that shares its weights, compared with the lookup that takes its place."""


class PlacedLinear(nn.Module):
    """Computes what its nn.Linear computed. `weight` is a stand-in that knows shape and type only."""

    def __init__(self, linear: nn.Linear, product: Product) -> None:
        """Takes the product with the layer's weights; those of `linear` may be freed."""
        super().__init__()
        self._product = product
        self.num_bytes = product.num_bytes
        self.weight = torch.empty(linear.weight.shape, dtype=linear.weight.dtype, device="meta")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns hidden [..., in_features] times the weights, [..., out_features]."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        out = torch.empty(rows.shape[0], self._product.columns, dtype=hidden.dtype)
        return self._product.write(rows, out).view(*hidden.shape[:-1], -1)


class PlacedEmbedding(nn.Module):
    """Looks up what its nn.Embedding looked up, in weights that it shares with the head."""

    def __init__(self, embedding: nn.Embedding, lookup: Lookup) -> None:
        """Takes the lookup, and the factor by which some models multiply."""
        super().__init__()
        self._lookup = lookup
        scale = getattr(embedding, "embed_scale", None)
        self._scale = None if scale is None else torch.as_tensor(scale).to(embedding.weight.dtype)
        self.weight = torch.empty(embedding.weight.shape, dtype=embedding.weight.dtype, device="meta")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns the rows of ids [...], [..., width]."""
        rows = self._lookup(ids.flatten()).view(*ids.shape, -1)
        return rows if self._scale is None else rows * self._scale


@torch.inference_mode()
def place_linears(model: nn.Module, products: Products, read: Collection[int] = ()) -> list[PlacedLinear]:
    """Replaces every nn.Linear of a CPU model in place; returns the new ones.

    A head that shares its weights with the embedding is replaced together with it, or stays as it is where there would
    be two copies of the same numbers. So does whatever shares weights in another way, and what the model reads itself.

    Args:
        model: on the CPU.
        products: for the products.
        read: Probed.read.
    """
    shared = _shared_weights(model)
    placed = []
    # By name: what is replaced is freed at once, so that no more than one layer is in memory twice.
    for parent, name in [(parent, name) for parent, name, _ in _children(model)]:
        child = getattr(parent, name)
        if type(child) is nn.Linear and id(child.weight) not in {*shared, *read}:
            placed.append(PlacedLinear(child, products.linear([child.weight], child.bias)))
            setattr(parent, name, placed[-1])
    tied = [users for weight, users in shared.items() if weight not in read]
    return placed + [head for users in tied for head in _place_tied(users, products)]


def num_multiplied(model: nn.Module) -> int:
    """Returns how many weights a model has still that are not just looked up."""
    users = (module for module in model.modules() if not isinstance(module, nn.Embedding))
    return sum({id(p): p.numel() for user in users for p in user.parameters(recurse=False)}.values())


def _place_tied(users: list[tuple[nn.Module, str, nn.Module]], products: Products) -> list[PlacedLinear]:
    """Replaces a head and an embedding, if that is what shares the weights; returns the new head."""
    linears = [user for user in users if type(user[2]) is nn.Linear and user[2].bias is None]
    embeddings = [user for user in users if isinstance(user[2], nn.Embedding)]
    if (len(users), len(linears), len(embeddings)) != (2, 1, 1):
        return []
    (parent, name, linear), (embedding_parent, embedding_name, embedding) = linears[0], embeddings[0]
    assert isinstance(linear, nn.Linear)
    assert isinstance(embedding, nn.Embedding)
    tied = products.tied(linear.weight)
    if tied is None:
        return []
    product, lookup = tied
    if lookup is not None:
        looked_up = PlacedEmbedding(embedding, lookup)
        ids = torch.linspace(0, embedding.num_embeddings - 1, TRIED_ROWS).long()[None]
        if not torch.equal(looked_up(ids), embedding(ids)):
            return []
        setattr(embedding_parent, embedding_name, looked_up)
    head = PlacedLinear(linear, product)
    setattr(parent, name, head)
    return [head]


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yields each module with its parent and what it is called there."""
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child


def _shared_weights(model: nn.Module) -> dict[int, list[tuple[nn.Module, str, nn.Module]]]:
    """Returns who uses each parameter that several modules use, by id() of it."""
    uses: dict[int, list[tuple[nn.Module, str, nn.Module]]] = {}
    for user in _children(model):
        for parameter in user[2].parameters(recurse=False):
            uses.setdefault(id(parameter), []).append(user)
    return {key: users for key, users in uses.items() if len(users) > 1}
