"""The reference kernels against transformers' own functions, or loops that spell the definition out."""

import math

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from shardwright.kernels import reference
from shardwright.layers.rotary import Rotary

HALVES = [torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_rms_norm_equals_transformers(dtype: torch.dtype) -> None:
    """Bit for bit: the same operations in the same types, normalised in float32."""
    norm = LlamaRMSNorm(19, eps=1e-5).to(dtype)
    norm.weight.data = random(19, dtype=dtype)
    x = 5 * random(7, 3, 19, dtype=dtype, seed=1)
    assert torch.equal(reference.rms_norm(x, norm.weight, 1e-5), norm(x))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_norms_rounded_once_equal_transformers(dtype: torch.dtype) -> None:
    """Bit for bit; OLMo-2 multiplies by the weight, and Gemma by 1 + weight, before the one rounding."""
    x, weight = 5 * random(7, 3, 19, dtype=dtype, seed=1), random(19, dtype=dtype)
    kinds = {reference.rms_norm_once: Olmo2RMSNorm, reference.rms_norm_plus_one: Gemma2RMSNorm}
    for kernel, theirs in kinds.items():
        norm = theirs(19, eps=1e-5).to(dtype)
        norm.weight.data = weight
        assert torch.equal(kernel(x, weight, 1e-5), norm(x))


def test_rms_norm_of_zeros_and_of_large_halves() -> None:
    """Eps keeps 0 from dividing; squares of float16 values above 256 would overflow were they not taken in float32."""
    assert torch.equal(reference.rms_norm(torch.zeros(2, 4), torch.ones(4), 1e-6), torch.zeros(2, 4))
    large = torch.full((1, 4), 6e4, dtype=torch.float16)
    assert torch.equal(reference.rms_norm(large, torch.ones(4).half(), 1e-6), torch.ones(1, 4).half())


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_rotary_equals_transformers(dtype: torch.dtype) -> None:
    """To two units in the last place of the largest value: `x * cos + y * sin` is rounded in another order."""
    rotary = Rotary(tuple(100.0 ** (-i / 3) for i in range(3)))
    positions = torch.tensor([0, 1, 2, 9, 100, 7])
    cos, sin = rotary(positions, dtype)
    q, k = random(6, 5, 6, dtype=dtype), random(6, 2, 6, dtype=dtype, seed=1)
    both = [torch.cat((x, x), -1)[None] for x in (cos, sin)]
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], *both)
    for x, theirs in zip((q, k), expected, strict=True):
        tolerance = 2 * torch.finfo(dtype).eps * float(x.abs().max())
        torch.testing.assert_close(reference.rotary(x, cos, sin), theirs[0].transpose(0, 1), rtol=0, atol=tolerance)


def test_rotary_turns_pairs_by_their_angle() -> None:
    """The definition, pair by pair, as complex numbers; float64 to rounding."""
    x, angles = random(4, 3, 10), random(4, 5, seed=1)
    y = reference.rotary(x, angles.cos(), angles.sin())
    turned = torch.complex(x[..., :5], x[..., 5:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(y, torch.cat((turned.real, turned.imag), -1), rtol=0, atol=1e-15)


def test_swiglu_is_gate_times_its_sigmoid_times_up() -> None:
    """The definition, value by value; float64 to rounding. No features is no error: a rank may own none."""
    x = random(5, 6)
    for row, out in zip(x.tolist(), reference.swiglu(x).tolist(), strict=True):
        expected = [gate / (1 + math.exp(-gate)) * up for gate, up in zip(row[:3], row[3:], strict=True)]
        assert out == pytest.approx(expected, rel=1e-14)
    assert reference.swiglu(torch.empty(5, 0)).shape == (5, 0)


@pytest.mark.parametrize(("length", "held"), [(1, 1), (4, 4), (2, 5), (1, 6)])
def test_attention_is_the_loop_over_heads_and_positions(length: int, held: int) -> None:
    """5 query heads over 2 KV heads, unevenly: 2 and 3. Float64 to another order of summation."""
    q, k, v = random(length, 5, 4), random(held, 2, 4, seed=1), random(held, 2, 4, seed=2)
    index = (0, 0, 1, 1, 1)
    found = reference.attention(q, k, v, index, 0.7)
    for row in range(length):
        seen = held - length + row + 1
        for head, source in enumerate(index):
            scores = [0.7 * float(q[row, head] @ k[j, source]) for j in range(seen)]
            weights = [math.exp(score) for score in scores]
            expected = sum(w * v[j, source] for j, w in enumerate(weights)) / sum(weights)
            torch.testing.assert_close(found[row, head], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", HALVES)
def test_attention_of_halves_sums_weights_in_float32(dtype: torch.dtype) -> None:
    """4,096 equal keys: weights summed in bfloat16 would stick at 256, and the mean of ones would be 16."""
    q, k, v = (torch.ones(n, 1, 2, dtype=dtype) for n in (1, 4096, 4096))
    mean = reference.attention(q, k, v, (0,), 1.0)
    assert (mean - 1).abs().max() <= torch.finfo(dtype).eps
