"""The models on disk: which there are, what they say about themselves, and one to try out.

Names are imported when they are first used: whoever wants one should not wait for all.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kitty_nb.catalog.catalog import ModelCatalog, ScanStep
    from kitty_nb.catalog.demo_model import write_demo_model
    from kitty_nb.catalog.families import families
    from kitty_nb.catalog.file_facts import Kind
    from kitty_nb.catalog.gguf_contents import ArrayInfo, GgufHeader
    from kitty_nb.catalog.gguf_header import read_header
    from kitty_nb.catalog.model import Modality, Model
    from kitty_nb.catalog.shards import ShardName, missing_shards, shard_paths, total_size
    from kitty_nb.catalog.stores import Store, StoreKind, known_stores

_HOMES = {
    "ArrayInfo": "gguf_contents",
    "GgufHeader": "gguf_contents",
    "Kind": "file_facts",
    "Modality": "model",
    "Model": "model",
    "ModelCatalog": "catalog",
    "ScanStep": "catalog",
    "ShardName": "shards",
    "Store": "stores",
    "StoreKind": "stores",
    "families": "families",
    "known_stores": "stores",
    "missing_shards": "shards",
    "read_header": "gguf_header",
    "shard_paths": "shards",
    "total_size": "shards",
    "write_demo_model": "demo_model",
}

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


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found  # where a module has the same name, this is what is meant
    return found
