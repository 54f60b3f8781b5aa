"""Profiles some steps of a run with torch's profiler and, on CUDA, records the caching allocator.

out_dir/profile/
  rank_0.json            a trace for ui.perfetto.dev or chrome://tracing, of all recorded steps
  memory_rank_0.pickle   allocations and their stacks, for pytorch.org/memory_viz (profile.memory, CUDA only)
"""

from pathlib import Path

import torch

from minitron_mcore.config.performance import ProfileConfig
from minitron_mcore.parallel import process_groups


class StepProfiler:
    """Call `before` and `after` around each step; only the steps and ranks of `config` are recorded."""

    def __init__(self, config: ProfileConfig, out_dir: Path):
        self.config, self.folder = config, out_dir / "profile"
        self.first = config.start if process_groups.rank() in config.ranks else None
        """The first step that this rank records; None: it records none."""
        self.last = config.stop or config.start or 0
        self.memory = config.memory and process_groups.device().type == "cuda"
        self.profiler: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Start at the first recorded step, or later if the run resumes after it; `step` counts from 1."""
        if self.first is None or self.profiler or not self.first <= step <= self.last:
            return
        if self.memory:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self.profiler = torch.profiler.profile(record_shapes=True, with_stack=False)
        self.profiler.start()

    def after(self, step: int, last: bool) -> None:
        """Write the files after the last recorded step, or after the `last` of the run."""
        if self.profiler is None or (step < self.last and not last):
            return
        if process_groups.device().type == "cuda":
            torch.cuda.synchronize()
        self.profiler.stop()
        self.folder.mkdir(exist_ok=True)
        self.profiler.export_chrome_trace(str(self.folder / f"rank_{process_groups.rank()}.json"))
        if self.memory:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory_rank_{process_groups.rank()}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self.profiler = self.first = None
