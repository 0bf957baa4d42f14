"""Text of the demo model: public-domain English from Debian packages, as chapters and as training documents.

* ``bible-kjv`` and ``bible-kjv-text``: the King James Bible (1611), read with the package's own ``bible`` program.
* ``r-cran-janeaustenr``: the six completed novels of Jane Austen (died 1817), read from the package's R data file.

``apt-get download`` fetches them and ``dpkg-deb -x`` unpacks them into a folder, so nothing gets installed and root is
not needed. Run ``apt-get update`` first.
"""

from __future__ import annotations

import itertools
import random
import re
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("bible-kjv", "bible-kjv-text", "r-cran-janeaustenr")
EOS = "<|endoftext|>"
ROLES = {"user": "<|user|>", "assistant": "<|assistant|>", "system": "<|system|>"}


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
