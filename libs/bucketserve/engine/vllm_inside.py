"""What runs inside vLLM: our sampling as its logits processor, and its schedulers with a step that we compose.

vLLM's own seeds don't survive a resumption: its generators count draws. Here a token is a function of logits, seed and
position alone (engine/sampling.py), as in our own engine.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from bucketserve.core.types import StepSample
from bucketserve.engine.races import race_on
from bucketserve.engine.sampling import RowState, SampleRow, choose
from bucketserve.ports import Sampling

__all__ = [
    "FIRST",
    "POSITION",
    "SAMPLING",
    "DoneStep",
    "FirstToken",
    "OverlappedScheduler",
    "PlannedScheduler",
    "SeededSampling",
    "StepOrder",
    "clear_blocks",
]

SAMPLING, POSITION = "bucketserve_sampling", "bucketserve_position"
"""In a request's extra_args: how to choose its tokens, and the position of its first one over all attempts."""
FIRST = "bucketserve_first"
"""The FirstToken of a request whose KV comes from elsewhere."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What a request generated first where its prompt was computed."""

    token_id: int
    logprob: float
    """There, before temperature and filters."""
    tolerance: float
    """How far it may be from that here."""


@dataclass(slots=True)
class _Row:
    """A request in vLLM's batch."""

    sampling: Sampling
    first_position: int
    generated: list[int]
    """vLLM's own list, which grows."""
    tokens: list[int]
    """Prompt and what was generated until the last step."""
    num_prompt: int
    state: RowState = field(default_factory=RowState)

    def sample_row(self) -> SampleRow:
        self.tokens += self.generated[len(self.tokens) - self.num_prompt :]
        return SampleRow(self.sampling, self.first_position + len(self.generated), self.tokens, self.state)


@dataclass(slots=True)
class _Expected:
    """A request whose KV came from elsewhere."""

    first: FirstToken
    instead: int
    """What it generates if the KV is not its prompt's: neither that token nor an end."""
    generated: list[int]
    """vLLM's own list, which grows."""


class SeededSampling(LogitsProcessor):  # type: ignore[misc]
    """Chooses the tokens of all requests but plainly greedy ones: it leaves vLLM nothing else to choose.

    The first token of a request whose KV came from elsewhere is the one chosen there, if it is as probable here.
    vLLM is to choose greedily (temperature 0). Rows that allow no choice stay as they are, for it to count their NaNs.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        """As vLLM makes it."""
        self._race = race_on(device)
        self._rows: dict[int, _Row] = {}
        self._expected: dict[int, _Expected] = {}

    def is_argmax_invariant(self) -> bool:
        """It decides what is most likely."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follows vLLM's batch: who came, left or moved."""
        process_dict_updates(self._rows, batch_update, _row)
        process_dict_updates(self._expected, batch_update, _expected)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns logits that are minus infinity but for the chosen token, where it is ours to choose."""
        first = {index: each for index, each in self._expected.items() if not each.generated}
        if first:
            chosen = _confirm(logits[list(first)].float(), list(first.values()))
        logits = self._choose(logits)
        if first:
            rows = torch.tensor(list(first), device=logits.device)
            logits[rows] = float("-inf")
            logits[rows, chosen] = 0.0
        return logits

    def _choose(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._rows:
            return logits
        indices = torch.tensor(list(self._rows), device=logits.device)
        ours = logits[indices].float()
        chosen, sound = choose(ours, [row.sample_row() for row in self._rows.values()], self._race)
        only = torch.full_like(ours, float("-inf")).scatter_(1, chosen[:, None], 0.0)
        logits[indices] = torch.where(sound[:, None].bool(), only, ours).to(logits.dtype)
        return logits


def is_proved(request: Any) -> bool:
    """Whether a request's KV was computed here, or gave its first token as it was to be."""
    first = (request.sampling_params.extra_args or {}).get(FIRST)
    return first is None or (request.num_output_tokens > 0 and request.output_token_ids[0] == first.token_id)


def _row(params: Any, prompt: list[int] | None, generated: list[int]) -> _Row | None:
    """Returns how to choose a request's tokens; None if vLLM's greedy choice is the same."""
    arguments = params.extra_args or {}
    sampling = arguments.get(SAMPLING)
    if sampling is None or _is_greedy(sampling):
        return None
    return _Row(sampling, arguments[POSITION], generated, list(prompt or ()), len(prompt or ()))


def _expected(params: Any, prompt: list[int] | None, generated: list[int]) -> _Expected | None:
    first = (params.extra_args or {}).get(FIRST)
    if first is None:
        return None
    taken = {first.token_id, *(params.stop_token_ids or ())}
    return _Expected(first, next(i for i in range(len(taken) + 1) if i not in taken), generated)


def _confirm(logits: torch.Tensor, expected: list[_Expected]) -> torch.Tensor:
    """Returns the first token of each row, or another one where that is not as probable as it was; [rows] int64."""
    first = [each.first for each in expected]
    tokens = torch.tensor([each.token_id for each in first], device=logits.device)
    wanted = torch.tensor([each.logprob for each in first], device=logits.device)
    tolerance = torch.tensor([each.tolerance for each in first], device=logits.device)
    found = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    instead = torch.tensor([each.instead for each in expected], device=logits.device)
    return torch.where((found - wanted).abs() <= tolerance, tokens, instead)


def _is_greedy(sampling: Sampling) -> bool:
    """Whether nothing but the highest logit counts; seeds and filters change nothing then."""
    plain = Sampling()
    rest = replace(
        sampling,
        seed=plain.seed,
        top_p=plain.top_p,
        top_k=plain.top_k,
        min_p=plain.min_p,
        temperature=plain.temperature,
    )
    return sampling.temperature <= 0 and rest == plain


@dataclass(frozen=True, slots=True)
class StepOrder:
    """How the next step is to be composed."""

    max_tokens: int
    pieces: Mapping[str, int]
    """vLLM's ids of those that have a prompt to compute: how much of it. The others have a token each, or none."""


@dataclass(frozen=True, slots=True)
class DoneStep:
    """A step whose tokens are known."""

    sample: StepSample
    not_finite: frozenset[str]
    """vLLM's ids of those whose logits have NaNs."""
    tainted: tuple[int, ...]
    """The KV blocks that only they had: NaNs there reach whoever has a block next, since attention multiplies what it
    masks by zero."""


class _Composed:
    """Adds to a scheduler of vLLM what the adapter says of each step, and tells what it computed."""

    order: StepOrder | None = None
    _end_s = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.done: list[DoneStep] = []
        """Of the steps since somebody emptied it."""
        self._launched: deque[tuple[float, StepSample]] = deque()
        coordinator = self.kv_cache_manager.coordinator  # type: ignore[attr-defined]
        cache_blocks = coordinator.cache_blocks

        def cache_proved(request: Any, num_computed_tokens: int) -> None:
            # Where nobody finds KV before it is proved, nobody goes on with another prompt's. Then it is made up for.
            if is_proved(request):
                cache_blocks(request, num_computed_tokens)

        # The one way by which vLLM makes KV known for reuse.
        coordinator.cache_blocks = cache_proved

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the next step."""
        scheduler: Any = self
        if self.order is not None:
            pieces = self.order.pieces
            scheduler.max_num_scheduled_tokens = self.order.max_tokens
            # vLLM begins no other when the first in its queue has nothing to do.
            waiting = sorted(scheduler.waiting, key=lambda request: not pieces.get(request.request_id))
            scheduler.waiting.clear()
            scheduler.waiting.extend(waiting)
        start_s = time.perf_counter()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self._launched.append((start_s, self._compose(output.num_scheduled_tokens)))
        return output

    def _reserve_prefill_lookahead(self, request: Any, num_computed: int, num_tokens: int) -> int:
        """Returns how many of a request's tokens the step computes: vLLM's last word on each, and here ours."""
        number: int = super()._reserve_prefill_lookahead(request, num_computed, num_tokens)  # type: ignore[misc]
        scheduler: Any = self
        if self.order is None or scheduler.need_mamba_block_aligned_split:
            # Pieces of such a model end where its state can be kept: the step is bounded as a whole only.
            return number
        return min(number, self.order.pieces.get(request.request_id, number))

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Takes a step's tokens."""
        scheduler: Any = self
        nans = model_runner_output.num_nans_in_logits or {}
        not_finite = frozenset(name for name, number in nans.items() if number and name in scheduler.requests)
        tainted = self.blocks_of(not_finite)
        result = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        # They come back in the order in which they were launched.
        start_s, sample = self._launched.popleft()
        # Steps may overlap: of the time in which two run, the second one has what is left after the first.
        end_s = time.perf_counter()
        if scheduler_output.num_scheduled_tokens:
            sample = replace(sample, duration_s=end_s - max(start_s, self._end_s))
            self.done.append(DoneStep(sample, not_finite, tainted))
        if tainted:
            # Nobody is to find them by what they were computed from.
            scheduler.kv_cache_manager.block_pool.evict_blocks(set(tainted))
        self._end_s = end_s
        return result

    def is_fetching(self, request: Any) -> bool:
        """Whether a request's KV is on its way: steps compute nothing for it."""
        scheduler: Any = self
        return (
            request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
            and request.request_id not in scheduler.finished_recving_kv_req_ids
        )

    def blocks_of(self, request_ids: frozenset[str]) -> tuple[int, ...]:
        """Returns the blocks that nobody but these requests has."""
        manager = self.kv_cache_manager  # type: ignore[attr-defined]
        ids = {i for name in request_ids for group in manager.get_block_ids(name) for i in group}
        blocks = manager.block_pool.blocks
        return tuple(sorted(i for i in ids if not blocks[i].is_null and blocks[i].ref_cnt == 1))

    def _compose(self, num_tokens: Mapping[str, int]) -> StepSample:
        """Returns what a step computes; vLLM has counted its tokens as computed already."""
        scheduler: Any = self
        prefill_tokens = attention = decodes = context = 0
        for request_id, number in num_tokens.items():
            request = scheduler.requests[request_id]
            end = request.num_computed_tokens
            if number > 1 or end <= request.num_prompt_tokens:
                prefill_tokens += number
                attention += number * end
            else:
                decodes += 1
                context += end
        return StepSample(
            prefill_tokens=prefill_tokens,
            prefill_attention=attention,
            decode_sequences=decodes,
            decode_context_tokens=context,
        )


def clear_blocks(worker: Any, block_ids: tuple[int, ...]) -> None:
    """Zeroes KV blocks; runs in each worker of vLLM."""
    worker.model_runner._zero_block_ids(list(block_ids))


class PlannedScheduler(_Composed, Scheduler):  # type: ignore[misc]
    """One step after the other."""


class OverlappedScheduler(_Composed, AsyncScheduler):  # type: ignore[misc]
    """The next step is launched before the tokens of the last one are known."""
