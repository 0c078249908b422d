"""Text to token ids and back, one class over every kind of tokenizer file.

Decides what callers may ask. Does not know any file's format (`directory`, `gguf`) nor what a chat template says.
Building one imports `tokenizers`, and rendering a chat jinja2; importing this file imports neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardwright.errors import UsageError
from shardwright.text.stream import TextStream

if TYPE_CHECKING:
    from shardwright.text.parts import Parts


class Tokenizer:
    """Token ids of a text, and the text of token ids.

    `stop_ids` end a generation; `names` are the special tokens by their Hugging Face names (`bos_token`, …).
    """

    def __init__(self, parts: Parts) -> None:
        self._backend = parts.backend
        self.origin: Path = parts.origin
        self.names: Mapping[str, str] = parts.names
        self.stop_ids: frozenset[int] = parts.stop_ids
        self.chat_template: str | None = parts.chat_template

    @classmethod
    def from_directory(cls, path: Path | str) -> Tokenizer:
        """From a Hugging Face directory: tokenizer.json and what lies beside it.

        Raises:
            FileError: tokenizer.json is missing, or a file does not hold what it should.
        """
        from shardwright.text.directory import read

        return cls(read(Path(path)))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, object], path: Path | str) -> Tokenizer:
        """From the metadata of a GGUF file, as plain values (str, int, bool, lists or tuples); `path` is for messages.

        Raises:
            FileError: a key is missing, of the wrong type, or names a token that does not exist.
            UnsupportedError: the vocabulary is no byte-level BPE, or its pre-tokeniser is not known here.
        """
        from shardwright.text.gguf import read

        return cls(read(metadata, Path(path)))

    @property
    def vocabulary(self) -> int:
        """One more than the highest id; a model may have more rows than this."""
        return max(self._backend.get_vocab_size(), *(i + 1 for i in self._backend.get_added_tokens_decoder()), 0)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of `text`, by default with what the tokenizer adds by itself, such as BOS.

        The text of a special token inside `text` is that token in either case.
        """
        try:
            return self._backend.encode(text, add_special_tokens=special).ids
        except TypeError as error:
            shown = ascii(text[:40])
            raise UsageError("text", shown, "half a surrogate pair is no Unicode text", "give it as UTF-8") from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(ids, skip_special_tokens=True)

    @property
    def end(self) -> int | None:
        """The token that ends a text, where the tokenizer names one."""
        name = self.names.get("eos_token")
        return None if name is None else self._backend.token_to_id(name)

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as `from_directory` and transformers read them."""
        directory.mkdir(parents=True, exist_ok=True)
        said = {**self.names, **({"chat_template": self.chat_template} if self.chat_template else {})}
        (directory / "tokenizer_config.json").write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8")
        self._backend.save(str(directory / "tokenizer.json"))

    def stream(self) -> TextStream:
        """A decoder for one generation, fed id by id."""
        return TextStream(self.decode)

    def chat(self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation as the model's chat template writes it; nothing is added to what it writes.

        Raises:
            UsageError: there is no chat template, or it refuses these messages.
            FileError: the template itself is broken.
        """
        return self.chats([messages], add_generation_prompt=add_generation_prompt)[0]

    def chats(
        self, conversations: Sequence[Sequence[Mapping[str, object]]], *, add_generation_prompt: bool = True
    ) -> list[list[int]]:
        """The same of many, at little more than the time of one."""
        from shardwright.text.chat import render

        if self.chat_template is None:
            raise UsageError("model", self.origin, "its tokenizer has no chat template", "use --raw")
        texts = render(
            self.chat_template,
            conversations,
            names=self.names,
            add_generation_prompt=add_generation_prompt,
            origin=self.origin,
        )
        return [self.encode(text, special=False) for text in texts]
