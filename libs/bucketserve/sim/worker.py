"""A worker in virtual time: the step loop of a real one, with a latency model in place of the device.

Steps are composed by core.stepping.plan_prefill, as in the engines. While only decodes run, all steps up to the next
finish are one leap: their sum has a closed form, and whatever comes in between cuts the leap at the step boundary that
a real worker would take it up at. Nothing is approximated by that.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count, islice
from math import inf

from bucketserve.core.pace import StepPace
from bucketserve.core.preemption import loss
from bucketserve.core.stepping import PrefillPiece, plan_prefill
from bucketserve.core.types import MAX_PREEMPTIONS, Headroom, RequestId, StepSample, WorkerRole
from bucketserve.sim.errors import SimulationError
from bucketserve.sim.latency import CostMode, prefill_cost
from bucketserve.sim.prefix_cache import PrefixCache
from bucketserve.sim.sequence import Discipline, KvPolicy, SimSequence, StepOutcome, WorkerSpec

__all__ = ["SimWorker"]


class SimWorker:
    """Owns its sequences and its KV. The driver calls it in order of time.

    add / expect / join / cancel bring work; plan(now) starts or shortens work; finish(now) ends what ends at now_s.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        """Starts empty and idle."""
        self.spec = spec
        self.role = spec.role
        """What it does with batches that come now; the scheduler may switch it."""
        self.end_s: float | None = None
        """When what it does now ends; None while idle."""
        self.last_assignment = 0
        self.max_kv_used = 0
        self.prefill_busy_s = 0.0
        self.decode_busy_s = 0.0
        self.num_steps = 0
        self.num_evictions = 0
        """Sequences that lost their KV to others; by their own rule or since the scheduler asked for it."""
        self._kv_used = 0
        self._is_static = spec.mode.discipline is Discipline.STATIC
        self._is_paged = not self._is_static and spec.mode.kv is not KvPolicy.RESERVED
        self._is_growing = spec.mode.kv is KvPolicy.GROWING
        self._queue: deque[SimSequence] = deque()
        self._queue_tokens = 0
        self._prefilling: dict[RequestId, SimSequence] = {}
        self._running: dict[RequestId, SimSequence] = {}
        self._joining: list[SimSequence] = []
        self._swapped: deque[SimSequence] = deque()
        self._held: dict[RequestId, SimSequence] = {}
        self._cancelled: set[RequestId] = set()
        self._preempted: set[RequestId] = set()
        """Those of them that go back to the scheduler."""
        self._by_finish: list[tuple[int, int, SimSequence]] = []
        self._order = count()
        self._count = 0
        """Decode steps so far."""
        self._num_slots = 0
        """Sequences in a decode step: those running; in a static batch its finished ones as well."""
        self._num_growing = 0
        """Paged: those of them that take KV as they use it."""
        self._context = 0
        """Sum of their contexts."""
        self._start_s = 0.0
        self._num_planned = 0
        self._static_prompt = 0
        self._pieces: list[PrefillPiece] = []
        self._is_run = False
        self._is_expecting = False
        self._pace = StepPace(spec.mode.most_lent)
        self._prefixes = PrefixCache()

    # --- what the driver brings ---------------------------------------------------------------------------------

    def add(self, sequences: Iterable[SimSequence], assignment: int) -> None:
        """Takes a batch to prefill."""
        self.last_assignment = assignment
        batch = list(sequences)
        for sequence in batch:
            sequence.num_to_compute, sequence.num_computed = sequence.prompt_tokens, 0
            # What was begun in a role ends in it, as at a real worker.
            sequence.hands_over = self.role is WorkerRole.PREFILL
            if self._is_paged or self._is_static:
                self._queue.append(sequence)
                self._queue_tokens += sequence.prompt_tokens
            else:
                # A prefill worker holds the prompt's KV only; its output grows elsewhere.
                output = 0 if sequence.hands_over else sequence.max_new_tokens
                self._take_kv(sequence, sequence.prompt_tokens + output)
                self._prefilling[sequence.request_id] = sequence

    def expect(self, sequence: SimSequence) -> None:
        """Sets room aside for a sequence whose KV is on its way.

        Paged: what runs may have grown since the last report, so that the room is made at the next step boundary.
        """
        is_growing = self._is_paged and not self._is_full(sequence)
        self._is_expecting = self._is_paged
        self._take_kv(sequence, sequence.context_tokens if is_growing else sequence.most_tokens)

    def join(self, sequence: SimSequence) -> None:
        """Takes a sequence whose KV has arrived; it decodes from the next step on."""
        self._joining.append(sequence)

    def held(self, request_id: RequestId) -> SimSequence | None:
        """Returns a prefilled sequence that waits for its KV to be pulled."""
        return self._held.get(request_id)

    def release(self, request_id: RequestId, kv_tokens: int) -> None:
        """Frees a held sequence's KV after it was pulled, or before it is expected where it is held."""
        self._release_blocks(self._held.pop(request_id))
        self._kv_used -= kv_tokens

    def cancel(self, request_id: RequestId) -> None:
        """Stops a sequence at the next step boundary; it is among those finished there."""
        self._cancelled.add(request_id)

    def preempt(self, request_id: RequestId) -> None:
        """Lets a sequence go at the next step boundary; one whose KV waits or moves stays where it is."""
        if (
            request_id in self._running
            or request_id in self._prefilling
            or any(sequence.request_id == request_id for sequence in self._queue)
        ):
            self._cancelled.add(request_id)
            self._preempted.add(request_id)

    def headroom(self) -> Headroom:
        """Returns what it would report."""
        waiting = [*self._queue, *self._prefilling.values()]
        return Headroom(
            kv_total_tokens=self.spec.kv_total_tokens,
            kv_free_tokens=self.spec.kv_total_tokens - self._kv_used - self._queue_tokens,
            max_sequences=self.spec.mode.max_sequences,
            num_decode_steps=self._count,
            num_running=self._num_slots + len(self._joining) + len(self._swapped),
            num_waiting=len(waiting),
            waiting_prefill_tokens=sum(sequence.remaining for sequence in waiting),
            last_assignment=self.last_assignment,
        )

    # --- the loop -----------------------------------------------------------------------------------------------

    def plan(self, now_s: float) -> None:
        """Starts a step if idle; cuts a leap at the step boundary where new work joins."""
        if self.end_s is None:
            self._compose(now_s)
        elif self._is_run and (
            self._prefilling or self._queue or self._joining or self._cancelled or self._is_expecting
        ):
            done = self.spec.latency.decode_steps_until(now_s - self._start_s, self._num_slots, self._context)
            if done < self._num_planned and not (self._is_static and not self._cancelled):
                self._num_planned = done
                self.end_s = self._start_s + self.spec.latency.decode_run_s(done, self._num_slots, self._context)

    def finish(self) -> StepOutcome:
        """Ends the step or leap that ends at end_s; returns what it brought. The worker is idle after it."""
        outcome = StepOutcome()
        if self.end_s is not None:
            self._account(outcome)
            if self._num_slots:
                self._decoded(self._num_planned if self._is_run else 1, outcome)
            for piece in self._pieces:
                self._computed(piece, outcome, self.end_s)
            self._pieces, self._is_run, self.end_s = [], False, None
        if self._cancelled:
            self._remove_cancelled(outcome)
        if self._is_growing:
            self._let_go_to_grow(outcome)
        if self._is_static and self._num_slots and not self._running:
            self._end_static_batch()
        return outcome

    def _compose(self, now_s: float) -> None:
        self._is_expecting = False
        for sequence in self._joining:
            self._decode_from_here(sequence)
        self._joining.clear()
        if self._is_static:
            self._admit_static()
        elif self._is_paged:
            if not self._is_growing:
                self._make_room_to_grow(now_s)
            self._check_kv()
            self._admit_paged()
        latency = self.spec.latency
        pieces = self._plan_pieces(now_s)
        if pieces:
            spans = [(self._prefilling[piece.request_id].num_computed, piece.num_tokens) for piece in pieces]
            tokens, squares = prefill_cost(spans, self.spec.cost)
            self.end_s = now_s + latency.step_s(tokens, squares, self._num_slots, self._context)
            self._pieces, self._num_planned = pieces, 1
        elif self._num_slots:
            steps = self._next_finish() - self._count
            if self._is_paged:
                steps = min(steps, (self.spec.kv_total_tokens - self._kv_used) // max(self._num_growing, 1))
            self.end_s = now_s + latency.decode_run_s(steps, self._num_slots, self._context)
            self._is_run, self._num_planned = True, steps
        elif self._cancelled:
            self.end_s, self._num_planned = now_s, 0
        self._start_s = now_s

    def _plan_pieces(self, now_s: float) -> list[PrefillPiece]:
        if not self._prefilling:
            return []
        mode = self.spec.mode
        waiting: Iterator[SimSequence] = iter(self._by_urgency(self._prefilling.values(), now_s))
        if self.spec.cost is CostMode.PADDED:
            # An engine that pads prefills one batch at a time, or it would pad short prompts to another bucket.
            batch_id = next(iter(self._prefilling.values())).batch_id
            waiting = (sequence for sequence in waiting if sequence.batch_id == batch_id)
        chosen = list(islice(waiting, max(mode.max_sequences - self._num_slots, 0)))
        for sequence in chosen:
            self._skip_known(sequence)
        limits = {s.max_chunk_tokens for s in chosen}
        if mode.most_lent and chosen:
            limits.add(self._paced_tokens(chosen, now_s))
        return plan_prefill(
            ((sequence.request_id, sequence.remaining) for sequence in chosen),
            num_decoding=self._num_slots,
            max_step_tokens=10**9 if self._is_static else mode.max_step_tokens,
            max_chunk_tokens=min((limit for limit in limits if limit), default=0),
            is_shared=mode.shares_steps,
        )

    def _paced_tokens(self, chosen: list[SimSequence], now_s: float) -> int:
        """Returns the most prompt tokens beside which those that decode keep their TPOT; 0 for no limit."""
        running = self._running.values()
        return self._pace.prompt_tokens(
            ((s.tpot_slo_s, s.first_token_s, self._count - s.join_count) for s in running if s.tpot_slo_s < inf),
            num_decoding=self._num_slots,
            context_tokens=self._context,
            prompt_end=max(min(s.num_computed + self.spec.mode.max_step_tokens, s.num_to_compute) for s in chosen),
            now_s=now_s,
        )

    def _by_urgency(self, sequences: Iterable[SimSequence], now_s: float) -> Iterable[SimSequence]:
        urgency = self.spec.mode.urgency
        return sequences if urgency is None else sorted(sequences, key=lambda one: urgency(one, now_s))

    def _skip_known(self, sequence: SimSequence) -> None:
        """Leaves out what a prefix cache has of a prompt that hasn't begun; its last token is always computed."""
        if sequence.block_hashes and not sequence.num_computed:
            known = self._prefixes.num_tokens_of(sequence.block_hashes)
            sequence.num_reused = sequence.num_computed = min(known, sequence.num_to_compute - 1)

    def _release_blocks(self, sequence: SimSequence) -> None:
        if sequence.holds_blocks:
            self._prefixes.release(sequence.block_hashes)
            sequence.holds_blocks = False

    def _account(self, outcome: StepOutcome) -> None:
        """Books the time, and measures the step as a real worker does; of a leap, its first step."""
        assert self.end_s is not None  # only called while busy
        latency, duration_s = self.spec.latency, self.end_s - self._start_s
        decode_s = duration_s
        if self._pieces:
            decode_s = latency.step_s(0, 0, self._num_slots, self._context)
        self.decode_busy_s += decode_s
        self.prefill_busy_s += duration_s - decode_s
        self.num_steps += self._num_planned
        if not self._num_planned:
            return
        attention = sum(
            p.num_tokens * (self._prefilling[p.request_id].num_computed + p.num_tokens) for p in self._pieces
        )
        sample = StepSample(
            prefill_tokens=sum(piece.num_tokens for piece in self._pieces),
            prefill_attention=attention,
            decode_sequences=self._num_slots,
            decode_context_tokens=self._context,
            duration_s=latency.step_s(0, 0, self._num_slots, self._context) if self._is_run else duration_s,
        )
        self._pace.learn(sample)
        outcome.samples.append(sample)

    # --- progress of sequences ----------------------------------------------------------------------------------

    def _decoded(self, steps: int, outcome: StepOutcome) -> None:
        self._count += steps
        self._context += steps * self._num_slots
        if self._is_paged:
            self._use_kv(steps * self._num_growing)
        while self._by_finish and self._by_finish[0][0] <= self._count:
            _, _, sequence = heapq.heappop(self._by_finish)
            if self._running.get(sequence.request_id) is sequence and sequence.finish_count == self._count:
                self._leave(sequence)
                outcome.finished.append(sequence)

    def _computed(self, piece: PrefillPiece, outcome: StepOutcome, now_s: float) -> None:
        sequence = self._prefilling[piece.request_id]
        sequence.num_computed += piece.num_tokens
        if sequence.remaining:
            return
        del self._prefilling[piece.request_id]
        sequence.num_generated += 1
        if sequence.num_generated == 1:
            sequence.first_token_s = now_s
            outcome.prefilled.append(sequence)
        if sequence.block_hashes:
            self._prefixes.hold(sequence.block_hashes)
            sequence.holds_blocks = True
        if sequence.num_generated >= sequence.output_tokens and not self._is_static:
            self._kv_used -= sequence.kv_tokens
            self._release_blocks(sequence)
            outcome.finished.append(sequence)
        elif sequence.hands_over:
            self._held[piece.request_id] = sequence
        else:
            self._decode_from_here(sequence)
            if sequence.num_generated >= sequence.output_tokens:
                del self._running[sequence.request_id]
                self._release_blocks(sequence)
                outcome.finished.append(sequence)

    def _decode_from_here(self, sequence: SimSequence) -> None:
        self._running[sequence.request_id] = sequence
        sequence.join_count = self._count - sequence.num_generated
        sequence.finish_count = sequence.join_count + sequence.output_tokens
        heapq.heappush(self._by_finish, (sequence.finish_count, next(self._order), sequence))
        self._num_slots += 1
        self._num_growing += not self._is_full(sequence)
        self._context += self._static_padding(sequence) + sequence.context_tokens

    def _static_padding(self, sequence: SimSequence) -> int:
        """Context tokens that a static batch on an engine that pads attends to in vain."""
        if self._is_static and self.spec.cost is CostMode.PADDED:
            return self._static_prompt - sequence.prompt_tokens
        return 0

    def _leave(self, sequence: SimSequence) -> None:
        """Takes a sequence out of the decodes; in a static batch it keeps its slot and its memory."""
        del self._running[sequence.request_id]
        self._release_blocks(sequence)
        sequence.num_generated = self._count - sequence.join_count
        if self._is_static:
            return
        self._num_slots -= 1
        self._num_growing -= not self._is_full(sequence)
        self._context -= sequence.context_tokens
        self._kv_used -= sequence.kv_tokens if self._is_full(sequence) else sequence.context_tokens

    def _is_full(self, sequence: SimSequence) -> bool:
        """Whether a sequence has all the KV that it may use from the start."""
        return not self._is_paged or (self._is_growing and sequence.num_preemptions >= MAX_PREEMPTIONS)

    def _next_finish(self) -> int:
        while True:
            finish_count, _, sequence = self._by_finish[0]
            if self._running.get(sequence.request_id) is sequence and sequence.finish_count == finish_count:
                return finish_count
            heapq.heappop(self._by_finish)

    def _remove_cancelled(self, outcome: StepOutcome) -> None:
        for request_id in sorted(self._cancelled):
            sequence = self._running.get(request_id)
            if sequence is not None:
                self._leave(sequence)
            else:
                sequence = self._prefilling.pop(request_id, None) or self._held.pop(request_id, None)
                if sequence is not None:
                    self._kv_used -= sequence.kv_tokens
                    self._release_blocks(sequence)
                else:
                    sequence = self._pop_queued(request_id)
            if sequence is not None:
                self._gone(sequence, request_id in self._preempted, outcome)
        self._cancelled.clear()
        self._preempted.clear()

    def _gone(self, sequence: SimSequence, is_preempted: bool, outcome: StepOutcome) -> None:
        if is_preempted:
            self.num_evictions += 1
            outcome.preempted.append(sequence)
        else:
            outcome.finished.append(sequence)

    def _let_go_to_grow(self, outcome: StepOutcome) -> None:
        """Lets sequences go until every other can grow by a token in the next step."""
        while self._kv_used + self._num_growing + len(self._joining) > self.spec.kv_total_tokens:
            costs = [
                (cost, sequence.request_id, sequence)
                for sequence in self._running.values()
                if (
                    cost := loss(
                        is_batch=sequence.is_batch,
                        num_preemptions=sequence.num_preemptions,
                        num_tokens=sequence.context_tokens,
                    )
                )
            ]
            if not costs:
                break
            _, _, sequence = min(costs)
            self._leave(sequence)
            self._gone(sequence, True, outcome)

    def _pop_queued(self, request_id: RequestId) -> SimSequence | None:
        for group in (self._queue, self._swapped, self._joining):
            for sequence in group:
                if sequence.request_id == request_id:
                    group.remove(sequence)
                    if group is self._queue:
                        self._queue_tokens -= sequence.remaining
                    elif group is self._joining:
                        self._kv_used -= sequence.kv_tokens
                    return sequence
        return None

    # --- memory -------------------------------------------------------------------------------------------------

    def _take_kv(self, sequence: SimSequence, tokens: int) -> None:
        sequence.kv_tokens = tokens
        self._use_kv(tokens)

    def _use_kv(self, tokens: int) -> None:
        self._kv_used += tokens
        self.max_kv_used = max(self.max_kv_used, self._kv_used)
        self._prefixes.shrink(self.spec.kv_total_tokens - self._kv_used)
        if not self._is_expecting:
            self._check_kv()

    def _check_kv(self) -> None:
        if self._kv_used > self.spec.kv_total_tokens:
            raise SimulationError(
                f"{self.spec.worker_id}: {self._kv_used} KV tokens in a memory of {self.spec.kv_total_tokens}"
            )

    def _admit_paged(self) -> None:
        """Lets sequences in, in order, while memory and this step's budget allow; evicted ones first."""
        mode, total = self.spec.mode, self.spec.kv_total_tokens
        while self._swapped and self._kv_used + self._swapped[0].context_tokens + self._num_slots + 1 <= total:
            sequence = self._swapped.popleft()
            self._take_kv(sequence, sequence.context_tokens)
            self._decode_from_here(sequence)
        # Engines that serve look at all that wait, in order; others let in what the next step may compute.
        budget = mode.max_step_tokens - self._num_slots - sum(s.remaining for s in self._prefilling.values())
        budget = 10**9 if self._is_growing else budget
        watermark = int(mode.kv_watermark * total)
        while self._queue and budget > 0 and not self._swapped:
            head = self._queue[0]
            is_empty = self._kv_used == 0
            is_full = self._is_full(head) and not head.hands_over
            tokens = head.most_tokens if is_full else head.remaining + 1
            needed = tokens + self._num_growing + (0 if is_empty else watermark)
            if self._kv_used + needed > total or self._num_slots + len(self._prefilling) >= mode.max_sequences:
                break
            self._queue.popleft()
            self._queue_tokens -= head.remaining
            self._take_kv(head, tokens)
            self._prefilling[head.request_id] = head
            budget -= head.remaining

    def _make_room_to_grow(self, now_s: float) -> None:
        """Evicts the least urgent sequence, else the one that joined last, until every other can grow by a token."""
        while self._num_slots and self._kv_used + self._num_slots > self.spec.kv_total_tokens:
            sequence = self._running[next(reversed(self._running))]
            if self.spec.mode.urgency is not None:
                sequence = list(self._by_urgency(self._running.values(), now_s))[-1]
            if self._kv_used == sequence.context_tokens:
                raise SimulationError(f"{self.spec.worker_id}: one sequence outgrows the whole KV memory")
            self._leave(sequence)
            self.num_evictions += 1
            sequence.num_evictions += 1
            if self.spec.mode.kv is KvPolicy.PAGED_SWAP:
                self._swapped.appendleft(sequence)
            else:
                sequence.num_to_compute, sequence.num_computed = sequence.context_tokens, 0
                self._queue.appendleft(sequence)
                self._queue_tokens += sequence.remaining

    def _admit_static(self) -> None:
        """Takes the next batch when the one before is over: memory padded to its longest prompt and output."""
        if self._num_slots or self._prefilling or not self._queue:
            return
        batch_id = self._queue[0].batch_id
        batch = []
        while self._queue and self._queue[0].batch_id == batch_id:
            batch.append(self._queue.popleft())
            self._queue_tokens -= batch[-1].remaining
        self._static_prompt = max(s.prompt_tokens for s in batch)
        each = self._static_prompt + max(s.max_new_tokens for s in batch)
        for sequence in batch:
            self._take_kv(sequence, each)
            self._prefilling[sequence.request_id] = sequence

    def _end_static_batch(self) -> None:
        self._kv_used = self._num_slots = self._context = 0
        self._by_finish.clear()
