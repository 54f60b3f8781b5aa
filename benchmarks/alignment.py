"""A small chat model before alignment, after fine-tuning, and after preference optimisation by TRL on the exported folder.

SmolLM2-135M-Instruct answers questions about words and small numbers. The wanted answer is the bare word or number; the rejected
one is wrong, or right but wordy. `minitron distill distill=sft` trains on 240 conversations; TRL then trains the exported folder
on 48 other pairs with three losses, which docs/alignment.md compares. All models answer 64 questions that none was trained on:
loss of the wanted answers, share of pairs whose wanted answer is the likelier one, mean reward margin (beta times the change of
the answers' log-ratio since fine-tuning), exact matches of greedy answers.

About ten minutes on two cores; --quick takes two steps each. Finished models below runs/alignment are kept: remove the folder to
start anew. pip install -e .[align] -c constraints.txt.
"""

import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from common import Figure, arguments, write

from minitron_mcore.cli import demo
from minitron_mcore.cli.pipeline import run_stage
from minitron_mcore.reporting import tables

CONVERSATIONS, PAIRS, HELD_OUT = 240, 48, 64
BETA = 0.1
FLIPPED = 1 / (1 + math.e)  # NeMo-Aligner's target where every chosen answer has the reward 1 and every rejected one 0
LOSSES = {
    "DPO": ["--loss_type", "sigmoid"],
    "RPO of TRL": ["--loss_type", "sigmoid", "sft", "--loss_weights", "1.0", "1.0"],
    "RPO of NeMo-Aligner": ["--loss_type", "exo_pair", "--label_smoothing", str(FLIPPED)],
}
WORDS = "river chair apple window garden paper music winter bridge yellow doctor forest silver pocket summer letter"


def main() -> None:
    options = arguments(__doc__)
    root = Path("runs/alignment_quick" if options.quick else "runs/alignment")
    pairs = list(itertools.islice(questions(random.Random(1234)), CONVERSATIONS + PAIRS + HELD_OUT))
    held_out = pairs[CONVERSATIONS + PAIRS :][: 8 if options.quick else None]
    write_lines(root / "chats.jsonl", [{"messages": pair["prompt"] + pair["chosen"]} for pair in pairs[:CONVERSATIONS]])
    write_lines(root / "preferences/train.jsonl", pairs[CONVERSATIONS : CONVERSATIONS + PAIRS])

    before = demo.fetch_teacher(Path("runs/cache/smollm2_135m"))
    models = {"before": before, "SFT": fine_tune(root, before, 2 if options.quick else 24)}
    steps = "2" if options.quick else "12"
    for name, loss in LOSSES.items():
        models[name] = root / name.replace(" ", "_")
        prefer(models["SFT"], root / "preferences", models[name], ["--max_steps", steps, *loss])
    rows, figures = [], []
    measured = {name: measure(folder, held_out) for name, folder in models.items()}
    for name, (loss, ratios, exact) in measured.items():
        row = {"loss": loss, "preference accuracy": (ratios > 0).float().mean().item()}
        row |= {"margin": BETA * (ratios - measured["SFT"][1]).mean().item(), "exact match": exact}
        rows.append({"model": name} | row)
        figures += [Figure("alignment", "held-out questions", name, *item, "1") for item in row.items()]
    tables.table(f"{len(held_out)} held-out questions", rows)
    write(figures, options.json)


def questions(rng: random.Random) -> Iterator[dict]:
    """Different questions of four kinds in turn, each with a chosen and a rejected answer, as TRL reads conversations."""
    asked = set()
    for number in itertools.count():
        (x, y, z), (a, b) = rng.sample(WORDS.split(), 3), rng.sample(range(2, 50), 2)
        question, right, wrong = (
            (f"What is {a} + {b}?", str(a + b), str(a + b + rng.choice([-10, -1, 1, 10]))),
            (f"Which number is larger, {a} or {b}?", str(max(a, b)), str(min(a, b))),
            (f"Which word is last in the list {x}, {y}, {z}?", z, x),
            (f"Write the words {x} and {y} in reverse order.", f"{y} {x}", f"{x} {y}"),
        )[number % 4]
        if question in asked:
            continue
        asked.add(question)
        rejected = wrong if number // 4 % 2 else f"Sure! The answer to your question is {right}."
        prompt = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": question}]
        answers = {"chosen": right, "rejected": rejected}
        yield {"prompt": prompt} | {key: [{"role": "assistant", "content": text}] for key, text in answers.items()}


def write_lines(path: Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def fine_tune(root: Path, source: Path, steps: int) -> Path:
    """Convert, train on the answers of the conversations, export; the exported folder. Finished stages are kept."""
    model = ["+model=smollm2_135m", f"model.hf={source}", f"work_dir={root}", f"student={root}/convert"]
    size = ["distill.sequence_length=256", "distill.global_batch=4", "distill.micro_batch=4", f"distill.steps={steps}"]
    rate = ["distill.peak_lr=2e-4", "distill.min_lr=2e-5", f"distill.warmup_steps={min(4, steps - 1)}"]
    text = [f"data.train=[{root}/chats.jsonl]", "data.document_mask=true"]
    lines = {"convert": model[:3], "distill": [*model, "distill=sft", *size, *rate, *text], "export": model[:3]}
    for stage, line in lines.items():
        if not (root / {"export": "hf"}.get(stage, stage) / ".complete").is_file():
            run_stage(stage, *line)
    return root / "hf"


def prefer(model: Path, preferences: Path, out_dir: Path, options: list[str]) -> None:
    """What `trl dpo` runs, in a process of its own; a finished folder is kept."""
    if (out_dir / "model.safetensors").is_file():
        return
    settings = {"model_name_or_path": model, "dataset_name": preferences, "output_dir": out_dir, "beta": BETA}
    settings |= {"learning_rate": 2e-5, "per_device_train_batch_size": 4, "gradient_checkpointing": False}
    settings |= {"dtype": "float32", "bf16": False, "use_cpu": True, "save_strategy": "no", "report_to": "none"}
    line = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "trl.scripts.dpo", *line, *options], env=environment, check=True)


@torch.no_grad()
def measure(folder: Path, pairs: list[dict]) -> tuple[float, torch.Tensor, float]:
    """Nats a token of the chosen answers, log-ratios of chosen to rejected answers (one a pair), share of exact greedy answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    template = partial(tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=False)
    likelihoods: dict[str, list[torch.Tensor]] = {"chosen": [], "rejected": []}
    tokens = exact = 0
    for batch in itertools.batched(pairs, 16):
        prompts = [template(pair["prompt"]) for pair in batch]
        for key, found in likelihoods.items():
            answers = [pair[key][0]["content"] for pair in batch]
            texts = [f"{prompt}{answer}{tokenizer.eos_token}" for prompt, answer in zip(prompts, answers, strict=True)]
            rows = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
            nats = torch.nn.functional.cross_entropy(
                model(**rows).logits[:, :-1].mT, rows.input_ids[:, 1:], reduction="none"
            )
            begins = torch.tensor([len(ids) - 1 for ids in tokenizer(prompts).input_ids])
            scored = rows.attention_mask[:, 1:] * (torch.arange(nats.size(1)) >= begins[:, None])
            found.append(-(nats * scored).sum(-1))
            tokens += scored.sum().item() if key == "chosen" else 0
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        written = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs.input_ids.size(1) :]
        texts = [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
        exact += sum(pair["chosen"][0]["content"] == text for pair, text in zip(batch, texts, strict=True))
    chosen, rejected = map(torch.cat, likelihoods.values())
    return -chosen.sum().item() / tokens, chosen - rejected, exact / len(pairs)


if __name__ == "__main__":
    main()
