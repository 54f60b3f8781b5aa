"""The launch files as users type them: a failure means a spelling, a default or an error message broke."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from minitron_mcore.checkpoint import steps
from minitron_mcore.checkpoint.claim import claim_run_folder, new_run_folder
from minitron_mcore.checkpoint.run_folder import open_checkpoint
from minitron_mcore.cli import compose
from minitron_mcore.errors import UserError
from minitron_mcore.importance.scores import Scores, save_scores
from tests.helpers import tiny_run
from tests.helpers.cutting import random_scores
from tests.helpers.launching import ROOT, config_of, fork, identity_of, launch, plan, torchrun, words
from tests.helpers.text_files import write_jsonl


def claim(begin, out_dir, settings) -> None:
    with begin(out_dir, settings):
        pass


def test_distill_defaults_are_the_papers():
    """Llama-3.1-Minitron-4B: arXiv 2408.11796, table 4."""
    found = identity_of("distill", "+model=llama31_8b")
    expected = dict(
        peak_lr=1e-4, min_lr=1e-5, warmup_steps=40, global_batch=1152, sequence_length=8192, adam_beta1=0.9, adam_beta2=0.95,
        weight_decay=0.1, clip_grad=1.0, kd_weight=1.0, lm_weight=0.0, temperature=1.0,
    )  # fmt: skip
    assert expected.items() <= found["distill"].items()
    assert found["teacher"] == "runs/llama31_8b/convert"


@pytest.mark.parametrize("stage", compose.LAUNCH_FILES)
def test_every_stage_composes_and_is_short(stage):
    assert config_of(stage, "+model=smollm2_135m", "parallel=tp3").parallel.tensor == 3
    assert len((ROOT / "launch" / f"{stage}.py").read_text().splitlines()) <= 50


def test_help_and_cfg_job(tmp_path):
    assert "  prune: keep, llama31_4b_depth" in fork(tmp_path, "plan", "--help")
    assert "hidden: null" in fork(tmp_path, "plan", "+model=llama31_8b", "--cfg", "job")


def test_typos_are_caught_at_compose_time():
    with pytest.raises(Exception, match="warmup"):
        identity_of("distill", "+model=smollm2_135m", "distill.warmup=3")


def test_missing_weights_are_one_sentence(tmp_path):
    output = fork(tmp_path, "convert", "+model=llama31_8b", processes=2, fails=True)
    sentences = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(sentences) == 1 and "Llama-3.1-8B" in sentences[0] and "model.hf=" in sentences[0]


def test_missing_checkpoint_is_one_sentence(tmp_path):
    output = fork(tmp_path, "distill", "+model=llama31_8b", fails=True)
    assert "error: no checkpoint at runs/llama31_8b/prune" in output and "student=/path" in output


@pytest.mark.parametrize("stage", ["importance", "distill", "evaluate"])
def test_sequences_that_ranks_cannot_share_are_refused(tmp_path, stage):
    layout = ["parallel=tp3", "parallel.sequence=true", f"{stage}.sequence_length=511"]
    output = fork(tmp_path, stage, "+model=smollm2_135m", *layout, processes=3, fails=True)
    assert (
        output.count("error: sequence_length 511 cannot be shared by parallel.tensor 3") == 1 and "give 513" in output
    )


@pytest.mark.slow
def test_a_pipeline_starts_torchrun(tmp_path):
    """The other tests fork its stages."""
    tiny_run.write(tmp_path)
    given = [*tiny_run.STAGES, "parallel=tp2", "importance.samples=4"]
    command = [
        sys.executable,
        str(ROOT / "launch" / "pipeline.py"),
        *given,
        "stages=[convert,importance]",
        "processes=2",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500, check=True)
    assert "stage 2 of 2: importance" in done.stdout and "report: runs/tiny/report.html" in done.stdout
    given = [*tiny_run.MODEL, "parallel=tp2", "source=runs/tiny/convert", "prompt='w5 w6'", "tokens=3"]
    assert "w5 w6 w" in launch(tmp_path, "generate", *given, processes=2)


def test_whole_way_on_two_ranks(tmp_path, monkeypatch):
    """Hugging Face in, smaller Hugging Face out, through the pipeline and every launch file; then against the wrong things."""
    tiny_run.write(tmp_path)
    write_jsonl(tmp_path / "text.jsonl", [words(40, seed) for seed in range(60)])
    command = [
        *(*tiny_run.STAGES, "parallel=tp2", "data.train=[text.jsonl]", "data.heldout=[text.jsonl]"),
        *("prune.hidden=24", "prune.ffn=18", "importance.samples=8", "recipe.teacher=${work_dir}/correct"),
        *tiny_run.training(steps=4, global_batch=4, warmup_steps=1, log_every=1),
    ]
    stopped = fork(tmp_path, "pipeline", *command, "processes=2", "distill.stop_after=2", fails=True)
    assert "error: minitron distill stopped before its end: the same command resumes" in stopped
    assert "stage 4 of 8: prune\n$ minitron prune --nproc 2 model=smollm2_135m" in stopped
    output = fork(tmp_path, "pipeline", *command, "processes=2")
    assert "resuming after step 2" in output and "bits per byte" in output and "minitron correct" not in output

    run = tmp_path / "runs/tiny"
    config = json.loads((run / "hf/config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"], config["head_dim"]) == (24, 18, 8)
    assert len((run / "distill/metrics.jsonl").read_text().splitlines()) == 4
    correct = open_checkpoint(run / "correct")
    assert open_checkpoint(run / "distill").lineage["parents"]["teacher"]["fingerprint"] == correct.fingerprint
    assert correct.lineage["parents"]["student"]["fingerprint"] == open_checkpoint(run / "convert").fingerprint
    corrected = [json.loads(line) for line in (run / "correct/metrics.jsonl").read_text().splitlines()]
    assert [row["kd_loss"] for row in corrected] == [0] * 4 and all(row["lm_loss"] > 0 for row in corrected)
    assert yaml.safe_load((run / "plan/config.yaml").read_text())["prune"]["hidden"] == 24
    assert (run / "importance/importance.png").stat().st_size > 10_000
    card = (run / "hf/README.md").read_text()
    assert f"Weights `{correct.fingerprint}`" in card and f"distilled from teacher `{correct.fingerprint}`" in card
    page = (run / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 4 and correct.fingerprint in page  # scores, plan, two trainings
    assert "decoder.layers.*.mlp.linear_fc1.weight" in stopped and "report: runs/tiny/report.html" in output
    assert "transformers loads" in output and "LlamaForCausalLM" in output
    generate = [*command, "prompt='w5 w6'", "tokens=3", "text_file=continuation.txt"]
    assert "w5 w6 w" in fork(tmp_path, "generate", *generate, processes=2)
    assert (tmp_path / "continuation.txt").read_text().startswith("w5 w6 w")

    with pytest.raises(UserError, match="already holds a finished run"):
        claim(new_run_folder, run / "convert", identity_of("convert", *command))
    with pytest.raises(UserError, match="holds another run .distill.peak_lr was 0.0001, is 0.001.: give the old"):
        claim(claim_run_folder, run / "distill", identity_of("distill", *command, "distill.peak_lr=1e-3"))
    assert steps.published(run / "distill")
    foreign = Scores(random_scores(open_checkpoint(run / "prune").arch).vectors, {"fingerprint": "another"})
    (tmp_path / "foreign").mkdir()
    save_scores(tmp_path / "foreign", foreign)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="belong to model another"):
        plan(*command, "scores=foreign", "out_dir=p2")
    with pytest.raises(UserError, match="parallel.tensor 2 does not divide ffn 17 .next: 18."):
        plan(*command, "out_dir=p3", "prune.ffn=17")
    assert not (tmp_path / "p2").exists()


FAILING = """
import torch.distributed as dist
from minitron_mcore.errors import UserError
from minitron_mcore.cli.main import entry

@entry("convert")
def main(config):
    from minitron_mcore.parallel import process_groups
    with process_groups.distributed_context(config.parallel):
        if process_groups.rank() == 1:
            open("raised", "w").close()
            raise {error}("no such thing")
        dist.distributed_c10d._get_default_store().wait(["never"])  # as NCCL waits, without an error when a rank is gone

main()
"""


def output_of_failing(folder: Path, error: str) -> str:
    folder.mkdir()
    (folder / "fail.py").write_text(FAILING.format(error=error))
    output = torchrun(folder, folder / "fail.py", "+model=smollm2_135m", processes=3, fails=True)
    # With the end of all processes, before torchrun kills ranks that wait in C++, after 30 s.
    assert time.time() - (folder / "raised").stat().st_mtime < 20
    return output


@pytest.mark.slow
def test_a_rank_that_fails_alone_is_heard(tmp_path):
    errors = {"UserError": ("error: rank 1: no such thing", 1), "KeyError": ("rank 1 failed:\n", 2)}
    with ThreadPoolExecutor() as pool:
        outputs = pool.map(output_of_failing, [tmp_path / error for error in errors], errors)
        for output, (expected, count) in zip(outputs, errors.values(), strict=True):
            assert output.count(expected) == 1 and output.count("no such thing") == count, output
