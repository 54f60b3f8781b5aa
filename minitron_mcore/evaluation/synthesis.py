"""Training text that a model writes: its sampled answers to prompts, filtered, with their provenance.

    out_dir/
      answers.log    one JSON object a line for each answer, kept or not, in the order of generation
      train.jsonl    the kept answers in the order of the prompts, written at the end: training text

An answer depends on its prompt, the seed and the settings only, so the same command continues where a run stopped.
"""

import collections
import hashlib
import itertools
import json
import os
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_mcore.checkpoint import claim, disk, run_folder
from minitron_mcore.checkpoint.run_folder import Checkpoint
from minitron_mcore.config import ranges
from minitron_mcore.config.identity import resolved
from minitron_mcore.config.stages import SynthesizeRun
from minitron_mcore.config.synthesis import SynthesizeConfig
from minitron_mcore.data.tokenizer import Tokenizer, open_tokenizer
from minitron_mcore.errors import UserError, refuse
from minitron_mcore.evaluation import prompts
from minitron_mcore.evaluation.generate import Sampling, generate, greedy
from minitron_mcore.evaluation.prompts import Prompt
from minitron_mcore.models.build import Model
from minitron_mcore.parallel import hang_watchdog, process_groups, stop_signal
from minitron_mcore.parallel.hang_watchdog import Phase
from minitron_mcore.reading import damage_as_user_error, read_json, read_json_lines
from minitron_mcore.reporting import tables

LOG, TRAIN = "answers.log", "train.jsonl"
REASONS = ("long prompt", "short", "unfinished", "unlikely", "duplicate")
"""Why an answer is not kept."""
Answer = dict[str, Any]
"""Of `_FIELDS`: tokens without the end, mean_log_likelihood with it, finish "end" or "length"."""
_FIELDS = {"id": str, "sample": int, "completion": str, "tokens": int, "mean_log_likelihood": float, "finish": str}
Key = tuple[str, int]
"""A prompt's id and the number of one of its answers."""


def run(config: SynthesizeRun) -> None:
    """Answer the prompts that `out_dir` has no answers of, write its training text and print the table (collective).

    Raises:
        UserError: see `prompts.read`, `ChatTemplate.prompt`, `Tokenizer.documents` and `claim.claim_run_folder`; the model has too
            few positions.
        Stopped: on all ranks, after a signal.
    """
    source = run_folder.open_checkpoint(config.source)
    settings = config.synthesize
    refuse(ranges.positions("prompt_tokens + tokens", settings.sequence_length, model=source.arch.max_positions))
    with process_groups.raise_on_all_ranks():
        tokenizer = open_tokenizer(config.data, source.hf, source.arch.vocab)
        asked = prompts.read(config.prompts, config.data)
        tokens = {prompt.id: prompt_tokens(prompt, tokenizer) for prompt in asked}
    keys = [(prompt.id, sample) for prompt in asked for sample in range(settings.samples)]
    with claim.claim_run_folder(config.out_dir, resolved(config)):
        folder = Path(config.out_dir)
        known = process_groups.on_rank_0(lambda: set(read_answers(folder / LOG)))
        left = {key: tokens[key[0]] for key in keys if key not in known}
        left = {key: ids for key, ids in left.items() if len(ids) <= settings.prompt_tokens}
        if left:
            model = run_folder.build_model(source, config.parallel, config.dtype.value)
            _answer_all(config, source, model, tokenizer, left)
        with process_groups.raise_on_all_ranks(), claim.writing(folder):
            if process_groups.rank() == 0:
                _write(config, source, asked, keys)
                claim.finish(folder)


def prompt_tokens(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """A prompt's token ids up to where the answer begins."""
    try:
        if isinstance(prompt.content, str):
            return tokenizer.prompt(prompt.content)
        return tokenizer.spans([tokenizer.chat.prompt(prompt.content)])[0].ids
    except UserError as error:
        raise UserError(f"{prompt.where}: {error}") from error


def read_answers(log: Path) -> dict[Key, Answer]:
    """The answers in a log; an incomplete last line, of a killed run, is removed (one process).

    Raises:
        UserError: a damaged log.
    """
    if not log.is_file():
        return {}
    remedy = f"remove {log} to answer all prompts again"
    with damage_as_user_error(log, remedy):
        whole, _, partial_line = log.read_text(encoding="utf-8").rpartition("\n")
        if partial_line:
            disk.replace_text(log, f"{whole}\n" if whole else "")
        answers = read_json_lines(log, remedy)
        for answer in answers:
            if wrong := [name for name, kind in _FIELDS.items() if not isinstance(answer[name], kind)]:
                raise TypeError(f"{wrong[0]} is {str(answer[wrong[0]])[:40]}")
    return {(answer["id"], answer["sample"]): answer for answer in answers}


def select(answers: Iterable[Answer | None], config: SynthesizeConfig) -> tuple[list[Answer], dict[str, int]]:
    """The answers to keep, in order, and the number of others by reason.

    Args:
        answers: None for those to prompts that are too long.
    """
    kept, dropped, seen = [], collections.Counter(dict.fromkeys(REASONS, 0)), set()
    for answer in answers:
        reason = _reason(answer, config) if answer else "long prompt"
        content = answer and (answer["id"], " ".join(answer["completion"].split()))
        if reason := reason or ("duplicate" if content in seen else None):
            dropped[reason] += 1
        else:
            kept.append(answer)
            seen.add(content)
    return kept, dict(dropped)


def _reason(answer: Answer, config: SynthesizeConfig) -> str | None:
    """Why an answer is not kept, whatever the others are."""
    if answer["tokens"] < config.min_tokens or not answer["completion"].strip():
        return "short"
    if answer["finish"] != "end" and not config.keep_unfinished:
        return "unfinished"
    least = config.min_log_likelihood
    return "unlikely" if least is not None and answer["mean_log_likelihood"] < least else None


class ScoredChoice:
    """A `generate.Choice` that adds up, for each row, the log-likelihoods of its tokens under the model at temperature 1."""

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int]):
        self.choose = Sampling(temperature, top_p, seeds) if temperature else greedy
        self.log_likelihood = torch.zeros(len(seeds), dtype=torch.float64, device=process_groups.device())

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        tokens = self.choose(logits, rows)
        log_p = logits.double().log_softmax(dim=1).gather(1, tokens[:, None])[:, 0]
        self.log_likelihood[list(rows)] += log_p
        return tokens


def _answer_all(
    config: SynthesizeRun, source: Checkpoint, model: Model, tokenizer: Tokenizer, left: dict[Key, list[int]]
) -> None:
    """Append the answers to the log, the longest prompts first (collective). `left`: prompts as token ids."""
    group, ends = process_groups.dp_group(), end_tokens(source, tokenizer)
    batches = itertools.batched(
        sorted(left, key=lambda key: -len(left[key])), config.synthesize.micro_batch * group.size()
    )
    progress, done = process_groups.Progress("synthesize", len(left), "answers"), 0
    with stop_signal.at_stop_points(), hang_watchdog.phase(Phase.step, lambda: f"answers after {done} of {len(left)}"):
        for batch in batches:
            stop_signal.stop_point(f"after {done} of {len(left)} answers")
            own = {key: left[key] for key in batch[group.rank() :: group.size()]}
            every = [[]] * group.size()
            dist.all_gather_object(every, _answers(config, source, model, tokenizer, own, ends), group=group)
            with process_groups.raise_on_all_ranks(), claim.writing(Path(config.out_dir)):
                if process_groups.rank() == 0:
                    _append(Path(config.out_dir) / LOG, itertools.chain(*every))
            done += len(batch)
            progress.update(done)


def _answers(
    config: SynthesizeRun,
    source: Checkpoint,
    model: Model,
    tokenizer: Tokenizer,
    own: dict[Key, list[int]],
    ends: Container[int],
) -> list[Answer]:
    """Answers to the prompts of this data-parallel rank, which may be none (collective)."""
    settings = config.synthesize
    choice = ScoredChoice(settings.temperature, settings.top_p, [_seed(config.seed, key) for key in own])
    every = generate(model, source.arch, list(own.values()), settings.tokens, lambda new: new[-1] in ends, choice)
    sums = process_groups.from_last_stage(choice.log_likelihood).tolist()
    answers = []
    for ((prompt_id, sample), prompt), new, total in zip(own.items(), every, sums, strict=True):
        text = new[:-1] if (is_ended := new[-1] in ends) else new
        answers.append(
            {
                "id": prompt_id,
                "sample": sample,
                # Some tokenizers decode a text's first token without its space.
                "completion": tokenizer.decode([*prompt, *text])[len(tokenizer.decode(prompt)) :],
                "tokens": len(text),
                "mean_log_likelihood": total / len(new),
                "finish": "end" if is_ended else "length",
            }
        )
    return answers


def _seed(seed: int, key: Key) -> int:
    """Seed of one answer's tokens, below 2^63."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key[0]} {key[1]}".encode()).digest()[:8]) >> 1


def end_tokens(source: Checkpoint, tokenizer: Tokenizer) -> set[int]:
    """EOS, and the tokens that end an answer according to the model's generation_config.json."""
    path = source.hf / "generation_config.json"
    listed = read_json(path, "make the checkpoint again").get("eos_token_id") if path.is_file() else None
    every = [tokenizer.eos, *(listed if isinstance(listed, list) else [listed])]
    return {token for token in every if isinstance(token, int)}


def _append(log: Path, answers: Iterable[Answer]) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(answer) + "\n" for answer in answers)
        file.flush()
        os.fsync(file.fileno())


def _write(config: SynthesizeRun, source: Checkpoint, asked: Sequence[Prompt], keys: Sequence[Key]) -> None:
    """Write the training text and print the table (rank 0)."""
    answers, by_id = read_answers(Path(config.out_dir) / LOG), {prompt.id: prompt for prompt in asked}
    kept, dropped = select((answers.get(key) for key in keys), config.synthesize)
    provenance = {"teacher": source.fingerprint, "teacher_step": source.step, "seed": config.seed}
    provenance |= {name: getattr(config.synthesize, name) for name in ("temperature", "top_p")}
    lines = [
        json.dumps(by_id[answer["id"]].answered(answer.pop("completion")) | answer | provenance, ensure_ascii=False)
        for answer in kept
    ]
    disk.replace_text(Path(config.out_dir) / TRAIN, "".join(f"{line}\n" for line in lines))
    row = {"prompts": len(asked), "answers": len(keys), "kept": len(kept), **dropped}
    note = f"train on them: data.train=[{config.out_dir}/{TRAIN}]" if kept else "no answer is kept: change the filters"
    tables.table(f"answers of {config.source}", [row], [note])
