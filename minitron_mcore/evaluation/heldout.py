"""The held-out text of a run whose models are measured in memory: students in training, candidates of a search."""

import functools
import hashlib
from typing import Any

from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.config.stages import Run
from minitron_mcore.data.tokenizer import open_tokenizer
from minitron_mcore.distill import checks
from minitron_mcore.distill.loss_fn import LossFunction
from minitron_mcore.errors import refuse
from minitron_mcore.evaluation import perplexity
from minitron_mcore.evaluation.windows import heldout_windows
from minitron_mcore.models import tuning
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.build import Model
from minitron_mcore.parallel import process_groups


class HeldOut:
    """Windows of the held-out text, cut and limited as `evaluate` says; every rank holds all of them."""

    def __init__(self, config: Run, model: Checkpoint):
        """Read and tokenize the text (collective).

        Args:
            model: whose tokenizer and vocabulary the text has, unless `data.tokenizer` is set.

        Raises:
            UserError: see `open_tokenizer`, `heldout_windows` and `checks.document_problems`.
        """
        refuse(checks.document_problems(config.data, tuning.available_kernels()))
        with process_groups.raise_on_all_ranks():
            tokenizer = open_tokenizer(config.data, model.hf, model.arch.vocab)
        self.settings, self.data = config.evaluate, config.data
        length, most = self.settings.sequence_length, self.settings.max_windows
        self.windows, self.weights = heldout_windows(config.data, tokenizer, length, most)

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits that identify the tokens of all windows."""
        tokens = b"".join(windows.tokens.numpy().tobytes() for windows in self.windows.values())
        return hashlib.sha256(tokens).hexdigest()[:16]

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the loss of a model, JSON-ready."""
        text = {
            "hash": self.digest,
            "sequence_length": self.settings.sequence_length,
            "max_windows": self.settings.max_windows,
        }
        text |= {"weights": list(self.weights.values())} if self.weights else {}
        return text | ({"document_mask": True} if self.data.document_mask else {})

    def measure(self, model: Model, arch: Architecture, loss_fn: LossFunction | None = None) -> dict[str, float]:
        """Means over all texts of a model sharded over the current layout (collective).

        A text counts by its predicted tokens, one of a blend by its weight.

        Args:
            loss_fn: see `perplexity.ShardedModel`.

        Returns:
            "heldout_loss" and, with `loss_fn`, "heldout_kl", in nats a token; the same on all ranks, up to the last bit.
        """
        rows = perplexity.evaluate_windows(
            self.windows,
            perplexity.ShardedModel(model, arch, loss_fn).nll,
            micro_batch=self.settings.micro_batch,
            max_windows=self.settings.max_windows,
            group=process_groups.dp_group(),
        )
        weights = [self.weights[row["file"]] if self.weights else row["tokens"] for row in rows]
        keys = {"heldout_loss": "loss"} | ({"heldout_kl": "kl"} if loss_fn else {})
        return {
            name: sum(row[key] * weight for row, weight in zip(rows, weights, strict=True)) / sum(weights)
            for name, key in keys.items()
        }
