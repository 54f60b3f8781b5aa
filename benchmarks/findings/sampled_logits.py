"""What a cache of the teacher's logits holds at equal bytes: the largest, or some largest and some drawn.

A student of cached largest logits learns a biased distribution, one of drawn logits the teacher's on average (arXiv 2503.16870,
which trains from random weights). Expected here: in `benchmarks/teacher_cache.py` the head's gradient from 8 largest and 8 drawn
entries is as close as that from 16 largest, without its bias, but that of the hidden states half as close. In 24 steps noise
and bias should both cost little beside the hidden states' cache, with 64 entries less than with 16.
"""

from arms import Arm
from verdicts import Claim, main


def entries(largest: int, drawn: int) -> Arm:
    return Arm(f"entries_{largest}_{drawn}", cache=("kind=topk", f"top_k={largest}", f"tail_draws={drawn}"))


ARMS = {
    "hidden states": Arm(),
    "16 largest": entries(16, 0),
    "8 largest, 8 drawn": entries(8, 8),
    "64 largest": entries(64, 0),
    "32 largest, 32 drawn": entries(32, 32),
}
CLAIMS = [
    Claim("8 largest, 8 drawn", "16 largest"),
    Claim("32 largest, 32 drawn", "64 largest"),
    Claim("hidden states", "32 largest, 32 drawn"),
]

if __name__ == "__main__":
    main("sampled_logits", __doc__, ARMS, CLAIMS)
