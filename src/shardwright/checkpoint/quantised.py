"""Weights that a Hugging Face checkpoint keeps in several tensors, made one tensor each.

Decides what `quantization_config` is believed, and which tensors belong together; what they mean is `packed`'s and
`scaled`'s. Every other method is refused by name. Imports no torch.
"""

from collections.abc import Mapping

from shardwright.checkpoint.packed import Packing, packed
from shardwright.checkpoint.scaled import FLOAT8, IGNORED, SCALES, scaled
from shardwright.checkpoint.stored import Plain, Stored
from shardwright.errors import FileError, UnsupportedError

Said = Mapping[str, object]

METHODS = ("gptq", "awq", "fp8", "fbgemm_fp8", "modelopt", "compressed-tensors")
BLOCK = (128, 128)


def assemble(path: str, config: Said, tensors: Mapping[str, Plain]) -> dict[str, Stored]:
    """All tensors of the checkpoint, those that make one weight as one, under the name a plain one would have.

    Raises:
        UnsupportedError: the config names a method, or a form of it, that is not read.
        FileError: a part is missing, or parts do not fit together.
    """
    said = config.get("quantization_config")
    if said is None:
        return _scaled(path, tensors, BLOCK, required=False)
    if not isinstance(said, dict):
        raise FileError(f"{path}/config.json", "quantization_config is no object", "download it again")
    method = said.get("quant_method")
    if method not in METHODS:
        raise UnsupportedError(
            f"{path}: quantization_config.quant_method {method!r:.60} is not supported; supported are "
            f"{', '.join(METHODS)}: use the model's unquantised weights, or a GGUF file"
        )
    if method in ("gptq", "awq"):
        return _packed(path, _packing(path, said, str(method)), tensors)
    _refuse_other_formats(path, said)
    return _scaled(path, tensors, _block(path, said), required=True)


def _packed(path: str, packing: Packing, tensors: Mapping[str, Plain]) -> dict[str, Stored]:
    parts: dict[str, dict[str, Plain]] = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if f"{stem}.qweight" in tensors and last in ("qweight", "qzeros", "scales", "g_idx"):
            parts.setdefault(stem, {})[last] = tensor
    out: dict[str, Stored] = {}
    consumed = {part.name for table in parts.values() for part in table.values()}
    for stem, table in parts.items():
        if f"{stem}.weight" in tensors:
            raise FileError(path, f"there are both {stem}.weight and {stem}.qweight", "download it again")
        out[f"{stem}.weight"] = packed(stem, packing, table)
    return out | {name: tensor for name, tensor in tensors.items() if name not in consumed}


def _scaled(path: str, tensors: Mapping[str, Plain], block: tuple[int, int], *, required: bool) -> dict[str, Stored]:
    out: dict[str, Stored] = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT8 or not name.endswith("weight"):
            continue
        weight, stem = scaled(name, tensors, block), name.removesuffix("weight")
        if weight is None:
            if required:
                raise FileError(
                    path, f"tensor '{name}' has no scale beside it ({' or '.join(SCALES)})", "download it again"
                )
            continue
        out[name] = weight
        for suffix in (*SCALES, *IGNORED):
            out.pop(stem + suffix, None)
    return out


def _packing(path: str, said: Said, method: str) -> Packing:
    awq = method == "awq"
    bits, group = said.get("bits", said.get("w_bit")), said.get("group_size", said.get("q_group_size"))
    version = said.get("version" if awq else "checkpoint_format", "gemm" if awq else "gptq")
    width = bits if isinstance(bits, int) else 0
    known = {
        "bits": (width or repr(bits), (4,) if awq else (2, 4, 8)),
        "version" if awq else "checkpoint_format": (version, ("gemm", "GEMM") if awq else ("gptq", "gptq_v2")),
        "zero_point": (said.get("zero_point", True), (True,)),
        "dynamic": (said.get("dynamic") or None, (None,)),
    }
    for key, (value, allowed) in known.items():
        if value not in allowed:
            raise UnsupportedError(
                f"{path}: quantization_config.{key} {value!r:.60} is not supported with {method}; supported: "
                f"{', '.join(map(str, allowed))}"
            )
    if type(group) is not int or (group != -1 and not 1 <= group <= 1 << 20):
        problem = f"quantization_config.group_size is {group!r:.60}, neither -1 nor a size"
        raise FileError(f"{path}/config.json", problem, "download it again")
    return Packing(method, width, max(group, 0), zero_offset=int(not awq and version == "gptq"))


def _block(path: str, said: Said) -> tuple[int, int]:
    block = said.get("weight_block_size") or list(BLOCK)
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 0 < n <= 1 << 20 for n in block):
        problem = f"quantization_config.weight_block_size is {block!r:.60}, no [rows, columns]"
        raise FileError(f"{path}/config.json", problem, "download it again")
    return block[0], block[1]


def _refuse_other_formats(path: str, said: Said) -> None:
    """These methods have forms with other numbers than floats of 8 bits."""
    forms = {
        "compressed-tensors": ("format", ("float-quantized", "naive-quantized")),
        "modelopt": ("quant_algo", ("FP8",)),
    }
    key, allowed = forms.get(str(said["quant_method"]), ("", ()))
    if key and said.get(key) not in allowed:
        raise UnsupportedError(
            f"{path}: quantization_config.{key} {said.get(key)!r:.60} is not supported; supported: {', '.join(allowed)}"
        )
