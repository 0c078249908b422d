"""What a family of models is, as data: how files call it, its tensors and its sizes. `models.families` has the rows."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from shardwright.layout.spec import Transform
from shardwright.models.config import Block, ModelConfig
from shardwright.models.schema import Schema

Fused = Literal["in order", "by KV head"]
"""How one tensor holds several of ours: each whole, one after another; or, for each KV head, its query heads, then its
key, then its value."""


@dataclass(frozen=True, kw_only=True)
class Naming:
    """From the decoder's own source names, less `.weight` or `.bias`, to a checkpoint's; `{i}` is the layer.

    transforms: what turns a checkpoint's tensor into ours, for the sources that need it · fused: layers whose sources
    share one tensor, and how · by_block: other names in some kinds of layer · ignored: names a file may hold that
    nothing reads · prefix: what files of the bare model leave out of every name.
    """

    names: Mapping[str, str]
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    fused: Mapping[str, Fused] = field(default_factory=dict)
    by_block: Mapping[Block, Mapping[str, str]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    prefix: str = ""

    def of(self, block: Block) -> "Naming":
        """As files of models with this kind of layer have it."""
        return replace(self, names={**self.names, **self.by_block.get(block, {})}, by_block={})

    def bare(self) -> "Naming":
        """As a file of the bare model has it."""
        names = {ours: theirs.removeprefix(self.prefix) for ours, theirs in self.names.items()}
        ignored = tuple(name.removeprefix(self.prefix) for name in self.ignored)
        return replace(self, names=names, ignored=ignored, prefix="")


def _nothing(tensors: Container[str]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class GGUF:
    """How GGUF files have a family, as llama.cpp's converter writes them.

    architecture: their `general.architecture` · naming: of their tensors · keys: the schema's key → theirs, less the
    architecture, beside those of all families (`read_gguf.KEYS`) · implied: what of the schema's keys follows from
    which tensors there are.
    """

    architecture: str
    naming: Naming
    keys: Mapping[str, str] = field(default_factory=dict)
    implied: Callable[[Container[str]], dict[str, Any]] = _nothing


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family.

    architecture: Hugging Face's · schema: what its config.json says, and what of the model follows from that · keys:
    our name of a key → its own, where they differ · huggingface: names of tensors · gguf: the same of GGUF files, where
    there are such.
    """

    name: str
    architecture: str
    schema: type[Schema] = Schema
    keys: Mapping[str, str] = field(default_factory=dict)
    huggingface: Naming
    gguf: GGUF | None = None

    def naming(self, config: ModelConfig) -> Naming:
        """How a Hugging Face checkpoint of this model names its tensors."""
        return self.huggingface.of(config.block)
