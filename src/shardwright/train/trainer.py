"""`Trainer`: a recipe's run on this rank, from the data's first byte to the curve.

Decides the order of things in a run and what is done when a step or a save goes wrong. Arithmetic is `stepper`'s, files
are `saving`'s and `corpus`'. Sampling text is a callback, since engines live on this floor too.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any, final

from shardwright.checkpoint.durable import make_directory, write_file, writing
from shardwright.comm.group import Group
from shardwright.comm.memory import peak_rss
from shardwright.comm.parallel import initialize_model_parallel
from shardwright.errors import FileError, RankError, UsageError
from shardwright.models.decoder import Decoder
from shardwright.models.load import DTYPES, load
from shardwright.models.specs import Cuts
from shardwright.text.bpe import train_bpe
from shardwright.text.tokenizer import Tokenizer
from shardwright.train.corpus import Corpus, check, opened, tokenised
from shardwright.train.diagnosis import culprit
from shardwright.train.metrics import Metrics
from shardwright.train.optimizer import learning_rate
from shardwright.train.origin import Origin, model_path, model_tokenizer, origin_of
from shardwright.train.recipe import Recipe, dropouts
from shardwright.train.saving import Saver
from shardwright.train.stepper import Gradient, Stepper
from shardwright.train.windows import Micro, Windows

Report = Callable[[dict[str, Any]], None]
"""Told on rank 0, as things happen, one object each: `started`, `resumed`, `step`, `validation`, `sample`, `saved`,
`warning`."""

Sampler = Callable[[Decoder, Tokenizer], str]
"""Continues a prompt with the model as it is; entered by all ranks of one tensor group."""

RECENT = 50
"""Losses whose median a spike is measured against."""

SPACE = "free space, or use another output.directory"

SKIPPED_IN_A_ROW = 10
"""Steps skipped without one in between after which a run stops all the same."""


@final
class Trainer:
    """One rank of a run; every rank of `world` makes one and calls `run`.

    >>> Trainer(Recipe.load("recipe.toml"), join()).run()       # under torchrun

    report: see `Report` · sampler: see `Sampler`.

    Raises:
        FileError, UnsupportedError, UsageError: the recipe's model or data cannot be trained.
    """

    def __init__(
        self, recipe: Recipe, world: Group, *, report: Report | None = None, sampler: Sampler | None = None
    ) -> None:
        self.recipe, self.world, self.sampler = recipe, world, sampler
        world.timeout_s = recipe.guard.progress_timeout
        self._report = report or (lambda event: None)
        parallel = recipe.parallel
        self.groups = initialize_model_parallel(parallel.tensor, parallel.pipeline, parallel.data, world=world)
        self.place = self.groups.mesh.place(world.rank)
        self.tokenizer, self.windows = self._data()
        self.origin = origin_of(recipe, self.tokenizer.vocabulary)
        check(recipe.data, self.origin.config.context)
        for key, value in dropouts(self.origin.json).items():
            asked = recipe.train
            applied = f"train.dropout={asked.dropout:g} and train.attention_dropout={asked.attention_dropout:g}"
            self._tell({"warning": f"the model's {key}={value:g} is not applied: training drops by {applied} alone"})
        self.stepper = Stepper(self._model(self.origin), self.groups, recipe.train, recipe.optimizer, parallel)
        self.saver = Saver(self.stepper, recipe.directory, recipe.output.keep, self.origin.json)
        self._losses: deque[float] = deque(maxlen=RECENT)
        self._skipped = 0

    @property
    def model(self) -> Decoder:
        """What is trained."""
        return self.stepper.model

    def run(self) -> dict[str, Any]:
        """Train to the recipe's last step, from the newest checkpoint if there is one; the last figures."""
        resumed = self.saver.resume()
        first = 0 if resumed is None else int(resumed["step"])
        if resumed is not None:
            self._losses.extend(resumed["losses"])
            self._tell({"resumed": first})
        if self.world.rank:
            return self._steps(first, None)
        with self._metrics(first) as metrics:
            final_figures = self._steps(first, metrics)
            metrics.draw(self.recipe.directory.name)
        return final_figures

    def _metrics(self, first: int) -> Metrics:
        def warn(text: str) -> None:
            self._tell({"warning": text})

        with writing(self.recipe.directory, SPACE):
            return Metrics(self.recipe.directory, first, warn, tensorboard=self.recipe.output.tensorboard)

    # ---- before the first step

    def _data(self) -> tuple[Tokenizer, Windows]:
        """Rank 0 makes what is not there yet; the others wait for it and find it made."""
        recipe, corpus = self.recipe, Corpus.of(self.recipe)
        place = recipe.directory / "tokenizer"
        if self.world.rank == 0:
            with writing(recipe.directory, SPACE):
                make_directory(recipe.directory)
                self._prepare_tokenizer(corpus)
                tokenised(corpus, Tokenizer.from_directory(place), recipe.directory / "tokens", corpus.key(place))
        self.world.barrier(tag="data")
        tokenizer = Tokenizer.from_directory(place)
        path = tokenised(corpus, tokenizer, recipe.directory / "tokens", corpus.key(place))
        data = recipe.data
        return tokenizer, Windows(opened(path), data.sequence, data.validation, recipe.train.seed)

    def _prepare_tokenizer(self, corpus: Corpus) -> None:
        """Make it unless it is there; refuse one that was made of something else."""
        place, wanted = self.recipe.directory / "tokenizer", self.recipe.data.tokenizer
        source = None
        if not isinstance(wanted, int):
            source = model_path(self.recipe) if wanted == "model" else self.recipe.place(wanted)
        made_of, said = place / "made_of.txt", str(source or f"{wanted} words of the data")
        if made_of.exists():
            before = made_of.read_text()
            if before != said:
                problem = f"{place} was made of {before}"
                raise UsageError("data.tokenizer", wanted, problem, "use another output.directory")
            return
        if source is None:
            train_bpe(corpus.texts(), int(wanted), place)
        else:
            model_tokenizer(source).save(place)
        write_file(made_of, [said.encode()])

    def _model(self, origin: Origin) -> Decoder:
        group, sequence = self.groups.tensor, self.recipe.parallel.sequence
        dtype = self.recipe.train.dtype
        if origin.weights is not None:
            return load(origin.weights, group, dtype=dtype, sequence=sequence, among=self.world).model
        model = Decoder(origin.config, group, Cuts.balanced(origin.config, group.size, sequence=sequence))
        model.reset(self.recipe.train.seed)
        return model.to(DTYPES[dtype])

    # ---- the steps

    def _steps(self, first: int, metrics: Metrics | None) -> dict[str, Any]:
        train, figures = self.recipe.train, dict[str, Any](step=first)
        clock = _Clock(self.world)
        for step in range(first, train.steps):
            micros, tokens = self._micros(step)
            lr = learning_rate(self.recipe.optimizer, step, train.steps)
            gradient = self.stepper.gradient(micros, tokens, step)
            applied = self._accepted(gradient, micros, step)
            if applied:
                self.stepper.update(gradient, lr)
            self.world.end_step()
            clock.add(tokens)
            figures = {"step": step + 1, "loss": gradient.loss, "norm": gradient.norm, "lr": lr}
            figures |= {} if applied else {"skipped": 1}
            if self._due(step + 1, self.recipe.output.log_every):
                figures |= clock.figures()
                self._tell(figures)
            if metrics is not None:
                metrics.add(figures)
            figures = figures | self._occasions(step + 1, metrics)
        return figures

    def _micros(self, step: int) -> tuple[list[Micro], int]:
        train, mesh = self.recipe.train, self.groups.mesh
        chosen = self.windows.of_step(step, train.batch)
        tokens = sum(map(self.windows.targets, chosen))
        return self.windows.micros(chosen, self.place.data, mesh.data, train.micro_batch), tokens

    def _occasions(self, done: int, metrics: Metrics | None) -> dict[str, Any]:
        """What is due after so many steps: evaluation, a sample, a checkpoint."""
        output, found = self.recipe.output, {}
        if self._due(done, output.evaluate_every) and len(self.windows.held_out):
            chosen = list(self.windows.held_out)[: output.evaluate_sequences]
            size = self.recipe.train.micro_batch
            micros = self.windows.micros(chosen, self.place.data, self.groups.mesh.data, size)
            found = {"validation": self.stepper.evaluate(micros)}
            self._tell({"step": done, **found})
            if metrics is not None:
                metrics.add({"step": done, **found})
        if output.sample_every and done % output.sample_every == 0 and self.sampler and self.place.data == 0:
            self._tell({"step": done, "sample": self.sampler(self.model, self.tokenizer)})
        if self._due(done, output.save_every):
            self._save(done)
        return found

    def _save(self, done: int) -> None:
        """A checkpoint; a step that has others behind it goes on without.

        Raises:
            FileError: the last one of the run could not be written.
        """
        started = time.monotonic()
        problem = self.saver.save(done, {"losses": list(self._losses)})
        if problem is None:
            self._tell({"saved": done, "seconds": time.monotonic() - started})
            return
        missed = f"checkpoint of step {done} not written: {problem}; the one before stays"
        if done == self.recipe.train.steps:
            remedy = "free space and start the run again, which goes on from there"
            raise FileError(self.recipe.directory, f"the last {missed}", remedy)
        self._tell({"warning": f"{missed}, training goes on"})

    def _due(self, done: int, every: int) -> bool:
        """Every so many steps, and after the last; `every` 0: only then."""
        return done == self.recipe.train.steps or (every > 0 and done % every == 0)

    # ---- when a step goes wrong

    def _accepted(self, gradient: Gradient, micros: list[Micro], step: int) -> bool:
        """Whether to apply a gradient; the same answer on every rank, since the numbers are.

        Raises:
            RankError: the recipe says to stop.
        """
        guard, trouble = self.recipe.guard, self._trouble(gradient)
        if trouble is None:
            self._losses.append(gradient.loss)
            self._skipped = 0
            return True
        self._skipped += 1
        finite = math.isfinite(gradient.loss) and math.isfinite(gradient.norm)
        found = None if finite else culprit(self.stepper, micros, step)
        message = f"step {step + 1}: {trouble}" + (f", first in the {found}" if found else "")
        if (guard.on_spike if finite else guard.nonfinite) == "stop":
            raise RankError(f"{message}; the newest checkpoint is from before it")
        if self._skipped >= SKIPPED_IN_A_ROW:
            raise RankError(f"{message}; {SKIPPED_IN_A_ROW} steps in a row were skipped")
        self._tell({"warning": f"{message}; this step is skipped"})
        return False

    def _trouble(self, gradient: Gradient) -> str | None:
        if not math.isfinite(gradient.loss):
            return f"the loss is {gradient.loss}"
        if not math.isfinite(gradient.norm):
            return f"the gradient's norm is {gradient.norm}"
        spike, enough = self.recipe.guard.spike, len(self._losses) >= RECENT // 2
        if spike and enough and gradient.loss > spike * median(self._losses):
            return f"the loss is {gradient.loss:.4g}, {spike:g} times the recent median or more"
        return None

    def _tell(self, event: dict[str, Any]) -> None:
        if self.world.rank == 0:
            self._report(event)


class _Clock:
    """Tokens a second, share of the time spent waiting for others, memory of each rank, since it was last asked."""

    def __init__(self, world: Group) -> None:
        self.world = world
        self._restart()

    def _restart(self) -> None:
        self._tokens, self._since, self._waited = 0, time.perf_counter(), self.world.waited_s

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def figures(self) -> dict[str, Any]:
        """Every rank enters."""
        import torch

        seconds = time.perf_counter() - self._since
        mine = torch.tensor([[(self.world.waited_s - self._waited) / seconds, float(peak_rss())]], dtype=torch.float64)
        table = self.world.all_gather(mine, 0, [1] * self.world.size, tag="figures")
        found = {
            "tokens_per_s": self._tokens / seconds,
            "comm_share": float(table[:, 0].mean()),
            "memory": [int(each) for each in table[:, 1]],
        }
        self._restart()
        return found
