"""Writes a teacher's cache (see `cache`) by forward passes over a run's samples, in any layout."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from minitron_mcore.checkpoint import claim, disk, run_folder
from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.config.identity import differences, resolved
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.config.stages import CacheKind, TeacherCacheRun
from minitron_mcore.data import blend, datasets, token_cache
from minitron_mcore.distill import cache, checks, tile_sizes
from minitron_mcore.distill.teacher import read_head
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.models import build, tuning
from minitron_mcore.parallel import hang_watchdog, process_groups, schedule, stop_signal
from minitron_mcore.parallel.hang_watchdog import Phase
from minitron_mcore.parallel.schedule import Batch
from minitron_mcore.reading import FORMAT_VERSION, check_format_version, damage_as_user_error, read_json
from minitron_mcore.reporting import tables

from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # isort: skip


def run(config: TeacherCacheRun, teacher: Checkpoint) -> None:
    """Write the cache of `teacher` into `config.out_dir`, or resume a stopped run (collective).

    Raises:
        UserError: see `checks.cache_problems`, `checks.document_problems`, `token_cache.prepare` and
            `claim.claim_run_folder`; a folder with a cache of another teacher or text; the disk is full, on all ranks.
    """
    refuse(checks.cache_problems(config, teacher.arch))
    refuse(checks.document_problems(config.data, tuning.available_kernels()))
    with claim.claim_run_folder(config.out_dir, resolved(config)):
        prefixes, weights = token_cache.prepare(config.data, teacher.hf, teacher.arch.vocab)
        order = datasets.SampleOrder.of(config.data, prefixes, weights, config.sequence_length, config.samples)
        writer = CacheWriter(config, teacher, order.digest())
        samples = datasets.Samples(order, config.data.cache, teacher.arch.vocab)
        with stop_signal.at_stop_points(), hang_watchdog.phase(Phase.step, lambda: "the teacher's pass"):
            rows = writer.run(samples)
        with process_groups.raise_on_all_ranks(), claim.writing(writer.out_dir):
            claim.finish(config.out_dir)
    tables.table(
        f"teacher cache of {teacher.path}",
        rows,
        [f"cache: {config.out_dir}", f"distill from it: launch/distill.py ... teacher={config.out_dir}"],
    )


class CacheWriter:
    """Writes one cache. Each data-parallel replica writes a file at a time, from its last stage's first rank."""

    def __init__(self, config: TeacherCacheRun, teacher: Checkpoint, order: str):
        """Write the index without hashes, or check the one of a stopped run (collective)."""
        self.config, self.teacher, self.out_dir = config, teacher, Path(config.out_dir)
        arch, self.kind = teacher.arch, config.kind
        self.bytes_a_token = checks.cache_bytes(
            self.kind, config.entries, arch.vocab, arch.hidden, self._dtype.itemsize
        )
        self.index = {
            "format_version": FORMAT_VERSION,
            "kind": str(self.kind),
            "top_k": config.entries if self.kind == CacheKind.topk else None,
            **({"tail_draws": config.tail_draws} if self.kind == CacheKind.topk and config.tail_draws else {}),
            "dtype": str(config.dtype),
            "bytes_a_token": self.bytes_a_token,
            "samples": config.samples,
            "file_samples": config.file_samples,
            "sequence_length": config.sequence_length,
            "order": order,
            "data": blend.split_entries(config.data.train, config.data.splits_file),
            "seed": config.data.seed,
            "teacher": run_folder.identity(teacher),
            "architecture": arch.to_json(),
            "lineage": teacher.lineage,
            "files": {},
        }
        with process_groups.raise_on_all_ranks(), claim.writing(self.out_dir):
            found = self._begin_index() if process_groups.rank() == 0 else ([], {})
        self.hashes: dict[str, str] = {}
        """Of the files that this rank has written, and of its share of a stopped run's complete files."""
        self.pending = self._find_pending(*process_groups.from_rank_0(found))

    @property
    def _dtype(self) -> torch.dtype:
        return build.DTYPES[self.config.dtype.value]

    def _begin_index(self) -> tuple[list[str], dict[str, str]]:
        """Existing files, and the hashes in the index of a finished cache."""
        path, index = self.out_dir / cache.INDEX, json.loads(json.dumps(self.index))
        if not path.is_file():
            run_folder.copy_hf_assets(self.teacher.hf, self.out_dir)
            disk.write_json(path, index)
        remedy = "remove the folder, and write the teacher cache again"
        existing = read_json(path, remedy)
        check_format_version(existing, path, remedy)
        hashes = existing.pop("files", {})
        if not isinstance(hashes, dict):
            raise UserError(f"{path} has {str(hashes)[:40]!r} for files, expected an object: {remedy}.")
        with damage_as_user_error(path, remedy):
            if changes := differences(_content(existing), _content(index)):
                raise UserError(
                    f"{self.out_dir} has a cache of another teacher or of other text ({'; '.join(changes)}): choose another "
                    "out_dir, or remove that folder."
                )
        return sorted(file.name for file in self.out_dir.glob("*.safetensors")), hashes

    def _find_pending(self, files: list[str], hashes: dict[str, str]) -> list[int]:
        """Numbers of the files to be written; sets `hashes` and `has_head` (collective)."""
        own = files[process_groups.rank() :: dist.get_world_size()]
        remedy = "remove the folder, and write the teacher cache again"
        with process_groups.raise_on_all_ranks(), damage_as_user_error(self.out_dir, remedy):
            digests = {name: disk.sha256(self.out_dir / name) for name in own}
        self.hashes = {name: digest for name, digest in digests.items() if hashes.get(name, digest) == digest}
        complete = self._all_hashes()
        numbers = range(math.ceil(self.config.samples / self.config.file_samples))
        if complete and process_groups.rank() == 0:
            process_groups.log(f"resuming after {len(complete)} complete files of {self.out_dir}")
        self.has_head = self.kind == CacheKind.topk or cache.HEAD in complete
        return [n for n in numbers if cache.file_name(n) not in complete]

    def _all_hashes(self) -> dict[str, str]:
        """Of all ranks (collective)."""
        by_rank = process_groups.from_all_ranks(self.hashes)
        return {name: digest for part in by_rank for name, digest in sorted(part.items())}

    def run(self, dataset) -> list[dict]:
        """Write the pending files of a dataset of `datasets.Samples`, then the index; rows for a table (collective)."""
        config, dp = self.config, process_groups.dp_group()
        if self.pending:
            model = run_folder.build_model(
                self.teacher, config.parallel, config.dtype.value, config.performance.frozen()
            )
        with process_groups.raise_on_all_ranks(), claim.writing(self.out_dir):
            if not self.has_head and process_groups.rank() == 0:
                head = read_head(self.teacher, 0, self.teacher.arch.vocab)
                self._write(cache.HEAD, {"head": head.to(self._dtype)})
        rows = [
            range(n * config.file_samples, min((n + 1) * config.file_samples, config.samples)) for n in self.pending
        ]
        progress, done = process_groups.Progress("teacher cache", sum(map(len, rows)), "samples"), 0
        skipped = config.samples - sum(map(len, rows))
        for at in range(0, len(rows), dp.size()):
            stop_signal.stop_point(f"after {skipped + done} of {config.samples} samples")
            files = rows[at : at + dp.size()]
            # All replicas make the same number of passes, since they share experts: shorter files repeat their last sample, and
            # a replica without a file processes another's and discards the result.
            size = max(math.ceil(len(file) / config.micro_batch) * config.micro_batch for file in files)
            own = files[min(dp.rank(), len(files) - 1)]
            padded = [own[min(i, len(own) - 1)] for i in range(size)]
            outputs = self._outputs(model, dataset, padded)
            with process_groups.raise_on_all_ranks(), claim.writing(self.out_dir):
                if outputs and dp.rank() < len(files):
                    name = cache.file_name(self.pending[at + dp.rank()])
                    self._write(name, {key: tensor[: len(own)] for key, tensor in outputs.items()})
            done += sum(map(len, files))
            progress.update(done)
        files = self._all_hashes()
        with process_groups.raise_on_all_ranks(), claim.writing(self.out_dir):
            if process_groups.rank() == 0:
                disk.write_json(self.out_dir / cache.INDEX, self.index | {"files": dict(sorted(files.items()))})
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

    def _outputs(self, model: build.Model, dataset, rows: Sequence[int]) -> dict[str, Tensor]:
        """Tensors [F, S, ...] of a file with these samples, on the rank that writes it; empty elsewhere (collective)."""
        size = self.config.micro_batch
        batches = [datasets.to_device(dataset.batch(rows[at : at + size])) for at in range(0, len(rows), size)]
        parts: list[dict[str, Tensor]] = []

        def keep(hidden: Tensor, batch: Batch) -> None:
            packed = self._pack(model, hidden, batch["samples"].tolist())
            if process_groups.tp_group().rank() == 0:
                parts.append({name: _gather_sequence(tensor) for name, tensor in packed.items()})

        schedule.forward(model, batches, keep)
        if not parts or process_groups.cp_group().rank():
            return {}
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _pack(self, model: build.Model, hidden: Tensor, samples: Sequence[int]) -> dict[str, Tensor]:
        """Packed tensors [S / CP, B, ...] of the final norm's output [S_r, B, H], the same on all tensor-parallel ranks."""
        group = process_groups.tp_group()
        if model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=group)
        if self.kind != CacheKind.topk:
            return cache.pack_hidden(hidden, self.kind)
        head, vocab = model.head(), self.teacher.arch.vocab
        first = group.rank() * len(head)
        head, flat = head[: max(0, vocab - first)], hidden.flatten(0, 1)
        budget = tile_sizes.CHUNK_BYTES[flat.device.type]
        size = tile_sizes.chunk_tokens(len(flat), 4 * max(1, len(head)), budget)
        numbers = self._uniform_numbers(samples).to(flat.device).flatten(0, 1).split(size)
        chunks = [
            entries(part @ head.t(), self.config.top_k, uniform, first, group)
            for part, uniform in zip(flat.split(size), numbers, strict=True)
        ]
        ids, log_probs = (torch.cat(parts).unflatten(0, hidden.shape[:2]) for parts in zip(*chunks, strict=True))
        return cache.pack_top(ids, log_probs, vocab)

    def _uniform_numbers(self, samples: Sequence[int]) -> Tensor:
        """[S / CP, B, tail_draws] fp64 in [0, 1), of this rank's positions: they depend on data.seed and the sample only."""
        config = self.config
        seeds = [((config.data.seed << 32) + sample) & (1 << 63) - 1 for sample in samples]
        shape = config.sequence_length, config.tail_draws
        whole = [torch.rand(shape, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        parallel = ParallelConfig(context=config.parallel.context)
        return torch.stack(whole, 1)[schedule.positions(shape[0], parallel, process_groups.place()).cpu()]


def _content(index: dict) -> dict:
    """What an index says of the content of its files, whatever the paths from which it was made."""
    paths = ("format_version", "data", "lineage", "files", "teacher")
    return {key: value for key, value in index.items() if key not in paths} | {"model": index["teacher"]["fingerprint"]}


def top_k_log_probs(logits: Tensor, k: int, first: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The k largest entries of the softmax over the whole vocabulary, in descending order (collective over `group`).

    Args:
        logits: [T, V_r], this rank's entries first .. first + V_r; overwritten if they are fp32.

    Returns:
        ids [T, k] int64 and log-probabilities [T, k + 1] fp64, the last the tail's, the same on all ranks.
    """
    logits = logits.float()
    values, places = logits.topk(min(k, logits.shape[1]))
    tail = logits.scatter_(1, places, -math.inf).logsumexp(1, keepdim=True)
    missing = k - values.shape[1]
    values = torch.nn.functional.pad(values, (0, missing), value=-math.inf)
    values, tail = (_gather_columns(x.double(), group) for x in (values, tail))
    ids = _gather_columns(torch.nn.functional.pad(places + first, (0, missing)), group)
    top = values.topk(k)
    rest = torch.cat((values.scatter(1, top.indices, -math.inf), tail), 1).logsumexp(1, keepdim=True)
    entries = torch.cat((top.values, rest), 1)
    return ids.gather(1, top.indices), entries.log_softmax(1)


def entries(logits: Tensor, k: int, uniform: Tensor, first: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """`top_k_log_probs`, whose tail is replaced by d draws from it (collective over `group`).

    Each draw has 1/d of the tail's probability, an id drawn several times a multiple of that. The expectation of these
    probabilities, and so of the gradient of the forward KL, is exact (Anshumann et al. 2025, arXiv 2503.16870, draw all entries).
    Ids of probability 0 replace repeated draws.

    Args:
        logits: [T, V_r], this rank's entries first .. first + V_r; overwritten if they are fp32 and d is 0.
        uniform: [T, d] fp64 random numbers in [0, 1), the same on all ranks.

    Returns:
        ids [T, k + d] int64, all different, and log-probabilities [T, k + d + 1] fp64, the last -inf if d > 0.
    """
    draws = uniform.shape[1]
    if not draws:
        return top_k_log_probs(logits, k, first, group)
    ids, log_probs = top_k_log_probs(logits.float().clone(), k + draws, first, group)
    drawn = _draw(logits.double(), ids[:, :k], uniform, first, group).sort(1).values
    counts = (drawn[:, :, None] == drawn[:, None, :]).sum(-1)
    fill = ids[:, k:]
    repeated = torch.nn.functional.pad(drawn[:, 1:] == drawn[:, :-1], (1, 0))
    unusable = torch.cat((repeated, (fill[:, :, None] == drawn[:, None, :]).any(-1)), 1)
    # A stable sort: the different draws, then as many of the next likely ids as draws were repeated.
    chosen = unusable.sort(dim=1, stable=True).indices[:, :draws]
    shares = torch.cat((counts.double().log() - math.log(draws), torch.full_like(log_probs[:, :draws], -math.inf)), 1)
    tail = log_probs[:, k:].logsumexp(1, keepdim=True)
    log_probs = torch.cat((log_probs[:, :k], shares.gather(1, chosen) + tail), 1)
    ids = torch.cat((ids[:, :k], torch.cat((drawn, fill), 1).gather(1, chosen)), 1)
    return ids, torch.nn.functional.pad(log_probs, (0, 1), value=-math.inf)


def _draw(logits: Tensor, excluded: Tensor, uniform: Tensor, first: int, group: dist.ProcessGroup) -> Tensor:
    """Ids [T, d] of the softmax without the `excluded` ids [T, k], by inversion at `uniform` [T, d], the same on all ranks."""
    width = logits.shape[1]
    logits = torch.nn.functional.pad(logits, (0, 1), value=-math.inf)  # takes the ids of other ranks; never drawn
    places = (excluded - first).masked_fill((excluded < first) | (excluded >= first + width), width)
    logits.scatter_(1, places, -math.inf)
    ends = _gather_columns(logits.logsumexp(1, keepdim=True), group).softmax(1).cumsum(1)
    ends = ends / ends[:, -1:]  # ends at exactly 1
    end = ends[:, group.rank(), None]
    start = ends[:, group.rank() - 1, None] if group.rank() else torch.zeros_like(end)
    below = logits.sub_(logits.amax(1, keepdim=True).clamp(min=-1e300)).exp_().cumsum(1)
    # Rounding must not reach beyond the rank's last entry of positive probability.
    at = ((uniform - start) / (end - start)).clamp(0, 1 - 1e-12) * below[:, -1:]
    own = torch.searchsorted(below, at, right=True) + first
    drawn = own.masked_fill((uniform < start) | (uniform >= end), 0)
    if group.size() > 1:
        dist.all_reduce(drawn, group=group)
    return drawn


def _gather_columns(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[T, n] of each rank -> [T, n * TP]."""
    return torch.cat(process_groups.all_gather(x, group).chunk(group.size()), 1)


def _gather_sequence(part: Tensor) -> Tensor:
    """[S / CP, B, ...] of each context-parallel rank -> [B, S, ...] on the CPU (collective over them)."""
    group = process_groups.cp_group()
    length, parallel = len(part) * group.size(), ParallelConfig(context=group.size())
    positions = schedule.positions(length, parallel, process_groups.place()).to(part.device)
    # As bytes: every backend supports them, and every device can index them.
    rows = part.contiguous().flatten(1).view(torch.uint8)
    order, rows = process_groups.all_gather(positions, group), process_groups.all_gather(rows, group)
    whole = rows[order.argsort()].view(part.dtype).unflatten(1, part.shape[1:])
    return whole.transpose(0, 1).contiguous().cpu()
