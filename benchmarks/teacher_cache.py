"""What a teacher's cache costs: bytes a token, the error of the student's gradient, the time of a step beside the live teacher's.

SmolLM2-135M teaches its 100 M student, just pruned by importance over a few samples. Error: the gradients that one micro-batch's
forward KL sends into the student's final hidden states and its head, against those from live logits, all in fp32, so that only what
the cache leaves out shows: norm of the difference over the norm. The 1,024 tokens are WikiText-2's, or without ../shared/data the
standard library's. Time: whole steps of 4 x 256 tokens in bf16, one process on all cores, the teachers in turn, median.
"""

import os
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from common import Figure, arguments, write
from torch import Tensor

from minitron_mcore.checkpoint import run_folder, steps
from minitron_mcore.cli import demo
from minitron_mcore.config.settings import DataConfig, DistillConfig, ParallelConfig, PruneConfig, Statistic
from minitron_mcore.config.stages import CacheKind, TeacherCacheRun
from minitron_mcore.formats import hf_convert
from minitron_mcore.reporting import tables
from minitron_mcore.testing import on_ranks

TEXT = Path(__file__).parents[2] / "shared/data/text/wikitext2.valid.txt"
RUN = Path("runs/teacher_cache")
ONE = ParallelConfig()
SETTINGS = DistillConfig(steps=6, global_batch=4, micro_batch=4, sequence_length=256, warmup_steps=1)
ERRORS = [f"error of {what} gradient{of}" for of in ("", ", mean of passes") for what in ("hidden", "head")]
DRAWN_PASSES = 8
"""Caches with different draws, whose mean gradient shows what is bias and what is noise."""
TIMED = {"topk 64": {"kind": CacheKind.topk, "top_k": 64}, "hidden": {"kind": CacheKind.hidden}}


def final_hidden(model, tokens: Tensor) -> Tensor:
    from minitron_mcore.parallel import schedule

    found = []
    schedule.forward(model, [{"tokens": tokens}], lambda hidden, batch: found.append(hidden.flatten(0, 1)))
    return found[0]


def errors(tokens: Tensor, ks: list[int]) -> dict[str, tuple[float, ...]]:
    """By kind of cache: bytes a token, relative error of the gradients of hidden states and head, and those of the gradients' mean
    over `DRAWN_PASSES` caches with other draws."""
    from minitron_mcore.distill import cache, checks
    from minitron_mcore.distill.cache_writer import entries
    from minitron_mcore.distill.losses import FactoredLogits, TopKLogProbs, distillation_loss
    from minitron_mcore.parallel import process_groups

    teacher, student = (run_folder.open_checkpoint(RUN / name) for name in ("convert", "student"))
    vocab, (ours, theirs) = teacher.arch.vocab, (run_folder.build_model(x, ONE, "fp32") for x in (student, teacher))
    hidden, wanted, head = final_hidden(ours, tokens), final_hidden(theirs, tokens), theirs.head().detach()
    labels, mask = tokens.t().reshape(-1), torch.ones(tokens.numel())

    def gradients(teacher: FactoredLogits | TopKLogProbs) -> tuple[Tensor, Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, ours.head())]
        distillation_loss(FactoredLogits(*leaves), teacher, labels, mask, vocab_size=vocab)[0].backward()
        return tuple(leaf.grad for leaf in leaves)

    exact = gradients(FactoredLogits(wanted, head))

    def against(found: tuple[Tensor, Tensor]) -> tuple[float, float]:
        return tuple(((x - y).norm() / y.norm()).item() for x, y in zip(found, exact, strict=True))

    def size(kind: CacheKind, k: int = 0) -> int:
        return checks.cache_bytes(kind, k, vocab, teacher.arch.hidden, 2)

    found, logits = {}, wanted @ head[:vocab].t()
    group = process_groups.tp_group()
    for k, draws in [(n, draws) for n in ks for draws in ((0, n // 2, n) if n <= 256 else (0,))]:
        each = []
        for seed in range(DRAWN_PASSES if draws else 1):
            uniform = torch.rand(len(logits), draws, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            packed = cache.pack_top(*entries(logits.clone(), k - draws, uniform, 0, group), vocab)
            ids, log_probs = cache.unpack_top(packed)
            each.append(gradients(TopKLogProbs(ids, log_probs[:, :-1], log_probs[:, -1])))
        mean = tuple(sum(parts) / len(each) for parts in zip(*each, strict=True))
        found[f"topk {k - draws}" + (f" + {draws} drawn" if draws else "")] = (
            size(CacheKind.topk, k), *against(each[0]), *against(mean)
        )  # fmt: skip
    rounded = head.bfloat16().float()
    for kind in (CacheKind.hidden, CacheKind.hidden_int8):
        kept = cache.unpack_hidden(cache.pack_hidden(wanted.bfloat16(), kind), torch.bfloat16).float()
        errors = against(gradients(FactoredLogits(kept, rounded)))
        found[str(kind)] = size(kind), *errors, *errors
    return found


def prepare(text: str) -> Tensor:
    """Write the student and the caches; one micro-batch of the text."""
    from minitron_mcore.data import datasets, token_cache
    from minitron_mcore.distill import cache_writer
    from minitron_mcore.importance.collector import score
    from minitron_mcore.pruning import apply
    from minitron_mcore.pruning.plan import make_plan

    torch.set_num_threads(os.cpu_count())
    source, config = run_folder.open_checkpoint(RUN / "convert"), DataConfig([text], cache=str(RUN / "cache"))
    prefixes, _ = token_cache.prepare(config, source.hf, source.arch.vocab)
    shape = dict(vocab_size=source.arch.vocab, sequence_length=SETTINGS.sequence_length)
    if not steps.published(RUN / "student"):
        tokens, mask = datasets.calibration(prefixes, num_samples=16, seed=1, **shape)
        scores = score(run_folder.build_model(source, ONE, "bf16"), source, tokens, mask, 4, Statistic())
        plan = make_plan(source.arch, source.fingerprint, scores, PruneConfig(hidden=504, ffn=1152))
        apply.prune(source, plan, RUN / "student", ONE)
    sizes = {name: getattr(SETTINGS, name) for name in ("steps", "global_batch", "micro_batch", "sequence_length")}
    for name, kind in TIMED.items():
        out_dir = str(RUN / name.replace(" ", "_"))
        cache_writer.run(
            TeacherCacheRun(data=config, teacher=str(RUN / "convert"), out_dir=out_dir, **kind, **sizes), source
        )
    return datasets.calibration(prefixes, num_samples=4, seed=2, **shape)[0]


def step_seconds(text: str, repetitions: int) -> dict[str, list[float]]:
    """Of each teacher, the first step of each left out."""
    from minitron_mcore.data import token_cache
    from minitron_mcore.distill import cache
    from minitron_mcore.distill.trainer import Trainer

    torch.set_num_threads(os.cpu_count())
    config = DataConfig([text], cache=str(RUN / "cache"))
    student = run_folder.open_checkpoint(RUN / "student")
    folders = {"live": RUN / "convert"} | {name: RUN / name.replace(" ", "_") for name in TIMED}
    runs = {}
    for name, folder in folders.items():
        trainer = Trainer(student, cache.open_teacher(folder), replace(SETTINGS), ONE, "bf16")
        prefixes, weights = token_cache.prepare(config, student.hf, student.arch.vocab)
        runs[name] = trainer, trainer.train_batches(config, prefixes, weights)
    seconds = {name: [] for name in runs}
    for _ in range(repetitions + 1):
        for name, (trainer, batches) in runs.items():
            figures = trainer.train_step([next(batches)])
            seconds[name].append(figures["step_seconds"])
    return {name: found[1:] for name, found in seconds.items()}


def main() -> None:
    options = arguments(__doc__.splitlines()[0])
    ks, repetitions = ([16, 256], 2) if options.quick else ([16, 64, 256, 1024], 5)
    RUN.mkdir(parents=True, exist_ok=True)
    teacher = demo.fetch_teacher(Path("runs/cache/smollm2_135m"))
    if not steps.published(RUN / "convert"):
        on_ranks(hf_convert.import_folder, 1, ONE, teacher, RUN / "convert", ONE)
    text = str(TEXT if TEXT.is_file() else demo.write_stdlib_text(RUN / "text")[0])
    tokens = on_ranks(prepare, 1, ONE, text, timeout=1800)[0]
    found = on_ranks(errors, 1, ONE, tokens, ks, timeout=1800)[0]
    seconds = on_ranks(step_seconds, 1, ONE, text, repetitions, timeout=1800)[0]
    times = {name: statistics.median(each) for name, each in seconds.items()}
    ratios = {
        name: statistics.median(x / y for x, y in zip(each, seconds["live"], strict=True))
        for name, each in seconds.items()
    }
    rows = [{"teacher": "live"} | dict.fromkeys(ERRORS, 0.0)]
    rows += [
        {"teacher": name} | dict(zip(("bytes a token", *ERRORS), each, strict=True)) for name, each in found.items()
    ]
    for row in rows:
        row |= {"step [s]": times.get(row["teacher"]), "of live": ratios.get(row["teacher"])}
    tables.table("a teacher's cache: SmolLM2-135M to 100 M", rows, [f"text: {text}"])
    case = "smollm2 135M to 100M"
    figures = [Figure("teacher_cache", case, name, "bytes_a_token", size, "B") for name, (size, *_) in found.items()]
    for name, (_, *each) in found.items():
        for what, error in zip(ERRORS, each, strict=True):
            figures.append(Figure("teacher_cache", case, name, what.replace(" ", "_"), error, "of its norm"))
    figures += [Figure("teacher_cache", case, name, "step", value, "s") for name, value in times.items()]
    figures += [Figure("teacher_cache", case, name, "step_of_live", value, "of live") for name, value in ratios.items()]
    write(figures, options.json)


if __name__ == "__main__":
    main()
