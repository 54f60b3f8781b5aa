"""Scores, plans, cuts and exports of small models."""

import torch

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.config.settings import ParallelConfig, PruneConfig
from minitron_mcore.formats import hf_convert
from minitron_mcore.importance.scores import Scores, expected_shapes
from minitron_mcore.pruning.plan import Plan, make_plan
from minitron_mcore.testing import on_ranks
from tests.helpers import models

ONE = ParallelConfig()
LENGTHS = [12, 7, 12, 3, 9]  # padded samples of different lengths, which two ranks don't divide
CUT = PruneConfig(hidden=24, ffn=18, heads=6, blocks=6)


def score_cut_say(source, parallel, ids, out_dir, cut=CUT):
    """Scores, the plan that they give, its cut in `out_dir`; (positions, logits there) of what was cut, on last-stage ranks; the
    pieces that this rank alone wrote."""
    from minitron_mcore.checkpoint import streaming
    from minitron_mcore.checkpoint.run_folder import build_model
    from minitron_mcore.formats import hf_convert
    from minitron_mcore.importance.collector import score
    from minitron_mcore.parallel import process_groups
    from minitron_mcore.parallel.schedule import forward
    from minitron_mcore.pruning.apply import build_pruned

    opened = open_checkpoint(source)
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(LENGTHS)[:, None]
    found = score(build_model(opened, parallel, "fp32"), opened, ids, mask, micro_batch=2)
    plan = make_plan(opened.arch, opened.fingerprint, found, cut)
    run_prune(source, plan, out_dir, parallel)
    said = []

    def keep(hidden, batch):
        whole = models.whole_logits(pruned, hidden)
        said.append((batch["at"][0].cpu(), whole[..., : opened.arch.vocab].cpu()))

    batch = {"tokens": ids, "at": torch.arange(ids.shape[1]).expand_as(ids)}
    pruned = build_pruned(opened, plan, parallel, "fp32")
    forward(pruned, list(models.placed([batch])), keep)
    tp = process_groups.tp_group()
    written = [
        (parameter.name, offset)
        for parameter in hf_convert.stage_parameters(opened.arch, parallel)
        for offset, _ in streaming.shard_slices(parameter, tp.rank(), tp.size())
        if not any(hf_convert.replica(parameter))
    ]
    return found.vectors, found.metadata, plan, said, written


def random_scores(arch, seed=3) -> Scores:
    g = torch.Generator().manual_seed(seed)
    return Scores({name: torch.rand(shape, generator=g) for name, shape in expected_shapes(arch).items()}, {})


def run_prune(source, plan: Plan, out_dir, parallel) -> None:
    from minitron_mcore.pruning.apply import prune

    prune(open_checkpoint(source), plan, out_dir, parallel)


def write_family(at, cuts: dict[str, PruneConfig], **sizes):
    """A tiny Llama in at/teacher and what `cuts` leave of it in at/NAME, by random scores."""
    models.tiny_llama(at / "hf", **sizes)
    on_ranks(family_on_rank, 1, ONE, at, cuts)


def family_on_rank(at, cuts) -> None:
    models.import_hf(at / "hf", at / "teacher", ONE)
    opened = open_checkpoint(at / "teacher")
    for name, target in cuts.items():
        plan = make_plan(opened.arch, opened.fingerprint, random_scores(opened.arch), target)
        run_prune(at / "teacher", plan, at / name, ONE)


def export(checkpoint, out_dir):
    out_dir.mkdir()
    hf_convert.export_folder(open_checkpoint(checkpoint), out_dir)
    return models.weights(out_dir)


def cut_by_hand(weights: dict, plan: Plan, tied: bool = False) -> dict:
    """The plan applied to Hugging Face tensors by name, written apart from the product's table."""
    d, hidden = plan.source.head_dim, torch.tensor(plan.hidden)
    outer = ["model.embed_tokens.weight", "model.norm.weight"] + ["lm_head.weight"] * (not tied)
    cut = {k: weights[k][..., hidden] for k in outer}
    for new, old in enumerate(plan.blocks):
        w = {k.split(f"layers.{old}.")[1]: v for k, v in weights.items() if f"layers.{old}." in k}
        rows = torch.cat([torch.arange(h * d, h * d + d) for h in plan.heads[old]])
        ffn = torch.tensor(plan.ffn[old])
        block = {n: w[n][hidden] for n in ("input_layernorm.weight", "post_attention_layernorm.weight")}
        block["self_attn.q_proj.weight"] = w["self_attn.q_proj.weight"][rows][:, hidden]
        block |= {f"self_attn.{x}_proj.weight": w[f"self_attn.{x}_proj.weight"][:, hidden] for x in "kv"}
        block["self_attn.o_proj.weight"] = w["self_attn.o_proj.weight"][:, rows][hidden]
        block |= {f"mlp.{x}_proj.weight": w[f"mlp.{x}_proj.weight"][ffn][:, hidden] for x in ("gate", "up")}
        block["mlp.down_proj.weight"] = w["mlp.down_proj.weight"][:, ffn][hidden]
        cut |= {f"model.layers.{new}.{k}": v for k, v in block.items()}
    return cut
