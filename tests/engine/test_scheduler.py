"""Bookkeeping without torch: against the rules a scheduler must keep whatever the requests."""

from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.engine.request import Request, SamplingParams
from shardwright.engine.scheduler import Scheduler

STOP = 7


def request(number: int, length: int, most: int) -> Request:
    return Request(number=number, tokens=(1,) * length, params=SamplingParams(max_tokens=most), stop=(STOP,))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 10)), min_size=1, max_size=12),
    page=st.integers(1, 9),
    limit=st.integers(1, 5),
    budget=st.integers(1, 40),
    at_once=st.integers(1, 40),
)
def test_every_request_ends_and_the_rules_hold(
    sizes: list[tuple[int, int]], page: int, limit: int, budget: int, at_once: int
) -> None:
    """Budget and limit are kept; pages have one owner and suffice; a text ends at its limit or at the context. So it
    does where sequences get several tokens at once, as many as leave nothing to decide.
    """
    scheduler = Scheduler(context=32, page=page, sequences=limit, budget=budget)
    for number, (length, most) in enumerate(sizes):
        scheduler.add(request(number, length, most))
    given: dict[int, int] = {}
    finished: list[int] = []
    while scheduler.busy:
        chunks = scheduler.schedule()
        assert chunks, "a step that does nothing would never end"
        assert sum(chunk.length for chunk in chunks) <= budget
        assert len(scheduler.running) <= limit
        owned = [p for sequence in scheduler.running for p in sequence.pages]
        assert len(owned) == len(set(owned))
        assert all(p < scheduler.pages_needed for p in owned)
        for chunk in chunks:
            assert len(chunk.sequence.pages) * page >= chunk.sequence.computed + chunk.length
        complete = [chunk.sequence for chunk in chunks if chunk.complete]
        alike = len(complete) == len(chunks) == sum(chunk.length for chunk in chunks)
        count = min(at_once, *map(scheduler.undecided, complete)) if alike else 1
        for sequence in complete:
            assert sequence.computed + count <= len(sequence.pages) * page or not alike
        for new in scheduler.commit(chunks, [[1] * count for _ in complete]):
            given[new.number] = given.get(new.number, 0) + 1
            if new.finish:
                finished.append(new.number)
    assert sorted(finished) == list(range(len(sizes)))
    assert given == {n: min(most, 32 - length) for n, (length, most) in enumerate(sizes)}
    assert scheduler.pages_needed <= limit * -(-32 // page), "pages of ended sequences are used again"


def test_a_stop_token_ends_a_text_and_is_given() -> None:
    scheduler = Scheduler(context=32, page=4)
    scheduler.add(request(5, 3, 10))
    first = scheduler.commit(scheduler.schedule(), [[2]])
    second = scheduler.commit(scheduler.schedule(), [[STOP]])
    assert [(n.number, n.token, n.finish) for n in first + second] == [(5, 2, None), (5, STOP, "stop")]
    assert not scheduler.busy


def test_several_tokens_at_once_end_where_there_is_something_to_decide() -> None:
    """A page of 8, a text's own 6 tokens, a context of 32, an anew at 9: whichever comes first, from 3 tokens on."""
    for page, most, context, restart, expected in (
        (8, 20, 32, None, 5),
        (32, 6, 32, None, 5),
        (64, 90, 32, None, 28),
        (64, 90, 32, 9, 6),
    ):
        scheduler = Scheduler(context=context, page=page, restart=restart)
        scheduler.add(request(0, 3, most))
        scheduler.commit(scheduler.schedule(), [[1]])
        [chunk] = scheduler.schedule()
        assert scheduler.undecided(chunk.sequence) == expected
        scheduler.commit([chunk], [[1] * expected])
        assert chunk.sequence.computed == (0 if restart else 3 + expected)
        assert scheduler.busy == (len(chunk.sequence.tokens) < min(3 + most, context))


def test_long_prompts_are_computed_in_chunks_while_others_decode() -> None:
    scheduler = Scheduler(context=64, page=4, budget=10)
    scheduler.add(request(0, 2, 10))
    scheduler.commit(scheduler.schedule(), [[1]])
    scheduler.add(request(1, 25, 10))
    lengths = []
    for _ in range(3):
        chunks = scheduler.schedule()
        lengths.append([chunk.length for chunk in chunks])
        scheduler.commit(chunks, [[1] for chunk in chunks if chunk.complete])
    assert lengths == [[1, 9], [1, 9], [1, 7]]
