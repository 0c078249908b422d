"""A tokenizer from a Hugging Face directory.

Decides which of its files are believed about what, as transformers 5 does: tokenizer.json alone says what is added to a
text (`add_bos_token` in tokenizer_config.json is not heard beside it). Knows nothing of weights.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import tokenizers

from shardwright.errors import FileError
from shardwright.text.parts import REMEDY, Parts, Refusals, one_line

MAX_BYTES = {"tokenizer.json": 200_000_000, "other": 8_000_000}
"""Longest files that are read: Gemma 3's tokenizer.json, among the longest, has 33 MB; others have some 100 kB."""

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
"""In the order in which transformers adds those that are not yet tokens."""


def read(path: Path) -> Parts:
    """Read tokenizer.json and, where they exist, the configurations and the chat template beside it."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise FileError(
            path,
            "has no tokenizer.json",
            "write one with transformers: AutoTokenizer.from_pretrained(…, use_fast=True).save_pretrained(…)",
        )
    _check_size(file)
    config = _Json.of(path / "tokenizer_config.json")
    names = _names(path, config)
    with Refusals(file):
        backend = tokenizers.Tokenizer.from_file(str(file))
        # A length limit or padding saved with a tokenizer is a habit of its training, never wanted in a prompt.
        backend.no_truncation()
        backend.no_padding()
        backend.add_tokens(list(_listed(config)))
        known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        backend.add_tokens(list(_special(config, names, known)))
        # A post-processor that names unknown tokens fails at its first use, so that is now.
        backend.encode("")
    return Parts(
        backend=backend,
        origin=path,
        names=names,
        stop_ids=_stop_ids(path, backend.token_to_id(names["eos_token"]) if "eos_token" in names else None),
        chat_template=_chat_template(path, config),
    )


def _check_size(file: Path) -> None:
    size, limit = file.stat().st_size, MAX_BYTES.get(file.name, MAX_BYTES["other"])
    if size > limit:
        raise FileError(file, f"has {size:,} bytes where {limit:,} are allowed", REMEDY)


class _Json:
    """The object in one JSON file, empty where there is no file."""

    def __init__(self, file: Path, values: Mapping[str, object]) -> None:
        self.file = file
        self.values = values

    @classmethod
    def of(cls, file: Path) -> "_Json":
        if not file.is_file():
            return cls(file, {})
        _check_size(file)
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise FileError(file, f"is not readable JSON: {one_line(error)}", REMEDY) from error
        if not isinstance(values, dict):
            raise FileError(file, "holds no JSON object", REMEDY)
        return cls(file, values)

    def wrong(self, key: str, wanted: str) -> FileError:
        return FileError(self.file, f"{key} is {one_line(repr(self.values[key]))}, not {wanted}", REMEDY)

    def token(self, key: str) -> str | None:
        """A special token, written as a string or as an object with its content."""
        value = self.values.get(key)
        content = value.get("content", value) if isinstance(value, dict) else value
        if content is not None and not isinstance(content, str):
            raise self.wrong(key, "a token")
        return content or None

    def ids(self, key: str) -> frozenset[int]:
        """One id or a list of them."""
        value = self.values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(i) is not int for i in ids):
            raise self.wrong(key, "a token id or a list of them")
        return frozenset(ids)


def _names(path: Path, config: _Json) -> dict[str, str]:
    sources = [config]
    if "added_tokens_decoder" not in config.values:
        # Directories of before 2023 name their tokens in a file of its own, which then wins.
        sources.insert(0, _Json.of(path / "special_tokens_map.json"))
    found = {name: next((token for source in sources if (token := source.token(name))), None) for name in NAMES}
    return {name: token for name, token in found.items() if token is not None}


def _listed(config: _Json) -> Iterator[tokenizers.AddedToken]:
    """Tokens that the configuration lists, in the order in which they get ids."""
    listed = config.values.get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        raise config.wrong("added_tokens_decoder", "an object")
    for _, token in sorted(listed.items(), key=lambda item: (len(item[0]), item[0])):
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise config.wrong("added_tokens_decoder", "a list of tokens by their ids")
        flags = {flag: token.get(flag) is True for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        yield tokenizers.AddedToken(token["content"], **flags)


def _special(
    config: _Json, names: Mapping[str, str], known: Mapping[str, tokenizers.AddedToken]
) -> Iterator[tokenizers.AddedToken]:
    """Tokens that are special by their name, and otherwise as they are `known`; then further ones that are not."""
    for name in names.values():
        token = known.get(name) or tokenizers.AddedToken(name, normalized=False)
        token.special = True
        yield token
    for key in ("extra_special_tokens", "additional_special_tokens"):
        extra = config.values.get(key) or []
        for said in extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else [extra]:
            content = said.get("content") if isinstance(said, dict) else said
            if not isinstance(content, str):
                raise config.wrong(key, "a list of tokens")
            if content not in known:
                yield tokenizers.AddedToken(content, normalized=False, special=True)


def _stop_ids(path: Path, eos: int | None) -> frozenset[int]:
    """The EOS token, and what generation_config.json names, or config.json where that is silent."""
    own = frozenset() if eos is None else frozenset([eos])
    generation = _Json.of(path / "generation_config.json").ids("eos_token_id")
    return own | (generation or _Json.of(path / "config.json").ids("eos_token_id"))


def _chat_template(path: Path, config: _Json) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        _check_size(file)
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise FileError(file, f"is not readable text: {one_line(error)}", REMEDY) from error
    value = config.values.get("chat_template")
    if isinstance(value, list):
        named = [entry for entry in value if isinstance(entry, dict) and entry.get("name") == "default"]
        value = named[0].get("template") if named else None
    if value is not None and not isinstance(value, str):
        raise config.wrong("chat_template", "a template")
    return value
