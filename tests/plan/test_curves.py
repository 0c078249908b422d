"""Properties that hold for any constants: more work is never faster, better machines are never slower."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.plan import curves
from shardwright.plan.hardware import machine

SIZES = st.integers(1, 1 << 16)
DEVICES = st.sampled_from(["a100-80", "h100", "b200", "910b2", "mi300x", "v100"])


@given(DEVICES, SIZES, SIZES, SIZES, st.sampled_from([0.0, 1.0]))
def test_a_product_is_never_faster_for_more_work_or_a_worse_machine(
    name: str, m: int, n: int, k: int, fp8: float
) -> None:
    device = machine(name)
    fp8 = fp8 if device.fp8 else 0.0
    seconds = curves.product(device, m, n, k, fp8)
    assert seconds <= curves.product(device, m + 128, n, k, fp8) * (1 + 1e-12)
    better = replace(device, bandwidth=2 * device.bandwidth, bf16=2 * device.bf16, fp8=2 * device.fp8)
    assert curves.product(better, m, n, k, fp8) <= seconds


@given(DEVICES, st.integers(2, 4096), st.integers(1, 64), st.floats(1, 1e12))
def test_collectives(name: str, ranks: int, stride: int, nbytes: float) -> None:
    device = machine(name)
    wired = curves.links(device, ranks, stride)
    gathered, reduced = curves.gather(device, wired, nbytes), curves.all_reduce(device, wired, nbytes)
    assert 0 < gathered < reduced <= 2 * gathered + 1e-12
    faster = replace(device, intra=2 * device.intra, inter=2 * device.inter)
    assert curves.all_reduce(faster, curves.links(faster, ranks, stride), nbytes) <= reduced
    assert curves.gather(device, curves.links(device, 1, stride), nbytes) == 0


@pytest.mark.parametrize("per_node", range(1, 9))
@pytest.mark.parametrize("ranks", range(2, 25))
def test_links_are_those_of_the_group_with_fewest_ranks_in_a_node(per_node: int, ranks: int) -> None:
    """Beside all groups that lie end to end until nodes and groups end together, device by device."""
    device = replace(machine("a100-80"), per_node=per_node)
    for stride in (n for n in range(1, per_node + 1) if per_node % n == 0):
        fewest = ranks
        for first in (at for at in range(per_node * ranks * stride) if at % (ranks * stride) < stride):
            fewest = min(fewest, *Counter((first + at * stride) // per_node for at in range(ranks)).values())
        inside, across = device.intra * device.wire, device.inter * device.net * fewest
        expected = inside if fewest == ranks else min(inside, across)
        assert float(curves.links(device, ranks, stride).rate) == pytest.approx(expected)


def test_a_ring_uses_the_adapters_of_all_its_ranks_in_a_node() -> None:
    device = machine("a100-80")
    one = curves.links(device, 16, 8).rate
    assert curves.links(device, 64, 1).rate == pytest.approx(8 * one)
    assert curves.links(device, 64, 1, 0.0).rate == pytest.approx(one)
    assert curves.links(device, 8, 1).rate == device.intra * device.wire
