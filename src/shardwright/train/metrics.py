"""What a run measured: a line of JSON a step in metrics.jsonl, TensorBoard events if asked, and curve.png at the end.

Written by one rank. Decides that a resumed run's file goes on where its checkpoint was, as if nothing had happened, and
that a line that finds no room on the disk is left out with a warning: a run does not end for want of its metrics.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from errno import ENOSPC
from os import strerror
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

from shardwright.charts.curve import draw_curve
from shardwright.checkpoint.durable import write_file
from shardwright.errors import UsageError

FILE = "metrics.jsonl"


@final
class Metrics:
    """Open while a run goes on. after: the step that the run resumes from; later lines are taken away.

    warn: told once of what could not be written.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, run: Path, after: int, warn: Callable[[str], None], *, tensorboard: bool) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.path, self._warn, self._warned = run / FILE, warn, False
        kept = b"".join(_text(line) for line in read(self.path) if line["step"] <= after)
        if not self.path.exists() or self.path.read_bytes() != kept:
            write_file(self.path, [kept])
        self._file, self._size = self.path.open("ab", buffering=0), len(kept)
        self._events = _events(run / "tensorboard") if tensorboard else None

    def add(self, line: Mapping[str, Any]) -> None:
        """One step's, or one evaluation's, figures; `step` is among them."""
        text = _text(line)
        with self._tried():
            written = self._file.write(text)
            if written < len(text):
                self._file.truncate(self._size)
                raise OSError(ENOSPC, strerror(ENOSPC))
            self._size += written
        if self._events is not None:
            for name, value in line.items():
                if name != "step" and isinstance(value, int | float):
                    self._events.add_scalar(name, value, line["step"])

    def draw(self, title: str) -> None:
        """curve.png, of all lines."""
        lines = read(self.path)
        training, validation = (
            [(line["step"], line[name]) for line in lines if name in line] for name in ("loss", "validation")
        )
        with self._tried():
            draw_curve(self.path.with_name("curve.png"), training, validation, title)

    @contextmanager
    def _tried(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                self._warn(f"{self.path.parent}: {error.strerror or error}; metrics go missing, training goes on")
            self._warned = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _text(line: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(line)}\n".encode()


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file, without one that a kill cut short; none where there is no file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _events(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        remedy = "pip install 'shardwright[data]', or set it to false"
        raise UsageError("output.tensorboard", True, "tensorboard is not installed", remedy) from None
    return SummaryWriter(str(directory))
