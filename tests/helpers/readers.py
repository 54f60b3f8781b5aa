"""Valid files of every kind that the package reads, and functions that read them as the stages do. For `tests.fuzz`."""

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from minitron_mcore.checkpoint import claim, disk, run_folder, stage_record, streaming
from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.cli import pipeline
from minitron_mcore.config import identity
from minitron_mcore.config.search import SearchConfig
from minitron_mcore.config.settings import (
    DataConfig,
    DepthConfig,
    EvaluateConfig,
    LogConfig,
    ParallelConfig,
    PruneConfig,
)
from minitron_mcore.config.stages import PlanRun, SearchRun
from minitron_mcore.data import blend, datasets, token_cache, tokenizer
from minitron_mcore.depth import study
from minitron_mcore.depth.point_log import PointLog
from minitron_mcore.distill import cache
from minitron_mcore.distill.metrics import MetricsWriter
from minitron_mcore.distill.trainer import Trainer
from minitron_mcore.errors import refuse
from minitron_mcore.evaluation import multiple_choice, perplexity
from minitron_mcore.export import model_card
from minitron_mcore.formats import hf_convert, megatron_gpt, sources
from minitron_mcore.importance.scores import load_scores, save_scores, summary
from minitron_mcore.models import architecture, parameter_table
from minitron_mcore.pruning import apply
from minitron_mcore.pruning.plan import load_plan, make_plan
from minitron_mcore.reporting import page, plots
from minitron_mcore.search.results import SPEEDS, collect
from minitron_mcore.search.runner import SearchRunner
from tests.helpers import cached_teacher, families, gguf_files, models, sentencepieces, text_files, work_dir
from tests.helpers.cutting import random_scores
from tests.helpers.training import CONFIG, micro_batches

ONE, DEPTH, S = ParallelConfig(), DepthConfig(sizes=[1, 2]), 12
SIZES = dict(num_hidden_layers=3, hidden_size=32, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2)
RUN = {"stage": "distill", "seed": 1, "dtype": "fp32", "data": {"train": ["a", "b"]}}
POINT = {"loss": 3.5, "kl": 0.5, "mse": 0.25, "accuracy": None}


def write_models(base: Path) -> None:
    folder = models.tiny_llama(base / "hf", vocab_size=text_files.VOCAB, **SIZES)
    text_files.write_tokenizer(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Card\n")
    hf_convert.import_folder(folder, base / "convert", ONE)
    claim.finish(base / "convert")
    shutil.copytree(folder, base / "shards")
    (base / "shards" / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": {}}
    for n, half in enumerate(np.array_split(sorted(models.weights(folder)), 2)):
        save_file({k: models.weights(folder)[k] for k in half}, base / "shards" / f"{n}.safetensors", {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(half.tolist(), f"{n}.safetensors")
    (base / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))


def write_gguf(base: Path) -> None:
    for name, size, more in (("plain", text_files.VOCAB, {}), ("words", 500, {"vocabulary": pieces(base)})):
        folder = families.tiny("llama2", base / name / "hf", **(gguf_files.SIZES | {"vocab_size": size}))
        gguf_files.write(base / name / "model.gguf", folder, "llama", gguf_files.Q.Q8_0, **more)


def pieces(base: Path) -> tuple[list, list, list]:
    (base / "spm").mkdir()
    pieces_of_model = sentencepieces.proto(sentencepieces.train(base / "spm", **sentencepieces.LLAMA)).pieces
    (base / "spm" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (base / "spm" / "added_tokens.json").write_text(json.dumps({"<s>": 1}))
    (base / "spm" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return [p.piece for p in pieces_of_model], [p.score for p in pieces_of_model], [p.type for p in pieces_of_model]


def write_run(base: Path) -> None:
    """Write a training run, its evaluation, a depth study, a search, teacher caches, a plan, and a work_dir of all stages."""
    source, run = open_checkpoint(base / "convert"), base / "delivery" / "run"
    parents = {"student": run_folder.identity(source), "teacher": None}
    details = {"settings": {"steps": 4}, "data": {"files": ["0.5 a", "0.5 b"], "hash": "x"}}
    run_folder.describe(run, source.arch, "f" * 16, parents, source.hf, **details, ancestry=source.lineage)
    training, batches = trainer(base / "convert"), micro_batches(CONFIG, 0, 0, 1)
    training.train_step([next(batches) for _ in range(CONFIG.global_batch)])
    training.save(run)
    steps = [
        {"step": n, "tokens": 9 * n, "kd_loss": 1.5, "lm_loss": 2.5, "teacher_entropy": 1.0, "lr": 1e-3} for n in (0, 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (run / "config.yaml").write_text(yaml.safe_dump(RUN))
    (base / "delivery" / "evaluate").mkdir()
    figures = {"source": "run", "files": [{"file": "a", "loss": 2.5, "perplexity": 12.2}]}
    (base / "delivery" / "evaluate" / "evaluation.json").write_text(json.dumps(figures))
    (base / "text").mkdir()
    world = cached_teacher.World(base, cached_teacher.write_text(base / "text"))
    shutil.copytree(base / "convert", base / "teacher")
    for kind in ("topk", "hidden_int8"):
        cached_teacher.record(world.writer(kind, kind=kind, **({"top_k": 8} if kind == "topk" else {})))
    work_dir.write(base / "page")
    (base / "study").mkdir()
    points(base / "study", lambda dropped: POINT | {"dropped": list(dropped)})
    drop = {"model": source.fingerprint, "metric": "loss", "kind": "contiguous", "drop": {"1": [2], "2": [1, 2]}}
    (base / "study" / "depth.json").write_text(json.dumps(drop))
    scores = random_scores(source.arch)
    scores.metadata["fingerprint"] = source.fingerprint
    (base / "plan").mkdir()
    save_scores(base / "plan", scores)
    plan = make_plan(source.arch, source.fingerprint, scores, PruneConfig(hidden=24, ffn=16, blocks=2))
    (base / "plan" / "plan.json").write_text(plan.to_json())
    (base / "search").mkdir()
    runner = search_runner(base / "search")
    runner._prepare_folder()
    for candidate in runner.space.candidates:
        runner.store.write(candidate, "measured.json", {"zero_shot_loss": 5.0} | dict.fromkeys(SPEEDS, 9.0))
        runner.store.write(candidate, "trained.json", {"steps": [2, 4], "losses": [4.5, 4.0]})


def write_texts(base: Path) -> None:
    (base / "texts").mkdir()
    rows = ["the cat", "naïve 😀 " * 9, "x"]
    for name in ("a.jsonl", "b.jsonl.gz"):
        text_files.write_jsonl(base / "texts" / name, rows)
    (base / "texts" / "c.txt").write_text("\n".join(rows))
    asked = [
        {"sentence": "The _ sat.", "option1": "cat", "option2": "sun", "answer": "1"},
        {"question": "What?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
        {"query": "Who", "choices": ["he", "it"], "gold": 1},
    ]
    for name in ("q.jsonl", "r.jsonl.gz"):
        content = "".join(json.dumps(row) + "\n" for row in asked).encode()
        (base / "texts" / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)


def trainer(folder: Path) -> Trainer:
    return Trainer(open_checkpoint(folder), None, replace(CONFIG, kd_weight=0.0, lm_weight=1.0), ONE, "fp32")


def weights(folder: Path, model: Path | None = None, source: Path | None = None) -> None:
    """Read a source as convert does: all weights, their hash, and a GGUF file's tokenizer."""
    with sources.open_source(model or folder, source or folder, torch.float32) as (hf, opened):
        arch, _ = architecture.read_hf(hf)
        opened.check(arch)
        models.whole(opened, parameter_table.parameters(arch))
        opened.fingerprint(arch)
        if source and source.suffix == ".gguf":
            tokens(hf)


def tokens(folder: Path) -> None:
    loaded, rows = tokenizer.load(folder), ["the cat", "naïve 😀 <s>", ""]
    loaded.decode(loaded.documents(rows)[1]), loaded.spans(rows), loaded.pieces()


def evaluated(folder: Path) -> None:
    """Read a Hugging Face folder as evaluate does, with transformers."""
    model = perplexity.HFModel(str(folder))
    tokenizer.open_tokenizer(DataConfig(), folder, model.vocab_size)
    model.nll(torch.arange(S)[None], torch.ones(1, S, dtype=torch.bool))


def sharded(folder: Path) -> None:
    """Read a checkpoint into a model, and tensor by tensor."""
    source = open_checkpoint(folder)
    run_folder.build_model(source, ONE, "fp32")
    models.whole(streaming.Reader(source), parameter_table.parameters(source.arch))


def resumed(folder: Path) -> None:
    with claim.claim_run_folder(folder, RUN):
        resumed_trainer = trainer(BASE / "convert")
        resumed_trainer.resume(folder)
        MetricsWriter(folder, resumed_trainer.step, LogConfig()).close()


def delivered(folder: Path) -> None:
    source, out = open_checkpoint(folder / "run"), folder / "out"
    out.mkdir()
    hf_convert.export_folder(source, out)
    model_card.complete_folder(model_card.checkpoint_origin(source), out)


def token_files(folder: Path) -> None:
    config = DataConfig(train=[f"0.3 {folder}/a", f"0.7 {folder}/b"], cache=str(folder / "cache"))
    prefixes, weights = token_cache.prepare(config, folder, text_files.VOCAB)
    order = datasets.SampleOrder(prefixes, weights, seed=3, sequence_length=S, num_samples=16)
    samples = datasets.Samples(order, config.cache, text_files.VOCAB)
    list(datasets.train_batches(samples, micro_batch_size=2, global_batch_size=4, num_samples=16))
    datasets.calibration(prefixes, vocab_size=text_files.VOCAB, sequence_length=S, num_samples=3, seed=3)


def texts(folder: Path) -> None:
    names = [str(folder / name) for name in ("a.jsonl", "b.jsonl.gz", "c.txt")]
    loaded = tokenizer.load(BASE / "hf")
    token_cache.tokenize(names, loaded, str(folder / "cache"))
    for name in names:
        perplexity.windows(name, loaded, S)
    for name in ("q.jsonl", "r.jsonl.gz"):
        multiple_choice.read(str(folder / name))


def planned(folder: Path) -> None:
    source = open_checkpoint(BASE / "convert")
    plan = load_plan(folder)
    plan.notes(), plan.summary(), plan.digest()
    apply.build_pruned(source, plan, ONE, "fp32")


def scored(folder: Path) -> None:
    source = open_checkpoint(BASE / "convert")
    scores = load_scores(folder, source.arch, source.fingerprint)
    plan = make_plan(source.arch, source.fingerprint, scores, PruneConfig(hidden=24, ffn=16, blocks=2))
    summary(scores), plan.digest()


def scores_drawn(folder: Path) -> None:
    source = open_checkpoint(BASE / "convert")
    plots.plot_importance(folder / "scores.safetensors", folder / "a.png")
    plots.plot_plan(load_plan(folder), load_scores(folder, source.arch, source.fingerprint).vectors, folder / "b.png")


def points(folder: Path, meter: study.Measure | None = None) -> None:
    """Resume a depth study from its points; `meter` measures missing ones."""
    measure = PointLog(
        folder, meter or (lambda dropped: POINT | {"dropped": list(dropped)}), 9, False, model="m", data="d"
    )
    baseline = measure([])
    sweep = [
        {"size": n, "first": d[0]} | measure(d)
        for n in study.sweep_sizes(DEPTH, 3)
        for d in study.contiguous_runs(3, n)
    ]
    rank = study.make_ranking(DEPTH.metric)
    chosen = study.choose(DEPTH, 3, measure, rank)
    list(study.warnings(chosen, DEPTH.metric, rank, None, 0))
    results = {"baseline": baseline, "sweep": sweep, "drop": {str(row["size"]): row["dropped"] for row in chosen}}
    if meter is None:
        plots.plot_depth(results, folder / "depth.png")


def studied(folder: Path) -> None:
    source = open_checkpoint(BASE / "convert")
    config, _ = study.apply_study(
        folder, source.arch.blocks, source.fingerprint, PruneConfig(hidden=24, ffn=16, blocks=2)
    )
    make_plan(source.arch, source.fingerprint, random_scores(source.arch), config)


def taught(folder: Path) -> None:
    """Read a teacher cache as distillation does."""
    world = cached_teacher.World(BASE, [f"0.3{BASE}/text/a", f"0.7{BASE}/text/b"])
    student, teacher = open_checkpoint(BASE / "convert"), cache.open_teacher(folder)
    refuse(teacher.problems(student.arch, CONFIG) if isinstance(teacher, cache.Cache) else ["another folder"])
    prefixes, parts = blend.parse_blend([f"0.3 {BASE}/text/a", f"0.7 {BASE}/text/b"])
    teacher.check(prefixes, parts, world.data(), 16)
    reader = cache.CachedTeacher(teacher, student.arch, ONE)
    list(reader.add_teacher_outputs([{"samples": torch.tensor([n, n + 1])} for n in range(0, 16, 2)]))


def search_runner(folder: Path) -> SearchRunner:
    settings = SearchConfig(hidden=[24, 32], best=0, steps=4)
    where = dict(
        source=str(BASE / "convert"), scores=str(BASE / "plan"), out_dir=str(folder), work_dir="w", teacher="t"
    )
    text = DataConfig(heldout=[str(BASE / "texts" / "a.jsonl")])
    config = SearchRun(**where, data=text, search=settings, evaluate=EvaluateConfig(sequence_length=S))
    source = open_checkpoint(BASE / "convert")
    return SearchRunner(config, source, None, load_scores(config.scores, source.arch, source.fingerprint))


def searched(folder: Path) -> None:
    """Collect the results of a search's candidates, and plot them."""
    runner = search_runner(folder)
    plots.plot_search(collect(runner.store, runner.space, list(runner._measure())), folder)


def reported(folder: Path) -> None:
    page.write(folder, folder / "report.html")


def losses_drawn(folder: Path) -> None:
    plots.plot_losses({"run": folder / "run" / "metrics.jsonl"}, folder / "losses.png")


PLAN = PlanRun(out_dir="o", work_dir="w", source="s", scores="s")


def piped(folder: Path) -> None:
    step = pipeline.Step("plan", [], replace(PLAN, out_dir=str(folder)))
    pipeline.is_finished(step)
    refuse(pipeline._problems(step))


def reseal(folder: Path) -> None:
    """Update the hashes in the manifests, as the author of a malicious file would."""
    for manifest in [*folder.rglob("integrity.json"), *folder.rglob("index.json")]:
        try:
            content = json.loads(manifest.read_text())
            kept = {n: disk.sha256(manifest.parent / n) for n in content["files"] if (manifest.parent / n).is_file()}
            content.pop("sizes", None)
            manifest.write_text(json.dumps(content | {"files": kept}))
        except (ValueError, TypeError, KeyError, RecursionError, AttributeError, OSError):
            pass


class Kind(NamedTuple):
    folder: str
    """In the folder of `make`."""
    files: str
    """Patterns of the files to damage."""
    read: Callable[[Path], object]
    sealed: bool = False
    """Whether manifests are updated after the damage."""


KINDS = {
    "config.json": Kind("hf", "config.json", weights),
    "model.safetensors": Kind("hf", "model.safetensors", weights),
    "shards and index": Kind("shards", "*.safetensors *.index.json", weights),
    "folder, transformers": Kind("hf", "*.json model.safetensors", evaluated),
    "tokenizer.json": Kind("hf", "tokenizer*.json", tokens),
    "tokenizer.model": Kind("spm", "tokenizer.model *.json", tokens),
    "GGUF": Kind("plain", "*.gguf", lambda f: weights(f, f / "model.gguf", f / "model.gguf")),
    "GGUF, sentencepiece": Kind("words", "*.gguf", lambda f: weights(f, f / "model.gguf", f / "model.gguf")),
    "GPTModel checkpoint": Kind("gpt", "*.txt release/.metadata release/*", lambda f: weights(f, BASE / "hf", f)),
    "checkpoint": Kind("convert", "model.json step*/.metadata step*/*", sharded),
    "checkpoint, sealed": Kind("convert", "step*/.metadata step*/*.distcp", sharded, True),
    "resume": Kind("delivery/run", "config.yaml model.json metrics.jsonl step*/.metadata step*/*", resumed, True),
    "export": Kind("delivery", "*/*.json* run/hf/*.json run/hf/*.md", delivered),
    ".bin and .idx": Kind("text", "*.bin *.idx", token_files),
    "order of samples": Kind("ordered", "cache/*/*", token_files),
    "text and questions": Kind("texts", "*", texts),
    "plan.json": Kind("plan", "plan.json", planned),
    "scores.safetensors": Kind("plan", "scores.safetensors", scored),
    "scores and plan, drawn": Kind("plan", "*", scores_drawn),
    "depth points": Kind("study", "points.jsonl", points),
    "depth.json": Kind("study", "depth.json", studied),
    "teacher cache": Kind("topk", "index.json samples*", taught, True),
    "teacher cache, hidden": Kind("hidden_int8", "index.json samples* head*", taught, True),
    "search's candidates": Kind("search", "candidates/*/*.json", searched),
    "report": Kind("page", "*/*.json* */*.yaml */*.safetensors */*.png */*/*.json", reported),
    "metrics.jsonl, drawn": Kind("delivery", "run/metrics.jsonl", losses_drawn),
    "pipeline": Kind("piped", "config.yaml inputs.json .complete", piped),
}
BASE = Path()


def make(base: Path) -> None:
    """Write all files (one rank)."""
    globals()["BASE"] = base
    base.mkdir()
    write_models(base)
    write_gguf(base)
    (base / "gpt").mkdir()
    megatron_gpt.export_folder(open_checkpoint(base / "convert"), base / "gpt", ONE, "fp32")
    write_texts(base)
    write_run(base)
    shutil.copytree(base / "text", base / "ordered")
    token_files(base / "ordered")
    (base / "piped").mkdir()
    (base / "piped" / "config.yaml").write_text(yaml.safe_dump(identity.resolved(PLAN)))
    stage_record.record_inputs(base / "piped", stage_record.inputs({"source": "s", "scores": "s"}))
    claim.finish(base / "piped")
