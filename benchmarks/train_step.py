"""How many tokens a second does a training step take, and how much memory a rank, against one process and torch's own?

python benchmarks/train_step.py [--case SUBSTRING] [--peer one_process|dtensor|ddp] [--repeat N] [--json]

Llamas of 27 M and 95 M parameters; batch 4 x 256, AdamW, clipping, float32. one_process: transformers on two threads;
dtensor and ddp: torch's tensor and data parallelism over gloo, two ranks of one thread each, as ours are. `MB`: the
larger rank's peak beyond a process that has only imported torch. `%`: part of our ranks' time in which they wait for
each other. `hidden %`: how much shorter the data ranks' sum is after the backward when its buckets leave during it;
`lengthened ms`: by how much the whole step is longer than one without any sum.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from harness import Case, Options, main

from shardwright.comm.channel import Channel
from shardwright.comm.group import Group
from shardwright.comm.spawn import SpawnedJob

BATCH, LENGTH = 4, 256
SHAPES = {
    "27M": {"hidden": 512, "feed_forward": 1536, "layers": 6, "heads": 8, "kv_heads": 4, "vocabulary": 8192},
    "95M": {"hidden": 1024, "feed_forward": 2816, "layers": 7, "heads": 16, "kv_heads": 8, "vocabulary": 8192},
}


@dataclass(frozen=True)
class Subject:
    """A case: which model on which mesh. sync: `during` the backward, `after` it, or `never`."""

    shape: str
    tensor: int = 2
    data: int = 1
    sequence: bool = False
    recompute: str = "none"
    sync: str = "during"

    def __str__(self) -> str:
        mesh = f"tp {self.tensor}" if self.tensor > 1 else f"dp {self.data}"
        return f"{self.shape} {mesh}{' sp' * self.sequence}{f' {self.recompute}' * (self.recompute != 'none')}"


CASES = [
    Subject("27M"),
    Subject("27M", sequence=True),
    Subject("27M", sequence=True, recompute="selective"),
    Subject("27M", tensor=1, data=2),
    Subject("95M"),
    Subject("95M", sequence=True),
    Subject("95M", tensor=1, data=2),
]


def serve(group: Group, channel: Channel, said: dict) -> None:
    """A rank of ours: steps, or checkpoints, on request."""
    import time

    from shardwright.comm.memory import peak_rss
    from shardwright.comm.parallel import initialize_model_parallel

    groups = initialize_model_parallel(said["tensor"], 1, said["data"], world=group)
    stepper, micros, tokens = _prepared(groups, said)
    sums = _Sums(stepper, groups, after=said["sync"] == "after")
    while (message := channel.receive()) is not None:
        group.barrier()
        if "save" in message:
            channel.send({"seconds": _saved(stepper, Path(message["save"]))})
            continue
        start, waited, sums.seconds = time.perf_counter(), group.waited_s, 0.0
        for step in range(message["steps"]):
            stepper.update(stepper.gradient(micros, tokens, step), 1e-4)
        seconds = time.perf_counter() - start
        told = {"seconds": seconds, "waited": group.waited_s - waited, "peak": peak_rss(), "sums": sums.seconds}
        channel.send(told)


class _Sums:
    """The clock of what a step still has to sum once its backward is done: all of it, where nothing left before."""

    def __init__(self, stepper, groups, *, after: bool) -> None:  # noqa: ANN001
        self.stepper, self.world, self.after, self.seconds = stepper, groups.world, after, 0.0
        self.finish, stepper.synchroniser.finish = stepper.synchroniser.finish, self

    def __call__(self) -> None:
        """In place of the synchroniser's `finish`."""
        import time

        self.world.barrier()  # the later rank's backward is not the sum's time
        start = time.perf_counter()
        self.finish()
        if self.after:
            self.world.all_reduce(self.stepper.flat.grad, out=self.stepper.flat.grad)
        self.seconds += time.perf_counter() - start


def _prepared(groups, said: dict):  # noqa: ANN001, ANN202  types of modules imported only in a rank
    import torch

    from shardwright.comm.single import SingleGroup
    from shardwright.layers.batch import Batch
    from shardwright.models.config import ModelConfig
    from shardwright.models.decoder import Decoder
    from shardwright.models.specs import Cuts
    from shardwright.train.recipe import OptimizerPart, ParallelPart, TrainPart
    from shardwright.train.stepper import Stepper
    from shardwright.train.windows import Micro

    shape = SHAPES[said["shape"]]
    config = ModelConfig(
        family="llama",
        head_size=shape["hidden"] // shape["heads"],
        context=2048,
        norm_eps=1e-6,
        rope_theta=1e4,
        **shape,
    )
    model = Decoder(config, groups.tensor, Cuts.balanced(config, groups.tensor.size, sequence=said["sequence"]))
    if said["sync"] != "during":
        groups = replace(groups, data=SingleGroup(groups.world))
    train = TrainPart(steps=1, batch=BATCH, micro_batch=BATCH, recompute=said["recompute"])
    parallel = ParallelPart(tensor=said["tensor"], data=said["data"], zero=False)
    stepper = Stepper(model, groups, train, OptimizerPart(), parallel)
    mine = BATCH // said["data"]
    ids = torch.randint(shape["vocabulary"], (mine, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    batch = Batch.whole([row[:-1].tolist() for row in ids])
    return stepper, [Micro(batch, ids[:, 1:].flatten(), 0)], BATCH * LENGTH


def _saved(stepper, run: Path) -> float:  # noqa: ANN001
    """Seconds of the second of two checkpoints."""
    import time

    from shardwright.train.saving import Saver

    saver = Saver(stepper, run, 2, {})
    for step in (1, 2):
        start = time.perf_counter()
        problem = saver.save(step, {"losses": []})
        if problem:
            raise SystemExit(problem)
    return time.perf_counter() - start


class Ours:
    """Our ranks, alive and idle between measurements."""

    def __init__(self, subject: Subject, stack: ExitStack) -> None:
        self.ranks = subject.tensor * subject.data
        target = f"benchmarks.{Path(__file__).stem}:serve"
        self.job = stack.enter_context(SpawnedJob(self.ranks, target, [asdict(subject)]))

    def run(self, steps: int) -> dict[str, float]:
        """The slowest rank's seconds, the largest rank's peak, the mean share of waiting."""
        self.job.send({"steps": steps})
        told = [self.job.receive() for _ in range(self.ranks)]
        seconds = max(each["seconds"] for each in told)
        share = statistics.mean(each["waited"] / each["seconds"] for each in told)
        sums = max(each["sums"] for each in told)
        return {"seconds": seconds, "peak": max(each["peak"] for each in told), "share": share, "sums": sums}


class Peer:
    """A peer's processes, alive and idle between measurements."""

    def __init__(self, peer: str, shape: str, stack: ExitStack) -> None:
        place = stack.enter_context(tempfile.TemporaryDirectory())
        said = {"peer": peer, "shape": SHAPES[shape], "batch": BATCH, "length": LENGTH, "store": f"{place}/store"}
        self.processes = []
        for rank in range(1 if peer == "one_process" else 2):
            command = [sys.executable, str(Path(__file__).parent / "peer_train.py"), json.dumps({**said, "rank": rank})]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            process = subprocess.Popen(command, text=True, **pipes)
            stack.callback(process.kill)
            self.processes.append(process)

    def run(self, steps: int) -> dict[str, float]:
        """As `Ours.run`."""
        for process in self.processes:
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        told = [json.loads(process.stdout.readline()) for process in self.processes]
        return {key: max(each[key] for each in told) for key in ("seconds", "peak")}


def bare() -> int:
    """Peak of a process that imports torch and ends."""
    code = "import torch; print(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout) * 1024


def cases(options: Options) -> Iterator[Case]:
    """All sides of a case stay alive and are measured in turn."""
    floor = bare()
    for subject in CASES:
        if not options.wants(str(subject)):
            continue
        steps = 4 if subject.shape == "27M" else 1
        with ExitStack() as stack:
            peers = ["one_process", "dtensor" if subject.tensor > 1 else "ddp"]
            sides: dict[str, Ours | Peer] = {"ours": Ours(subject, stack)}
            sides |= {peer: Peer(peer, subject.shape, stack) for peer in peers if options.wants_peer(peer)}
            for side in sides.values():
                side.run(1)
            runs = {name: [] for name in sides}
            for _ in range(options.repeat):
                for name, side in sides.items():
                    runs[name].append(side.run(steps))
        tokens = BATCH * LENGTH * steps
        rates = {name: tokens / statistics.median(r["seconds"] for r in found) for name, found in runs.items()}
        peaks = {name: (found[-1]["peak"] - floor) / 1e6 for name, found in runs.items()}
        yield Case(str(subject), "tokens/s", rates).compare(smaller_is_better=False)
        yield Case(f"{subject}, memory", "MB a rank", peaks).compare(smaller_is_better=True)
        waiting = {"ours": 100 * statistics.median(r["share"] for r in runs["ours"])}
        yield Case(f"{subject}, communication", "% of a step", waiting)
    if options.wants("27M dp 2 hidden"):
        yield from hidden(options)
    if options.wants("27M tp 2 saving"):
        with ExitStack() as stack:
            place = stack.enter_context(tempfile.TemporaryDirectory())
            side = Ours(Subject("27M"), stack)
            side.job.send({"save": place})
            seconds = max(side.job.receive()["seconds"] for _ in range(2))
            yield Case("27M tp 2 saving", "% of a minute", {"ours": 100 * seconds / 60})


def hidden(options: Options) -> Iterator[Case]:
    """A step with the sum during the backward, after it, and without it: the least of many, as the differences are
    small beside what else a machine does.
    """
    with ExitStack() as stack:
        subject = Subject("27M", tensor=1, data=2)
        sides = {sync: Ours(replace(subject, sync=sync), stack) for sync in ("during", "after", "never")}
        runs = {sync: [] for sync in sides}
        for side in sides.values():
            side.run(1)
        for _ in range(5 * options.repeat):
            for sync, side in sides.items():
                runs[sync].append(side.run(1))
    step = {sync: 1e3 * min(run["seconds"] for run in found) for sync, found in runs.items()}
    sums = {sync: statistics.median(run["sums"] for run in found) for sync, found in runs.items()}
    yield Case("27M dp 2 hidden", "hidden %", {"ours": 100 * (1 - sums["during"] / sums["after"])})
    lengthened = {"ours": step["during"] - step["never"], "after backward": step["after"] - step["never"]}
    yield Case("27M dp 2 hidden, step", "lengthened ms", lengthened)


if __name__ == "__main__":
    main("train_step", __doc__.splitlines()[0], cases)
