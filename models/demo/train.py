"""Train the demo model: a small Llama on public-domain English, the text of corpus.py.

From the repository's root, after ``apt-get update``::

    nice -n 15 python models/demo/train.py

One thread and about 25 minutes are enough. The seed fixes the data order and the initial weights; the wall-clock
guard (``--max-minutes``) shortens the schedule on a busy machine, and only then does the result depend on time.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import (
    EOS,
    ROLES,
    STYLE,
    Chapter,
    documents_of,
    heldout_text,
    hold_out,
    read_austen,
    read_bible,
    unpack_packages,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
VOCAB_SIZE = 4096
MAX_POSITIONS = 2048

# Up to this share of the token budget: sequences a step, tokens a sequence. Short sequences are cheaper and give more
# updates, so they come first; the last share teaches the positions that long prompts use.
STAGES = ((0.65, 4, 256), (0.85, 4, 512), (1.0, 1, MAX_POSITIONS))

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def token_stream(chapters: list[Chapter], tokenizer: Tokenizer, seed: int) -> Iterator[int]:
    """Yield training tokens for ever, each epoch with its own order and cuts, an end-of-text before each document."""
    eos = tokenizer.token_to_id(EOS)
    epoch = 0
    while True:
        rng = random.Random(f"{seed}-{epoch}")
        documents = [document for chapter in chapters for document in documents_of(chapter, rng)]
        rng.shuffle(documents)
        for encoding in tokenizer.encode_batch(documents):
            yield eos
            yield from encoding.ids
        epoch += 1


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer; every byte is in its alphabet, so any UTF-8 text has tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, *ROLES.values()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Make the untrained model, 4.39 million parameters with the embedding shared between input and output."""
    eos = tokenizer.token_to_id(EOS)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=eos,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, target: Path) -> None:
    """Write the model in bf16 and the tokenizer; each file appears whole, so that a reader never sees half of one."""
    target.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=target.parent))
    try:
        half = copy.deepcopy(model).to(torch.bfloat16)
        eos = tokenizer.token_to_id(EOS)
        half.generation_config = GenerationConfig(bos_token_id=eos, eos_token_id=eos, pad_token_id=eos)
        half.save_pretrained(temporary)
        specials = {"bos_token": EOS, "eos_token": EOS, "pad_token": EOS}
        extra = list(ROLES.values())
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            **specials,
            additional_special_tokens=extra,
            model_max_length=MAX_POSITIONS,
            clean_up_tokenization_spaces=False,
            chat_template=CHAT_TEMPLATE,
        )
        fast.save_pretrained(temporary)
        # Newer transformers versions leave this file out; older readers look for it.
        special_map = json.dumps({**specials, "additional_special_tokens": extra}, indent=2)
        (temporary / "special_tokens_map.json").write_text(special_map + "\n", encoding="utf-8")
        for path in temporary.iterdir():
            # A temporary folder's files are private to their owner; the repository's are not.
            path.chmod(0o644)
            os.replace(path, target / path.name)
    finally:
        shutil.rmtree(temporary)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, ids: list[int], window: int, limit: int | None = None) -> float:
    """Return the mean loss a token over consecutive windows, each read without what came before it.

    Args:
        model: The model.
        ids: The tokens of the held-out text.
        window: Tokens a window.
        limit: The most windows to read, or None for all.
    """
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window)[:limit]:
        batch = torch.tensor([ids[start : start + window + 1]])
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        total += torch.nn.functional.cross_entropy(logits[0].float(), batch[0, 1:], reduction="sum").item()
        count += batch.shape[1] - 1
    model.train()
    return total / count


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, length: int = 40) -> str:
    """Continue a prompt greedily, for a look at the progress."""
    model.eval()
    ids = torch.tensor([[tokenizer.token_to_id(EOS), *tokenizer.encode(prompt).ids]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
    model.train()
    return tokenizer.decode(output[0].tolist())


def stage_at(progress: float) -> tuple[int, int]:
    """Return the sequences a step and the tokens a sequence at a share of the schedule."""
    for until, sequences, length in STAGES:
        if progress < until:
            return sequences, length
    return STAGES[-1][1:]


def train(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    stream: Iterator[int],
    validation: list[int],
    args: argparse.Namespace,
) -> None:
    """Run the schedule, with a progress line every 50 steps and a checkpoint every few minutes."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    begun = time.monotonic()
    next_save = begun + 60 * args.save_minutes
    seen, step, smooth = 0, 0, math.log(VOCAB_SIZE)
    while True:
        elapsed = time.monotonic() - begun
        progress = max(seen / args.tokens, elapsed / (60 * args.max_minutes))
        if progress >= 1:
            break
        sequences, length = stage_at(progress)
        warm = min(1.0, (step + 1) / args.warmup)
        rate = args.lr * warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = torch.tensor([[next(stream) for _ in range(length + 1)] for _ in range(sequences)])
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += sequences * length
        step += 1
        smooth += (loss.item() - smooth) * max(0.02, 1 / step)
        if step % 50 == 0:
            speed = seen / (time.monotonic() - begun)
            print(
                f"{progress:6.1%}  step {step}  {seen / 1e6:.2f}M tokens  {elapsed / 60:.1f} min  "
                f"{speed:.0f} tokens/s  {sequences}x{length}  lr {rate:.1e}  loss {smooth:.3f}",
                flush=True,
            )
        if time.monotonic() >= next_save:
            save(model, tokenizer, args.out)
            next_save = time.monotonic() + 60 * args.save_minutes
            print(f"checkpoint: validation loss {evaluate(model, validation, 512, limit=16):.3f}", flush=True)
            print(f"  {sample(model, tokenizer, 'And the king said')!r}", flush=True)
    save(model, tokenizer, args.out)
    print(f"trained: {step} steps, {seen} tokens, {(time.monotonic() - begun) / 60:.1f} min", flush=True)


def main() -> None:
    """Read the texts, train the tokenizer and the model, and report the held-out loss."""
    parser = argparse.ArgumentParser(description="Train the demo model on public-domain text from Debian packages.")
    parser.add_argument("--out", type=Path, default=HERE / "model", help="folder for the model and the tokenizer")
    parser.add_argument("--heldout", type=Path, default=HERE / "heldout.txt", help="file for held-out text")
    parser.add_argument("--packages", type=Path, help="folder with the .deb files; without it apt-get downloads them")
    parser.add_argument("--tokens", type=float, default=3.7e6, help="training tokens")
    parser.add_argument("--max-minutes", type=float, default=29, help="wall-clock guard on the training")
    parser.add_argument("--save-minutes", type=float, default=4, help="minutes between checkpoints")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="warm-up steps")
    parser.add_argument("--seed", type=int, default=1611)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory(prefix="demo-text-") as name:
        root = unpack_packages(Path(name), args.packages)
        chapters = read_bible(root) + read_austen(root)
    training, held = hold_out(chapters, share=0.01, seed=args.seed)
    for source in STYLE:
        kept = sum(len(c.text.encode()) for c in training if c.source == source)
        out = sum(len(c.text.encode()) for c in held if c.source == source)
        print(f"{source}: {kept} bytes to train on, {out} bytes held out")
    args.heldout.write_text(heldout_text(held, 40_000), encoding="utf-8")

    tokenizer = train_tokenizer([chapter.text for chapter in training])
    validation_text = EOS + EOS.join(chapter.text for chapter in held) + EOS
    validation = tokenizer.encode(validation_text).ids
    ratio = len(validation_text.encode()) / len(validation)
    epoch = sum(len(encoding.ids) for encoding in tokenizer.encode_batch([chapter.text for chapter in training]))
    print(f"{epoch} training tokens an epoch, {len(validation)} held-out tokens, {ratio:.2f} bytes a token")

    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    train(model, tokenizer, token_stream(training, tokenizer, args.seed), validation, args)

    final = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    for window in (512, MAX_POSITIONS):
        loss = evaluate(final, validation, window)
        bits = loss / math.log(2) / ratio
        print(
            f"held out, windows of {window}: loss {loss:.4f}, perplexity {math.exp(loss):.2f}, {bits:.3f} bits a byte"
        )
    for path in sorted(args.out.iterdir()):
        print(f"{path.stat().st_size:>10}  {path.name}")
    for prompt in ("In the beginning", "And the king said", "It is a truth universally acknowledged"):
        print(repr(sample(final, tokenizer, prompt)))


if __name__ == "__main__":
    main()
