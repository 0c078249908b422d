"""The driver's view of a model: its config and its tokenizer, read from headers alone. No weights, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from shardwright.checkpoint.opening import open_checkpoint
from shardwright.errors import UsageError
from shardwright.models.config import ModelConfig
from shardwright.models.read import read_config
from shardwright.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelSource:
    """Where a model is, what it is, and how text becomes its tokens."""

    path: Path
    config: ModelConfig
    tokenizer: Tokenizer

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Read the headers of a Hugging Face directory or a GGUF file.

        Raises:
            FileError, UnsupportedError: it is missing, damaged, or of a kind not built.
        """
        with open_checkpoint(path) as checkpoint:
            config, _ = read_config(checkpoint)
            gguf = "general.architecture" in checkpoint.config
            tokenizer = Tokenizer.from_gguf(checkpoint.config, path) if gguf else Tokenizer.from_directory(path)
        return cls(Path(path), config, tokenizer)

    def encode(self, prompt: str | Sequence[int], *, raw: bool) -> list[int]:
        """The prompt's token ids: through the chat template, or as it stands where `raw`; ids are taken as they are.

        Raises:
            UsageError: the prompt is empty, too long for the context, or has ids outside the vocabulary.
        """
        return self.encode_all([prompt], raw=raw)[0]

    def encode_all(self, prompts: Sequence[str | Sequence[int]], *, raw: bool) -> list[list[int]]:
        """The same of many; their chat template runs once."""
        for prompt in prompts:
            if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
                shown = repr(prompt)[:60]
                raise UsageError(
                    "prompt", shown, "it is neither text nor a list of token ids", "use a str or ids.tolist()"
                )
            if not prompt:
                raise UsageError("prompt", repr(prompt), "there is nothing to continue", "give it some text")
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if raw or not texts:
            encoded = iter([self.tokenizer.encode(text) for text in texts])
        else:
            encoded = iter(self.tokenizer.chats([[{"role": "user", "content": text}] for text in texts]))
        return [self._checked(prompt, next(encoded) if isinstance(prompt, str) else list(prompt)) for prompt in prompts]

    def _checked(self, prompt: str | Sequence[int], ids: list[int]) -> list[int]:
        if not ids:
            problem = "the model's tokenizer, or its chat template, makes no token of it"
            raise UsageError("prompt", repr(prompt)[:60], problem, "use --raw, or another text")
        strange = next((i for i in ids if type(i) is not int), None)
        if strange is not None:
            raise UsageError("prompt", f"<token {strange!r}>", "a token id is an int", "use ids.tolist() of an array")
        limit, words = self.config.context, self.config.vocabulary
        if len(ids) >= limit:
            problem = f"the model's context is {limit} tokens, and a new one must fit too"
            raise UsageError("prompt", f"<{len(ids)} tokens>", problem, f"shorten it to {limit - 1}")
        wrong = next((i for i in ids if not 0 <= i < words), None)
        if wrong is not None:
            raise UsageError("prompt", f"<token {wrong}>", f"the model has {words} words", "check the tokenizer")
        return ids
