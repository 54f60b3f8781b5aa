"""On-policy distillation (arXiv 2306.13649): samples of the training text are replaced by the student's own answers to prompts.

An answer depends on the student's weights, the seed and its position in the order of samples only, so a resumed run draws the
same. Another layout or micro-batch changes the weights' products by rounding, and with them a draw in a close case.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.config.stages import DistillRun
from minitron_mcore.data.tokenizer import open_tokenizer
from minitron_mcore.distill.trainer import Trainer
from minitron_mcore.errors import UserError
from minitron_mcore.evaluation import prompts, synthesis
from minitron_mcore.evaluation.generate import Sampling, generate, greedy
from minitron_mcore.parallel import process_groups
from minitron_mcore.parallel.schedule import Batch


class StudentAnswers:
    """The prompts of `distill.on_policy`, and the answers of a student in training."""

    def __init__(self, config: DistillRun, student: Checkpoint):
        """Read and tokenize the prompts (collective).

        Raises:
            UserError: see `prompts.read` and `synthesis.prompt_tokens`; no prompt leaves room for an answer.
        """
        self.settings, self.seed = config.distill.on_policy, config.seed
        longest = config.distill.sequence_length - self.settings.tokens
        with process_groups.raise_on_all_ranks():
            tokenizer = open_tokenizer(config.data, student.hf, student.arch.vocab)
            asked = prompts.read(self.settings.prompts, config.data)
            every = [synthesis.prompt_tokens(prompt, tokenizer) for prompt in asked]
            self.ends = synthesis.end_tokens(student, tokenizer)
        self.prompts = [ids for ids in every if len(ids) <= longest]
        within = f"{len(self.prompts)} of {len(every)} prompts have at most {longest} tokens"
        if not self.prompts:
            raise UserError(f"{within}: give a larger distill.sequence_length, or fewer distill.on_policy.tokens.")
        process_groups.log(f"{within}; distill.on_policy draws from them")

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits that identify the prompts' tokens."""
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()[:16]

    def batches(self, trainer: Trainer, text: Iterator[Batch]) -> Iterator[Batch]:
        """The micro-batches of `text` with answers, which are drawn when a step's first micro-batch is needed (collective)."""
        size, dp = trainer.config.micro_batch, process_groups.dp_group()
        count = trainer.config.global_batch // (size * dp.size())
        while step := [{key: x.clone() for key, x in batch.items()} for batch in itertools.islice(text, count)]:
            first = trainer.phases[-1].sample(trainer.step)
            places = [
                (batch, row, first + (n * dp.size() + dp.rank()) * size + row)
                for n, batch in enumerate(step)
                for row in range(size)
            ]
            trainer.gather_weights()
            for part in itertools.batched(places, self.settings.micro_batch):
                self._answer(trainer, part)
            yield from step

    def _answer(self, trainer: Trainer, places: Sequence[tuple[Batch, int, int]]) -> None:
        """Replace those of some samples (batch, row, position in the order) that are to be answers (collective)."""
        settings, answered, asked, seeds = self.settings, [], [], []
        for batch, row, position in places:
            draw = np.random.default_rng((self.seed, position))
            if draw.random() < settings.share:
                answered.append((batch, row))
                asked.append(self.prompts[draw.integers(len(self.prompts))])
                seeds.append(int(draw.integers(2**63)))
        choose = Sampling(settings.temperature, settings.top_p, seeds) if settings.temperature else greedy
        answers = generate(
            trainer.model,
            trainer.arch,
            asked,
            settings.tokens,
            lambda new: new[-1] in self.ends,
            lambda logits, rows: choose(logits[:, : trainer.vocab], rows),  # ids that the teacher has too
        )
        for (batch, row), prompt, answer in zip(answered, asked, answers, strict=True):
            write_sample(batch, row, prompt, answer)


def write_sample(batch: Batch, row: int, prompt: Sequence[int], answer: Sequence[int]) -> None:
    """Replace a sample of a micro-batch by a prompt and its answer, padded, with a loss on the answer's tokens."""
    ids = torch.tensor([*prompt, *answer])
    for key, values in (("tokens", ids[:-1]), ("labels", ids[1:]), ("loss_mask", torch.ones(len(ids) - 1))):
        batch[key][row] = 0
        batch[key][row, : len(values)] = values
    batch["loss_mask"][row, : len(prompt) - 1] = 0
    if "document_starts" in batch:
        batch["document_starts"][row] = 0
