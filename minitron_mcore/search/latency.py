"""Inference speed of an architecture: the transformers model with its key/value cache and random weights, in one process.

The time of a matrix product does not depend on its values, so a candidate is measured before it is pruned or trained.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_mcore.config.search import SpeedConfig
from minitron_mcore.errors import UserError
from minitron_mcore.models import architecture, build
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups
from minitron_mcore.reading import read_json


def check(arch: Architecture, speed: SpeedConfig) -> None:
    """Raise UserError if the prompt and the generated tokens exceed the model's positions."""
    if speed.prompt + speed.generated > arch.max_positions:
        raise UserError(
            f"search.speed.prompt {speed.prompt} + search.speed.generated {speed.generated} is more than the model's "
            f"{arch.max_positions} positions: give smaller numbers."
        )


def measure(arch: Architecture, hf_folder: Path, speed: SpeedConfig, dtype: str) -> dict[str, Any]:
    """Median speed of an architecture on this rank's device, in tokens of the whole batch per second.

    Args:
        hf_folder: with the source's config.json.
        dtype: "bf16" or "fp32".

    Returns:
        prefill_tokens_per_second: of the prompts, up to the logits of their last tokens;
        decode_tokens_per_second: greedy, one token at a time;
        measured_on: device, threads, dtype.
    """
    device, threads = process_groups.device(), torch.get_num_threads()
    torch.set_num_threads(speed.threads or threads)
    try:
        model = random_model(arch, read_json(hf_folder / "config.json", "make the checkpoint again"), dtype)
        prompt = torch.randint(0, arch.vocab, (speed.batch, speed.prompt), device=device)
        # The first is a warm-up.
        prefill, decode = zip(
            *(serve(model, prompt, speed.generated) for _ in range(speed.repetitions + 1)), strict=True
        )
        return {
            "prefill_tokens_per_second": speed.batch * speed.prompt / statistics.median(prefill[1:]),
            "decode_tokens_per_second": speed.batch * speed.generated / statistics.median(decode[1:]),
            "measured_on": f"{process_groups.device_name()}, {dtype}",
        }
    finally:
        torch.set_num_threads(threads)


def serve(model: torch.nn.Module, prompt: Tensor, generated: int) -> tuple[float, float]:
    """Seconds of the prompts [B, P] up to the logits of their last tokens, and of `generated` greedy tokens after them."""
    prefill, output = _timed(lambda: model(prompt, use_cache=True, logits_to_keep=1))
    return prefill, _timed(lambda: _decode(model, output, generated))[0]


def random_model(arch: Architecture, parent: dict[str, Any], dtype: str) -> torch.nn.Module:
    """transformers' model of an architecture with random weights on this rank's device.

    Args:
        parent: see `architecture.to_hf`.
        dtype: "bf16" or "fp32".
    """
    config = architecture.to_hf(arch, parent, dtype)
    del config["dtype"], config["torch_dtype"]
    # On a CPU torch's grouped product over experts requires rows of a multiple of 16 bytes.
    experts = {"experts_implementation": "eager"} if arch.experts and process_groups.device().type == "cpu" else {}
    with process_groups.device():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=build.DTYPES[dtype], **experts)
    return model.eval()


@torch.inference_mode()
def _timed[T](call: Callable[[], T]) -> tuple[float, T]:
    """Seconds of a call, and its result."""
    _synchronize()
    start = time.perf_counter()
    result = call()
    _synchronize()
    return time.perf_counter() - start, result


def _synchronize() -> None:
    if process_groups.device().type == "cuda":
        torch.cuda.synchronize()


def _decode(model: torch.nn.Module, output: Any, count: int) -> Tensor:
    """Generate `count` tokens greedily after a forward pass, without a stop token; returns the last [B, 1]."""
    for _ in range(count):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
    return token
