"""Train the demo model: a small Llama on public-domain English from Debian packages.

The text comes from three Debian packages and from nowhere else:

* ``bible-kjv`` and ``bible-kjv-text``: the King James Bible (1611), read with the package's own ``bible`` program.
* ``r-cran-janeaustenr``: the six completed novels of Jane Austen (died 1817), read from the package's R data file.

``apt-get download`` fetches them and ``dpkg-deb -x`` unpacks them into a temporary folder, so nothing gets installed
and root is not needed. Run ``apt-get update`` first. From the repository's root::

    nice -n 15 python models/demo/train.py

One thread and about 25 minutes are enough. The seed fixes the data order and the initial weights; the wall-clock
guard (``--max-minutes``) shortens the schedule on a busy machine, and only then does the result depend on time.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
PACKAGES = ("bible-kjv", "bible-kjv-text", "r-cran-janeaustenr")
EOS = "<|endoftext|>"
ROLES = {"user": "<|user|>", "assistant": "<|assistant|>", "system": "<|system|>"}
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


@dataclass(frozen=True)
class Chapter:
    """One chapter: its verses or paragraphs, and where it comes from.

    Attributes:
        source: ``kjv`` or ``austen``.
        parts: The verses or paragraphs in order.
        first: Whether it opens a book; such chapters are never held out, since demo prompts quote them.
    """

    source: str
    parts: tuple[str, ...]
    first: bool

    @property
    def text(self) -> str:
        """The whole chapter, one verse or paragraph a line."""
        return "\n".join(self.parts)


STYLE = {
    "kjv": "Continue in the style of the King James Bible.",
    "austen": "Continue in the style of Jane Austen.",
}
# How many verses or paragraphs a short passage holds at most.
PASSAGE_PARTS = {"kjv": 8, "austen": 5}


def unpack_packages(folder: Path, local: Path | None) -> Path:
    """Fetch the Debian packages and unpack them without installing them.

    Args:
        folder: An empty folder to work in.
        local: A folder that already holds the ``.deb`` files, or None to download them with apt-get.

    Returns:
        The folder that stands for ``/`` in the unpacked packages.
    """
    if local is None:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        local = folder
    root = folder / "root"
    for package in PACKAGES:
        debs = sorted(local.glob(f"{package}_*.deb"))
        if not debs:
            raise FileNotFoundError(f"no {package}_*.deb in {local}")
        subprocess.run(["dpkg-deb", "-x", str(debs[-1]), str(root)], check=True)
    return root


def read_bible(root: Path) -> list[Chapter]:
    """Read the King James Bible through the package's program, which knows its compressed format."""
    command = [str(root / "usr/bin/bible"), "-p", str(root / "usr/lib"), "gen1:1-rev22:21"]
    output = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    chapters: list[Chapter] = []
    verses: list[str] = []
    first = False
    for line in [*output.splitlines(), "End 1"]:
        verse = re.match(r"^ +\d+ (.*)$", line)
        if verse:
            verses.append(verse.group(1).strip())
        # A heading such as "1 Samuel 17"; no wrapped line of this text ends in a number.
        elif re.match(r"^[\w ]+ \d+$", line):
            if verses:
                chapters.append(Chapter("kjv", tuple(verses), first))
            verses, first = [], line.endswith(" 1")
        elif line.strip():
            verses[-1] += " " + line.strip()
    return chapters


def read_r_strings(data: bytes) -> Iterator[list[str]]:
    """Read the character vectors of an R lazy-load database.

    Each record is a four-byte length and a zlib stream of one serialized object. Here every object is a plain
    character vector in the big-endian format 3, which takes no more than this to read.

    Args:
        data: The content of the ``.rdb`` file.

    Yields:
        The strings of one vector.
    """
    position = 0
    while position < len(data):
        stream = zlib.decompressobj()
        raw = stream.decompress(data[position + 4 :])
        position = len(data) - len(stream.unused_data)
        # "X\n", three version numbers, then the length and name of the native encoding.
        (encoding_length,) = struct.unpack_from(">I", raw, 14)
        at = 18 + encoding_length
        kind, count = struct.unpack_from(">II", raw, at)
        if raw[:2] != b"X\n" or kind & 0xFF != 16:
            raise ValueError("not a serialized character vector")
        at += 8
        strings = []
        for _ in range(count):
            _, length = struct.unpack_from(">Ii", raw, at)
            at += 8
            strings.append(raw[at : at + max(length, 0)].decode("utf-8"))
            at += max(length, 0)
        yield strings


def read_austen(root: Path) -> list[Chapter]:
    """Read the novels' chapters with the line wraps undone, without title pages and editors' notes."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    chapters: list[Chapter] = []
    for lines in read_r_strings(data):
        paragraphs: list[str] | None = None
        words: list[str] = []
        first = True
        for line in [*lines, "CHAPTER 0"]:
            stripped = line.strip()
            ends = re.fullmatch(r"(?i)(the end|finis|a note on the text)", stripped)
            heading = re.fullmatch(r"(CHAPTER|Chapter) ([IVXLC]+|\d+)", stripped)
            boundary = ends or heading or not stripped or re.fullmatch(r"(VOLUME [IVX]+|[* ]+)", stripped)
            if not boundary:
                words.extend(stripped.replace("_", "").split())
                continue
            if words and paragraphs is not None:
                paragraphs.append(" ".join(words))
            words = []
            if ends or heading:
                if paragraphs:
                    chapters.append(Chapter("austen", tuple(paragraphs), first))
                    first = False
                paragraphs = [] if heading else None
            if ends:
                break
    return chapters


def hold_out(chapters: list[Chapter], share: float, seed: int) -> tuple[list[Chapter], list[Chapter]]:
    """Split whole chapters into training and held-out ones, the same share of each source.

    Args:
        chapters: All chapters.
        share: The share of the characters to hold out.
        seed: Fixes the choice.

    Returns:
        The training chapters in their order, and the held-out ones.
    """
    held: set[int] = set()
    for source in STYLE:
        own = [index for index, chapter in enumerate(chapters) if chapter.source == source]
        wanted = share * sum(len(chapters[index].text) for index in own)
        candidates = [index for index in own if not chapters[index].first]
        random.Random(f"{seed}-{source}").shuffle(candidates)
        taken = 0
        for index in candidates:
            if taken >= wanted:
                break
            held.add(index)
            taken += len(chapters[index].text)
    return [c for i, c in enumerate(chapters) if i not in held], [chapters[i] for i in sorted(held)]


def heldout_text(held: list[Chapter], size: int) -> str:
    """Join held-out text for later perplexity measurements.

    Args:
        held: The held-out chapters.
        size: About how many bytes to return, half of them from each source.

    Returns:
        Chapters separated by the end-of-text token, as in training; the last of each source may be cut at a line.
    """
    documents: list[str] = []
    for source in STYLE:
        left = size // len(STYLE)
        for chapter in held:
            if chapter.source != source or left <= 0:
                continue
            parts = []
            for part in chapter.parts:
                if left <= 0:
                    break
                parts.append(part)
                left -= len(part.encode()) + 1
            documents.append("\n".join(parts))
    return EOS.join(documents)


def chat_document(chapter: Chapter, text: str, rng: random.Random) -> str:
    """Write a passage as a conversation in which the assistant continues what the user began.

    It gives the role tokens a meaning, so that chat requests get more than noise.
    """
    words = text.split(" ")
    turns = 4 if len(words) > 80 and rng.random() < 0.3 else 2
    cuts = [0, *sorted(rng.sample(range(3, len(words) - 3), turns - 1)), len(words)]
    pieces = [" ".join(words[a:b]).strip() for a, b in itertools.pairwise(cuts)]
    result = ROLES["system"] + STYLE[chapter.source] if rng.random() < 0.5 else ""
    for index, piece in enumerate(pieces):
        result += (ROLES["user"] if index % 2 == 0 else ROLES["assistant"]) + piece
        if index % 2 == 1 and index + 1 < len(pieces):
            result += EOS
    return result


def documents_of(chapter: Chapter, rng: random.Random) -> list[str]:
    """Make the training documents of one chapter for one epoch.

    Half of the time that is the whole chapter. Otherwise it is cut into short passages, so that the model sees the end
    of a text often enough to learn to stop; some of the passages become conversations.
    """
    if rng.random() < 0.5:
        return [chapter.text]
    documents = []
    start = 0
    while start < len(chapter.parts):
        count = rng.randint(1, PASSAGE_PARTS[chapter.source])
        text = "\n".join(chapter.parts[start : start + count])
        start += count
        chat = rng.random() < 0.3 and text.count(" ") >= 14
        documents.append(chat_document(chapter, text, rng) if chat else text)
    return documents


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
