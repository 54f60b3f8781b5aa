"""What each statistic is worth: the loss of SmolLM2-135M right after pruning to 115 M and to 100 M parameters, no retraining.

All statistics are collected in the same forward passes, over 64 samples of 512 tokens drawn from a mixture in equal parts (books,
Python's enhancement proposals, React's documentation, the standard library); hidden and ffn are then cut by each and the pruned
models evaluated on text of three other kinds, in bf16: WikiText-2's validation text, held-out books, Python code, 12 windows of 512
tokens spread over each. Two data-parallel processes of one thread. About ten minutes on two cores; --quick takes three statistics,
the smaller size and few samples and windows. Without ../shared/data there is nothing to evaluate on, and it ends.
"""

import contextlib
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import torch
from common import Figure, arguments, write

from minitron_mcore.checkpoint import run_folder, steps
from minitron_mcore.cli import demo
from minitron_mcore.config.settings import Aggregation, DataConfig, FfnSite, ParallelConfig, PruneConfig, Statistic
from minitron_mcore.data.text_reader import documents
from minitron_mcore.formats import hf_convert
from minitron_mcore.reporting import tables
from minitron_mcore.testing import on_ranks

DATA = Path(__file__).parents[2] / "shared/data/text"
RUN = Path("runs/statistics")
HELDOUT = {
    "WikiText-2": DATA / "wikitext2.valid.txt",
    "books": DATA / "books_valid.jsonl.gz",
    "code": DATA / "thealgorithms_python.jsonl.gz",
}
SIZES = {"115 M": PruneConfig(hidden=540, ffn=1308), "100 M": PruneConfig(hidden=504, ffn=1152)}
STATISTICS = [Statistic(sequence, batch) for sequence, batch in itertools.product(Aggregation, Aggregation)]
STATISTICS += [
    Statistic(ffn_site=site, weighted=weighted)
    for site, weighted in ((FfnSite.before_gate, False), (FfnSite.after_gate, True), (FfnSite.before_gate, True))
]
EACH = 2_000_000  # characters of each kind of calibration text
ONE = ParallelConfig()


@dataclasses.dataclass(frozen=True)
class Effort:
    statistics: list[Statistic]
    sizes: list[str]
    samples: int = 64
    windows: int = 12
    length: int = 512


def calibration_text(path: Path) -> Path:
    """Documents from the start of each source, one JSON line each."""
    sources = [DATA / f"{name}.jsonl.gz" for name in ("books_train", "peps", "react_docs")]
    sources.append(demo.write_stdlib_text(RUN / "text")[0])
    with open(path, "w") as out:
        for source in sources:
            left = EACH
            for text in itertools.chain.from_iterable(texts for texts, _ in documents(str(source))):
                out.write(json.dumps({"text": text[:left]}) + "\n")
                left -= len(text)
                if left <= 0:
                    break
    return path


def measure(teacher: Path, text: Path, effort: Effort) -> list[tuple[str, int, list[float]]]:
    """(size, number of the statistic, loss on each text); first that of the whole model."""
    import torch.distributed as dist

    from minitron_mcore.checkpoint.streaming import Reader
    from minitron_mcore.data import datasets, token_cache
    from minitron_mcore.data.tokenizer import open_tokenizer
    from minitron_mcore.evaluation import perplexity
    from minitron_mcore.evaluation.windows import file_windows
    from minitron_mcore.importance.collector import collect_importance
    from minitron_mcore.importance.scores import Scores
    from minitron_mcore.parallel import process_groups
    from minitron_mcore.parallel.schedule import forward
    from minitron_mcore.pruning import apply
    from minitron_mcore.pruning.plan import make_plan

    source, config = run_folder.open_checkpoint(RUN / "convert"), DataConfig([str(text)], cache=str(RUN / "cache"))
    arch, dp = source.arch, process_groups.dp_group()
    prefixes, _ = token_cache.prepare(config, teacher, arch.vocab)
    tokens, _ = datasets.calibration(
        prefixes, vocab_size=arch.vocab, sequence_length=effort.length, num_samples=effort.samples, seed=config.seed
    )
    model = run_folder.build_model(source, ONE, "bf16")
    batches = tokens[dp.rank() :: dp.size()].split(4)
    progress = process_groups.Progress("scores", len(batches), "micro-batches")
    with contextlib.ExitStack() as stack:
        collectors = [
            stack.enter_context(collect_importance(model, arch, statistic)) for statistic in effort.statistics
        ]
        for done, batch in enumerate(batches, 1):
            forward(model, [{"tokens": batch}], lambda hidden, batch: None)
            progress.update(done)
    scores = [Scores(collector.scores(), {}) for collector in collectors]
    tokenizer = open_tokenizer(config, teacher, arch.vocab)
    texts = [file_windows(str(path), tokenizer, effort.length) for path in HELDOUT.values()]

    def losses(model, arch) -> list[float]:
        nll, found = perplexity.ShardedModel(model, arch).nll, []
        for cut in texts:
            chosen = torch.arange(effort.windows) * len(cut.tokens) // effort.windows
            tokens, mask = cut.tokens[chosen], cut.mask[chosen]
            total = nll(tokens[dp.rank() :: dp.size()], mask[dp.rank() :: dp.size()])
            dist.all_reduce(total, group=dp)
            found.append(total.item() / mask.sum().item())
        return found

    found, reader = [("135 M", -1, losses(model, arch))], Reader(source)
    progress = process_groups.Progress("pruned models", len(effort.sizes) * len(scores), "models")
    for size, (number, each) in itertools.product(effort.sizes, enumerate(scores)):
        plan = make_plan(arch, source.fingerprint, each, SIZES[size])
        found.append((size, number, losses(apply.build_pruned(source, plan, ONE, "bf16", reader), plan.target)))
        progress.update(len(found) - 1)
    return found


def main() -> None:
    options = arguments(__doc__)
    if not all(path.is_file() for path in HELDOUT.values()):
        sys.exit(print(f"{DATA} does not hold the texts to evaluate on: nothing measured"))
    effort = Effort(STATISTICS, list(SIZES))
    if options.quick:
        default, *_, before_gate, weighted, _ = STATISTICS[1:]
        effort = Effort([default, before_gate, weighted], ["100 M"], samples=8, windows=2)
    RUN.mkdir(parents=True, exist_ok=True)
    teacher = demo.fetch_teacher(Path("runs/cache/smollm2_135m"))
    if not steps.published(RUN / "convert"):
        on_ranks(hf_convert.import_folder, 1, ONE, teacher, RUN / "convert", ONE)
    text = calibration_text(RUN / "calibration.jsonl")
    found = on_ranks(measure, 2, ONE, teacher, text, effort, timeout=7200)[0]
    rows, figures = [], []
    for number in range(-1, len(effort.statistics)):
        statistic = effort.statistics[number] if number >= 0 else None
        named = {"batch": "none pruned", "sequence": "", "ffn": "", "weighted": ""}
        if statistic:
            named = {"batch": str(statistic.batch), "sequence": str(statistic.sequence), "ffn": str(statistic.ffn_site)}
            named["weighted"] = "yes" if statistic.weighted else ""
        losses = {
            (size, text): loss
            for size, n, each in found
            if n == number
            for text, loss in zip(HELDOUT, each, strict=True)
        }
        rows.append(named | {f"{size} {text}": loss for (size, text), loss in losses.items()})
        label = " ".join(filter(None, named.values()))
        figures += [
            Figure("statistics", f"smollm2 {size} {text}", label, "loss", loss, "nats/token")
            for (size, text), loss in losses.items()
        ]
    tables.table("loss right after pruning, nats a token", rows)
    write(figures, options.json)


if __name__ == "__main__":
    main()
