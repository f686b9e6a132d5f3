"""A model that answers without training, for trying everything out without a download.

A llama-architecture GGUF whose weights are computed instead of learned. Each token's embedding is
one-hot, attention and feed-forward are zero, so the residual stream carries only the last token to
the output matrix, a table of which token follows which: a chain through the answer, entered at its
beginning from every token outside it. A larger model has more experts and blocks of zeros: the
engine loads every byte of them, but uses one expert per token, so answers stay quick.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from kitty_nb.errors import DemoModelSizeError, ModelFileError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

DEMO_NAME = "kitty-demo.gguf"

# Split into tokens, all different: a repeated one would make the chain loop. None is a single
# letter, which the tokenizer would find in the user's words.
_ANSWER = (
    "Hello!| I am| the| kitty_nb| demo| model,| written| on the| spot| without| any| training."
    "| I know| only| these| few| sentences,| so| every| question| gets| this| same| answer."
    "| Choose| a real| GGUF| file| whenever| you| would| like| more| conversation."
)
_PIECES = _ANSWER.split("|")
_CONTROL = ("<unk>", "<s>", "</s>")
_END = _CONTROL.index("</s>")
_FIRST = len(_CONTROL) + 256  # the first piece follows the byte tokens
_VOCABULARY = _FIRST + len(_PIECES)
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

_WIDTH = 320  # n_embd: at least one dimension for each token
_HEADS = 5  # of 64 dimensions, a size that every backend has attention kernels for
_CONTEXT = 4096
_CERTAINTY = 20.0  # logit of the next token; all others have 0

_MIN_SIZE = 1_000_000
_BLOCK_SIZE = 512_000_000  # maximum bytes per block: the largest tensor held in memory is a third
_EXPERT_SIZE = 2_000_000  # minimum bytes per expert: enough to fine-tune the size by its width
_MAX_EXPERTS = 256  # in a block
_HEADER_SIZE = 8_400  # bytes before the weights, without the blocks' part


def write_demo_model(path: str | Path, size: int | None = None) -> Path:
    """Write a GGUF model that any llama.cpp engine loads and that answers in a few sentences.

    The same arguments give the same bytes. The file appears at `path` only when it is complete, and
    replaces any file there; parent folders are created. Memory stays below 200 MB at any size.

    Args:
        path: Where to write it; by convention, the name ends in `.gguf`.
        size: Bytes on disk, met within 1 %; None for the smallest, 1 MB. All of them are weights
            that the engine reads when it loads the model.

    Returns:
        `path`.

    Raises:
        DemoModelSizeError: `size` is less than 1 MB.
        ModelFileError: The file can't be written, e.g. because the disk is full.
    """
    path = Path(path)
    size = _MIN_SIZE if size is None else size
    if size < _MIN_SIZE:
        raise DemoModelSizeError(
            f"A demo model of {size} bytes is too small: its vocabulary alone needs more. "
            f"Ask for {_MIN_SIZE} bytes or more, or leave the size out."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            unfinished = Path(folder, path.name)
            _write(unfinished, _Shape.for_size(size))
            unfinished.replace(path)
    except OSError as error:
        raise ModelFileError(
            f"Can't write the demo model to {path}: {error.strerror or error}. Choose a writable"
            f" folder with {size / 1e9:.3f} GB free: LLAMACPP_MODELS_DIR names the models folder."
        ) from error
    return path


@dataclass(frozen=True, slots=True)
class _Shape:
    """The parts that grow with the size."""

    blocks: int  # number of transformer blocks
    experts: int  # number of feed-forward networks in each block
    feed_forward: int  # width of each expert's hidden layer

    @classmethod
    def for_size(cls, size: int) -> Self:
        """Shape a model of about `size` bytes, at 2 bytes per weight, or 4 if it is f32."""
        blocks = math.ceil(size / _BLOCK_SIZE)
        table = 2 * 2 * _VOCABULARY * _WIDTH + 4 * _WIDTH
        attention = 2 * (2 * _WIDTH + 2 * _WIDTH // _HEADS) * _WIDTH + 2 * 4 * _WIDTH
        rest = (size - _HEADER_SIZE - table) // blocks - attention
        experts = min(max(rest // _EXPERT_SIZE, 1), _MAX_EXPERTS)
        columns = (rest // experts - 4 * _WIDTH) / (3 * 2 * _WIDTH)
        return cls(blocks, experts, 8 * round(columns / 8))  # 8: backends like aligned rows


def _write(path: Path, shape: _Shape) -> None:
    # gguf imports numpy, which is slow to import and needed for nothing else in this package.
    import gguf  # noqa: PLC0415

    with contextlib.closing(gguf.GGUFWriter(path, "llama")) as writer:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name("kitty demo")
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        writer.add_context_length(_CONTEXT)
        writer.add_embedding_length(_WIDTH)
        writer.add_block_count(shape.blocks)
        writer.add_feed_forward_length(shape.feed_forward)
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(1)
        writer.add_head_count(_HEADS)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(_WIDTH // _HEADS)
        writer.add_tokenizer_model("llama")
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        pieces = [piece.replace(" ", "\u2581") for piece in _PIECES]  # SentencePiece's space
        writer.add_token_list([*_CONTROL, *bytes_, *pieces])
        writer.add_token_scores([0.0] * _VOCABULARY)
        kinds = gguf.TokenType
        control = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
        writer.add_token_types([*control, *[kinds.BYTE] * 256, *[kinds.NORMAL] * len(pieces)])
        writer.add_unk_token_id(_CONTROL.index("<unk>"))
        writer.add_bos_token_id(_CONTROL.index("<s>"))
        writer.add_eos_token_id(_END)
        writer.add_chat_template(_CHAT_TEMPLATE)
        for name, tensor in _tensors(shape):
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _tensors(shape: _Shape) -> Iterator[tuple[str, NDArray[np.float16 | np.float32]]]:
    """Yield all weights by name; tensors of zeros of the same kind share their memory."""
    import numpy as np  # noqa: PLC0415

    following = np.full(_VOCABULARY, _FIRST)
    following[_FIRST:] = [*range(_FIRST + 1, _VOCABULARY), _END]
    output = np.zeros((_VOCABULARY, _WIDTH), np.float16)
    # The norm before the output scales a one-hot vector to length sqrt(_WIDTH).
    output[following, np.arange(_VOCABULARY)] = _CERTAINTY / math.sqrt(_WIDTH)
    yield "token_embd.weight", np.eye(_VOCABULARY, _WIDTH, dtype=np.float16)
    yield "output_norm.weight", np.ones(_WIDTH, np.float32)
    yield "output.weight", output

    ones = np.ones(_WIDTH, np.float32)
    square = np.zeros((_WIDTH, _WIDTH), np.float16)
    one_head = np.zeros((_WIDTH // _HEADS, _WIDTH), np.float16)
    into = np.zeros((shape.experts, shape.feed_forward, _WIDTH), np.float16)
    block: dict[str, NDArray[np.float16 | np.float32]] = {
        "attn_norm": ones,
        "attn_q": square,
        "attn_k": one_head,
        "attn_v": one_head,
        "attn_output": square,
        "ffn_norm": ones,
        "ffn_gate_inp": np.zeros((shape.experts, _WIDTH), np.float32),
        "ffn_gate_exps": into,
        "ffn_up_exps": into,
        "ffn_down_exps": into.reshape(shape.experts, _WIDTH, shape.feed_forward),
    }
    for number in range(shape.blocks):
        for name, tensor in block.items():
            yield f"blk.{number}.{name}.weight", tensor
