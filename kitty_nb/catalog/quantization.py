"""How a model's weights are stored: what the header claims, what the tensors show.

The numbers are llama.cpp's: `enum llama_ftype` in `include/llama.h` for a whole file,
`enum ggml_type` in `ggml/include/ggml.h` for one tensor.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FILE_TYPES", "TENSOR_TYPES", "TensorType", "named_quantization", "stored_quantization"]


class TensorType(NamedTuple):
    """How the numbers of a tensor are stored.

    Attributes:
        name: E.g. `Q4_K`.
        block: How many numbers are stored together.
        size: Bytes that they take.
    """

    name: str
    block: int
    size: int


# llama.cpp's enum llama_ftype, without its MOSTLY_ and ALL_.
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S",
    17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M",
    30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
    40: "Q1_0",
}  # fmt: skip

TENSOR_TYPES = {
    number: TensorType(*of)
    for number, of in {
        0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
        10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
        26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
        30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
        40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
    }.items()
}  # fmt: skip

# What llama.cpp stores most weights as where the file type does not begin with its name
# (`llama_ftype_get_default_type` in `src/llama-quant.cpp`).
_STORED_AS = {"IQ2_S": "IQ2_XS", "IQ2_M": "IQ2_S", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S"}

_TAG = re.compile(
    r"(?<![a-z0-9])(?:(?:I?Q|TQ)\d(?:_[a-z0-9]{1,3})*|B?FP?16|FP?32|MXFP4(?:_MOE)?|NVFP4)(?![a-z0-9])",
    re.ASCII | re.IGNORECASE,
)


def stored_quantization(
    file_type: int | None, weights: Mapping[int, int], stem: str
) -> tuple[str | None, bool | None]:
    """Name a model's quantization by its header or its name, confirmed by its tensors.

    Args:
        file_type: The header's `general.file_type`; None without one.
        weights: Bytes of the model's matrices by their type.
        stem: The file's name, which tells it where the header does not.

    Returns:
        The name, e.g. `Q4_K_M`, or None when nothing tells; and whether that and the tensors agree,
        or None when one of them says nothing. Where they do not agree, the name is that of the
        type that most bytes are stored as.
    """
    by_header = FILE_TYPES.get(file_type) if file_type is not None else None
    claimed = by_header or named_quantization(stem)
    known = {TENSOR_TYPES[kind].name: n for kind, n in weights.items() if kind in TENSOR_TYPES}
    if not known:
        return claimed, None
    most: str = max(known, key=lambda name: known[name])
    if claimed is None:
        return most, None
    expected = {claimed, _STORED_AS.get(claimed, claimed)}
    agrees = any(name in expected or claimed.startswith(f"{name}_") for name in known)
    return (claimed, True) if agrees else (most, False)


def named_quantization(stem: str) -> str | None:
    """Find what a file's name says about quantization, e.g. `Q8_0` in `qwen2.5-7b-q8_0`."""
    tags: list[str] = _TAG.findall(stem)
    return tags[-1].upper() if tags else None
