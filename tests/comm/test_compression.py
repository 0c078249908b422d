"""Compressed gradients: what each format keeps, what travels, and that error feedback loses nothing in the long run."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwright.comm.compression import (
    BLOCK,
    METHODS,
    Method,
    all_reduce_compressed,
    compress_gradient,
    decompress_gradient,
)
from shardwright.comm.group import Group
from shardwright.comm.recording import RecordingGroup
from shardwright.errors import UsageError
from shardwright.testing.ranks import on_threads


def wave(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).sin().view(shape)


@given(st.integers(0, 3 * BLOCK + 5), st.sampled_from(METHODS))
def test_any_length_comes_back_in_its_shape(numel: int, method: Method) -> None:
    """bf16 to half a unit of 8 bits; int8 to half a step of its block; 1-bit keeps sign and mean magnitude."""
    x = wave(numel) * 3
    y = decompress_gradient(compress_gradient(x, method))
    assert (y.shape, y.dtype) == (x.shape, torch.float32)
    if method == "bf16":
        torch.testing.assert_close(y, x, rtol=2**-8, atol=0)
    elif method == "int8":
        torch.testing.assert_close(y, x, rtol=0, atol=3 / 254 * 1.001)
    else:
        assert torch.equal(y >= 0, x >= 0)
        for start in range(0, numel, BLOCK):
            block = slice(start, start + BLOCK)
            torch.testing.assert_close(y[block].abs(), x[block].abs().mean().expand_as(y[block]), rtol=1e-5, atol=0)


def test_zeros_stay_zeros() -> None:
    for method in METHODS:
        assert not decompress_gradient(compress_gradient(torch.zeros(5, 7), method)).any()


def summed(group: Group, method: Method) -> tuple[list[float], int, float]:
    """The sum, the bytes this rank handed over, and how far the sum is from that of what the ranks sent."""
    recording = RecordingGroup(group)
    x = wave(3, BLOCK) * (group.rank + 1)
    total = all_reduce_compressed(x, recording, method, tag="gradients")
    expected = sum(decompress_gradient(compress_gradient(wave(3, BLOCK) * (r + 1), method)) for r in range(group.size))
    assert [(call.op, call.tag) for call in recording.calls] == [("all_gather", "gradients")]
    return total.flatten().tolist(), recording.calls[0].bytes, float((total - expected).abs().max())


@pytest.mark.parametrize(("method", "fraction"), [("bf16", 1 / 2), ("int8", 1 / 4), ("1bit", 1 / 32)])
def test_the_payload_is_a_fraction_and_the_sum_exact(method: Method, fraction: float) -> None:
    """Bytes as the recorder sees them: the fraction, and for the last two one float32 a block. All ranks hold the same
    bits, those of what was sent, summed in rank order.
    """
    found = on_threads(3, summed, method)
    numel = 3 * BLOCK
    scales = 0 if method == "bf16" else 3 * 4
    assert {nbytes for _, nbytes, _ in found} == {4 * numel * fraction + scales}
    assert {difference for *_, difference in found} == {0.0}
    assert found[0][0] == found[1][0] == found[2][0]


@pytest.mark.parametrize("method", METHODS)
def test_error_feedback_loses_nothing_in_the_long_run(method: Method) -> None:
    """The same gradient 200 times: the mean of what arrived is the gradient, to one step's loss over 200."""

    def body(group: Group) -> float:
        x, residual = wave(50) + 0.3, torch.zeros(50)
        total = sum(all_reduce_compressed(x, group, method, residual=residual) for _ in range(200))
        assert isinstance(total, torch.Tensor)
        return float((total / 200 / group.size - x).abs().max())

    assert max(on_threads(2, body)) < 0.05


def test_unknown_methods_and_integers_are_refused() -> None:
    with pytest.raises(UsageError, match="method=zip: there is no such compression; use one of bf16, int8, 1bit"):
        compress_gradient(wave(3), "zip")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="only floating gradients"):
        compress_gradient(torch.ones(3, dtype=torch.int64), "bf16")
