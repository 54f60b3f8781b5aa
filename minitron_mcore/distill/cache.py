"""A teacher's answers on disk: what it says of every token of a run's samples, written once and read by any number of students.

out_dir/
  index.json                   what all this is of: the teacher, the order of samples; and, written last, every file's hash
  samples_0000000.safetensors  file n: samples n * F .. (n + 1) * F of the order, each tensor [F, S, ...]
  head.safetensors             the teacher's output head [V, H] without padding, where hidden states are kept
  hf/                          its config and tokenizer files

    kind          of each token                                                              bytes
    topk          ids [k] of the k largest logits, as their low 16 bits and, of a            4 k + 2, or 5 k + 2
                  vocabulary above 65,536, the next 8; log-probabilities [k + 1], the
                  last the tail's, in steps of 2^-11 down to -32: off by at most 2.5e-4
    hidden        the final norm's output [H] in the run's dtype                             2 H in bf16
    hidden_int8   the same in 255 steps, and their size                                      H + 4

What is read of topk is scaled to a sum of 1. Nothing here depends on the layout that wrote it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from minitron_mcore import checkpoint, data, disk, runtime, schedule
from minitron_mcore.checkpoint import Checkpoint
from minitron_mcore.config import DistillConfig, ParallelConfig
from minitron_mcore.distill import checks
from minitron_mcore.errors import UserError
from minitron_mcore.models import build, table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.folder import CODES
from minitron_mcore.reading import open_tensors, read_json, readable
from minitron_mcore.runs import CacheKind
from minitron_mcore.schedule import Batch

INDEX, HEAD = "index.json", "head.safetensors"
STEP = 2.0**-11  # nats


def pack_top(ids: Tensor, log_probs: Tensor, vocab: int) -> dict[str, Tensor]:
    """What a file keeps of ids [..., k] and log-probabilities [..., k + 1]."""
    packed = {"ids": (ids & 0xFFFF).to(torch.uint16)}
    if vocab > 1 << 16:
        packed["ids_high"] = (ids >> 16).to(torch.uint8)
    return packed | {"log_probs": (log_probs / -STEP).round().clamp(0, 0xFFFF).to(torch.int32).to(torch.uint16)}


def unpack_ids(packed: dict[str, Tensor]) -> Tensor:
    ids = packed["ids"].long()
    if "ids_high" in packed:
        ids += packed["ids_high"].long() << 16
    return ids


def unpack_top(packed: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(ids int64, log-probabilities fp32) of `pack_top`, the latter of a sum of 1."""
    return unpack_ids(packed), (packed["log_probs"].int().float() * -STEP).log_softmax(-1)


def pack_hidden(hidden: Tensor, kind: CacheKind) -> dict[str, Tensor]:
    """What a file keeps of hidden states [..., H]."""
    if kind == CacheKind.hidden:
        return {"hidden": hidden}
    scale = hidden.float().abs().amax(-1) / 127
    steps = (hidden.float() / scale.clamp(min=1e-30)[..., None]).round()
    return {"hidden": steps.to(torch.int8), "scale": scale}


def unpack_hidden(packed: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    hidden = packed["hidden"].to(dtype)
    return (hidden * packed["scale"][..., None]).to(dtype) if "scale" in packed else hidden


def file_name(number: int) -> str:
    return f"samples_{number:07d}.safetensors"


@dataclass(frozen=True)
class Cache(Checkpoint):
    """An opened cache. It stands for its teacher, whose path, weights' name and lineage it has; the files are in `folder`."""

    folder: Path
    index: dict

    @property
    def step_dir(self) -> Path:
        return self.path / self.index["teacher"]["step"]

    @property
    def hf(self) -> Path:
        return self.folder / "hf"

    @property
    def kind(self) -> CacheKind:
        return CacheKind(self.index["kind"])

    def problems(self, student: Architecture, config: DistillConfig) -> Iterable[str]:
        """Why a run can't be taught from it."""
        index = self.index
        if config.sequence_length != index["sequence_length"]:
            yield (
                f"sequence_length is {config.sequence_length}, but the teacher cache {self.folder} is of samples of "
                f"{index['sequence_length']} tokens: give that, or write another cache."
            )
        if config.states.weight:
            yield (
                f"distill.states.weight is {config.states.weight}, but the teacher cache {self.folder} has no intermediate "
                "states: give weight 0, or the teacher's checkpoint."
            )
        if config.teacher_ranks or config.teacher_parallel:
            yield (
                f"distill.teacher_ranks or .teacher_parallel is given, but the teacher cache {self.folder} needs no ranks and has "
                "no layout: give 0 and null."
            )
        if self.kind == CacheKind.topk:
            yield from checks.given(index["top_k"], config.divergence, config.top_k, config.temperature)
            if student.vocab < self.arch.vocab:
                yield (
                    f"the student's vocabulary has {student.vocab} tokens, but the teacher cache {self.folder} has "
                    f"log-probabilities of {self.arch.vocab}: write one of kind=hidden."
                )

    def check(self, prefixes: Sequence[str], weights: Sequence[float] | None, seed: int, num_samples: int) -> None:
        """Refuse text in another order than the cache is of, and files that are not what was written (collective).

        Args:
            num_samples: of the run, whose files are read from first to last.

        Raises:
            UserError: either.
        """
        index = self.index
        samples = {"sequence_length": index["sequence_length"], "num_samples": index["samples"]}
        found = data.order_hash(prefixes, weights, seed=seed, **samples)
        if found != index["order"]:
            raise UserError(
                f"the teacher cache {self.folder} is of the samples {index['order']} of {', '.join(index['data'])} with data.seed "
                f"{index['seed']}, but this run's data.train and data.seed {seed} give {found}: give the same, or write "
                "another cache."
            )
        files = [file_name(n) for n in range(-(-min(num_samples, index["samples"]) // index["file_samples"]))]
        files += [HEAD] if self.kind != CacheKind.topk else []
        own = files[runtime.rank() :: dist.get_world_size()]
        progress = runtime.Progress("verify teacher cache", len(own), "files")
        with runtime.agreed():
            for done, name in enumerate(own, 1):
                self._verify(name)
                progress.update(done)
        if num_samples > index["samples"]:
            runtime.log(
                f"{num_samples / index['samples']:.3g} passes over the teacher cache's {index['samples']} samples"
            )

    def _verify(self, name: str) -> None:
        path, remedy = self.folder / name, "run the same launch/teacher_cache.py command again, which writes it anew."
        if not path.is_file():
            raise UserError(f"{path} of the teacher cache is missing: {remedy}")
        if disk.sha256(path) != self.index["files"].get(name):
            raise UserError(f"{path} of the teacher cache is not what was written: {remedy}")
        with open_tensors(path, "pt", f"remove it and {remedy[:-1]}") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            found = {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
        if found != self._tensors(name):
            raise UserError(f"{path} has {found} where {self._tensors(name)} is expected: remove it and {remedy}")

    def _tensors(self, name: str) -> dict[str, tuple[str, list[int]]]:
        """safetensors' type and the shape of each tensor of a file."""
        index, arch, dtype = self.index, self.arch, CODES[build.DTYPES[self.index["dtype"]]]
        if name == HEAD:
            return {"head": (dtype, [arch.vocab, arch.hidden])}
        first = int(name.removeprefix("samples_").removesuffix(".safetensors")) * index["file_samples"]
        each = [min(index["file_samples"], index["samples"] - first), index["sequence_length"]]
        if self.kind == CacheKind.topk:
            high = {"ids_high": ("U8", [*each, index["top_k"]])} if arch.vocab > 1 << 16 else {}
            return {"ids": ("U16", [*each, index["top_k"]]), "log_probs": ("U16", [*each, index["top_k"] + 1])} | high
        if self.kind == CacheKind.hidden:
            return {"hidden": (dtype, [*each, arch.hidden])}
        return {"hidden": ("I8", [*each, arch.hidden]), "scale": ("F32", each)}


def open_teacher(path: str | Path) -> Checkpoint:
    """The checkpoint of a teacher, or the cache of one.

    Raises:
        UserError: see `checkpoint.open_checkpoint`; a cache that is not whole, or whose index can't be read.
    """
    path = Path(path)
    if not (path / INDEX).is_file():
        return checkpoint.open_checkpoint(path, "teacher")
    with readable(path / INDEX, "write the teacher cache again"):
        index = read_json(path / INDEX, "write the teacher cache again")
        teacher, wanted = index["teacher"], -(-index["samples"] // index["file_samples"])
        arch = Architecture(**index["architecture"])
        found = Cache(Path(teacher["path"]), arch, teacher["fingerprint"], index["lineage"], path, index)
        written = sum(name != HEAD for name in index["files"])
        counts = [index[name] for name in ("samples", "file_samples", "sequence_length")]
        counts += [index["top_k"]] if found.kind == CacheKind.topk else []
        if not all(type(count) is int and count > 0 for count in counts):
            raise ValueError(f"its counts are {counts}")
        if index["dtype"] not in build.DTYPES or (found.kind == CacheKind.topk and not index["top_k"] < arch.vocab):
            raise ValueError(f"its dtype is {index['dtype']}, its top_k {index['top_k']}")
        if not re.fullmatch(r"step_\d+", teacher["step"]) or not isinstance(teacher["fingerprint"], str):
            raise ValueError("its teacher is no checkpoint")
        if not isinstance(index["seed"], int) or not all(isinstance(file, str) for file in index["data"]):
            raise ValueError("its text has no names or seed")
    if written < wanted:
        raise UserError(
            f"the teacher cache {path} is not whole: run the same launch/teacher_cache.py command again, which goes on."
        )
    return found


class CachedTeacher:
    """What `teacher.Teacher` is to a trainer, from a cache: each last-stage rank reads of each sample its own share of the
    positions; other ranks read nothing."""

    def __init__(self, cache: Cache, student: Architecture, parallel: ParallelConfig):
        # Taken here, since the current CUDA device is one of each thread, and `_read` runs in another.
        self.cache, self.routes, self.device = cache, [], runtime.device()
        shared = replace(parallel, sequence=parallel.sequence and cache.kind != CacheKind.topk)
        positions = schedule.positions(cache.index["sequence_length"], shared, runtime.place())
        breaks = (positions.diff() != 1).nonzero().flatten() + 1
        self.runs = [(part[0].item(), part[-1].item() + 1) for part in positions.tensor_split(breaks.cpu())]
        last = runtime.is_last_stage() and cache.kind != CacheKind.topk
        self.head: Tensor | None = self._head(student) if last else None

    def _head(self, student: Architecture) -> Tensor:
        """The rows that go with this rank's of the student's head (see `teacher.cut_head`)."""
        tp = runtime.tp_group()
        with safe_open(self.cache.folder / HEAD, "pt") as file:
            rows = table.padded_vocab(student, tp.size()) // tp.size()
            first, end = (min(n * rows, self.cache.arch.vocab) for n in (tp.rank(), tp.rank() + 1))
            found = file.get_slice("head")[first:end]
        head = found.new_zeros(rows, self.cache.arch.hidden)
        head[: len(found)] = found
        return head.to(self.device)

    def feed(self, batches: Sequence[Batch]) -> Iterable[Batch]:
        """A step's micro-batches, on last-stage ranks with "teacher_hidden" [S_r, B, H] or with "teacher_ids" [S / CP, B, k] and
        "teacher_log_probs" [S / CP, B, k + 1]; the next one is read while one is used."""
        if not runtime.is_last_stage():
            return batches
        jobs = (partial(self._read, batch["samples"].tolist()) for batch in batches)
        return (batch | found for batch, found in zip(batches, runtime.ahead(jobs, threads=1), strict=True))

    def _read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        samples = [self._sample(row) for row in rows]
        packed = {name: torch.stack([s[name] for s in samples], 1) for name in samples[0]}
        if self.cache.kind == CacheKind.topk and unpack_ids(packed).max() >= self.cache.arch.vocab:
            raise UserError(
                f"{self.cache.folder} has ids beyond the teacher's vocabulary of {self.cache.arch.vocab} for samples {list(rows)}: "
                "write the teacher cache again."
            )
        if self.device.type == "cuda":
            packed = {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in packed.items()}
        if self.cache.kind == CacheKind.topk:
            return dict(zip(("teacher_ids", "teacher_log_probs"), unpack_top(packed), strict=True))
        return {"teacher_hidden": unpack_hidden(packed, self.head.dtype)}

    def _sample(self, row: int) -> dict[str, Tensor]:
        """Own positions of a sample, [S_r, ...] each."""
        number, place = divmod(row, self.cache.index["file_samples"])
        with safe_open(self.cache.folder / file_name(number), "pt") as file:
            names = file.keys()
            return {name: torch.cat([file.get_slice(name)[place, a:b] for a, b in self.runs]) for name in names}
