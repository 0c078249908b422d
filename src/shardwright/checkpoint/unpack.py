"""Codes out of int32 words. Knows no file."""

import torch
from torch import Tensor


def unpacked(words: Tensor, bits: int, dim: int, order: tuple[int, ...]) -> Tensor:
    """`words [a, b]`, int32 → codes, float32, `[a * n, b]` for dim 0 or `[a, b * n]` for dim 1, n = 32 / bits.

    `order[j]` is where, counted from the lowest bits, the j-th code of a word lies.
    """
    count, (rows, columns) = len(order), words.shape
    shape = (rows, count, columns) if dim == 0 else (rows, columns, count)
    codes = torch.empty(shape)
    for j, place in enumerate(order):
        code = (words >> bits * place) & ((1 << bits) - 1)
        codes.select(1 if dim == 0 else 2, j).copy_(code)
    return codes.view(rows * count, columns) if dim == 0 else codes.view(rows, columns * count)
