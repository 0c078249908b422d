"""Byte-level BPE (`tokenizer.ggml.model` = gpt2): how text is cut before merging, and the merges.

Decides which pre-tokenisers are known: by the name that llama.cpp's converter gives them, with the expressions of the
models' own tokenizer.json. Knows no keys but those of a vocabulary.

Names: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp (`tokenizer_pre`)
"""

from dataclasses import dataclass, replace

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from shardwright.errors import UnsupportedError
from shardwright.text.keys import Keys
from shardwright.text.parts import Refusals, one_line

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+END"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*END"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Words end where small letters do, and what may follow them."""
TEKKEN = CASED.replace("END", "").replace(r"\p{N}{1,3}", r"\p{N}")
GPT4O = CASED.replace("END", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?")


@dataclass(frozen=True, kw_only=True)
class Pretokenizer:
    """How text is cut before merging: by each expression in turn, and a cut of one is never undone by the next.

    `compose` is Unicode's NFC before everything; `whole_words` takes a piece that is a token as that token, whatever
    the merges say; `bos` is whether BOS is added where the file does not say; `falcon` cuts as that model does, by
    digits of the text already written in byte letters.
    """

    splits: tuple[str, ...]
    compose: bool = False
    whole_words: bool = False
    bos: bool = False
    falcon: bool = False


_GPT2 = Pretokenizer(splits=(GPT2,))
_DIGITS = Pretokenizer(splits=(r"\p{N}", GPT2))
_LLAMA3 = Pretokenizer(splits=(LLAMA3,))
_QWEN2 = Pretokenizer(splits=(QWEN2,))
# Where llama.cpp leaves out a normalisation that a model was trained with, it is put back: `compose`.
_ROWS = {
    # llama.cpp's fallback, and so the meaning of the name.
    ("default",): Pretokenizer(splits=(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    ("gpt-2", "phi-2", "jais", "gigachat", "mellum", "exaone4", "a.x-4.0"): _GPT2,
    ("olmo", "mpt"): replace(_GPT2, compose=True),
    ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"): _DIGITS,
    ("command-r",): replace(_DIGITS, compose=True),
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"): replace(
        _LLAMA3, whole_words=True, bos=True
    ),
    ("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"): _LLAMA3,
    ("qwen2",): replace(_QWEN2, compose=True),
    ("deepseek-r1-qwen", "megrez", "stablelm2"): _QWEN2,
    ("tekken",): Pretokenizer(splits=(TEKKEN,), whole_words=True, bos=True),
    ("gpt-4o",): Pretokenizer(splits=(GPT4O,)),
    ("falcon",): Pretokenizer(splits=(r"[0-9][0-9][0-9]",), falcon=True),
    ("deepseek-coder",): Pretokenizer(splits=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
}
PRETOKENIZERS = {name: row for names, row in _ROWS.items() for name in names}


def build(keys: Keys, tokens: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer without its special tokens, and whether it adds BOS where the file does not say.

    Raises:
        UnsupportedError: its pre-tokeniser is not known here.
        FileError: a key is missing or makes no sense.
    """
    pretokenizer = _pretokenizer(keys)
    with Refusals(keys.path):
        backend = tokenizers.Tokenizer(_bpe(keys, tokens, whole_words=pretokenizer.whole_words))
        backend.decoder = decoders.ByteLevel()
        backend.pre_tokenizer = _cut(pretokenizer, keys.flag("add_space_prefix", False))
        if pretokenizer.compose:
            backend.normalizer = normalizers.NFC()
    return backend, pretokenizer.bos


def _pretokenizer(keys: Keys) -> Pretokenizer:
    pre = keys.get("pre")
    if not isinstance(pre, str) or pre not in PRETOKENIZERS:
        raise UnsupportedError(
            f"{keys.path}: tokenizer.ggml.pre={one_line(pre)}: only {', '.join(PRETOKENIZERS)} are supported; "
            "use the model's Hugging Face directory"
        )
    return PRETOKENIZERS[pre]


def _bpe(keys: Keys, tokens: list[str], *, whole_words: bool) -> models.BPE:
    ids = keys.ids(tokens)
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
    if pretokenizer.falcon:
        words = [pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        return pre_tokenizers.Sequence([*words, pre_tokenizers.Digits(individual_digits=False), *cuts])
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
