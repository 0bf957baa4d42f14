"""Values for gateway tests."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bucketserve_gateway.models import ModelCard, ModelCatalog, ServedModel

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
    return ModelCatalog({name: ServedModel(card, tokenizer)})
