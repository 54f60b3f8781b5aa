"""A cache of a teacher's outputs for every token of a run's samples, written once and read by any number of students.

out_dir/
  index.json                   the teacher, the order of samples, and, written last, the hash of every file
  samples_0000000.safetensors  file n: samples n * F .. (n + 1) * F of the order, each tensor [F, S, ...]
  head.safetensors             the teacher's output head [V, H] without padding, for hidden states only
  hf/                          its config and tokenizer files

    kind          of each token                                                              bytes
    topk          ids [k] of the k largest logits, as their low 16 bits and, of a            4 k + 2, or 5 k + 2
                  vocabulary above 65,536, the next 8; log-probabilities [k + 1], the
                  last the tail's, in steps of 2^-11 down to -32: off by at most 2.5e-4;
                  with `tail_draws` d, k - d largest logits and d other ids, and no tail
    hidden        the final norm's output [H] in the run's dtype                             2 H in bf16
    hidden_int8   the same in 255 steps, and their size                                      H + 4

Probabilities of topk are normalized to a sum of 1 when read. The files do not depend on the layout that wrote them.
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

from minitron_mcore.checkpoint import disk, run_folder
from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.config.settings import DataConfig, DistillConfig, ParallelConfig
from minitron_mcore.config.stages import CacheKind
from minitron_mcore.data import datasets
from minitron_mcore.distill import checks
from minitron_mcore.errors import UserError
from minitron_mcore.formats.hf_folder import CODES
from minitron_mcore.models import architecture, build, parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups, schedule
from minitron_mcore.parallel.prefetch import run_ahead
from minitron_mcore.parallel.schedule import Batch
from minitron_mcore.reading import check_format_version, damage_as_user_error, open_tensors, read_json

INDEX, HEAD = checks.CACHE_INDEX, "head.safetensors"
STEP = 2.0**-11  # nats


def pack_top(ids: Tensor, log_probs: Tensor, vocab: int) -> dict[str, Tensor]:
    """Tensors of a file for ids [..., k] and log-probabilities [..., k + 1]."""
    packed = {"ids": (ids & 0xFFFF).to(torch.uint16)}
    if vocab > 1 << 16:
        packed["ids_high"] = (ids >> 16).to(torch.uint8)
    return packed | {"log_probs": (log_probs / -STEP).round().clamp(0, 0xFFFF).to(torch.int32).to(torch.uint16)}


def _unpack_ids(packed: dict[str, Tensor]) -> Tensor:
    ids = packed["ids"].long()
    if "ids_high" in packed:
        ids += packed["ids_high"].long() << 16
    return ids


def unpack_top(packed: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(ids int64, normalized log-probabilities fp32) of `pack_top`."""
    return _unpack_ids(packed), (packed["log_probs"].int().float() * -STEP).log_softmax(-1)


def pack_hidden(hidden: Tensor, kind: CacheKind) -> dict[str, Tensor]:
    """Tensors of a file for hidden states [..., H]."""
    if kind == CacheKind.hidden:
        return {"hidden": hidden}
    scale = hidden.float().abs().amax(-1) / 127
    steps = (hidden.float() / scale.clamp(min=1e-30)[..., None]).round()
    return {"hidden": steps.to(torch.int8), "scale": scale}


def unpack_hidden(packed: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Hidden states [..., H] of `pack_hidden`, in `dtype`."""
    hidden = packed["hidden"].to(dtype)
    return (hidden * packed["scale"][..., None]).to(dtype) if "scale" in packed else hidden


def file_name(number: int) -> str:
    return f"samples_{number:07d}.safetensors"


@dataclass(frozen=True)
class Cache(Checkpoint):
    """An opened cache in `folder`. As a Checkpoint it has the path, architecture, fingerprint and lineage of its teacher."""

    folder: Path
    index: dict

    @property
    def hf(self) -> Path:
        return self.folder / "hf"

    @property
    def kind(self) -> CacheKind:
        return CacheKind(self.index["kind"])

    def problems(self, student: Architecture, config: DistillConfig) -> Iterable[str]:
        """Reasons why a run cannot use the cache."""
        index = self.index
        if config.sequence_length != index["sequence_length"]:
            yield (
                f"sequence_length is {config.sequence_length}, but the teacher cache {self.folder} is of samples of "
                f"{index['sequence_length']} tokens: give that, or write another cache."
            )
        if config.hidden_state_loss.weight:
            yield (
                f"distill.hidden_state_loss.weight is {config.hidden_state_loss.weight}, but the teacher cache "
                f"{self.folder} has no intermediate "
                "states: give weight 0, or the teacher's checkpoint."
            )
        if config.on_policy.share:
            yield (
                f"distill.on_policy.share is {config.on_policy.share:g}, but the teacher cache {self.folder} knows no answers of "
                "the student: give 0, or the teacher's checkpoint."
            )
        if config.teacher_ranks or config.teacher_parallel:
            yield (
                f"distill.teacher_ranks or .teacher_parallel is set, but the teacher cache {self.folder} has no ranks or "
                "layout: give 0 and null."
            )
        if self.kind == CacheKind.topk:
            yield from checks.top_k_teacher(index["top_k"], config, checks.DISTILL)
            if config.top_k and "tail_draws" in index:
                yield (
                    f"distill.top_k is {config.top_k}, but the teacher cache {self.folder} has {index['tail_draws']} tail draws: "
                    "give null."
                )
            if student.vocab < self.arch.vocab:
                yield (
                    f"the student's vocabulary has {student.vocab} tokens, but the teacher cache {self.folder} has "
                    f"log-probabilities of {self.arch.vocab}: write one of kind=hidden."
                )

    def check(
        self, prefixes: Sequence[str], weights: Sequence[float] | None, data: DataConfig, num_samples: int
    ) -> None:
        """Check the order of the run's samples, and the hashes of the files of its first `num_samples` (collective).

        Raises:
            UserError: another order; a missing or changed file.
        """
        index = self.index
        order = datasets.SampleOrder.of(data, prefixes, weights, index["sequence_length"], index["samples"]).digest()
        if order != index["order"]:
            raise UserError(
                f"the teacher cache {self.folder} is of the samples {index['order']} of {', '.join(index['data'])} with data.seed "
                f"{index['seed']}, but this run's data.train, data.seed {data.seed} and data.document_mask "
                f"{str(data.document_mask).lower()} give {order}: give the same, or write another cache."
            )
        files = [file_name(n) for n in range(-(-min(num_samples, index["samples"]) // index["file_samples"]))]
        files += [HEAD] if self.kind != CacheKind.topk else []
        own = files[process_groups.rank() :: dist.get_world_size()]
        progress = process_groups.Progress("verify teacher cache", len(own), "files")
        with process_groups.raise_on_all_ranks():
            for done, name in enumerate(own, 1):
                self._verify(name)
                progress.update(done)
        if num_samples > index["samples"]:
            process_groups.log(
                f"{num_samples / index['samples']:.3g} passes over the teacher cache's {index['samples']} samples"
            )

    def _verify(self, name: str) -> None:
        path, remedy = self.folder / name, "run the same launch/teacher_cache.py command again, which rewrites it."
        if not path.is_file():
            raise UserError(f"{path} of the teacher cache is missing: {remedy}")
        if disk.sha256(path) != self.index["files"].get(name):
            raise UserError(f"{path} of the teacher cache was changed after it was written: {remedy}")
        with open_tensors(path, "pt", f"remove it and {remedy[:-1]}") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            tensors = {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}
        if tensors != self._expected_tensors(name):
            raise UserError(
                f"{path} has {tensors} where {self._expected_tensors(name)} is expected: remove it and {remedy}"
            )

    def _expected_tensors(self, name: str) -> dict[str, tuple[str, list[int]]]:
        """(safetensors' dtype, shape) of each tensor of a file."""
        index, arch, dtype = self.index, self.arch, CODES[build.DTYPES[self.index["dtype"]]]
        if name == HEAD:
            return {"head": (dtype, [arch.vocab, arch.hidden])}
        first = int(name.removeprefix("samples_").removesuffix(".safetensors")) * index["file_samples"]
        tokens = [min(index["file_samples"], index["samples"] - first), index["sequence_length"]]
        if self.kind == CacheKind.topk:
            top_k = index["top_k"]
            high = {"ids_high": ("U8", [*tokens, top_k])} if arch.vocab > 1 << 16 else {}
            return {"ids": ("U16", [*tokens, top_k]), "log_probs": ("U16", [*tokens, top_k + 1])} | high
        if self.kind == CacheKind.hidden:
            return {"hidden": (dtype, [*tokens, arch.hidden])}
        return {"hidden": ("I8", [*tokens, arch.hidden]), "scale": ("F32", tokens)}


def open_teacher(path: str | Path) -> Checkpoint:
    """Open a teacher's checkpoint or cache.

    Raises:
        UserError: see `run_folder.open_checkpoint`; an incomplete cache; a damaged index.
    """
    path = Path(path)
    if not (path / INDEX).is_file():
        return run_folder.open_checkpoint(path, "teacher")
    with damage_as_user_error(path / INDEX, "write the teacher cache again"):
        index = read_json(path / INDEX, "write the teacher cache again")
        check_format_version(index, path / INDEX, "write the teacher cache again")
        teacher, num_files = index["teacher"], -(-index["samples"] // index["file_samples"])
        arch = architecture.from_json(index["architecture"], path / INDEX)
        cache = Cache(
            Path(teacher["path"]), arch, teacher["fingerprint"], index["lineage"], teacher["step"], path, index
        )
        written = sum(name != HEAD for name in index["files"])
        _check_index(index, cache.kind, arch)
    if written < num_files:
        raise UserError(
            f"the teacher cache {path} is incomplete: run the same launch/teacher_cache.py command again to resume it."
        )
    return cache


def _check_index(index: dict, kind: CacheKind, arch: Architecture) -> None:
    """Raise ValueError, KeyError or TypeError for an index with values that no cache has."""
    counts = [index[name] for name in ("samples", "file_samples", "sequence_length")]
    counts += [index["top_k"]] if kind == CacheKind.topk else []
    if not all(type(count) is int and count > 0 for count in counts):
        raise ValueError(f"counts {counts}")
    if index["dtype"] not in build.DTYPES or (kind == CacheKind.topk and not index["top_k"] < arch.vocab):
        raise ValueError(f"dtype {index['dtype']}, top_k {index['top_k']}")
    if not re.fullmatch(r"step_\d+", index["teacher"]["step"]) or not isinstance(index["teacher"]["fingerprint"], str):
        raise ValueError("the teacher is no checkpoint")
    if not isinstance(index["order"], str):
        raise ValueError("order is no text")
    if not isinstance(index["seed"], int) or not all(isinstance(file, str) for file in index["data"]):
        raise ValueError("data or seed is missing")


class CachedTeacher:
    """What `teacher.Teacher` is to a trainer. Each last-stage rank reads its own positions of each sample; other ranks read
    nothing."""

    def __init__(self, cache: Cache, student: Architecture, parallel: ParallelConfig):
        # Read here: the current CUDA device belongs to a thread, and `_read` runs in another.
        self.cache, self.routes, self.device = cache, [], process_groups.device()
        sharded = replace(parallel, sequence=parallel.sequence and cache.kind != CacheKind.topk)
        positions = schedule.positions(cache.index["sequence_length"], sharded, process_groups.place())
        breaks = (positions.diff() != 1).nonzero().flatten() + 1
        self.runs = [(part[0].item(), part[-1].item() + 1) for part in positions.tensor_split(breaks.cpu())]
        last = process_groups.is_last_stage() and cache.kind != CacheKind.topk
        self.head: Tensor | None = self._head(student) if last else None

    def _head(self, student: Architecture) -> Tensor:
        """This rank's rows [V_r, H] of the teacher's head, sharded as the student's (see `teacher.cut_head`)."""
        tp = process_groups.tp_group()
        with safe_open(self.cache.folder / HEAD, "pt") as file:
            rows = parameter_table.padded_vocab(student, tp.size()) // tp.size()
            first, end = (min(n * rows, self.cache.arch.vocab) for n in (tp.rank(), tp.rank() + 1))
            own = file.get_slice("head")[first:end]
        head = own.new_zeros(rows, self.cache.arch.hidden)
        head[: len(own)] = own
        return head.to(self.device)

    def add_teacher_outputs(self, batches: Sequence[Batch]) -> Iterable[Batch]:
        """A step's micro-batches, with the cache's entries on last-stage ranks; the next one is read while one is used.

        Entries: "teacher_hidden" [S_r, B, H], or "teacher_ids" [S / CP, B, k] and "teacher_log_probs" [S / CP, B, k + 1].
        """
        if not process_groups.is_last_stage():
            return batches
        jobs = (partial(self._read, batch["samples"].tolist()) for batch in batches)
        read = run_ahead(jobs, threads=1)
        return (batch | outputs for batch, outputs in zip(batches, read, strict=True))

    def _read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        samples = [self._sample(row) for row in rows]
        packed = {name: torch.stack([s[name] for s in samples], 1) for name in samples[0]}
        if self.cache.kind == CacheKind.topk and _unpack_ids(packed).max() >= self.cache.arch.vocab:
            raise UserError(
                f"the teacher cache {self.cache.folder} has ids above the teacher's vocabulary of {self.cache.arch.vocab} for "
                f"samples {list(rows)}: write the teacher cache again."
            )
        if self.device.type == "cuda":
            packed = {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in packed.items()}
        if self.cache.kind == CacheKind.topk:
            return dict(zip(("teacher_ids", "teacher_log_probs"), unpack_top(packed), strict=True))
        return {"teacher_hidden": unpack_hidden(packed, self.head.dtype)}

    def _sample(self, row: int) -> dict[str, Tensor]:
        """This rank's positions of a sample, [S_r, ...] each."""
        number, place = divmod(row, self.cache.index["file_samples"])
        with safe_open(self.cache.folder / file_name(number), "pt") as file:
            names = file.keys()
            return {name: torch.cat([file.get_slice(name)[place, a:b] for a, b in self.runs]) for name in names}
