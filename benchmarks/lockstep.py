"""What would decoding reach if it only read its weights, with ranks that meet as often as its sums make them?

python benchmarks/lockstep.py [--case SUBSTRING] [--peer free|met] [--repeat N] [--json]

The ranks of one job take turns in three ways: they decode; they read the weights that decoding reads, in its order, by
a plain compiled sum, each at its own pace (`free`: all bytes over the time they take); and so that all wait for each
other wherever decoding has a sum or an exchange (`met`). Each lasts as long, so that what disturbs the machine
disturbs all.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

from harness import Case, Options, main

from shardwright.comm.channel import Channel
from shardwright.comm.group import Group
from shardwright.comm.spawn import SpawnedJob
from shardwright.models.embedded import embedded_model

if TYPE_CHECKING:
    from shardwright.models.decoder import Decoder

TOKENS = 64


def serve(group: Group, channel: Channel, path: str, dtype: str) -> None:
    """A rank: each time it is told, the seconds of decoding and of both kinds of reading."""
    from shardwright.engine.engine import Engine
    from shardwright.engine.request import Request, SamplingParams
    from shardwright.models.load import load

    model = load(path, group, dtype=dtype).model
    engine, reads, read = Engine(model), places(model), reader()
    while channel.receive() is not None:
        engine.add(Request(number=0, tokens=tuple(range(8)), params=SamplingParams(max_tokens=1 + TOKENS)))
        engine.step()
        seconds = []
        for run in (lambda: decode(engine), lambda: read(group.state, reads, 0), lambda: read(group.state, reads, 1)):
            group.barrier()
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        channel.send({"seconds": seconds, "bytes": 8 * int(reads[:, 1].sum())})


def decode(engine: Any) -> None:
    """The rest of a request."""
    while engine.busy:
        engine.step()


def places(model: "Decoder") -> Any:
    """A row for each stretch of weights that a token reads: address, words of 8 bytes, meetings behind it."""
    import numpy as np

    head = model.embedding if model.head is None else model.head
    stretches = [(head, 2)]  # the token's exchange, and the sum of embeddings before the next one's layers
    for layer in model.layers:
        attention, mlp = layer.attention, layer.mlp
        stretches += [(attention.qkv, 0), (attention.out, 1), (mlp.gate_up, 0), (mlp.down, 1)]
    return np.array([(m.weight.data_ptr(), m.weight.nbytes // 8, meetings) for m, meetings in stretches], np.int64)


def reader() -> Any:
    """Compiled: `TOKENS` times, read all stretches; with meetings or without."""
    from llvmlite import ir
    from numba import carray, njit, types

    from shardwright.comm.atomics import pointer_to
    from shardwright.comm.rounds import begin, finish

    words = pointer_to(types.int64, ir.IntType(64))

    @njit("int64(int64[::1], int64[:, ::1], int64)", nogil=True)
    def read(state: Any, reads: Any, meet: int) -> int:
        total = 0
        for _ in range(TOKENS):
            for address, count, meetings in reads:
                for word in carray(words(address), (count,)):
                    total += word
                for _ in range(meet * meetings):
                    begin(state)
                    finish(state, 1, 300)
        return total

    return read


def cases(options: Options) -> Iterator[Case]:
    """The embedded model at two ranks."""
    for name, dtype in (("smollm2 fp32 TP 2", "float32"), ("smollm2 bf16 TP 2", "bfloat16")):
        if not options.wants(name):
            continue
        runs: dict[str, list[float]] = {"ours": [], "free": [], "met": []}
        with SpawnedJob(2, f"benchmarks.{Path(__file__).stem}:serve", [str(embedded_model()), dtype]) as job:
            for _ in range(1 + options.repeat):  # the first one warms up
                job.send({})
                ranks = [job.receive() for _ in range(2)]
                decoded, free, met = ([rank["seconds"][way] for rank in ranks] for way in range(3))
                pace = sum(rank["bytes"] / seconds for rank, seconds in zip(ranks, free, strict=True))
                runs["ours"].append(TOKENS / max(decoded))
                runs["free"].append(TOKENS * pace / sum(rank["bytes"] for rank in ranks))
                runs["met"].append(TOKENS / max(met))
        wanted = [side for side in runs if side == "ours" or options.wants_peer(side)]
        yield Case(name, "tokens/s", {side: statistics.median(runs[side][1:]) for side in wanted}).compare(
            smaller_is_better=False
        )


if __name__ == "__main__":
    main("lockstep", __doc__.splitlines()[0], cases)
