"""From a machine's figures to plans for it."""

from typing import Any

import pytest

from shardwright.errors import UsageError
from shardwright.plan.blocks import built_in
from shardwright.plan.layouts import plan_layout
from shardwright.plan.measured import Measured, cluster, fastest_decode, machines

SMOLLM = built_in("smollm2-135m")[1]


def said(*bandwidths: tuple[float, ...]) -> dict[str, Any]:
    rows = {
        str(len(group)): [
            {
                "rank": at,
                "bandwidth": speed,
                "gemm": 1e11,
                "narrow_gemm": 1e11,
                "small_s": 1e-5,
                "piece_s": 2e-4,
                "paced_s": 2.1e-4,
                "large_s": 1e-3,
                "dealt_s": 4e-2,
            }
            for at, speed in enumerate(group)
        ]
        for group in bandwidths
    }
    return {"cores": 2, "memory": 16 << 30, "ranks": rows}


def test_two_cores_that_do_not_disturb_each_other_decode_faster_than_one() -> None:
    """One rank reads 538 MB of float32 a token at 15 GB/s: 27.5 tokens/s. Two read half each."""
    choice = fastest_decode(SMOLLM, Measured.of(said((15e9,), (15e9, 15e9))), 8, 64)
    assert choice.tp == 2
    assert choice.tokens_per_s[1] == pytest.approx(27.5, rel=0.05)
    assert 1.6 < choice.tokens_per_s[2] / choice.tokens_per_s[1] < 2


def test_half_the_bytes_decode_nearly_twice_as_fast() -> None:
    measured = Measured.of(said((15e9,), (15e9, 15e9)))
    wide, half = (fastest_decode(SMOLLM, measured, 8, 64, width).tokens_per_s for width in (4, 2))
    for tp in (1, 2):
        assert 1.7 < half[tp] / wide[tp] < 2


def test_three_ranks_on_two_cores_take_two_turns_at_every_sum() -> None:
    """Of a third of the work each: a token takes two thirds of what one rank takes alone, not half."""
    choice = fastest_decode(SMOLLM, Measured.of(said((15e9,), (15e9, 15e9), (5e9, 15e9, 10e9))), 8, 64)
    assert choice.tokens_per_s[3] == pytest.approx(1.5 * choice.tokens_per_s[1], rel=0.05)


def test_two_cores_that_share_one_memory_do_not() -> None:
    assert fastest_decode(SMOLLM, Measured.of(said((15e9,), (7e9, 7e9))), 8, 64).tp == 1


def test_a_plan_for_this_machine_is_in_bfloat16_as_any_plan() -> None:
    """One rank holds 134.5 M parameters of two bytes, and multiplies as fast as it does those."""
    figures = said((15e9,)) | {"cores": 1}
    figures["ranks"]["1"][0]["narrow_gemm"] = 3e11
    here = cluster(Measured.of(figures))
    assert here.machines[0].bf16 == 3e11
    found = plan_layout("smollm2-135m", here)
    assert found.stages[0]["weights"] == pytest.approx(2 * 134.5e6, rel=0.001)


def test_a_busy_core_shows_and_takes_less() -> None:
    alike = cluster(Measured.of(said((15e9,), (14e9, 15e9))))
    assert alike.uniform
    figures = said((15e9,), (5e9, 15e9))
    figures["ranks"]["2"][0] |= {"gemm": 1e11 / 3, "narrow_gemm": 1e11 / 3}
    busy = cluster(Measured.of(figures))
    assert not busy.uniform
    best = plan_layout("smollm2-135m", busy).best
    assert best is not None
    assert best.shares == pytest.approx((0.25, 0.75))


def test_what_is_not_measured_is_refused() -> None:
    measured = Measured.of(said((15e9,), (15e9, 15e9)))
    with pytest.raises(UsageError, match="measured with 1, 2 ranks"):
        machines(measured, 3)


@pytest.mark.parametrize(
    "wrong", [{}, {"ranks": {}}, {"cores": 1, "memory": 1, "ranks": {"2": []}}, {"ranks": {"1": [{}]}}]
)
def test_a_damaged_cache_is_none(wrong: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        Measured.of(wrong)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("bandwidth", 0), ("gemm", 0), ("bandwidth", float("nan")), ("gemm", float("inf")), ("dealt_s", 0)]
    + [(name, wrong) for name in ("small_s", "dealt_s") for wrong in (-1, float("inf"), float("nan"))],
)
def test_a_cache_whose_figures_cannot_be_is_none(name: str, wrong: float) -> None:
    """A single rank deals nothing out, in no time; of a rate of 0 or of no number there is no plan."""
    figures = said((15e9,), (15e9, 15e9))
    figures["ranks"]["1"][0]["dealt_s"] = 0
    Measured.of(figures)
    figures["ranks"]["2"][1][name] = wrong
    with pytest.raises(ValueError, match=r"figures are missing|no time"):
        Measured.of(figures)
