"""Importance scores of mixtures of experts, and their formulas in fp64."""

import torch
import torch.nn.functional as F

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from tests.helpers import models

LENGTHS = [12, 7, 12, 3, 9]  # samples that no number of ranks divides


def oracle(folder, ids) -> dict[str, torch.Tensor]:
    """Router, experts and means over all real tokens, from the weights and each block's MLP input."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **models.EAGER)
    weights = {k: v.double() for k, v in models.weights(folder).items()}
    inputs: dict[int, list] = {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda m, args, i=i: inputs.setdefault(i, []).append(args[0][0]))
    with torch.no_grad():
        for row, length in zip(ids, LENGTHS, strict=True):
            model(row[None, :length])
    found, chosen = {}, model.config.num_experts_per_tok
    for i, parts in inputs.items():
        x, at = torch.cat(parts), f"model.layers.{i}.mlp."
        probs, experts = (x @ weights[at + "gate.weight"].T).softmax(-1).topk(chosen)
        probs = probs / probs.sum(-1, keepdim=True)
        ffn, outputs = [], []
        for e in range(model.config.num_experts):
            p = (probs * (experts == e)).sum(-1, keepdim=True)
            gate, up, down = (weights[f"{at}experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down"))
            a = p * F.silu(x @ gate.T) * (x @ up.T)
            ffn.append(a.abs().mean(0))
            outputs.append((a @ down.T).norm(dim=-1).mean())
        found |= {f"blocks.{i}.ffn": torch.stack(ffn), f"blocks.{i}.experts": torch.stack(outputs)}
    return found


def collect(checkpoint, parallel, ids):
    from minitron_mcore.checkpoint.run_folder import build_model
    from minitron_mcore.importance.collector import score

    opened = open_checkpoint(checkpoint)
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(LENGTHS)[:, None]
    found = score(build_model(opened, parallel, "fp32"), opened, ids, mask, micro_batch=2)
    return found.vectors, found.metadata
