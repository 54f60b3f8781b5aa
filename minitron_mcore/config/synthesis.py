"""The config section `synthesize`. No torch import."""

from dataclasses import dataclass

from minitron_mcore.config.fields import changeable


@dataclass
class SynthesizeConfig:
    """Answers of a model: how they are sampled, and which are kept."""

    samples: int = changeable(1)
    """Answers to each prompt."""
    prompt_tokens: int = changeable(1024)
    """Longest prompt that is answered."""
    tokens: int = 512
    """Most tokens of an answer."""
    temperature: float = 1.0
    """Divides the logits before sampling; 0 takes the most likely token."""
    top_p: float = 1.0
    """Sample from the fewest tokens whose probabilities sum to this share."""
    micro_batch: int = changeable(8)
    """Prompts of a forward pass of one rank."""
    min_log_likelihood: float | None = changeable(None)
    """Keep answers whose tokens have at least this mean log-likelihood under the model, in nats; null keeps all."""
    min_tokens: int = changeable(1)
    """Keep answers of at least this length."""
    keep_unfinished: bool = changeable(False)
    """Keep answers that reach `tokens` without an end."""

    @property
    def sequence_length(self) -> int:
        """Tokens of the longest prompt and answer."""
        return self.prompt_tokens + self.tokens
