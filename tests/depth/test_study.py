"""Depth studies: a failure means that a model is cut where it hurts, or that a figure is not what it says."""

import contextlib
import inspect
import io
import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.checkpoint.stage_record import COMPLETE
from minitron_mcore.config.settings import DepthConfig, DepthKind, DepthMetric, ParallelConfig
from minitron_mcore.config.stages import DepthRun
from minitron_mcore.depth import study
from minitron_mcore.errors import UserError
from minitron_mcore.evaluation import multiple_choice
from minitron_mcore.importance.scores import Scores, save_scores
from minitron_mcore.testing import RankError, on_ranks
from tests.helpers import models
from tests.helpers.cutting import random_scores
from tests.helpers.launching import ROOT, config_of, plan, word_tokenizer, words
from tests.helpers.layouts import layouts

LENGTH, BLOCKS = 12, models.SIZES["num_hidden_layers"]
LAYOUTS = layouts("tp2_sp", "pp2", "tp2_dp2", "cp2", "pp2_virtual2")
SETS = [[], [0], [1, 4], [0, 1, 2], [3, 4]]  # the last two: all that one of two stages has


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tiny model with its tokenizer, its checkpoint, text, and questions of both forms."""
    root = tmp_path_factory.mktemp("depth")
    models.tiny_llama(root / "hf")
    word_tokenizer(root / "hf")
    on_ranks(models.import_hf, 1, ParallelConfig(), root / "hf", root / "ckpt", ParallelConfig())
    (root / "text.txt").write_text(words(64, 0))
    (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions()))
    return root


def questions() -> list[dict]:
    rows: list[dict] = []
    for n in range(5):  # of different lengths
        sentence = f"{words(3 + n, n)} _ {words(2 + n, 50 + n)}"
        rows.append(
            {"sentence": sentence, "option1": words(1, 90 + n), "option2": words(2, 70 + n), "answer": "12"[n % 2]}
        )
    for n in range(4):
        texts = [words(1 + (n + k) % 3, 100 + 10 * n + k) for k in range(3)]
        rows.append({"query": words(4 + n, 200 + n), "choices": texts, "label": n % 3})
    return rows


def measured(checkpoint, parallel, found, rows):
    """Points, option scores, logits without two blocks, a mistake, and the bytes that were kept."""
    from minitron_mcore.checkpoint import run_folder as checkpoints
    from minitron_mcore.data import tokenizer
    from minitron_mcore.depth import removal
    from minitron_mcore.parallel import process_groups

    opened = open_checkpoint(checkpoint)
    model = checkpoints.build_model(opened, parallel, "fp32")
    if process_groups.is_last_stage():  # the vocabulary's padding must have no say, whatever it holds
        model.head().data[opened.arch.vocab - process_groups.tp_group().rank() * len(model.head()) :] = 0.7
    scorer = multiple_choice.MultipleChoice(model, opened.arch, rows, tokenizer.load(opened.hf), 4)
    meter = removal.RemovalEvaluator(model, opened.arch, found, 2, scorer)
    points = [meter(dropped) for dropped in SETS]
    with removal.skip_blocks(model, opened.arch, [1, 2]):
        scores = scorer.scores()
    ids = models.tokens()
    with removal.skip_blocks(model, opened.arch, [1, 3]):
        cut = models.model_logits(model, opened.arch, ids)
    whole = models.model_logits(model, opened.arch, ids)
    with pytest.raises(UserError) as mistake, removal.skip_blocks(model, opened.arch, [2, 5]):
        pass
    kept = sum(batch["full"].nbytes for batch in meter.batches if "full" in batch)
    return points, scores, cut, whole, str(mistake.value), kept


def hf(folder, dropped=()):
    """The model in fp64 with these layers deleted."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    layers = [layer for i, layer in enumerate(model.model.layers) if i not in dropped]
    model.model.layers = torch.nn.ModuleList(layers)
    return lambda ids: model(ids, use_cache=False).logits


def oracle_scores(model, rows: list[dict]) -> list[list[float]]:
    """Option by option, the sum of log p of the words after the context."""
    found = []
    for row in rows:
        if "sentence" in row:
            before, after = row["sentence"].split("_")
            options = [(before + row[f"option{k}"], after) for k in (1, 2)]
        else:
            options = [(row["query"], choice) for choice in row["choices"]]
        found.append([])
        for context, scored in options:
            ids = torch.tensor([int(word[1:]) for word in f"{context} {scored}".split()])
            log_p = model(ids[None])[0].log_softmax(-1)
            first = len(ids) - len(scored.split())
            found[-1].append(sum(log_p[s - 1, ids[s]].item() for s in range(first, len(ids))))
    return found


@torch.no_grad()
def oracle(folder, found, rows: list[dict]) -> list[dict]:
    """The points in fp64 from full logits, token by token."""
    full, at = hf(folder)(found.tokens)[:, :-1][found.mask[:, 1:]], found.tokens[:, 1:][found.mask[:, 1:]]
    points = []
    for dropped in SETS:
        model = hf(folder, dropped)
        logits = model(found.tokens)[:, :-1][found.mask[:, 1:]]
        log_p, log_full = logits.log_softmax(-1), full.log_softmax(-1)
        answers = [max(range(len(scores)), key=scores.__getitem__) for scores in oracle_scores(model, rows)]
        right = [int(row["answer"]) - 1 if "sentence" in row else row["label"] for row in rows]
        points.append(
            {
                "loss": -log_p.gather(1, at[:, None]).mean().item(),
                "kl": (log_full.exp() * (log_full - log_p)).sum(1).mean().item(),
                "mse": ((full - logits).square().sum() / full.square().sum()).item(),
                "accuracy": sum(a == r for a, r in zip(answers, right, strict=True)) / len(rows),
            }
        )
    return points


@pytest.mark.default_cases("cp2", "pp2_virtual2")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_points_are_those_of_a_model_with_the_layers_deleted(made, layout):
    from minitron_mcore.data import tokenizer
    from minitron_mcore.estimate import memory
    from minitron_mcore.estimate.setting import Setting
    from minitron_mcore.evaluation import perplexity

    world, parallel = LAYOUTS[layout]
    found = perplexity.windows(str(made / "text.txt"), tokenizer.load(made / "hf"), LENGTH)
    assert len(found.tokens) == 6 and not found.mask[-1].all()  # the last is padded; four ranks' passes are not filled
    rows = multiple_choice.read(str(made / "questions.jsonl"))
    expected, ranks = (
        oracle(made / "hf", found, questions()),
        on_ranks(measured, world, parallel, made / "ckpt", parallel, found, rows),
    )
    with torch.no_grad():
        scores = oracle_scores(hf(made / "hf", [1, 2]), questions())
    for points, scored, _, _, mistake, _ in ranks:
        for dropped, point, wanted in zip(SETS, points, expected, strict=True):
            assert point["dropped"] == dropped
            assert {key: point[key] for key in wanted} == pytest.approx(wanted, rel=2e-5, abs=1e-6), dropped
        assert [row.tolist() for row in scored] == [pytest.approx(row, rel=2e-5) for row in scores]
        assert mistake == "block 5 does not exist: the model has blocks 0 to 4."
    _, _, cut, whole, _, kept = next(rank for rank in ranks if rank[2] is not None)
    if parallel.context == 1:  # otherwise a rank has the logits of its share of the sequence
        with torch.no_grad():
            assert (cut - hf(made / "hf", [1, 3])(models.tokens())).abs().max() <= 2e-4
        assert (whole - models.hf_logits(made / "hf", models.tokens())).abs().max() <= 2e-4  # nothing stays skipped
    given = Setting(parallel, world, "fp32", 2, LENGTH)
    assert kept == memory.depth_study(open_checkpoint(made / "ckpt").arch, given, 6)[-1]["hidden states"]


def landscape(single: list[float], cliff: set[int], asked: list | None = None) -> study.Measure:
    """Losses that add up, but for a fall where two blocks of `cliff` are missing; every question is answered where none is."""

    def measure(dropped) -> dict:
        if asked is not None:
            asked.append(list(dropped))
        loss = 3 + sum(single[block] for block in dropped) + 10 * (len(cliff & set(dropped)) > 1)
        accuracy = 1.0 if not cliff & set(dropped) else 0.5
        return {"dropped": list(dropped), "loss": loss, "kl": loss / 2, "mse": -loss, "accuracy": accuracy}

    return measure


SINGLE = [5.0, 0.4, 0.1, 0.3, 0.1, 0.5, 0.2, 4.0]


def test_no_rule_but_the_naive_one_walks_into_the_cliff():
    """2 and 4 are each missed least, and together most."""
    measure, ranked = landscape(SINGLE, {2, 4}), study.make_ranking(DepthMetric.loss, questions=0)
    assert study.select_scattered(8, 2, measure, ranked) == [2, 4]
    assert study.select_contiguous(8, 2, measure, ranked) == [2, 3]
    assert study.select_iterative(8, 3, measure, ranked) == [2, 3, 6]
    settings = DepthConfig(sizes=[1, 2], kind=DepthKind.scattered)
    rows = study.choose(settings, 8, measure, ranked)
    assert [(row["size"], row["kind"], row["taken"]) for row in rows if row["taken"]] == [
        (1, "scattered", True),
        (2, "scattered", True),
    ]
    said = list(study.warnings(rows, settings.metric, ranked, chance=0.5, questions=100))
    assert "for 2 dropped blocks the contiguous choice, 2-3, does less damage: loss 3.4 against 13.2" in said[-2]
    assert "without 2, 4 the accuracy 0.500 is no better than chance (0.500 +- 0.050)" in said[-1]
    rows = study.choose(replace(settings, kind=DepthKind.best), 8, measure, ranked)
    assert [row["dropped"] for row in rows if row["taken"]] == [[2], [2, 3]]
    assert not list(study.warnings(rows, settings.metric, ranked, chance=0.25, questions=100))
    gentle = landscape(SINGLE, set())
    rows = study.choose(replace(settings, kind=DepthKind.best), 8, gentle, ranked)
    assert [row["kind"] for row in rows if row["taken"]] == ["contiguous", "scattered"]


def test_each_metric_has_its_direction():
    measure = landscape(SINGLE, {2, 4})
    choose = {
        metric: study.select_contiguous(8, 2, measure, study.make_ranking(metric, questions=0))
        for metric in list(DepthMetric)[:3]
    }
    assert choose == {"loss": [2, 3], "kl": [2, 3], "mse": [0, 1]}
    # Of those that answer all questions, the one with the least loss.
    assert study.select_contiguous(8, 2, measure, study.make_ranking(DepthMetric.accuracy)) == [5, 6]
    cosines = [0.9, 0.8, 0.7, 0.1, 0.65, 0.2, 0.5, 0.9]
    assert study.select_contiguous(8, 2, measure, study.make_ranking(DepthMetric.cosine, cosines)) == [5, 6]
    ranked = study.make_ranking(DepthMetric.cosine, cosines)
    rows = study.choose(DepthConfig(sizes=[2], kind=DepthKind.scattered), 8, measure, ranked)
    assert next(row for row in rows if row["taken"])["dropped"] == [3, 5]
    assert "contiguous choice, 5-6" in next(study.warnings(rows, DepthMetric.cosine, ranked, 0.1, 100))


def test_a_few_answers_more_are_not_worth_a_cliff():
    """SmolLM2's own figures: 10-24 answers six of 200 questions more than 6-20 and has 3.8 nats more loss."""
    runs = {6: (0.54, 7.19), 10: (0.57, 10.98), 14: (0.50, 6.0)}
    points = [{"dropped": [first], "accuracy": a, "loss": loss} for first, (a, loss) in runs.items()]
    order = [point["dropped"][0] for point in study.make_ranking(DepthMetric.accuracy, questions=200)(points)]
    assert order == [6, 10, 14]  # 14 is two standard errors below, whatever its loss
    surer = study.make_ranking(DepthMetric.accuracy, questions=20_000)(points)
    assert [point["dropped"][0] for point in surer] == [10, 6, 14]


@pytest.mark.parametrize("kind", DepthKind)
def test_points_are_counted_before_they_are_measured(kind):
    asked: list = []
    settings = DepthConfig(sizes=[1, 3, 0.5], kind=kind)
    measure = landscape(SINGLE, {2, 4}, asked)
    measure([])
    for size in study.sweep_sizes(settings, 8):
        for dropped in study.contiguous_runs(8, size):
            measure(dropped)
    study.choose(settings, 8, measure, study.make_ranking(DepthMetric.loss))
    different = len({tuple(dropped) for dropped in asked})
    assert different <= study.max_points(settings, 8) <= different + 3  # a choice may be a run too


def studied(config) -> str:
    """A study on these ranks; what rank 0 prints."""
    from minitron_mcore.depth import sweep

    with contextlib.redirect_stdout(io.StringIO()) as out:
        sweep.run(config)
    return out.getvalue()


def test_a_study_goes_on_and_a_plan_takes_its_choice(made, tmp_path, monkeypatch):
    command = [
        *("+model=smollm2_135m", "model.name=tiny", f"model.hf={made}/hf", "model.architecture=null", "dtype=fp32"),
        *(f"source={made}/ckpt", "data.heldout=[text.txt]", f"depth.choices={made}/questions.jsonl"),
        *("depth.sizes=[1,0.5]", "depth.kind=best", f"depth.sequence_length={LENGTH}", "depth.windows=3"),
    ]
    (tmp_path / "text.txt").write_bytes((made / "text.txt").read_bytes())
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        inspect.unwrap(runpy.run_path(str(ROOT / "launch" / "depth.py"))["main"])(config_of("depth", *command))
    printed, folder = out.getvalue(), tmp_path / "runs/tiny/depth"
    found = json.loads((folder / study.FILE).read_text())
    assert found["format_version"] == 1
    assert [point["dropped"] for point in found["sweep"]] == [[i] for i in range(5)] + [[i, i + 1] for i in range(4)]
    assert set(found["drop"]) == {"1", "2"} and found["tokens"] == 3 * (LENGTH - 1) and found["questions"] == 9
    best = min(found["sweep"][5:], key=lambda point: point["loss"])
    assert {"contiguous", "scattered"} == {row["kind"] for row in found["chosen"]} and f"{best['loss']:#.4g}" in printed
    assert (folder / "depth.png").stat().st_size > 10_000 and (folder / COMPLETE).is_file()

    # As a run that was killed while it wrote its fifth point.
    points = (folder / "points.jsonl").read_text().splitlines()
    (folder / "points.jsonl").write_text("\n".join(points[:5]) + "\n" + points[5][:9])
    (folder / study.FILE).unlink()
    (folder / COMPLETE).unlink()
    again = on_ranks(studied, 2, ParallelConfig(), config_of("depth", *command))[0]
    lines = (folder / "points.jsonl").read_text().splitlines()
    assert "resuming after 4 points" in again and lines[:5] == points[:5] and len(lines) == len(points)
    resumed = json.loads((folder / study.FILE).read_text())
    assert resumed["drop"] == found["drop"] and (folder / COMPLETE).is_file()
    for point, before in zip(resumed["sweep"], found["sweep"], strict=True):
        assert point == {
            key: value if key == "dropped" else pytest.approx(value, rel=1e-5) for key, value in before.items()
        }
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "text.txt").write_text(words(64, 1))
    with pytest.raises(RankError, match="depth was made from data.heldout.0. text.txt .*: restore the old one"):
        on_ranks(studied, 1, ParallelConfig(), config_of("depth", *command))
    (tmp_path / "text.txt").write_text(text)
    assert (folder / "points.jsonl").read_text().splitlines() == lines

    (folder / "points.jsonl").write_text("\n".join([lines[0], lines[1][:9], *lines[2:], ""]))
    with pytest.raises(RankError, match="points.jsonl, line 2, cannot be read as JSON .*: remove its folder"):
        on_ranks(studied, 1, ParallelConfig(), config_of("depth", *command))

    opened = open_checkpoint(made / "ckpt")
    save_scores(tmp_path, Scores(random_scores(opened.arch).vectors, {"fingerprint": opened.fingerprint}))
    command += ["scores=scores.safetensors", "study=runs/tiny/depth"]
    command = [override for override in command if not override.startswith(("depth.", "data."))]
    plan(*command, "prune.blocks=3", "prune.hidden=24")
    written = json.loads(Path("runs/tiny/plan/plan.json").read_text())
    assert [block for block in range(BLOCKS) if block not in written["blocks"]] == found["drop"]["2"]
    assert written["statistic"]["depth"] == "loss, best"
    for overrides, sentence in (
        (
            ["prune.blocks=2"],
            "prune.blocks is 2, but the study in runs/tiny/depth has a choice for 4, 3 of 5 blocks",
        ),
        (["prune.hidden=24"], "prune.blocks is 5, but the study"),
        (["prune.drop_blocks=[1]"], "both choose blocks: remove one of them"),
        (["prune.blocks=3", "study=runs/tiny/plan/plan.json"], "plan.json is damaged .*drop"),
        (["prune.blocks=3", "study=nowhere"], "no depth study at nowhere: run launch/depth.py"),
    ):
        with pytest.raises(UserError, match=sentence):
            plan(*command, *overrides, "out_dir=p2")
    (folder / study.FILE).write_text(json.dumps(found | {"model": "another"}))
    with pytest.raises(UserError, match=f"is of model another, but the source is {opened.fingerprint}"):
        plan(*command, "prune.blocks=3", "out_dir=p2")
    assert not Path("p2").exists()


def test_bad_settings_are_told_at_once():
    settings = DepthConfig(sizes=[1, 5, 2.5, 0, 0.99, 0.05], windows=0, metric=DepthMetric.accuracy)
    found = list(study.problems(DepthRun(depth=settings), 5))
    assert [line.split(":")[0] for line in found] == [
        "depth.sizes has 5, but the model has 5 blocks",
        "depth.sizes has 2.5, but the model has 5 blocks",
        "depth.sizes has 0, but the model has 5 blocks",
        "depth.sizes has 0.99, but the model has 5 blocks",
        "depth.sizes has 0.05, but the model has 5 blocks",
        "depth.windows is 0; it must be at least 1.",
        "depth.metric is accuracy, but there are no questions",
    ]
    cosine = DepthRun(depth=DepthConfig(sizes=[], metric=DepthMetric.cosine))
    assert [line.split(",")[0] for line in study.problems(cosine, 32)] == [
        "depth.sizes is empty: give numbers of blocks to drop",
        "depth.metric is cosine",
    ]
    assert study.sizes(DepthConfig(), 32) == [1, 2, 4, 8, 16] and study.sizes(DepthConfig(sizes=[0.5, 2]), 5) == [2]


def test_no_text_and_no_questions_are_refused(made, tmp_path):
    base = config_of(
        "depth",
        "+model=smollm2_135m",
        f"source={made}/ckpt",
        "model.architecture=null",
        "depth.sizes=[1]",
        "depth.sequence_length=64",
    )
    base = replace(base, out_dir=str(tmp_path / "out"))
    data = replace(base.data, heldout=[str(made / "text.txt")])
    wrong = {
        "data.heldout is empty": base,
        "no questions at nowhere.jsonl": replace(base, data=data, depth=replace(base.depth, choices="nowhere.jsonl")),
        "text.txt, line 1 is not a question": replace(
            base, data=data, depth=replace(base.depth, choices=data.heldout[0])
        ),
    }
    told = on_ranks(refused, 1, ParallelConfig(), list(wrong.values()))[0]
    assert all(sentence in said for sentence, said in zip(wrong, told, strict=True)), told
    assert not (tmp_path / "out").exists()


def refused(configs) -> list[str]:
    found = []
    for config in configs:
        with pytest.raises(UserError) as error:
            studied(config)
        found.append(str(error.value))
    return found


def test_dry_run_counts_the_passes(tmp_path, monkeypatch):
    from hydra import initialize_config_dir

    from minitron_mcore.cli import compose, dry_run

    monkeypatch.chdir(tmp_path)
    command = ["+model=smollm2_135m", "depth=small", "data.heldout=[a,b]", "parallel.pipeline=2"]
    with initialize_config_dir(str(compose.CONF), version_base="1.3"):
        found = dry_run.plan(compose.compose("depth", command))
    points = 1 + 30 + 29 + 27 + 23 + 16 + 4  # the last are scattered sets
    assert found["operations"]["steps"] == points + 1 and found["operations"]["tokens"] == (points + 1) * 2 * 4 * 512
    assert [rank["hidden states"] for rank in found["ranks"]] == [0, 2 * 4 * 512 * 576 * 2] and not found["problems"]
