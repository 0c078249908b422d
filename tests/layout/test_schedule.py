"""Schedules: everything once, in an order that runs to its end, with the bubble and memory they promise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.errors import UsageError
from shardwright.layout.schedule import Action, Schedule, interleaved, most_in_flight, one_forward_one_backward


def makespan(schedule: Schedule, stages: int, forward: float, backward: float) -> float:
    """Seconds until all is done when each rank takes its list in order; a deadlock makes no progress and fails."""
    done: dict[Action, float] = {}
    clocks, at = [0.0] * len(schedule), [0] * len(schedule)
    while any(place < len(actions) for place, actions in zip(at, schedule, strict=True)):
        moved = False
        for rank, actions in enumerate(schedule):
            while at[rank] < len(actions):
                action = actions[at[rank]]
                needs = needed(action, stages)
                if needs is not None and needs not in done:
                    break
                start = max(clocks[rank], done[needs] if needs else 0.0)
                clocks[rank] = done[action] = start + (forward if action.direction == "forward" else backward)
                at[rank] += 1
                moved = True
        assert moved, "every rank waits for another"
    return max(clocks)


def needed(action: Action, stages: int) -> Action | None:
    if action.direction == "forward":
        return Action(action.stage - 1, action.micro_batch, "forward") if action.stage else None
    last = action.stage == stages - 1
    return (
        Action(action.stage, action.micro_batch, "forward")
        if last
        else Action(action.stage + 1, action.micro_batch, "backward")
    )


@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 5))
def test_everything_once_and_the_bubble(ranks: int, chunks: int, groups: int) -> None:
    """The step takes M micro-batches and (R − 1) / C of one more: Narayanan et al. 2021, section 2.2."""
    micro_batches = groups * ranks
    schedule = interleaved(ranks, chunks, micro_batches)
    for rank, actions in enumerate(schedule):
        assert len(actions) == len(set(actions)) == 2 * chunks * micro_batches
        assert {action.stage % ranks for action in actions} == {rank}
    seconds = makespan(schedule, ranks * chunks, 1.0, 2.0)
    assert seconds == pytest.approx(3.0 * (chunks * micro_batches + ranks - 1))


@given(st.integers(1, 8), st.integers(1, 20))
def test_plain_schedules_take_any_number_and_hold_what_the_planner_counts(ranks: int, micro_batches: int) -> None:
    schedule = one_forward_one_backward(ranks, micro_batches)
    assert makespan(schedule, ranks, 1.0, 1.0) == pytest.approx(2.0 * (micro_batches + ranks - 1))
    assert [most_in_flight(actions) for actions in schedule] == [
        min(ranks - rank, micro_batches) for rank in range(ranks)
    ]


@given(st.integers(2, 6), st.integers(2, 4), st.integers(2, 4))
def test_interleaved_holds_what_the_planner_counts(ranks: int, chunks: int, groups: int) -> None:
    schedule = interleaved(ranks, chunks, groups * ranks)
    for rank, actions in enumerate(schedule):
        expected = 2 * (ranks - 1 - rank) + (chunks - 1) * ranks + 1
        assert most_in_flight(actions) == min(expected, chunks * groups * ranks)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (4, 2, 6)])
def test_refusals(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError):
        interleaved(*sizes)
