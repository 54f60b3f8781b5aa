"""The nine benchmarks of the Minitron papers (arXiv 2407.14679, 2408.11796) as tasks of lm-eval. Imports lm-eval where it is used.

A benchmark is one task, or for MMLU one a subject. The prompts are those of lm-eval's task files; shots, metric and sampling are
the papers'. Questions come from local files of rows as in the Hugging Face Hub's data sets.
"""

import collections
import dataclasses
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_mcore.checkpoint import disk
from minitron_mcore.config.benchmark import BENCHMARKS, BenchmarkConfig
from minitron_mcore.data.text_reader import lines
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.reading import damage_as_user_error

PACKAGE = "lm_eval"
_LINE_MB = 16
_SAMPLED = {"do_sample": True, "temperature": 0.2, "top_p": 0.95}


@dataclass(frozen=True)
class Benchmark:
    """A row of `SUITE`."""

    title: str
    stock: str | None
    """lm-eval's task file, below its folder `tasks`; {} is a subject. None: `settings` is the whole task."""
    shots: int
    metric: str
    """lm-eval's key of the score."""
    questions: str
    """Name of the file of questions, without .jsonl or .jsonl.gz."""
    examples: tuple[str, ...] = ()
    """Files for the examples in prompts; the first that exists is used, and without one the other questions."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of lm-eval's task that differ from the task file."""
    every: int = 1
    """Every n-th question is asked."""
    runs_code: bool = False


def _rouge_l(references: Sequence[str], predictions: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"]).score(references[0], predictions[0])["rougeL"].fmeasure


def _with_prompt(responses: list[list[str]], docs: Sequence[dict]) -> list[list[str]]:
    """HumanEval's programs: each continues its prompt."""
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(responses, docs, strict=True)]


def _all(responses: list[list[str]], docs: Sequence[dict]) -> list[list[str]]:
    return responses


SUITE = {
    "mmlu": Benchmark("MMLU", "mmlu/default/mmlu_{}.yaml", 5, "acc,none", "mmlu/{}.test", ("mmlu/{}.dev",)),
    "winogrande": Benchmark(
        "WinoGrande", "winogrande/default.yaml", 5, "acc,none", "winogrande.validation", ("winogrande.train",)
    ),
    "arc_challenge": Benchmark(
        *("ARC-Challenge", "arc/arc_challenge.yaml", 25, "acc_norm,none", "arc_challenge.test"),
        ("arc_challenge.train", "arc_challenge.validation"),
    ),
    "hellaswag": Benchmark(
        "HellaSwag", "hellaswag/hellaswag.yaml", 10, "acc_norm,none", "hellaswag.validation", ("hellaswag.train",)
    ),
    "gsm8k": Benchmark("GSM8K", "gsm8k/gsm8k.yaml", 5, "exact_match,strict-match", "gsm8k.test", ("gsm8k.train",)),
    "truthfulqa": Benchmark("TruthfulQA mc2", "truthfulqa/truthfulqa_mc2.yaml", 0, "acc,none", "truthfulqa.validation"),
    "xlsum": Benchmark(
        *("XLSum en", None, 3, "_rouge_l,none", "xlsum.test", ("xlsum.train", "xlsum.validation")),
        {
            "output_type": "generate_until",
            "doc_to_text": "Article: {{text}}\n\nSummary:",
            "doc_to_target": "{{summary}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 128, "do_sample": False},
            "metric_list": [{"metric": _rouge_l, "aggregation": "mean", "higher_is_better": True}],
        },
        every=5,
    ),
    "mbpp": Benchmark(
        *("MBPP", "mbpp/mbpp.yaml", 0, "pass_at_1,create_test", "mbpp.test", ()),
        {
            "fewshot_config": None,
            "generation_kwargs": {"until": ["[DONE]"], "max_gen_toks": 256, **_SAMPLED},
            "filter_list": [{"name": "create_test", "filter": [{"function": "custom", "filter_fn": _all}]}],
        },
        runs_code=True,
    ),
    "humaneval": Benchmark(
        *("HumanEval", "humaneval/humaneval.yaml", 0, "pass_at_1,create_test", "humaneval.test", ()),
        {
            "repeats": 20,
            "generation_kwargs": {
                "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
                "max_gen_toks": 1024,
                **_SAMPLED,
            },
            "filter_list": [{"name": "create_test", "filter": [{"function": "custom", "filter_fn": _with_prompt}]}],
        },
        runs_code=True,
    ),
}
"""XLSum's prompt is ours, as the papers print none."""


@dataclass(frozen=True)
class Unit:
    """One task of lm-eval: a benchmark, or a subject of MMLU."""

    name: str
    benchmark: str
    limit: int | None
    """Number of questions; None: all."""
    stock: str | None
    questions: Path
    examples: Path | None
    """None: the other questions."""


def problems(config: BenchmarkConfig) -> Iterator[str]:
    """One sentence for each setting that is invalid, and for what is not installed or missing."""
    known = ", ".join(BENCHMARKS)
    if unknown := [name for name in config.tasks if name not in SUITE]:
        yield f"benchmark.tasks has {', '.join(unknown)}: give some of {known}."
    if not config.tasks:
        yield f"benchmark.tasks is empty: give some of {known}."
    for name in ("limit", "micro_batch", "code_memory_mb"):
        if (value := getattr(config, name)) is not None and value < 1:
            yield f"benchmark.{name} is {value}; it must be at least 1."
    if not 0.1 <= config.code_seconds <= 3600:
        yield f"benchmark.code_seconds is {config.code_seconds:g}; it must be from 0.1 to 3600."
    code = [name for name in config.tasks if name in SUITE and SUITE[name].runs_code]
    if code and not config.run_code:
        others = ",".join(name for name in config.tasks if name not in code)
        yield (
            f"benchmark.tasks has {' and '.join(code)}, which run programs that the model writes: allow it with "
            f"benchmark.run_code=true, or leave them out, benchmark.tasks=[{others}]."
        )
    yield from _published_problems(config.published)
    if importlib.util.find_spec(PACKAGE) is None:
        yield "benchmarks need lm-eval, which is not installed: pip install minitron_mcore[eval]."
    elif config.data_dir is None:
        yield "benchmark.data_dir is not set: give the folder with the questions (docs/stages/benchmark.md says which files)."
    else:
        missing = dict.fromkeys(
            f"{unit.questions}.jsonl"
            for name in config.tasks
            if name in SUITE
            for unit in _all_units(name, config)
            if _file(unit.questions) is None
        )
        if missing:
            more = f", and {len(missing) - 1} other files" if len(missing) > 1 else ""
            yield (
                f"no questions at {next(iter(missing))} (or .gz){more}: write the rows of the data set there, a JSON object a "
                "line, or leave its benchmark out of benchmark.tasks (docs/stages/benchmark.md)."
            )


def _published_problems(published: Any) -> Iterator[str]:
    rows = published.values() if isinstance(published, dict) else [published] if published is not None else []
    for row in rows:
        if not isinstance(row, dict) or not all(
            name in SUITE and isinstance(value, int | float) for name, value in row.items()
        ):
            yield f"benchmark.published has {row}: write {{name: {{benchmark: per cent}}}} with {', '.join(BENCHMARKS)}."


def units(name: str, config: BenchmarkConfig) -> list[Unit]:
    """The tasks of a benchmark that have a question to ask."""
    return [unit for unit in _all_units(name, config) if unit.limit != 0]


def _all_units(name: str, config: BenchmarkConfig) -> list[Unit]:
    benchmark, folder = SUITE[name], Path(config.data_dir)
    subjects = _subjects() if "{}" in benchmark.questions else [""]
    found = []
    for number, subject in enumerate(subjects):
        limit = config.limit
        if limit is not None:
            limit = limit // len(subjects) + (number < limit % len(subjects))
        examples = next(filter(None, (_file(folder / file.format(subject)) for file in benchmark.examples)), None)
        stock = benchmark.stock and benchmark.stock.format(subject)
        unit = f"{name}_{subject}" if subject else name
        found.append(Unit(unit, name, limit, stock, folder / benchmark.questions.format(subject), examples))
    return found


def _tasks_folder() -> Path:
    """lm-eval's task files; lm-eval is not imported."""
    return Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0]) / "tasks"


def _subjects() -> list[str]:
    names = sorted((_tasks_folder() / "mmlu/default").glob("mmlu_*.yaml"))
    return [path.stem.removeprefix("mmlu_") for path in names]


def _file(path: Path) -> Path | None:
    """The file .jsonl or .jsonl.gz of a name; None if there is none."""
    return next((file for end in ("jsonl", "jsonl.gz") if (file := Path(f"{path}.{end}")).is_file()), None)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects in a .jsonl or .jsonl.gz file.

    Raises:
        UserError: a line is no JSON object, or above 16 MiB; the file is empty or cannot be read.
    """
    rows = []
    for number, line, _ in lines(str(path), _LINE_MB):
        with damage_as_user_error(f"{path}, line {number},", "write a JSON object a line"):
            if not isinstance(row := json.loads(line), dict):
                raise TypeError(f"{type(row).__name__} where a JSON object is expected")
            rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no questions: write one a line.")
    return rows


def questions_file(unit: Unit) -> Path | None:
    return _file(unit.questions)


def inputs(unit: Unit) -> dict[str, Any]:
    """What a result depends on besides the model and the settings that identify the run."""
    files = {"questions": questions_file(unit), "examples": unit.examples if SUITE[unit.benchmark].shots else None}
    hashes = {name: path and disk.sha256(path)[:16] for name, path in files.items()}
    return {"shots": SUITE[unit.benchmark].shots, "lm_eval": importlib.metadata.version(PACKAGE), **hashes}


def make_task(unit: Unit, seed: int, pass_at_1: Callable[..., float]) -> Any:
    """lm-eval's task of a unit.

    Args:
        seed: of the choice of examples.
        pass_at_1: metric of tasks that run code, `sandbox.Sandbox.pass_at_1`.

    Raises:
        UserError: a file cannot be read, its rows are not those of the benchmark, or they are too few for the examples.
    """
    benchmark = SUITE[unit.benchmark]
    questions = questions_file(unit)
    splits = {"questions": read_rows(questions)[:: benchmark.every]}
    if benchmark.shots and unit.examples:
        splits["examples"] = read_rows(unit.examples)
    own = {"task": unit.name, "num_fewshot": benchmark.shots, **benchmark.settings}
    if benchmark.runs_code:
        own["metric_list"] = [{"metric": pass_at_1, "aggregation": "mean", "higher_is_better": True}]
    task = build_task(unit.stock, splits, own, seed, questions, unit.limit, unsafe=benchmark.runs_code)
    refuse(_example_problems(unit, splits))
    return task


def _example_problems(unit: Unit, splits: dict[str, list[dict]]) -> Iterator[str]:
    """Why there are too few examples. A question is no example of itself, nor is a copy of it."""
    benchmark, file, every, what = SUITE[unit.benchmark], unit.examples, 1, "examples"
    count = len(splits.get("examples", ()))
    if not file:
        file, every, what = questions_file(unit), benchmark.every, "other questions as examples of a question"
        copies = collections.Counter(json.dumps(row, sort_keys=True) for row in splits["questions"])
        count = copies.total() - max(copies.values())
    if count < benchmark.shots:
        yield (
            f"{file} has {count} {what}, but a prompt of {unit.name} has {benchmark.shots}: add at least "
            f"{(benchmark.shots - count) * every} rows, or leave {unit.benchmark} out of benchmark.tasks."
        )


def build_task(
    stock: str | None,
    splits: dict[str, list[dict]],
    settings: dict[str, Any],
    seed: int,
    source: Path,
    limit: int | None = None,
    unsafe: bool = False,
) -> Any:
    """A task of lm-eval on rows in memory.

    Args:
        stock: lm-eval's task file, below its folder `tasks`; None: `settings` is the whole task.
        splits: rows of "questions", and of "examples" unless the other questions are the examples.
        settings: replace those of the task file.
        seed: of the choice of examples.
        source: the file of the questions, for messages.
        limit: questions to check.
        unsafe: whether the task file names code that runs programs, which is not imported.

    Raises:
        UserError: rows are not those of the task.
    """
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    file = load_yaml(_tasks_folder() / stock, resolve_func=not unsafe) if stock else {}
    examples = "examples" if "examples" in splits else "questions"
    with damage_as_user_error(source, "write the rows of the data set as docs/stages/benchmark.md says"):
        local = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
        own = {"dataset_path": None, "dataset_name": None, "custom_dataset": lambda **_: local, "tag": None}
        own |= {"training_split": None, "validation_split": None, "test_split": "questions", "fewshot_split": examples}
        task = ConfigurableTask(config=file | own | settings)
        docs = task.eval_docs
        for number in range(min(limit or len(docs), len(docs))):
            for use in (task.doc_to_text, task.doc_to_target, task.doc_to_choice):
                if use != task.doc_to_choice or task.config.doc_to_choice is not None:
                    use(docs[number])
    task.set_fewshot_seed(seed)
    return task
