"""Every parameter at the edges of its documented range, odd logits, and how much work a row may cause."""

from __future__ import annotations

import math
import random

import pytest
import torch

from bucketserve.engine.drawing import noise_starts, uniform_noise
from bucketserve.engine.sampling import RowState, SampleRow, sample, token_logprobs
from bucketserve.ports import Sampling

pytestmark = pytest.mark.engine
SIZE = 50
DENORMAL = 1e-45
"""The smallest float32; the client's numbers are such."""


def drawn(logits: list[float] | torch.Tensor, number: int = 400, history: list[int] | None = None, **more) -> set[int]:
    """Returns the tokens that come at that many positions."""
    row = torch.as_tensor(logits, dtype=torch.float32)
    sampling = Sampling(**{"temperature": 1.0, "seed": 7, **more})
    chosen = sample(row.expand(number, -1), [SampleRow(sampling, i, history or []) for i in range(number)])
    assert None not in chosen
    return set(chosen)


def logits() -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(3)) * 3


def greedy() -> int:
    return int(logits().argmax())


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0.0},
        {"temperature": DENORMAL},
        {"temperature": 1e-38},
        {"temperature": 1e-6},
        {"top_p": DENORMAL},
        {"top_p": 1e-9},
        {"top_k": 1},
        {"min_p": 1.0},
        {"temperature": 100.0, "top_k": 1},
        {"temperature": DENORMAL, "top_p": DENORMAL, "top_k": 2**32 - 1, "min_p": 1.0},
    ],
    ids=str,
)
def test_what_leaves_one_token_leaves_the_best(more: dict[str, float]) -> None:
    assert drawn(logits(), **more) == {greedy()}


@pytest.mark.parametrize(
    "more", [{"top_k": 0}, {"top_k": SIZE}, {"top_k": SIZE + 1}, {"top_k": 2**32 - 1}, {"top_p": 1.0}, {"min_p": 0.0}]
)
def test_what_excludes_nothing_changes_nothing(more: dict[str, float]) -> None:
    def row(sampling: Sampling) -> list[SampleRow]:
        return [SampleRow(sampling, i, []) for i in range(300)]

    rows = logits().expand(300, -1)
    plain = sample(rows, row(Sampling(temperature=2.0, seed=1)))
    assert sample(rows, row(Sampling(temperature=2.0, seed=1, **more))) == plain
    assert len(set(plain)) > 20


def test_a_high_temperature_is_nearly_uniform() -> None:
    assert len(drawn(logits(), 2000, temperature=100.0)) == SIZE


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_every_seed_is_one_of_its_own(seed: int) -> None:
    def tokens(seed: int) -> list[int | None]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return sample(logits().expand(50, -1), [SampleRow(sampling, i, []) for i in range(50)])

    assert tokens(seed) == tokens(seed)
    assert tokens(seed) != tokens((seed + 1) % 2**64)


@pytest.mark.parametrize("penalty", [DENORMAL, 1e-38, 0.01, 0.5, 3.0, 100.0])
@pytest.mark.parametrize("temperature", [0.0, DENORMAL, 1.0])
def test_repetition_penalty(penalty: float, temperature: float) -> None:
    # One that was seen and is positive, one that was seen and is negative, one that is new.
    positive = 2.0 / penalty
    wanted = 0 if positive > 1.0 else 2
    assert wanted in drawn([2.0, -1.0, 1.0], history=[0, 1, 1, 0], temperature=temperature, repetition_penalty=penalty)
    # Of negative ones only, a penalty above 1 takes the chance away and one below gives it.
    best = drawn([-1.0, -1.01], history=[0], temperature=min(temperature, 1e-9), repetition_penalty=penalty)
    assert best == {0 if penalty < 1 else 1}


def test_a_penalty_on_tokens_outside_the_vocabulary_of_the_logits_is_none() -> None:
    assert drawn([1.0, 0.0], history=[5, 99], temperature=0.0, repetition_penalty=2.0) == {0}


def adjusted(row: torch.Tensor, sampling: Sampling, history: list[int], num_prompt: int) -> list[float]:
    """Returns logits by the definitions of OpenAI (penalties, bias) and of CTRL (repetition), one by one."""
    found = []
    for token_id, logit in enumerate(row.tolist()):
        score = logit + dict(sampling.logit_bias).get(token_id, 0.0)
        if token_id in history:
            score = score / sampling.repetition_penalty if score > 0 else score * sampling.repetition_penalty
        count = history[num_prompt:].count(token_id)
        found.append(score - count * sampling.frequency_penalty - (count > 0) * sampling.presence_penalty)
    return found


def test_penalties_and_bias_are_those_of_a_plain_reference() -> None:
    """Rows of every kind in one batch, growing for 40 steps; some begin in the middle, as after a resumption."""
    rng, generator = random.Random(5), torch.Generator().manual_seed(5)
    rows = []
    for number in range(60):
        prompt = [rng.randrange(SIZE) for _ in range(rng.randrange(0, 9))]
        biases = {rng.randrange(SIZE + 5): rng.uniform(-100, 100) for _ in range(rng.choice([0, 0, 1, 6]))}
        sampling = Sampling(
            presence_penalty=rng.choice([0.0, -2.0, 2.0, rng.uniform(-2, 2)]),
            frequency_penalty=rng.choice([0.0, -2.0, 2.0, rng.uniform(-2, 2)]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.5]),
            logit_bias=tuple(biases.items()),
        )
        generated = [rng.randrange(SIZE) for _ in range(number % 4 * 5)]
        rows.append((sampling, [*prompt, *generated], len(prompt), RowState()))
    for _ in range(40):
        batch = torch.randn(len(rows), SIZE, generator=generator) * 2
        wanted = [
            max(range(SIZE), key=adjusted(row, sampling, history, num_prompt).__getitem__)
            for row, (sampling, history, num_prompt, _) in zip(batch, rows, strict=True)
        ]
        plain = batch.clone()
        chosen = sample(
            batch,
            [
                SampleRow(sampling, len(history) - num_prompt, history, state)
                for sampling, history, num_prompt, state in rows
            ],
        )
        assert chosen == wanted
        assert torch.equal(batch, plain)
        for token_id, (_, history, _, _) in zip(chosen, rows, strict=True):
            history.append(token_id)


@pytest.mark.parametrize("temperature", [0.0, DENORMAL, 1.0, 100.0])
def test_a_bias_forces_and_forbids(temperature: float) -> None:
    forced = Sampling(temperature=temperature, seed=1, top_k=1, logit_bias=((7, 100.0),))
    assert set(sample(logits().expand(50, -1), [SampleRow(forced, i, []) for i in range(50)])) == {7}
    forbidden = Sampling(temperature=min(temperature, 1.0), logit_bias=((0, -100.0), (SIZE, 100.0), (2**32 - 1, 1.0)))
    assert set(sample(torch.zeros(50, 2), [SampleRow(forbidden, i, []) for i in range(50)])) == {1}
    # What the model excludes stays excluded.
    excluded = torch.tensor([[0.0, -math.inf]])
    assert sample(excluded, [SampleRow(Sampling(logit_bias=((1, 100.0),)), 0, [])]) == [0]


def test_top_k_keeps_exactly_k_also_of_equals() -> None:
    for k in (1, 2, 3, 7):
        assert drawn([0.0, 1.0, 1.0, 1.0, 1.0, -1.0, 0.0], 600, top_k=k) == set([1, 2, 3, 4, 0, 6, 5][:k])
    assert drawn([3.0, 3.0], temperature=0.0) == {0}


def test_min_p_keeps_all_that_are_as_likely_as_the_best() -> None:
    assert drawn([1.0, 2.0, 2.0, -5.0], min_p=1.0) == {1, 2}
    assert drawn([0.0, math.log(0.5), math.log(0.49)], min_p=0.5 - 1e-6) == {0, 1}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    row = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    for top_p, wanted in ((0.49, {0}), (0.51, {0, 1}), (0.79, {0, 1}), (0.81, {0, 1, 2}), (0.96, {0, 1, 2, 3})):
        assert drawn(row, 2000, top_p=top_p) == wanted


def test_tokens_that_the_model_excludes_never_come() -> None:
    inf = math.inf
    assert drawn([-inf, 0.0, -inf, 0.1], temperature=100.0, repetition_penalty=0.01, history=[0, 1]) == {1, 3}
    assert drawn([-inf, -3.0], temperature=0.0) == {1}
    assert drawn([-inf, -3.0, -inf], top_k=3, top_p=0.999, min_p=1e-9) == {1}
    assert drawn([-3e38, -3.4e38], temperature=0.0) == {0}
    assert drawn([3e38, -3.4e38, 3.4e38], temperature=DENORMAL, repetition_penalty=DENORMAL, history=[0]) == {0}


@pytest.mark.parametrize("bad", [[math.nan, 1.0, 2.0], [1.0, math.inf, 0.0], [-math.inf] * 3, [math.nan] * 3])
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=1.0, top_k=2, top_p=0.5, min_p=0.1, seed=3), Sampling(repetition_penalty=2.0)],
)
def test_what_is_not_finite_is_nobody_s_token_and_harms_no_other_row(bad: list[float], sampling: Sampling) -> None:
    good = [0.0, 5.0, 1.0]
    rows = [SampleRow(sampling, 0, [0]) for _ in range(3)]
    chosen = sample(torch.tensor([good, bad, good]), rows)
    assert chosen[1] is None
    assert [chosen[0], chosen[2]] == sample(torch.tensor([good, good]), rows[:2])
    logprobs = token_logprobs(torch.tensor([good, bad, good]), chosen, [1, 1, None])
    assert [one is None for one in logprobs] == [False, True, True]


def test_more_alternatives_than_tokens_are_all_of_them() -> None:
    row = torch.tensor([[0.0, 1.0, 2.0]])
    found = token_logprobs(row, [0], [20])[0]
    assert found is not None
    assert [one.token_id for one in found.top] == [2, 1, 0]
    assert found.chosen.logprob == pytest.approx(float(torch.log_softmax(row, -1)[0, 0]))


@pytest.mark.parametrize("size", [7, 400, 5000, 128_256])
@pytest.mark.parametrize("numbers", [(20, None), (5, 20), (3, 4), (1, 0), (0, 0)])
def test_of_equal_alternatives_the_lower_id_comes_first_whatever_others_ask_for(
    numbers: tuple[int, int | None], size: int
) -> None:
    # bfloat16 has few numbers: many of them are equal, as they are in models of that type.
    rows = (2 * torch.randn(2, size, generator=torch.Generator().manual_seed(size))).bfloat16().float()
    rows[:, 0], rows[:, 1], rows[:, 2] = 0.0, -0.0, -math.inf
    rows[1] = torch.where(rows[1] > 1, 1.0, rows[1])
    found = token_logprobs(rows, [0, 0], numbers)
    for row, of_row, number in zip(rows, found, numbers, strict=True):
        ordered = sorted(range(size), key=[-value for value in row.tolist()].__getitem__)[: number or 0]
        assert ordered == [] if of_row is None else [one.token_id for one in of_row.top] == ordered
        if of_row is not None and number:
            assert of_row.top[0].token_id == sample(row[None], [SampleRow(Sampling(), 0, ())])[0]
            wanted = torch.log_softmax(row, -1)[ordered]
            assert torch.equal(torch.tensor([one.logprob for one in of_row.top]), wanted)


def plain_draw(row: torch.Tensor, sampling: Sampling, position: int) -> int:
    """Returns the token by the definitions, from all tokens in order."""
    size = len(row)
    ids = sorted(range(size), key=[-value for value in row.tolist()].__getitem__)[: sampling.top_k or size]
    scores = (row.double()[ids] - row.double().max()) / sampling.temperature
    shares = torch.softmax(scores, dim=0)
    before = shares.cumsum(0) - shares
    kept = [
        i == 0 or (bool(before[i] < sampling.top_p) and scores[i] >= math.log(sampling.min_p or 1e-300))
        for i in range(len(ids))
    ]
    noise = uniform_noise(noise_starts([sampling.seed], [position]), size)[0][ids]
    values = scores - torch.log(-torch.log(noise))
    return ids[max((i for i in range(len(ids)) if kept[i]), key=values.tolist().__getitem__)]


@pytest.mark.parametrize("size", [255, 256, 257, 300, 5000])
@pytest.mark.parametrize("kind", ["peaked", "flat", "equal", "of few numbers", "mostly excluded"])
def test_draws_are_those_of_a_plain_reference(kind: str, size: int) -> None:
    """What is kept: one token, as many as are looked at first, one more, or nearly all; equal ones are divided."""
    rng, generator = random.Random(size), torch.Generator().manual_seed(size)
    rows = torch.randn(12, size, generator=generator) * {"peaked": 6.0, "equal": 0.0}.get(kind, 0.5)
    if kind == "of few numbers":
        rows = (4 * rows).round() / 4
    if kind == "mostly excluded":
        rows[:, torch.randperm(size, generator=generator)[3:]] = -math.inf
    samplings = [
        Sampling(
            temperature=rng.choice([0.5, 1.0, 2.0]),
            top_k=rng.choice([0, 0, 1, 40, 255, 256, 257, 4096, 4097, 2**32 - 1]),
            top_p=rng.choice([1.0, 0.999, 0.9, 0.3]),
            min_p=rng.choice([0.0, 0.0, 0.01, 0.6]),
            seed=rng.randrange(2**64),
        )
        for _ in range(12)
    ]
    for position in range(2):
        chosen = sample(rows, [SampleRow(sampling, position, ()) for sampling in samplings])
        assert chosen == [plain_draw(row, s, position) for row, s in zip(rows, samplings, strict=True)]


def test_the_vocabulary_is_not_sorted_for_what_is_among_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    plain = torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda self, **how: widths.append(self.shape[-1]) or plain(self, **how))
    monkeypatch.setattr("numpy.sort", lambda *given, **how: pytest.fail("all of it is sorted"))
    rows = 6 * torch.randn(8, 128_256, generator=torch.Generator().manual_seed(1))
    for sampling in (Sampling(temperature=0.7, top_p=0.95), Sampling(temperature=1.0, top_k=50, min_p=0.1)):
        sample(rows, [SampleRow(sampling, position, ()) for position in range(8)])
    assert max(widths) == 256


def test_noise_is_never_0_or_1() -> None:
    noise = uniform_noise(noise_starts(range(50), range(50)), 2000)
    assert 0 < float(noise.min()) < float(noise.max()) < 1


class Counted(list[int]):
    """A history that counts what is read of it."""

    num_read = 0

    def __getitem__(self, key):
        found = super().__getitem__(key)
        self.num_read += len(found) if isinstance(key, slice) else 1
        return found

    def __iter__(self):
        self.num_read += len(self)
        return super().__iter__()


@pytest.mark.parametrize("length", [100, 10_000])
def test_a_step_looks_at_new_tokens_only(length: int) -> None:
    history, state = Counted([3] * length), RowState()
    sampling = Sampling(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.5)
    for step in range(20):
        sample(logits()[None], [SampleRow(sampling, step, history, state)])
        if step == 0:
            history.num_read = 0
        history.append(step % SIZE)
    # Each once for the whole of it, and once for what is generated.
    assert history.num_read <= 40


def test_log_probabilities_of_many_rows_are_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: copies.append(1) or plain(self))
    for name in ("__float__", "item"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, method=method: copies.append(1) or method(self))
    token_logprobs(logits().expand(64, -1), list(range(32)) * 2, [20] * 64)
    assert len(copies) == 2
