"""Unequal devices: shares that all keep up with, near the best there are; better figures never make a plan slower."""

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.plan.blocks import built_in
from shardwright.plan.hardware import Cluster, machine
from shardwright.plan.layouts import plan_layout
from shardwright.plan.search import price
from shardwright.plan.software import profile
from shardwright.plan.step import step
from shardwright.plan.training import Training
from shardwright.plan.unequal import STEPS

RAISED = ("bandwidth", "bf16", "fp8", "memory", "intra", "inter")

JOBS: list[dict[str, Any]] = [
    {"train": (16, 2048)},
    {"train": (3, 4096), "precision": "fp8"},
    {},
    {"precision": "fp8", "latency_s": 0.02},
    {"latency_s": 0.004, "serve": (64, 512)},
]

DEVICES = ("h100", "h100-pcie", "h200", "h20", "l40s", "b200", "gaudi3")


def cluster_of(*nodes: tuple[str, ...]) -> Cluster:
    machines = tuple(replace(machine(name), per_node=len(node)) for node in nodes for name in node)
    return Cluster("drawn", tuple(name for node in nodes for name in node), machines)


def changed(cluster: Cluster, at: int, **factors: float) -> Cluster:
    better = replace(
        cluster.machines[at], **{name: getattr(cluster.machines[at], name) * by for name, by in factors.items()}
    )
    return replace(cluster, machines=(*cluster.machines[:at], better, *cluster.machines[at + 1 :]))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_better_figure_of_any_device_makes_a_plan_slower(data: st.DataObject) -> None:
    node = st.lists(st.sampled_from(DEVICES), min_size=1, max_size=4).map(tuple)
    before = cluster_of(*data.draw(st.lists(node, min_size=1, max_size=2), label="nodes"))
    device = st.integers(0, before.size - 1)
    for _ in range(data.draw(st.integers(0, 2), label="worsened")):
        worse = {data.draw(st.sampled_from(RAISED)): data.draw(st.floats(0.2, 1))}
        before = changed(before, data.draw(device), **worse)
    raised, by = data.draw(st.sampled_from(RAISED), label="raised"), data.draw(st.floats(1, 4), label="by")
    after = changed(before, data.draw(device, label="of"), **{raised: by})
    job = data.draw(st.sampled_from(JOBS), label="job")
    old, new = (plan_layout("qwen2.5-1.5b", cluster, **job).best for cluster in (before, after))
    if old is not None:
        assert new is not None
        assert new.tokens_per_s >= old.tokens_per_s * (1 - 1e-9)


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("raised", RAISED)
def test_one_better_device_among_equal_ones_does_not_either(job: dict[str, Any], raised: str) -> None:
    """Its cluster is unequal, and has every layout that the equal one has."""
    equal = cluster_of(("h100",) * 8, ("h100",) * 8)
    for cluster in (equal, changed(equal, 3, **{raised: 1.3})):
        best = plan_layout("qwen2.5-7b", cluster, **job).best
        assert best is not None
        if cluster is equal:
            plain = best.tokens_per_s
        assert best.tokens_per_s >= plain


def test_thousands_of_unequal_devices_in_half_a_second() -> None:
    """One better of 16 384, and 504 of which no two are alike; processor time, best of three."""
    one_better = changed(cluster_of(*[("h100",) * 8] * 2048), 5, bf16=1.5)
    h100 = one_better.machines[0]
    unlike = tuple(replace(h100, bandwidth=h100.bandwidth * (1 - at / 2000)) for at in range(504))
    for cluster in (one_better, Cluster("unlike", ("h100",) * 504, unlike)):
        taken = []
        for _ in range(3):
            fresh, started = replace(cluster), time.process_time()
            assert plan_layout("llama-3-405b", fresh, train=(4096, 8192)).best is not None
            taken.append(time.process_time() - started)
        assert min(taken) < 0.5


def test_equal_devices_in_unequal_nodes_are_searched_as_equal() -> None:
    """In nodes of 8 and 4 as in three nodes of 4."""
    for options in ({"train": (48, 4096)}, {}):
        uneven, even = (
            plan_layout("qwen2.5-7b", cluster_of(*(("h100",) * count for count in nodes)), **options)  # type: ignore[arg-type]
            for nodes in ((8, 4), (4, 4, 4))
        )
        assert uneven.best == even.best
        assert uneven.best is not None
        assert uneven.best.dp > 1
        assert not uneven.warnings


def test_every_device_keeps_up_with_the_rates_that_are_priced_and_has_room() -> None:
    cluster = cluster_of(("h100", "l40s", "h20"), ("h200",))
    training = Training(sequence=4096, global_batch=4, fp8=0.0, flash=1.0)
    priced = price(built_in("qwen2.5-7b")[1], cluster, training, profile("generic"))
    uneven = np.flatnonzero(~priced.dealt.even & priced.fits)
    assert len(uneven)
    for at in uneven:
        shares = np.array(priced.dealt.shares(int(at)))
        assert shares.sum() == pytest.approx(1)
        for name in ("bandwidth", "bf16"):
            theirs = np.array([getattr(each, name) for each in cluster.machines])
            assert (theirs / (4 * shares) >= getattr(priced.scene.machine, name)[at] * (1 - 1e-9)).all()
        held = priced.dealt.whole + (priced.memory.total[at] - priced.dealt.whole) * 4 * shares
        assert (held <= np.array([each.memory for each in cluster.machines]) * (1 + 1e-9)).all()
        assert priced.layout(int(at)).memory_bytes == pytest.approx(held.max(), rel=1e-6)


def test_no_other_shares_are_faster_by_more_than_a_step_of_the_ladder() -> None:
    """Beside every share of two devices in thousandths, priced at the least rates that they leave."""
    cluster = cluster_of(("h100", "h20"))
    training = Training(sequence=4096, global_batch=4, fp8=0.0, flash=1.0)
    priced = price(built_in("qwen2.5-1.5b")[1], cluster, training, profile("generic"))
    first = np.arange(1, 1000)[:, None] / 1000
    stretch = 2 * np.stack([first, 1 - first])
    rates = {
        name: (np.array([getattr(each, name) for each in cluster.machines])[:, None, None] / stretch).min(axis=0)
        for name in ("bandwidth", "bf16")
    }
    seconds = step(replace(priced.scene, machine=replace(priced.scene.machine, **rates))).total
    whole, need = priced.dealt.whole, priced.memory.total
    room = np.array([each.memory for each in cluster.machines])[:, None, None]
    seconds = np.where((whole + (need - whole) * stretch <= room).all(axis=0), seconds, np.inf).min(axis=0)
    one = (priced.scene.split.dp == 1) & np.isfinite(seconds)
    assert priced.fits[one].all()
    ratio = priced.step.total[one] / seconds[one]
    assert len(ratio) > 10
    assert ratio.max() < 2 ** (1 / STEPS)
    assert ratio.min() > 0.99  # a thousandth is 1 % of a share of a tenth


def test_a_device_that_is_full_takes_no_more() -> None:
    small = changed(cluster_of(("h100", "h100")), 1, memory=10 / 80)
    best = plan_layout("qwen2.5-3b", small, train=(2, 2048)).best
    assert best is not None
    assert best.shares[1] < best.shares[0] / 4
    assert best.memory_bytes <= small.machines[0].memory


def test_a_device_without_room_for_what_every_rank_holds_is_not_left_out_in_silence() -> None:
    """A rank takes part however little it takes: with less than its buffers there is no plan."""
    for gigabytes, fits in ((2.1, True), (1.9, False)):
        cluster = changed(cluster_of(("h100", "h20")), 1, memory=gigabytes * 1e9 / machine("h20").memory)
        assert (plan_layout("qwen2.5-1.5b", cluster).best is not None) == fits


def test_a_figure_that_no_product_uses_makes_no_device_unequal() -> None:
    equal = cluster_of(("h100",) * 8)
    plans = [plan_layout("qwen2.5-7b", cluster) for cluster in (equal, changed(equal, 3, fp8=0.5))]
    assert plans[0].best == plans[1].best
    assert not plans[1].warnings


def test_devices_that_share_evenly_are_said_to_be_priced_as_the_slowest() -> None:
    found = plan_layout("smollm2-135m", changed(cluster_of(("h100",) * 8), 0, bf16=1.1), train=(64, 2048))
    assert found.best is not None
    assert not found.best.shares
    assert found.warnings == ("unequal devices with equal shares: all are priced as the slowest",)
