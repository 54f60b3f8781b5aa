"""Runs megatron-core without CUDA: gloo instead of NCCL, host memory instead of device memory.

megatron-core uses CUDA in three ways: functions of `torch.cuda` (device, streams, random state), allocations with
`device="cuda"` or in pinned memory, and type names in its optimizers. `prepare()` replaces each by a CPU equivalent. With CUDA it
replaces nothing. Call it before the first import of megatron.core.
"""

import contextlib
import ctypes
import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Stream:
    """A CUDA stream or event on the CPU, where operations run in order and waiting takes no time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _done(self, *args: Any, **kwargs: Any) -> bool:
        return True

    wait_stream = wait_event = synchronize = record = wait = query = _done

    def record_event(self, event: "_Stream | None" = None) -> "_Stream":
        return event or self


class _CudaDeviceToCpu(TorchFunctionMode):
    """Replaces `device="cuda"` by the CPU and drops `pin_memory`.

    A mode instead of replaced functions, since torch's compiler looks its rules up by function.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs = kwargs | {"device": "cpu"}
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}
        return func(*args, **kwargs)


_tensor_type = torch.Tensor.type


def _cuda_type_name(self: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    """`Tensor.type`, with the CUDA type's name: megatron-core's optimizers accept no other parameters."""
    if dtype is not None:
        return _tensor_type(self, dtype, *args, **kwargs)
    return f"torch.cuda.{_tensor_type(self).rsplit('.', 1)[-1]}"


def _stand_ins() -> dict[tuple[Any, str], Any]:
    """(owner, attribute) -> its CPU equivalent."""
    from megatron.core.tensor_parallel import random

    cpu, cuda = torch.device("cpu"), torch.cuda
    return {
        (cuda, "current_device"): lambda: cpu,
        (cuda, "synchronize"): lambda *args, **kwargs: None,
        (cuda, "manual_seed"): lambda seed: torch.manual_seed(seed),
        (cuda, "get_rng_state"): lambda *args, **kwargs: torch.get_rng_state(),
        (cuda, "Stream"): _Stream,
        (cuda, "Event"): _Stream,
        (cuda, "current_stream"): lambda *args, **kwargs: _Stream(),
        (cuda, "stream"): lambda stream: contextlib.nullcontext(),
        (torch.Tensor, "cuda"): lambda self, *args, **kwargs: self,
        (torch.Tensor, "type"): _cuda_type_name,
        (random, "_get_cuda_rng_state"): lambda *args, **kwargs: torch.get_rng_state(),
        (random, "_set_cuda_rng_state"): lambda state, *args, **kwargs: torch.set_rng_state(state),
    }


replaced: dict[tuple[Any, str], Any] = {}
"""(owner, attribute) -> what `prepare` replaced there; empty with CUDA."""


def is_cpu() -> bool:
    """Whether there is no CUDA device, so that `prepare` installs the CPU equivalents."""
    return not torch.cuda.is_available()


@functools.cache
def prepare() -> None:
    """Install the CPU equivalents, once a process, and silence library warnings that users cannot act on."""
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    for module in (r"torch\.distributed", r"megatron\.core", r"torch\.nn\.parallel"):
        warnings.filterwarnings("ignore", module=module)
    warnings.filterwarnings("ignore", message=".*The .grad attribute of a Tensor that is not a leaf.*")
    if not is_cpu():
        return
    # `layer_spec.describe` logs in one line what follows from the missing GPU.
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*not installed.*")
    warnings.filterwarnings("ignore", message=".*CUDA.*", category=UserWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    _CudaDeviceToCpu().__enter__()  # type: ignore[no-untyped-call]
    _keep_freed_memory()
    for (owner, name), stand_in in _stand_ins().items():
        replaced[owner, name] = getattr(owner, name)
        setattr(owner, name, stand_in)


def _keep_freed_memory() -> None:
    """Stop glibc from returning large temporaries to the kernel, which zeroes their pages again for the next one."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, size in ((trim_threshold, 2**31 - 1), (top_pad, 64 << 20), (mmap_threshold, 32 << 20)):
            mallopt(option, size)
