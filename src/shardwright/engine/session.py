"""`Session`: one driver's conversation with its ranks, and the figures of a run. No torch.

Knows the ranks only through `Driver`, so it is the same for ranks forked by the command line and for those of a fresh
launcher process.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, final

from shardwright.comm.driver import Driver
from shardwright.engine.request import NewToken, Request
from shardwright.errors import RankError


@dataclass(frozen=True)
class RankReport:
    """One rank's figures, in bytes: weights in memory, tensor bytes read from files, largest resident set."""

    rank: int
    weight_bytes: int
    bytes_read: int
    peak_rss: int


@dataclass(frozen=True)
class RunReport:
    """Where the time of a run went.

    load_s: from starting the ranks until all have loaded · ttft_s: from the request to its first token ·
    tokens_per_s: the tokens after each request's first, over the time from the first token to the last (0 where there
    are none) · comm_share: part of the ranks' time in steps that they spent waiting for each other, their mean ·
    decoded_by: `compiled`, or `torch` · torch_because: why the compiled step was not taken, or None.
    """

    tp: int
    load_s: float
    ttft_s: float
    tokens_per_s: float
    comm_share: float
    decoded_by: str
    torch_because: str | None
    ranks: list[RankReport]


@final
class Session:
    """Waits for the ranks to load, then runs requests on them."""

    def __init__(
        self, driver: Driver, tp: int, started: float, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.driver, self.tp = driver, tp
        self._loaded: dict[int, dict[str, Any]] = {}
        self._report: RunReport | None = None
        self._runs = 0
        while len(self._loaded) < tp:
            message = self._next()
            if "loaded" in message:
                self._loaded[message["rank"]] = message["loaded"]
            elif progress:
                progress(*message["progress"])
        self.load_s = time.monotonic() - started

    @property
    def report(self) -> RunReport:
        """The figures of the last run."""
        if self._report is None:
            raise RankError("no run has finished yet; take the report after the last token")
        return self._report

    def run(self, requests: list[Request]) -> Iterator[NewToken]:
        """The tokens of all requests as they come; afterwards `report` holds the figures.

        The ranks finish a run that is left before its end, and the next one waits for that.
        """
        start = first = last = time.monotonic()
        self._runs += 1
        this = self._runs
        self.driver.send({"run": this, "requests": [asdict(request) for request in requests]})
        finished: dict[int, dict[str, Any]] = {}
        seen: set[int] = set()
        later = 0
        while len(finished) < self.tp:
            message = self._next()
            if message["run"] != this:
                continue
            if "finished" in message:
                finished[message["rank"]] = message["finished"]
                continue
            last = time.monotonic()
            first = last if not seen else first
            for number, token, finish in message["tokens"]:
                later += number in seen
                seen.add(number)
                yield NewToken(number, token, finish)
        self._report = self._figures(finished, first - start, later / (last - first) if later else 0.0)

    def _figures(self, finished: dict[int, dict[str, Any]], ttft_s: float, tokens_per_s: float) -> RunReport:
        shares = [done["waited_s"] / done["seconds"] for done in finished.values() if done["seconds"] > 0]
        ranks = [
            RankReport(
                rank, self._loaded[rank]["weight_bytes"], self._loaded[rank]["bytes_read"], finished[rank]["peak_rss"]
            )
            for rank in range(self.tp)
        ]
        share = sum(shares) / len(shares) if shares else 0.0
        obstacle = self._loaded[0]["obstacle"]
        execution = "torch" if obstacle else "compiled"
        return RunReport(self.tp, self.load_s, ttft_s, tokens_per_s, share, execution, obstacle, ranks)

    def _next(self) -> dict[str, Any]:
        message = self.driver.receive()
        if message is None:
            raise RankError("the ranks ended before their work was done; see their output above")
        return message
