"""`ModelConfig`: sizes that make no sense, and frequencies by the definition."""

import math

import pytest

from shardwright.errors import UsageError
from shardwright.models.rope import Llama3Scaling
from shardwright.testing.models import tiny_config


@pytest.mark.parametrize(("changes", "said"), [
    ({"hidden": 0}, "hidden=0: a model's sizes are at least 1"),
    ({"layers": -1}, "layers=-1: a model's sizes are at least 1"),
    ({"kv_heads": 4}, "kv_heads=4: it must divide the 6 query heads"),
    ({"head_size": 5}, "head_size=5: rotary embedding turns pairs"),
])  # fmt: skip
def test_sizes_that_make_no_model_are_refused(changes: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        tiny_config(**changes)


def test_frequencies_fall_from_one_by_theta() -> None:
    """theta^(-2i/D): bit for bit the definition."""
    assert tiny_config(head_size=8, rope_theta=1e4).rope_frequencies() == tuple(1e4 ** (-i / 4) for i in range(4))


def test_llama3_keeps_fast_pairs_and_divides_slow_ones() -> None:
    """Pairs that turn over 4 times in 64 positions are kept, under once divided by 8, and those between lie between."""
    scaling = Llama3Scaling(factor=8.0, low=1.0, high=4.0, original=64)
    plain = tiny_config(head_size=64).rope_frequencies()
    scaled = tiny_config(head_size=64, rope_scaling=scaling).rope_frequencies()
    kinds = set()
    for before, after in zip(plain, scaled, strict=True):
        turns = 64 * before / (2 * math.pi)
        kinds.add((turns > 4) - (turns < 1))
        if turns > 4:
            assert after == before
        elif turns < 1:
            assert after == before / 8
        else:
            assert before / 8 < after < before
    assert kinds == {1, 0, -1}
