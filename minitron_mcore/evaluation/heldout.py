"""The held-out text of a run whose models are measured in memory: students in training, candidates of a search."""

import functools
import hashlib
from typing import Any

from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.config import ranges
from minitron_mcore.config.stages import Run
from minitron_mcore.data.text_reader import Limits
from minitron_mcore.data.tokenizer import open_tokenizer
from minitron_mcore.errors import refuse
from minitron_mcore.evaluation import perplexity
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.build import Model
from minitron_mcore.parallel import process_groups


class HeldOut:
    """Windows of `data.heldout`, cut and limited as `evaluate` says; every rank holds all of them."""

    def __init__(self, config: Run, model: Checkpoint):
        """Read and tokenize the text (collective).

        Args:
            model: whose tokenizer and vocabulary the text has, unless `data.tokenizer` is set.

        Raises:
            UserError: data.heldout is empty; see `open_tokenizer` and `perplexity.windows`.
        """
        refuse(ranges.text_files("data.heldout", config.data.heldout))
        settings, limits = config.evaluate, Limits.of(config.data)
        with process_groups.raise_on_all_ranks():
            tokenizer = open_tokenizer(config.data, model.hf, model.arch.vocab)
            self.windows = {
                path: perplexity.windows(path, tokenizer, settings.sequence_length, limits)
                for path in config.data.heldout
            }
        self.settings = settings

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits that identify the tokens of all windows."""
        tokens = b"".join(windows.tokens.numpy().tobytes() for windows in self.windows.values())
        return hashlib.sha256(tokens).hexdigest()[:16]

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the loss of a model, JSON-ready."""
        return {
            "hash": self.digest,
            "sequence_length": self.settings.sequence_length,
            "max_windows": self.settings.max_windows,
        }

    def loss(self, model: Model, arch: Architecture) -> float:
        """Nats a token over all files, of a model sharded over the current layout (collective).

        The same on all ranks, up to the last bit.
        """
        rows = perplexity.evaluate_windows(
            self.windows,
            perplexity.ShardedModel(model, arch).nll,
            micro_batch=self.settings.micro_batch,
            max_windows=self.settings.max_windows,
            group=process_groups.dp_group(),
        )
        return sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
