"""The saves of a training run: one at a time, in the background on request, with removal of older steps and figures for the log."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint import disk, saving, steps
from minitron_mcore.config.settings import TrainConfig
from minitron_mcore.errors import UserError
from minitron_mcore.parallel import hang_watchdog, process_groups
from minitron_mcore.parallel.hang_watchdog import Phase

from megatron.core.dist_checkpointing.dict_utils import nested_values  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # isort: skip


class StepSaver:
    """Writes steps to the run's folder. Call all methods on all ranks."""

    def __init__(self, config: TrainConfig):
        self.config, on_cuda = config, process_groups.device().type == "cuda"
        self.background = on_cuda if config.async_save is None else config.async_save
        self._save: saving.StepSave | None = None
        self._waited_for_save = self._waited = 0.0
        self._bytes = 0

    def begin(self, out_dir: Path, step: int, state: dict[str, Any], gradient_bytes: int) -> None:
        """Finish the previous save, then write a sharded state dict, or copy it and write it until `finish` (collective).

        Args:
            state: weights and optimizer; its tensors may change when this returns.
            gradient_bytes: of the gradients that this rank holds.

        Raises:
            UserError: see `finish`.
        """
        self.finish()
        copied = _copy_bytes(state, gradient_bytes) if self.background else 0
        with self._waiting(step):
            # Read back, since an older step is removed then.
            self._save = saving.StepSave(out_dir, step, state, f"save step {step}", copy_bytes=copied, read_back=True)
        if not self.background:
            self.finish()

    def finish(self, wait: bool = True) -> None:
        """Publish the step that is being written, if all ranks have written it; with `wait` wait for them (collective).

        Older steps are then removed (`distill.keep_last`, `distill.keep_every`).

        Raises:
            UserError: a rank could not write it; the previous step stays the newest.
        """
        if not self._save or not (wait or self._save.is_written()):
            return
        save, self._save = self._save, None
        with self._waiting(save.step.number):
            save.finish()
            if process_groups.rank() == 0:
                self._remove_old(save.step)
            process_groups.barrier()
        self._bytes += save.size
        process_groups.log(
            f"saved step {save.step.number}: {save.size / 1e9:.3g} GB in {time.monotonic() - save.start:.1f} s; training "
            f"waited {self._waited_for_save:.1f} s"
        )
        self._waited_for_save = 0.0

    def figures(self) -> dict[str, float]:
        """For how long training has waited for saves since the last call, and the bytes that were published (on rank 0)."""
        figures = {"save_seconds": self._waited, "saved_bytes": self._bytes}
        self._waited, self._bytes = 0.0, 0
        return figures

    @contextlib.contextmanager
    def _waiting(self, step: int) -> Iterator[None]:
        start = time.monotonic()
        with hang_watchdog.phase(Phase.save, lambda: f"the save of step {step}"):
            yield
        seconds = time.monotonic() - start
        self._waited_for_save += seconds
        self._waited += seconds

    def _remove_old(self, step: steps.Step) -> None:
        """A failure leaves too many steps, which is no reason to end the run."""
        try:
            steps.remove_old(step, self.config.keep_last, self.config.keep_every)
        except (UserError, OSError) as error:
            process_groups.log(f"warning: older steps of {step.path.parent} are not removed: {error}")


def _copy_bytes(state: dict[str, Any], gradient_bytes: int) -> int:
    """Host memory on this rank for the copies of a background save.

    On a CPU a quarter of weights, gradients and optimizer, or `disk.MIN_COPY_BYTES`; on CUDA half of the rank's part of what the
    host has free.
    """
    if process_groups.device().type == "cuda":
        return process_groups.free_host_bytes() // 2
    held = sum(value.data.nbytes for value in nested_values(state) if isinstance(value, ShardedTensor))
    return max((held + gradient_bytes) // 4, disk.MIN_COPY_BYTES)
