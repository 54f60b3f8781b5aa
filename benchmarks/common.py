"""What every benchmark shares: `--json FILE`, `--quick`, the lines it writes, times and the peak of memory."""

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.parallel import process_groups
from minitron_mcore.testing import on_ranks


@dataclass(frozen=True)
class Figure:
    benchmark: str
    case: str
    implementation: str
    metric: str
    value: float
    unit: str


def parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write one JSON line a figure to FILE")
    parser.add_argument("--quick", action="store_true", help="few repetitions: about a minute")
    return parser


def arguments(description: str) -> argparse.Namespace:
    return parser(description).parse_args()


def write(figures: list[Figure], path: Path | None) -> None:
    if path:
        path.write_text("".join(json.dumps(asdict(figure)) + "\n" for figure in figures))


def ranks(fn: Callable, world_size: int, parallel: ParallelConfig, *args: Any, timeout: float) -> list:
    """`fn(*args)` on every rank of a layout: in this process on a GPU, which takes one rank, else in processes (`on_ranks`)."""
    if not torch.cuda.is_available():
        return on_ranks(fn, world_size, parallel, *args, timeout=timeout)
    with process_groups.distributed_context(parallel):
        return [fn(*args)]


def seconds(call: Callable[..., object], *args) -> float:
    """How long a call takes, by events on a GPU."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call(*args)
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call(*args)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def device_peak_bytes(call: Callable[[], object]) -> int:
    """GPU memory that `call` needs at its worst beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_bytes(call: Callable[[], object]) -> int:
    """Resident memory that `call` needs at its worst beyond what the process held before (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps of freed memory would hide the call's first bytes
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from now
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
