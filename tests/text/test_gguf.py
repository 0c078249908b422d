"""GGUF tokenizers against three others: byte-level BPE written out in plain Python, `tokenizers`, and transformers."""

import functools
import itertools
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import regex
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from shardwright.errors import FileError, UnsupportedError
from shardwright.text.tokenizer import Tokenizer

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%s}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
    r"|\p{N}{1,%s}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# From each model's published tokenizer.json; "default" from llama.cpp (src/llama-vocab.cpp), which alone defines it.
PUBLISHED = {
    "smollm": [r"\p{N}", GPT2],
    "gpt-2": [GPT2],
    "llama-bpe": [TIKTOKEN % 3],
    "qwen2": [TIKTOKEN % 1],
    "default": [r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9]{3}"],
    "tekken": [CASED % ("", "", 1)],
    "gpt-4o": [CASED % (ENDINGS, ENDINGS, 3)],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"],
}
SPECIAL = regex.compile(r"(<\|im_start\|>|<\|im_end\|>|<\|endoftext\|>|<repo_name>|<file_sep>|<empty_output>)")


def byte_letters() -> dict[int, str]:
    """GPT-2's writing of bytes: printable Latin-1 as itself, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


LETTERS = byte_letters()


def spelled(word: str) -> str:
    return "".join(LETTERS[byte] for byte in word.encode())


def cut(words: list[str], *splits: str) -> list[str]:
    for split in splits:
        words = [piece for word in words for piece in regex.splititer(f"({split})", word) if piece]
    return words


class PlainBpe:
    """Byte-level BPE as its paper says it: merge the pair of the lowest rank, again and again."""

    def __init__(self, metadata: dict[str, object], pre: str) -> None:
        tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
        assert isinstance(tokens, list)
        assert isinstance(merges, list)
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.pre = pre
        self.word = functools.cache(self.merged)

    def encode(self, text: str) -> list[int]:
        return [i for part in SPECIAL.split(text) if part for i in self.part(part)]

    def part(self, text: str) -> Iterator[int]:
        if SPECIAL.fullmatch(text):
            yield self.ids[text]
            return
        words = [unicodedata.normalize("NFC", text) if self.pre == "qwen2" else text]
        if self.pre == "falcon":
            words = [spelled(word) for word in cut(words, r"[\p{P}$+<=>^~|`]+", GPT2)]
            words = cut(words, r"[\p{Nd}\p{Nl}\p{No}]+", "[0-9]{3}")
        else:
            words = [spelled(word) for word in cut(words, *PUBLISHED[self.pre])]
        for word in words:
            yield from self.word(word)

    def merged(self, letters: str) -> list[int]:
        if self.pre in ("llama-bpe", "tekken") and letters in self.ids:
            return [self.ids[letters]]
        # The embedded vocabulary lacks 21 bytes that its training text never had; they vanish.
        parts = [letter for letter in letters if letter in self.ids]
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, len(self.ranks)) for pair in itertools.pairwise(parts)]
            rank = min(ranks)
            if rank == len(self.ranks):
                break
            i = ranks.index(rank)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [self.ids[part] for part in parts]


@pytest.mark.parametrize("pre", [*PUBLISHED, "falcon"])
def test_every_pretokenizer_equals_bpe_written_out(pre: str, metadata: dict[str, object], samples: list[str]) -> None:
    """On the embedded vocabulary, whatever the pre-tokeniser: it is the cutting that differs."""
    tokenizer = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}, "x")
    plain = PlainBpe(metadata, pre)
    for text in samples:
        assert tokenizer.encode(text) == plain.encode(text), text


def test_embedded_model_equals_its_published_tokenizer(
    smollm: Tokenizer, metadata: dict[str, object], samples: list[str]
) -> None:
    """The oracle has the pre-tokeniser of SmolLM2's tokenizer.json, out of the library's own parts: no expressions."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = metadata["tokenizer.ggml.merges"]
    assert isinstance(tokens, list)
    assert isinstance(kinds, list)
    assert isinstance(merges, list)
    pairs = [tuple(merge.split(" ")) for merge in merges]
    oracle = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    digits = pre_tokenizers.Digits(individual_digits=True)
    oracle.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]
    )
    oracle.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    oracle.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in control])
    for text in samples:
        ids = smollm.encode(text)
        assert ids == oracle.encode(text).ids, text
        assert smollm.decode(ids) == oracle.decode(ids), text


def test_embedded_model_equals_transformers_where_that_is_right(
    smollm: Tokenizer, transformers_smollm: PreTrainedTokenizerFast, samples: list[str]
) -> None:
    """Only texts without digits: transformers takes `pre = smollm` for GPT-2's, which keeps runs of digits."""
    without = [text for text in samples if not regex.search(r"\p{N}", text)]
    assert len(without) > 100
    for text in without:
        ids = smollm.encode(text)
        assert ids == transformers_smollm(text).input_ids, text
        assert smollm.decode(ids) == transformers_smollm.decode(ids, skip_special_tokens=True), text
    assert smollm.encode("a 123") == smollm.encode("a") + smollm.encode(" ") + [
        i for digit in "123" for i in smollm.encode(digit)
    ]


@pytest.mark.parametrize(("pre", "oracle"), [("gpt-2", GPT2Tokenizer), ("qwen2", Qwen2Tokenizer)])
def test_families_equal_their_transformers_classes(
    pre: str, oracle: Callable[..., PreTrainedTokenizerFast], metadata: dict[str, object], samples: list[str]
) -> None:
    tokens, merges = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.merges"]
    assert isinstance(tokens, list)
    assert isinstance(merges, list)
    theirs = oracle(vocab={token: i for i, token in enumerate(tokens)}, merges=[tuple(m.split(" ")) for m in merges])
    ours = Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": pre}, "x")
    for text in samples:
        if not SPECIAL.search(text):
            assert ours.encode(text) == theirs(text).input_ids, text


def test_metadata_of_the_embedded_model(smollm: Tokenizer, transformers_smollm: PreTrainedTokenizerFast) -> None:
    assert smollm.vocabulary == len(transformers_smollm) == 49152
    assert smollm.stop_ids == {2}
    assert smollm.names == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    assert smollm.chat_template == transformers_smollm.chat_template


def test_building_is_fast(metadata: dict[str, object]) -> None:
    """It is on the way to the first token; 0.13 s on two cores, and a busy machine gets three tries."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        Tokenizer.from_gguf(metadata, "x")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3


def tiny(**changes: object) -> dict[str, object]:
    """A vocabulary of six tokens; a change to None leaves its key out."""
    keys: dict[str, object] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["<s>", "</s>", "a", "b", "ab", "<think>"],
        "token_type": [3, 3, 1, 1, 1, 4],
        "merges": ["a b"],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "ids"),
    [
        ({}, [4]),
        ({"add_bos_token": True}, [0, 4]),
        ({"add_eos_token": True}, [4, 1]),
        ({"add_bos_token": True, "add_eos_token": True}, [0, 4, 1]),
        # Llama 3's files of before the flag existed: llama.cpp adds BOS for this pre-tokeniser.
        ({"pre": "llama-bpe"}, [0, 4]),
        ({"pre": "llama-bpe", "add_bos_token": False}, [4]),
    ],
)
def test_what_is_added_by_itself(changes: dict[str, object], ids: list[int]) -> None:
    tokenizer = Tokenizer.from_gguf(tiny(**changes), "x")
    assert tokenizer.encode("ab") == ids
    assert tokenizer.encode("ab", special=False) == [4]


def test_kinds_of_tokens() -> None:
    """Control tokens are not shown, user-defined ones are, and both are found inside words."""
    tokenizer = Tokenizer.from_gguf(tiny(), "x")
    assert tokenizer.encode("a<s>b<think>a") == [2, 0, 3, 5, 2]
    assert tokenizer.decode([2, 0, 3, 5, 2]) == "ab<think>a"


def test_added_tokens_are_found_before_normalisation() -> None:
    """NFC would make one character of the two that this token ends in."""
    tokens = ["<s>", "</s>", "a", "b", "ab", "<e\u0301>"]
    assert Tokenizer.from_gguf(tiny(pre="qwen2", tokens=tokens), "x").encode("a<e\u0301>b<\u00e9>") == [2, 5, 3]


@pytest.mark.parametrize(("pre", "like"), [("olmo", "gpt-2"), ("command-r", "smollm"), ("dbrx", "llama-bpe")])
def test_names_of_one_meaning(pre: str, like: str, metadata: dict[str, object], samples: list[str]) -> None:
    """They differ only in what is composed first, in whole words, and in BOS."""
    one, other = (
        Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": name, "tokenizer.ggml.add_bos_token": False}, "x")
        for name in (pre, like)
    )
    for text in samples:
        if unicodedata.is_normalized("NFC", text) or pre == "dbrx":
            assert one.encode(text) == other.encode(text), text


def test_whole_words_beat_merges_in_llama_3() -> None:
    """Llama 3 takes a word that is a token even where no merge makes it; the others do not."""
    words = tiny(tokens=["<s>", "</s>", "a", "b", "ab", "aba"], token_type=[3, 3, 1, 1, 1, 1])
    assert Tokenizer.from_gguf(words, "x").encode("aba") == [4, 2]
    assert Tokenizer.from_gguf(words | {"tokenizer.ggml.pre": "llama-bpe"}, "x").encode("aba") == [0, 5]


def test_prefix_space_is_gpt_2s() -> None:
    """The class of transformers honours it; beside other expressions nobody does."""
    spaced = tiny(tokens=["<s>", "</s>", "a", "b", "ab", "Ġ"], token_type=[3, 3, 1, 1, 1, 1], add_space_prefix=True)
    assert Tokenizer.from_gguf(spaced, "x").encode("ab") == [5, 4]
    assert Tokenizer.from_gguf(spaced | {"tokenizer.ggml.pre": "smollm"}, "x").encode("ab") == [4]


def test_every_end_of_turn_stops() -> None:
    assert Tokenizer.from_gguf(tiny(eot_token_id=3, eom_token_id=4), "x").stop_ids == {1, 3, 4}
    assert Tokenizer.from_gguf(tiny(eos_token_id=None), "x").stop_ids == frozenset()


@pytest.mark.parametrize("end", ["<|im_end|>", "<|end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>"])
def test_a_turn_ends_by_its_token_though_no_key_names_it(end: str) -> None:
    """Phi-3's files name `<|endoftext|>` alone; a control token of that text stops, and plain text never does."""
    tokens = ["<s>", "<|endoftext|>", "a", "b", "ab", end]
    assert Tokenizer.from_gguf(tiny(tokens=tokens, token_type=[3, 3, 1, 1, 1, 3]), "x").stop_ids == {1, 5}
    assert Tokenizer.from_gguf(tiny(tokens=tokens, token_type=[3, 3, 1, 1, 1, 1]), "x").stop_ids == {1}


def test_files_without_token_types() -> None:
    """Old ones: the named tokens are special all the same."""
    assert Tokenizer.from_gguf(tiny(token_type=None), "x").encode("a<s>b") == [2, 0, 3]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": None}, "model is missing"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": ["a", 1]}, "tokens is no list of strings"),
        ({"tokens": "ab"}, "tokens is no list of strings"),
        ({"tokens": ["<s>", "</s>", "a", "b", "ab", "a"]}, "tokens has the same token twice"),
        ({"token_type": [3]}, "token_type is no list of 6 integers"),
        ({"token_type": [3, 3, 1, 1, 1, "4"]}, "token_type is no list of 6 integers"),
        ({"merges": None}, "merges is missing"),
        ({"merges": [["a", "b"]]}, "merges is no list of strings"),
        ({"merges": ["b a"]}, "merges has 'b a', which makes no token"),
        ({"merges": ["ab"]}, "no usable tokenizer"),
        ({"eos_token_id": 6}, "eos_token_id is 6, not one of the 6 tokens"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
        ({"bos_token_id": True}, "bos_token_id is True"),
        ({"eot_token_id": "1"}, "eot_token_id is '1'"),
        ({"add_bos_token": 1}, "add_bos_token is 1, not true or false"),
        ({"add_bos_token": True, "bos_token_id": None}, "bos_token_id is missing"),
    ],
)
def test_damaged_metadata(changes: dict[str, object], named: str) -> None:
    with pytest.raises(FileError, match=regex.escape(named)) as caught:
        Tokenizer.from_gguf(tiny(**changes), Path("model.gguf"))
    assert str(caught.value).startswith("model.gguf: ")
    assert "\n" not in str(caught.value)


def test_damaged_chat_template() -> None:
    with pytest.raises(FileError, match=r"tokenizer\.chat_template is no string"):
        Tokenizer.from_gguf(tiny() | {"tokenizer.chat_template": 3}, "x")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "bert"}, "model=bert: only gpt2 .byte-level BPE. and llama .SentencePiece. are supported"),
        ({"model": ["llama"]}, "model=..llama..: only gpt2"),
        (
            {"pre": "viking"},
            "pre=viking: only default, gpt-2, .* are supported; use the model's Hugging Face directory",
        ),
        ({"pre": None}, "pre=None"),
    ],
)
def test_other_kinds_are_refused_by_name(changes: dict[str, object], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        Tokenizer.from_gguf(tiny(**changes), "x")
