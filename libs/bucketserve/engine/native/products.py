"""Products with a model's weights on CPU, by whoever does them fastest here: our kernels, oneDNN or torch's BLAS."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F

from bucketserve.engine.native.kernels import Epilogue, Kernels, PackedWeights

__all__ = [
    "ACTIVATIONS",
    "GatedProduct",
    "KernelProducts",
    "OneDnnProducts",
    "Product",
    "Products",
    "TorchProducts",
    "choose_products",
]

TRIAL_ROWS = {256: 1, 8: 8}
"""Rows of a product and how often it counts: a step of prompts, and eight of decoding."""
TRIALS = 6
TRIAL_COLUMNS = 8_192
"""Most of a trial: a head may have many more, each of which costs the same."""

ACTIVATIONS: Mapping[Epilogue, Callable[[torch.Tensor], torch.Tensor]] = {
    Epilogue.SILU_MUL: F.silu,
    Epilogue.GELU_MUL: partial(F.gelu, approximate="tanh"),
}
"""Of gated products."""


class GatedProduct(Protocol):
    """Weights of gate and up, ready: activation(gate x) times (up x). x is [rows, depth], contiguous."""

    columns: int
    num_bytes: int

    def write(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Returns the result, [rows, columns]; `out` may be used for it."""


class Product(Protocol):
    """Weights [columns, depth], ready to be multiplied with. x is [rows, depth], contiguous."""

    columns: int
    num_bytes: int

    def write(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Returns x times the weights, [rows, columns]; `out` may be used for it."""

    def add(self, x: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
        """Returns the same added to `onto`, which may be overwritten."""


Lookup = Callable[[torch.Tensor], torch.Tensor]
"""Returns rows [n, depth] of weights [columns, depth], for ids [n]."""


class Products(Protocol):
    """Makes products of weights."""

    name: str
    wants_float32: bool
    """Whether activations in float32 cost it nothing, whatever the weights are."""

    def tied(self, weight: torch.Tensor) -> tuple[Product, Lookup | None] | None:
        """Returns the product of a head that shares its weights with an embedding, and what looks rows up in it.

        No lookup: the embedding keeps its weights. None: both stay as they are.
        """

    def linear(self, weights: Sequence[torch.Tensor], bias: torch.Tensor | None) -> Product:
        """Returns one product for weights [columns, depth] given in parts, one under the other."""

    def gated(self, gate: torch.Tensor, up: torch.Tensor, epilogue: Epilogue) -> GatedProduct:
        """Returns one for weights [columns, depth] each; the epilogue is the one with the activation."""


class KernelProducts:
    """By our kernels, optionally with weights rounded to 8 bits."""

    wants_float32 = True

    def __init__(self, kernels: Kernels, *, is_int8: bool = False) -> None:
        """Takes the kernels."""
        self._kernels = kernels
        self._is_int8 = is_int8
        self.name = "own kernels, 8-bit weights" if is_int8 else "own kernels"

    def linear(self, weights: Sequence[torch.Tensor], bias: torch.Tensor | None) -> Product:
        """See Products."""
        return _KernelProduct(self._kernels, self._kernels.pack(weights, bias, is_int8=self._is_int8), Epilogue.WRITE)

    def tied(self, weight: torch.Tensor) -> tuple[Product, Lookup | None] | None:
        """See Products."""
        packed = self._kernels.pack([weight], is_int8=self._is_int8)
        # What is looked up is not rounded.
        return _KernelProduct(self._kernels, packed, Epilogue.WRITE), None if self._is_int8 else packed.rows

    def gated(self, gate: torch.Tensor, up: torch.Tensor, epilogue: Epilogue) -> GatedProduct:
        """See Products."""
        packed = self._kernels.pack([gate, up], is_pair=True, is_int8=self._is_int8)
        return _KernelProduct(self._kernels, packed, epilogue)


class _KernelProduct:
    def __init__(self, kernels: Kernels, packed: PackedWeights, epilogue: Epilogue) -> None:
        self._kernels, self._packed, self._epilogue = kernels, packed, epilogue
        self.columns = packed.columns
        self.num_bytes = packed.num_bytes

    def write(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        self._kernels.product(x, self._packed, out, self._epilogue)
        return out

    def add(self, x: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
        self._kernels.product(x, self._packed, onto, Epilogue.ADD)
        return onto


class OneDnnProducts:
    """By oneDNN, whose bfloat16 uses AMX, which our kernels do not."""

    name = "oneDNN"
    wants_float32 = False

    def __init__(self, kernels: Kernels | None) -> None:
        """Takes the kernels for what oneDNN does not fuse."""
        self._kernels = kernels

    @staticmethod
    def suits(dtype: torch.dtype) -> bool:
        """Whether this processor has instructions for it that are worth it."""
        is_there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return dtype is torch.bfloat16 and is_there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def linear(self, weights: Sequence[torch.Tensor], bias: torch.Tensor | None) -> Product:
        """See Products."""
        return _OneDnnProduct(torch.cat([weight.detach() for weight in weights]), bias)

    def tied(self, weight: torch.Tensor) -> tuple[Product, Lookup | None] | None:
        """See Products."""
        return None

    def gated(self, gate: torch.Tensor, up: torch.Tensor, epilogue: Epilogue) -> GatedProduct:
        """See Products."""
        return _Gated(self.linear([gate, up], None), self._kernels, epilogue)


class _OneDnnProduct:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.columns = weight.shape[0]
        self.num_bytes = weight.numel() * weight.element_size()
        # Laid out once instead of at every call: with few rows that takes as long as the product.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._bias = None if bias is None else bias.detach()

    def write(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return result

    def add(self, x: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, onto, self._packed, self._bias, "add")
        return result


class TorchProducts:
    """By torch's own BLAS."""

    name = "torch"
    wants_float32 = False

    def __init__(self, kernels: Kernels | None) -> None:
        """Takes the kernels for what BLAS does not fuse."""
        self._kernels = kernels

    def linear(self, weights: Sequence[torch.Tensor], bias: torch.Tensor | None) -> Product:
        """See Products."""
        return _TorchProduct(torch.cat([weight.detach() for weight in weights]), bias)

    def tied(self, weight: torch.Tensor) -> tuple[Product, Lookup | None] | None:
        """See Products."""
        return None

    def gated(self, gate: torch.Tensor, up: torch.Tensor, epilogue: Epilogue) -> GatedProduct:
        """See Products."""
        return _Gated(self.linear([gate, up], None), self._kernels, epilogue)


class _TorchProduct:
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.columns = weight.shape[0]
        self.num_bytes = weight.numel() * weight.element_size()
        self._weight = weight
        self._bias = None if bias is None else bias.detach()

    def write(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self._weight, self._bias)

    def add(self, x: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
        if self._bias is not None:
            onto += self._bias
        return torch.addmm(onto, x, self._weight.t(), out=onto)


class _Gated:
    """activation(gate) x up after a product that gives both."""

    def __init__(self, both: Product, kernels: Kernels | None, epilogue: Epilogue) -> None:
        self._both, self._kernels, self._epilogue = both, kernels, epilogue
        self.columns = both.columns // 2
        self.num_bytes = both.num_bytes

    def write(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        both = self._both.write(x, torch.empty(x.shape[0], 2 * self.columns, dtype=x.dtype))
        if self._kernels is None or self.columns % self._kernels.vector:
            gate, up = both.chunk(2, dim=1)
            return ACTIVATIONS[self._epilogue](gate) * up
        self._kernels.gate(both, out, self._epilogue)
        return out


def choose_products(kernels: Kernels | None, dtype: torch.dtype, columns: int, depth: int) -> Products | None:
    """Returns who multiplies weights [columns, depth] fastest on this machine; None to leave the model as it is.

    Takes a fraction of a second: some products by each, with rows as prompts and as decoding have them.
    """
    candidates: list[Products] = []
    if OneDnnProducts.suits(dtype):
        candidates.append(OneDnnProducts(kernels))
    if kernels is not None and dtype in (torch.float32, torch.bfloat16):
        candidates.append(KernelProducts(kernels))
        if dtype is torch.float32:
            candidates.append(TorchProducts(kernels))
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    columns = min(columns, TRIAL_COLUMNS)
    weight = torch.randn(columns, depth, dtype=dtype)
    trials = [candidate.linear([weight], None) for candidate in candidates]
    costs = [0.0] * len(trials)
    for rows, times in TRIAL_ROWS.items():
        x, out = torch.randn(rows, depth, dtype=dtype), torch.empty(rows, columns, dtype=dtype)
        seconds = [[_seconds(product, x, out) for product in trials] for _ in range(TRIALS)]
        costs = [cost + times * min(one) for cost, one in zip(costs, zip(*seconds, strict=True), strict=True)]
    return candidates[costs.index(min(costs))]


def _seconds(product: Product, x: torch.Tensor, out: torch.Tensor) -> float:
    start_s = time.perf_counter()
    product.write(x, out)
    return time.perf_counter() - start_s
