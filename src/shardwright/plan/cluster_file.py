"""What a TOML file says of a cluster, checked: nodes, and devices of the user's own.

Decides types and bounds of what is written there, and refuses keys that nobody reads. Knows no device.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shardwright.errors import FileError

MOST_DEVICES = 1 << 20

Rate = Annotated[float, Field(gt=0)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


class Node(_Part):
    """Devices by name, or one name and how many; rates of their links, GB/s."""

    devices: list[str] = []
    device: str | None = None
    count: int = Field(1, ge=1, le=MOST_DEVICES)
    intra_gbs: Rate | None = None
    inter_gbs: Rate | None = None


class OwnDevice(BaseModel):
    """A device of the user's own: every other key is a figure of `Machine`."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")
    __pydantic_extra__: dict[str, Annotated[float, Field(ge=0)]] = Field(init=False)

    like: str
    source: str | None = None

    @property
    def figures(self) -> dict[str, float]:
        """What it changes."""
        return dict(self.__pydantic_extra__)


class ClusterFile(_Part):
    """The whole file."""

    nodes: list[Node] = []
    device: dict[str, OwnDevice] = {}

    @classmethod
    def load(cls, path: Path) -> "ClusterFile":
        """Read it.

        Raises:
            FileError: it is missing, no TOML, or says something else than nodes, devices and figures.
        """
        try:
            said: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
        except OSError as error:
            raise FileError(path, f"it cannot be read: {error.strerror}", "write a TOML file with [[nodes]]") from None
        except ValueError as error:
            raise FileError(path, f"it is no TOML: {error}", "write a TOML file with [[nodes]]") from None
        try:
            return cls.model_validate(said)
        except ValidationError as error:
            raise _wrong(path, error) from None


def _wrong(path: Path, error: ValidationError) -> FileError:
    """The first thing wrong, on one line."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    said = {"extra_forbidden": "is no key", "missing": "is missing"}
    problem = said.get(first["type"], f"is {first['input']!r:.60}: {first['msg'].lower()}")
    return FileError(path, f"{key} {problem}", 'write [[nodes]] and devices = ["h100", "h100"]; see docs/planner.md')
