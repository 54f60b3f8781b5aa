"""Small random Llama folders with awkward sizes, and what tests do with models on every rank."""

import json
from pathlib import Path

import torch

from minitron_mcore.models.architecture import Architecture
from tests.helpers.layouts import layouts

SIZES = dict(
    vocab_size=101,  # odd: padded at any TP > 1
    hidden_size=36,
    intermediate_size=30,
    num_hidden_layers=5,  # uneven over two stages
    num_attention_heads=12,
    num_key_value_heads=6,  # divisible by 2 and 3
    head_dim=8,  # not hidden / heads
    max_position_embeddings=256,
)
ARCH = Architecture("llama", 3, 36, 30, 12, 6, 8, 101, 256, 1e-5, 1e4, None, True)
LAYOUTS = layouts("tp1", "tp2_sp", "tp3", "pp2", "tp2_pp2", "dp2")
# Experts one by one: torch's product over all of them wants rows of a multiple of 16 bytes.
EAGER = {"experts_implementation": "eager"}
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def tiny_llama(folder: Path, tied: bool = False, seed: int = 0, **sizes) -> Path:
    """A random fp32 Llama 3.1 (scaled rotary wavelengths), saved as transformers saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **(SIZES | sizes),
        rope_parameters=ROPE | {"original_max_position_embeddings": 64},
        tie_word_embeddings=tied,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def placed(batches):
    """Micro-batches as a stage makes them: on this rank's device."""
    from minitron_mcore.parallel import process_groups

    for batch in batches:
        yield {key: tensor.to(process_groups.device()) for key, tensor in batch.items()}


def tokens(batch: int = 3, length: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def hf_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **EAGER)(ids).logits


def hf_says(folder: Path, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """The prompt [B, P] and the `count` tokens after it that transformers finds likeliest, end of text or not."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.generate(prompt, do_sample=False, max_new_tokens=count, eos_token_id=None, pad_token_id=0)


def says(checkpoint, parallel, prompt: torch.Tensor, count: int, eos: int | None = None) -> torch.Tensor:
    from minitron_mcore.checkpoint.run_folder import build_model, open_checkpoint
    from minitron_mcore.evaluation.generate import generate

    opened = open_checkpoint(checkpoint)
    return generate(build_model(opened, parallel, "fp32"), opened.arch, prompt, count, eos)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def import_hf(folder, out_dir, parallel) -> None:
    from minitron_mcore.formats import hf_convert

    hf_convert.import_folder(folder, out_dir, parallel)


def mcore_logits(checkpoint, parallel, ids: torch.Tensor) -> torch.Tensor | None:
    from minitron_mcore.checkpoint.run_folder import build_model, open_checkpoint

    opened = open_checkpoint(checkpoint)
    return model_logits(build_model(opened, parallel, "fp32"), opened.arch, ids)


def model_logits(model, arch, ids: torch.Tensor) -> torch.Tensor | None:
    """Full logits [B, S, V], padding cut off, on the last stage's tensor-parallel rank 0; None elsewhere."""
    from minitron_mcore.parallel import process_groups
    from minitron_mcore.parallel.schedule import forward

    found = []
    forward(model, list(placed([{"tokens": ids}])), lambda hidden, batch: found.append(whole_logits(model, hidden)))
    if process_groups.is_last_stage() and process_groups.tp_group().rank() == 0:
        return found[0][..., : arch.vocab].cpu()
    return None


def whole_logits(model, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [B, S / CP, padded V] on all tensor-parallel ranks, from the final norm's output [S_r, B, H]."""
    from megatron.core import tensor_parallel

    from minitron_mcore.parallel import process_groups

    group = process_groups.tp_group()
    if model.chunks[-1].config.sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=group)
    logits = (hidden @ model.head().t()).transpose(0, 1)
    return tensor_parallel.gather_from_tensor_model_parallel_region(logits, group=group)


def convert(model, source, out_dir, parallel, dtype=torch.float32):
    """Weights of `source`, config and tokenizer of `model` -> checkpoint."""
    from minitron_mcore.formats import hf_convert, sources

    with sources.open_source(model, source, dtype) as (folder, weights):
        hf_convert.import_folder(folder, out_dir, parallel, weights=weights)


def whole(weights, parameters) -> dict[str, torch.Tensor]:
    return {p.name: weights.read(p, (0,) * len(p.shape), p.shape) for p in parameters}


def read_all(model, source):
    """Every tensor of a source, in this process."""
    from minitron_mcore.formats import sources
    from minitron_mcore.models import architecture, parameter_table

    with sources.open_source(model, source, torch.float32) as (folder, weights):
        arch, _ = architecture.read_hf(folder)
        weights.check(arch)
        return whole(weights, parameter_table.parameters(arch))


def convert_and_run(model, source, out_dir, parallel, ids):
    convert(model, source, out_dir, parallel)
    return mcore_logits(out_dir, parallel, ids)
