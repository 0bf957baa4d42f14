"""Values for gateway tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bucketserve.v1 import common_pb2, inference_pb2, scheduler_pb2
from bucketserve_gateway.admission import Admission
from bucketserve_gateway.detokenizer import TokenBytes
from bucketserve_gateway.models import ModelCard, ModelCatalog, ServedModel
from bucketserve_gateway.requests import OpenRequest
from bucketserve_gateway.validation import ValidRequest

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "Größe, façade, naïve, Ærøskøbing, žluťoučký kůň",
    "日本語のテキストと漢字、ひらがな、カタカナ",
    "emoji 😀 😃 👩‍👩‍👧 🇩🇪 and symbols ∑ ∂ ≠",
    "in the beginning was the word and the word was with the people",
]


def byte_level_bpe() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def byte_fallback_bpe() -> PreTrainedTokenizerFast:
    """Like Llama 2's: a meta symbol for spaces, bytes for what the vocabulary lacks, a stripped leading space."""
    alphabet = [*(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "▁t", "he", "▁the"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def byte_fallback_without_strip() -> PreTrainedTokenizerFast:
    """Like Gemma's: spaces are kept, and bytes below 0x80 are tokens too."""
    tokenizer = byte_fallback_bpe()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def word_piece() -> PreTrainedTokenizerFast:
    """Like BERT's, which joins words by spaces and cleans up what is before punctuation."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, "do n't stop , it 's here ."], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]")


def metaspace_unigram() -> PreTrainedTokenizerFast:
    """Like T5's: pieces of whole characters, a meta symbol for spaces."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def suffix_bpe() -> PreTrainedTokenizerFast:
    """Like the first GPT's: a token that ends a word says so, and the space comes with the next one."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<end>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")


def without_decoder() -> PreTrainedTokenizerFast:
    """Whole words, joined by spaces."""
    words = ["<unk>", "<end>", *sorted({word for line in CORPUS for word in line.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")


def an_open_request(
    valid: ValidRequest,
    prompt_ids: list[int],
    max_tokens: int,
    resume: Callable[[OpenRequest, str], None] = lambda opened, former: None,
    *,
    prefix_salt: bytes = b"",
) -> OpenRequest:
    return OpenRequest(
        valid,
        prompt_ids,
        max_tokens,
        scheduler_pb2.Ticket(model=valid.model.card.name),
        scheduler_pb2.RunSpec(prefix_salt=prefix_salt),
        max_attempts=3,
        max_pending_tokens=1000,
        resume=resume,
    )


def catalog(name: str = "demo", context_tokens: int = 100) -> ModelCatalog:
    tokenizer = byte_level_bpe()
    card = ModelCard(
        name=name,
        context_tokens=context_tokens,
        vocab_size=len(tokenizer),
        eos_token_ids=(0,),
        has_chat_template=False,
        default_max_tokens=32,
    )
    return ModelCatalog({name: ServedModel(card, tokenizer, TokenBytes(tokenizer.backend_tokenizer))})


class Caller:
    """What a handler sees of a call."""

    def __init__(self, peer: str = "ipv4:127.0.0.1:1", remaining_s: float | None = None, key: str = "") -> None:
        self._peer = peer
        self._key = key
        self._remaining_s = remaining_s

    def peer(self) -> str:
        return self._peer

    def time_remaining(self) -> float | None:
        return self._remaining_s

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("traceparent", "00-1"), *((("authorization", f"Bearer {self._key}"),) if self._key else ()))


class Generation:
    """Stands for InferenceServicer.generate: requests that go on as a test says."""

    def __init__(self) -> None:
        self.started: list[inference_pb2.GenerateRequest] = []
        self.remaining_s: list[float | None] = []
        self.num_open = 0
        self.may_end = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(
        self, request: inference_pb2.GenerateRequest, metadata: Mapping[str, str], remaining_s: float | None
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Starts, sends a token, waits, sends another one, ends."""
        self.started.append(request)
        self.remaining_s.append(remaining_s)
        self.num_open += 1
        try:
            if self.error is not None:
                raise self.error
            yield inference_pb2.GenerateResponse(started=inference_pb2.GenerateStarted(model="demo", prompt_tokens=3))
            for number, text in enumerate(("a", "b")):
                logprob = common_pb2.TokenLogprob(token_id=number, logprob=-1.0)
                position = common_pb2.PositionLogprobs(chosen=logprob, top=[logprob, logprob])
                chunk = inference_pb2.GenerateChunk(text=text, token_ids=[number], logprobs=[position])
                yield inference_pb2.GenerateResponse(chunk=chunk)
                await self.may_end.wait()
            usage = inference_pb2.Usage(prompt_tokens=3, output_tokens=2, cached_prompt_tokens=1)
            finished = inference_pb2.GenerateFinished(
                reason=common_pb2.FINISH_REASON_STOP, usage=usage, matched_stop="end"
            )
            yield inference_pb2.GenerateResponse(finished=finished)
        finally:
            self.num_open -= 1


def an_admission(**limits: int) -> Admission:
    return Admission(
        **{"max_calls": 1000, "max_calls_per_connection": 1000, "max_bytes": 1 << 20, **limits},
        on_refused=lambda reason: None,
    )
