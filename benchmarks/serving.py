"""Requests per second of an exported folder in vLLM or TensorRT-LLM, by their own benchmark commands.

    python benchmarks/serving.py --engine vllm --model runs/llama31_minitron_4b_width/hf --batch 64 --fp8
    python benchmarks/serving.py --engine tensorrt-llm --model runs/llama31_minitron_4b_width/hf --batch 64

vLLM quantises weights and cache itself (`--fp8`). TensorRT-LLM serves a folder that ModelOpt quantised to FP8 as it is, a plain one
in BF16. Neither has run with this file; the output's format is that of their documentation (tests/benchmarks/test_serving.py).
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import common
from common import Figure
from throughput import LENGTHS

COMMAND = {"vllm": "vllm", "tensorrt-llm": "trtllm-bench"}
RATE = {
    "vllm": re.compile(r"^Throughput: ([\d.]+) requests/s", re.MULTILINE),
    "tensorrt-llm": re.compile(r"^Request Throughput \(req/sec\):\s+([\d.]+)", re.MULTILINE),
}
REQUESTS_PER_BATCH = 8


def command(engine: str, model: Path, batch: int, prompt: int, generated: int, fp8: bool, requests: Path) -> list[str]:
    """The engine's benchmark. `requests` is a file that TensorRT-LLM reads (see `write_requests`)."""
    if engine == "vllm":
        formats = ["--quantization", "fp8", "--kv-cache-dtype", "fp8"] if fp8 else ["--dtype", "bfloat16"]
        sizes = {"input-len": prompt, "output-len": generated, "num-prompts": REQUESTS_PER_BATCH * batch}
        sizes |= {"max-num-seqs": batch, "max-model-len": prompt + generated}
        options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        return ["vllm", "bench", "throughput", "--model", str(model), "--dataset-name", "random", *options, *formats]
    start = ["trtllm-bench", "--model", model.name, "--model_path", str(model), "throughput"]
    return [*start, "--dataset", str(requests), "--backend", "pytorch", "--max_batch_size", str(batch)]


def write_requests(path: Path, vocab: int, batch: int, prompt: int, generated: int) -> None:
    """One JSON line a request, with token ids."""
    lines = (
        {"task_id": i, "input_ids": [(i + at) % vocab for at in range(prompt)], "output_tokens": generated}
        for i in range(REQUESTS_PER_BATCH * batch)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def requests_per_second(engine: str, output: str) -> float:
    """The rate in the output of a benchmark.

    Raises:
        ValueError: the output has none.
    """
    rates = RATE[engine].findall(output)
    if not rates:
        raise ValueError(f"{COMMAND[engine]} printed no throughput; the end of its output:\n{output[-2000:]}")
    return float(rates[-1])


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--engine", choices=COMMAND, required=True)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--batch", type=int, default=32, help="requests that the engine runs at once")
    parser.add_argument("--fp8", action="store_true", help="vLLM only")
    options = parser.parse_args()
    if not shutil.which(COMMAND[options.engine]):
        sys.exit(f"{COMMAND[options.engine]} is not installed: install {options.engine}, or use its container.")
    if options.fp8 and options.engine == "tensorrt-llm":
        sys.exit("--fp8 is for vLLM: give TensorRT-LLM a folder that ModelOpt quantised to FP8.")
    vocab, figures = json.loads((options.model / "config.json").read_text())["vocab_size"], []
    for prompt, generated in LENGTHS[:1] if options.quick else LENGTHS:
        with tempfile.TemporaryDirectory() as scratch:
            requests, sizes = Path(scratch) / "requests.jsonl", (options.batch, prompt, generated)
            write_requests(requests, vocab, *sizes)
            words = command(options.engine, options.model, *sizes, options.fp8, requests)
            done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        rate = requests_per_second(options.engine, done.stdout)
        case = f"{options.model}, batch {options.batch}, {prompt} + {generated} tokens"
        print(f"{case}: {rate:.3f} requests/s", flush=True)
        figures.append(Figure("serving", case, options.engine, "rate", rate, "requests/s"))
    common.write(figures, options.json)


if __name__ == "__main__":
    main()
