"""How fast an architecture answers: transformers' own model with its key/value cache and random weights, on one process.

The time of a matrix product does not depend on the numbers in it, so a candidate is measured before it is pruned or trained.
"""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_mcore import runtime
from minitron_mcore.config import SpeedConfig
from minitron_mcore.errors import UserError
from minitron_mcore.models import architecture, build, hf_config
from minitron_mcore.models.architecture import Architecture


def check(arch: Architecture, speed: SpeedConfig) -> None:
    """Raises UserError where a model has no room for the prompt and what follows it."""
    if speed.prompt + speed.generated > arch.max_positions:
        raise UserError(
            f"search.speed.prompt {speed.prompt} + search.speed.generated {speed.generated} is more than the model's "
            f"{arch.max_positions} positions: give less."
        )


def measure(arch: Architecture, shipped: Path, speed: SpeedConfig, dtype: str) -> dict:
    """Speed of an architecture on this rank's device, in tokens of the whole batch per second, medians over the repetitions.

    Args:
        shipped: folder with the source's config.json.
        dtype: "bf16" or "fp32".

    Returns:
        prefill_tokens_per_second: reading the prompts, up to the logits of their last tokens;
        decode_tokens_per_second: writing on greedily, a token at a time;
        measured_on: the device, its threads, the dtype.
    """
    given, threads = runtime.device(), torch.get_num_threads()
    torch.set_num_threads(speed.threads or threads)
    try:
        model = _random_model(arch, shipped, dtype)
        prompt = torch.randint(0, arch.vocab, (speed.batch, speed.prompt), device=given)
        prefill, decode = [], []
        for _ in range(speed.repetitions + 1):  # the first warms up
            read, output = _timed(lambda: model(prompt, use_cache=True, logits_to_keep=1))
            written, _ = _timed(lambda output=output: _decode(model, output, speed.generated))
            prefill.append(read)
            decode.append(written)
        return {
            "prefill_tokens_per_second": speed.batch * speed.prompt / statistics.median(prefill[1:]),
            "decode_tokens_per_second": speed.batch * speed.generated / statistics.median(decode[1:]),
            "measured_on": f"{_device_name()}, {dtype}",
        }
    finally:
        torch.set_num_threads(threads)


def _random_model(arch: Architecture, shipped: Path, dtype: str) -> torch.nn.Module:
    config = architecture.to_hf(arch, hf_config.read_json(shipped / "config.json"), dtype)
    del config["dtype"], config["torch_dtype"]
    found = AutoConfig.for_model(**config)
    # On a CPU torch's product over all experts refuses rows that are no multiple of 16 bytes.
    experts = {"experts_implementation": "eager"} if arch.experts and runtime.device().type == "cpu" else {}
    with runtime.device():
        model = AutoModelForCausalLM.from_config(found, dtype=build.DTYPES[dtype], **experts)
    return model.eval()


@torch.inference_mode()
def _timed[T](call: Callable[[], T]) -> tuple[float, T]:
    """Seconds, and what the call returned."""
    _wait()
    start = time.perf_counter()
    result = call()
    _wait()
    return time.perf_counter() - start, result


def _wait() -> None:
    if runtime.device().type == "cuda":
        torch.cuda.synchronize()


def _decode(model: torch.nn.Module, output, count: int) -> Tensor:
    """`count` more tokens after a forward pass, greedily; no end of text stops it."""
    for _ in range(count):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
    return token


def _device_name() -> str:
    if runtime.device().type == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
