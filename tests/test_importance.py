"""Scores against the paper's formulas written out on transformers' model in fp64: a failure means a layout changes what is cut."""

import pytest
import torch

from minitron_mcore.config import ParallelConfig
from minitron_mcore.testing import on_ranks
from tests import families, models
from tests.test_models import LAYOUTS

LENGTHS = [12, 7, 12, 3]  # padded samples of different lengths


def oracle(folder, ids, lengths) -> dict[str, torch.Tensor]:
    """Mean of absolute values over each sample's real tokens, L2 over samples; 1 - mean cosine over all tokens."""
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
        layer.mlp.down_proj.register_forward_pre_hook(keep(f"{i}.ffn"))
    with torch.no_grad():
        for row, length in zip(ids, lengths, strict=True):
            model(row[None, :length])

    def aggregate(name, transform=torch.abs):
        return torch.stack([transform(x).mean(0) for x in seen[name]]).square().sum(0).sqrt()

    def influence(a, b):
        cosines = [torch.cosine_similarity(x, y, dim=-1) for x, y in zip(seen[a], seen[b], strict=True)]
        return 1 - torch.cat(cosines).mean()

    blocks, heads = len(model.model.layers), model.config.num_attention_heads
    scores = {"hidden": sum(aggregate(f"{i}.norm{n}") for i in range(blocks) for n in (1, 2))}
    for i in range(blocks):
        scores[f"blocks.{i}.ffn"] = aggregate(f"{i}.ffn")
        scores[f"blocks.{i}.heads"] = aggregate(f"{i}.heads", lambda x: x.view(len(x), heads, -1).norm(dim=-1))
        scores[f"blocks.{i}.attention"] = influence(f"{i}.in", f"{i}.mid")
        scores[f"blocks.{i}.mlp"] = influence(f"{i}.mid", f"{i}.out")
        scores[f"blocks.{i}.block"] = influence(f"{i}.in", f"{i}.out")
    return scores


def collect(checkpoint, parallel, ids, lengths):
    from minitron_mcore import runtime
    from minitron_mcore.checkpoint import build_model, open_checkpoint
    from minitron_mcore.importance.collect import collecting
    from minitron_mcore.schedule import forward

    opened = open_checkpoint(checkpoint)
    model = build_model(opened, parallel, "fp32")
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]
    dp = runtime.dp_group()
    ids, mask = ids[dp.rank() :: dp.size()], mask[dp.rank() :: dp.size()]
    with collecting(model, opened.arch) as collector:
        for rows in ([0], list(range(1, len(ids)))):  # micro-batches of different sizes
            forward(model, [{"tokens": ids[rows], "mask": mask[rows]}], lambda hidden, batch: None)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return collector.scores()


@pytest.mark.parametrize(
    ("which", "layout"), [*(("llama", layout) for layout in LAYOUTS), ("nemotron", "tp2_sp"), ("qwen3", "tp2_pp2")]
)
def test_scores_equal_the_formula(tmp_path, which, layout):
    world, parallel = LAYOUTS[layout]
    folder = tmp_path / "hf"
    models.tiny_llama(folder, tied=True) if which == "llama" else families.tiny(which, folder)
    on_ranks(models.import_hf, world, parallel, folder, tmp_path / "ckpt", parallel)
    ids = models.tokens(len(LENGTHS))
    expected = oracle(folder, ids, LENGTHS)
    for scores in on_ranks(collect, world, parallel, tmp_path / "ckpt", parallel, ids, LENGTHS):
        assert scores.keys() == expected.keys()
        for name, vector in expected.items():
            assert scores[name].dtype == torch.float32
            torch.testing.assert_close(
                scores[name].double(), vector, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_other_layout_same_plan(tmp_path):
    from minitron_mcore.checkpoint import open_checkpoint
    from minitron_mcore.config import PruneConfig
    from minitron_mcore.importance.scores import Scores
    from minitron_mcore.plan.plan import make_plan

    folder = models.tiny_llama(tmp_path / "hf")
    on_ranks(models.import_hf, 1, ParallelConfig(), folder, tmp_path / "ckpt", ParallelConfig())
    ids, arch = models.tokens(len(LENGTHS)), open_checkpoint(tmp_path / "ckpt").arch
    prune = PruneConfig(hidden=24, ffn=18, heads=6, blocks=3)
    plans = []
    for world, parallel in LAYOUTS.values():
        scores = on_ranks(collect, world, parallel, tmp_path / "ckpt", parallel, ids, LENGTHS)[0]
        plans.append(make_plan(arch, "same", Scores(scores, {}), prune))
    for plan in plans[1:]:
        assert (plan.hidden, plan.blocks, plan.ffn, plan.heads) == (
            plans[0].hidden,
            plans[0].blocks,
            plans[0].ffn,
            plans[0].heads,
        )
