"""SentencePiece vocabularies of GGUF files, against the algorithm written out and against transformers.

The vocabulary is the embedded model's, respelled: its first merges as pieces whose scores fall with their rank, every
character that they hold, and the 256 bytes. The file is written by the gguf package and read by our own reader.
"""

import heapq
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
from tests.text.test_gguf import LETTERS
from transformers import AutoTokenizer

from shardwright.checkpoint.gguf import read_header
from shardwright.errors import FileError
from shardwright.text.tokenizer import Tokenizer

PIECES = 12_000
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]
DEFINED = ["<think>", "  \t"]
Vocabulary = tuple[list[str], list[float], list[int]]


@pytest.fixture(scope="module")
def vocabulary(metadata: dict[str, Any]) -> Vocabulary:
    """Tokens, scores and types, in the order of Llama 2's file: special, bytes, pieces by rank, characters last."""
    byte_of = {letter: byte for byte, letter in LETTERS.items()}
    texts: dict[str, None] = {}
    for merge in metadata["tokenizer.ggml.merges"]:
        try:
            text = bytes(byte_of[letter] for letter in merge.replace(" ", "")).decode().replace(" ", "▁")
        except UnicodeDecodeError:
            continue
        if len(text) > 1:
            texts[text] = None
        if len(texts) == PIECES:
            break
    characters = sorted({character for text in texts for character in text} - set(texts))
    special = [*SPECIAL, *DEFINED, *(f"<0x{byte:02X}>" for byte in range(256))]
    scores = [0.0] * len(special) + [-float(rank) for rank in range(len(texts) + len(characters))]
    kinds = [2, 3, 3, 3, 4, 4] + [6] * 256 + [1] * (len(texts) + len(characters))
    return [*special, *texts, *characters], scores, kinds


def written(path: Path, vocabulary: Vocabulary, architecture: str = "llama", **flags: bool) -> Path:
    tokens, scores, kinds = vocabulary
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    for name, number in {"bos": 1, "eos": 2, "unknown": 0}.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for flag, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{flag}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def ours(path: Path) -> Tokenizer:
    return Tokenizer.from_gguf(read_header(path)[0], path)


class Plain:
    """SentencePiece's BPE: of all neighbours that make a piece, those of the highest score, leftmost first."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        tokens, scores, kinds = vocabulary
        self.all = {token: i for i, token in enumerate(tokens)}
        self.scores = {token: score for token, score, kind in zip(tokens, scores, kinds, strict=True) if kind == 1}
        self.whole = sorted((*SPECIAL, *DEFINED), key=len, reverse=True)
        self.segment = cache(self.merged)

    def encode(self, text: str) -> list[int]:
        return [
            1,
            *(i for part in self.parts(text) for i in ([self.all[part]] if part in self.whole else self.segment(part))),
        ]

    def parts(self, text: str) -> Iterator[str]:
        start = at = 0
        while at < len(text):
            found = next((token for token in self.whole if text.startswith(token, at)), None)
            if found is None:
                at += 1
                continue
            if start < at:
                yield text[start:at]
            yield found
            start = at = at + len(found)
        if start < at:
            yield text[start:]

    def merged(self, text: str) -> list[int]:
        symbols: list[str | None] = list("▁" + text.replace(" ", "▁"))
        after, before = list(range(1, len(symbols) + 1)), list(range(-1, len(symbols) - 1))
        heap: list[tuple[float, int, int, str]] = []

        def consider(left: int, right: int) -> None:
            if left >= 0 and right < len(symbols):
                joined = f"{symbols[left]}{symbols[right]}"
                if joined in self.scores:
                    heapq.heappush(heap, (-self.scores[joined], left, right, joined))

        for i in range(len(symbols) - 1):
            consider(i, i + 1)
        while heap:
            _, left, right, joined = heapq.heappop(heap)
            if symbols[left] is None or symbols[right] is None or f"{symbols[left]}{symbols[right]}" != joined:
                continue
            symbols[left], symbols[right] = joined, None
            after[left] = after[right]
            if after[right] < len(symbols):
                before[after[right]] = left
            consider(before[left], left)
            consider(left, after[left])
        return [i for symbol in symbols if symbol is not None for i in self.numbers(symbol)]

    def numbers(self, symbol: str) -> list[int]:
        if symbol in self.scores:
            return [self.all[symbol]]
        return [self.all[f"<0x{byte:02X}>"] for byte in symbol.encode()]


def test_equals_sentencepiece_written_out(tmp_path: Path, vocabulary: Vocabulary, samples: list[str]) -> None:
    tokenizer, plain = ours(written(tmp_path / "m.gguf", vocabulary)), Plain(vocabulary)
    own = ["a<think>b", "<think> <think>", "x  \ty", "<|user|> hi</s>", "<0x0A>", "▁▁x", "\u3000", "aaaa" * 50]
    for text in [*samples, *own]:
        assert tokenizer.encode(text) == plain.encode(text), text[:80]


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_equals_transformers(architecture: str, tmp_path: Path, vocabulary: Vocabulary, samples: list[str]) -> None:
    """Both its ways: `Metaspace` adds no space to a text that begins with one, which SentencePiece does."""
    path = written(tmp_path / "m.gguf", vocabulary, architecture)
    theirs, tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name), ours(path)
    checked = 0
    for text in samples:
        if any(token in text for token in (*SPECIAL, *DEFINED)) or (architecture == "llama" and text[:1] in (" ", "▁")):
            continue
        checked += 1
        ids = tokenizer.encode(text)
        assert ids == theirs(text).input_ids, text[:80]
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text[:80]
    assert checked > 150


def test_a_text_comes_back(tmp_path: Path, vocabulary: Vocabulary, samples: list[str]) -> None:
    """Whatever it holds, as bytes where there are no pieces; piece by piece too."""
    tokenizer = ours(written(tmp_path / "m.gguf", vocabulary))
    for text in samples:
        if not any(token in text for token in SPECIAL) and "▁" not in text and not any(d in text for d in DEFINED):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            stream = tokenizer.stream()
            assert "".join([*map(stream.step, ids[1:]), stream.finish()]) == text


def test_flags(tmp_path: Path, vocabulary: Vocabulary) -> None:
    """BOS and a space in front unless the file says otherwise, as llama.cpp has it."""
    plain = ours(written(tmp_path / "a.gguf", vocabulary, add_space_prefix=False, add_bos_token=False))
    assert plain.decode(plain.encode(" x")) == " x"
    assert 1 not in plain.encode("the")
    assert ours(written(tmp_path / "b.gguf", vocabulary, add_eos_token=True)).encode("the")[-1] == 2
    spaced = ours(written(tmp_path / "c.gguf", vocabulary))
    assert spaced.encode("the") == [1, vocabulary[0].index("▁the")]


def test_without_byte_pieces_the_unknown_one_stands_for_a_run(tmp_path: Path, vocabulary: Vocabulary) -> None:
    kept = [row for row in zip(*vocabulary, strict=True) if row[2] != 6]
    tokens, scores, kinds = (list(column) for column in zip(*kept, strict=True))
    tokenizer = ours(written(tmp_path / "m.gguf", (tokens, scores, kinds)))
    assert tokenizer.encode("\U0010ffff\U0010fffe").count(0) == 1


@pytest.mark.parametrize(("scores", "said"), [
    (None, "scores is missing"),
    ((1.0,), "scores is no list of 3 numbers, one a token"),
    ((1, 2, 3), "scores is no list of 3 numbers, one a token"),
    ((1.0, float("nan"), 2.0), "scores has one that is not finite"),
])  # fmt: skip
def test_damaged_scores(scores: object, said: str) -> None:
    keys = {"model": "llama", "tokens": ("a", "b", "ab"), "scores": scores, "bos_token_id": 0}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    with pytest.raises(FileError, match=said):
        Tokenizer.from_gguf(metadata, "x")


def test_building_is_fast(tmp_path: Path, vocabulary: Vocabulary) -> None:
    """Recovering merges is on the way to the first token."""
    metadata = read_header(written(tmp_path / "m.gguf", vocabulary))[0]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        Tokenizer.from_gguf(metadata, "x")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3
