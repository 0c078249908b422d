"""Weights of a few bits packed into int32 words, with a scale and a zero point for each group of inputs: GPTQ, AWQ.

Decides what their tensors mean and whether they fit together. A weight is `[out, in]`, as plain ones are, whatever the
packing; any box of it is read from the words and groups that cover it.

    weight[o, i] = scales[g, o] * (code[i, o] - zero[g, o])        g = g_idx[i], or i // group

======  ===========================  ===================  =========================================
        qweight                      qzeros               codes in a word, from the lowest bits on
======  ===========================  ===================  =========================================
GPTQ    [in / n, out], n inputs a    [groups, out / n]    0, 1, 2, … ; version 1 stores zero - 1
        word
AWQ     [in, out / n], n outputs a   [groups, out / n]    0, 2, 4, 6, 1, 3, 5, 7
        word
======  ===========================  ===================  =========================================

Formats: https://github.com/AutoGPTQ/AutoGPTQ (`qlinear_cuda_old`), https://github.com/ModelCloud/GPTQModel
(`convert_gptq_v1_to_v2_format`), https://github.com/casper-hansen/AutoAWQ (`gemm.py`)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from shardwright.checkpoint.entry import quoted
from shardwright.checkpoint.extents import Box, volume
from shardwright.checkpoint.stored import Plain, Stored
from shardwright.errors import FileError

if TYPE_CHECKING:
    from torch import Tensor

REMEDY = "download it again"
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which code of a word belongs to each of its outputs."""


@dataclass(frozen=True)
class Packing:
    """What a config says of all packed weights. group: inputs that share a scale, 0 for all of them."""

    method: str
    bits: int
    group: int
    zero_offset: int = 0

    @property
    def per_word(self) -> int:
        """Codes in a word."""
        return 32 // self.bits


@final
@dataclass(frozen=True)
class Packed(Stored):
    """One weight, of four tensors; `order` is GPTQ's `g_idx`."""

    stem: str
    packing: Packing
    words: Plain
    zeros: Plain
    scales: Plain
    order: Plain | None

    @property
    def name(self) -> str:
        """What a plain one would be called."""
        return f"{self.stem}.weight"

    @property
    def dtype(self) -> str:
        """The method and its bits."""
        return f"{self.packing.method}-{self.packing.bits}bit"

    @property
    def shape(self) -> tuple[int, ...]:
        """`[out, in]`."""
        inputs = self.words.shape[0] * (1 if self.packing.method == "awq" else self.packing.per_word)
        return self.scales.shape[1], inputs

    @property
    def path(self) -> str:
        """The words'."""
        return self.words.path

    @property
    def group(self) -> int:
        """Inputs that share a scale, one after another unless there is an order."""
        return self.packing.group or max(self.shape[1], 1)

    def values(self, box: Box) -> "Iterator[tuple[Box, Tensor]]":
        """In float32, each product rounded once."""
        if not volume(box):
            return
        from shardwright.checkpoint.unpack import unpacked

        outputs, inputs = box
        per, groups = self.packing.per_word, self._groups()[slice(*inputs)]
        span = int(groups.min()), int(groups.max()) + 1
        scales = self.scales.whole((span, outputs)).float()
        zeros = self._zeros(span, outputs)
        along = 1 if self.packing.method == "awq" else 0
        covering = [inputs, outputs]
        covering[along] = covering[along][0] // per, -(-covering[along][1] // per)
        for taken, words in self.words.values(tuple(covering)):
            codes = unpacked(words, self.packing.bits, along, self._order())
            places = list(taken)
            places[along] = taken[along][0] * per, taken[along][1] * per
            # What of the outermost words lies outside the box is dropped.
            (i, i_end), (o, o_end) = (
                (max(low, first), min(high, last))
                for (low, high), (first, last) in zip(places, (inputs, outputs), strict=True)
            )
            codes = codes[i - places[0][0] : i_end - places[0][0], o - places[1][0] : o_end - places[1][0]]
            rows = groups[i - inputs[0] : i_end - inputs[0]] - span[0]
            columns = slice(o - outputs[0], o_end - outputs[0])
            values = codes.sub_(zeros[rows, columns]).mul_(scales[rows, columns])
            yield ((o, o_end), (i, i_end)), values.T

    def _order(self) -> tuple[int, ...]:
        return AWQ_ORDER if self.packing.method == "awq" else tuple(range(self.packing.per_word))

    def _zeros(self, span: tuple[int, int], outputs: tuple[int, int]) -> "Tensor":
        from shardwright.checkpoint.unpack import unpacked

        per = self.packing.per_word
        first = outputs[0] // per
        words = self.zeros.whole((span, (first, -(-outputs[1] // per))))
        # Version 1 took 1 from each word as a whole, borrows and all; so it is put back.
        ones = sum(self.packing.zero_offset << shift for shift in range(0, 32, self.packing.bits))
        codes = unpacked(words + ones, self.packing.bits, 1, self._order())
        return codes[:, outputs[0] - first * per : outputs[1] - first * per]

    def _groups(self) -> "Tensor":
        """The group of every input, read whole on every rank so that all refuse the same file."""
        import torch

        if self.order is None:
            return torch.arange(self.shape[1]) // self.group
        groups = self.order.whole(((0, self.shape[1]),)).long()
        count = self.scales.shape[0]
        wrong = ((groups < 0) | (groups >= count)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            problem = f"tensor {quoted(self.order.name)} puts input {at:,} into group {int(groups[at])} of {count}"
            raise FileError(self.order.path, problem, REMEDY)
        return groups


def packed(stem: str, packing: Packing, parts: dict[str, Plain]) -> Packed:
    """The weight of `{stem}.qweight` and the tensors beside it, by the last word of their names.

    Raises:
        FileError: one is missing, or their types and shapes do not fit together.
    """
    words = parts["qweight"]
    for part in ("qzeros", "scales"):
        if part not in parts:
            raise FileError(words.path, f"tensor {quoted(words.name)} has no {part} beside it", REMEDY)
    weight = Packed(stem, packing, words, parts["qzeros"], parts["scales"], parts.get("g_idx"))
    if any(len(part.shape) != 2 for part in (words, weight.zeros, weight.scales)):
        raise FileError(words.path, f"tensor {quoted(words.name)}, its qzeros or its scales are no matrix", REMEDY)
    outputs, inputs = weight.shape
    groups, per = -(-inputs // weight.group), packing.per_word
    _check(weight, words, (words.shape[0], outputs // per if packing.method == "awq" else outputs), ("int32",))
    _check(weight, weight.zeros, (groups, outputs // per), ("int32",))
    _check(weight, weight.scales, (groups, outputs), ("float16", "bfloat16", "float32"))
    if weight.order is not None:
        _check(weight, weight.order, (inputs,), ("int32",))
    return weight


def _check(weight: Packed, part: Plain, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    outputs, inputs = weight.shape
    if part.shape != shape or part.dtype not in dtypes or outputs % weight.packing.per_word:
        problem = f"tensor {quoted(part.name)} is {part.dtype} {list(part.shape)}"
        wanted = f"{inputs:,} inputs in groups of {weight.group} and {outputs:,} outputs want {dtypes[0]} {list(shape)}"
        raise FileError(part.path, f"{problem} where {wanted}", "check quantization_config, or download it again")
