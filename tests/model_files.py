"""GGUF models that an engine accepts, as long as real ones and without their weights.

The weights are a hole in the file, which takes no room on disk and reads as zeros. Architectures
and proportions are those of models that people use, with fewer layers.
"""

from __future__ import annotations

import contextlib
import os
import struct
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from kitty_nb.catalog.gguf import named_quantization

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"width": 4096, "inner": 14336, "heads": 32, "kv_heads": 8, "context": 131072},
    "qwen2": {
        "width": 3584, "inner": 18944, "heads": 28, "kv_heads": 4, "biased": True,
        "kind": Kind.Q8_0,
    },
    "gemma2": {
        "width": 3584, "inner": 14336, "heads": 16, "kv_heads": 8, "head": 256, "window": 4096,
        "tied": True, "post_norms": True,
    },
    "gemma3": {
        "width": 3840, "inner": 15360, "heads": 16, "kv_heads": 8, "head": 256, "window": 1024,
        "layers": 12, "tied": True, "post_norms": True, "head_norms": True, "context": 131072,
    },
    "qwen3moe": {
        "width": 2048, "inner": 6144, "heads": 32, "kv_heads": 4, "head": 128, "experts": 128,
        "used": 8, "expert_inner": 768, "head_norms": True, "kind": Kind.Q4_K,
    },
    "mixtral": {
        "architecture": "llama", "width": 4096, "inner": 14336, "heads": 32, "kv_heads": 8,
        "experts": 8, "used": 2, "kind": Kind.Q4_0,
    },
}  # fmt: skip


def write_model(
    path: Path,
    architecture: str = "llama",
    *,
    layers: int = 8,
    width: int = 256,
    inner: int = 512,
    heads: int = 4,
    kv_heads: int = 2,
    head: int | None = None,
    context: int = 32768,
    vocabulary: int = 1000,
    window: int | None = None,
    experts: int = 0,
    used: int = 0,
    expert_inner: int | None = None,
    kind: Kind = Kind.F16,
    tied: bool = False,
    biased: bool = False,
    post_norms: bool = False,
    head_norms: bool = False,
    endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
    **more: int | float | str | bool | list[Any] | None,
) -> Path:
    """Write a model.

    `more` are keys of its architecture, with `__` for a dot; None leaves one out.
    """
    keys: dict[str, int | float | str | bool | list[Any] | None] = {
        "context_length": context,
        "embedding_length": width,
        "block_count": layers,
        "feed_forward_length": inner,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": head or width // heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.sliding_window": window,
        "expert_count": experts or None,
        "expert_used_count": used or None,
        "expert_feed_forward_length": expert_inner,
    } | {key.replace("__", "."): value for key, value in more.items()}
    with contextlib.closing(gguf.GGUFWriter(path, architecture, endianess=endian)) as writer:
        for key, value in keys.items():
            _add(writer, f"{architecture}.{key}", value)
        _add_vocabulary(writer, vocabulary)
        sizes = {"v": vocabulary, "w": width, "q": heads * (head or width // heads), "f": inner}
        sizes |= {"k": kv_heads * (head or width // heads), "d": head or width // heads}
        sizes |= {"e": experts, "x": expert_inner or inner}
        end = 0
        for name, shape in _tensors(
            layers,
            tied=tied,
            biased=biased,
            post_norms=post_norms,
            head_norms=head_norms,
            expert=bool(experts),
        ):
            dimensions = [sizes[letter] for letter in shape]
            plain = len(shape) == 1 or name.endswith("ffn_gate_inp.weight")
            end += _describe(writer, name, dimensions, Kind.F32 if plain else kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout
        begin = gguf.GGUFWriter.ggml_pad(writer.fout[0].tell(), writer.data_alignment)
    os.truncate(path, begin + end)
    return path


def write_header(
    path: Path,
    architecture: str = "qwen2",
    tensors: dict[str, tuple[list[int], Kind]] | None = None,
    endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
    **keys: int | float | str | bool | list[Any],
) -> Path:
    """Write a GGUF file with any keys, with `__` for a dot, and tensors that are holes.

    Without tensors it has one, and with no word on its tokenizer that it has none to speak of.
    """
    tensors = {"a.weight": ([32], Kind.F32)} if tensors is None else tensors
    keys.setdefault("tokenizer__ggml__model", "no_vocab")
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(gguf.GGUFWriter(path, architecture, endianess=endian)) as writer:
        for key, value in keys.items():
            _add(writer, key.replace("__", "."), value)
        end = sum(_describe(writer, name, *of) for name, of in tensors.items())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout
        begin = writer.fout[0].tell()
    if tensors:
        os.truncate(path, gguf.GGUFWriter.ggml_pad(begin, 32) + end)
    return path


def write_projector(path: Path, width: int) -> Path:
    """Write a projector for images that sees nothing, as small as an engine accepts.

    Args:
        path: Where.
        width: Numbers in the vectors that it makes: the model's embedding length.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    inner, side, patch = 64, 32, 8
    keys = {"image_size": side, "patch_size": patch, "embedding_length": inner}
    keys |= {"feed_forward_length": 2 * inner, "block_count": 1, "projection_dim": width}
    keys |= {"attention.head_count": 2, "projector.scale_factor": 2}
    more: dict[str, Any] = {"attention.layer_norm_epsilon": 1e-6}
    more |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    matrices = {"v.patch_embd.weight": (inner, 3, patch, patch)}
    matrices |= {"mm.input_projection.weight": (inner, width)}
    vectors = {"v.patch_embd.bias": inner, "mm.soft_emb_norm.weight": inner}
    vectors |= {"v.post_ln.weight": inner, "v.post_ln.bias": inner}
    for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
        matrices[f"v.blk.0.{name}.weight"] = (inner, inner)
    for name, rows, columns in (("up", 2 * inner, inner), ("down", inner, 2 * inner)):
        matrices[f"v.blk.0.ffn_{name}.weight"] = (rows, columns)
        vectors[f"v.blk.0.ffn_{name}.bias"] = rows
    for name in ("ln1", "ln2"):
        vectors |= {f"v.blk.0.{name}.weight": inner, f"v.blk.0.{name}.bias": inner}
    with contextlib.closing(gguf.GGUFWriter(path, "clip")) as writer:
        writer.add_type(gguf.GGUFType.MMPROJ)
        writer.add_bool("clip.has_vision_encoder", True)
        writer.add_string("clip.projector_type", "gemma3")
        stored = named_quantization(path.stem) or "F16"
        types = gguf.LlamaFileType
        claims = {"F32": types.ALL_F32, "F16": types.MOSTLY_F16, "BF16": types.MOSTLY_BF16}
        writer.add_file_type(claims[stored])
        for key, value in (keys | more).items():
            _add(writer, f"clip.vision.{key}", value)
        for name, shape in matrices.items():
            size = 4 if stored == "F32" else 2
            zeros = np.zeros((*shape[:-1], size * shape[-1]), np.uint8)
            writer.add_tensor(name, zeros, raw_dtype=Kind[stored])
        for name, length in vectors.items():
            writer.add_tensor(name, np.full(length, "norm" in name or "ln" in name, np.float32))
        writer.add_tensor("v.position_embd.weight", np.zeros(((side // patch) ** 2, inner), "f4"))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return path


def _describe(writer: gguf.GGUFWriter, name: str, shape: list[int], kind: Kind) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(np.prod(shape)) // block * size
    if kind in {Kind.F16, Kind.F32}:
        plain = np.dtype(np.float16 if kind is Kind.F16 else np.float32)
        writer.add_tensor_info(name, shape, plain, count)
    else:
        rows = [*shape[:-1], shape[-1] // block * size]
        writer.add_tensor_info(name, rows, np.dtype(np.uint8), count, raw_dtype=kind)
    return gguf.GGUFWriter.ggml_pad(count, writer.data_alignment)


def _tensors(
    layers: int, *, tied: bool, biased: bool, post_norms: bool, head_norms: bool, expert: bool
) -> Iterator[tuple[str, str]]:
    """Names, and shapes as letters: vocabulary, width, queries, keys, head, feed-forward, …"""
    yield "token_embd.weight", "vw"
    yield "output_norm.weight", "w"
    if not tied:
        yield "output.weight", "vw"
    block = {"attn_norm": "w", "attn_q": "qw", "attn_k": "kw", "attn_v": "kw", "attn_output": "wq"}
    block["ffn_norm"] = "w"
    if expert:
        block |= {"ffn_gate_inp": "ew", "ffn_gate_exps": "exw", "ffn_up_exps": "exw"}
        block |= {"ffn_down_exps": "ewx"}
    else:
        block |= {"ffn_gate": "fw", "ffn_up": "fw", "ffn_down": "wf"}
    if post_norms:
        block |= {"post_attention_norm": "w", "post_ffw_norm": "w"}
    if head_norms:
        block |= {"attn_q_norm": "d", "attn_k_norm": "d"}
    for layer in range(layers):
        for name, shape in block.items():
            yield f"blk.{layer}.{name}.weight", shape
        if biased:
            for letter in "qkv":
                yield f"blk.{layer}.attn_{letter}.bias", "q" if letter == "q" else "k"


def _add_vocabulary(writer: gguf.GGUFWriter, count: int) -> None:
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds += [gguf.TokenType.BYTE] * 256
    tokens += [f"t{number}" for number in range(count - len(tokens))]
    kinds += [gguf.TokenType.NORMAL] * (count - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * count)
    writer.add_token_types(kinds)


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def split_model(source: Path, folder: Path, count: int = 3) -> list[Path]:
    """Write a model again, as shards; return their paths."""
    model = gguf.GGUFReader(source)
    each = -(-len(model.tensors) // count)
    kept = {"general.architecture"}
    with contextlib.closing(
        gguf.GGUFWriter(folder / "split.gguf", "llama", split_max_tensors=each)
    ) as writer:
        for name, entry in model.fields.items():
            if not name.startswith("GGUF.") and name not in kept:
                part = entry.types[1] if entry.types[0] is gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, entry.contents(), entry.types[0], part)
        for tensor in model.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return sorted(folder.glob("split-*.gguf"))


def write_adapter(path: Path, model: Path) -> Path:
    """Write a LoRA adapter that hardly changes a model."""
    (query,) = (one for one in gguf.GGUFReader(model).tensors if one.name == "blk.0.attn_q.weight")
    inner, outer = map(int, query.shape)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    for end, shape in (("a", (1, inner)), ("b", (outer, 1))):
        writer.add_tensor(f"{query.name}.lora_{end}", np.full(shape, 1e-6, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_pooled(source: Path, path: Path, pooling: int) -> Path:
    """Copy a model of llama's architecture, and say by which pooling it makes one vector of many.

    Args:
        source: The model.
        path: Where the copy goes.
        pooling: llama.cpp's `enum llama_pooling_type`.
    """
    whole = source.read_bytes()
    entries = b""
    # The second makes the length one to which tensors are aligned.
    for key, value in ((b"llama.pooling_type", pooling), (b"general.filler", 0)):
        entries += struct.pack(f"<Q{len(key)}sII", len(key), key, 4, value)
    assert len(entries) % 32 == 0
    (count,) = struct.unpack_from("<Q", whole, 16)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(whole[:16] + struct.pack("<Q", count + 1 + 1) + entries + whole[24:])
    return path


WORDS = ["cat", "dog", "the", "sits", "on", "mat", "sun", "what", "is"]


def write_ranker(path: Path, pooling: int | None = 4) -> Path:
    """Write a cross-encoder of random weights, which ranks documents that are made of `WORDS`."""
    width, inner = 32, 64
    random = np.random.default_rng(1)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"\u2581{word}" for word in WORDS)]
    keys: dict[str, Any] = {
        "context_length": 256,
        "embedding_length": width,
        "feed_forward_length": inner,
    }
    keys |= {"block_count": 1, "attention.head_count": 2, "attention.layer_norm_epsilon": 1e-6}
    keys |= {"attention.causal": False, "pooling_type": pooling}
    matrices = {"token_embd": (len(tokens), width), "position_embd": (256, width)}
    matrices |= {"token_types": (2, width), "cls": (width, width), "cls.output": (1, width)}
    biases = {"cls": width, "cls.output": 1}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        matrices[f"blk.0.{name}"], biases[f"blk.0.{name}"] = (width, width), width
    for name, rows, columns in (("ffn_up", inner, width), ("ffn_down", width, inner)):
        matrices[f"blk.0.{name}"], biases[f"blk.0.{name}"] = (rows, columns), rows
    norms = "token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(gguf.GGUFWriter(path, "bert")) as writer:
        for key, value in keys.items():
            _add(writer, f"bert.{key}", value)
        writer.add_tokenizer_model("bert")
        writer.add_token_list(tokens)
        kinds = [gguf.TokenType.CONTROL] * 5 + [gguf.TokenType.NORMAL] * len(WORDS)
        writer.add_token_types(kinds)
        writer.add_token_type_count(2)
        writer.add_pad_token_id(0)
        writer.add_unk_token_id(1)
        writer.add_bos_token_id(2)
        writer.add_eos_token_id(3)
        writer.add_sep_token_id(3)
        writer.add_mask_token_id(4)
        for name, shape in matrices.items():
            writer.add_tensor(f"{name}.weight", random.normal(0, 0.3, shape).astype("f4"))
        for name, length in biases.items():
            writer.add_tensor(f"{name}.bias", np.zeros(length, np.float32))
        for name in norms:
            writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
            writer.add_tensor(f"{name}.bias", np.zeros(width, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return path
