"""What a request must yield, computed here, away from everything that can fail."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from bucketserve.core.types import RequestId
from bucketserve.engine.fake import FakeEngine, FakeSettings
from bucketserve.ports import Sampling, SequenceSpec
from tests.chaos.worker import WEIGHTS

__all__ = ["FakeOracle", "MixedOracle", "ModelOracle", "Oracle", "Request", "expected_tokens"]


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0


class Oracle(Protocol):
    """Knows what to ask an engine for, and what it may say."""

    def request(self, rng: random.Random, *, is_long: bool = False) -> Request:
        """Returns a request whose outputs can be foretold; is_long: its prompt."""
        ...

    def outputs(self, request: Request) -> Sequence[list[int]]:
        """Returns the outputs that are right: one for each set of weights that may be served."""
        ...


class FakeOracle:
    """Of the fake engine."""

    def request(self, rng: random.Random, *, is_long: bool = False) -> Request:
        """See Oracle."""
        length = rng.randrange(900, 1600) if is_long else min(max(int(rng.lognormvariate(3.5, 1.0)), 1), 900)
        prompt = tuple(rng.randrange(2, 250) for _ in range(length))
        max_tokens = rng.randrange(1, 150)
        temperature, seed = (0.7, rng.randrange(1 << 30)) if rng.random() < 0.3 else (0.0, 0)
        return Request(prompt, max_tokens, temperature, seed)

    def outputs(self, request: Request) -> Sequence[list[int]]:
        """See Oracle."""
        return [
            expected_tokens(request.prompt, request.max_tokens, request.temperature, request.seed, vocab_size)
            for vocab_size in WEIGHTS.values()
        ]


class ModelOracle:
    """Of a real model: what transformers generates greedily, where rounding can't decide which token is the best."""

    NUM_PROMPTS, MOST_TOKENS, LEAST_MARGIN = 48, 40, 0.02

    def __init__(self, directory: str, seed: int) -> None:
        """Generates everything that can be asked for."""
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        rng = random.Random(seed)
        self._outputs: dict[tuple[int, ...], list[int]] = {}
        while len(self._outputs) < self.NUM_PROMPTS:
            prompt = tuple(rng.randrange(2, model.config.vocab_size) for _ in range(rng.randrange(1, 200)))
            made = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=self.MOST_TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            best, second = torch.cat(made.logits).topk(2).values.unbind(1)
            is_sure = best - second > self.LEAST_MARGIN
            num_sure = len(is_sure) if is_sure.all() else int((~is_sure).int().argmax())
            if num_sure:
                self._outputs[prompt] = made.sequences[0, len(prompt) :].tolist()[:num_sure]
        self._prompts = sorted(self._outputs)

    def request(self, rng: random.Random, *, is_long: bool = False) -> Request:
        """See Oracle."""
        prompt = max(self._prompts, key=len) if is_long else rng.choice(self._prompts)
        return Request(prompt, rng.randint(1, len(self._outputs[prompt])))

    def outputs(self, request: Request) -> Sequence[list[int]]:
        """See Oracle."""
        return [self._outputs[request.prompt][: request.max_tokens]]


class MixedOracle(ModelOracle):
    """Of workers with a real model beside some with the fake engine: each stream is of one or the other."""

    def outputs(self, request: Request) -> Sequence[list[int]]:
        """See Oracle."""
        return [*super().outputs(request), *FakeOracle().outputs(request)]


def expected_tokens(
    prompt: Sequence[int], max_tokens: int, temperature: float, seed: int, vocab_size: int = WEIGHTS["old"]
) -> list[int]:
    """Returns the fake engine's output for these parameters."""
    engine = FakeEngine(FakeSettings(vocab_size=vocab_size))
    name = RequestId("r")
    sampling = Sampling(temperature=temperature, seed=seed)
    engine.add([SequenceSpec(request_id=name, token_ids=tuple(prompt), max_new_tokens=max_tokens, sampling=sampling)])
    tokens: list[int] = []
    while engine.has_work():
        tokens += [token.token_id for token in engine.step().tokens if token.token_id is not None]
    return tokens
