"""Readers and private functions of torch's and megatron-core's distributed checkpoints."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import torch as strategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _write_item as write_item

# A strategy of its own has to repeat these steps of megatron-core's and torch's save, which have no public function.
group_by_key = strategy._replace_state_dict_keys_with_sharded_keys

__all__ = ["group_by_key", "reading_through", "write_item"]


@contextlib.contextmanager
def reading_through(reader: FileSystemReader, load_common: Callable[[str], dict[str, Any]]) -> Iterator[None]:
    """Make `dist_checkpointing.load` use this reader, and `load_common(folder)` for a legacy common.pt.

    megatron-core has no argument for a reader, and its own unpickles without restriction.
    """
    ours: dict[tuple[Any, str], Callable[..., Any]] = {
        (serialization, "_get_filesystem_reader"): lambda *args, **kwargs: reader,
        (strategy, "_get_filesystem_reader"): lambda *args, **kwargs: reader,
        (serialization, "load_common"): load_common,
    }
    theirs = {(module, name): getattr(module, name) for module, name in ours}
    try:
        for (module, name), function in ours.items():
            setattr(module, name, function)
        yield
    finally:
        for (module, name), function in theirs.items():
            setattr(module, name, function)
