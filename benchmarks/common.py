"""What every benchmark shares: `--json FILE`, `--quick`, the lines it writes, and the peak of a process's memory."""

import argparse
import ctypes
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


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
