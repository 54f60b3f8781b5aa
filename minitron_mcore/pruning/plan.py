"""A plan: the kept indices of every axis, chosen from scores by targets. JSON that a person can read and diff."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minitron_mcore.config.settings import PruneConfig
from minitron_mcore.errors import UserError, result_file
from minitron_mcore.importance.scores import Scores
from minitron_mcore.models import parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.pruning.target import kept_layers, target_architecture
from minitron_mcore.reading import FORMAT_VERSION, check_format_version, read_json

FILE = "plan.json"


@dataclass(frozen=True)
class Plan:
    """Kept indices, ascending, counted from 0 in the source; `ffn`, `heads`, `groups`, `merged` and `experts` by source block.
    A kept block whose attention or MLP goes has no entry there."""

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
    groups: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    """Key/value groups; a plan without any (of an earlier version) keeps all."""
    merged: dict[int, dict[int, int]] = dataclasses.field(default_factory=dict)
    """Kept query head -> the dropped head of its group that is merged into it: its queries q become q + (q - dropped q)."""
    statistic: dict[str, str] = dataclasses.field(default_factory=dict)
    """What the scores say of themselves: metric, aggregation, samples, tokens, data."""
    format_version: int = FORMAT_VERSION
    """0 for a plan that was read from a file without a version, which keeps its digest."""

    def __post_init__(self):
        source, target = self.source, self.target
        if not self.groups:
            object.__setattr__(self, "groups", {block: list(range(source.groups)) for block in self.heads})
        self._check("hidden", self.hidden, source.hidden, target.hidden)
        self._check("blocks", self.blocks, source.blocks, target.blocks)
        for part in ("attention", "mlp"):
            if made_up := sorted(set(self.blocks_with(part)) - set(source.blocks_with(part))):
                raise UserError(
                    f"the plan keeps the {part} layer of block {made_up[0]}, which the source does not have."
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

    def _check(self, name: str, kept: list[int], total: int, wanted: int) -> None:
        if not all(type(index) is int for index in kept):
            raise UserError(
                f"the plan's {name} must be whole numbers; it has {next(x for x in kept if type(x) is not int)!r}."
            )
        if not kept or sorted(set(kept)) != list(kept) or len(kept) != wanted or kept[0] < 0 or kept[-1] >= total:
            raise UserError(f"the plan's {name} must be {wanted} ascending indices below {total}; it has {len(kept)}.")

    def _check_heads(self, block: int) -> None:
        """Heads lie in kept groups, equally many in each, and a merged one is dropped from a kept one's group."""
        held, heads, pairs = self.source.heads_per_group, self.heads[block], self.merged.get(block, {})
        groups, each = self.groups[block], self.target.heads_per_group
        if [head // held for head in heads] != [group for group in groups for _ in range(each)]:
            raise UserError(
                f"the plan's heads of block {block} must be {each} in each of its key/value groups {groups} of {held}."
            )
        for kept, dropped in pairs.items():
            if kept not in heads or dropped in heads or kept // held != dropped // held:
                raise UserError(
                    f"the plan merges head {dropped} into head {kept} of block {block}: expected a dropped head and a kept "
                    "one of its group."
                )

    def blocks_with(self, part: str) -> list[int]:
        """The source's blocks that keep their "attention" or "mlp" layer."""
        return [self.blocks[number] for number in self.target.blocks_with(part)]

    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """One line a list of indices, so that a diff shows which block changed."""
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
        return [block for block in range(self.source.blocks) if block not in self.blocks]

    def dropped_layers(self, part: str) -> list[int]:
        """The source's blocks that are kept without their "attention" or "mlp" layer, which they had."""
        return [
            block
            for block in self.source.blocks_with(part)
            if block in self.blocks and block not in self.blocks_with(part)
        ]

    def notes(self) -> list[str]:
        """What the summary's counts don't say, a line each."""
        found = [f"dropped blocks: {self.dropped_blocks() or 'none'}"]
        for part in ("attention", "mlp"):
            if gone := self.dropped_layers(part):
                found.append(f"blocks that lose their {part} layer: {gone}")
        if pairs := sum(map(len, self.merged.values())):
            found.append(f"dropped query heads merged into kept ones: {pairs}")
        return found

    def summary(self) -> list[dict]:
        return compare(self.source, self.target)


def compare(source: Architecture, target: Architecture) -> list[dict]:
    """Rows for a table: axis, kept, total, share."""
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
    """Read plan.json (or the folder of a plan run).

    Raises:
        UserError: no such file, or not a plan.
    """
    path = result_file(path, FILE, "plan", "run launch/plan.py first, or give plan=")
    data = read_json(path, "run launch/plan.py again")
    check_format_version(data, path, "run launch/plan.py again")
    data.setdefault("format_version", 0)
    try:
        data.pop("parameters")
        for key in ("source", "target"):
            data[key] = Architecture(**data[key])
        for key in ("ffn", "heads", "groups"):
            data[key] = {int(block): kept for block, kept in data.get(key, {}).items()}
        for key in ("experts", "merged"):
            found = data.get(key, {})
            data[key] = {int(block): {int(n): kept for n, kept in inner.items()} for block, inner in found.items()}
        return Plan(**data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path} is not a plan ({type(error).__name__}: {error}): run launch/plan.py again.") from error


def top_indices(scores: Tensor, count: int) -> list[int]:
    """Indices of the `count` highest, ascending; of equals the first."""
    return sorted(torch.sort(scores, descending=True, stable=True).indices[:count].tolist())


def make_plan(source: Architecture, fingerprint: str, scores: Scores, prune: PruneConfig) -> Plan:
    """Rank every axis by its scores and keep the best: hidden over the whole model; ffn, groups and heads in each block (see
    `choose_heads`); experts in each block and ffn in each kept expert; blocks, attention and MLP layers by the cosine between
    their input and output, or all but the ones named.

    Raises:
        UserError: targets that the source cannot meet.
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
        statistic=dict(sorted(scores.metadata.items())),  # safetensors gives them in any order
    )


def choose_heads(
    scores: Tensor, source: Architecture, target: Architecture
) -> tuple[list[int], list[int], dict[int, int]]:
    """The key/value groups of a block, the query heads within them, and the dropped head that each kept one can take in.

    A group's score is the L2 norm over its heads' scores: a head's is the L2 norm over its channels, and so the group's is that
    over all its channels. In each kept group the best K of its L heads stay.

    The merge is the residual one of arXiv 2407.14679, section 2.3, in which head i of the ranking becomes
    head_i + (head_i - head_{2K-i+1}). For i in [2K-L+1, K], counted from 1, every dropped head finds a kept one, the best
    dropped the worst kept; the range that the paper prints asks for a head L + 1. K < L / 2 would leave some without a partner.
    The paper merges query heads only, and leaves open what of them. Here it is the rows of the query projection, and of its bias:
    the heads of a group share their keys, so the attention's logits before the softmax follow the same formula (where there is
    no norm on queries). Output projection, keys and values stay as they are.

    Args:
        scores: [N], of the block's query heads.

    Returns:
        Kept groups; kept heads; kept head -> dropped head, of all kept groups, empty where K < L / 2. Numbers are the source's.
    """
    size, kept = source.heads_per_group, target.heads_per_group
    grouped = scores.view(source.groups, size)
    groups = top_indices(torch.linalg.vector_norm(grouped, dim=1), target.groups)
    heads, pairs = [], {}
    for group in groups:
        ranked = [group * size + h for h in torch.sort(grouped[group], descending=True, stable=True).indices.tolist()]
        heads += sorted(ranked[:kept])
        if 2 * kept >= size:
            pairs |= zip(reversed(ranked[2 * kept - size : kept]), ranked[kept:], strict=True)
    return groups, heads, pairs
