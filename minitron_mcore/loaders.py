"""Who else takes an exported folder: transformers is asked, vLLM and TensorRT-LLM are held against their published rules.

Nothing here runs vLLM or TensorRT-LLM, and the rows say so. Every block has the same widths, which both demand
(github.com/NVIDIA/TensorRT-LLM/issues/1600): the parameter table knows no other model.

Both: query heads in equal shares, key/value groups in equal shares or copied to equally many ranks.
    vLLM: docs.vllm.ai/en/v0.15.0/api/vllm/model_executor/models/llama; TensorRT-LLM: tensorrt_llm/_torch/modules/attention.py
Both list the classes: docs.vllm.ai/en/latest/models/supported_models, nvidia.github.io/TensorRT-LLM/1.0.0/models/supported-models
vLLM: ffn in equal shares; FlashAttention's head_dim (docs.vllm.ai/en/v0.26.0/api/vllm/v1/attention/backends/flash_attn). It pads
    the vocabulary to a multiple of 64, so any passes.
TensorRT-LLM: head_dim with a decoding kernel (cpp/tensorrt_llm/kernels/decoderMaskedMultiheadAttention.cu); hidden, ffn and
    heads x head_dim in multiples of 64 x TP, which is a rule of speed more than of loading, but the one to deliver by.
"""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from minitron_mcore.errors import UserError
from minitron_mcore.models import architecture, hf_config, table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.folder import Folder
from minitron_mcore.reading import first_line

SIZES = (1, 2, 4, 8)
"""Tensor-parallel sizes that a verdict is given for."""
CLASSES = {"Llama", "Mistral", "Mixtral", "Nemotron", "Qwen2", "Qwen3", "Qwen3Moe"}
TENSORRT_HEAD_DIMS = {32, 48, 64, 80, 96, 104, 112, 128, 144, 160, 192, 224, 256}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load(folder: str | Path, **placement) -> PreTrainedModel:
    """A Hugging Face folder in plain transformers: no remote code, safetensors only, no network.

    Args:
        placement: `dtype` or `device_map`; on the device "meta" only the files' headers are read.

    Raises:
        UserError: what transformers doesn't load; weights that are cut short, misshapen or lack a parameter.
    """
    config = Path(folder) / "config.json"
    if config.is_file():
        hf_config.check_counts(hf_config.read_json(config))
    if placement.get("device_map") != "meta":
        # A parameter that the files have in another size would be allocated in the size that config.json claims.
        load(folder, **placement | {"device_map": "meta"})
    transformers_logging.disable_progress_bar()
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what it would warn of is refused below
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported, and refused below
            output_loading_info=True,
            **placement,
        )
    except Exception as error:  # any value may be of any type, so that it raises anything
        reason = first_line(error)
        raise UserError(f"{folder} cannot be loaded by transformers: {reason}") from error
    finally:
        transformers_logging.set_verbosity(before)
    # transformers fills what the files leave out with random numbers.
    for problem in ("missing_keys", "mismatched_keys"):
        if loading[problem]:
            name = sorted(map(str, loading[problem]))[0]
            raise UserError(f"{folder}: the weights don't fit its config.json ({problem}: {name} and maybe more).")
    return model


def verdict(folder: str | Path, arch: Architecture) -> list[dict]:
    """Rows for a table: each loader at each tensor-parallel size, whether the folder passes, how that was found out, and why.

    transformers' row is what it did: the model stood on the meta device (headers are read, no weights), and the tokenizer loaded.

    Args:
        arch: of the checkpoint that was exported.

    Raises:
        UserError: transformers does not take the folder, or finds another model in it than was exported.
    """
    folder = Path(folder)
    found, _ = architecture.read_hf(folder)
    if wrong := [name for name, value in vars(arch).items() if getattr(found, name) != value]:
        raise UserError(f"{folder}/config.json describes another model than was exported: {', '.join(wrong)} differ.")
    Folder(folder).check(arch)
    model, expected = load(folder, device_map="meta"), table.count(arch)
    if model.num_parameters() != expected:
        raise UserError(f"transformers finds {model.num_parameters():,} parameters in {folder}, not {expected:,}.")
    note = f"{type(model).__name__}, {expected:,} parameters, {_tokenizer(folder)}"
    loaded = {"loader": "transformers", "TP": 1, "passes": "yes", "checked": "loaded", "why": note}
    return [loaded, *by_rule(arch)]


def by_rule(arch: Architecture) -> list[dict]:
    """The rows of `verdict` for runtimes that are not run here."""
    rows = []
    for loader, problems in (("vLLM", _vllm), ("TensorRT-LLM", _tensorrt)):
        for tp in SIZES:
            why = [*_both(arch, tp), *problems(arch, tp)]
            taken = "no" if why else "yes"
            rows.append({"loader": loader, "TP": tp, "passes": taken, "checked": "by rule", "why": "; ".join(why)})
    return rows


def _tokenizer(folder: Path) -> str:
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return "no tokenizer: the source came with none"
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers package raises nothing narrower
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"transformers cannot load the tokenizer in {folder}: {reason}") from error
    return f"tokenizer of {len(found):,} tokens"


def _both(arch: Architecture, tp: int) -> list[str]:
    why = []
    if arch.traits.hf_class.removesuffix("ForCausalLM") not in CLASSES:
        why.append(f"{arch.traits.hf_class} is not on its list")
    if arch.heads % tp:
        why.append(f"{arch.heads} heads don't divide by {tp}")
    if max(arch.groups, tp) % min(arch.groups, tp):
        why.append(f"{arch.groups} key/value groups are neither divided nor copied evenly by {tp}")
    return why


def _vllm(arch: Architecture, tp: int) -> list[str]:
    why = [] if arch.ffn % tp == 0 else [f"ffn {arch.ffn} doesn't divide by {tp}"]
    if arch.head_dim % 8 or arch.head_dim > 256:
        why.append(f"head_dim {arch.head_dim} is no multiple of 8 up to 256: FlexAttention only")
    return why


def _tensorrt(arch: Architecture, tp: int) -> list[str]:
    sizes = {"hidden": arch.hidden, "ffn": arch.ffn, "heads x head_dim": arch.heads * arch.head_dim}
    odd = [f"{name} {n}" for name, n in sizes.items() if n % (64 * tp)]
    why = [f"{', '.join(odd)}: no multiple of 64 x {tp}"] if odd else []
    if arch.head_dim not in TENSORRT_HEAD_DIMS:
        why.append(f"head_dim {arch.head_dim} has no kernel (nearest: {_nearest(arch.head_dim)})")
    return why


def _nearest(head_dim: int) -> int:
    return min(TENSORRT_HEAD_DIMS, key=lambda known: abs(known - head_dim))
