"""Megatron-Core's GPTModel checkpoints, in and out: the parameter table under the names that Megatron-LM writes.

GPTModel keeps attention and MLP in one layer, so a block is a layer. Its checkpoints come in variants, all of which are read:

    layers      one tensor of all layers, `decoder.layers.self_attention.linear_qkv.weight` [L, (N + 2G) D, H] (Megatron's
                default), or one a layer, `decoder.layers.0.self_attention...`
    experts     one tensor of all experts, `mlp.experts.experts.linear_fc1.weight` [L, E, 2F, H], or one an expert
    gate, up    one tensor under the other [2F, H], or two, `..._w` and `..._v`
    norms       see `NAMES`
    vocabulary  padded with rows that no token has

Positions within a tensor are the table's own. megatron-core's gpt_checkpoint_interop maps the same names, but only whole models
at load time, on regular grids and one of these variants; the tests hold this file against it.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minitron_mcore.checkpoint import run_folder, safe_metadata, streaming
from minitron_mcore.checkpoint.hf_assets import tensor_bytes
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.formats import hf_convert
from minitron_mcore.formats.hf_folder import CODES, Weights, write_config
from minitron_mcore.models import architecture, build, parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups

from megatron.core import dist_checkpointing  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor  # isort: skip

_FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
NAMES = {
    "te": lambda arch: ("input_layernorm.",) if arch.experts else tuple(_FUSED),
    "local": lambda arch: tuple(_FUSED),
    "plain": lambda arch: (),
}
"""Layer specs, and which of a layer's norms each names after the linear layer behind it: Transformer Engine's fuses them into
it (experts have none to fuse with), megatron-core's local spec borrows the names, a spec without such a map does not."""
EMBEDDING = "embedding.word_embeddings.weight"
TRACKER = "latest_checkpointed_iteration.txt"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a parameter lies: the tensor's key, and index and size of each axis that stands before the parameter's own."""

    key: str
    index: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


def place(
    parameter: parameter_table.Parameter, names: str = "te", one_tensor: bool = True, one_of_experts: bool = True
) -> Place:
    """A parameter's place in a GPTModel checkpoint.

    Args:
        parameter: of the table.
        names: a key of `NAMES`.
        one_tensor: of all layers; otherwise one a layer.
        one_of_experts: one tensor of all experts; otherwise one an expert.
    """
    key, arch = parameter.row.name.replace("decoder.final_norm.", "decoder.final_layernorm."), parameter.arch
    for norm in NAMES[names](arch):
        key = key.replace(norm, _FUSED[norm])
    key = re.sub(r"\{[am]\}\.", "" if one_tensor else f"{parameter.block}.", key)
    key = key.replace("experts.{e}.", "experts.experts." + ("" if one_of_experts else f"{parameter.expert}."))
    axes = [(parameter.block, arch.blocks)] if parameter.block is not None and one_tensor else []
    axes += [(parameter.expert, arch.experts)] if parameter.expert is not None and one_of_experts else []
    return Place(key, *(tuple(column) for column in zip(*axes, strict=True)))


class GPTModelFolder(Weights):
    """Weights in a checkpoint that GPTModel's `sharded_state_dict` was saved to, or the Megatron-LM folder around it.

    Raises:
        UserError: another format of Megatron's, an index that is damaged or not just an index, no GPTModel in it.
    """

    kind = "gptmodel"

    def __init__(self, path: Path):
        super().__init__()
        self.path = _newest(Path(path))
        self.reader = safe_metadata.Reader(self.path)
        prefixes = {key.removesuffix(EMBEDDING) for key in self.reader.tensors if key.endswith(EMBEDDING)}
        prefixes = sorted(prefix for prefix in prefixes if "optim" not in prefix)
        if len(prefixes) != 1:
            some = ", ".join(sorted(self.reader.tensors)[:3]) or "nothing"
            raise UserError(f"{self.path} holds no GPTModel: it has no single {EMBEDDING}, but {some}.")
        self.prefix = prefixes[0]
        self.shapes = {
            key.removeprefix(self.prefix): tuple(entry.size)
            for key, entry in self.reader.tensors.items()
            if key.startswith((f"{self.prefix}decoder.", f"{self.prefix}embedding.", f"{self.prefix}output_layer."))
        }

    def check(self, arch: Architecture) -> None:
        used = set()
        for parameter in parameter_table.parameters(arch):
            parts = self._parts(parameter)
            used |= {part.key for part, _, _ in parts}
            for part, low, high in parts:
                asked = (*part.sizes, high - low, *parameter.shape[1:])
                found, dtype = self.shapes[part.key], self.reader.tensors[self.prefix + part.key].properties.dtype
                padded = parameter.row.axes[0] == "vocab" and len(found) == 2 and found[0] > asked[0]
                if found != asked and not (padded and found[1:] == asked[1:]):
                    raise UserError(
                        f"tensor {part.key} in {self.path} has shape {found}, but config.json asks for {asked}."
                    )
                if dtype not in CODES:
                    raise UserError(
                        f"tensor {part.key} in {self.path} is {dtype}: expected one of {', '.join(map(str, CODES))}."
                    )
        if unknown := sorted(self.shapes.keys() - used):
            raise UserError(
                f"{self.path} holds {unknown[0]}, which the model of config.json has no place for: give the config.json of "
                "the model that was trained (model.hf=/path/to/folder)."
            )

    def dtype(self, parameter: parameter_table.Parameter) -> torch.dtype:
        (part, _, _), *_ = self._parts(parameter)
        return self.reader.tensors[self.prefix + part.key].properties.dtype

    def read(self, parameter: parameter_table.Parameter, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        found = []
        for part, start, end in self._parts(parameter):
            low, high = max(offset[0], start), min(offset[0] + shape[0], end)
            if low < high:
                leading, here = (1,) * len(part.index), (high - low, *shape[1:])
                at = (*part.index, low - start, *offset[1:])
                found.append(self.reader.read_slice(self.prefix + part.key, at, leading + here).view(here))
        return found[0] if len(found) == 1 else torch.cat(found)

    def stored(self, parameter: parameter_table.Parameter) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
        """A whole parameter under the table's name, so that the same weights have the same fingerprint in any variant."""
        yield parameter.name, [tensor_bytes(self.read(parameter, (0,) * len(parameter.shape), parameter.shape))]

    def describe(self) -> str:
        """One line: which checkpoint was chosen."""
        return f"weights: GPTModel checkpoint {self.path}"

    def _parts(self, parameter: parameter_table.Parameter) -> list[tuple[Place, int, int]]:
        """The stored tensors that a parameter lies in, each with the parameter's rows (first, last + 1) in it."""
        rows = parameter.shape[0]
        for variant in itertools.product(NAMES, (True, False), (True, False)):
            found = place(parameter, *variant)
            if found.key in self.shapes:
                return [(found, 0, rows)]
            halves = [dataclasses.replace(found, key=found.key + half) for half in ("_w", "_v")]
            if parameter.row.axes[0] == "glu" and all(half.key in self.shapes for half in halves):
                return [(halves[0], 0, rows // 2), (halves[1], rows // 2, rows)]
        raise UserError(f"tensor {place(parameter).key} is missing from {self.path}: config.json asks for it.")


def _newest(path: Path) -> Path:
    """The checkpoint itself, where `path` is a folder of Megatron-LM's with several."""
    if not (path / TRACKER).is_file():
        return path
    said = (path / TRACKER).read_text(errors="replace").strip()
    if said != "release" and not (said.isdecimal() and len(said) < 20):  # Megatron-LM refuses it, too
        raise UserError(
            f"{path / TRACKER} says {said[:40]!r}, not a step's number or release: give the folder of a step "
            "(model.weights=/path)."
        )
    newest = path / (f"iter_{int(said):07d}" if said != "release" else said)
    if not newest.is_dir():
        raise UserError(
            f"{path / TRACKER} names {newest.name}, which is not there: give the folder of a step (model.weights=/path)."
        )
    return newest


def export_folder(
    source: run_folder.Checkpoint,
    out_dir: str | Path,
    parallel: ParallelConfig,
    dtype: str,
    names: str = "te",
    vocab_multiple: int = 1,
) -> int:
    """Distributed checkpoint -> Megatron-LM folder that GPTModel loads strictly at any layout (collective); counts parameters.

    A rank reads and writes its stage's blocks, its tensor-parallel ranges and its experts, a few pieces at a time. The folder holds
    `release`, the weights in Megatron's default variant, and `hf`, a Hugging Face config and the tokenizer.

    Args:
        source: checkpoint of ours.
        out_dir: claimed folder.
        parallel: the layout in which to read and write; it leaves no trace in the result.
        dtype: "bf16" or "fp32".
        names: a key of `NAMES`.
        vocab_multiple: the vocabulary is padded with zeros to a multiple of this.

    Raises:
        UserError: a block without attention or MLP, a layout that doesn't divide the model, a damaged checkpoint.
    """
    out_dir, arch = Path(out_dir), source.arch
    with process_groups.raise_on_all_ranks():
        refuse(architecture.missing_layer_problems(arch, "megatron-core's GPTModel"))
        build.check_shardable(arch, parallel)
        reader = streaming.Reader(source)
    whole = -(-arch.vocab // vocab_multiple) * vocab_multiple
    tp, make = process_groups.tp_group(), {}
    state: dict = {"checkpoint_version": 3.0, "iteration": 0}
    for parameter in hf_convert.stage_parameters(arch, parallel):
        where = place(parameter, names)
        for offset, shape in streaming.shard_slices(parameter, tp.rank(), tp.size()):
            last = parameter.row.axes[0] == "vocab" and offset[0] + shape[0] == arch.vocab
            rows = shape[0] + (whole - arch.vocab if last else 0)
            at, local = (*where.index, *offset), (*(1 for _ in where.index), rows, *shape[1:])
            size = (*where.sizes, *((whole, arch.hidden) if parameter.row.axes[0] == "vocab" else parameter.shape))
            stand_in = torch.empty(local, dtype=build.DTYPES[dtype], device="meta")
            state[f"{where.key}@{at}"] = ShardedTensor(
                where.key, stand_in, stand_in.dtype, local, size, at, None, replica_id=hf_convert.replica(parameter)
            )
            make[where.key, at] = partial(_read, reader, parameter, offset, shape, stand_in)
        state |= _extra_state(parameter, where, names)
    if process_groups.rank() == 0:
        (out_dir / "release").mkdir()
        write_config(source.hf, arch, out_dir / "hf", build.DTYPES[dtype])
    torch.distributed.barrier()
    streamed = streaming.StreamingStrategy(make, "export")
    with streaming.unwrap_user_errors():
        dist_checkpointing.save(state, str(out_dir / "release"), streamed, async_strategy="mcore")
    streamed.write_manifest(out_dir / "release")
    if process_groups.rank() == 0:
        run_folder.replace_text(out_dir / TRACKER, "release")
    return parameter_table.count(arch)


def _read(
    reader: streaming.Reader, parameter: parameter_table.Parameter, offset: tuple, shape: tuple, like: Tensor
) -> Tensor:
    """A box in the dtype and shape of `like`: with leading axes of 1, and rows of zeros at its end."""
    data = reader.read(parameter, offset, shape).to(like.dtype)
    if padding := like.numel() - data.numel():
        data = torch.cat([data.flatten(), data.new_zeros(padding)])
    return data.view(like.shape)


def _extra_state(parameter: parameter_table.Parameter, where: Place, names: str) -> dict:
    """The empty state that a parameter's module keeps beside its weight, which a strict load asks for.

    megatron-core's linear layers within a block have one, Transformer Engine's norms too where they stand alone.
    """
    module, _, kind = where.key.rpartition(".")
    norm = module.endswith("layernorm") and names == "te"
    if kind != "weight" or not (norm or ".linear_" in module):
        return {}
    key, tp = f"{module}._extra_state", process_groups.tp_group().rank()
    replica = (
        hf_convert.replica(parameter) if parameter.expert is not None else (tp, process_groups.dp_cp_group().rank())
    )
    return {f"{parameter.name}@extra": ShardedObject(key, None, where.sizes or (1,), where.index or (0,), replica)}
