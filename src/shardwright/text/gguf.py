"""A tokenizer from the metadata of a GGUF file: byte-level BPE only.

Decides which pre-tokenisers are known, and which keys are needed. Knows nothing of the file's bytes: who read them
hands over plain values.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from shardwright.errors import FileError, UnsupportedError
from shardwright.text.parts import REMEDY, Parts, Refusals, one_line

CONTROL, USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type` that make a token one piece wherever its text stands."""

NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
    "unk_token": "unknown_token_id",
}
STOPS = ("eos_token_id", "eot_token_id", "eom_token_id")

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True, kw_only=True)
class Pretokenizer:
    """How text is cut before merging: by each expression in turn, and a cut of one is never undone by the next.

    `compose` is Unicode's NFC before everything; `whole_words` takes a piece that is a token as that token, whatever
    the merges say; `bos` is whether BOS is added where the file does not say.
    """

    splits: tuple[str, ...]
    compose: bool = False
    whole_words: bool = False
    bos: bool = False


PRETOKENIZERS = {
    # llama.cpp's fallback, and so the meaning of the name.
    "default": Pretokenizer(splits=(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": Pretokenizer(splits=(GPT2,)),
    "llama-bpe": Pretokenizer(splits=(LLAMA3,), whole_words=True, bos=True),
    # llama.cpp leaves the normalisation out; the model was trained with it.
    "qwen2": Pretokenizer(splits=(QWEN2,), compose=True),
    "smollm": Pretokenizer(splits=(r"\p{N}", GPT2)),
}


def read(metadata: Mapping[str, object], path: Path) -> Parts:
    """Build the tokenizer that the `tokenizer.*` keys describe."""
    keys = _Keys(metadata, path)
    pretokenizer = _supported(keys)
    tokens = keys.strings("tokens")
    with Refusals(path):
        backend = tokenizers.Tokenizer(_bpe(keys, tokens, whole_words=pretokenizer.whole_words))
        backend.decoder = decoders.ByteLevel()
        backend.pre_tokenizer = _cut(pretokenizer, keys.flag("add_space_prefix", False))
        if pretokenizer.compose:
            backend.normalizer = normalizers.NFC()
    names = {name: tokens[i] for name, key in NAMES.items() if (i := keys.token(key, len(tokens))) is not None}
    _add_tokens(backend, tokens, keys, frozenset(names.values()))
    backend.post_processor = _ends(keys, tokens, bos=pretokenizer.bos)
    return Parts(
        backend=backend,
        origin=path,
        names=names,
        stop_ids=frozenset(i for key in STOPS if (i := keys.token(key, len(tokens))) is not None),
        chat_template=keys.chat_template(),
    )


class _Keys:
    """The keys of the tokenizer, each with the type it must have."""

    def __init__(self, metadata: Mapping[str, object], path: Path) -> None:
        self.metadata = metadata
        self.path = path

    def get(self, key: str) -> object:
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def wrong(self, key: str, problem: str) -> FileError:
        return FileError(self.path, f"tokenizer.ggml.{key} {problem}", REMEDY)

    def strings(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list | tuple) or not set(map(type, value)) <= {str}:
            raise self.wrong(key, "is missing" if value is None else "is no list of strings")
        return list(value)

    def kinds(self, size: int) -> list[int]:
        """The type of each token; ordinary ones where the file has no such list."""
        value = self.get("token_type")
        if value is None:
            return [1] * size
        if not isinstance(value, list | tuple) or not set(map(type, value)) <= {int} or len(value) != size:
            raise self.wrong("token_type", f"is no list of {size} integers, one a token")
        return list(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, f"is {one_line(repr(value))}, not true or false")
        return default if value is None else value

    def token(self, key: str, size: int) -> int | None:
        value = self.get(key)
        if value is not None and (type(value) is not int or not 0 <= value < size):
            raise self.wrong(key, f"is {one_line(repr(value))}, not one of the {size} tokens")
        return value

    def chat_template(self) -> str | None:
        value = self.metadata.get("tokenizer.chat_template")
        if value is not None and not isinstance(value, str):
            raise FileError(self.path, "tokenizer.chat_template is no string", REMEDY)
        return value


def _supported(keys: _Keys) -> Pretokenizer:
    model, pre = keys.get("model"), keys.get("pre")
    if model is None:
        raise keys.wrong("model", "is missing")
    if model != "gpt2":
        raise UnsupportedError(
            f"{keys.path}: tokenizer.ggml.model={one_line(model)}: only 'gpt2' (byte-level BPE) is supported; "
            "use the model's Hugging Face directory"
        )
    if not isinstance(pre, str) or pre not in PRETOKENIZERS:
        raise UnsupportedError(
            f"{keys.path}: tokenizer.ggml.pre={one_line(pre)}: only {', '.join(PRETOKENIZERS)} are supported; "
            "use the model's Hugging Face directory"
        )
    return PRETOKENIZERS[pre]


def _bpe(keys: _Keys, tokens: list[str], *, whole_words: bool) -> models.BPE:
    ids = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(ids) != len(tokens):
        raise keys.wrong("tokens", "has the same token twice")
    merges = []
    for merge in keys.strings("merges"):
        left, _, right = merge.partition(" ")
        # The library refuses halves that are no tokens, but panics on a whole that is none.
        if left + right not in ids:
            raise keys.wrong("merges", f"has {one_line(repr(merge))}, which makes no token")
        merges.append((left, right))
    return models.BPE(vocab=ids, merges=merges, ignore_merges=whole_words)


def _cut(pretokenizer: Pretokenizer, prefix: bool) -> pre_tokenizers.PreTokenizer:
    # The leading space is GPT-2's own: beside other expressions, transformers and llama.cpp ignore the flag.
    if prefix and pretokenizer.splits == (GPT2,):
        return pre_tokenizers.ByteLevel(add_prefix_space=True)
    cuts = [pre_tokenizers.Split(tokenizers.Regex(split), "isolated") for split in pretokenizer.splits]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _add_tokens(backend: tokenizers.Tokenizer, tokens: list[str], keys: _Keys, named: frozenset[str]) -> None:
    kinds = zip(tokens, keys.kinds(len(tokens)), strict=True)
    added = {token: kind == CONTROL for token, kind in kinds if kind in (CONTROL, USER_DEFINED)}
    added |= dict.fromkeys(named, True)
    backend.add_tokens(
        [tokenizers.AddedToken(token, normalized=False, special=special) for token, special in added.items()]
    )


def _ends(keys: _Keys, tokens: list[str], *, bos: bool) -> processors.TemplateProcessing:
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
