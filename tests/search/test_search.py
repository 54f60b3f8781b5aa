"""The architecture search: a failure means a candidate that should not be there, or a rank that the weights do not earn."""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from matplotlib.image import imread

from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.checkpoint.stage_record import COMPLETE
from minitron_mcore.cli import dry_run
from minitron_mcore.config.search import BudgetConfig, SearchConfig, SpeedConfig
from minitron_mcore.config.settings import ParallelConfig
from minitron_mcore.config.stages import EvaluateRun, Run
from minitron_mcore.errors import UserError
from minitron_mcore.importance.scores import FILE as SCORES
from minitron_mcore.importance.scores import Scores, save_scores
from minitron_mcore.models import architecture, flops, parameter_table
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.pruning.plan import load_plan
from minitron_mcore.reporting import plots
from minitron_mcore.search.space import Space
from minitron_mcore.testing import on_ranks
from tests.helpers import families, models, tiny_run
from tests.helpers.cutting import random_scores
from tests.helpers.launching import composed, words
from tests.helpers.text_files import write_jsonl

ONE = ParallelConfig()
# (blocks, hidden, ffn, heads, groups, head_dim, vocabulary), total, without embeddings: what was published of each model
NEMOTRON = {"family": "nemotron", "rope_theta": 1e4, "rotary_fraction": 0.5}
PUBLISHED = {
    "Nemotron-4 15B": (NEMOTRON, (32, 6144, 24576, 48, 8, 128, 256000), 15_628_775_424, 12_483_047_424),
    "Nemotron-3 8B": (NEMOTRON, (32, 4096, 16384, 32, 32, 128, 256000), 8_540_135_424, 6_442_983_424),
    "Minitron-8B": (NEMOTRON, (32, 4096, 16384, 48, 8, 128, 256000), 8_271_699_968, 6_174_547_968),
    "Minitron-4B": (NEMOTRON, (32, 3072, 9216, 24, 8, 128, 256000), 4_190_509_056, 2_617_645_056),
    "Llama-3.1-8B": ({"family": "llama"}, (32, 4096, 14336, 32, 8, 128, 128256), 8_030_261_248, 6_979_588_096),
    "Llama width": ({"family": "llama"}, (32, 3072, 9216, 32, 8, 128, 128256), 4_512_746_496, 3_724_741_632),
    "Llama depth": ({"family": "llama"}, (16, 4096, 14336, 32, 8, 128, 128256), 4_540_469_248, 3_489_796_096),
    "Mistral-NeMo": ({"family": "mistral"}, (40, 5120, 14336, 32, 8, 128, 131072), 12_247_782_400, 10_905_605_120),
    "MN-Minitron": ({"family": "mistral"}, (40, 4096, 11520, 32, 8, 128, 131072), 8_414_105_600, 7_340_363_776),
}
# Candidates (blocks, heads, ffn, hidden) of the paper's windows: table 19, and section 4.3's count of 18 with the totals.
EIGHT = {
    (32, 32, 12800, 5120), (32, 32, 13824, 4608), (32, 48, 11520, 4608), (32, 48, 16384, 4096), (31, 32, 12800, 5120),
    (31, 32, 16128, 4608), (31, 48, 13824, 4608), (31, 48, 16384, 4096), (30, 32, 12800, 5120), (30, 32, 16128, 4608),
    (30, 48, 13824, 4608), (30, 48, 16384, 4096), (29, 32, 12800, 5120), (29, 32, 16128, 4608), (29, 48, 13824, 4608),
}  # fmt: skip
FOUR = {
    (31, 24, 7680, 3072): 3.816, (32, 32, 10240, 2560): 3.828, (29, 32, 7680, 3072): 3.854, (31, 48, 8960, 2560): 3.871,
    (32, 24, 7680, 3072): 3.889, (29, 48, 10240, 2560): 3.896, (30, 32, 7680, 3072): 3.933, (29, 24, 9216, 3072): 3.945,
    (32, 48, 8960, 2560): 3.953, (30, 48, 10240, 2560): 3.985, (31, 32, 7680, 3072): 4.011, (30, 24, 9216, 3072): 4.027,
    (31, 48, 10240, 2560): 4.074, (32, 32, 7680, 3072): 4.090, (31, 24, 9216, 3072): 4.109, (29, 32, 9216, 3072): 4.128,
    (32, 48, 10240, 2560): 4.163, (32, 24, 9216, 3072): 4.191,
}  # fmt: skip


def published(name) -> Architecture:
    traits, sizes, *_ = PUBLISHED[name]
    names = ("blocks", "hidden", "ffn", "heads", "groups", "head_dim", "vocab")
    rest = {"max_positions": 4096, "norm_eps": 1e-5, "rope_theta": 5e5, "rope_scaling": None, "tied": False}
    return Architecture(**dict(zip(names, sizes, strict=True)), **(rest | traits))


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name):
    found = flops.figures(published(name), BudgetConfig())
    assert (found["parameters"], found["without_embeddings"]) == PUBLISHED[name][2:]


def test_bytes_and_operations_by_hand():
    llama = published("Llama-3.1-8B")
    assert flops.weight_bytes(llama) == 16_060_522_496 and flops.weight_bytes(llama, "int4") == 4_015_130_624
    assert flops.kv_cache_bytes(llama) == 32 * 2 * 8 * 128 * 2
    assert flops.kv_cache_bytes(llama, 8192, 4, "fp8") == 4 * 8192 * 65536
    # Matrices of a block by hand, and attention position by position.
    weights = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
    head, window = 4096 * 128256, dataclasses.replace(llama, family="mistral", window=5)
    for arch, seen in ((llama, lambda i: i + 1), (window, lambda i: min(i + 1, 5))):
        attention = [4 * 32 * 32 * 128 * seen(i) for i in range(9)]
        assert flops.prefill_flops(arch, 9, 2) == 2 * (2 * 9 * weights + sum(attention) + 2 * head)
        assert flops.decode_flops(arch, 9, 2) == 2 * (2 * (weights + head) + attention[-1])
    without = dataclasses.replace(llama, no_attention=(3, 9))
    assert flops.kv_cache_bytes(without) == 30 * 2 * 8 * 128 * 2
    assert flops.decode_flops(without, 9) == 2 * (weights - 2 * 41_943_040 + head) + 9 * 4 * 30 * 32 * 128
    assert flops.kv_cache_bytes(window, 9) == flops.kv_cache_bytes(window, 5) == 5 * 131072


def shapes(space) -> dict[tuple, int]:
    found = (candidate.target for candidate in space.candidates)
    return {(arch.blocks, arch.heads, arch.ffn, arch.hidden): parameter_table.count(arch) for arch in found}


def test_the_papers_windows():
    space = Space(
        published("Nemotron-4 15B"), composed("search", "+model=nemotron4_15b", "search=minitron_4b").search, ONE
    )
    assert {shape: round(count / 1e9, 3) for shape, count in shapes(space).items()} == FOUR
    assert space.combinations == 240 and dict(space.left_out) == {"outside the budget": 222}
    assert space.candidates[-1].overrides == "prune=keep prune.hidden=3072 prune.ffn=9216 prune.heads=24"
    space = Space(
        published("Nemotron-4 15B"), composed("search", "+model=nemotron4_15b", "search=minitron_8b").search, ONE
    )
    assert set(shapes(space)) == EIGHT and space.combinations == 160


def test_ranges_shares_multiples_and_rules():
    llama = published("Llama-3.1-8B")
    axes = {"hidden": {"start": 3072, "stop": 3584, "step": 128}, "ffn": [0.5, 10240, 16384], "heads": [24, 20, 32]}
    space = Space(llama, SearchConfig(**axes, multiple=256), ParallelConfig(tensor=8))
    assert space.axes == {"hidden": [3072, 3200, 3328, 3456, 3584], "ffn": [7168, 10240, 16384], "heads": [20, 24, 32]}
    assert {c.target.hidden for c in space.candidates} == {3072, 3328, 3584}
    assert {c.target.heads for c in space.candidates} == {24, 32} and {c.target.ffn for c in space.candidates} == {
        7168,
        10240,
    }
    assert not any(
        c.target.hidden % c.target.heads for c in space.candidates
    )  # LlamaConfig's rule takes 24 x 3328 and 24 x 3584
    assert dict(space.left_out) == {
        "larger than the source": 15,
        "heads that the groups do not divide or hold": 10,
        "hidden or ffn no multiple of 256": 8,
        "heads that do not divide hidden, which the Hugging Face class demands": 4,
    }
    assert len(space.candidates) == 45 - 37
    grouped = Space(llama, SearchConfig(groups=[2, 4, 8], heads=[8, 12, 16]), ONE)
    assert [c.name.removeprefix("L32_H4096_F14336_") for c in grouped.candidates] == [
        "N8_G2",
        "N8_G4",
        "N8",
        "N16_G4",
        "N16",
    ]
    assert Space(llama, SearchConfig(groups=[4]), ONE).candidates[0].target.heads == 16
    expanded = Space(llama, SearchConfig(hidden=[3072], expansion=[2.52, 3], multiple=128), ONE)
    assert [c.target.ffn for c in expanded.candidates] == [7680, 9216]


@pytest.mark.parametrize(
    ("budget", "smallest", "largest"),
    [
        (dict(bytes=10e9, tolerance=0.1, context=32768, batch=2), 9e9, 11e9),
        (dict(bytes=5.0e9, tolerance=0.1, weights="fp8", kv_cache="fp8"), 4.5e9, 5.5e9),
        (dict(flops=8e13, tolerance=0.08), 7.36e13, 8.64e13),
    ],
)
def test_budgets_in_bytes_and_operations(budget, smallest, largest):
    given = BudgetConfig(**budget)
    axes = {"blocks": [16, 24, 32], "ffn": {"start": 7168, "stop": 14336, "step": 1024}}
    llama = published("Llama-3.1-8B")
    within = {c.name for c in Space(llama, SearchConfig(**axes, budget=given), ONE).candidates}
    for c in Space(llama, SearchConfig(**axes), ONE).candidates:
        cost = flops.prefill_flops(c.target, given.context, given.batch)
        if given.bytes:
            size = {"bf16": 2, "fp8": 1}
            keys = 2 * c.target.blocks * 8 * 128 * given.context * given.batch
            cost = parameter_table.count(c.target) * size[given.weights] + keys * size[given.kv_cache]
        assert (c.name in within) == (smallest <= cost <= largest), c.name


@pytest.mark.parametrize(
    ("search", "sentence"),
    [
        (
            dict(blocks=[16, 32], budget=BudgetConfig(parameters=6e9)),
            r"no combination has 6,000,000,000 parameters within 0.05 of it; the nearest is L16_H4096_F14336_N32 with "
            r"4,540,469,248 \(-24.3%\).*outside the budget: 2",
        ),
        (
            dict(blocks=[16, 32], budget=BudgetConfig(bytes=12e9, context=1024)),
            r"12,000,000,000 bytes .* L16_H4096_F14336_N32 with 9,148,047,360 \(-23.8%\)",
        ),
        ({}, "has no axis"),
        (dict(ffn=[9000], expansion=[3]), "search.ffn and search.expansion both"),
        (dict(ffn=9000), "search.ffn is 9000: give a list"),
        (dict(ffn=[9000.5]), "search.ffn has 9000.5"),
        (dict(ffn={"start": 1, "stop": 9}), "search.ffn is .*give a list of sizes, or .start"),
        (dict(heads=[31]), "none of the search's combinations fits .heads that the groups do not divide or hold: 1"),
        (dict(ffn=[9], budget=BudgetConfig(parameters=1e9, flops=1e9)), "parameters and flops: give one"),
        (dict(ffn=[9], budget=BudgetConfig(parameters=1e9, tolerance=1.5)), "tolerance is 1.5"),
        (dict(ffn=[9], shards=2, shard=2), "search.shard is 2, but search.shards is 2"),
        (dict(ffn=[9], eval_every=0), "search.eval_every is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_searched_is_refused(search, sentence):
    with pytest.raises(UserError, match=sentence):
        _ = Space(published("Llama-3.1-8B"), SearchConfig(**search), ONE).candidates


def wide() -> Space:
    """28,700 combinations, of which 8 % meet the budget."""
    axes = {"blocks": {"start": 20, "stop": 32, "step": 1}, "hidden": {"start": 2048, "stop": 4096, "step": 128}}
    axes |= {"ffn": {"start": 4096, "stop": 14336, "step": 256}, "heads": [16, 24, 32]}
    budget = BudgetConfig(parameters=4e9, tolerance=0.05)
    return Space(published("MN-Minitron"), SearchConfig(**axes, budget=budget, trials=25), ONE)


def bowl(candidate) -> float:
    """A loss with its least at hidden 3200 and 28 blocks."""
    return (candidate.target.hidden / 3200 - 1) ** 2 + (candidate.target.blocks / 28 - 1) ** 2


def asked(space, seed) -> dict[str, float]:
    found, proposals = {}, space.proposals(seed)
    candidate = next(proposals)
    while candidate:
        found[candidate.name] = bowl(candidate)
        assert 3.8e9 <= parameter_table.count(candidate.target) <= 4.2e9
        try:
            candidate = proposals.send(found[candidate.name])
        except StopIteration:
            candidate = None
    return found


def test_optuna_searches_what_is_too_much_for_a_grid():
    assert wide().combinations > 10_000
    first, again, other = asked(wide(), 1), asked(wide(), 1), asked(wide(), 2)
    assert list(first.items()) == list(again.items()) and list(first) != list(other)
    assert len(first) == 25
    early, late = list(first.values())[:8], list(first.values())[-8:]
    assert sum(late) < sum(early) / 2  # it learns from the losses that it is sent
    nothing = dataclasses.replace(wide().search, budget=BudgetConfig(parameters=1e8))
    with pytest.raises(UserError, match="no combination has 100,000,000 parameters .* the nearest is L20_H2048_F4"):
        next(Space(published("MN-Minitron"), nothing, ONE).proposals(1))


def measured(folders: dict[str, str]) -> list[dict]:
    from minitron_mcore.search import latency

    found = []
    for name, folder in folders.items():
        arch, _ = architecture.read_hf(folder)
        model = latency._random_model(arch, folder, "fp32")
        prompt = torch.randint(0, arch.vocab, (2, 7))
        with torch.no_grad():
            last = latency._decode(model, model(prompt, use_cache=True, logits_to_keep=1), 3)
            said = prompt  # the same without a cache
            for _ in range(3):
                said = torch.cat([said, model(said, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        speeds = latency.measure(arch, folder, SpeedConfig(batch=2, prompt=7, generated=3, repetitions=1), "fp32")
        found.append(
            (name, model.num_parameters() - parameter_table.count(arch), torch.equal(last, said[:, -1:]), speeds)
        )
    return found


def test_speed_is_that_of_the_whole_candidate_with_a_cache(tmp_path):
    folders = {name: families.tiny(name, tmp_path / name) for name in ("llama32", "nemotron", "mixtral")}
    for name, surplus, same, speeds in measured(folders):
        assert surplus == 0 and same, name
        assert speeds["prefill_tokens_per_second"] > 0 and speeds["decode_tokens_per_second"] > 0
        assert "1 threads, fp32" in speeds["measured_on"]


TINY = {
    "search.blocks": "[4,5]",
    "search.hidden": "[24,36]",
    "search.ffn": "[18,30]",
    "search.budget.parameters": 42000,
    "search.budget.tolerance": 0.15,
    "search.best": 2,
    "search.steps": 3,
    "search.eval_every": 2,
    "distill.global_batch": 4,
    "distill.sequence_length": 16,
    "distill.warmup_steps": 1,
    "distill.peak_lr": 1e-2,
    "distill.min_lr": 1e-3,
    "evaluate.sequence_length": 32,
    "evaluate.max_windows": 8,
}


class Cut(Exception):
    pass


@contextlib.contextmanager
def other_scores(root):
    """Scores of the same model made anew, in the same place (collective)."""
    file = root / "scores" / SCORES
    kept, anew = file.read_bytes(), (root / "other" / SCORES).read_bytes()
    dist.barrier()
    file.write_bytes(anew)
    dist.barrier()
    yield
    dist.barrier()
    file.write_bytes(kept)
    dist.barrier()


def searches(config, root) -> dict:
    """The same search in one go and in pieces (stopped, by shards, cut off in training); and its best candidate's losses as
    launch/evaluate.py finds them."""
    from minitron_mcore.evaluation import perplexity
    from minitron_mcore.evaluation.heldout import HeldOut
    from minitron_mcore.search import runner

    def run(out_dir, **settings):
        search = dataclasses.replace(config.search, **settings)
        runner.run(dataclasses.replace(config, out_dir=str(root / out_dir), search=search))

    def there(name) -> int:
        return len(list((root / "pieces/candidates").glob(f"*/{name}")))

    usual, looks = HeldOut.loss, []

    def cut_off_at_the_second(*args):
        looks.append(1)
        if len(looks) == 2:
            raise Cut
        return usual(*args)

    run("whole", students_per_pass=2)
    run("pieces", stop_after=1)
    assert there("measured.json") == 1
    run("pieces", shards=2, shard=1)
    assert there("measured.json") == 2 and there("distill") == 0
    run("pieces", shards=2, shard=0, stop_after=1)
    assert there("measured.json") == 3 and there("distill") == 0
    with pytest.raises(UserError, match="prune.blocks is 3, but the study in depth.json has a choice for 4 of 5"):
        run("unstudied", blocks=[3])
    with other_scores(root), pytest.raises(UserError, match="was made from scores"):
        run("pieces")
    HeldOut.loss = cut_off_at_the_second
    with pytest.raises(Cut):
        run("pieces", shards=2, shard=1)
    HeldOut.loss = usual
    assert there("distill") == 1 and not (root / "pieces" / COMPLETE).exists()
    run("pieces")
    found = {name: json.loads((root / name / "search.json").read_text()) for name in ("whole", "pieces")}
    assert found["whole"]["format_version"] == 1
    for kind in ("prune", "distill"):
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(Run)}
        where = root / "whole/candidates" / found["whole"]["candidates"][0]["name"] / kind
        evaluation = EvaluateRun(**fields, source=str(where))
        found[kind] = perplexity.evaluate_run(*perplexity.open_model(evaluation), evaluation)[0]["loss"]
    return found


def test_a_search_in_pieces_is_the_search_in_one_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parallel = ParallelConfig(tensor=2)
    tiny_run.write(tmp_path)
    write_jsonl(Path("text.jsonl"), [words(40, seed) for seed in range(60)])
    on_ranks(models.import_hf, 2, parallel, Path("hf"), Path("parent"), parallel)
    source = open_checkpoint("parent")
    for name, seed in (("scores", 3), ("other", 4)):
        Path(name).mkdir()
        save_scores(name, Scores(random_scores(source.arch, seed).vectors, {"fingerprint": source.fingerprint}))
    given = ["+model=smollm2_135m", "model.architecture=null", "parallel=tp2", "dtype=fp32", "data.train=[text.jsonl]"]
    given += ["data.heldout=[text.jsonl]", "data.cache=cache", "source=parent", "teacher=parent"]
    given += ["scores=scores", "study=depth.json", *(f"{key}={value}" for key, value in TINY.items())]
    study = {"model": source.fingerprint, "metric": "loss", "kind": "contiguous", "drop": {"1": [2]}}
    Path("depth.json").write_text(json.dumps(study))
    config = composed("search", *given)

    found = on_ranks(searches, 2, parallel, config, tmp_path)[0]
    assert found["whole"] == found["pieces"]
    first, second, third = found["whole"]["candidates"]
    assert [c["steps"] for c in (first, second, third)] == [[2, 3], [2, 3], []]
    assert first["loss"] == first["losses"][-1] < second["loss"] < second["zero_shot_loss"] < third["zero_shot_loss"]
    assert first["zero_shot_loss"] < third["zero_shot_loss"] and third["loss"] is None
    for trained in (first, second):
        studied = trained["sizes"]["blocks"] == 4
        kept = load_plan(f"whole/candidates/{trained['name']}/prune").blocks
        assert kept == ([0, 1, 3, 4] if studied else [0, 1, 2, 3, 4])
        assert trained["overrides"].endswith(" study=depth.json") == studied
    assert any(c["sizes"]["blocks"] == 4 for c in (first, second))
    # Rank by rank the same model, written to disk and read back.
    assert first["zero_shot_loss"] == pytest.approx(found["prune"], rel=1e-6)
    assert first["loss"] == pytest.approx(found["distill"], rel=1e-6)
    for name in ("parameters.png", "ranks.png"):
        assert imread(tmp_path / "pieces" / name).std() > 0.05


def test_a_search_is_planned_with_its_largest_candidate(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["+model=nemotron4_15b", "search=minitron_4b", "distill=nemotron4", "parallel=tp8_sp", "dry.gpus=128"]
    figures = dry_run.plan(composed("search", *given))
    found = {role: model["parameters"] for role, model in figures["models"].items()}
    assert found == {"teacher": 15_628_775_424, "student": 4_190_509_056} and not figures["problems"]
    assert len(figures["candidates"]) == 18
    assert figures["operations"]["tokens"] == 4 * 400 * 1152 * 4096
    refused = dry_run.plan(composed("search", *given, "search.budget.parameters=1e9"))["problems"]
    assert len(refused) == 1 and "the nearest is L29_H2560_F6400_N24" in refused[0]
    refused = dry_run.plan(composed("search", *given, "prune.merge_heads=true", "prune.drop_mlp=[3]"))["problems"]
    assert len(refused) == 1 and "prune.merge_heads and prune.drop_mlp has no effect in a search" in refused[0]


def test_the_front_is_what_nothing_beats():
    points = [(1, 3.0), (2, 2.5), (3, 2.5), (4, 2.9), (5, 2.8), (5, 3.1)]
    assert plots.pareto_front(points) == [(5, 2.8), (3, 2.5)]
