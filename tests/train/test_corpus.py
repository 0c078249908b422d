"""Text of three kinds into one row of tokens, made once; sequences of it in one order, whoever takes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tests.train.runs import recipe_of

from shardwright.errors import FileError, UsageError
from shardwright.text.bpe import END, train_bpe
from shardwright.text.tokenizer import Tokenizer
from shardwright.train import corpus as module
from shardwright.train.corpus import Corpus, opened, tokenised
from shardwright.train.windows import Windows

TEXTS = ["one two", "three — four", "five"]


def tokenizer_of(home: Path) -> Tokenizer:
    train_bpe(TEXTS, 270, home / "tokenizer")
    return Tokenizer.from_directory(home / "tokenizer")


def corpus_of(home: Path, kind: str) -> Corpus:
    place = home / kind
    place.mkdir()
    if kind == "txt":
        for at, text in enumerate(TEXTS):
            (place / f"{at}.txt").write_text(text, encoding="utf-8")
    elif kind == "jsonl":
        lines = "".join(json.dumps({"text": text}) + "\n\n" for text in TEXTS)
        (place / "all.jsonl").write_text(lines, encoding="utf-8-sig")  # a byte-order mark is no text
    else:
        parquet.write_table(pyarrow.table({"text": TEXTS, "other": [1, 2, 3]}), place / "all.parquet")
    return Corpus.of(recipe_of(home, data={"paths": [kind]}))


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_every_kind_gives_the_same_row(tmp_path: Path, kind: str) -> None:
    """Each text whole, then the end token."""
    tokenizer, corpus = tokenizer_of(tmp_path), corpus_of(tmp_path, kind)
    row = opened(tokenised(corpus, tokenizer, tmp_path / "tokens", "key"))
    assert row.dtype == np.uint16
    expected = [ids for text in TEXTS for ids in (*tokenizer.encode(text), tokenizer.end)]
    assert row.tolist() == expected
    assert tokenizer.end == 0
    assert tokenizer.names["eos_token"] == END


def test_a_row_is_made_once_and_again_when_its_text_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, corpus = tokenizer_of(tmp_path), corpus_of(tmp_path, "txt")
    made: list[Path] = []
    real = module.write_file
    monkeypatch.setattr(module, "write_file", lambda path, chunks: (made.append(path), real(path, chunks)))
    for _ in range(2):
        tokenised(corpus, tokenizer, tmp_path / "tokens", corpus.key(tmp_path / "tokenizer"))
    (corpus.files[0]).write_text("something else")
    tokenised(corpus, tokenizer, tmp_path / "tokens", corpus.key(tmp_path / "tokenizer"))
    assert len(set(made)) == len(made) == 2


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", b'{"text": "x"}\n{"text"\n', "a.jsonl: line 2 is not JSON"),
    ("a.jsonl", b'{"words": "x"}\n', "a.jsonl: line 1 has no text in 'text'; set data.field"),
    ("a.jsonl", b'["x"]\n', "a.jsonl: line 1 has no text in 'text'"),
    ("a.jsonl", b'{"text": "x\\ud800y"}\n', "a.jsonl: line 1 has half of a surrogate pair; mend it"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl: line 1 is not JSON"),
    ("a.txt", b"\xff\xfe", "a.txt: it is not UTF-8 at byte 0"),
    ("a.parquet", b"PAR1", "a.parquet: it is no Parquet file"),
])  # fmt: skip
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError, match=message):
        list(Corpus.of(recipe_of(tmp_path, data={"paths": [name]})).texts())


@pytest.mark.parametrize("column", [[1, 2], [b"one", b"two"], [["one"], ["two"]], [{"words": "one"}]])
def test_a_column_that_holds_no_text_is_refused(tmp_path: Path, column: list[Any]) -> None:
    """As a JSONL record is; `str` of a number or a list is no text."""
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(FileError, match=r"a.parquet: column 'text' holds .*, no text; set data.field"):
        list(Corpus.of(recipe_of(tmp_path, data={"paths": ["a.parquet"]})).texts())


def test_text_from_a_dictionary_and_without_missing_values(tmp_path: Path) -> None:
    column = pyarrow.array(["one", None, "two", "one"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert list(Corpus.of(recipe_of(tmp_path, data={"paths": ["a.parquet"]})).texts()) == ["one", "two", "one"]


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match=r"empty: no file in it ends with one of .txt, .jsonl, .parquet; set data.suff"):
        Corpus.of(recipe_of(tmp_path, data={"paths": ["empty"]}))
    corpus = Corpus.of(recipe_of(tmp_path))
    (tmp_path / "text.txt").unlink()
    with pytest.raises(FileError, match=r"text.txt: it cannot be read: No such file or directory; put it back"):
        list(corpus.texts())


def windows_of(tokens: int, length: int, validation: float = 0.0, seed: int = 0) -> Windows:
    return Windows(np.arange(tokens, dtype=np.uint16), length, validation, seed)


@given(st.integers(2, 200), st.integers(1, 30), st.integers(1, 7), st.integers(1, 5), st.integers(1, 4))
def test_a_step_is_dealt_out_whole_and_in_order(tokens: int, length: int, batch: int, ranks: int, size: int) -> None:
    """Over any number of data ranks and any micro-batch: the same tokens, rows numbered without a gap."""
    windows = windows_of(tokens, length)
    chosen = windows.of_step(3, batch)
    whole = windows.micros(chosen, 0, 1, batch)[0]
    parts = [micro for rank in range(ranks) for micro in windows.micros(chosen, rank, ranks, size)]
    assert [int(t) for micro in parts for t in micro.batch.tokens] == whole.batch.tokens.tolist()
    row = 0
    for micro in parts:
        assert micro.first_row == row
        assert micro.targets.tolist() == (micro.batch.tokens + 1).tolist()
        row += len(micro.targets)
    assert row == sum(map(windows.targets, chosen))


@given(st.integers(2, 300), st.integers(1, 30), st.integers(1, 6))
def test_an_epoch_has_every_sequence_once_and_epochs_differ(tokens: int, length: int, batch: int) -> None:
    windows = windows_of(tokens, length)
    count = windows.training
    steps = -(-2 * count // batch)
    numbers = [number for step in range(steps) for number in windows.of_step(step, batch)][: 2 * count]
    assert sorted(numbers[:count]) == sorted(numbers[count:]) == list(range(count))
    if count > 20:
        assert numbers[:count] != numbers[count:]
    other = windows_of(tokens, length, seed=1)
    assert count <= 20 or other.of_step(0, count) != windows.of_step(0, count)


def test_the_last_sequences_are_for_validation_and_the_very_last_is_short() -> None:
    windows = windows_of(104, 10, validation=0.25)
    assert list(windows.held_out) == [9, 10]
    assert windows.training == 9
    assert [windows.targets(window) for window in (8, 9, 10)] == [10, 10, 3]
    assert set(windows.of_step(0, 9)) == set(range(9))


def test_too_little_text_is_said() -> None:
    with pytest.raises(UsageError, match=r"data.paths=<1 tokens>: they have 1 tokens, and one sequence needs 2"):
        windows_of(1, 10)


def test_resuming_in_the_middle_gives_the_same_steps() -> None:
    """The order is a function of the step's number, not of what was asked before."""
    first, second = windows_of(500, 7), windows_of(500, 7)
    run: list[Any] = [first.of_step(step, 4) for step in range(60)]
    assert [second.of_step(step, 4) for step in (59, 3, 20)] == [run[59], run[3], run[20]]
