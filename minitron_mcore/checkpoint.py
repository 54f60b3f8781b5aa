"""Checkpoint folders: what every stage reads and writes.

    out_dir/
      config.yaml      the resolved config of the run that made it
      model.json       architecture, fingerprint and lineage (parents, hashes, versions, command)
      hf/              config, tokenizer and generation files as the source shipped them
      plan.json        pruned checkpoints only: every kept index
      plans/           the plans of its ancestors, each named by its digest
      step_0000000/    Megatron distributed checkpoint; weights have the parameter table's keys and unpadded global shapes
      latest           name of the newest complete step, replaced in one move
      .complete        the run came to its end

Nothing in it depends on the layout that wrote it. `latest` moves only after a step is whole on disk and hashed, so a killed
run leaves its last good step behind.
"""

import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from minitron_mcore import disk, distcp, runtime
from minitron_mcore.errors import NotFinite, UserError
from minitron_mcore.models import architecture, build, table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.folder import place, shipped
from minitron_mcore.reading import read_yaml, readable

from megatron.core import dist_checkpointing  # isort: skip
from megatron.core.dist_checkpointing.core import CheckpointingException  # isort: skip
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # isort: skip
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper  # isort: skip

COMPLETE = ".complete"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder."""

    path: Path
    arch: Architecture
    fingerprint: str
    """Names the weights: a hash over the source files, or over the parent's fingerprint and what was done to it."""
    lineage: dict

    @property
    def step_dir(self) -> Path:
        return self.path / (self.path / "latest").read_text().strip()

    @property
    def hf(self) -> Path:
        return self.path / "hf"


def open_checkpoint(path: str | Path, key: str = "source", wanted: dict | None = None) -> Checkpoint:
    """Read a checkpoint folder's description; no weights are touched.

    Args:
        key: the option that names it.
        wanted: the architecture that it must have (`model.architecture`); None takes any.

    Raises:
        UserError: nothing there, an unfinished run, a description that cannot be read, another model.
    """
    path = Path(path)
    if not (path / "model.json").is_file():
        raise UserError(
            f"no checkpoint at {path}: run launch/convert.py on the model's Hugging Face folder (model.hf=/path), then the "
            f"stages up to this one, or give the folder of another with {key}=/path."
        )
    with readable(path / "model.json", "make the checkpoint again"):
        model = json.loads((path / "model.json").read_text(encoding="utf-8"))
        found = Checkpoint(path, Architecture(**model["architecture"]), model["fingerprint"], model["lineage"])
        if not isinstance(found.fingerprint, str) or not isinstance(found.lineage, dict):
            raise TypeError("fingerprint is not text, or lineage is no object")
    latest = (path / "latest").read_bytes().strip() if (path / "latest").is_file() else b""
    if latest and not re.fullmatch(rb"step_\d+", latest):
        raise UserError(
            f"{path / 'latest'} names {latest[:80]!r}, which is no step: write the name of a folder step_N in it."
        )
    if not latest or not found.step_dir.is_dir():
        raise UserError(
            f"the checkpoint at {path} holds no complete step: the run that wrote it did not finish; run it again."
        )
    architecture.expect(found.arch, architecture.given(wanted), path)
    return found


@contextmanager
def claimed(out_dir: str | Path, config: dict, resume: bool = False) -> Iterator[bool]:
    """Take `out_dir` for a run (collective where there are groups): config.yaml is written, a failure leaves no empty claim.

    Yields True where a stopped run of the same config is to go on (`resume`). What an interrupted run that doesn't resume left
    behind under the same config is thrown away.

    Raises:
        UserError: the folder holds another run, a finished one, or something that isn't ours.
    """
    out_dir, box = Path(out_dir), [False]
    with runtime.agreed():
        if runtime.rank() == 0:
            box = [_claim(out_dir, config, resume)]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    try:
        yield box[0]
    except BaseException as error:
        kept = (out_dir / "latest").is_file() or isinstance(error, NotFinite)
        if runtime.rank() == 0 and not kept:
            shutil.rmtree(out_dir, ignore_errors=True)
        raise
    if not resume:
        finish(out_dir)


def finish(out_dir: str | Path) -> None:
    """Mark a folder as whole (rank 0); a run that can be resumed does so itself, after its last step."""
    mark = Path(out_dir) / COMPLETE
    if runtime.rank() == 0 and not mark.is_file():  # its time tells what was made from what
        mark.touch()


def _claim(out_dir: Path, config: dict, resume: bool) -> bool:
    held = out_dir / "config.yaml"
    others = (path for path in out_dir.glob("*") if path.suffix != ".part")  # another process may be claiming it too
    if not held.is_file() and any(others):
        raise UserError(f"out_dir {out_dir} is not empty and holds no run of ours: choose another out_dir.")
    if held.is_file():
        same = read_yaml(held, f"choose another out_dir, or remove {out_dir}") == config
        if not same or (not resume and (out_dir / COMPLETE).is_file()):
            raise UserError(
                f"out_dir {out_dir} already holds {'this finished' if same else 'another'} run ({held}): "
                "choose another out_dir, or remove it."
            )
        if not resume:
            shutil.rmtree(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    replace_text(held, yaml.safe_dump(config, sort_keys=False))
    return (out_dir / "latest").is_file()


def replace_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old one or the new one, never half of it; of several writers, the last one's."""
    part = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.part")
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def describe(
    out_dir: str | Path,
    arch: Architecture,
    fingerprint: str,
    parents: dict,
    hf: Path,
    plans: dict | None = None,
    **details,
) -> None:
    """Write model.json, hf/ and plans/ of a checkpoint folder (rank 0).

    Args:
        parents: a role -> an opened checkpoint's identity.
        plans: those that its parent's line was cut by (see `ancestry.plans`).
        details: what was done to the parents.
    """
    if runtime.rank() == 0:
        out_dir = Path(out_dir)
        ship(hf, out_dir)
        for digest, text in (plans or {}).items():
            (out_dir / "plans").mkdir(exist_ok=True)
            replace_text(out_dir / "plans" / f"{digest}.json", text)
        made = lineage(parents, **details)
        model = {"architecture": arch.to_json(), "fingerprint": fingerprint, "lineage": made}
        replace_text(out_dir / "model.json", json.dumps(model, indent=1))


def ship(hf: Path, out_dir: Path) -> None:
    """Copy what is not weights of a Hugging Face folder to out_dir/hf."""
    (out_dir / "hf").mkdir(parents=True, exist_ok=True)
    for file in shipped(hf):
        shutil.copy2(file, place(file, hf, out_dir / "hf"))


def lineage(parents: dict, **details) -> dict:
    """Where weights come from: their parents (role -> identity), this command, the versions that run it, and what it did."""
    return {"parents": parents, "command": command(), "versions": versions(), **details}


def command() -> str:
    """This process's command line, as a shell takes it."""
    return shlex.join(sys.argv)


def identity(checkpoint: Checkpoint) -> dict:
    return {"path": str(checkpoint.path), "fingerprint": checkpoint.fingerprint, "step": checkpoint.step_dir.name}


def versions() -> dict:
    import minitron_mcore

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        # Its own __version__ has the git commit of the current folder in it.
        "megatron-core": metadata.version("megatron-core"),
        "minitron_mcore": minitron_mcore.__version__,
    }


def sharded(parameter: table.Parameter, pieces: list[tuple[tuple[int, ...], Tensor]], replica: tuple[int, ...]) -> dict:
    """Pieces of one parameter as `ShardedTensor`s in a dict.

    Args:
        parameter: gives key and global shape.
        pieces: (offset in the global tensor, local tensor); their sizes may differ between ranks.
        replica: all zeros on the one rank that writes a piece which several hold.
    """
    return {
        f"{parameter.name}@{n}": ShardedTensor(
            parameter.name, data, data.dtype, tuple(data.shape), parameter.shape, offset, None, replica_id=replica
        )
        for n, (offset, data) in enumerate(pieces)
        if data.numel()
    }


@dataclass(frozen=True)
class Shard:
    """Where a rank's tensor of a parameter lies in the checkpoint's tensor `key` of `shape`; padding rows lie nowhere."""

    key: str
    shape: tuple[int, ...]
    replica: tuple[int, ...]
    """All zeros on one of the ranks that hold the same; the last is a number among data-parallel copies."""
    ranges: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    """(offset in the rank's tensor, offset in the checkpoint's, shape) of each part."""


def model_shards(model: build.Model, arch: Architecture) -> dict[nn.Parameter, Shard]:
    """Of a rank's parameters: its stage's blocks, its tensor-parallel ranges, its experts. Keys and shapes are the table's."""
    by_name, tp, found = {p.name: p for p in table.parameters(arch)}, runtime.tp_group(), {}
    for name, tensor in build.named_parameters(model):
        parameter, tp_dim = by_name[name], by_name[name].row.tp_dim
        tied_copy = name == "embedding.word_embeddings.weight" and not runtime.is_first_stage()
        replica = (int(tied_copy), 0 if tp_dim is not None else tp.rank(), runtime.dp_cp_group().rank())
        if parameter.expert is not None:
            replica = (0, 0, runtime.expert_dp_group().rank())
        found[tensor] = Shard(
            name, parameter.shape, replica, ranges(parameter, tuple(tensor.shape), tp.rank(), tp.size())
        )
    return found


def model_state(model: build.Model, arch: Architecture) -> dict:
    """A model's parameters as sharded tensors in the table's terms; each views the parameter's memory (see `model_shards`)."""
    return {
        f"{n}.{k}": ShardedTensor(
            shard.key, part, part.dtype, tuple(part.shape), shard.shape, offset, None, replica_id=shard.replica
        )
        for n, (tensor, shard) in enumerate(model_shards(model, arch).items())
        for k, (offset, part) in enumerate(_parts(tensor.data, shard.ranges))
        if part.numel()
    }


def ranges(parameter: table.Parameter, shape: tuple[int, ...], tp_rank: int, tp_size: int) -> list[tuple]:
    """`Shard.ranges` of a rank's tensor of this shape."""
    dim, found, start = parameter.row.tp_dim, [], 0
    if dim is None:
        return [((0,) * len(shape), (0,) * len(shape), shape)]
    for low, high in table.ranges(parameter.row.axes[dim], parameter.arch, tp_rank, tp_size):
        local, offset = (tuple(x if n == dim else 0 for n in range(len(shape))) for x in (start, low))
        found.append((local, offset, (*shape[:dim], high - low, *shape[dim + 1 :])))
        start += high - low
    return found


def views(parameter: table.Parameter, tensor: Tensor, tp_rank: int, tp_size: int) -> list[tuple]:
    """(global offset, view) of each range that a rank's local tensor of a parameter is made of."""
    return _parts(tensor, ranges(parameter, tuple(tensor.shape), tp_rank, tp_size))


def _parts(tensor: Tensor, ranges: list[tuple]) -> list[tuple[tuple[int, ...], Tensor]]:
    spans = [(offset, [slice(a, a + n) for a, n in zip(local, shape, strict=True)]) for local, offset, shape in ranges]
    return [(offset, tensor[tuple(span)]) for offset, span in spans]


def save(out_dir: str | Path, step: int, state: dict, streamed) -> None:
    """Write a sharded state dict as `step_N` and point `latest` at it (collective). Older steps are removed after that.

    Of what data-parallel ranks hold alike, each writes an equal share. `streamed`, a `stream.Streamed`, writes, and hashes what it
    writes; where it writes in the background, `publish` is left to do after `streamed.wait`.
    """
    part = Path(out_dir) / f"step_{step:07d}.part"
    if runtime.rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    runtime.barrier()
    shared = FullyParallelSaveStrategyWrapper(streamed, runtime.dp_cp_group())
    if streamed.background:
        streamed.request = dist_checkpointing.save(
            state, str(part), shared, async_sharded_save=True, async_strategy="mcore"
        )
    else:
        dist_checkpointing.save(state, str(part), shared, async_strategy="mcore")
        publish(part, streamed)


def publish(part: Path, streamed) -> None:
    """Make a written step the newest one (collective)."""
    streamed.seal(part)
    runtime.barrier()
    if runtime.rank() == 0:
        shutil.rmtree(part.with_suffix(""), ignore_errors=True)
        os.replace(part, part.with_suffix(""))
        replace_text(part.parent / "latest", part.stem)
        for old in part.parent.glob("step_*"):
            if old.name != part.stem:
                shutil.rmtree(old)
    runtime.barrier()


def load(checkpoint: Checkpoint, state: dict) -> dict:
    """Read a sharded state dict from a checkpoint's newest step (collective); tensors given as data are filled in place.

    Raises:
        UserError: a shard that is truncated, changed or missing, or a tensor that the checkpoint does not have.
    """
    with runtime.agreed(), distcp.undamaged(checkpoint.step_dir):
        files = distcp.Files(checkpoint.step_dir)
        # Before loading: a flipped bit would otherwise be noticed nowhere.
        _verify(checkpoint.step_dir, files)
    with runtime.agreed(), distcp.undamaged(checkpoint.step_dir):
        return distcp.load(state, files)


def _verify(step_dir: Path, files: distcp.Files) -> None:
    """Hash this rank's share of the files and compare with the manifest: ranks together read a checkpoint once."""
    hashes = distcp.manifest(step_dir)
    for name in (".metadata", *(info.relative_path for info in files.index.storage_data.values())):
        if name not in hashes:
            raise CheckpointingException(f"integrity.json does not list {name}")
    for name in sorted(hashes)[runtime.rank() :: dist.get_world_size()]:
        if disk.sha256(step_dir / name) != hashes[name]:
            raise CheckpointingException(f"{name} is not what was written")


def load_weights(model: build.Model, checkpoint: Checkpoint) -> None:
    """Set a model's parameters from a checkpoint of any layout (collective); padding rows of the vocabulary become zero.

    Raises:
        UserError: see `load`; a tensor of zeros or with NaN where weights belong.
    """
    for name, parameter in build.named_parameters(model):
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            parameter.data.zero_()
    state = model_state(model, checkpoint.arch)
    loaded = load(checkpoint, state)
    for key, wanted in state.items():  # what was loaded also holds a training run's own state
        if loaded[key].data_ptr() != wanted.data.data_ptr():
            wanted.data.copy_(loaded[key])
    with runtime.agreed():
        for name, parameter in build.named_parameters(model):
            peak = parameter.detach().abs().max().item()
            centred = parameter.dim() == 1 and checkpoint.arch.traits.norm == "LayerNorm1P"
            zero = peak == 0 and not (centred or name.endswith("bias"))
            if zero or not peak < float("inf"):
                raise UserError(
                    f"{name} in {checkpoint.path} has largest magnitude {peak}: these are no trained weights."
                )


def build_model(checkpoint: Checkpoint, parallel, dtype: str, performance=None) -> build.Model:
    """Build a checkpoint's model in a layout and set its weights (collective); `performance`: see `build.build`."""
    with runtime.agreed():
        count, held = table.count(checkpoint.arch), sum(x.stat().st_size for x in checkpoint.step_dir.iterdir())
        if count > held:  # of a byte or more each
            raise UserError(f"{checkpoint.path}/model.json claims {count:,} parameters, but {held:,} bytes are there.")
    model = build.build(checkpoint.arch, parallel, dtype, performance)
    load_weights(model, checkpoint)
    return model
