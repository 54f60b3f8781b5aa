"""Run folders, which every stage reads and writes, and the checkpoints in them.

    out_dir/
      config.yaml      resolved config of the run that wrote the folder
      model.json       format version, architecture, fingerprint and lineage (parents, hashes, versions, command)
      hf/              config, tokenizer and generation files of the source model, unchanged
      plan.json        pruned checkpoints only: all kept indices
      plans/           plans of the ancestors, named by digest
      step_0000000/    Megatron distributed checkpoint; tensors have the parameter table's keys and unpadded global shapes
      inputs.json      path and fingerprint of each input (see `stage_record`)
      .complete        the run has finished; manifest of its files, seconds, ranks and device

The content is independent of the parallel layout that wrote it. A step gets its name after it is on disk and hashed (see `steps`),
so an interrupted run leaves its last complete step.
"""

import platform
import shlex
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minitron_mcore.checkpoint import claim, disk, safe_metadata, sharded, steps
from minitron_mcore.checkpoint.hf_assets import copy_path, hf_asset_files
from minitron_mcore.config.model import ArchitectureConfig
from minitron_mcore.config.performance import PerformanceConfig
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.errors import UserError
from minitron_mcore.models import architecture, build, parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups
from minitron_mcore.reading import FORMAT_VERSION, check_format_version, damage_as_user_error, read_json

from megatron.core.dist_checkpointing.core import CheckpointingException  # isort: skip


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder."""

    path: Path
    arch: Architecture
    fingerprint: str
    """Identifies the weights: a hash of the source tensors, or of the parent's fingerprint and the operation on it."""
    lineage: dict[str, Any]
    step: str
    """Name of the step; the newest when the folder was opened, unless another was asked for."""

    @property
    def step_dir(self) -> Path:
        return self.path / self.step

    @property
    def hf(self) -> Path:
        return self.path / "hf"


def open_checkpoint(
    path: str | Path, key: str = "source", wanted: ArchitectureConfig | None = None, step: str = steps.NEWEST
) -> Checkpoint:
    """Open a checkpoint folder without reading weights.

    Args:
        key: config option that holds the path, for messages.
        wanted: required architecture (`model.architecture`); None accepts any.
        step: "newest", "best" (of the lowest held-out loss), or a number.

    Raises:
        UserError: no checkpoint, no such step, one that is not complete, a damaged model.json or one of another format
            version, or another architecture.
    """
    path = Path(path)
    if not (path / "model.json").is_file():
        raise UserError(
            f"no checkpoint at {path}: run launch/convert.py on the model's Hugging Face folder (model.hf=/path), then the "
            f"stages up to this one, or give the folder of another with {key}=/path."
        )
    remedy = "make the checkpoint again"
    with damage_as_user_error(path / "model.json", remedy):
        model = read_json(path / "model.json", remedy)
        check_format_version(model, path / "model.json", remedy)
        arch = architecture.from_json(model["architecture"], path / "model.json")
        checkpoint = Checkpoint(path, arch, model["fingerprint"], model["lineage"], _step_name(path, step))
        if not isinstance(checkpoint.fingerprint, str) or not isinstance(checkpoint.lineage, dict):
            raise TypeError("fingerprint is no text, or lineage is no object")
    architecture.check_matches(checkpoint.arch, architecture.from_config(wanted), path)
    return checkpoint


def _step_name(path: Path, wanted: str) -> str:
    """Name of a step. A stage never reads an older one than wanted by itself: its result would be of another model."""
    found = steps.published(path)
    if wanted != steps.NEWEST:
        number = steps.best(path) if wanted == "best" else int(wanted) if wanted.isdecimal() else None
        if number is None or number not in [step.number for step in found]:
            numbers = ", ".join(str(step.number) for step in reversed(found))
            raise UserError(
                f"step is {wanted}, but the checkpoint at {path} has steps {numbers or 'none'}"
                f"{'' if steps.best(path) is not None else ' and no best one (see distill.eval_every)'}: give one of them, or "
                "newest."
            )
        found = [step for step in found if step.number <= number]
    if not found:
        raise UserError(
            f"the checkpoint at {path} holds no complete step: the run that wrote it did not finish; run it again."
        )
    if problem := found[0].problem():
        older = [step.path.name for step in found[1:] if not step.problem()]
        raise UserError(f"{problem} " + (f"Or move it away to use {older[0]}." if older else ""))
    return found[0].path.name


def describe(
    out_dir: str | Path,
    arch: Architecture,
    fingerprint: str,
    parents: dict[str, Any],
    hf: Path,
    plans: dict[str, str] | None = None,
    **details: Any,
) -> None:
    """Write model.json, hf/ and plans/ of a checkpoint folder on rank 0 (collective).

    Args:
        parents: role ("source", "student", "teacher", ...) -> `identity` of that checkpoint.
        hf: Hugging Face folder whose config and tokenizer are copied.
        plans: those of the parent (see `lineage.plans`).
        details: further entries of the lineage, such as settings and the parents' lineages.

    Raises:
        UserError: the folder cannot be written.
    """
    out_dir = Path(out_dir)
    with process_groups.raise_on_all_ranks(), claim.writing(out_dir):
        if process_groups.rank() != 0:
            return
        copy_hf_assets(hf, out_dir)
        for digest, text in (plans or {}).items():
            (out_dir / "plans").mkdir(exist_ok=True)
            disk.replace_text(out_dir / "plans" / f"{digest}.json", text)
        model = {
            "format_version": FORMAT_VERSION,
            "architecture": arch.to_json(),
            "fingerprint": fingerprint,
            "lineage": make_lineage(parents, **details),
        }
        disk.write_json(out_dir / "model.json", model)


def copy_hf_assets(hf: Path, out_dir: Path) -> None:
    """Copy the files of a Hugging Face folder other than weights to out_dir/hf."""
    (out_dir / "hf").mkdir(parents=True, exist_ok=True)
    for file in hf_asset_files(hf):
        shutil.copy2(file, copy_path(file, hf, out_dir / "hf"))


def make_lineage(parents: dict[str, Any], **details: Any) -> dict[str, Any]:
    """Provenance of weights: parents (role -> identity), command line, package versions and `details`."""
    return {"parents": parents, "command": command(), "versions": versions(), **details}


def command() -> str:
    """Command line of this process, quoted for a shell."""
    return shlex.join(sys.argv)


def identity(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"path": str(checkpoint.path), "fingerprint": checkpoint.fingerprint, "step": checkpoint.step_dir.name}


def versions() -> dict[str, str]:
    import minitron_mcore

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        # Not __version__, which contains the git commit of the current folder.
        "megatron-core": metadata.version("megatron-core"),
        "minitron_mcore": minitron_mcore.__version__,
    }


def load(checkpoint: Checkpoint, state: dict[str, Any]) -> dict[str, Any]:
    """`read_step` of the checkpoint's step, after `verify` (collective)."""
    return read_step(verify(checkpoint.step_dir), state)


def read_step(files: safe_metadata.Files, state: dict[str, Any]) -> dict[str, Any]:
    """Read a sharded state dict from a verified step into its own tensors (collective).

    Raises:
        UserError: the step lacks a tensor, or a file cannot be read.
    """
    with process_groups.raise_on_all_ranks(), safe_metadata.damage_as_user_error(Path(files.path)):
        return safe_metadata.load(state, files)


def verify(step_dir: Path) -> safe_metadata.Files:
    """Compare all files of a step with its manifest (collective). Each rank hashes an equal share.

    Raises:
        UserError: a file is truncated, changed or missing.
    """
    with process_groups.raise_on_all_ranks(), safe_metadata.damage_as_user_error(step_dir):
        files = safe_metadata.Files(step_dir)
        hashes, _ = steps.read_manifest(step_dir)
        for name in (".metadata", *(info.relative_path for info in files.index.storage_data.values())):
            if name not in hashes:
                raise CheckpointingException(f"{steps.MANIFEST} does not list {name}")
        for name in sorted(hashes)[process_groups.rank() :: dist.get_world_size()]:
            if disk.sha256(step_dir / name) != hashes[name]:
                raise CheckpointingException(f"{name} is not what was written")
    return files


def newest_valid_step(out_dir: str | Path) -> safe_metadata.Files:
    """The newest step of a run folder that passes `verify` (collective). Newer ones are left as they are, and logged.

    Raises:
        UserError: there is none; names each step and what is wrong with it.
    """
    found, problems = [], []
    if process_groups.rank() == 0:
        found = [(step.path, step.problem()) for step in steps.published(out_dir)]
    for path, problem in process_groups.from_rank_0(found):
        try:
            if problem:
                raise UserError(problem)
            files = verify(path)
        except UserError as error:
            reason, _, _ = str(error).rpartition(": ")  # without the remedy
            problems.append(reason)
            continue
        for reason in problems:
            process_groups.log(f"warning: {reason}: continuing from {path.name} instead.")
        return files
    raise UserError(
        f"{out_dir} has no step to continue from ({'; '.join(problems) or 'none was saved'}): its files are unchanged; restore a "
        "step from a copy, or choose another out_dir to start anew."
    )


def load_weights(model: build.Model, checkpoint: Checkpoint) -> None:
    """Set a model's parameters from a checkpoint written in any layout (collective). Padding rows of the vocabulary become 0.

    Raises:
        UserError: see `load`; a value is not finite; the embedding table or the output head is all zeros. (Projections of zeros
            are allowed: they add blocks to a model without changing it.)
    """
    padded = ("embedding.word_embeddings.weight", "output_layer.weight")
    for name, parameter in build.named_parameters(model):
        if name in padded:
            parameter.data.zero_()
    state = sharded.tensors(sharded.model_shards(model, checkpoint.arch))
    loaded = load(checkpoint, state)
    for key, wanted in state.items():
        if loaded[key].data_ptr() != wanted.data.data_ptr():
            wanted.data.copy_(loaded[key])
    with process_groups.raise_on_all_ranks():
        for name, parameter in build.named_parameters(model):
            peak = parameter.detach().abs().max().item()
            if (peak == 0 and name in padded) or not peak < float("inf"):
                raise UserError(
                    f"{name} in {checkpoint.path} has largest magnitude {peak}: these are no trained weights."
                )


def build_model(
    checkpoint: Checkpoint, parallel: ParallelConfig, dtype: str, performance: PerformanceConfig | None = None
) -> build.Model:
    """Build a checkpoint's model in a parallel layout and load its weights (collective). See `build.build` for `performance`.

    Raises:
        UserError: see `load_weights`; model.json describes more parameters than the files have bytes. Checked before allocation.
    """
    with process_groups.raise_on_all_ranks():
        count, size = (
            parameter_table.count(checkpoint.arch),
            sum(file.stat().st_size for file in checkpoint.step_dir.iterdir()),
        )
        if count > size:
            raise UserError(
                f"{checkpoint.path}/model.json describes {count:,} parameters, but {checkpoint.step_dir} has {size:,} bytes: make "
                "the checkpoint again."
            )
    model = build.build(checkpoint.arch, parallel, dtype, performance)
    load_weights(model, checkpoint)
    return model
