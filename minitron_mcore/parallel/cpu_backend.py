"""Lets megatron-core run where there is no CUDA: gloo for NCCL, host memory for device memory.

megatron-core names CUDA in three ways: it asks `torch.cuda` for a device, a stream or a random state; it allocates with
`device="cuda"` or in pinned memory; and its optimizers read `Tensor.type()`. `prepare()` gives each a stand-in that means the
CPU. Where CUDA is there it changes nothing. Call it before the first megatron import that runs code (every entry of this
package does).
"""

import contextlib
import ctypes
import functools
import logging
import warnings

import torch
from torch.overrides import TorchFunctionMode


class _Stream:
    """A stream on a device that runs everything in order: waiting is already done."""

    def __init__(self, *args, **kwargs):
        pass

    def _done(self, *args, **kwargs):
        return True

    wait_stream = wait_event = synchronize = record = wait = query = _done

    def record_event(self, event=None):
        return event or self


class _OnCpu(TorchFunctionMode):
    """Turns `device="cuda"` into the CPU, and pins no memory. A mode, since torch keeps some of its tables by function identity."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs = kwargs | {"device": "cpu"}
        if kwargs.get("pin_memory"):
            kwargs = kwargs | {"pin_memory": False}
        return func(*args, **kwargs)


def _cuda_type_name(self, dtype=None, *args, **kwargs):
    if dtype is not None:
        return _tensor_type(self, dtype, *args, **kwargs)
    # megatron-core's optimizers accept a parameter only under its CUDA type name.
    return f"torch.cuda.{_tensor_type(self).rsplit('.', 1)[-1]}"


_tensor_type = torch.Tensor.type


def is_cpu() -> bool:
    """True where there is no CUDA device, so that this module's stand-ins are in force."""
    return not torch.cuda.is_available()


def _quiet() -> None:
    """Libraries' notes to their own developers: deprecations inside megatron-core and torch that a user can't act on."""
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    for module in (r"torch\.distributed", r"megatron\.core", r"torch\.nn\.parallel"):
        warnings.filterwarnings("ignore", module=module)
    warnings.filterwarnings("ignore", message=".*The .grad attribute of a Tensor that is not a leaf.*")


def _keep_freed_memory() -> None:
    """Stop glibc from giving every large temporary back to the kernel, which zeroes it again page by page for the next one."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, size in ((trim_threshold, 2**31 - 1), (top_pad, 64 << 20), (mmap_threshold, 32 << 20)):
            mallopt(option, size)


@functools.cache
def prepare() -> None:
    """Put the stand-ins in place, once a process. Where CUDA is there, only the libraries' chatter goes."""
    _quiet()
    if not is_cpu():
        return
    # What follows from the missing GPU is said in one line of our own log (models.spec.describe), not in a dozen warnings.
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*not installed.*")
    warnings.filterwarnings("ignore", message=".*CUDA.*", category=UserWarning)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    _OnCpu().__enter__()
    _keep_freed_memory()
    cpu = torch.device("cpu")
    cuda = torch.cuda
    cuda.current_device = lambda: cpu
    # One function a name: torch's compiler keys its rules by function and refuses one under two names.
    for name in ("synchronize", "set_device", "empty_cache"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.initial_seed = torch.initial_seed
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.type = _cuda_type_name

    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
