"""The plan's tables against the tensors that a cut leaves: a failure means that a plan promises other bytes than it gives."""

import re

import pytest

from minitron_mcore.config.settings import PruneConfig
from minitron_mcore.formats.hf_folder import HFFolder
from minitron_mcore.models import architecture, parameter_table
from minitron_mcore.pruning import apply, summary
from minitron_mcore.pruning.plan import make_plan
from tests.helpers import families, models
from tests.helpers.cutting import random_scores

# Hugging Face's names of the tensors along each axis, in all families of the test.
ALONG = {
    "blocks": r"layers\.",
    "hidden": r"embed|(?<![qk]_)norm|proj|w[123]|gate|lm_head",
    "ffn": r"(gate|up|down)_proj|w[123]",
    "heads": r"[qkvo]_proj",
    "groups": r"[qkv]_proj",
    "experts": r"experts|\.gate\.weight",
}


@pytest.mark.parametrize(
    ("which", "cut"),
    [
        ("nemotron", PruneConfig(hidden=28, ffn=17, drop_blocks=[1])),
        ("qwen3", PruneConfig(hidden=28, ffn=17, blocks=2)),
        ("mixtral", PruneConfig(ffn=9, experts=3, blocks=2)),
    ],
)
def test_bytes_are_those_of_the_tensors(tmp_path, which, cut):
    folder = families.tiny(which, tmp_path / "hf")
    arch, _ = architecture.read_hf(folder)
    reader = HFFolder(folder)
    for parameter in parameter_table.parameters(arch):
        reader.hash(parameter)
    plan = make_plan(arch, reader.fingerprint(arch), random_scores(arch), cut)
    (tmp_path / "cut").mkdir()
    apply.cut_folder(folder, plan, tmp_path / "cut")
    before, after = models.weights(folder), models.weights(tmp_path / "cut")

    rows = {row["axis"]: row for row in summary.axes(plan, "fp32")}
    for axis, row in rows.items():
        along = re.compile(ALONG.get(axis, ""))
        for weights, key in ((before, "bytes before"), (after, "bytes after")):
            assert row[key] == sum(w.nbytes for name, w in weights.items() if along.search(name)), (axis, key)
    assert rows.keys() == {name for name in ALONG if name != "experts" or arch.experts} | {"in all"}
    assert [rows["blocks"][key] for key in ("kept", "of")] == [len(plan.blocks), arch.blocks]
    assert rows["ffn"]["kept"] == plan.target.ffn == cut.ffn

    kinds = summary.tensors(plan, "fp32")
    for key, sizes, weights in (("bytes before", arch, before), ("bytes after", plan.target, after)):
        total = sum(w.nbytes for w in weights.values())
        assert sum(row[key] for row in kinds) == rows["in all"][key] == 4 * parameter_table.count(sizes) == total
    assert [sum(row[key] for row in kinds) for key in ("tensors before", "after")] == [
        len(list(parameter_table.parameters(a))) for a in (arch, plan.target)
    ]
    half = summary.axes(plan, "bf16")[-1]
    assert 2 * half["bytes after"] == rows["in all"]["bytes after"]
    assert f"{parameter_table.count(arch):,} -> {parameter_table.count(plan.target):,};" in summary.counts(plan)


def test_layers_dropped_apart_from_their_blocks_have_a_row(tmp_path):
    arch, _ = architecture.read_hf(models.tiny_llama(tmp_path))
    plan = make_plan(arch, "x", random_scores(arch), PruneConfig(drop_blocks=[4]))
    assert "MLP layers" not in {row["axis"] for row in summary.axes(plan, "bf16")}
    plan = make_plan(arch, "x", random_scores(arch), PruneConfig(drop_blocks=[4], drop_mlp=[2]))
    rows = {row["axis"]: row for row in summary.axes(plan, "bf16")}
    assert (rows["MLP layers"]["kept"], rows["MLP layers"]["of"]) == (3, 5) and "attention layers" not in rows
