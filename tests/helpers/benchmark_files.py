"""Questions of every benchmark, made up, and answers of lm-eval's models."""

import json
from pathlib import Path

import torch

from minitron_mcore.errors import UserError
from tests.helpers import models

PAIRS = [
    ("the cat", " sat on the mat"),
    ("the cat", " x"),
    ("the cat", " y"),
    ("naïve 日本", " of the"),
    ("a b c ", "d e"),
    ("", "the cat"),
    *(
        (f"{n} {'the cat sat on a mat of ' * 4}the", text)
        for n in (3, 7)
        for text in (" cat", " mat of the cat", " x y z 日")
    ),
]
"""Contexts and continuations: of several tokens and of one, with a space at the end, no context, and contexts that begin alike."""


def write(folder: Path, count: int = 6) -> Path:
    """All files that `minitron benchmark` reads, without examples of their own for WinoGrande and XLSum."""
    from minitron_mcore.evaluation.benchmarks import suite

    def file(name: str, row) -> None:
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("".join(json.dumps(row(n)) + "\n" for n in range(count)), encoding="utf-8")

    for subject in suite._subjects():
        for split in ("dev", "test"):
            file(
                f"mmlu/{subject}.{split}",
                lambda n, s=split: {"question": f"{s} {n}?", "choices": list("wxyz"), "answer": n % 4},
            )
    file(
        "winogrande.validation",
        lambda n: {"sentence": f"{n}: the _ sat.", "option1": "cat", "option2": "mat", "answer": "12"[n % 2]},
    )
    for split in ("train", "test"):
        file(
            f"arc_challenge.{split}",
            lambda n, s=split: {
                "question": f"{s} {n}?",
                "choices": {"text": ["w", "xx", "y", "z"], "label": list("ABCD")},
                "answerKey": "ABCD"[n % 4],
            },
        )
        file(
            f"gsm8k.{split}", lambda n, s=split: {"question": f"{s} {n}+1?", "answer": f"It is {n + 1}.\n#### {n + 1}"}
        )
    file(
        "hellaswag.validation",
        lambda n: {
            "activity_label": "A",
            "ctx_a": f"{n} cats.",
            "ctx_b": "they",
            "endings": ["w", "xx", "y", "z"],
            "label": str(n % 4),
        },
    )
    file(
        "truthfulqa.validation",
        lambda n: {
            "question": f"{n}?",
            "mc1_targets": {"choices": ["yes", "no"], "labels": [1, 0]},
            "mc2_targets": {"choices": ["yes", "it is", "no"], "labels": [1, 1, 0]},
        },
    )
    file("xlsum.test", lambda n: {"text": f"Cats sat. Number {n}.", "summary": f"the cats sat on mat {n}"})
    file(
        "mbpp.test",
        lambda n: {
            "text": f"Add {n}.",
            "test_list": [f"assert add({k}) == {k + n}" for k in range(3)],
            "code": f"def add(k):\n    return k + {n}",
        },
    )
    file(
        "humaneval.test",
        lambda n: {
            "prompt": f"def add{n}(k):\n",
            "entry_point": f"add{n}",
            "test": f"def check(add):\n    assert add(1) == {n + 1}\n",
        },
    )
    return folder


def answers(model) -> tuple[list[tuple[float, bool]], list[str]]:
    """Log-likelihoods of `PAIRS`, and greedy continuations of prompts of different lengths, two of them much longer."""
    from lm_eval.api.instance import Instance

    def requests(kind: str, arguments: list) -> list[Instance]:
        return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]

    options = {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False}
    long = "of a mat of a cat " * 4
    prompts = ["the cat sat on", "naïve 日本 the", f"{long}of the mat on", f"{long}of the cat on a mat"]
    scores = model.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    return scores, model.generate_until(
        requests("generate_until", [(text, dict(options)) for text in prompts]), disable_tqdm=True
    )


def sharded_answers(checkpoint, parallel):
    """`answers` of a checkpoint on rank 0; None on the other ranks."""
    from minitron_mcore.checkpoint import run_folder
    from minitron_mcore.data import tokenizer
    from minitron_mcore.evaluation.benchmarks.sharded_lm import ShardedLM
    from minitron_mcore.parallel import process_groups

    opened = run_folder.open_checkpoint(checkpoint)
    sharded = run_folder.build_model(opened, parallel, "fp32")
    model = ShardedLM(sharded, opened.arch, tokenizer.load(opened.hf), micro_batch=2, seed=1)
    if process_groups.rank():
        return model.serve()
    with model.leading():
        return answers(model)


def refusal(config) -> str | None:
    """With what the stage is refused on this rank; None if it ends."""
    from minitron_mcore.evaluation.benchmarks import run

    try:
        run.run(config)
    except UserError as error:
        return str(error)


def refusals(*configs) -> list[str | None]:
    return [refusal(config) for config in configs]


def refusal_and_failure(config) -> tuple[str | None, str]:
    """`refusal`, and how this rank ends when rank 0 fails between two requests."""
    from minitron_mcore.checkpoint import run_folder
    from minitron_mcore.data import tokenizer
    from minitron_mcore.evaluation.benchmarks.sharded_lm import ShardedLM
    from minitron_mcore.parallel import process_groups

    refused, opened = refusal(config), run_folder.open_checkpoint(config.source)
    sharded = run_folder.build_model(opened, config.parallel, "fp32")
    model = ShardedLM(sharded, opened.arch, tokenizer.load(opened.hf), micro_batch=2, seed=1)
    try:
        if process_groups.rank():
            model.serve()
        with model.leading():
            model.loglikelihood([])
            raise ValueError("a bug")
    except (UserError, ValueError) as error:
        return refused, f"{type(error).__name__}: {error}"
    return refused, "no error"


def hf_answers(folder, dtype="float32"):
    """`answers` of lm-eval's own model of a Hugging Face folder."""
    from lm_eval.models.huggingface import HFLM

    with torch.no_grad():
        return answers(HFLM(pretrained=str(folder), dtype=dtype, device="cpu", batch_size=2, **models.EAGER))
