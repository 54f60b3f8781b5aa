"""Hugging Face folders in and out of distributed checkpoints, tensor by tensor, without a model in memory."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minitron_mcore import checkpoint, runtime
from minitron_mcore.config import ParallelConfig
from minitron_mcore.errors import UserError
from minitron_mcore.models import architecture, build, table
from minitron_mcore.models.architecture import Architecture

DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float16: "float16"}
MAX_FILE_BYTES = 5 * 10**9


class Folder:
    """The safetensors of a Hugging Face folder, read as slices.

    Raises:
        UserError: no safetensors, an index that names a missing file, a file that is cut short.
    """

    def __init__(self, path: Path):
        index = path / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = sorted(file.name for file in path.glob("*.safetensors"))
        if not names:
            raise UserError(
                f"{path} holds no *.safetensors weights: download the model with its weights, or convert them."
            )
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise UserError(f"{index} names {missing[0]}, which is not in {path}: download the model again.")
        self.files = [path / name for name in names]
        self.where = {}
        for file in self.files:
            try:
                handle = safe_open(file, "pt")
            except Exception as error:  # safetensors raises its own type for a cut or foreign file
                raise UserError(f"{file} is not a whole safetensors file ({error}): download it again.") from error
            self.where |= dict.fromkeys(handle.keys(), handle)

    def check(self, arch: Architecture) -> None:
        """Refuse a tensor that is missing, too many, or of another shape or dtype, by name."""
        for parameter in table.parameters(arch):
            for name, shape in zip(parameter.hf, parameter.hf_shapes(), strict=True):
                if name not in self.where:
                    raise UserError(
                        f"tensor {name} is missing from {self.files[0].parent}: its config.json asks for it."
                    )
                stored = self.where[name].get_slice(name)
                if (found := tuple(stored.get_shape())) != shape:
                    raise UserError(f"tensor {name} has shape {found}, but config.json asks for {shape}.")
                if stored.get_dtype() not in ("BF16", "F16", "F32"):
                    raise UserError(
                        f"tensor {name} is stored as {stored.get_dtype()}: expected BF16, F16 or F32 (dequantise the model first)."
                    )
        known = {name for parameter in table.parameters(arch) for name in parameter.hf}
        # Old Llama folders store the rotary frequencies, some tied ones the head: both follow from the rest.
        spare = {"lm_head.weight"} if arch.tied else set()
        extra = sorted(n for n in self.where.keys() - known - spare if not n.endswith("rotary_emb.inv_freq"))
        if extra:
            raise UserError(
                f"{self.files[0].parent} holds {len(extra)} tensors that a {arch.family} model of its config.json does not have, "
                f"the first {extra[0]}: is the config another model's?"
            )

    def piece(self, parameter: table.Parameter, dim: int | None, low: int, high: int) -> Tensor:
        """Positions low..high of a parameter along `dim` (all of it when None), read as slices of the files."""
        slices = [self.where[name].get_slice(name) for name in parameter.hf]
        if dim == 1:
            return slices[0][:, low:high]
        low, high = (0, parameter.shape[0]) if dim is None else (low, high)
        rows = table.packing(parameter.row.axes[0], parameter.arch)[low:high]
        parts, start = [], 0
        local = np.empty(len(rows), dtype=np.int64)  # where each wanted row lies in the concatenation of the parts
        filled = 0
        for piece, (count, *_) in zip(slices, parameter.hf_shapes(), strict=True):
            mine = (rows >= start) & (rows < start + count)
            if mine.any():
                first, last = rows[mine].min() - start, rows[mine].max() - start + 1
                parts.append(piece[int(first) : int(last)])
                local[mine] = rows[mine] - start - first + filled
                filled += int(last - first)
            start += count
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole if np.array_equal(local, np.arange(len(whole))) else whole[torch.from_numpy(local)]

    def digest(self) -> str:
        """sha256 over all files; each rank hashes its share of them (collective)."""
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        hashes = {}
        for file in self.files[rank::world]:
            with file.open("rb") as stream:
                hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        every = [hashes]
        if dist.is_initialized():
            every = [None] * world
            dist.all_gather_object(every, hashes)
        merged = sorted(item for part in every for item in part.items())
        return hashlib.sha256(json.dumps(merged).encode()).hexdigest()[:16]


def import_folder(
    path: str | Path, out_dir: str | Path, parallel: ParallelConfig, wanted: Architecture | None = None
) -> Architecture:
    """Hugging Face folder -> distributed checkpoint (collective).

    A rank reads and writes its stage's blocks, its tensor-parallel ranges and its experts; beyond them it holds one tensor.
    Dtypes stay. `wanted`: the architecture that the folder must have, where the caller knows.

    Raises:
        UserError: an unsupported or incomplete folder (by tensor name), another model, a layout that doesn't divide it.
    """
    path = Path(path)
    with runtime.agreed():
        arch, _ = architecture.read_hf(path)
        architecture.expect(arch, wanted, path)
        folder = Folder(path)
        folder.check(arch)
        build.check_shardable(arch, parallel)
    fingerprint = folder.digest()
    tp, state = runtime.tp_group(), {}
    mine = list(stage_parameters(arch, parallel))
    progress = runtime.Progress("import", len(mine), "tensors")
    for done, parameter in enumerate(mine, 1):
        state |= checkpoint.sharded(parameter, _pieces(folder, parameter, tp.rank(), tp.size()), replica(parameter))
        progress.update(done)
    checkpoint.describe(out_dir, arch, fingerprint, {"huggingface": {"path": str(path), "sha256": fingerprint}}, path)
    checkpoint.save(out_dir, 0, state)
    return arch


def _pieces(
    folder: Folder, parameter: table.Parameter, tp_rank: int, tp_size: int
) -> list[tuple[tuple[int, ...], Tensor]]:
    dim = parameter.row.tp_dim
    if dim is None:
        return [((0,) * len(parameter.shape), folder.piece(parameter, None, 0, 0))]
    pieces = []
    for low, high in table.ranges(parameter.row.axes[dim], parameter.arch, tp_rank, tp_size):
        if low < high:
            offset = tuple(low if d == dim else 0 for d in range(len(parameter.shape)))
            pieces.append((offset, folder.piece(parameter, dim, low, high).contiguous()))
    return pieces


def stage_parameters(arch: Architecture, parallel: ParallelConfig):
    """Parameters of this rank's pipeline stage, of the experts only its own."""
    stage, experts = runtime.pp_group().rank(), runtime.own_experts(arch.experts)
    blocks = set(build.stage_blocks(arch, parallel)[stage])
    for parameter in table.parameters(arch):
        first = parameter.name.startswith("embedding")
        here = (
            parameter.block in blocks
            if parameter.block is not None
            else (stage == (0 if first else parallel.pipeline - 1))
        )
        if here and (parameter.expert is None or parameter.expert in experts):
            yield parameter


def replica(parameter: table.Parameter) -> tuple[int, int]:
    """All zeros on the rank that writes a piece: tensor-parallel rank 0 of what is replicated, data-parallel rank 0; of an
    expert, the first of the ranks that hold it."""
    if parameter.expert is not None:
        return (0, runtime.expert_dp_group().rank())
    return (runtime.tp_group().rank() if parameter.row.tp_dim is None else 0, runtime.dp_group().rank())


def export_folder(source: checkpoint.Checkpoint, out_dir: str | Path, dtype: str | None = None) -> int:
    """Distributed checkpoint -> Hugging Face folder, on one process: streams tensor by tensor, returns the parameter count.

    Memory: one file's tensors (at most 5 GB). `config.json` always holds head_dim; tokenizer and generation files are those
    of the source; a new folder appears only when it is whole.

    Raises:
        UserError: sizes that the Hugging Face class refuses, a damaged checkpoint, an out_dir that exists.
    """
    out_dir, arch = Path(out_dir), source.arch
    architecture.check_exportable(arch)
    shipped = json.loads((source.hf / "config.json").read_text())
    writer = _Writer(out_dir)
    progress = runtime.Progress("export", sum(1 for _ in table.parameters(arch)), "tensors")
    for done, (parameter, tensor) in enumerate(checkpoint.read_tensors(source), 1):
        tensor = tensor.to(build.DTYPES[dtype]) if dtype else tensor
        back = np.argsort(table.packing(parameter.row.axes[0], arch))
        if not np.array_equal(back, np.arange(len(back))):
            tensor = tensor[torch.from_numpy(back)]
        rows = [shape[0] for shape in parameter.hf_shapes()]
        for name, part in zip(parameter.hf, tensor.split(rows), strict=True):
            writer.add(name, part.contiguous())
        progress.update(done)
    config = architecture.to_hf(arch, shipped, DTYPE_NAMES[tensor.dtype])
    writer.close()
    for file in source.hf.iterdir():
        if file.name != "config.json":
            (out_dir / file.name).write_bytes(file.read_bytes())
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return table.count(arch)


class _Writer:
    """Safetensors files of at most MAX_FILE_BYTES, named as transformers expects, and their index."""

    def __init__(self, out_dir: Path):
        self.out_dir, self.held, self.bytes, self.total = out_dir, {}, 0, 0
        self.parts: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if self.held and self.bytes + tensor.nbytes > MAX_FILE_BYTES:
            self._flush()
        self.held[name] = tensor
        self.bytes += tensor.nbytes

    def _flush(self) -> None:
        save_file(self.held, self.out_dir / f"part-{len(self.parts)}", metadata={"format": "pt"})
        self.parts.append(list(self.held))
        self.total += self.bytes
        self.held, self.bytes = {}, 0

    def close(self) -> None:
        self._flush()
        n = len(self.parts)
        names = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        for i, name in enumerate(names):
            (self.out_dir / f"part-{i}").rename(self.out_dir / name)
        if n > 1:
            where = {tensor: name for name, part in zip(names, self.parts, strict=True) for tensor in part}
            index = {"metadata": {"total_size": self.total}, "weight_map": where}
            (self.out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
