"""Preference optimisation by TRL. A failure means that a documented command does not start, or trains another loss than it says."""

import itertools
import random
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from tests.helpers.models import tiny_llama
from tests.helpers.text_files import write_tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import alignment  # noqa: E402


def test_questions_are_new_and_their_answers_differ():
    pairs = list(itertools.islice(alignment.questions(random.Random(1)), 300))
    assert len({pair["prompt"][-1]["content"] for pair in pairs}) == 300
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    wordy = [pair["rejected"][0]["content"].endswith(f" {pair['chosen'][0]['content']}.") for pair in pairs]
    assert 140 <= sum(wordy) <= 160


def documented() -> list[list[str]]:
    """The words of all `trl dpo` commands in docs/."""
    pages = (ROOT / "docs").rglob("*.md")
    return [shlex.split(line) for page in pages for line in re.findall(r"^    trl dpo (.*)$", page.read_text(), re.M)]


def log_likelihoods(model, batch) -> torch.Tensor:
    """Of the completions in a batch of TRL, the chosen before the rejected."""
    tokens = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    taken = tokens.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (taken * batch["completion_mask"][:, 1:]).sum(-1)


def bernoulli_kl(z: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """NeMo-Aligner's rpo_fwd_kl: KL(sigmoid(z) || sigmoid(m))."""
    return z.sigmoid() * (logsigmoid(z) - logsigmoid(m)) + (-z).sigmoid() * (logsigmoid(-z) - logsigmoid(-m))


@pytest.mark.slow
def test_trl_trains_the_documented_losses(tmp_path):
    """Every documented command on a tiny model: its loss against another reference by formula, then two steps."""
    dpo = pytest.importorskip("trl.scripts.dpo", reason="pip install -e .[align]")
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "tokenizer"))
    folders = [tiny_llama(tmp_path / f"model{seed}", seed=seed, vocab_size=len(tokenizer)) for seed in (0, 1)]
    tokenizer.chat_template, tokenizer.pad_token = (
        "{% for m in messages %}{{ m.content }} {% endfor %}",
        tokenizer.eos_token,
    )
    pairs = datasets.Dataset.from_list(list(itertools.islice(alignment.questions(random.Random(1)), 4)))
    here = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "max_steps": 2}
    here |= {"per_device_train_batch_size": 1, "output_dir": tmp_path / "out", "learning_rate": 1e-2}
    commands, losses = documented(), set()
    for words in commands:
        words = [*words, *(word for name, value in here.items() for word in (f"--{name}", str(value)))]
        script, config, model, _ = dpo.make_parser().parse_args_and_config(words)
        assert script.dataset_name.startswith("/data/") and model.model_name_or_path.startswith("runs/")
        losses.add(tuple(config.loss_type))
        policy, reference = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in folders)
        trainer = trl.DPOTrainer(policy, reference, config, train_dataset=pairs, processing_class=tokenizer)
        batch = next(iter(trainer.get_train_dataloader()))
        chosen, rejected = log_likelihoods(policy, batch)
        z = config.beta * (chosen - rejected - log_likelihoods(reference, batch) @ torch.tensor([1.0, -1.0]))
        nats = -chosen / batch["completion_mask"][0].sum()
        wanted = {"sigmoid": -logsigmoid(z), "sft": nats, "exo_pair": bernoulli_kl(z, torch.tensor(1.0))}
        torch.testing.assert_close(trainer.compute_loss(policy, batch), sum(wanted[kind] for kind in config.loss_type))
        assert z.abs() > 1e-3
    assert losses == {("sigmoid",), ("sigmoid", "sft"), ("exo_pair",)}
    before = policy.lm_head.weight.clone()
    trainer.train()
    trainer.save_model()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).lm_head.weight
    assert not torch.equal(trained, before)
