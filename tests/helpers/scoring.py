"""Importance scores on the ranks of a layout, and their formulas in fp64 on transformers' model."""

import contextlib
import itertools

import torch

from minitron_mcore.config.settings import Aggregation, FfnSite, Statistic
from tests.helpers import models

LENGTHS = [12, 7, 12, 3]  # padded samples of different lengths


STATISTICS = [
    Statistic(sequence, batch, site, weighted)
    for sequence, batch, site, weighted in itertools.product(Aggregation, Aggregation, FfnSite, (False, True))
]


def activations(folder, ids, lengths) -> tuple[dict[str, list[torch.Tensor]], dict[str, torch.Tensor], int]:
    """What each module of transformers' model saw of each sample's real tokens, [tokens, channels] in fp64; its weights; heads."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name):
        def hook(module, args, output=None):
            value = args[0] if output is None else output
            seen.setdefault(name, []).append((value[0] if isinstance(value, tuple) else value)[0])

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(keep(f"{i}.in"))
        layer.register_forward_hook(keep(f"{i}.out"))
        layer.post_attention_layernorm.register_forward_pre_hook(keep(f"{i}.mid"))
        layer.input_layernorm.register_forward_hook(keep(f"{i}.norm1"))
        layer.post_attention_layernorm.register_forward_hook(keep(f"{i}.norm2"))
        layer.self_attn.o_proj.register_forward_pre_hook(keep(f"{i}.heads"))
        layer.mlp.down_proj.register_forward_pre_hook(keep(f"{i}.after_gate"))
        getattr(layer.mlp, "gate_proj", layer.mlp.up_proj).register_forward_hook(keep(f"{i}.before_gate"))
    with torch.no_grad():
        for row, length in zip(ids, lengths, strict=True):
            model(row[None, :length])
    return seen, {name: weight.detach() for name, weight in model.named_parameters()}, model.config.num_attention_heads


def over(how: Aggregation, x: torch.Tensor) -> torch.Tensor:
    """The paper's three formulas over the first dimension."""
    n = len(x)
    if how == "mean":
        return x.abs().sum(0) / n
    return x.square().sum(0).sqrt() if how == "l2" else (x - x.sum(0) / n).square().sum(0) / n


def oracle(folder, ids, lengths, statistic=None) -> dict[str, torch.Tensor]:
    """An aggregation of each sample's real tokens, then one of the samples; 1 - mean cosine over all tokens."""
    return scores_of(*activations(folder, ids, lengths), statistic or Statistic())


def scores_of(seen, weights, heads, statistic) -> dict[str, torch.Tensor]:
    def weight(i, *names):
        """Norms of the columns of these matrices under each other."""
        matrices = [w for n in names if (w := weights.get(f"model.layers.{i}.{n}.weight")) is not None]
        return torch.cat(matrices).square().sum(0).sqrt() if statistic.weighted else torch.ones(())

    def aggregate(name, factor, transform=lambda x: x):
        return over(statistic.batch, torch.stack([over(statistic.sequence, transform(x) * factor) for x in seen[name]]))

    def influence(a, b):
        cosines = [torch.cosine_similarity(x, y, dim=-1) for x, y in zip(seen[a], seen[b], strict=True)]
        return 1 - torch.cat(cosines).mean()

    scores: dict[str, torch.Tensor] = {"hidden": 0}
    for i in range(sum(name.endswith(".in") for name in seen)):
        scores["hidden"] += aggregate(f"{i}.norm1", weight(i, *(f"self_attn.{x}_proj" for x in "qkv")))
        scores["hidden"] += aggregate(f"{i}.norm2", weight(i, "mlp.gate_proj", "mlp.up_proj"))
        scores[f"blocks.{i}.ffn"] = aggregate(f"{i}.{statistic.ffn_site}", weight(i, "mlp.down_proj"))
        columns = weight(i, "self_attn.o_proj")
        columns = columns.view(heads, -1).square().sum(1).sqrt() if statistic.weighted else columns
        scores[f"blocks.{i}.heads"] = aggregate(
            f"{i}.heads", columns, lambda x: x.view(len(x), heads, -1).square().sum(-1).sqrt()
        )
        scores[f"blocks.{i}.attention"] = influence(f"{i}.in", f"{i}.mid")
        scores[f"blocks.{i}.mlp"] = influence(f"{i}.mid", f"{i}.out")
        scores[f"blocks.{i}.block"] = influence(f"{i}.in", f"{i}.out")
    return scores


def collect(checkpoint, parallel, ids, lengths, statistics=(None,)):
    """Scores by each statistic, all from the same forward passes."""
    from minitron_mcore.checkpoint.run_folder import build_model, open_checkpoint
    from minitron_mcore.importance.collector import collect_importance
    from minitron_mcore.parallel import process_groups
    from minitron_mcore.parallel.schedule import forward

    opened = open_checkpoint(checkpoint)
    model = build_model(opened, parallel, "fp32")
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    dp = process_groups.dp_group()
    ids, mask = ids[dp.rank() :: dp.size()], mask[dp.rank() :: dp.size()]
    with contextlib.ExitStack() as stack:
        collectors = [
            stack.enter_context(collect_importance(model, opened.arch, statistic)) for statistic in statistics
        ]
        for rows in ([0], list(range(1, len(ids)))):  # micro-batches of different sizes
            batch = {"tokens": ids[rows], "mask": mask[rows]}
            forward(model, list(models.placed([batch])), lambda hidden, batch: None)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return [collector.scores() for collector in collectors]
