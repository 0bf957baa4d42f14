"""Whether a model computes in packed steps what it computes by itself, tried when it is loaded.

Three short sequences run through transformers' eager attention, each alone: two from position 0, one that ends at the
last position of the context. Then the same tokens run as they will be served, whatever serves them (kernels, fused
layers, number type, 8-bit weights): in pieces, beside each other, and one by one. Each decoder layer is given the input
that it had in the model's own run, so that rounding does not add up from layer to layer, and what it returns is
compared token by token.

Costs two passes over 112 tokens, one over 28 and five over 3: some hundredths of a second for small models, some
seconds for one of 10^9 weights on two cores. Takes memory for those tokens' hidden states of each layer, and their KV.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache

from bucketserve.core.errors import EngineError, ModelLoadError
from bucketserve.engine.attention import Planner, Segment
from bucketserve.engine.forward import run_model
from bucketserve.engine.kv_memory import KvMemory
from bucketserve.engine.probe import Probed, as_attention, decoder_layers, refusing_what_fails

__all__ = ["SelfCheck", "tolerance"]

LENGTHS = (44, 40, 28)
"""Tokens of the sequences, fewer in a short context."""
NUM_SINGLE = 6
"""The last tokens of each, which come one by one."""
HEAD_TOKENS = 4
"""The first tokens of a piece, which are judged for themselves too: a convolution loses only those."""
TOLERANCE = {torch.float32: 0.002}
HALF_TOLERANCE = 0.06
INT8_TOLERANCE = 0.12
"""Of what a layer adds to a token. Right models differ by up to 1e-5, 0.015 and 0.03."""
ROUNDINGS = 4
"""Roundings of the residual stream itself that are tolerated."""

# Where two experts are as good as equal, rounding decides: single tokens may differ by far, so medians are judged.
WHOLE = "already for one prompt by itself"
SECOND = "for the second piece of a prompt: it has a state beside attention, or positions of its own"
BESIDE = "for a prompt beside another sequence: it mixes what lies side by side"
LAST = "near the last position of its context"
LATE = "late in its context: it counts positions by itself, which may not matter with smaller context_tokens"
SINGLE = "for tokens that come one by one: it has a state beside attention, or positions of its own"
ORDER = (WHOLE, SECOND, BESIDE, LAST, SINGLE, LATE)

Hook = Callable[["_Record", torch.Tensor | None, torch.Tensor | None], torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Tokens of one sequence in a step, and what they are an example of."""

    sequence: int
    start: int
    end: int
    what: str


@dataclass(slots=True)
class _Record:
    """A decoder layer, as its place in the model, and what it did with each sequence, [tokens, hidden]."""

    parent: nn.ModuleList
    name: str
    given: list[torch.Tensor] = field(default_factory=list)
    returned: list[torch.Tensor] = field(default_factory=list)
    given_shares: dict[tuple[str, int], list[torch.Tensor]] = field(default_factory=dict)
    """By example and sequence: each token's difference in what it would be given, as a share of what is tolerated."""
    shares: dict[tuple[str, int], list[torch.Tensor]] = field(default_factory=dict)
    """The same of what it returns."""


class SelfCheck:
    """Runs the model by itself when made, before its layers are replaced; `compare` runs what will be served."""

    @torch.inference_mode()
    def __init__(self, model: Any, probed: Probed, context: int) -> None:
        """Runs the model's own forward.

        Raises:
            ModelLoadError: its results are not finite.
        """
        self._model, self._calls = model, probed.calls
        self._lengths = [min(length, context) for length in LENGTHS]
        self._offsets = [0, 0, context - self._lengths[2]]
        self._records = [_Record(parent, name) for parent, name in decoder_layers(model, probed)]
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        self._ids = [torch.randint(0, vocabulary, (n,), generator=generator).to(model.device) for n in self._lengths]
        with as_attention(model, "eager"), self._watched(_note), refusing_what_fails():
            self._logits = [self._run_alone(sequence) for sequence in range(len(self._ids))]
        if not all(bool(logits.isfinite().all()) for logits in self._logits):
            raise ModelLoadError("what it computes is not finite: its weights are damaged, or its dtype is too narrow")
        self._compare_late()

    def _compare_late(self) -> None:
        """Runs the last sequence once more, with a cache that says that tokens came before.

        Raises:
            ModelLoadError: that fails.
        """
        last = len(self._ids) - 1
        weight = next(self._model.parameters())
        # A CPU adds up in the same order both times.
        tolerated = tolerance(torch.float32 if weight.device.type == "cpu" else weight.dtype)
        compare = _Comparison([_Piece(last, 0, self._lengths[last], LATE)], tolerated, 1.0, 0.0)
        with as_attention(self._model, "eager"), self._watched(compare.layer), refusing_what_fails():
            self._run_alone(last, _Earlier(self._model.config, self._offsets[last]))

    @torch.inference_mode()
    def compare(self, planner: Planner, *, is_int8: bool) -> float:
        """Returns the largest difference, as a share of what is tolerated.

        Raises:
            ModelLoadError: it is more than 1; says which layer differs, and for what.
        """
        weight = next(self._model.parameters())
        layouts = [self._calls[layer].layout for layer in sorted(self._calls)]
        memory = KvMemory(layouts, sum(self._lengths), weight.dtype, weight.device)
        # Rounding adds up where layers are not given what they had.
        adds_up = not self._records or not all(record.given for record in self._records)
        tolerated = INT8_TOLERANCE if is_int8 else tolerance(weight.dtype)
        add_up = len(layouts) ** 0.5 if adds_up else 1.0
        head = _Record(nn.ModuleList(), "")
        for step in _steps(self._lengths):
            compare = _Comparison(step, tolerated, add_up, ROUNDINGS * torch.finfo(weight.dtype).eps)
            with self._watched(compare.layer), refusing_what_fails():
                logits = self._run_together(step, memory, planner)
            compare.logits(head, logits, self._logits, self._lengths)
        return _judge([*self._records, head])

    def _run_alone(self, sequence: int, earlier: Cache | None = None) -> torch.Tensor:
        """Returns the logits after the tokens from which on they come one by one."""
        length, offset = self._lengths[sequence], self._offsets[sequence]
        positions = torch.arange(offset, offset + length, device=self._model.device)
        output = self._model(
            input_ids=self._ids[sequence][None],
            position_ids=positions[None],
            past_key_values=earlier,
            use_cache=False,
            logits_to_keep=min(NUM_SINGLE + 1, length),
        )
        return _kept(output.logits[0], min(NUM_SINGLE + 1, length))

    def _run_together(self, step: Sequence[_Piece], memory: KvMemory, planner: Planner) -> torch.Tensor:
        """Returns the logits after each piece's last token."""
        device = self._model.device
        segments: list[Segment] = []
        ids, positions, last = [], [], []
        first = 0
        for piece in step:
            at = sum(self._lengths[: piece.sequence])
            number = piece.end - piece.start
            segments.append(Segment(first, number, at, piece.end))
            first += number
            here = torch.arange(piece.start, piece.end, device=device)
            ids.append(self._ids[piece.sequence][piece.start : piece.end])
            positions.append(here + self._offsets[piece.sequence])
            last.append(first - 1)
        plan = planner(memory, self._calls, segments, memory.backwards())
        rows = torch.tensor(last, device=device)
        return _kept(run_model(self._model, plan, torch.cat(ids), torch.cat(positions), rows), len(step))

    @contextmanager
    def _watched(self, hook: Hook) -> Iterator[None]:
        """Calls hook(record, given, None) before and hook(record, None, returned) after each decoder layer.

        What the former returns is what the layer is given.
        """
        handles = []
        for record in self._records:
            layer = record.parent.get_submodule(record.name)
            handles.append(layer.register_forward_pre_hook(_before(record, hook), with_kwargs=True))
            handles.append(layer.register_forward_hook(_after(record, hook)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Earlier(DynamicCache):  # type: ignore[misc]
    """Keeps nothing, and says that tokens came before: some layers count positions by that, whatever they are given."""

    def __init__(self, config: Any, num_tokens: int) -> None:
        super().__init__(config=config)
        self._num_tokens = num_tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._num_tokens

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


def tolerance(dtype: torch.dtype, num_layers: int = 1) -> float:
    """Returns the share by which so many layers, one after another, may differ between two ways to compute them."""
    return float(TOLERANCE.get(dtype, HALF_TOLERANCE) * num_layers**0.5)


def _kept(logits: torch.Tensor, number: int) -> torch.Tensor:
    if logits.shape[0] != number:
        raise EngineError("its forward does not heed logits_to_keep, which packed steps need")
    return logits.float()


def _before(record: _Record, hook: Hook) -> Callable[..., Any]:
    def pre_hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = hook(record, args[0] if args else kwargs["hidden_states"], None)
        if given is None:
            return None
        return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})

    return pre_hook


def _after(record: _Record, hook: Hook) -> Callable[..., None]:
    def forward_hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hook(record, None, output if isinstance(output, torch.Tensor) else output[0])

    return forward_hook


def _note(record: _Record, given: torch.Tensor | None, returned: torch.Tensor | None) -> None:
    # Some layers pass several streams on, [streams, 1, tokens, hidden]: only what comes out of the last is compared.
    if given is not None and given.dim() == 3:
        record.given.append(given[0].clone())
    if returned is not None and returned.dim() == 3:
        record.returned.append(returned[0].clone())


class _Comparison:
    """One step's results beside those of the model by itself."""

    def __init__(self, step: Sequence[_Piece], tolerance: float, add_up: float, floor: float) -> None:
        self._step, self._tolerance, self._add_up, self._floor = step, tolerance, add_up, floor

    def layer(self, record: _Record, given: torch.Tensor | None, returned: torch.Tensor | None) -> torch.Tensor | None:
        """A hook: gives the layer what it was given in the model's own run, and compares what it returns."""
        if not record.given or not record.returned:
            return None
        before = torch.cat([record.given[p.sequence][p.start : p.end] for p in self._step])
        if given is not None:
            self._note(record.given_shares, given[0], before, before)
            return before[None]
        wanted = torch.cat([record.returned[p.sequence][p.start : p.end] for p in self._step])
        if returned is not None:
            self._note(record.shares, returned[0], wanted, wanted.float() - before.float())
        return None

    def logits(
        self, head: _Record, found: torch.Tensor, wanted: Sequence[torch.Tensor], lengths: Sequence[int]
    ) -> None:
        """Compares the logits after each piece where there are some to compare with."""
        for row, piece in zip(found, self._step, strict=True):
            known = wanted[piece.sequence]
            at = piece.end - 1 - (lengths[piece.sequence] - known.shape[0])
            if at >= 0:
                share = (row - known[at]).norm() / (self._tolerance * self._add_up * known[at].norm())
                head.shares.setdefault((piece.what, piece.sequence), []).append(share[None])

    def _note(
        self,
        shares: dict[tuple[str, int], list[torch.Tensor]],
        found: torch.Tensor,
        wanted: torch.Tensor,
        scale: torch.Tensor,
    ) -> None:
        """Notes the differences between hidden states [tokens, hidden], relative to `scale`."""
        allowed = self._tolerance * scale.float().norm(dim=-1) + self._floor * wanted.float().norm(dim=-1)
        tokens = (found.float() - wanted.float()).norm(dim=-1) / allowed.clamp_min(torch.finfo(torch.float32).tiny)
        for piece, part in zip(self._step, tokens.split([p.end - p.start for p in self._step]), strict=True):
            shares.setdefault((piece.what, piece.sequence), []).append(part)


def _steps(lengths: Sequence[int]) -> Iterator[list[_Piece]]:
    """Yields the steps in which the sequences come."""
    prompts = [max(length - NUM_SINGLE, 1) for length in lengths]
    (a, b, c), half_a, half_b = prompts, prompts[0] // 2, prompts[1] // 3
    if half_a:
        yield [_Piece(0, 0, half_a, WHOLE)]
    yield [_Piece(0, half_a, a, SECOND), *([_Piece(1, 0, half_b, BESIDE)] if half_b else [])]
    yield [_Piece(1, half_b, b, SECOND if half_b else BESIDE), _Piece(2, 0, c, LAST)]
    for i in range(NUM_SINGLE):
        step = [_Piece(s, p + i, p + i + 1, SINGLE) for s, p in enumerate(prompts) if p + i < lengths[s]]
        if step:
            yield step


def _judge(records: Sequence[_Record]) -> float:
    """Returns the largest share; the medians of whole pieces and of their first tokens count, not single tokens.

    Raises:
        ModelLoadError: it is more than 1.
    """
    worst = 0.0
    for what in ORDER:
        for number, record in enumerate(records):
            layer = f"layer {number}" if record.name else "its last layer"
            for shares, problem in (
                (record.given_shares, f"what comes before {layer} differs"),
                (record.shares, f"{layer} computes something else"),
            ):
                found = [_share(parts) for (example, _), parts in shares.items() if example == what]
                share = float(torch.stack(found).max()) if found else 0.0
                if not share <= 1:
                    raise ModelLoadError(f"in packed steps {problem}, {what}")
                worst = max(worst, share)
    return worst


def _share(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    tokens = torch.cat(list(parts))
    # Both are NaN if anything is, which is what is wanted.
    return torch.maximum(tokens.median(), tokens[:HEAD_TOKENS].median())
