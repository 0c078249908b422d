"""Quantised checkpoints written as their tools write them, and what their weights are, both straight from the formats.

Nothing here is imported from the readers: packing goes code by code, and the values come from the codes before packing.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output whose code lies at each place of an AWQ word (AutoAWQ's `order_map`)."""


@dataclass(frozen=True)
class Quantised:
    """Codes `[in, out]`, zeros and scales `[groups, out]`, the group of each input."""

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    groups: np.ndarray

    @property
    def weight(self) -> Tensor:
        """`[out, in]`: each value by itself, in float32 as the formats have it."""
        rows, columns = self.codes.shape
        out = np.empty((columns, rows), dtype=np.float32)
        for i in range(rows):
            g = self.groups[i]
            out[:, i] = self.scales[g].astype(np.float32) * (self.codes[i] - self.zeros[g]).astype(np.float32)
        return torch.from_numpy(out)


def quantised(weight: Tensor, group: int, *, bits: int = 4, act_order: bool = False, seed: int = 0) -> Quantised:
    """A weight `[out, in]` rounded to codes by the least and the largest of each group."""
    columns, rows = weight.shape
    size = group if group > 0 else rows
    groups = np.arange(rows) // size
    if act_order:
        groups = np.random.default_rng(seed).permutation(groups)
    count, top = groups.max() + 1, (1 << bits) - 1
    matrix = weight.numpy().T
    zeros, scales = np.zeros((count, columns), dtype=np.int64), np.zeros((count, columns), dtype=np.float16)
    codes = np.zeros((rows, columns), dtype=np.int64)
    for g in range(count):
        part = matrix[groups == g]
        low, high = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
        scales[g] = ((high - low) / top).astype(np.float16)
        step = np.maximum(scales[g].astype(np.float32), 1e-6)
        zeros[g] = np.clip(np.round(-low / step), 0, top)
        codes[groups == g] = np.clip(np.round(part / step) + zeros[g], 0, top)
    return Quantised(codes, zeros, scales, groups)


def gptq(
    stem: str, weight: Quantised, *, bits: int = 4, version: int = 1, with_order: bool = True
) -> dict[str, Tensor]:
    """As AutoGPTQ and GPTQModel write it; version 1 takes 1 from the words of zeros as from whole numbers."""
    zeros = packed_rows(weight.zeros.T, bits).T
    if version == 1:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        zeros = (zeros.astype(np.int64) - ones).astype(np.uint64).astype(np.uint32)
    tensors = {
        f"{stem}.qweight": words(packed_rows(weight.codes, bits)),
        f"{stem}.qzeros": words(zeros),
        f"{stem}.scales": torch.from_numpy(weight.scales),
    }
    if with_order:
        tensors[f"{stem}.g_idx"] = torch.from_numpy(weight.groups.astype(np.int32))
    return tensors


def awq(stem: str, weight: Quantised) -> dict[str, Tensor]:
    """As AutoAWQ's gemm version."""
    return {
        f"{stem}.qweight": words(packed_awq(weight.codes)),
        f"{stem}.qzeros": words(packed_awq(weight.zeros)),
        f"{stem}.scales": torch.from_numpy(weight.scales),
    }


def packed_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """Neighbouring rows share a word, the first lowest."""
    per = 32 // bits
    out = np.zeros((len(codes) // per, codes.shape[1]), dtype=np.uint32)
    for row, line in enumerate(codes):
        out[row // per] |= line.astype(np.uint32) << np.uint32(bits * (row % per))
    return out


def packed_awq(codes: np.ndarray) -> np.ndarray:
    out = np.zeros((len(codes), codes.shape[1] // 8), dtype=np.uint32)
    for column in range(out.shape[1]):
        for place, which in enumerate(AWQ_PLACES):
            out[:, column] |= codes[:, column * 8 + which].astype(np.uint32) << np.uint32(4 * place)
    return out


def words(packed: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(packed).view(np.int32))
