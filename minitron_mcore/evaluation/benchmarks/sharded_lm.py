"""A sharded model as a model of lm-eval. Rank 0 runs lm-eval; the other ranks compute with it in `serve`."""

import contextlib
import datetime
import itertools
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from minitron_mcore.data.tokenizer import Tokenizer
from minitron_mcore.errors import UserError
from minitron_mcore.evaluation.generate import Sampling, generate, greedy
from minitron_mcore.evaluation.likelihood import Likelihoods, Request
from minitron_mcore.models.architecture import Architecture
from minitron_mcore.models.build import Model
from minitron_mcore.parallel import hang_watchdog, process_groups, stop_signal
from minitron_mcore.parallel.hang_watchdog import Phase
from minitron_mcore.reading import first_line

_BATCHES = 16
"""Micro-batches of each data-parallel rank between two stop points."""


class ShardedLM(TemplateLM):
    """Log-likelihoods and generation as lm-eval's Hugging Face model computes them; each rank holds its shards.

    Args:
        micro_batch: sequences of a forward pass of one rank.
        seed: of sampled tokens; those of a request depend on the seed and its place in the list of requests only.
    """

    def __init__(self, model: Model, arch: Architecture, tokenizer: Tokenizer, micro_batch: int, seed: int):
        super().__init__()
        self.sharded, self.arch, self.words = model, arch, tokenizer
        self.micro_batch, self.seed = micro_batch, seed
        self._is_computing = False
        """On rank 0, whether the other ranks compute too, not waiting for a request."""
        # Of its own, because rank 0 may tokenise or run programs for longer than the default group's timeout.
        self.requests = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))

    @property
    def eot_token_id(self) -> int:
        return self.words.eos

    @property
    def prefix_token_id(self) -> int:
        return self.words.eos if self.words.bos is None else self.words.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Token ids without a final EOS; with BOS if the tokenizer adds it, unless `add_special_tokens` is False."""
        [spans] = self.words.spans([string])
        keeps_special = add_special_tokens is not False
        tokens = list(zip(spans.ids, spans.special, strict=True))
        tokens = tokens[:-1] if tokens[-1][1] else tokens
        return [token for token, special in tokens if keeps_special or not special]

    def _loglikelihood_tokens(self, requests: list[Any], **unused: Any) -> list[tuple[float, bool]]:
        rows = []
        for _, context, continuation in requests:
            if len(continuation) > self.arch.max_positions:
                raise UserError(
                    f"an answer has {len(continuation)} tokens, but the model has {self.arch.max_positions} positions: leave its "
                    "benchmark out of benchmark.tasks."
                )
            tokens = [*context, *continuation][-self.arch.max_positions - 1 : -1]
            rows.append(Request(tokens, range(len(tokens) - len(continuation), len(tokens)), continuation))
        return self._call("_score", rows)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("perplexity is measured by the stage evaluate")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        numbered = sorted(enumerate(request.args for request in requests), key=lambda item: str(item[1][1]))
        for _, same in itertools.groupby(numbered, key=lambda item: item[1][1]):
            numbers, arguments = zip(*same, strict=True)
            options = normalize_gen_kwargs(arguments[0][1], 256)
            options["until"] = handle_stop_sequences(options["until"], self.words.decode([self.words.eos]))
            room = self.arch.max_positions - options["max_gen_toks"]
            if room < 1:
                raise UserError(
                    f"answers of up to {options['max_gen_toks']} tokens leave no room for a question: the model has "
                    f"{self.arch.max_positions} positions; leave the benchmark out of benchmark.tasks."
                )
            prompts = [self.tok_encode(context)[-room:] for context, _ in arguments]
            for number, tokens in zip(numbers, self._call("_continue", prompts, numbers, options), strict=True):
                text = self.words.decode(tokens, special=False)
                texts[number] = postprocess_generated_text(text, options["until"], None)
        return texts

    def _call(self, name: str, *arguments: Any) -> Any:
        """The result of a method that all ranks run; called on rank 0."""
        self._share((name, arguments))
        self._is_computing = True
        result = getattr(self, name)(*arguments)
        self._is_computing = False
        return result

    def _share(self, message: Any = None) -> Any:
        """Rank 0's message on all ranks (collective)."""
        messages = [message]
        dist.broadcast_object_list(messages, src=0, group=self.requests)
        return messages[0]

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Rank 0's block, which runs lm-eval while the other ranks are in `serve`, where its exception is raised as a UserError."""
        try:
            yield
        except Exception as error:
            if not self._is_computing:
                text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"
                self._share(("error", text))
            raise
        self._share()

    def serve(self) -> None:
        """Compute what rank 0 asks for until its block ends.

        Raises:
            UserError: rank 0's.
        """
        while True:
            with hang_watchdog.phase(Phase.idle, lambda: "waiting for rank 0's requests"):
                request = self._share()
            if request is None:
                return
            name, arguments = request
            if name == "error":
                raise UserError(arguments)
            getattr(self, name)(*arguments)

    def _parts(self, count: int, order: list[int], what: str) -> Iterator[list[int]]:
        """`order` in parts, with a stop point before each (collective)."""
        done, progress = 0, process_groups.Progress(what, len(order), "requests")
        with hang_watchdog.phase(Phase.step, lambda: what):
            for part in itertools.batched(order, count):
                stop_signal.stop_point(f"in {what} after {done} of {len(order)} requests")
                yield list(part)
                done += len(part)
                progress.update(done)

    def _score(self, rows: list[Request]) -> list[tuple[float, bool]]:
        """Log-likelihoods and whether each label is the most likely token (collective)."""
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        order = sorted(range(len(rows)), key=lambda n: tuple(rows[n].tokens))  # rows that begin alike share passes
        for part in self._parts(_BATCHES * self._batch(), order, "log-likelihoods"):
            likelihoods = Likelihoods(self.sharded, self.arch, [rows[n] for n in part], self.micro_batch)
            for n, log_p, is_greedy in zip(part, *(column.tolist() for column in likelihoods.compute()), strict=True):
                found[n] = log_p, is_greedy
        return found

    def _continue(self, prompts: list[list[int]], numbers: list[int], options: dict) -> list[list[int]]:
        """The new tokens of each prompt, which may end after a stop sequence (collective)."""
        found: list[list[int]] = [[]] * len(prompts)
        tail = max(len(text.encode()) for text in options["until"]) + 8  # a token has at least a byte

        def is_done(new: list[int]) -> bool:
            text = self.words.decode(new[-tail:])
            return new[-1] == self.words.eos or any(stop and stop in text for stop in options["until"])

        order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
        for part in self._parts(self._batch(), order, "generation"):
            rank, dp = process_groups.dp_group().rank(), process_groups.dp_group().size()
            padded = [*part, *part[:1] * (self._batch() - len(part))]
            own = padded[rank * self.micro_batch : (rank + 1) * self.micro_batch]
            choose = greedy
            if options.get("do_sample"):
                seeds = [hash((self.seed, numbers[n])) % 2**63 for n in own]
                choose = Sampling(options["temperature"], options.get("top_p", 1.0), seeds)
            new = generate(self.sharded, self.arch, [prompts[n] for n in own], options["max_gen_toks"], is_done, choose)
            every = [new] * dp
            dist.all_gather_object(every, new, group=process_groups.dp_group())
            for n, tokens in zip(padded, itertools.chain(*every), strict=True):
                found[n] = tokens
        return found

    def _batch(self) -> int:
        return self.micro_batch * process_groups.dp_group().size()
