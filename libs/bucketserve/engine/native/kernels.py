"""The compiled kernels as functions of tensors. All but race write into tensors that the caller gives."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from bucketserve.core.errors import EngineError
from bucketserve.engine.native.library import load_library

__all__ = ["Epilogue", "Kernels", "PackedWeights", "load_kernels"]

_HALF = torch.bfloat16
_DTYPES = (torch.float32, torch.bfloat16)


def _is_half(*tensors: torch.Tensor) -> bool:
    """Whether tensors are bfloat16; else they are float32.

    Raises:
        EngineError: they are something else, or not all the same: the kernels would read past their ends.
    """
    dtype = tensors[0].dtype
    if dtype not in _DTYPES or any(tensor.dtype is not dtype for tensor in tensors):
        raise EngineError(f"the CPU kernels take float32 or bfloat16, not {_names(tensors)}")
    return dtype is _HALF


def _types(*tensors: torch.Tensor) -> tuple[bool, bool]:
    """Whether activations are bfloat16, and whether KV is, which comes last as keys and values.

    Raises:
        EngineError: a kernel takes no such types together.
    """
    is_half, is_kv_half = _is_half(*tensors[:-2]), _is_half(*tensors[-2:])
    if is_half and not is_kv_half:
        raise EngineError("the CPU kernels take no bfloat16 beside KV in float32")
    return is_half, is_kv_half


def _check(dtype: torch.dtype, *tensors: torch.Tensor) -> None:
    """Raises EngineError: not all tensors are of that type."""
    if any(tensor.dtype is not dtype for tensor in tensors):
        raise EngineError(f"the CPU kernels take {dtype} here, not {_names(tensors)}")


def _names(tensors: Sequence[torch.Tensor]) -> str:
    return " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


class Epilogue(IntEnum):
    """What happens with a product before it is written."""

    WRITE = 0
    ADD = 1
    """Added to what is in the output."""
    SILU_MUL = 2
    """silu(gate) x up, of weights packed as a pair."""
    GELU_MUL = 3
    """The same with gelu, approximated by tanh."""


class _Product(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("ldx", ctypes.c_long),
        ("rows", ctypes.c_long),
        ("depth", ctypes.c_long),
        ("columns", ctypes.c_long),
        ("packed", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("ldo", ctypes.c_long),
        ("epilogue", ctypes.c_int),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        ("q", ctypes.c_void_p),
        ("ldq", ctypes.c_long),
        ("head_stride", ctypes.c_long),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("arena", ctypes.c_long),
        ("out", ctypes.c_void_p),
        ("ldo", ctypes.c_long),
        ("segments", ctypes.c_void_p),
        ("num_segments", ctypes.c_long),
        ("pages", ctypes.c_void_p),
        ("page_tokens", ctypes.c_long),
        ("heads", ctypes.c_int),
        ("kv_heads", ctypes.c_int),
        ("dim", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("window", ctypes.c_long),
        ("softcap", ctypes.c_float),
    )


class _Rotation(ctypes.Structure):
    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("ld", ctypes.c_long),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("arena", ctypes.c_long),
        ("slots", ctypes.c_void_p),
        ("rows", ctypes.c_long),
        ("heads", ctypes.c_int),
        ("kv_heads", ctypes.c_int),
        ("dim", ctypes.c_int),
    )


class _Race(ctypes.Structure):
    _fields_ = (
        ("scores", ctypes.c_void_p),
        ("ld", ctypes.c_long),
        ("rows", ctypes.c_long),
        ("size", ctypes.c_long),
        ("tops", ctypes.c_void_p),
        ("temperatures", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeights:
    """Weights laid out in panels for Kernels.product."""

    data: torch.Tensor
    columns: int
    depth: int
    scales: torch.Tensor | None
    """Of 8-bit weights: one a column, in the order of the panels."""
    bias: torch.Tensor | None
    panel_columns: int
    run: int
    """Numbers of a column that lie side by side: 2 where they are multiplied in pairs."""

    @property
    def num_bytes(self) -> int:
        """Bytes that a product reads."""
        return self.data.numel() * self.data.element_size()

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns rows of the weights, [n, depth], for ids [n]; not of 8-bit weights or a pair."""
        wide = self.panel_columns
        panels = self.data.view(-(-self.columns // wide), -1, wide, self.run)
        return panels[ids // wide, :, ids % wide].flatten(1)[:, : self.depth]


class Kernels:
    """The kernels. All tensors are on the CPU, with rows of contiguous numbers.

    Activations are float32 with weights and KV in either type, or everything is bfloat16. Whatever is given another
    type raises EngineError.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        """Takes the loaded library."""
        self._library = library
        self.panel_columns: int = library.bs_panel_columns()
        self.vector: int = library.bs_vector_floats()
        self.rounds_rows: bool = library.bs_run(_HALF.itemsize) > 1
        """Whether rows are rounded to bfloat16 when they are multiplied with weights in bfloat16."""

    def suits_heads(self, head_dim: int, dtype: torch.dtype) -> bool:
        """Whether attention can work on heads of that size and type."""
        return dtype in _DTYPES and head_dim % self.vector == 0

    def pack(
        self, weights: Sequence[torch.Tensor], bias: torch.Tensor | None = None, *, is_pair: bool = False, is_int8: bool
    ) -> PackedWeights:
        """Returns weights [columns, depth], given in parts, as panels.

        Args:
            weights: parts to stand side by side; of a pair: gate and up.
            bias: [columns] or None; a pair has none.
            is_pair: for Epilogue.SILU_MUL and GELU_MUL.
            is_int8: round to 8 bits, with one scale per column: max |w| / 127.
        """
        if not is_int8:
            _is_half(*weights)
        depth, wide = weights[0].shape[1], self.panel_columns
        joined = list(weights) if is_pair else [torch.cat(list(weights)) if len(weights) > 1 else weights[0]]
        columns = joined[0].shape[0]
        panels, step = -(-columns // wide), len(joined)
        dtype = torch.int8 if is_int8 else joined[0].dtype
        run: int = self._library.bs_run(dtype.itemsize)
        panel = wide * -(-depth // run) * run
        data = torch.empty(panels * step * panel, dtype=dtype)
        scales = torch.zeros(panels, step, wide) if is_int8 else None
        for part, weight in enumerate(joined):
            source = weight.detach()
            if scales is not None:
                scale = source.abs().amax(dim=1).float().clamp_min(1e-12) / 127
                source = torch.round(source.float() / scale[:, None]).to(torch.int8)
                padded = torch.zeros(panels * wide)
                padded[:columns] = scale
                scales[:, part] = padded.view(panels, wide)
            source = source.contiguous()
            self._library.bs_pack(
                ctypes.c_void_p(source.data_ptr()),
                ctypes.c_long(columns),
                ctypes.c_long(depth),
                ctypes.c_void_p(data.data_ptr() + part * panel * dtype.itemsize),
                ctypes.c_long(step),
                dtype.itemsize,
            )
        padded_bias = None
        if bias is not None:
            padded_bias = torch.zeros(panels * wide)
            padded_bias[:columns] = bias.detach()
        return PackedWeights(data, columns, depth, scales, padded_bias, wide, run)

    def product(self, x: torch.Tensor, weights: PackedWeights, out: torch.Tensor, epilogue: Epilogue) -> None:
        """Computes out [rows, columns] from x [rows, depth] and weights, see Epilogue."""
        is_half = _is_half(x, out)
        call = _Product(
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            weights.depth,
            weights.columns,
            weights.data.data_ptr(),
            None if weights.scales is None else weights.scales.data_ptr(),
            None if weights.bias is None else weights.bias.data_ptr(),
            out.data_ptr(),
            out.stride(0),
            epilogue,
        )
        self._library.bs_product(ctypes.byref(call), is_half, weights.data.element_size(), torch.get_num_threads())

    def attention(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        segments: torch.Tensor,
        pages: torch.Tensor,
        out: torch.Tensor,
        *,
        page_tokens: int,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> None:
        """Lets each new token attend to its own sequence.

        Args:
            query: [tokens, heads, head_dim], any strides between tokens and heads.
            keys: [kv_heads, arena tokens, head_dim], the new ones in place.
            values: likewise.
            segments: int64 [n, 4]: first token, tokens, where the sequence's KV starts in pages, context with the new
                tokens.
            pages: int64 [n]: where each page_tokens of KV are in the arena, in pages; see StepPlan.
            out: [tokens, heads, head_dim], contiguous.
            page_tokens: tokens of a page.
            scale: factor of the scores.
            window: tokens to look back to, itself included; None for all.
            softcap: scores are bent to (-softcap, softcap) by tanh; None for none.
        """
        is_half, is_kv_half = _types(query, out, keys, values)
        _check(torch.int64, segments, pages)
        call = _Attention(
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            keys.data_ptr(),
            values.data_ptr(),
            keys.shape[1],
            out.data_ptr(),
            query.shape[1] * query.shape[2],
            segments.data_ptr(),
            segments.shape[0],
            pages.data_ptr(),
            page_tokens,
            query.shape[1],
            keys.shape[0],
            query.shape[2],
            scale,
            window or 0,
            softcap or 0.0,
        )
        self._library.bs_attention(ctypes.byref(call), is_half, is_kv_half, torch.get_num_threads())

    def rotate_and_store(
        self,
        qkv: torch.Tensor,
        heads: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        norms: tuple[torch.Tensor, torch.Tensor, float] | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """Turns queries in place and puts keys, turned, and values into the arena.

        Args:
            qkv: [tokens, (heads + 2 kv_heads) x head_dim].
            heads: query heads.
            cos: [tokens, head_dim].
            sin: likewise.
            norms: weights [head_dim] of the RMS norms of queries and keys, in float32, and their epsilon; or None.
            keys: [kv_heads, arena tokens, head_dim].
            values: likewise.
            slots: int64 [tokens].
        """
        is_half, is_kv_half = _types(qkv, cos, sin, keys, values)
        _check(torch.int64, slots)
        q_norm, k_norm, eps = norms or (None, None, 0.0)
        if norms is not None:
            _check(torch.float32, *norms[:2])
        call = _Rotation(
            qkv.data_ptr(),
            qkv.stride(0),
            cos.data_ptr(),
            sin.data_ptr(),
            None if q_norm is None else q_norm.data_ptr(),
            None if k_norm is None else k_norm.data_ptr(),
            eps,
            keys.data_ptr(),
            values.data_ptr(),
            keys.shape[1],
            slots.data_ptr(),
            qkv.shape[0],
            heads,
            keys.shape[0],
            keys.shape[2],
        )
        self._library.bs_rotate_and_store(ctypes.byref(call), is_half, is_kv_half, torch.get_num_threads())

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, *, is_added: bool = False
    ) -> None:
        """Computes out = x / rms(x) x weight, rows [rows, size], all contiguous; weight in float32.

        With is_added it is added to what is in `out`.
        """
        is_half = _is_half(x, out)
        _check(torch.float32, weight)
        self._library.bs_rms_norm(
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(weight.data_ptr()),
            ctypes.c_float(eps),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_long(x.shape[0]),
            ctypes.c_long(x.shape[1]),
            is_added,
            is_half,
            torch.get_num_threads(),
        )

    def gate(self, both: torch.Tensor, out: torch.Tensor, epilogue: Epilogue) -> None:
        """Computes out [rows, size] = activation(both[:, :size]) x both[:, size:], contiguous."""
        is_half = _is_half(both, out)
        self._library.bs_gate(
            ctypes.c_void_p(both.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_long(out.shape[0]),
            ctypes.c_long(out.shape[1]),
            epilogue,
            is_half,
            torch.get_num_threads(),
        )

    def race(self, scores: torch.Tensor, temperatures: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Returns the winner of each row; see drawing.race."""
        if scores.dtype is not torch.float64:
            _check(torch.float32, scores)
        _check(torch.float64, temperatures)
        _check(torch.int64, starts)
        scores = scores if scores.stride(1) == 1 else scores.contiguous()
        tops = scores.amax(dim=-1).double()
        temperatures, starts = temperatures.contiguous(), starts.contiguous()
        out = torch.empty(scores.shape[0], dtype=torch.int64)
        call = _Race(
            scores.data_ptr(),
            scores.stride(0),
            *scores.shape,
            tops.data_ptr(),
            temperatures.data_ptr(),
            starts.data_ptr(),
            out.data_ptr(),
        )
        self._library.bs_race(ctypes.byref(call), scores.dtype is torch.float64, torch.get_num_threads())
        return out


def load_kernels(instruction_set: str = "auto", on_progress: Callable[[str], None] = lambda text: None) -> Kernels:
    """Returns this machine's kernels, compiled if need be; see load_library.

    Raises:
        KernelBuildError: there are none.
    """
    return Kernels(load_library(instruction_set, on_progress))
