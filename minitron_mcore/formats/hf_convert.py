"""Hugging Face folders in and out of distributed checkpoints, piece by piece, without a model in memory."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

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
    """Hugging Face folder -> distributed checkpoint (collective).

    A rank reads and writes its stage's blocks, its tensor-parallel ranges and its experts, a few pieces at a time. Dtypes stay.
    `wanted`: the architecture that the folder must have, where the caller knows. `weights`: where they are, if not in the folder
    beside its config and tokenizer.

    Raises:
        UserError: an unsupported or incomplete folder (by tensor name), another model, a layout that doesn't divide it.
    """
    path = Path(path)
    with process_groups.raise_on_all_ranks():
        arch, _ = architecture.read_hf(path)
        architecture.check_matches(arch, wanted, path)
        weights = weights or HFFolder(path)
        weights.check(arch)
        build.check_shardable(arch, parallel)
    tp, pieces = process_groups.tp_group(), []
    for number, parameter in enumerate(stage_parameters(arch, parallel)):
        # One of the ranks that read a parameter hashes it, before its first piece.
        hashing = parameter.row.tp_dim is None or number % tp.size() == tp.rank()
        for offset, shape in streaming.shard_slices(parameter, tp.rank(), tp.size()):
            make = partial(read, weights, hashing, parameter, offset, shape)
            pieces.append(streaming.Piece(parameter, offset, shape, weights.dtype(parameter), make))
            hashing = False
    streaming.save(out_dir, pieces, replica, "import")
    fingerprint = weights.fingerprint(arch)
    origin = {weights.kind: {"path": str(weights.path), "sha256": fingerprint}}
    run_folder.describe(out_dir, arch, fingerprint, origin, path)
    process_groups.barrier()  # the checkpoint is whole when any rank goes on
    return arch


def read(weights: Weights, hashing: bool, parameter: parameter_table.Parameter, offset: tuple, shape: tuple) -> Tensor:
    """A box of a parameter; with `hashing`, all of the parameter is hashed just before."""
    if hashing:
        weights.hash(parameter)
    return weights.read(parameter, offset, shape)


def stage_parameters(arch: Architecture, parallel: ParallelConfig) -> Iterator[parameter_table.Parameter]:
    """Parameters of this rank's pipeline stages, of the experts only its own."""
    return sharding.parameters_on_rank(
        arch, parallel, process_groups.pp_group().rank(), process_groups.own_experts(arch.experts)
    )


def replica(parameter: parameter_table.Parameter) -> tuple[int, int]:
    """All zeros on the rank that writes a piece: tensor-parallel rank 0 of what is replicated, the first of the data- and
    context-parallel ranks; of an expert, the first of the ranks that hold it."""
    if parameter.expert is not None:
        return (0, process_groups.expert_dp_group().rank())
    return (
        process_groups.tp_group().rank() if parameter.row.tp_dim is None else 0,
        process_groups.dp_cp_group().rank(),
    )


def export_folder(source: run_folder.Checkpoint, out_dir: str | Path, dtype: str | None = None) -> int:
    """Distributed checkpoint -> Hugging Face folder, on one process, piece by piece; returns the parameter count.

    Args:
        source: checkpoint of any layout; its tokenizer and generation files come along.
        out_dir: claimed folder.
        dtype: "bf16" or "fp32" for all weights; None keeps them as they are.

    Raises:
        UserError: sizes that the Hugging Face class refuses, a damaged checkpoint.
    """
    architecture.check_exportable(source.arch)
    return write_folder(source.arch, streaming.Reader(source), source.hf, Path(out_dir), dtype)


def write_folder(
    arch: Architecture, weights: Weights | streaming.Reader, hf_folder: Path, out_dir: Path, dtype: str | None = None
) -> int:
    """Weights from wherever they are -> Hugging Face folder, as `export_folder` does; `shipped` holds config and tokenizer."""
    dtypes = {p: build.DTYPES[dtype] if dtype else weights.dtype(p) for p in parameter_table.parameters(arch)}
    writer = Writer(out_dir, arch, dtypes)
    writer.write("export", lambda p: [partial(weights.read, p, *box) for box in streaming.shard_slices(p)])
    writer.finish(hf_folder)
    return parameter_table.count(arch)
