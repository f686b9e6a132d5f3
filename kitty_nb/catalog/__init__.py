"""The models on disk: which there are, what they say about themselves, and one to try out."""

from kitty_nb.catalog.catalog import ModelCatalog, ScanStep
from kitty_nb.catalog.demo_model import write_demo_model
from kitty_nb.catalog.families import families
from kitty_nb.catalog.file_facts import Kind
from kitty_nb.catalog.gguf_contents import ArrayInfo, GgufHeader
from kitty_nb.catalog.gguf_header import read_header
from kitty_nb.catalog.model import Modality, Model
from kitty_nb.catalog.shards import ShardName, missing_shards, shard_paths, total_size
from kitty_nb.catalog.stores import Store, StoreKind, known_stores

__all__ = [
    "ArrayInfo",
    "GgufHeader",
    "Kind",
    "Modality",
    "Model",
    "ModelCatalog",
    "ScanStep",
    "ShardName",
    "Store",
    "StoreKind",
    "families",
    "known_stores",
    "missing_shards",
    "read_header",
    "shard_paths",
    "total_size",
    "write_demo_model",
]
