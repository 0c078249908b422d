"""The supported model families, by name. A family is a row of data beside others like it; `docs/add_a_family.md`."""

from collections.abc import Iterable
from typing import TypeVar

from shardwright.errors import UnsupportedError
from shardwright.models.family import GGUF, Family, Naming
from shardwright.models.gemma import GEMMA, GEMMA2, GEMMA3
from shardwright.models.gpt import FALCON, GPT2, GPT_NEOX, OPT, STABLELM
from shardwright.models.llama_like import LLAMA, MISTRAL, OLMO2, PHI3, QWEN2, QWEN3

__all__ = ["FAMILIES", "GGUF", "Family", "Naming", "by_architecture", "by_gguf_architecture", "by_name"]

Found = TypeVar("Found")

FAMILIES: tuple[Family, ...] = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, OLMO2),
    *(GEMMA, GEMMA2, GEMMA3),
    *(STABLELM, GPT_NEOX, FALCON, GPT2, OPT),
)


def by_architecture(architecture: object, path: str) -> Family:
    """The family of a Hugging Face `architectures` entry, or `UnsupportedError` listing those there are."""
    return _find(architecture, ((family.architecture, family) for family in FAMILIES), path)


def by_gguf_architecture(architecture: object, path: str) -> tuple[Family, GGUF]:
    """The family of a GGUF's `general.architecture`, or `UnsupportedError` listing those there are."""
    rows = ((family.gguf.architecture, (family, family.gguf)) for family in FAMILIES if family.gguf)
    return _find(architecture, rows, path)


def by_name(name: str) -> Family:
    """The family of that name."""
    return _find(name, ((family.name, family) for family in FAMILIES), "config")


def _find(name: object, rows: Iterable[tuple[str, Found]], path: str) -> Found:
    known = dict(rows)
    if not isinstance(name, str) or name not in known:
        problem = f"architecture {name!r:.80} is not supported"
        raise UnsupportedError(f"{path}: {problem}; supported are {', '.join(sorted(known))}")
    return known[name]
