"""Counts the collectives of a block of code on this rank, as torch dispatches them."""

import collections
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPERATIONS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "send": "send",
}
SCALARS = 64
"""Bytes up to which a tensor counts as scalars: losses, norms, flags."""

Counts = dict[tuple[str, int], tuple[int, int]]
"""(operation, ranks of the group) -> (calls, bytes of the largest tensors of all calls)."""


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: collections.Counter = collections.Counter()
        self.bytes: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operation = OPERATIONS.get(function.__name__.split(".")[0]) if function.namespace == "c10d" else None
        if operation:
            leaves = tree_leaves((args, kwargs))
            group = next(leaf for leaf in leaves if isinstance(leaf, torch.ScriptObject))
            # Messages between two ranks may use any group of which both are members.
            ranks = 2 if operation == "send" else dist.ProcessGroup.unbox(group).size()
            size = max(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
            if ranks > 1 and size > SCALARS:
                self.calls[operation, ranks] += 1
                self.bytes[operation, ranks] += size
        return function(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[_Counter]:
    """Counts in the block; `calls` and `bytes` by (operation, ranks of the group), without pickled objects."""
    with _Counter() as counter:
        yield counter
