"""Importance scores: one safetensors file of full (unsharded) vectors, identical for every parallel layout."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minitron_mcore.errors import UserError, result_file
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.reading import FORMAT_VERSION, check_format_version, open_tensors

FILE = "scores.safetensors"


@dataclass(frozen=True)
class Scores:
    """Scores of every axis, and how they were computed."""

    vectors: dict[str, Tensor]
    """hidden [H], blocks.i.ffn [F], blocks.i.heads [N], blocks.i.{attention,mlp,block} []; with experts, blocks.i.ffn is [E, F]
    and blocks.i.experts is [E]. fp32."""
    metadata: dict[str, str]

    def digest(self) -> str:
        """Hash of vectors and metadata, 16 hexadecimal digits."""
        hasher = hashlib.sha256(repr(sorted(self.metadata.items())).encode())
        for name in sorted(self.vectors):
            hasher.update(name.encode() + self.vectors[name].numpy().tobytes())
        return hasher.hexdigest()[:16]


def expected_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of each vector of a model's scores, by name."""
    shapes: dict[str, tuple[int, ...]] = {"hidden": (arch.hidden,)}
    shapes |= {f"blocks.{block}.block": () for block in range(arch.blocks)}
    for block, part in arch.layers:
        at = f"blocks.{block}"
        shapes[f"{at}.{part}"] = ()
        if part == "attention":
            shapes[f"{at}.heads"] = (arch.heads,)
        elif arch.experts:
            shapes |= {f"{at}.ffn": (arch.experts, arch.ffn), f"{at}.experts": (arch.experts,)}
        else:
            shapes[f"{at}.ffn"] = (arch.ffn,)
    return shapes


def save_scores(out_dir: Path, scores: Scores) -> Path:
    """Write FILE into a folder; returns its path."""
    path = Path(out_dir) / FILE
    metadata = scores.metadata | {"format_version": str(FORMAT_VERSION)}
    save_file({k: v.contiguous() for k, v in scores.vectors.items()}, path, metadata=metadata)
    return path


def read_scores(path: Path) -> Scores:
    """The vectors and metadata of a scores file, `format_version` excepted, so that it has no part in the digest.

    Raises:
        UserError: a damaged file, another format version.
    """
    remedy = "run launch/importance.py again"
    with open_tensors(path, "pt", remedy) as file:
        metadata = file.metadata() or {}
        vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if version := metadata.pop("format_version", ""):
        version = int(version) if version.isdecimal() else version  # safetensors keeps strings only
        check_format_version({"format_version": version}, path, remedy)
    return Scores(vectors, metadata)


def load_scores(path: str | Path, arch: Architecture, fingerprint: str) -> Scores:
    """Read scores and check that they belong to a model.

    Args:
        path: the file, or the folder that an importance run wrote.
        arch, fingerprint: of the checkpoint that will be pruned.

    Raises:
        UserError: the file is missing or damaged, belongs to another model, or lacks a finite vector of the expected shape.
    """
    path = result_file(path, FILE, "scores", "run launch/importance.py first, or give scores=")
    scores = read_scores(path)
    vectors, metadata = scores.vectors, scores.metadata
    if metadata.get("fingerprint") != fingerprint:
        raise UserError(
            f"the scores in {path} belong to model {metadata.get('fingerprint')}, but the source is {fingerprint}: "
            "run launch/importance.py on this source."
        )
    for name, shape in expected_shapes(arch).items():
        if name not in vectors or tuple(vectors[name].shape) != shape:
            actual = tuple(vectors[name].shape) if name in vectors else "nothing"
            raise UserError(f"{path} has {actual} for {name}, expected shape {shape}: run launch/importance.py again.")
        if vectors[name].dtype not in (torch.float32, torch.float64):
            kind = str(vectors[name].dtype).removeprefix("torch.")
            raise UserError(f"{path} has {name} in {kind}, expected float32: run launch/importance.py again.")
    check_finite(vectors, path)
    return scores


def check_finite(vectors: dict[str, Tensor], origin: str | Path) -> None:
    """Raise UserError for the first vector with a NaN or an infinity; `origin` names their source in the message."""
    for name, vector in vectors.items():
        if not torch.isfinite(vector).all():
            raise UserError(
                f"{origin} gives a value that is not finite in {name}: check the model and its data, then score again."
            )


def summary(scores: Scores) -> list[dict[str, Any]]:
    """Rows for a table: quantiles of the hidden scores and, per block, quantiles of the ffn scores and the depth scores."""
    vectors = scores.vectors
    rows = [_quantiles("hidden", vectors["hidden"])]
    blocks = sum(name.endswith(".block") for name in vectors)
    for at in (f"blocks.{i}" for i in range(blocks)):
        parts = (part for part in ("block", "attention", "mlp") if f"{at}.{part}" in vectors)
        depth = {part: vectors[f"{at}.{part}"].item() for part in parts}
        quantiles = _quantiles(f"{at}.ffn", vectors[f"{at}.ffn"]) if f"{at}.ffn" in vectors else {"scores": at}
        rows.append(quantiles | depth)
    return rows


def _quantiles(name: str, vector: Tensor) -> dict[str, Any]:
    low, middle, high = torch.quantile(vector.flatten(), torch.tensor([0.1, 0.5, 0.9])).tolist()
    return {"scores": name, "10 %": low, "median": middle, "90 %": high}
