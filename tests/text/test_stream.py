"""Text piece by piece, against decoding all ids at once."""

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from shardwright.text.stream import TextStream
from shardwright.text.tokenizer import Tokenizer

IDS = st.lists(st.integers(0, 49151), max_size=60)
BYTES = st.binary(max_size=40)


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    return [*map(stream.step, ids), stream.finish()]


@given(IDS)
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_decoded_text(smollm: Tokenizer, ids: list[int]) -> None:
    """For any ids at all: control tokens, halves of characters, bytes that are no UTF-8."""
    assert "".join(pieces(smollm.stream(), ids)) == smollm.decode(ids)


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_no_half_characters(smollm: Tokenizer, text: str) -> None:
    """A text that needs none never shows U+FFFD, however its characters are cut into tokens."""
    ids = smollm.encode(text)
    shown = pieces(smollm.stream(), ids)
    assert "".join(shown) == smollm.decode(ids)
    if "\ufffd" not in smollm.decode(ids):
        assert not any("\ufffd" in piece for piece in shown)


def test_a_character_waits_for_its_last_byte(smollm: Tokenizer) -> None:
    ids = smollm.encode("a🫠b")
    shown = pieces(smollm.stream(), ids)
    assert len(ids) > 4
    assert [piece for piece in shown if piece] == ["a", "🫠", "b"]


def test_what_is_pending_at_the_end_is_not_lost(smollm: Tokenizer) -> None:
    """A generation that stops inside a character ends in U+FFFD, as decoding it whole does; and it ends once."""
    ids = smollm.encode("a🫠")[:-1]
    stream = smollm.stream()
    assert "".join(map(stream.step, ids)) == "a"
    assert stream.finish() == smollm.decode(ids)[1:] != ""
    assert stream.finish() == ""


def sentence_piece() -> tokenizers.Tokenizer:
    """Byte tokens at 3 + byte, and a leading space that only the start of a text loses."""
    names = ["<unk>", "▁", "▁x", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE(
        vocab={name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True, unk_token="<unk>"
    )
    backend = tokenizers.Tokenizer(model)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


SENTENCE_PIECE = sentence_piece()


PARTS = st.one_of(st.just([1]), st.just([2]), st.characters(codec="utf-8").map(lambda c: [3 + b for b in c.encode()]))


@given(st.lists(PARTS))
@settings(max_examples=300, deadline=None)
def test_spaces_and_byte_tokens_of_sentencepiece(parts: list[list[int]]) -> None:
    """Valid text made of spaces, words and characters byte by byte."""
    ids = [i for part in parts for i in part]
    assert "".join(pieces(TextStream(SENTENCE_PIECE.decode), ids)) == SENTENCE_PIECE.decode(ids)


@given(BYTES)
@settings(max_examples=200, deadline=None)
def test_any_bytes_of_sentencepiece(data: bytes) -> None:
    """No error where the library's stream has one: its decoder takes a newline back when a bad byte follows."""
    shown = pieces(TextStream(SENTENCE_PIECE.decode), [3 + byte for byte in data])
    assert "".join(shown).endswith(SENTENCE_PIECE.decode([3 + byte for byte in data])[-1:])


def test_a_shown_character_stays_when_a_bad_byte_follows() -> None:
    shown = pieces(TextStream(SENTENCE_PIECE.decode), [3 + 0x0A, 3 + 0xF0, 2])
    assert shown == ["\n", "", "\ufffd x", ""]
