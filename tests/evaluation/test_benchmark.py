"""Benchmarks: a failure means that a score is not lm-eval's, a prompt not the paper's, or that a program leaves its sandbox."""

import json
import math
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install minitron_mcore[eval])")

from lm_eval.api.model import LM

from minitron_mcore.config.benchmark import BENCHMARKS, BenchmarkConfig
from minitron_mcore.config.settings import Dtype, ParallelConfig
from minitron_mcore.config.stages import BenchmarkRun
from minitron_mcore.errors import UserError
from minitron_mcore.evaluation.benchmarks import run, suite
from minitron_mcore.evaluation.benchmarks.sandbox import Sandbox
from minitron_mcore.testing import on_ranks
from tests.helpers import benchmark_files, families, models
from tests.helpers.launching import fork
from tests.helpers.layouts import layouts
from tests.helpers.text_files import write_tokenizer

ONE = ParallelConfig()
LAYOUTS = layouts("tp2_dp2", "tp2_sp", "pp2_cp2")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return benchmark_files.write(tmp_path_factory.mktemp("questions"), 30)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """hf: a random Llama; ckpt: the same, converted."""
    folder = tmp_path_factory.mktemp("made")
    models.tiny_llama(folder / "hf", vocab_size=307, max_position_embeddings=1024)
    write_tokenizer(folder / "hf", bos=True)
    on_ranks(models.import_hf, 1, ONE, folder / "hf", folder / "ckpt", ONE)
    return folder


@pytest.mark.default_cases("tp2_dp2")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_likelihoods_and_texts_are_those_of_lm_evals_own_model(made, layout):
    world, parallel = LAYOUTS[layout]
    scores, texts = benchmark_files.hf_answers(made / "hf")
    found, *others = on_ranks(benchmark_files.sharded_answers, world, parallel, made / "ckpt", parallel)
    assert others == [None] * (world - 1)
    assert [log_p for log_p, _ in found[0]] == pytest.approx([log_p for log_p, _ in scores], rel=1e-6, abs=1e-6)
    assert [greedy for _, greedy in found[0]] == [greedy for _, greedy in scores]
    assert found[1] == texts and all(texts)


@pytest.mark.slow
def test_experts_on_several_ranks_score_and_write_as_on_one(tmp_path):
    families.tiny("mixtral", tmp_path / "hf", vocab_size=307, max_position_embeddings=1024)
    write_tokenizer(tmp_path / "hf", bos=True)
    on_ranks(models.import_hf, 1, ONE, tmp_path / "hf", tmp_path / "ckpt", ONE)
    scores, texts = benchmark_files.hf_answers(tmp_path / "hf")
    for world, parallel in layouts("ep2", "ep3_tp3_sp").values():
        (found, written), *_ = on_ranks(benchmark_files.sharded_answers, world, parallel, tmp_path / "ckpt", parallel)
        assert [log_p for log_p, _ in found] == pytest.approx([log_p for log_p, _ in scores], rel=1e-5, abs=1e-5)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in scores] and written == texts


def right_choices(doc: dict) -> list[int]:
    """Positions of the right answers of a row of any multiple-choice benchmark."""
    if "mc2_targets" in doc:
        return [n for n, label in enumerate(doc["mc2_targets"]["labels"]) if label]
    if "answerKey" in doc:
        return ["ABCD".index(doc["answerKey"])]
    return [int(doc["answer"]) - 1 if "sentence" in doc else doc.get("gold", doc.get("answer"))]


class Oracle(LM):
    """Knows every answer, and gives a wrong one to questions 0, 3, 6..."""

    def __init__(self):
        super().__init__()
        self.contexts: list[tuple[dict, str]] = []

    def loglikelihood(self, requests):
        self.contexts += [(request.doc, request.args[0]) for request in requests]
        return [
            (math.log(0.9 if (request.idx in right_choices(request.doc)) == bool(request.doc_id % 3) else 0.1), False)
            for request in requests
        ]

    def generate_until(self, requests):
        self.contexts += [(request.doc, request.args[0]) for request in requests]
        return [self._text(request.doc) if request.doc_id % 3 else "nothing" for request in requests]

    def _text(self, doc: dict) -> str:
        if "entry_point" in doc:
            return f"    return k + {doc['entry_point'].removeprefix('add')}"
        return next(
            f" {doc[key]}" if key != "code" else doc[key] for key in ("summary", "code", "answer") if key in doc
        )

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


QUESTIONS = {
    # what stands in a prompt once a question, and other times that it stands there
    "mmlu": ("Answer:", 0),
    "winogrande": (": the ", 0),
    "arc_challenge": ("Question:", 0),
    "hellaswag": ("A: ", 0),
    "gsm8k": ("Question:", 0),
    "truthfulqa": ("Q: ", 6),  # the primer
    "xlsum": ("Article:", 0),
    "mbpp": ("[BEGIN]", 0),
    "humaneval": ("def add", 0),
}
SHOTS = dict(zip(QUESTIONS, (5, 5, 25, 10, 5, 0, 3, 0, 0), strict=True))  # arXiv 2408.11796, table 1


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts_have_the_papers_shots_and_known_answers_the_known_score(files, name):
    config = BenchmarkConfig(data_dir=str(files), limit=3, run_code=True)
    unit = suite.units(name, config)[0]
    oracle, sandbox = Oracle(), Sandbox(5, 512)
    found = run.evaluate(oracle, suite.make_task(unit, 1, sandbox.pass_at_1), 3, 1, run_code=True)
    expected = 2 / 3
    if name == "truthfulqa":
        expected = (2 * 1.8 / 1.9 + 0.2 / 1.1) / 3
    assert found[suite.SUITE[name].metric] == pytest.approx(expected, abs=1e-9)
    assert found["sample_len"] == 3
    text, others = QUESTIONS[name]
    assert {context.count(text) for _, context in oracle.contexts} == {SHOTS[name] + 1 + others}
    if name == "xlsum":
        assert [doc["summary"].split()[-1] for doc, _ in oracle.contexts] == ["0", "5", "10"]
        assert all(context.count(f"{doc['text']}\n") == 1 for doc, context in oracle.contexts)
    if name == "humaneval":
        assert len(oracle.contexts) == 20 * 3


PROGRAMS = {
    "import math, re; assert math.sqrt(4) == 2": True,
    "open('/etc/hostname').read()": True,
    "assert False": False,
    "import os; os._exit(0)": False,
    "raise SystemExit": False,
    "while True: pass": False,
    "import time; time.sleep(60)": False,
    "bytearray(1 << 30)": False,
    "import socket; socket.socket(socket.AF_UNIX)": False,
    "import os; os.fork()": False,
    "import subprocess; subprocess.run(['true'])": False,
    "import os; os.kill(os.getppid(), 0)": False,
    "open('victim', 'a')": False,
    "import os; os.remove('victim')": False,
    "import os; os.rename('victim', 'other')": False,
    "import os; os.truncate('victim', 0)": False,
    "import os; os.chmod('victim', 0)": False,
    "import os; os.mkdir('victim_folder')": False,
    "import os; assert 'SECRET' in os.environ": False,
}


def test_programs_stay_in_their_sandbox(tmp_path, monkeypatch):
    (tmp_path / "victim").write_text("kept")
    monkeypatch.setenv("SECRET", "x")
    sandbox = Sandbox(1, 256)
    sandbox.check()
    for program, passes in PROGRAMS.items():
        assert sandbox.run(program.replace("victim", str(tmp_path / "victim"))) is passes, program
    assert (tmp_path / "victim").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="benchmark.code_memory_mb 4: raise these"):
        Sandbox(5, 4).check()


def test_what_is_wrong_is_said_before_work_starts(tmp_path, files, monkeypatch):
    def problems(**changes) -> str:
        return "\n".join(suite.problems(BenchmarkConfig(**{"data_dir": str(files), "run_code": True} | changes)))

    assert problems() == ""
    spread = suite.units("mmlu", BenchmarkConfig(data_dir=str(files), limit=58))
    assert [unit.limit for unit in spread] == [2] + [1] * 56
    assert "benchmark.tasks has piqa: give some of mmlu, winogrande" in problems(tasks=["gsm8k", "piqa"])
    assert (
        "mbpp and humaneval, which run programs that the model writes: allow it with benchmark.run_code=true"
        in problems(run_code=False)
    )
    assert problems(run_code=False, tasks=["gsm8k"]) == ""
    assert re.search(
        r"no questions at .*gsm8k.test.jsonl \(or .gz\): write the rows",
        problems(data_dir=str(tmp_path), tasks=["gsm8k"]),
    )
    assert "benchmark.data_dir is not set" in problems(data_dir=None)
    assert "benchmark.limit is 0; it must be at least 1." in problems(limit=0)
    assert "benchmark.published has {'gsm9k': 1}: write" in problems(published={"mine": {"gsm9k": 1}})
    for row in ("{}", '{"question": 1, "answer": 2}', '["a"]', "{", '{"question": "q", "answer": "a"}\n[]'):
        (tmp_path / "gsm8k.test.jsonl").write_text(row + "\n")
        [unit] = suite.units("gsm8k", BenchmarkConfig(data_dir=str(tmp_path)))
        if row != '{"question": 1, "answer": 2}':  # text
            with pytest.raises(UserError, match="gsm8k.test.jsonl.*: write"):
                suite.make_task(unit, 1, Sandbox(1, 256).pass_at_1)
    monkeypatch.setattr(suite, "PACKAGE", "not_installed")
    assert "pip install minitron_mcore[eval]" in problems()


def test_few_examples_are_refused_before_a_model_is_loaded_and_failures_reach_all_ranks(tmp_path, made, files):
    def few(examples: int, questions: int = 9) -> str:
        for split, count in (("train", examples), ("test", questions)):
            rows = (files / f"gsm8k.{split}.jsonl").read_text().splitlines(keepends=True)
            (tmp_path / f"gsm8k.{split}.jsonl").write_text("".join(rows[:count]))
            if not count:
                (tmp_path / f"gsm8k.{split}.jsonl").unlink()
        try:
            [unit] = suite.units("gsm8k", BenchmarkConfig(data_dir=str(tmp_path)))
            run.evaluate(Oracle(), suite.make_task(unit, 1, Sandbox(1, 256).pass_at_1), None, 1)
        except UserError as error:
            return str(error)

    assert few(5) is None and few(0, 6) is None
    assert "gsm8k.test.jsonl has 4 other questions as examples of a question, but a prompt of gsm8k has 5: add" in few(
        0, 5
    )
    message = (
        f"{tmp_path}/gsm8k.train.jsonl has 3 examples, but a prompt of gsm8k has 5: add at least 2 rows, or leave gsm8k"
    )
    assert few(3) == f"{message} out of benchmark.tasks."
    settings = BenchmarkConfig(data_dir=str(tmp_path), tasks=["gsm8k"])
    config = BenchmarkRun(source=str(made / "ckpt"), out_dir=str(tmp_path / "out"), work_dir="w", benchmark=settings)
    (refused, failed), (other, raised) = on_ranks(benchmark_files.refusal_and_failure, 2, ONE, config, timeout=60)
    assert refused == other == few(3) and not (tmp_path / "out").exists()
    assert (failed, raised) == ("ValueError: a bug", "UserError: ValueError: a bug")


def test_results_of_other_questions_and_models_that_cannot_run_are_refused_before_work(tmp_path, made):
    files, out = benchmark_files.write(tmp_path / "questions"), tmp_path / "out"

    def config(tasks="truthfulqa", **models) -> BenchmarkRun:
        settings = BenchmarkConfig(data_dir=str(files), tasks=tasks.split(), limit=1)
        models = {name: str(folder) for name, folder in models.items()}
        return BenchmarkRun(models=models, out_dir=str(out), work_dir="w", benchmark=settings, dtype=Dtype.fp32)

    first, gone, folder = (
        config(a=made / "ckpt"),
        config(a=made / "ckpt", b="gone"),
        config(a=made / "ckpt", b=made / "hf"),
    )
    found = on_ranks(benchmark_files.refusals, 2, ONE, gone, folder, timeout=60)
    assert found[0] == found[1] and not out.exists()
    assert (
        found[0][0] == "gone is no Hugging Face folder: it has no config.json." and "start one process" in found[0][1]
    )
    assert on_ranks(benchmark_files.refusal, 1, ONE, first) == [None]
    result, path = out / "a/tasks/truthfulqa.json", files / "truthfulqa.validation.jsonl"
    kept, questions = json.loads(result.read_text()), path.read_text()
    other = replace(first, models={"a": str(made / "other")})
    shutil.copytree(made / "ckpt", made / "other")
    model = json.loads((made / "other/model.json").read_text())
    (made / "other/model.json").write_text(json.dumps(model | {"fingerprint": "another"}))
    path.write_text(questions.replace("0?", "00?"))
    changed = on_ranks(
        benchmark_files.refusal, 1, ONE, config("truthfulqa winogrande", new=made / "ckpt", a=made / "ckpt")
    )[0]
    assert f"truthfulqa was measured with other inputs than {path} (questions was" in changed
    assert changed.endswith(f"restore them, or remove {result} to measure it again.") and not (out / "new").exists()
    path.write_text(questions)
    result.write_text(json.dumps(kept | {"inputs": kept["inputs"] | {"lm_eval": "0.4.0"}}))
    [version] = on_ranks(benchmark_files.refusal, 1, ONE, first)
    assert "lm_eval was 0.4.0, is" in version
    result.write_text(json.dumps(kept))
    again, another = on_ranks(benchmark_files.refusals, 1, ONE, first, other)[0]
    assert again is None and "was made from source" in another


@pytest.mark.slow
def test_the_table_of_several_models_resumes_by_task(tmp_path, made, files):
    """Launch files: a checkpoint on two ranks, stopped and continued in another layout, and the folder that it was made from."""
    tasks = ["benchmark.tasks=[winogrande,truthfulqa,xlsum]", "benchmark.limit=8", "benchmark.micro_batch=2"]
    common = ["work_dir=w", f"benchmark.data_dir={files}", "dtype=fp32", *tasks]
    ours, folder = f"models={{ours: {made}/ckpt}}", tmp_path / "w/benchmark"
    stopped = fork(
        tmp_path, "benchmark", *common, ours, "parallel=tp2", processes=2, stop_at=(4, signal.SIGTERM), fails=5
    )
    assert "in generation after 2 of 6 requests: the same command continues" in stopped
    kept = json.loads((folder / "ours/tasks/winogrande.json").read_text())
    assert (kept["shots"], kept["limit"], kept["seed"], kept["examples"]) == (5, 8, 1234, "the other questions")
    (folder / "ours/tasks/winogrande.json").write_text(json.dumps(kept | {"old": True}))
    again = fork(tmp_path, "benchmark", *common, ours, "parallel.pipeline=2", processes=2)
    assert "ours: xlsum" in again and "ours: winogrande" not in again
    assert json.loads((folder / "ours/tasks/winogrande.json").read_text())["old"]
    assert "limit was 8, is 4" in fork(tmp_path, "benchmark", *common, ours, "benchmark.limit=4", fails=2)
    table = fork(tmp_path, "benchmark", *common, f"models={{theirs: {made}/hf}}", "benchmark=minitron_4b")
    assert re.search(r"published: Minitron 4B +74.0 +42.9 +29.5", table)
    found, expected = (
        json.loads((folder / name / "benchmark.json").read_text())["benchmarks"] for name in ("ours", "theirs")
    )
    for name, questions in {"winogrande": 8, "truthfulqa": 8, "xlsum": 6}.items():
        assert found[name]["score"] == pytest.approx(expected[name]["score"], abs=1e-6), name
        assert found[name]["questions"] == expected[name]["questions"] == questions
    assert 0 < expected["truthfulqa"]["stderr"] < 0.2
