"""Requests per second of Llama-3.1-8B's shape and of its width and depth students, beside the paper's 1.8 x and 2.7 x.

    python benchmarks/throughput.py            # on a CPU: hidden, ffn, heads, groups, vocabulary / 8, lengths / 16, batches / 8
    python benchmarks/throughput.py --roofline # only the estimate for the full sizes on one H100

Random weights in transformers with its key/value cache; the full sizes in bf16 on a GPU. The paper (arXiv 2408.11796, TensorRT-LLM,
FP8, one H100) gives averages over lengths, with batches of 32 for 8 B models and 64 for 4 B models, but neither lengths nor figures
for each. LENGTHS are those of TensorRT-LLM's own tables.
"""

import statistics
from dataclasses import replace
from pathlib import Path

import common
import torch
import yaml
from common import Figure

from minitron_mcore.config.search import Storage
from minitron_mcore.config.settings import PruneConfig
from minitron_mcore.models import flops
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.parallel import process_groups
from minitron_mcore.pruning.target import target_architecture
from minitron_mcore.reporting import tables
from minitron_mcore.search import latency

CONF = Path(__file__).parents[1] / "conf"
LENGTHS = [(128, 128), (128, 2048), (2048, 128), (2048, 2048)]
"""(prompt, generated) tokens of a request."""
BATCH = {"teacher": 32, "width": 64, "depth": 64}
PAPER = {"width": 1.8, "depth": 2.7}
BANDWIDTH, FP8_FLOPS = 3.35e12, 1979e12
"""Of one H100 SXM, by its data sheet: bytes per second, dense operations per second."""


def shapes() -> dict[str, Architecture]:
    teacher = Architecture(**yaml.safe_load((CONF / "model/llama31_8b.yaml").read_text())["architecture"])
    prunes = {name: yaml.safe_load((CONF / f"prune/llama31_4b_{name}.yaml").read_text()) for name in PAPER}
    return {"teacher": teacher} | {name: target_architecture(teacher, PruneConfig(**prunes[name])) for name in PAPER}


def scaled(arch: Architecture, by: int) -> Architecture:
    """The shape with widths divided by a constant; blocks and head_dim stay."""
    return replace(arch, **{name: getattr(arch, name) // by for name in ("hidden", "ffn", "heads", "groups", "vocab")})


def roofline(arch: Architecture, batch: int, prompt: int, generated: int) -> float:
    """Requests per second on one H100 if each step takes the longer of reading its bytes (weights without the embedding table,
    keys and values) and its operations, at the card's peaks in FP8. In BF16 bytes double and operations take twice as long."""
    weights = flops.weight_bytes(arch, Storage.fp8) - arch.vocab * arch.hidden
    seconds = max(weights / BANDWIDTH, flops.prefill_flops(arch, prompt, batch) / FP8_FLOPS)
    for context in range(prompt + 1, prompt + generated + 1):
        cache = flops.kv_cache_bytes(arch, context, batch, Storage.fp8)
        seconds += max((weights + cache) / BANDWIDTH, flops.decode_flops(arch, context, batch) / FP8_FLOPS)
    return batch / seconds


def roofline_figures() -> list[Figure]:
    figures, archs = [], shapes()
    for lengths in LENGTHS:
        case, teacher = "fp8, {} + {} tokens".format(*lengths), roofline(archs["teacher"], BATCH["teacher"], *lengths)
        figures += [Figure("throughput", case, "roofline, teacher", "rate", teacher, "requests/s")]
        for name in PAPER:
            for batch, label in (
                (BATCH[name], f"roofline, {name}"),
                (BATCH["teacher"], f"roofline, {name}, teacher's batch"),
            ):
                ratio = roofline(archs[name], batch, *lengths) / teacher
                figures += [Figure("throughput", case, label, "ratio", ratio, "x")]
    return figures


def measure(rounds: int, widths: int, lengths: int, batches: int) -> list[Figure]:
    """Rounds of all models in turn, so that other load meets all of them. A ratio compares runs of one round."""
    archs = {name: scaled(arch, widths) for name, arch in shapes().items()}
    dtype = "bf16" if process_groups.device().type == "cuda" else "fp32"
    with_random_weights = {
        name: latency.random_model(arch, {"model_type": "llama"}, dtype) for name, arch in archs.items()
    }
    figures = []
    for prompt, generated in ((p // lengths, g // lengths) for p, g in LENGTHS):
        rows: dict[str, list[tuple[float, float]]] = {name: [] for name in archs}
        for _ in range(rounds + 1):
            for name, model in with_random_weights.items():
                batch = BATCH[name] // batches
                ids = torch.randint(0, archs[name].vocab, (batch, prompt), device=process_groups.device())
                prefill, decode = latency.serve(model, ids, generated)
                rows[name].append((prefill / batch, decode / batch))
        figures += _figures(f"{dtype}, {prompt} + {generated} tokens", {name: row[1:] for name, row in rows.items()})
    return figures


def _figures(case: str, rows: dict[str, list[tuple[float, float]]]) -> list[Figure]:
    """Figures from (prefill, decode) seconds a request in each round."""
    totals = {name: [sum(row) for row in found] for name, found in rows.items()}
    rate = 1 / statistics.median(totals["teacher"])
    figures = [Figure("throughput", case, "teacher", "rate", rate, "requests/s")]
    for name in PAPER:
        ratios = [old / new for old, new in zip(totals["teacher"], totals[name], strict=True)]
        parts = [
            statistics.median(a[i] / b[i] for a, b in zip(rows["teacher"], rows[name], strict=True)) for i in (0, 1)
        ]
        named = {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
        named |= {"prefill": parts[0], "decode": parts[1]}
        figures += [Figure("throughput", case, name, metric, value, "x") for metric, value in named.items()]
    return figures


def mean_ratios(figures: list[Figure]) -> list[dict]:
    """The mean ratio of each implementation over the lengths, beside the paper's."""
    means: dict[tuple[str, str], list[float]] = {}
    for figure in (f for f in figures if f.metric == "ratio"):
        means.setdefault((figure.case.split(",")[0], figure.implementation), []).append(figure.value)
    paper = {name: next(ratio for key, ratio in PAPER.items() if key in name) for _, name in means}
    return [
        {"format": f, "of": n, "mean": statistics.mean(values), "paper": paper[n]} for (f, n), values in means.items()
    ]


def main() -> None:
    parser, on_gpu = common.parser(__doc__), torch.cuda.is_available()
    parser.add_argument("--roofline", action="store_true", help="print the estimate only")
    parser.add_argument("--rounds", type=int, default=5)
    for name, usual in {"widths": 8, "lengths": 16, "batches": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=1 if on_gpu else usual, help=f"divide {name} by this")
    options = parser.parse_args()
    figures = roofline_figures()
    if not options.roofline:
        figures += measure(1 if options.quick else options.rounds, options.widths, options.lengths, options.batches)
    keys = ("case", "implementation", "metric", "value", "unit")
    tables.table("throughput", [{key: getattr(figure, key) for key in keys} for figure in figures])
    tables.table("mean over lengths", mean_ratios(figures))
    common.write(figures, options.json)


if __name__ == "__main__":
    main()
