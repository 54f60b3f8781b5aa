"""The figures of training steps: one line a step in metrics.jsonl with fixed fields, and copies for other programs.

metrics.jsonl   one JSON object a line with at least the keys `FIELDS`; null where a figure does not apply
tensorboard/    events (log.tensorboard)
wandb/, wandb.id        an offline run of Weights & Biases, and the run's name (log.wandb)
mlruns/, mlflow.id      MLflow's file store, without a tracking server, and the run's name (log.mlflow)
"""

import json
import os
import resource
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from minitron_mcore.checkpoint import disk
from minitron_mcore.config.settings import LogConfig
from minitron_mcore.errors import UserError
from minitron_mcore.parallel import process_groups
from minitron_mcore.reading import damage_as_user_error, first_line, read_json_lines, read_yaml

FILE = "metrics.jsonl"
FIELDS = (
    "step",
    "tokens",  # trained on since step 0
    "kd_loss",  # nats a token, as all losses
    "lm_loss",
    "hidden_state_loss",
    "hidden_state_weight",
    "teacher_entropy",
    "heldout_loss",
    "heldout_kl",  # divergence from a live teacher on the held-out text
    "grad_norm",  # before clipping
    "lr",
    "step_seconds",  # from the request for the micro-batches to the updated weights
    "tokens_per_second",  # global_batch x sequence_length, masked or not, over step_seconds
    "student_tflops",  # of all ranks together
    "teacher_tflops",
    "data_seconds",  # the longest that a rank waited for its batches
    "slowest_rank",
    "slowest_rank_seconds",  # from the step's start until it reduced gradients
    "mean_rank_seconds",
    "save_seconds",  # that training waited for saves since the last line
    "saved_bytes",
    "memory_gib",  # high water of the rank with the most: CUDA's allocator, on a CPU the process
)


def rank_figures(data_seconds: float, work_seconds: float) -> dict[str, float]:
    """Figures of the ranks of this world, for a step (collective).

    Args:
        data_seconds: for how long this rank waited for its micro-batches.
        work_seconds: for how long it then computed, until it reduced gradients over the replicas. The ranks of a replica wait for
            each other within a step, so a slow one slows all of them.
    """
    own = torch.tensor([[data_seconds, data_seconds + work_seconds, _memory_gib()]], device=process_groups.device())
    data, seconds, memory = process_groups.all_gather(own, dist.group.WORLD).cpu().T
    slowest = int(seconds.argmax())
    return {
        "data_seconds": float(data.max()),
        "slowest_rank": slowest,
        "slowest_rank_seconds": float(seconds[slowest]),
        "mean_rank_seconds": float(seconds.mean()),
        "memory_gib": float(memory.max()),
    }


def _memory_gib() -> float:
    """The most memory that this rank has held: of its CUDA device, without CUDA of its process."""
    if process_groups.device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB


class Sink(Protocol):
    """Another place for the figures."""

    def write(self, figures: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Writes the figures of a run's steps (one process); a resumed run removes the lines after its checkpoint.

    Args:
        out_dir: the run folder.
        step: the last step that the run's checkpoint contains.
    """

    def __init__(self, out_dir: Path, step: int, log: LogConfig):
        self.path, self._unwritten, self._is_full = out_dir / FILE, b"", False
        # A killed run may leave an incomplete line, of a step after its checkpoint.
        lines = read_json_lines(self.path, "move it away") if self.path.is_file() else []
        with damage_as_user_error(self.path, "move it away"):
            self._replace([line for line in lines if line["step"] <= step])
        self.sinks: dict[str, Sink] = {}
        if log.tensorboard:
            self._open("tensorboard", lambda: TensorBoard(out_dir, step))
        if log.wandb:
            self._open("wandb", lambda: Wandb(out_dir, log.wandb))
        if log.mlflow:
            self._open("mlflow", lambda: Mlflow(out_dir, log.mlflow))

    def _replace(self, lines: list[dict]) -> None:
        disk.replace_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self.file = self.path.open("ab", buffering=0)

    def amend(self, figures: dict[str, float]) -> None:
        """Before any `write`, add figures to the line of their step, which a signal has left without them."""
        lines = read_json_lines(self.path, "move it away")
        if lines and lines[-1]["step"] == figures["step"] and lines[-1] | figures != lines[-1]:
            self.file.close()
            self._replace([*lines[:-1], lines[-1] | figures])
            self._copy(figures)

    def _open(self, name: str, make: Callable[[], Sink]) -> None:
        try:
            self.sinks[name] = make()
        except Exception as error:  # their libraries have many types: no login, no server, another version
            raise UserError(
                f"log.{name} cannot start ({type(error).__name__}: {first_line(error)}): see its documentation, or set it to null."
            ) from error

    def write(self, figures: dict[str, float]) -> None:
        """Write a line; `figures` has its "step".

        A sink that fails is closed with a warning: metrics.jsonl has all figures. What does not fit on the disk is written with a
        later line; a save decides whether the run ends.
        """
        self._unwritten += (json.dumps(dict.fromkeys(FIELDS) | figures) + "\n").encode()
        self._write_rest()
        self._copy(figures)

    def _copy(self, figures: dict[str, float]) -> None:
        numbers = {name: value for name, value in figures.items() if name != "step"}
        for name in list(self.sinks):
            self._attempt(name, lambda sink: sink.write(numbers, int(figures["step"])))

    def _write_rest(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self.file.write(self._unwritten) :]
        except OSError as error:
            if not self._is_full:
                process_groups.log(f"warning: {self.path} cannot be written now ({error.strerror}): training goes on.")
            self._is_full = True

    def close(self) -> None:
        self._write_rest()
        self.file.close()
        for name in list(self.sinks):
            self._attempt(name, lambda sink: sink.close())

    def _attempt(self, name: str, action: Callable[[Sink], None]) -> None:
        try:
            action(self.sinks[name])
        except Exception as error:  # a server that is gone for an hour must not end a run of a week
            process_groups.log(f"warning: log.{name} ended ({type(error).__name__}: {first_line(error)})")
            del self.sinks[name]


class TensorBoard:
    def __init__(self, out_dir: Path, step: int):
        self.board = SummaryWriter(str(out_dir / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self.board.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        self.board.close()


class Wandb:
    """A run of Weights & Biases in the project of `log.wandb`; a resumed run continues it."""

    def __init__(self, out_dir: Path, project: str):
        import wandb

        path, settings = out_dir / "wandb.id", out_dir / "config.yaml"
        if not path.is_file():
            disk.replace_text(path, uuid.uuid4().hex)
        config = read_yaml(settings, "make the run again") if settings.is_file() else None
        run_id = path.read_text().strip()
        self.run = wandb.init(project=project, dir=out_dir, name=str(out_dir), id=run_id, resume="allow", config=config)

    def write(self, figures: dict[str, float], step: int) -> None:
        self.run.log(figures, step=step)

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    """A run of MLflow in the experiment of `log.mlflow`; a resumed run continues it."""

    def __init__(self, out_dir: Path, experiment: str):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self.metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (out_dir / "mlruns").resolve().as_uri()
        self.client, path = MlflowClient(tracking_uri=uri), out_dir / "mlflow.id"
        if path.is_file():
            self.run_id = path.read_text().strip()
            return
        known = self.client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else self.client.create_experiment(experiment)
        self.run_id = self.client.create_run(number, run_name=str(out_dir)).info.run_id
        disk.replace_text(path, self.run_id)

    def write(self, figures: dict[str, float], step: int) -> None:
        now = int(1000 * time.time())
        self.client.log_batch(self.run_id, [self.metric(name, value, now, step) for name, value in figures.items()])

    def close(self) -> None:
        self.client.set_terminated(self.run_id)
