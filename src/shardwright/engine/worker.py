"""What a rank does for a driver: load its part of the model, then answer requests until the driver hangs up.

Messages, all JSON. To the ranks: `{"run": …, "requests": […]}`. From rank 0: `{"progress": [filled, of]}` while loading
and `{"run": …, "tokens": [[request, token, finish], …]}` after each step. From every rank: `{"loaded": …}`, then
`{"run": …, "finished": …}` when the requests are done. A run's number tells a driver which messages are of one it left.
"""

import time
from typing import Any

from shardwright.comm.channel import Channel
from shardwright.comm.group import Group
from shardwright.comm.memory import peak_rss
from shardwright.engine.engine import Engine
from shardwright.engine.request import Request, SamplingParams
from shardwright.models.load import load

PROGRESS_EVERY = 0.05
"""Seconds between two reports of loading."""


def serve(group: Group, channel: Channel, path: str, dtype: str | None) -> None:
    """The life of a rank."""
    loaded = load(path, group, dtype=dtype, progress=_reporter(channel) if group.rank == 0 else None)
    engine = Engine(loaded.model)
    figures = {"weight_bytes": loaded.weight_bytes, "bytes_read": loaded.bytes_read, "obstacle": engine.obstacle}
    channel.send({"loaded": figures})
    while (message := channel.receive()) is not None:
        for request in message["requests"]:
            engine.add(_request(request))
        start, waited = time.perf_counter(), group.waited_s
        while engine.busy:
            tokens = engine.step()
            if group.rank == 0 and tokens:
                channel.send({"run": message["run"], "tokens": [[new.number, new.token, new.finish] for new in tokens]})
        seconds, waited = time.perf_counter() - start, group.waited_s - waited
        finished = {"seconds": seconds, "waited_s": waited, "peak_rss": peak_rss()}
        channel.send({"run": message["run"], "finished": finished})


def _request(message: dict[str, Any]) -> Request:
    return Request(
        number=message["number"],
        tokens=tuple(message["tokens"]),
        params=SamplingParams(**message["params"]),
        stop=tuple(message["stop"]),
    )


class _Reporter:
    """Tells the driver how far loading has come, not more often than anyone can look."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last > PROGRESS_EVERY:
            self._last = now
            self._channel.send({"progress": [done, total]})


def _reporter(channel: Channel) -> _Reporter:
    return _Reporter(channel)
