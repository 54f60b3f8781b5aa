"""Sampled answers as training text: a failure means another distribution, or answers that depend on layout, batch or a stop."""

import json

import pytest
import torch

from minitron_mcore.cli import dry_run
from minitron_mcore.config.settings import DataConfig, ParallelConfig
from minitron_mcore.config.synthesis import SynthesizeConfig
from minitron_mcore.data.tokenizer import load
from minitron_mcore.errors import UserError
from minitron_mcore.evaluation import prompts, synthesis
from minitron_mcore.testing import on_ranks
from tests.helpers import models
from tests.helpers.launching import config_of, fork, word_tokenizer

ONE = ParallelConfig()
TEMPLATE = "{% for m in messages %}w9 {{ m.content }} <eos>{% endfor %}{% if add_generation_prompt %}w9 {% endif %}"
COMMON = [
    *("+model=smollm2_135m", "model.name=tiny", "model.hf=hf", "model.architecture=null", "dtype=fp32", "out_dir=out"),
    *(
        "prompts=[prompts.jsonl]",
        "synthesize.prompt_tokens=8",
        "synthesize.tokens=6",
        "synthesize.temperature=0.7",
        "synthesize.top_p=0.9",
        "synthesize.keep_unfinished=true",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that ends some of its answers, and prompts of several lengths, two of them equal and one too long."""
    root = tmp_path_factory.mktemp("synthesis")
    models.tiny_llama(root / "hf")
    word_tokenizer(root / "hf")
    (root / "hf/chat_template.jinja").write_text(TEMPLATE)
    (root / "hf/generation_config.json").write_text(json.dumps({"eos_token_id": [0, *range(2, 12)]}))
    lines = [{"prompt": f"w{n} " * (1 + n % 4)} for n in range(2, 12)] + [{"prompt": "w3 w3 w3 w3 "}]
    chats = [
        {"messages": [{"role": "user", "content": f"w{n}"}, {"role": "assistant", "content": "w1"}]} for n in (5, 6)
    ]
    lines += [*chats, {"prompt": "w2 " * 9}]
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    on_ranks(models.import_hf, 1, ONE, root / "hf", root / "runs/tiny/convert", ONE)
    return root


def draw(checkpoint, parallel, prompt: list[int], count: int, temperature: float, top_p: float):
    """The first tokens of `count` answers to one prompt, and their log-likelihoods."""
    from minitron_mcore.checkpoint.run_folder import build_model, open_checkpoint
    from minitron_mcore.evaluation.generate import generate
    from minitron_mcore.parallel import process_groups

    opened = open_checkpoint(checkpoint)
    choice = synthesis.ScoredChoice(temperature, top_p, [synthesis._seed(7, ("p", n)) for n in range(count)])
    new = generate(build_model(opened, parallel, "fp32"), opened.arch, [prompt] * count, 1, choose=choice)
    return torch.tensor(new)[:, 0], process_groups.from_last_stage(choice.log_likelihood)


def test_samples_have_the_distribution_of_the_softmax(folder):
    """Within the spread of 4,000 draws, on two pipeline stages."""
    count, temperature, top_p = 4000, 1.4, 0.8
    layout = ParallelConfig(pipeline=2)
    drawn, found = on_ranks(
        draw, 2, layout, folder / "runs/tiny/convert", layout, [5, 6, 7], count, temperature, top_p
    )[0]
    logits = models.hf_logits(folder / "hf", torch.tensor([[5, 6, 7]]))[0, -1].double()
    p, order = (logits / temperature).softmax(0).sort(descending=True)
    kept = order[: int((p.cumsum(0) < top_p).sum()) + 1]
    wanted = torch.zeros(len(p), dtype=torch.float64)
    wanted[kept] = p[: len(kept)] / p[: len(kept)].sum()
    shares = torch.bincount(drawn, minlength=len(p)) / count
    assert 1 < len(kept) < len(p) and (shares[wanted == 0] == 0).all()
    assert ((shares - wanted).abs() <= 5 * (wanted * (1 - wanted) / count).sqrt() + 1e-12).all()
    assert torch.allclose(found, logits.log_softmax(0)[drawn], atol=1e-5)


def rows(root) -> list[dict]:
    return [json.loads(line) for line in (root / "out/train.jsonl").read_text().splitlines()]


def exactly(lines: list[dict]) -> list[dict]:
    return [line | {"mean_log_likelihood": round(line["mean_log_likelihood"], 4)} for line in lines]


@pytest.mark.slow
def test_answers_depend_on_prompt_and_seed_only(folder, tmp_path):
    """One process; TP 2 x DP 2 in other batches; and a stop, a torn line and a resume. The result is training text."""
    roots = [tmp_path / name for name in ("whole", "sharded", "stopped")]
    for root in roots:
        root.mkdir()
        for name in ("hf", "prompts.jsonl", "runs"):
            (root / name).symlink_to(folder / name)
    whole, sharded, stopped = roots
    told = fork(whole, "synthesize", *COMMON, "synthesize.samples=2")
    assert "train on them: data.train=[out/train.jsonl]" in told
    fork(
        sharded, "synthesize", *COMMON, "synthesize.samples=2", "parallel=tp2", "synthesize.micro_batch=3", processes=4
    )
    fork(stopped, "synthesize", *COMMON, "synthesize.samples=2", "synthesize.micro_batch=5", fails=5, stop_at=(3, 15))
    with (stopped / "out/answers.log").open("a") as log:
        log.write('{"id": "torn')
    fork(stopped, "synthesize", *COMMON, "synthesize.samples=2", "synthesize.micro_batch=5")
    lines = rows(whole)
    assert exactly(rows(sharded)) == exactly(rows(stopped)) == exactly(lines)
    every = synthesis.read_answers(whole / "out/answers.log")
    assert len(every) == 24 and {answer["finish"] for answer in every.values()} == {"end", "length"}
    fingerprint = json.loads((whole / "runs/tiny/convert/model.json").read_text())["fingerprint"]
    settings = {"teacher": fingerprint, "teacher_step": "step_0000000", "seed": 1234, "temperature": 0.7, "top_p": 0.9}
    assert all(settings.items() <= line.items() for line in lines)
    # The likelihood of an answer that the limit cut is that of its tokens after the prompt, in transformers.
    line = next(line for line in lines if line["finish"] == "length" and "prompt" in line)
    ids = torch.tensor([load(folder / "hf").documents([line["prompt"] + line["completion"]])[0][:-1]])
    log_p = models.hf_logits(folder / "hf", ids)[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[-6:]
    assert log_p.mean().item() == pytest.approx(line["mean_log_likelihood"], abs=1e-4)
    # The same command with other filters answers nothing again; then the result trains.
    fork(
        whole,
        "synthesize",
        *COMMON,
        "synthesize.samples=2",
        "synthesize.keep_unfinished=false",
        "synthesize.min_log_likelihood=-5",
    )
    fewer = rows(whole)
    for root in (whole, stopped):
        assert (root / "out/answers.log").read_text().count("\n") == 24
    assert fewer == [line for line in lines if line["finish"] == "end" and line["mean_log_likelihood"] >= -5]
    small = [f"distill.{key}=2" for key in ("steps", "global_batch", "micro_batch")] + ["distill.sequence_length=16"]
    sft = [
        "student=runs/tiny/convert",
        "teacher=nowhere",
        "distill=sft",
        "data.document_mask=true",
        "distill.warmup_steps=0",
    ]
    told = fork(sharded, "distill", *COMMON[:5], "out_dir=sft", *sft, *small, "data.train=[out]")
    assert "lm_loss" in (sharded / "sft/metrics.jsonl").read_text()


def test_filters_and_duplicates():
    answer = {"id": "a", "sample": 0, "completion": "b c", "tokens": 2, "mean_log_likelihood": -1.0, "finish": "end"}
    others = [
        {"sample": 1, "completion": " b  c\n"},
        {"tokens": 1},
        {"completion": " ", "tokens": 3},
        {"finish": "length", "completion": "d"},
        {"mean_log_likelihood": -2.1},
        {"id": "b"},
    ]
    given = [answer, *(answer | changed for changed in others), None]
    kept, dropped = synthesis.select(given, SynthesizeConfig(min_tokens=2, min_log_likelihood=-2.0))
    assert kept == [answer, answer | {"id": "b"}]
    assert dropped == {"long prompt": 1, "short": 2, "unfinished": 1, "unlikely": 1, "duplicate": 1}
    assert len(synthesis.select(given, SynthesizeConfig(keep_unfinished=True))[0]) == 3


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text": "a"}', "line 1 has no prompt .KeyError: 'prompt'.: write"),
        ('{"prompt": 3}', "line 1 has no prompt .ValueError: '3' is no text"),
        ('{"prompt": ["a"]}', "line 1 has no prompt .ValueError: .* is no text"),
        ('{"prompt": " "}', "line 1 has no prompt .ValueError: ' ' is no text"),
        ("[1]", "line 1 has no prompt .TypeError"),
        ("{", "line 1 has no prompt .JSONDecodeError"),
        ('{"prompt": "\\ud800"}', "line 1 has no prompt .UnicodeEncodeError"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 1: the conversation has answers only"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "line 1: message 1 has the role 'robot'"),
        ("", "no prompts: write one"),
    ],
)
def test_other_prompts_are_refused(tmp_path, line, sentence):
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=sentence):
        prompts.read([str(path)], DataConfig())


@pytest.mark.parametrize(
    ("text", "ids"), [("w5 w6", [5, 6]), ("w5 <eos>", [5, 0]), ("<eos>", [0]), ("w5 <eos> w6", [5, 0, 6]), ("x", None)]
)
def test_a_prompt_ends_where_its_text_ends(folder, text, ids):
    """With an EOS of its own, without that of a document; one that the tokenizer removes as a whole is refused."""
    from tokenizers import normalizers

    tokenizer = load(folder / "hf")
    tokenizer.backend.normalizer = normalizers.Replace("x", "")
    asked = prompts.Prompt(text, "p.jsonl, line 3", "")
    if ids:
        assert synthesis.prompt_tokens(asked, tokenizer) == ids
    else:
        with pytest.raises(UserError, match="p.jsonl, line 3: the tokenizer gives 'x' no tokens: write another text"):
            synthesis.prompt_tokens(asked, tokenizer)


def test_settings_out_of_range_and_dry_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    wrong = [
        "prompts=[]",
        "synthesize.samples=0",
        "synthesize.top_p=1.5",
        "synthesize.temperature=-1",
        "synthesize.min_tokens=9",
        "synthesize.min_log_likelihood=1",
    ]
    problems = dry_run.plan(config_of("synthesize", *COMMON, *wrong, "synthesize.prompt_tokens=400"))["problems"]
    names = [
        "prompts is empty",
        "samples is 0",
        "min_tokens is 9",
        "prompt_tokens + tokens is 406, but the model has 256",
    ]
    names += ["top_p is 1.5", "temperature is -1", "min_log_likelihood is 1"]
    assert len(problems) == len(names) and all(any(name in problem for problem in problems) for name in names), problems
    figures = dry_run.plan(config_of("synthesize", *COMMON, "parallel=tp2", "dry_run=true"))
    assert not figures["problems"] and figures["operations"]["tokens"] == 13 * 6
    assert (
        figures["ranks"][0]["cache"] == 5 * 8 * (8 + 6) * 2 * 3 * 8 * 4
    )  # layers, rows, tokens, k and v, own groups, head_dim, fp32
