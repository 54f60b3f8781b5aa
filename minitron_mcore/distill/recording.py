"""Writes a teacher's cache (see `cache`): forward passes over a run's samples in any layout."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from minitron_mcore import checkpoint, data, disk, report, runtime, schedule, stream
from minitron_mcore.checkpoint import Checkpoint
from minitron_mcore.config import ParallelConfig
from minitron_mcore.distill import cache, checks, chunks
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.launching import plain
from minitron_mcore.models import build, table
from minitron_mcore.reading import read_json
from minitron_mcore.runs import CacheKind, TeacherCacheRun
from minitron_mcore.schedule import Batch

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # isort: skip


def run(config: TeacherCacheRun, teacher: Checkpoint) -> None:
    """Write the cache of `teacher` into `config.out_dir`, or go on where a stopped run ended (collective).

    Raises:
        UserError: see `problems`, `data.prepare`, `data.ordered` and `checkpoint.claimed`; a folder with a cache of another teacher
            or text.
    """
    refuse(checks.cache(config, teacher.arch))
    with checkpoint.claimed(config.out_dir, plain(config), resume=True):
        prefixes, weights = data.prepare(config.data, teacher.hf, teacher.arch.vocab)
        samples = {"seed": config.data.seed, "sequence_length": config.sequence_length, "num_samples": config.samples}
        recording = Recording(config, teacher, data.order_hash(prefixes, weights, **samples))
        rows = recording.run(
            data.ordered(prefixes, weights, cache=config.data.cache, vocab_size=teacher.arch.vocab, **samples)
        )
    checkpoint.finish(config.out_dir)
    report.table(
        f"teacher cache of {teacher.path}",
        rows,
        [f"cache: {config.out_dir}", f"distill from it: launch/distill.py ... teacher={config.out_dir}"],
    )


class Recording:
    """One cache in the making. A file is written by one rank: of its data-parallel replica, the last stage's first."""

    def __init__(self, config: TeacherCacheRun, teacher: Checkpoint, order: str):
        """Begin the index, or read what it begins with (collective)."""
        self.config, self.teacher, self.out_dir = config, teacher, Path(config.out_dir)
        arch, self.kind = teacher.arch, config.kind
        self.bytes_a_token = checks.cache_bytes(self.kind, config.top_k, arch.vocab, arch.hidden, self._dtype.itemsize)
        self.index = {
            "kind": str(self.kind),
            "top_k": config.top_k if self.kind == CacheKind.topk else None,
            "dtype": str(config.dtype),
            "bytes_a_token": self.bytes_a_token,
            "samples": config.samples,
            "file_samples": config.file_samples,
            "sequence_length": config.sequence_length,
            "order": order,
            "data": config.data.train,
            "seed": config.data.seed,
            "teacher": checkpoint.identity(teacher),
            "architecture": arch.to_json(),
            "lineage": teacher.lineage,
            "files": {},
        }
        with runtime.agreed():
            found = [self._begin() if runtime.rank() == 0 else None]
        dist.broadcast_object_list(found, src=0)
        self.hashes: dict[str, str] = {}
        """Of the files that this rank has written, and of its share of those that a stopped run left whole."""
        self.pending = self._look(*found[0])

    @property
    def _dtype(self) -> torch.dtype:
        return build.DTYPES[self.config.dtype.value]

    def _begin(self) -> tuple[list[str], dict[str, str]]:
        """Files that are there, and the hashes that the index of a finished cache has of them."""
        path, begun = self.out_dir / cache.INDEX, json.loads(json.dumps(self.index))
        if not path.is_file():
            checkpoint.ship(self.teacher.hf, self.out_dir)
            checkpoint.replace_text(path, json.dumps(begun, indent=1))
            checkpoint.replace_text(self.out_dir / "latest", cache.INDEX)  # the folder stays when the run ends early
        held = read_json(path, "remove the folder, and write the teacher cache again")
        known = held.pop("files", {})
        if not isinstance(known, dict):
            raise UserError(f"{path} has {str(known)[:40]!r} for files: remove the folder, and write the cache again.")
        if held != {key: value for key, value in begun.items() if key != "files"}:
            raise UserError(
                f"{self.out_dir} has a cache of another teacher or of other text, begun by the same command: choose another "
                "out_dir, or remove it."
            )
        return sorted(file.name for file in self.out_dir.glob("*.safetensors")), known

    def _look(self, files: list[str], known: dict[str, str]) -> list[int]:
        """Numbers of the files that are to be written (collective)."""
        own = files[runtime.rank() :: dist.get_world_size()]
        found = {name: disk.sha256(self.out_dir / name) for name in own}
        self.hashes = {name: digest for name, digest in found.items() if known.get(name, digest) == digest}
        whole = self._all_hashes()
        numbers = range(math.ceil(self.config.samples / self.config.file_samples))
        if len(whole) and runtime.rank() == 0:
            runtime.log(f"going on after {len(whole)} whole files of {self.out_dir}")
        self.has_head = self.kind == CacheKind.topk or cache.HEAD in whole
        return [n for n in numbers if cache.file_name(n) not in whole]

    def _all_hashes(self) -> dict[str, str]:
        """Of all ranks (collective)."""
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, self.hashes)
        return {name: digest for part in every for name, digest in sorted(part.items())}

    def run(self, dataset) -> list[dict]:
        """Write what is pending of a dataset of `data.ordered`, then the index; rows for a table (collective)."""
        config, dp = self.config, runtime.dp_group()
        if self.pending:
            model = checkpoint.build_model(
                self.teacher, config.parallel, config.dtype.value, config.performance.frozen()
            )
        if not self.has_head and runtime.rank() == 0:
            self._write(cache.HEAD, {"head": self._head()})
        rows = [
            range(n * config.file_samples, min((n + 1) * config.file_samples, config.samples)) for n in self.pending
        ]
        progress, done = runtime.Progress("teacher cache", sum(map(len, rows)), "samples"), 0
        for at in range(0, len(rows), dp.size()):
            files = rows[at : at + dp.size()]
            # All make as many passes (experts need them all): what a file lacks is filled up, a rank without one takes another's.
            size = max(math.ceil(len(file) / config.micro_batch) * config.micro_batch for file in files)
            own = files[min(dp.rank(), len(files) - 1)]
            filled = [own[min(i, len(own) - 1)] for i in range(size)]
            answers = self._answers(model, dataset, filled)
            if answers and dp.rank() < len(files):
                name = cache.file_name(self.pending[at + dp.rank()])
                self._write(name, {key: tensor[: len(own)] for key, tensor in answers.items()})
            done += sum(map(len, files))
            progress.update(done)
        files = self._all_hashes()
        if runtime.rank() == 0:
            report.write_json(self.out_dir / cache.INDEX, self.index | {"files": dict(sorted(files.items()))})
        runtime.barrier()
        tokens = config.samples * config.sequence_length
        total = {"samples": config.samples, "tokens": tokens, "files": len(files), "bytes a token": self.bytes_a_token}
        return [{"kind": str(self.kind)} | total | {"GB": tokens * self.bytes_a_token / 1e9}]

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        part = self.out_dir / f"{name}.part"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        self.hashes[name] = disk.sha256(part)
        os.replace(part, self.out_dir / name)

    def _head(self) -> Tensor:
        arch = self.teacher.arch
        name = "embedding.word_embeddings.weight" if arch.tied else "output_layer.weight"
        parameter = next(parameter for parameter in table.parameters(arch) if parameter.name == name)
        return stream.Reader(self.teacher).read(parameter, (0, 0), parameter.shape).to(self._dtype)

    def _answers(self, model: build.Model, dataset, rows: Sequence[int]) -> dict[str, Tensor]:
        """What a file keeps of these samples, [F, S, ...] each, on the rank that writes it; nothing elsewhere."""
        size = self.config.micro_batch
        batches = [data.batch_of(dataset, rows[at : at + size]) for at in range(0, len(rows), size)]
        parts: list[dict[str, Tensor]] = []

        def keep(hidden: Tensor, batch: Batch) -> None:
            packed = self._packed(model, hidden)
            if runtime.tp_group().rank() == 0:
                parts.append({name: _whole(tensor) for name, tensor in packed.items()})

        schedule.forward(model, batches, keep)
        if not parts or runtime.cp_group().rank():
            return {}
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _packed(self, model: build.Model, hidden: Tensor) -> dict[str, Tensor]:
        """What is kept of the final norm's output [S_r, B, H]: [S / CP, B, ...], the same on all tensor-parallel ranks."""
        group = runtime.tp_group()
        if model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=group)
        if self.kind != CacheKind.topk:
            return cache.pack_hidden(hidden, self.kind)
        head, vocab = model.head(), self.teacher.arch.vocab
        first = group.rank() * len(head)
        head, flat = head[: max(0, vocab - first)], hidden.flatten(0, 1)
        size = chunks.chunk_tokens(len(flat), 4 * max(1, len(head)), flat.device.type)
        found = [largest(part @ head.t(), self.config.top_k, first, group) for part in flat.split(size)]
        ids, log_probs = (torch.cat(parts).unflatten(0, hidden.shape[:2]) for parts in zip(*found, strict=True))
        return cache.pack_top(ids, log_probs, vocab)


def largest(logits: Tensor, k: int, first: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The k largest of the whole vocabulary, largest first, of a softmax whose entries `first` on are this rank's logits [T, V_r]
    (collective).

    Returns:
        ids [T, k] int64 and log-probabilities [T, k + 1], the last the tail's, on all ranks.
    """
    logits = logits.float()
    values, places = logits.topk(min(k, logits.shape[1]))
    tail = logits.scatter_(1, places, -math.inf).logsumexp(1, keepdim=True)
    missing = k - values.shape[1]
    values = torch.nn.functional.pad(values, (0, missing), value=-math.inf)
    values, tail = (_gathered(x.double(), group) for x in (values, tail))
    ids = _gathered(torch.nn.functional.pad(places + first, (0, missing)), group)
    top = values.topk(k)
    rest = torch.cat((values.scatter(1, top.indices, -math.inf), tail), 1).logsumexp(1, keepdim=True)
    entries = torch.cat((top.values, rest), 1)
    return ids.gather(1, top.indices), entries.log_softmax(1)


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, n] of every rank, side by side."""
    return torch.cat(runtime.all_gather(x, group).chunk(group.size()), 1)


def _whole(part: Tensor) -> Tensor:
    """[S / CP, B, ...] of every context-parallel rank -> [B, S, ...] on the CPU (collective over them)."""
    group = runtime.cp_group()
    length, cut = len(part) * group.size(), ParallelConfig(context=group.size())
    positions = schedule.positions(length, cut, runtime.place()).to(part.device)
    # As bytes, which any backend carries and any device sorts.
    rows = part.contiguous().flatten(1).view(torch.uint8)
    order, rows = runtime.all_gather(positions, group), runtime.all_gather(rows, group)
    whole = rows[order.argsort()].view(part.dtype).unflatten(1, part.shape[1:])
    return whole.transpose(0, 1).contiguous().cpu()
