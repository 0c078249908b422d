"""SentencePiece BPE (`tokenizer.ggml.model` = llama): merges recovered from scores, bytes for what has no piece.

Decides that the pair merged next is the one whose joint piece has the highest score, as SentencePiece does; of pieces
with equal scores, the one that comes first in the file. Knows no special tokens.

Algorithm: https://github.com/google/sentencepiece/blob/master/src/bpe_model.cc
"""

import tokenizers
from tokenizers import decoders, models, normalizers

from shardwright.text.keys import Keys
from shardwright.text.parts import Refusals

NORMAL, BYTE = 1, 6
"""Values of `tokenizer.ggml.token_type`: pieces that merging makes, and single bytes."""

SPACE = "▁"


def build(keys: Keys, tokens: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer without its special tokens, which adds BOS where the file does not say.

    Raises:
        FileError: a key is missing or makes no sense.
    """
    prefix = keys.flag("add_space_prefix", True)
    unknown = keys.token("unknown_token_id", len(tokens))
    kinds = keys.kinds(len(tokens))
    with Refusals(keys.path):
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab=keys.ids(tokens),
                merges=_merges(tokens, kinds, keys.scores(len(tokens))),
                unk_token=None if unknown is None else tokens[unknown],
                fuse_unk=True,
                byte_fallback=kinds.count(BYTE) == 256,
            )
        )
        # A text gets a space in front even where it has one: transformers' newer Metaspace differs there.
        backend.normalizer = normalizers.Sequence(
            [*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)]
        )
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace(SPACE, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                *([decoders.Strip(" ", 1, 0)] if prefix else []),
            ]
        )
    return backend, True


def _merges(tokens: list[str], kinds: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, the best piece first."""
    pieces = {token: -score for token, kind, score in zip(tokens, kinds, scores, strict=True) if kind == NORMAL}
    ordered = sorted(pieces, key=pieces.__getitem__)  # stable: equal scores stay in the file's order
    return [
        (piece[:at], piece[at:])
        for piece in ordered
        for at in range(1, len(piece))
        if piece[:at] in pieces and piece[at:] in pieces
    ]
