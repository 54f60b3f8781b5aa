"""Index maps of random shapes, plans and layouts, against positions written from the parameter table's documented order.

A failure means that some shape, plan or layout loses, doubles or swaps rows and columns in silence.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_mcore.checkpoint import disk, streaming
from minitron_mcore.config.settings import ParallelConfig, PruneConfig
from minitron_mcore.models import parameter_table, sharding
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.pruning import apply
from minitron_mcore.pruning.plan import load_plan, make_plan
from tests.helpers.cutting import random_scores

FEW = settings(max_examples=60, deadline=None, derandomize=True)
SIZES = (1, 2, 3)  # ranks along an axis


@st.composite
def architectures(draw) -> Architecture:
    def size(low, high):
        return draw(st.integers(low, high))

    family = draw(st.sampled_from(["llama", "nemotron", "qwen2", "qwen3", "qwen3_moe"]))
    blocks, groups = size(1, 5), size(1, 6)
    parts = draw(st.lists(st.sampled_from(["both", "both", "attention", "mlp"]), min_size=blocks, max_size=blocks))
    parts[0] = "both"
    experts = size(2, 4) if family == "qwen3_moe" else 0
    return Architecture(
        family,
        blocks=blocks,
        hidden=size(1, 7),
        ffn=size(1, 12),
        heads=groups * size(1, 4),
        groups=groups,
        head_dim=size(1, 4),
        vocab=size(1, 11),
        max_positions=8,
        norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        tied=draw(st.booleans()),
        experts=experts,
        experts_per_token=min(2, experts),
        no_attention=[n for n, kept in enumerate(parts) if kept == "mlp"],
        no_mlp=[n for n, kept in enumerate(parts) if kept == "attention"],
    )


@st.composite
def plans(draw):
    """A plan that names its depth and takes the rest by random scores."""
    arch = draw(architectures())
    groups, kept = draw(st.integers(1, arch.groups)), draw(st.integers(1, arch.heads_per_group))
    dropped: dict[str, list[int]] = {"blocks": [], "attention": [], "mlp": []}
    for block in range(1, arch.blocks):
        whole = block in arch.blocks_with("attention") and block in arch.blocks_with("mlp")
        gone = draw(st.sampled_from(["", "blocks", *(["attention", "mlp"] if whole else [])]))
        if gone:
            dropped[gone].append(block)
    config = PruneConfig(
        hidden=draw(st.integers(1, arch.hidden)),
        ffn=draw(st.integers(1, arch.ffn)),
        groups=groups,
        heads=groups * kept,
        merge_heads=2 * kept >= arch.heads_per_group and not arch.traits.qk_norm and draw(st.booleans()),
        experts=draw(st.integers(arch.experts_per_token, arch.experts)) if arch.experts else None,
        **{f"drop_{option}": blocks for option, blocks in dropped.items()},
    )
    return make_plan(arch, "source", random_scores(arch, draw(st.integers(0, 99))), config)


def divisors(arch: Architecture) -> list[int]:
    """Tensor-parallel sizes that the model allows."""
    return [n for n in SIZES if not list(sharding.model_problems(arch, ParallelConfig(tensor=n, sequence=n > 1)))]


def positions(axis: str, plan, block, expert) -> list[int]:
    """What a plan keeps of an axis of its source, from the order that the table's head documents."""
    arch = plan.source
    width, held = arch.head_dim, arch.heads_per_group
    if axis == "qkv":
        found = []
        for group in plan.groups[block]:
            start = group * (held + 2) * width
            slots = [head - group * held for head in plan.heads[block] if head // held == group] + [held, held + 1]
            found += [start + slot * width + d for slot in slots for d in range(width)]
        return found
    ffn = plan.experts[block][expert] if expert is not None else plan.ffn.get(block)
    return {
        "hidden": lambda: plan.hidden,
        "heads": lambda: [head * width + d for head in plan.heads[block] for d in range(width)],
        "ffn": lambda: ffn,
        "glu": lambda: [*ffn, *(arch.ffn + channel for channel in ffn)],
        "experts": lambda: list(plan.experts[block]),
        "vocab": lambda: range(arch.vocab),
        "head_dim": lambda: range(width),
    }[axis]()


def expected(parameter, plan, whole: torch.Tensor) -> torch.Tensor:
    """The pruned tensor by fancy indexing of the whole one, merged queries head by head."""
    keep = [positions(axis, plan, parameter.block, parameter.expert) for axis in parameter.row.axes]
    source = whole.clone()
    if parameter.row.axes[0] == "qkv":
        width, held = plan.source.head_dim, plan.source.heads_per_group
        for kept, dropped in plan.merged.get(parameter.block, {}).items():
            a, b = ((2 * (head // held) + head) * width for head in (kept, dropped))
            q, other = whole[a : a + width].float(), whole[b : b + width].float()
            source[a : a + width] = (q + (q - other)).to(whole.dtype)
    return source[np.ix_(*map(list, keep))]


def place(target: torch.Tensor, filled: np.ndarray, offset: tuple[int, ...], data: torch.Tensor) -> None:
    box = tuple(slice(low, low + length) for low, length in zip(offset, data.shape, strict=True))
    target[box] = data
    filled[box] += 1


@FEW
@given(plan=plans(), data=st.data())
def test_the_ranks_pieces_make_up_the_pruned_tensors(plan, data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    before, after = data.draw(st.sampled_from(divisors(plan.source))), data.draw(st.sampled_from(divisors(plan.target)))
    wholes = {}

    def read(parameter, offset, shape):
        return wholes[parameter][tuple(slice(low, low + n) for low, n in zip(offset, shape, strict=True))].clone()

    reader = SimpleNamespace(read=read)
    survivors = dict(apply._kept_parameters(plan, parameter_table.parameters(plan.source)))
    assert list(survivors.values()) == list(parameter_table.parameters(plan.target))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "PIECE_ELEMENTS", data.draw(st.integers(1, 30)))
        for source, target in survivors.items():
            wholes[source] = whole = torch.randn(source.shape).to(dtype)
            wanted = expected(source, plan, whole)
            assert wanted.shape == target.shape
            seen, found, filled = np.zeros(source.shape), torch.empty(target.shape, dtype=dtype), np.zeros(target.shape)
            for rank in range(before if source.row.tp_dim is not None else 1):
                for box in streaming.shard_slices(source, rank, before):
                    (offset, shape), kept = apply.select(source, plan, box)
                    piece = apply._read_cut(read, source, plan, box, kept)
                    assert piece.shape == shape
                    place(found, filled, offset, piece)
                    seen[tuple(slice(low, low + length) for low, length in zip(*box, strict=True))] += 1
            assert (seen == 1).all() and (filled == 1).all() and torch.equal(found, wanted)
            filled[:] = 0
            for rank in range(after if target.row.tp_dim is not None else 1):
                for offset, shape in streaming.shard_slices(target, rank, after):
                    place(found, filled, offset, apply._read_kept(reader, source, plan, offset, shape))
            assert (filled == 1).all() and torch.equal(found, wanted)


@FEW
@given(arch=architectures())
def test_packing_goes_group_by_group(arch):
    rows = [("q", head, d) for head in range(arch.heads) for d in range(arch.head_dim)]
    rows += [(kind, group, d) for kind in "kv" for group in range(arch.groups) for d in range(arch.head_dim)]
    packed = [rows[row] for row in parameter_table.packing("qkv", arch)]
    held, wanted = arch.heads_per_group, []
    for group in range(arch.groups):
        units = [("q", group * held + n) for n in range(held)] + [("k", group), ("v", group)]
        wanted += [(*unit, d) for unit in units for d in range(arch.head_dim)]
    assert packed == wanted


@FEW
@given(arch=architectures(), tp=st.sampled_from(SIZES))
def test_ranges_share_every_axis(arch, tp):
    """Each position once over the ranks, in ascending runs; groups with their heads and both halves of glu on one rank."""
    axes = ["vocab"] + ["qkv", "heads"] * (tp in divisors(arch))
    axes += ["ffn", "glu"] * (tp in divisors(arch) and not arch.experts)  # experts are whole
    for axis in axes:
        ranks = [
            [n for low, high in parameter_table.tp_slices(axis, arch, rank, tp) for n in range(low, high)]
            for rank in range(tp)
        ]
        assert sorted(n for held in ranks for n in held) == list(range(parameter_table.size(axis, arch)))
        assert all(held == sorted(held) for held in ranks)
        unit = {"qkv": (arch.heads_per_group + 2) * arch.head_dim, "heads": arch.heads_per_group * arch.head_dim}
        if axis in unit:
            owners = [
                {rank for rank, held in enumerate(ranks) if n in held} for n in range(parameter_table.size(axis, arch))
            ]
            runs = [owners[n : n + unit[axis]] for n in range(0, len(owners), unit[axis])]
            assert all(len(set.union(*run)) == 1 for run in runs)
        if axis == "glu":
            assert all(
                [n for n in held if n < arch.ffn] == [n - arch.ffn for n in held if n >= arch.ffn] for held in ranks
            )


@FEW
@given(arch=architectures(), pipeline=st.sampled_from(SIZES), expert=st.sampled_from(SIZES))
def test_stages_share_the_layers(arch, pipeline, expert):
    """Layers are numbered without holes, and every parameter lies on one stage and, of experts, on one of its ranks."""
    names = [parameter.name for parameter in parameter_table.parameters(arch)]
    numbers = {int(name.split(".")[2]) for name in names if name.startswith("decoder.layers.")}
    assert numbers == set(range(len(arch.layers))) and len(set(names)) == len(names)
    assert [arch.layer(*layer) for layer in arch.layers] == sorted(numbers)
    if pipeline > arch.blocks or arch.experts % expert:
        return
    parallel, share = ParallelConfig(pipeline=pipeline, expert=expert), arch.experts // expert
    held = [
        parameter
        for stage in range(pipeline)
        for rank in range(expert)
        for parameter in sharding.parameters_on_rank(arch, parallel, stage, range(rank * share, (rank + 1) * share))
        if parameter.expert is not None or rank == 0
    ]
    assert sorted(parameter.name for parameter in held) == sorted(names)
    assert sum(math.prod(parameter.shape) for parameter in held) == parameter_table.count(arch)


@FEW
@given(plan=plans())
def test_plans_come_back_from_json(plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(plan.to_json())
    back = load_plan(path)
    assert back == plan and back.to_json() == plan.to_json() and back.digest() == plan.digest()
