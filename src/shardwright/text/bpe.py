"""A byte-level BPE tokenizer trained on a run's own text, saved as Hugging Face has them."""

from collections.abc import Iterable
from pathlib import Path

END = "<|endoftext|>"
"""Ends a text, and a generation."""

FEWEST = 257
"""Words of a byte-level tokenizer: every byte, and `END`."""


def train_bpe(texts: Iterable[str], vocabulary: int, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of at most `vocabulary` words, 256 bytes and `END` among them.

    Raises:
        OSError: they cannot be written.
    """
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "bos_token": END}))
    (directory / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
