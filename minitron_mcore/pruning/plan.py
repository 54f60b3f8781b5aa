"""A plan: the kept indices of every axis, chosen by scores for target sizes; stored as readable JSON."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_mcore.config.settings import PruneConfig
from minitron_mcore.errors import UserError, result_file
from minitron_mcore.importance.scores import Scores
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.pruning.target import kept_layers, target_architecture
from minitron_mcore.reading import FORMAT_VERSION, check_format_version, damage_as_user_error, read_json

FILE = "plan.json"


@dataclass(frozen=True)
class Plan:
    """Kept indices of the source, ascending, from 0.

    `ffn`, `heads`, `groups`, `merged` and `experts` have an entry per source block that keeps the layer.

    Raises:
        UserError: indices that do not fit the source and target.
    """

    source: Architecture
    target: Architecture
    fingerprint: str
    """Of the source checkpoint."""
    scores: str
    """Digest of the scores."""
    hidden: list[int]
    blocks: list[int]
    ffn: dict[int, list[int]]
    heads: dict[int, list[int]]
    experts: dict[int, dict[int, list[int]]] = dataclasses.field(default_factory=dict)
    """With experts, instead of `ffn`: block -> kept expert -> its kept ffn channels."""
    groups: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    """Key/value groups; a plan of an earlier version has none and keeps all."""
    merged: dict[int, dict[int, int]] = dataclasses.field(default_factory=dict)
    """Kept query head -> dropped head of its group that is merged into it: queries q become q + (q - dropped q)."""
    statistic: dict[str, str] = dataclasses.field(default_factory=dict)
    """Metadata of the scores: metric, aggregation, samples, tokens, data."""
    format_version: int = FORMAT_VERSION
    """0 for a plan read from a file without a version, whose digest stays the same."""

    def __post_init__(self) -> None:
        source, target = self.source, self.target
        if not self.groups:
            object.__setattr__(self, "groups", {block: list(range(source.groups)) for block in self.heads})
        self._check("hidden", self.hidden, source.hidden, target.hidden)
        self._check("blocks", self.blocks, source.blocks, target.blocks)
        for part in ("attention", "mlp"):
            if absent := sorted(set(self.blocks_with(part)) - set(source.blocks_with(part))):
                raise UserError(
                    f"the plan keeps the {part} layer of block {absent[0]}, which the source does not have."
                )
        for block in self.blocks_with("attention"):
            self._check(f"groups of block {block}", self.groups.get(block, []), source.groups, target.groups)
            self._check(f"heads of block {block}", self.heads.get(block, []), source.heads, target.heads)
            self._check_heads(block)
        for block in self.blocks_with("mlp"):
            if not source.experts:
                self._check(f"ffn of block {block}", self.ffn.get(block, []), source.ffn, target.ffn)
                continue
            experts = self.experts.get(block, {})
            self._check(f"experts of block {block}", list(experts), source.experts, target.experts)
            for expert, ffn in experts.items():
                self._check(f"ffn of expert {expert} of block {block}", ffn, source.ffn, target.ffn)

    def _check(self, name: str, kept: list[int], total: int, count: int) -> None:
        if not all(type(index) is int for index in kept):
            raise UserError(
                f"the plan's {name} must be whole numbers; it has {next(x for x in kept if type(x) is not int)!r}."
            )
        if not kept or sorted(set(kept)) != list(kept) or len(kept) != count or kept[0] < 0 or kept[-1] >= total:
            raise UserError(f"the plan's {name} must be {count} ascending indices below {total}; it has {len(kept)}.")

    def _check_heads(self, block: int) -> None:
        """Every kept group has the same number of heads; a merged head is dropped, and in the group of its kept head."""
        size, heads, pairs = self.source.heads_per_group, self.heads[block], self.merged.get(block, {})
        groups, each = self.groups[block], self.target.heads_per_group
        if [head // size for head in heads] != [group for group in groups for _ in range(each)]:
            raise UserError(
                f"the plan's heads of block {block} must be {each} in each of its key/value groups {groups} of {size}."
            )
        for kept, dropped in pairs.items():
            if kept not in heads or dropped in heads or kept // size != dropped // size:
                raise UserError(
                    f"the plan merges head {dropped} into head {kept} of block {block}: expected a dropped head and a kept "
                    "one of its group."
                )

    def blocks_with(self, part: str) -> list[int]:
        """The source's blocks that keep their "attention" or "mlp" layer."""
        return [self.blocks[number] for number in self.target.blocks_with(part)]

    def digest(self) -> str:
        """Hash of the JSON, 16 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """One line per list of indices, so that a diff shows which block changed."""
        data = dataclasses.asdict(self)
        if version := data.pop("format_version"):
            data = {"format_version": version, **data}
        data["parameters"] = {
            "source": parameter_table.count(self.source),
            "target": parameter_table.count(self.target),
        }
        lines = []
        for key, value in data.items():
            if key in ("ffn", "heads", "groups", "merged", "experts"):
                rows = ",\n".join(f'  "{block}": {json.dumps(kept)}' for block, kept in value.items())
                lines.append(f'"{key}": {{\n{rows}\n }}')
            else:
                lines.append(f'"{key}": {json.dumps(value)}')
        return "{\n " + ",\n ".join(lines) + "\n}\n"

    def dropped_blocks(self) -> list[int]:
        """The source's blocks that are not kept."""
        return [block for block in range(self.source.blocks) if block not in self.blocks]

    def dropped_layers(self, part: str) -> list[int]:
        """The kept blocks whose "attention" or "mlp" layer is dropped."""
        return [
            block
            for block in self.source.blocks_with(part)
            if block in self.blocks and block not in self.blocks_with(part)
        ]

    def notes(self) -> list[str]:
        """Lines about dropped blocks, dropped layers and merged heads."""
        lines = [f"dropped blocks: {self.dropped_blocks() or 'none'}"]
        for part in ("attention", "mlp"):
            if dropped := self.dropped_layers(part):
                lines.append(f"blocks that lose their {part} layer: {dropped}")
        if pairs := sum(map(len, self.merged.values())):
            lines.append(f"dropped query heads merged into kept ones: {pairs}")
        return lines

    def summary(self) -> list[dict[str, Any]]:
        """Rows of `compare` for source and target."""
        return compare(self.source, self.target)


def compare(source: Architecture, target: Architecture) -> list[dict[str, Any]]:
    """Rows for a table: each size of the target, of the source, and their ratio."""
    s, t = source, target
    layers = {"attention layers": "attention", "MLP layers": "mlp"} if len(t.layers) < 2 * t.blocks else {}
    pairs = {
        "blocks": (t.blocks, s.blocks),
        **{name: (len(t.blocks_with(part)), len(s.blocks_with(part))) for name, part in layers.items()},
        "hidden": (t.hidden, s.hidden),
        "ffn": (t.ffn, s.ffn),
        "heads": (t.heads, s.heads),
        **({"experts": (t.experts, s.experts)} if s.experts else {}),
        "key/value groups": (t.groups, s.groups),
        "parameters": (parameter_table.count(t), parameter_table.count(s)),
        "without embeddings": (parameter_table.count(t, embeddings=False), parameter_table.count(s, embeddings=False)),
    }
    return [{"axis": k, "kept": a, "of": b, "share": a / b} for k, (a, b) in pairs.items()]


def load_plan(path: str | Path) -> Plan:
    """Read plan.json, or the folder of a plan run.

    Raises:
        UserError: the file is missing or is not a plan.
    """
    path = result_file(path, FILE, "plan", "run launch/plan.py first, or give plan=")
    remedy = "run launch/plan.py again"
    data = read_json(path, remedy)
    check_format_version(data, path, remedy)
    data.setdefault("format_version", 0)
    try:
        with damage_as_user_error(path, remedy):
            data.pop("parameters")
            for key in ("source", "target"):
                data[key] = Architecture(**data[key])
            for key in ("ffn", "heads", "groups"):
                data[key] = {int(block): kept for block, kept in data.get(key, {}).items()}
            for key in ("experts", "merged"):
                blocks = data.get(key, {}).items()
                data[key] = {int(block): {int(n): kept for n, kept in inner.items()} for block, inner in blocks}
            return Plan(**data)
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error


def top_indices(scores: Tensor, count: int) -> list[int]:
    """Indices of the `count` highest scores, ascending; the first of equal scores wins."""
    return sorted(torch.sort(scores, descending=True, stable=True).indices[:count].tolist())


def make_plan(source: Architecture, fingerprint: str, scores: Scores, prune: PruneConfig) -> Plan:
    """Keep the units with the highest scores on every axis.

    hidden is ranked over the whole model; ffn, groups and heads (see `choose_heads`) per block; experts per block and ffn per kept
    expert; blocks and layers by 1 - cosine of input and output, unless `prune` names those to drop.

    Args:
        source, fingerprint: of the checkpoint to prune.
        scores: of that checkpoint.

    Raises:
        UserError: the source cannot be cut to these sizes.
    """
    vectors = scores.vectors
    target = target_architecture(source, prune, vectors)
    kept = kept_layers(source, prune, vectors)
    groups, heads, merged, ffn, experts = {}, {}, {}, {}, {}
    for block in kept.attention:
        groups[block], heads[block], pairs = choose_heads(vectors[f"blocks.{block}.heads"], source, target)
        if prune.merge_heads:
            merged[block] = pairs
    for block in kept.mlp:
        channels = vectors[f"blocks.{block}.ffn"]
        if source.experts:
            chosen = top_indices(vectors[f"blocks.{block}.experts"], target.experts)
            experts[block] = {expert: top_indices(channels[expert], target.ffn) for expert in chosen}
        else:
            ffn[block] = top_indices(channels, target.ffn)
    return Plan(
        source=source,
        target=target,
        fingerprint=fingerprint,
        scores=scores.digest(),
        hidden=top_indices(vectors["hidden"], target.hidden),
        blocks=kept.blocks,
        ffn=ffn,
        heads=heads,
        experts=experts,
        groups=groups,
        merged=merged,
        statistic=dict(sorted(scores.metadata.items())),  # safetensors does not keep their order
    )


def choose_heads(
    scores: Tensor, source: Architecture, target: Architecture
) -> tuple[list[int], list[int], dict[int, int]]:
    """Choose the key/value groups of a block, the query heads in each, and the pairs of heads to merge.

    The score of a group is the L2 norm over its heads' scores. As a head's score is the L2 norm over its channels, this is the norm
    over all channels of the group. Each kept group keeps the best K of its L heads.

    Pairs follow the residual merge of arXiv 2407.14679, section 2.3: head i of the ranking becomes
    head_i + (head_i - head_{2K-i+1}), for i in [2K-L+1, K] counted from 1. So every dropped head has a kept partner, the best
    dropped head the worst kept one. (The range that the paper prints includes a head L + 1.) It requires K >= L / 2.
    The paper does not specify which weights of a query head are merged. Here these are the rows of the query projection and its
    bias. The heads of a group share keys, so the attention logits follow the same formula, if queries have no norm. Output
    projection, keys and values do not change.

    Args:
        scores: [N], of the block's query heads.

    Returns:
        Kept groups; kept heads; kept head -> dropped head, empty if K < L / 2. All numbers are the source's.
    """
    size, kept = source.heads_per_group, target.heads_per_group
    grouped = scores.view(source.groups, size)
    groups = top_indices(torch.linalg.vector_norm(grouped, dim=1), target.groups)
    heads: list[int] = []
    pairs: dict[int, int] = {}
    for group in groups:
        ranked = [group * size + h for h in torch.sort(grouped[group], descending=True, stable=True).indices.tolist()]
        heads += sorted(ranked[:kept])
        if 2 * kept >= size:
            pairs |= zip(reversed(ranked[2 * kept - size : kept]), ranked[kept:], strict=True)
    return groups, heads, pairs
