"""Devices, and how they are joined: from names and TOML files to `Machine`s.

Decides which figure wins where several are known. Knows no model.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from shardwright.errors import FileError, UsageError
from shardwright.plan import catalogue
from shardwright.plan.curves import Machine

PER_NODE = 8
"""Devices that share a node's links where nobody says otherwise."""

_CURVES = {f.name for f in fields(Machine)}
_FIGURES = _CURVES - {"per_node"}  # which follows from the nodes
_RATES = {"memory", "bandwidth", "bf16", "fp8", "processors", "intra", "inter"}
_GIGA, _TERA, _GIB = 1e9, 1e12, 2**30


@cache
def devices() -> dict[str, dict[str, Any]]:
    """The hardware catalogue, by short name."""
    return catalogue.read("hardware")


@cache
def _constants() -> dict[str, dict[str, Any]]:
    return catalogue.read("curves")


@cache
def machine(name: str) -> Machine:
    """A device of the catalogue, in nodes of eight.

    Raises:
        UsageError: there is no such device (the near names are listed), or no figure of its memory or its rate.
    """
    key = catalogue.resolve(devices(), name, "device")
    row = devices()[key]
    constants = curve_constants(row["architecture"], key)
    for figure in ("measured_bf16_tflops", "measured_fp8_tflops"):
        kind = figure.split("_")[1]
        if figure in row and f"gemm_{kind}" not in _constants().get(row["architecture"], {}):
            constants[f"gemm_{kind}"] = row[figure] / row[f"{kind}_tflops"]
    return Machine(
        memory=row["memory_gb"] * _GIB,
        bandwidth=row["bandwidth_gbs"] * _GIGA,
        bf16=row["bf16_tflops"] * _TERA,
        fp8=row.get("fp8_tflops", 0.0) * _TERA,
        processors=row["processors"],
        intra=row["intra_gbs"] * _GIGA,
        inter=row["inter_gbs"] * _GIGA,
        per_node=PER_NODE,
        **constants,
    )


def curve_constants(architecture: str, device: str = "") -> dict[str, Any]:
    """Curve constants: generic, then the architecture's, then the device's own."""
    merged: dict[str, Any] = {}
    for name in ("generic", architecture, device):
        merged |= {key: value for key, value in _constants().get(name, {}).items() if key in _CURVES}
    return merged


@dataclass(frozen=True)
class Cluster:
    """Devices in rank order: one machine each, by name; equal ones in nodes of `per_node`."""

    name: str
    names: tuple[str, ...]
    machines: tuple[Machine, ...]

    @property
    def size(self) -> int:
        """How many devices there are."""
        return len(self.machines)

    @cached_property
    def kinds(self) -> Mapping[Machine, int]:
        """How many there are of each machine."""
        return Counter(self.machines)

    @property
    def uniform(self) -> bool:
        """Whether all devices are alike."""
        return len(self.kinds) == 1

    @property
    def per_node(self) -> int:
        """Devices of a node."""
        return int(self.machines[0].per_node)


def parse_cluster(text: str) -> Cluster:
    """`8xh100`, nodes × devices `4x8xa100-80`, or the path of a TOML file.

    Raises:
        UsageError: it names no device, or no number of them.
        FileError: the file says something else than nodes, devices and figures.
    """
    if text.endswith(".toml"):
        return _from_file(Path(text))
    form = re.fullmatch(r"(?:(\d+)x)?(\d+)x(.+)", text.strip().lower())
    if form is None:
        form = re.fullmatch(r"()(1?)(.+)", text.strip().lower())
    if form is None:
        raise UsageError("cluster", text, "it names no device", "write 8xh100 or 4x8xh100")
    nodes, count, name = int(form[1] or 0), int(form[2] or 1), form[3]
    device = machine(name)
    total = (nodes or 1) * count
    if not 1 <= total <= 1 << 20:
        raise UsageError("cluster", text, "a cluster has between 1 and 1,048,576 devices", "write 8xh100 or 4x8xh100")
    per_node = count if nodes else min(PER_NODE, count)
    key = catalogue.resolve(devices(), name, "device")
    device = replace(device, per_node=per_node)
    return Cluster(text, (key,) * total, (device,) * total)


def _from_file(path: Path) -> Cluster:
    """`[[nodes]]` with `devices = ["h100", …]` or `device` and `count`; optional `intra_gbs`, `inter_gbs`, and tables
    `[device.NAME]` that start from a known device (`like`) and change figures of `Machine` (rates in bytes a second).
    """
    from shardwright.plan.cluster_file import MOST_DEVICES, ClusterFile

    said = ClusterFile.load(path)
    own = {name.lower(): _own_device(path, name, row.like, row.figures) for name, row in said.device.items()}
    names: list[str] = []
    machines: list[Machine] = []
    for node in said.nodes:
        if bool(node.devices) == bool(node.device):
            raise FileError(path, "a node has either devices or device and count", 'write devices = ["h100", "h100"]')
        listed = node.devices or [str(node.device)] * node.count
        rates = {"intra": node.intra_gbs, "inter": node.inter_gbs}
        figures = {name: rate * _GIGA for name, rate in rates.items() if rate is not None}
        for name in listed:
            device = own.get(name.lower()) or machine(name)
            names.append(name.lower())
            machines.append(replace(device, per_node=len(listed), **figures))
    if not 1 <= len(machines) <= MOST_DEVICES:
        problem = f"it has {len(machines):,} devices, not 1 to {MOST_DEVICES:,}"
        raise FileError(path, problem, 'write [[nodes]] and devices = ["h100", "h100"]')
    return Cluster(str(path), tuple(names), tuple(machines))


def _own_device(path: Path, name: str, like: str, figures: dict[str, float]) -> Machine:
    unknown = sorted(set(figures) - _FIGURES)
    if unknown:
        raise FileError(path, f"device {name} has unknown figures {unknown}", f"figures are {sorted(_FIGURES)}")
    zero = sorted(key for key, value in figures.items() if key in _RATES and not value)
    if zero:
        raise FileError(path, f"device.{name}.{zero[0]} is 0", "leave it out, or give what the device has")
    return replace(machine(like), **figures)
