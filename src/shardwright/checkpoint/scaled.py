"""Weights in 8-bit floats with scales beside them.

Decides which scales are understood: `weight_scale` or `weight_scale_inv` (both are factors, whatever the name says),
one for the whole tensor, one a row, or one a block of `block` rows and columns. value = weight * scale, in float32.
Knows no config.

Formats: https://github.com/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md (blocks of 128 x 128),
https://github.com/vllm-project/compressed-tensors (whole tensors and rows)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from shardwright.checkpoint.entry import quoted
from shardwright.checkpoint.extents import Box
from shardwright.checkpoint.stored import Plain, Stored
from shardwright.errors import FileError

if TYPE_CHECKING:
    from torch import Tensor

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
SCALES = ("weight_scale", "weight_scale_inv")
IGNORED = ("input_scale", "activation_scale")
"""Scales of activations, which stay in the model's own type here."""

REMEDY = "download it again"


@final
@dataclass(frozen=True)
class Scaled(Stored):
    """One weight; `steps` are the rows and columns that share a scale, and `scale` has one for each such block."""

    weight: Plain
    scale: Plain
    steps: tuple[int, ...]

    @property
    def name(self) -> str:
        """The weight's."""
        return self.weight.name

    @property
    def dtype(self) -> str:
        """The weight's."""
        return self.weight.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return self.weight.shape

    @property
    def path(self) -> str:
        """The weight's."""
        return self.weight.path

    def values(self, box: Box) -> "Iterator[tuple[Box, Tensor]]":
        """In float32, each product rounded once."""
        for taken, values in self.weight.values(box):
            # Scales of the blocks that cover the chunk, each repeated over its block's part in the chunk.
            blocks = tuple(
                (start // step, -(-stop // step)) for (start, stop), step in zip(taken, self.steps, strict=True)
            )
            factors = self._factors(blocks)
            for dim, ((start, stop), step) in enumerate(zip(taken, self.steps, strict=True)):
                if factors.shape[dim] > 1:
                    factors = factors.repeat_interleave(step, dim).narrow(dim, start % step, stop - start)
            yield taken, values.mul_(factors)

    def _factors(self, blocks: Box) -> "Tensor":
        table = self.scale.whole(blocks[: len(self.scale.shape)]).float()
        return table.reshape([stop - start for start, stop in blocks])


def scaled(name: str, tensors: Mapping[str, Plain], block: tuple[int, int]) -> Scaled | None:
    """The weight `name` with the scale beside it, or None where it has none.

    Raises:
        FileError: it has two, or one of a shape or type that is none of those above.
    """
    weight, stem = tensors[name], name.removesuffix("weight")
    found = [tensors[stem + suffix] for suffix in SCALES if stem + suffix in tensors]
    if not found:
        return None
    if len(found) > 1:
        problem = f"tensor {quoted(name)} has both {' and '.join(SCALES)}"
        raise FileError(weight.path, problem, REMEDY)
    [scale] = found
    steps = _steps(weight.shape, scale.shape, block)
    if steps is None or scale.dtype not in ("float32", "bfloat16", "float16"):
        problem = f"tensor {quoted(scale.name)} is {scale.dtype} {list(scale.shape)} where {list(weight.shape)} of"
        wanted = f"{weight.dtype} in blocks of {list(block)} wants one float, one a row, or one a block"
        raise FileError(scale.path, f"{problem} {wanted}", REMEDY)
    return Scaled(weight, scale, steps)


def _steps(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...] | None:
    if len(shape) != 2:
        return None
    rows, columns = shape
    whole = (max(rows, 1), max(columns, 1))
    known = {
        (): whole, (1,): whole, (1, 1): whole, (rows,): (1, whole[1]), (rows, 1): (1, whole[1]),
        (-(-rows // block[0]), -(-columns // block[1])): block,
    }  # fmt: skip
    return known.get(scales)
