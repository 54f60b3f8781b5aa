"""The config section `benchmark`. No torch import."""

from dataclasses import dataclass
from typing import Any

from minitron_mcore.config.fields import changeable

BENCHMARKS = (
    *("mmlu", "winogrande", "arc_challenge", "hellaswag", "gsm8k"),
    *("truthfulqa", "xlsum", "mbpp", "humaneval"),
)


@dataclass
class BenchmarkConfig:
    """Benchmarks by lm-eval (pip install minitron_mcore[eval]) on local files; see docs/stages/benchmark.md."""

    tasks: list[str] = changeable(default_factory=lambda: list(BENCHMARKS))
    """Benchmarks to run. A benchmark that is measured already is not repeated."""
    data_dir: str | None = changeable(None)
    """Folder with the questions, NAME.SPLIT.jsonl or .jsonl.gz."""
    limit: int | None = None
    """Questions of each benchmark, the first ones; MMLU's are spread over its 57 subjects. null asks all."""
    micro_batch: int = changeable(8)
    """Sequences of a forward pass of one rank."""
    run_code: bool = changeable(False)
    """Consent to run the programs that a model writes, which mbpp and humaneval need, in the sandbox of
    `evaluation.benchmarks.sandbox`."""
    code_seconds: float = 10.0
    """Time of such a program, of its processor and by the clock."""
    code_memory_mb: int = 1024
    """Its address space."""
    published: Any = changeable(None)  # Hydra cannot add keys to a typed dictionary
    """Rows to print below the measured ones, {name: {benchmark: per cent}}; the group `benchmark` has those of the papers."""
