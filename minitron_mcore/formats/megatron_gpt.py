"""Reading and writing checkpoints of Megatron-Core's GPTModel, with the tensor names of Megatron-LM.

A layer of GPTModel contains attention and MLP, so a block is a layer. All variants of its checkpoints are read:

    layers      one tensor of all layers, `decoder.layers.self_attention.linear_qkv.weight` [L, (N + 2G) D, H] (Megatron's
                default), or one a layer, `decoder.layers.0.self_attention...`
    experts     one tensor of all experts, `mlp.experts.experts.linear_fc1.weight` [L, E, 2F, H], or one an expert
    gate, up    one tensor under the other [2F, H], or two, `..._w` and `..._v`
    norms       see `NAMES`
    vocabulary  padded with unused rows

The order of elements within a tensor is that of the parameter table. megatron-core's gpt_checkpoint_interop maps the same names,
but only when it loads whole models on regular grids, and only one variant. The tests compare this module with it.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minitron_mcore.checkpoint import claim, disk, run_folder, safe_metadata, saving, streaming
from minitron_mcore.checkpoint.hf_assets import tensor_bytes
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.formats import hf_convert
from minitron_mcore.formats.hf_folder import CODES, Weights, write_config
from minitron_mcore.models import architecture, build, parameter_table, sharding
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor  # isort: skip

_FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
NAMES: dict[str, Callable[[Architecture], tuple[str, ...]]] = {
    "te": lambda arch: ("input_layernorm.",) if arch.experts else tuple(_FUSED),
    "local": lambda arch: tuple(_FUSED),
    "plain": lambda arch: (),
}
"""Layer spec -> norms that have the name of the linear layer after them. Transformer Engine fuses these norms into the linear layer
(not into experts), megatron-core's local spec uses the same names, and "plain" is a spec that does not."""
EMBEDDING = "embedding.word_embeddings.weight"
TRACKER = "latest_checkpointed_iteration.txt"


@dataclasses.dataclass(frozen=True)
class Location:
    """Location of a parameter: the tensor's key, and index and size of the leading axes (layer, expert) that precede its own."""

    key: str
    index: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


def locate(
    parameter: parameter_table.Parameter, names: str = "te", stacked_layers: bool = True, stacked_experts: bool = True
) -> Location:
    """The location of a parameter in one variant of a GPTModel checkpoint.

    Args:
        names: a key of `NAMES`.
        stacked_layers: one tensor for all layers; otherwise one per layer.
        stacked_experts: one tensor for all experts; otherwise one per expert.
    """
    key, arch = parameter.row.name.replace("decoder.final_norm.", "decoder.final_layernorm."), parameter.arch
    for norm in NAMES[names](arch):
        key = key.replace(norm, _FUSED[norm])
    key = re.sub(r"\{[am]\}\.", "" if stacked_layers else f"{parameter.block}.", key)
    key = key.replace("experts.{e}.", "experts.experts." + ("" if stacked_experts else f"{parameter.expert}."))
    axes = [(parameter.block, arch.blocks)] if parameter.block is not None and stacked_layers else []
    axes += [(parameter.expert, arch.experts)] if parameter.expert is not None and stacked_experts else []
    return Location(key, *(tuple(column) for column in zip(*axes, strict=True)))


class GPTModelFolder(Weights):
    """Weights of a distributed checkpoint of GPTModel, or of the newest one in a Megatron-LM folder.

    Raises:
        UserError: no distributed checkpoint, an unsafe or damaged index, or no single GPTModel in it.
    """

    kind = "gptmodel"

    def __init__(self, path: Path):
        super().__init__()
        self.path = _newest_step(Path(path))
        self.reader = safe_metadata.Reader(self.path)
        keys = {key for key in self.reader.tensors if key.endswith(EMBEDDING) and "optim" not in key}
        prefixes = sorted(key.removesuffix(EMBEDDING) for key in keys)
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
                expected = (*part.sizes, high - low, *parameter.shape[1:])
                stored, dtype = self.shapes[part.key], self.reader.tensors[self.prefix + part.key].properties.dtype
                padded = parameter.row.axes[0] == "vocab" and len(stored) == 2 and stored[0] > expected[0]
                if stored != expected and not (padded and stored[1:] == expected[1:]):
                    raise UserError(
                        f"tensor {part.key} in {self.path} has shape {stored}, but config.json requires {expected}."
                    )
                if dtype not in CODES:
                    raise UserError(
                        f"tensor {part.key} in {self.path} is {dtype}: expected one of {', '.join(map(str, CODES))}."
                    )
        if unknown := sorted(self.shapes.keys() - used):
            raise UserError(
                f"{self.path} holds {unknown[0]}, which the model of config.json does not have: give the config.json of "
                "the model that was trained (model.hf=/path/to/folder)."
            )

    def dtype(self, parameter: parameter_table.Parameter) -> torch.dtype:
        (part, _, _), *_ = self._parts(parameter)
        return self.reader.tensors[self.prefix + part.key].properties.dtype

    def read(self, parameter: parameter_table.Parameter, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        slices = []
        for part, start, end in self._parts(parameter):
            low, high = max(offset[0], start), min(offset[0] + shape[0], end)
            if low < high:
                leading, local = (1,) * len(part.index), (high - low, *shape[1:])
                at = (*part.index, low - start, *offset[1:])
                slices.append(self.reader.read_slice(self.prefix + part.key, at, leading + local).view(local))
        return slices[0] if len(slices) == 1 else torch.cat(slices)

    def stored_tensors(self, parameter: parameter_table.Parameter) -> Iterator[tuple[str, Iterable[np.ndarray]]]:
        """The whole parameter under the parameter table's name, so that the fingerprint is the same for all variants."""
        yield parameter.name, [tensor_bytes(self.read(parameter, (0,) * len(parameter.shape), parameter.shape))]

    def describe(self) -> str:
        """One line with the checkpoint's path."""
        return f"weights: GPTModel checkpoint {self.path}"

    def _parts(self, parameter: parameter_table.Parameter) -> list[tuple[Location, int, int]]:
        """(location, first row, last row + 1) of each stored tensor that holds rows of a parameter."""
        rows = parameter.shape[0]
        for variant in itertools.product(NAMES, (True, False), (True, False)):
            location = locate(parameter, *variant)
            if location.key in self.shapes:
                return [(location, 0, rows)]
            halves = [dataclasses.replace(location, key=location.key + half) for half in ("_w", "_v")]
            if parameter.row.axes[0] == "glu" and all(half.key in self.shapes for half in halves):
                return [(halves[0], 0, rows // 2), (halves[1], rows // 2, rows)]
        raise UserError(f"tensor {locate(parameter).key} is missing from {self.path}: config.json requires it.")


def _newest_step(path: Path) -> Path:
    """The newest checkpoint in a Megatron-LM folder; `path` itself if it is a checkpoint."""
    if not (path / TRACKER).is_file():
        return path
    step = (path / TRACKER).read_text(errors="replace").strip()
    if step != "release" and not (step.isdecimal() and len(step) < 20):  # as in Megatron-LM
        raise UserError(
            f"{path / TRACKER} says {step[:40]!r}, not a step's number or release: give the folder of a step "
            "(model.weights=/path)."
        )
    newest = path / (f"iter_{int(step):07d}" if step != "release" else step)
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
    """Convert a checkpoint of this package to a Megatron-LM folder that GPTModel loads strictly in any layout (collective).

    The folder has `release`, the weights in Megatron's default variant, and `hf`, a Hugging Face config and the tokenizer. Each
    rank reads and writes the blocks of its pipeline stage, its tensor-parallel slices and its experts.

    Args:
        out_dir: run folder.
        parallel: the layout of this process group. The result does not depend on it.
        dtype: "bf16" or "fp32".
        names: a key of `NAMES`.
        vocab_multiple: the vocabulary is padded with zero rows to a multiple of this.

    Returns:
        Number of parameters, without padding.

    Raises:
        UserError: a block lacks attention or MLP, the layout does not divide the model, or the checkpoint is damaged.
    """
    out_dir, arch = Path(out_dir), source.arch
    with process_groups.raise_on_all_ranks():
        refuse(architecture.missing_layer_problems(arch, "megatron-core's GPTModel"))
        sharding.check_shardable(arch, parallel)
        reader = streaming.Reader(source)
    padded_vocab = -(-arch.vocab // vocab_multiple) * vocab_multiple
    tp = process_groups.tp_group()
    make: saving.Make = {}
    state: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": 0}
    for parameter in hf_convert.stage_parameters(arch, parallel):
        location = locate(parameter, names)
        for offset, shape in streaming.shard_slices(parameter, tp.rank(), tp.size()):
            last = parameter.row.axes[0] == "vocab" and offset[0] + shape[0] == arch.vocab
            rows = shape[0] + (padded_vocab - arch.vocab if last else 0)
            at, local = (*location.index, *offset), (*(1 for _ in location.index), rows, *shape[1:])
            size = (
                *location.sizes,
                *((padded_vocab, arch.hidden) if parameter.row.axes[0] == "vocab" else parameter.shape),
            )
            placeholder = torch.empty(local, dtype=build.DTYPES[dtype], device="meta")
            state[f"{location.key}@{at}"] = ShardedTensor(
                location.key,
                placeholder,
                placeholder.dtype,
                local,
                size,
                at,
                None,
                replica_id=hf_convert.replica(parameter),
            )
            make[location.key, at] = partial(_read_padded, reader, parameter, offset, shape, placeholder)
        state |= _extra_state(parameter, location, names)
    with process_groups.raise_on_all_ranks(), claim.writing(out_dir):
        if process_groups.rank() == 0:
            write_config(source.hf, arch, out_dir / "hf", build.DTYPES[dtype])
    saving.Save(out_dir / "release", state, "export", make).finish()
    with process_groups.raise_on_all_ranks(), claim.writing(out_dir):
        if process_groups.rank() == 0:
            disk.replace_text(out_dir / TRACKER, "release")
    return parameter_table.count(arch)


def _read_padded(
    reader: streaming.Reader,
    parameter: parameter_table.Parameter,
    offset: tuple[Any, ...],
    shape: tuple[Any, ...],
    like: Tensor,
) -> Tensor:
    """A slice with the dtype and shape of `like`, which may have leading axes of size 1 and more rows; these are zero."""
    data = reader.read(parameter, offset, shape).to(like.dtype)
    if padding := like.numel() - data.numel():
        data = torch.cat([data.flatten(), data.new_zeros(padding)])
    return data.view(like.shape)


def _extra_state(parameter: parameter_table.Parameter, location: Location, names: str) -> dict[str, Any]:
    """The empty extra state of a parameter's module, which strict loading requires.

    megatron-core's linear layers within a block have one, and so do Transformer Engine's norms that are not fused.
    """
    module, _, kind = location.key.rpartition(".")
    norm = module.endswith("layernorm") and names == "te"
    if kind != "weight" or not (norm or ".linear_" in module):
        return {}
    key, tp = f"{module}._extra_state", process_groups.tp_group().rank()
    replica = (
        hf_convert.replica(parameter) if parameter.expert is not None else (tp, process_groups.dp_cp_group().rank())
    )
    return {
        f"{parameter.name}@extra": ShardedObject(key, None, location.sizes or (1,), location.index or (0,), replica)
    }
