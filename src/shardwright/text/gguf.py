"""A tokenizer from the metadata of a GGUF file.

Decides which kinds of vocabulary are read, which tokens are special, and what is added to a text by itself. Knows
nothing of the file's bytes: who read them hands over plain values.
"""

from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import processors

from shardwright.errors import UnsupportedError
from shardwright.text import byte_level, sentencepiece
from shardwright.text.keys import Keys
from shardwright.text.parts import Parts, one_line

CONTROL, USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type` that make a token one piece wherever its text stands."""

NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}
STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")
TURN_ENDS = ("<|im_end|>", "<|end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>")
"""Control tokens that end a text whatever the keys say, as in llama.cpp (`special_eog_ids` in its `llama-vocab.cpp`):
files of chat models (Phi-3, Gemma, early Llama 3) name the end of a document alone."""

KINDS = {"gpt2": byte_level.build, "llama": sentencepiece.build}


def read(metadata: Mapping[str, object], path: Path) -> Parts:
    """Build the tokenizer that the `tokenizer.*` keys describe."""
    keys = Keys(metadata, path)
    model = keys.get("model")
    if model is None:
        raise keys.wrong("model", "is missing")
    if not isinstance(model, str) or model not in KINDS:
        raise UnsupportedError(
            f"{path}: tokenizer.ggml.model={one_line(model)}: only gpt2 (byte-level BPE) and llama (SentencePiece) are "
            "supported; use the model's Hugging Face directory"
        )
    tokens = keys.strings("tokens")
    backend, bos = KINDS[model](keys, tokens)
    names = {name: tokens[i] for name, key in NAMES.items() if (i := keys.token(key, len(tokens))) is not None}
    _add_tokens(backend, tokens, keys, frozenset(names.values()))
    backend.post_processor = _ends(keys, tokens, bos=bos)
    return Parts(
        backend=backend,
        origin=path,
        names=names,
        stop_ids=_stop_ids(keys, tokens),
        chat_template=keys.chat_template(),
    )


def _stop_ids(keys: Keys, tokens: list[str]) -> frozenset[int]:
    """What the keys name, and what ends a turn by its text."""
    named = {i for key in STOPS if (i := keys.token(key, len(tokens))) is not None}
    kinds = zip(tokens, keys.kinds(len(tokens)), strict=True)
    return frozenset(named | {i for i, (token, kind) in enumerate(kinds) if kind == CONTROL and token in TURN_ENDS})


def _add_tokens(backend: tokenizers.Tokenizer, tokens: list[str], keys: Keys, named: frozenset[str]) -> None:
    kinds = zip(tokens, keys.kinds(len(tokens)), strict=True)
    added = {token: kind == CONTROL for token, kind in kinds if kind in (CONTROL, USER_DEFINED)}
    added |= dict.fromkeys(named, True)
    backend.add_tokens(
        [tokenizers.AddedToken(token, normalized=False, special=special) for token, special in added.items()]
    )


def _ends(keys: Keys, tokens: list[str], *, bos: bool) -> processors.TemplateProcessing:
    """What is added to a text: BOS before it, EOS after it, as the file says."""
    wanted = {"bos": keys.flag("add_bos_token", bos), "eos": keys.flag("add_eos_token", False)}
    ends = {}
    for end in (end for end, add in wanted.items() if add):
        token = keys.token(f"{end}_token_id", len(tokens))
        if token is None:
            raise keys.wrong(f"{end}_token_id", f"is missing, but tokenizer.ggml.add_{end}_token asks for it")
        ends[end] = {"id": end, "ids": [token], "tokens": [tokens[token]]}
    single = [piece for piece in ("bos", "$A", "eos") if piece == "$A" or piece in ends]
    return processors.TemplateProcessing(single=single, special_tokens=list(ends.values()))
