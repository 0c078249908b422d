"""Weights of 8-bit floats with scales: any box, against the whole weight times its spread-out scales, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from shardwright.checkpoint import reading
from shardwright.checkpoint.opening import open_checkpoint
from shardwright.checkpoint.source import Checkpoint
from shardwright.errors import FileError, UnsupportedError
from shardwright.layout.spec import Piece

ROWS, COLUMNS = 300, 140
"""Three by two blocks of 128, the last ones cut short."""
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def saved(folder: Path, config: Any, tensors: dict[str, Tensor]) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps({} if config is None else {"quantization_config": config}))
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


def read(checkpoint: Checkpoint, box: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    local = tuple((0, stop - start) for start, stop in box)
    out = torch.full([stop - start for start, stop in box], torch.nan, dtype=dtype)
    checkpoint.read(Piece("a.weight", (ROWS, COLUMNS), tuple((span,) for span in box), local, (0,)), out)
    return out


def weight(kind: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Every finite value of the type, many times."""
    values = torch.arange(256, dtype=torch.uint8).view(kind)
    values = values[values.float().isfinite()]
    return values.repeat(ROWS * COLUMNS // len(values) + 1)[: ROWS * COLUMNS].view(ROWS, COLUMNS)


def spread(scale: Tensor) -> Tensor:
    """The factor of each element, spelled out."""
    if scale.numel() == 1:
        return scale.float().reshape(1, 1).expand(ROWS, COLUMNS)
    if scale.shape[0] == ROWS:
        return scale.float().reshape(ROWS, 1).expand(ROWS, COLUMNS)
    rows, columns = torch.arange(ROWS) // 128, torch.arange(COLUMNS) // 128
    return scale.float()[rows][:, columns]


SCALES: dict[str, tuple[str, Tensor, Any]] = {
    "scalar": ("weight_scale", torch.tensor(0.3), None),
    "one": ("weight_scale", torch.tensor([0.3]), {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "inverse": ("weight_scale_inv", torch.tensor([[0.3]]), {"quant_method": "fp8"}),
    "rows": ("weight_scale", torch.rand(ROWS, 1) + 0.1, {"quant_method": "fbgemm_fp8"}),
    "flat rows": ("weight_scale", torch.rand(ROWS).bfloat16(), {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "blocks": ("weight_scale_inv", torch.rand(3, 2) + 0.1, FP8),
    "blocks in bfloat16": ("weight_scale_inv", (torch.rand(3, 2) + 0.1).bfloat16(), FP8),
}


@pytest.fixture(scope="module", params=SCALES)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    suffix, scale, config = SCALES[request.param]
    tensors = {"a.weight": weight(), f"a.{suffix}": scale, "a.input_scale": torch.tensor(2.0)}
    return saved(tmp_path_factory.mktemp("scaled"), config, tensors), weight().float() * spread(scale)


def test_whole(stored: Any) -> None:
    checkpoint, expected = stored
    assert list(checkpoint.entries) == ["a.weight"]
    assert read(checkpoint, ((0, ROWS), (0, COLUMNS))).equal(expected)
    assert read(checkpoint, ((0, ROWS), (0, COLUMNS)), torch.bfloat16).equal(expected.bfloat16())


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_box(stored: Any, data: st.DataObject) -> None:
    checkpoint, expected = stored
    box = [tuple(sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))) for n in (ROWS, COLUMNS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "CHUNK", data.draw(st.sampled_from([77, 5_000, 1 << 18])))
        found = read(checkpoint, box)
    assert found.equal(expected[slice(*box[0]), slice(*box[1])])


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_without_a_config_a_weight_may_stand_alone(tmp_path: Path, kind: torch.dtype) -> None:
    with saved(tmp_path, None, {"a.weight": weight(kind)}) as checkpoint:
        assert read(checkpoint, ((0, ROWS), (0, COLUMNS))).equal(weight(kind).float())


@pytest.mark.parametrize(("tensors", "said"), [
    ({}, "tensor 'a.weight' has no scale beside it (weight_scale or weight_scale_inv)"),
    ({"a.weight_scale": torch.ones(()), "a.weight_scale_inv": torch.ones(())}, "'a.weight' has both weight_scale and"),
    ({"a.weight_scale": torch.ones(2, 2)}, "tensor 'a.weight_scale' is float32 [2, 2] where [300, 140] of float8"),
    ({"a.weight_scale": torch.ones((), dtype=torch.int32)}, "tensor 'a.weight_scale' is int32 [] where"),
    ({"a.weight_scale_inv": torch.ones(2, 3)}, "in blocks of [128, 128] wants one float, one a row, or one a block"),
])  # fmt: skip
def test_scales_that_do_not_fit(tmp_path: Path, tensors: dict[str, Tensor], said: str) -> None:
    with pytest.raises(FileError) as caught:
        saved(tmp_path, FP8, {"a.weight": weight(), **tensors})
    assert said in str(caught.value)


def test_scaled_integers_are_refused_when_read(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.zeros(ROWS, COLUMNS, dtype=torch.int8), "a.weight_scale": torch.ones(())}
    with saved(tmp_path, FP8, tensors) as checkpoint, pytest.raises(UnsupportedError, match="holds int8"):
        read(checkpoint, ((0, 1), (0, 1)))
