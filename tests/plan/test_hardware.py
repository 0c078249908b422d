"""The catalogue of devices, and clusters from names and files."""

from pathlib import Path

import pytest

from shardwright.errors import FileError, UsageError
from shardwright.plan.hardware import devices, machine, parse_cluster


def test_every_device_has_its_figures_and_a_source() -> None:
    for name, row in devices().items():
        assert row["source"], name
        assert machine(name).memory > 0


def test_names_have_aliases_and_no_case() -> None:
    assert machine("H100-SXM5-80GB") is machine("h100_sxm") or machine("H100-SXM5-80GB") == machine("h100")
    assert machine("910B") == machine("910b2")


def test_an_unknown_name_lists_the_near_ones() -> None:
    with pytest.raises(UsageError, match=r"device=h10o: there is no such device; did you mean h100"):
        machine("h10o")


@pytest.mark.parametrize(
    ("text", "size", "per_node"),
    [
        ("8xh100", 8, 8),
        ("4x8xa100-80", 32, 8),
        ("2x4xgb200", 8, 4),
        ("16xh100", 16, 8),
        ("h100", 1, 1),
        ("3xL40S", 3, 3),
    ],
)
def test_clusters_by_name(text: str, size: int, per_node: int) -> None:
    cluster = parse_cluster(text)
    assert (cluster.size, cluster.per_node, cluster.uniform) == (size, per_node, True)


@pytest.mark.parametrize("text", ["0xh100", "8xnothing", "9999999x8xh100", "", " ", "8xh\n100"])
def test_clusters_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_cluster(text)


def test_a_cluster_from_a_file(tmp_path: Path) -> None:
    """Unequal devices, a slower link, and a device of one's own."""
    path = tmp_path / "cluster.toml"
    path.write_text(
        '[device.old]\nlike = "a100-40"\nbf16 = 1e14\n'
        '[[nodes]]\ndevices = ["h100", "h100", "old"]\nintra_gbs = 100\n'
        '[[nodes]]\ndevice = "a100-80"\ncount = 2\n'
    )
    cluster = parse_cluster(str(path))
    assert cluster.names == ("h100", "h100", "old", "a100-80", "a100-80")
    assert not cluster.uniform
    assert cluster.machines[2].bf16 == 1e14
    assert cluster.machines[0].intra == 100e9
    path.write_text("[[nodes]]\n")
    with pytest.raises((FileError, UsageError)):
        parse_cluster(str(path))
    with pytest.raises(FileError, match="cannot be read"):
        parse_cluster(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(("text", "said"), [
    ("x = = 3", "it is no TOML"),
    ("", "it has 0 devices, not 1 to 1,048,576"),
    ("[nodes]\ndevices = ['h100']", "nodes is {'devices': ['h100']}: input should be a valid list"),
    ("[[nodes]]\ndevices = 'h100'", "nodes.0.devices is 'h100': input should be a valid list"),
    ("[[nodes]]\ndevices = [1]", "nodes.0.devices.0 is 1: input should be a valid string"),
    ("[[nodes]]\ndevices = ['h100']\nintra_gb = 3", "nodes.0.intra_gb is no key"),
    ("inter_gbs = 3\n[[nodes]]\ndevices = ['h100']", "inter_gbs is no key"),
    ("[[nodes]]\ndevice = 'h100'\ncount = 'x'", "nodes.0.count is 'x': input should be a valid integer"),
    ("[[nodes]]\ndevice = 'h100'\ncount = 0", "nodes.0.count is 0: input should be greater than or equal to 1"),
    ("[[nodes]]\ndevice = 'h100'\ncount = 3000000", "nodes.0.count is 3000000: input should be less than"),
    ("[[nodes]]\ndevice = 'h100'\ndevices = ['h100']", "a node has either devices or device and count"),
    ("[[nodes]]\ncount = 2", "a node has either devices or device and count"),
    ("[[nodes]]\ndevices = ['h100']\nintra_gbs = 0", "nodes.0.intra_gbs is 0: input should be greater than 0"),
    ("[[nodes]]\ndevices = ['h100']\nintra_gbs = nan", "nodes.0.intra_gbs is nan: input should be a finite number"),
    ("device = 'h100'", "device is 'h100': input should be a valid dictionary"),
    ("[device.m]\nbandwidth = 1e12", "device.m.like is missing"),
    ("[device.m]\nlike = 'h100'\nbandwith = 1e12\n[[nodes]]\ndevices = ['m']", "device m has unknown figures ['bandw"),
    ("[device.m]\nlike = 'h100'\nper_node = 4\n[[nodes]]\ndevices = ['m']", "device m has unknown figures ['per_"),
    ("[device.m]\nlike = 'h100'\nbf16 = 'x'", "device.m.bf16 is 'x': input should be a valid number"),
    ("[device.m]\nlike = 'h100'\nmemory = -1", "device.m.memory is -1: input should be greater than or equal to 0"),
    ("[device.m]\nlike = 'h100'\nmemory = 0\n[[nodes]]\ndevices = ['m']", "device.m.memory is 0"),
])  # fmt: skip
def test_a_file_that_says_something_else_is_refused_on_a_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    with pytest.raises(FileError) as caught:
        parse_cluster(str(path))
    assert str(caught.value).startswith(f"{path}: {said}")
    assert "\n" not in str(caught.value)
