"""Conversion between Hugging Face folders and distributed checkpoints in pieces, without a whole model in memory."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from minitron_mcore.checkpoint import run_folder, streaming
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.formats.hf_folder import HFFolder, Weights, Writer
from minitron_mcore.models import architecture, build, parameter_table, sharding
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups


def import_folder(
    path: str | Path,
    out_dir: str | Path,
    parallel: ParallelConfig,
    wanted: Architecture | None = None,
    weights: Weights | None = None,
) -> Architecture:
    """Convert a Hugging Face folder to a distributed checkpoint (collective). Dtypes do not change.

    Each rank reads and writes the blocks of its pipeline stage, its tensor-parallel slices and its experts.

    Args:
        path: folder with config and tokenizer.
        wanted: required architecture; None accepts any.
        weights: source of the weights; None for the folder itself.

    Raises:
        UserError: an unsupported or incomplete model, another architecture, or a layout that does not divide the model.
    """
    path = Path(path)
    with process_groups.raise_on_all_ranks():
        arch, _ = architecture.read_hf(path)
        architecture.check_matches(arch, wanted, path)
        weights = weights or HFFolder(path)
        weights.check(arch)
        sharding.check_shardable(arch, parallel)
    tp, pieces = process_groups.tp_group(), []
    for number, parameter in enumerate(stage_parameters(arch, parallel)):
        # One of the tensor-parallel ranks hashes the parameter, before its first piece.
        hashing = parameter.row.tp_dim is None or number % tp.size() == tp.rank()
        for offset, shape in streaming.shard_slices(parameter, tp.rank(), tp.size()):
            make = partial(read, weights, hashing, parameter, offset, shape)
            pieces.append(streaming.Piece(parameter, offset, shape, weights.dtype(parameter), make))
            hashing = False
    streaming.save(out_dir, pieces, replica, "import")
    fingerprint = weights.fingerprint(arch)
    origin = {weights.kind: {"path": str(weights.path), "sha256": fingerprint}}
    run_folder.describe(out_dir, arch, fingerprint, origin, path)
    return arch


def read(
    weights: Weights,
    hashing: bool,
    parameter: parameter_table.Parameter,
    offset: tuple[Any, ...],
    shape: tuple[Any, ...],
) -> Tensor:
    """A slice of a parameter. With `hashing`, the whole parameter is hashed first."""
    if hashing:
        weights.hash(parameter)
    return weights.read(parameter, offset, shape)


def stage_parameters(arch: Architecture, parallel: ParallelConfig) -> Iterator[parameter_table.Parameter]:
    """Parameters of this rank's pipeline stages and of its own experts."""
    return sharding.parameters_on_rank(
        arch, parallel, process_groups.pp_group().rank(), process_groups.own_experts(arch.experts)
    )


def replica(parameter: parameter_table.Parameter) -> tuple[int, int]:
    """Replica id of a parameter on this rank; the rank whose id is all zeros writes it.

    (tensor-parallel rank if the parameter is replicated else 0, data- and context-parallel rank); for an expert, the rank among
    those that hold the same expert.
    """
    if parameter.expert is not None:
        return (0, process_groups.expert_dp_group().rank())
    return (
        process_groups.tp_group().rank() if parameter.row.tp_dim is None else 0,
        process_groups.dp_cp_group().rank(),
    )


def export_folder(source: run_folder.Checkpoint, out_dir: str | Path, dtype: str | None = None) -> int:
    """Convert a distributed checkpoint to a Hugging Face folder, on one process.

    Args:
        source: checkpoint of any layout. Its tokenizer and generation files are copied.
        out_dir: run folder.
        dtype: "bf16" or "fp32" for all weights; None keeps each weight's dtype.

    Returns:
        Number of parameters.

    Raises:
        UserError: sizes that the Hugging Face class does not support, or a damaged checkpoint.
    """
    architecture.check_exportable(source.arch)
    return write_folder(source.arch, streaming.Reader(source), source.hf, Path(out_dir), dtype)


def write_folder(
    arch: Architecture, weights: Weights | streaming.Reader, hf_folder: Path, out_dir: Path, dtype: str | None = None
) -> int:
    """`export_folder` for any source of weights. `hf_folder` holds config and tokenizer."""
    dtypes = {p: build.DTYPES[dtype] if dtype else weights.dtype(p) for p in parameter_table.parameters(arch)}
    writer = Writer(out_dir, arch, dtypes)
    writer.write("export", lambda p: [partial(weights.read, p, *part) for part in streaming.shard_slices(p)])
    writer.finish(hf_folder)
    return parameter_table.count(arch)
