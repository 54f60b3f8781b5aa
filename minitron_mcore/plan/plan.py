"""A plan: the kept indices of every axis, chosen from scores by targets. JSON that a person can read and diff."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minitron_mcore.config import PruneConfig
from minitron_mcore.errors import UserError
from minitron_mcore.importance.scores import Scores
from minitron_mcore.models import table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.plan.target import target_architecture

FILE = "plan.json"


@dataclass(frozen=True)
class Plan:
    """Kept indices, ascending, counted from 0 in the source; `ffn`, `heads` and `experts` by source block."""

    source: Architecture
    target: Architecture
    fingerprint: str
    """The source checkpoint's."""
    scores: str
    """Digest of the scores that ranked."""
    hidden: list[int]
    blocks: list[int]
    ffn: dict[int, list[int]]
    heads: dict[int, list[int]]
    experts: dict[int, dict[int, list[int]]] = dataclasses.field(default_factory=dict)
    """In a mixture of experts, instead of `ffn`: the kept experts of a block, and of each its kept ffn channels."""
    statistic: dict[str, str] = dataclasses.field(default_factory=dict)
    """What the scores say of themselves: metric, aggregation, samples, tokens, data."""

    def __post_init__(self):
        sizes = {"hidden": (self.hidden, self.source.hidden, self.target.hidden)}
        sizes["blocks"] = (self.blocks, self.source.blocks, self.target.blocks)
        for block in self.blocks:
            sizes[f"heads of block {block}"] = (self.heads.get(block, []), self.source.heads, self.target.heads)
            experts = self.experts.get(block, {})
            if self.source.experts:
                sizes[f"experts of block {block}"] = (list(experts), self.source.experts, self.target.experts)
            ffn = {f"expert {n} of block {block}": kept for n, kept in experts.items()}
            for name, kept in (ffn if self.source.experts else {f"block {block}": self.ffn.get(block, [])}).items():
                sizes[f"ffn of {name}"] = (kept, self.source.ffn, self.target.ffn)
        for name, (kept, total, wanted) in sizes.items():
            if sorted(set(kept)) != list(kept) or len(kept) != wanted or not 0 <= kept[0] <= kept[-1] < total:
                raise UserError(
                    f"the plan's {name} must be {wanted} ascending indices below {total}; it has {len(kept)}."
                )

    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """One line a list of indices, so that a diff shows which block changed."""
        data = dataclasses.asdict(self)
        data["parameters"] = {"source": table.count(self.source), "target": table.count(self.target)}
        lines = []
        for key, value in data.items():
            if key in ("ffn", "heads", "experts"):
                rows = ",\n".join(f'  "{block}": {json.dumps(kept)}' for block, kept in value.items())
                lines.append(f'"{key}": {{\n{rows}\n }}')
            else:
                lines.append(f'"{key}": {json.dumps(value)}')
        return "{\n " + ",\n ".join(lines) + "\n}\n"

    def dropped_blocks(self) -> list[int]:
        return [block for block in range(self.source.blocks) if block not in self.blocks]

    def summary(self) -> list[dict]:
        return compare(self.source, self.target)


def compare(source: Architecture, target: Architecture) -> list[dict]:
    """Rows for a table: axis, kept, total, share."""
    s, t = source, target
    pairs = {
        "blocks": (t.blocks, s.blocks),
        "hidden": (t.hidden, s.hidden),
        "ffn": (t.ffn, s.ffn),
        "heads": (t.heads, s.heads),
        **({"experts": (t.experts, s.experts)} if s.experts else {}),
        "key/value groups": (t.groups, s.groups),
        "parameters": (table.count(t), table.count(s)),
        "without embeddings": (table.count(t, embeddings=False), table.count(s, embeddings=False)),
    }
    return [{"axis": k, "kept": a, "of": b, "share": a / b} for k, (a, b) in pairs.items()]


def load_plan(path: str | Path) -> Plan:
    """Read plan.json (or the folder of a plan run).

    Raises:
        UserError: no such file, or not a plan.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"no plan at {path}: run launch/plan.py first, or give plan=/path/to/{FILE}.")
    try:
        data = json.loads(path.read_text())
        data.pop("parameters")
        for key in ("source", "target"):
            data[key] = Architecture(**data[key])
        for key in ("ffn", "heads"):
            data[key] = {int(block): kept for block, kept in data[key].items()}
        experts = data.get("experts", {})
        data["experts"] = {int(b): {int(e): kept for e, kept in chosen.items()} for b, chosen in experts.items()}
        return Plan(**data)
    except (json.JSONDecodeError, KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is not a plan ({type(error).__name__}: {error}): run launch/plan.py again.") from error


def top(scores: Tensor, count: int) -> list[int]:
    """Indices of the `count` highest, ascending; of equals the first."""
    return sorted(torch.sort(scores, descending=True, stable=True).indices[:count].tolist())


def make_plan(source: Architecture, fingerprint: str, scores: Scores, prune: PruneConfig) -> Plan:
    """Rank every axis by its scores and keep the best: hidden over the whole model, ffn and heads in each block (heads an equal
    number in each group), experts in each block and ffn in each kept expert, blocks by the cosine between their input and
    output, or all but the ones named.

    Raises:
        UserError: targets that the source cannot meet.
    """
    target = target_architecture(source, prune)
    vectors = scores.vectors
    if prune.drop_blocks:
        blocks = [block for block in range(source.blocks) if block not in prune.drop_blocks]
    else:
        blocks = top(torch.stack([vectors[f"blocks.{i}.block"] for i in range(source.blocks)]), target.blocks)
    per_group = target.heads_per_group
    heads = {}
    for block in blocks:
        grouped = vectors[f"blocks.{block}.heads"].view(source.groups, -1)
        heads[block] = [g * source.heads_per_group + h for g, row in enumerate(grouped) for h in top(row, per_group)]
    ffn, experts = {}, {}
    for block in blocks:
        channels = vectors[f"blocks.{block}.ffn"]
        if source.experts:
            chosen = top(vectors[f"blocks.{block}.experts"], target.experts)
            experts[block] = {expert: top(channels[expert], target.ffn) for expert in chosen}
        else:
            ffn[block] = top(channels, target.ffn)
    return Plan(
        source=source,
        target=target,
        fingerprint=fingerprint,
        scores=scores.digest(),
        hidden=top(vectors["hidden"], target.hidden),
        blocks=blocks,
        ffn=ffn,
        heads=heads,
        experts=experts,
        statistic=dict(sorted(scores.metadata.items())),  # safetensors gives them in any order
    )
