"""Importance in one round against two, and one cut against a chain.

Importance measured again after half of the cut gave no benefit (arXiv 2407.14679, table 12). A chain of two cuts with training
between gave 12 % more MMLU, relative, at a cut of 73 % (table 14); here the cut is 25 %, and each part of the chain, over 115 M
parameters, has half of the steps, on samples of its own, those
of the second part the same for all seeds.
"""

from arms import STEPS, Arm, Cut
from verdicts import Claim, main

HALF = ("prune=smollm2_115m",)
BETWEEN = Arm("chain_115m", Cut("width_115m", HALF), steps=STEPS // 2)
ARMS = {
    "one round, one cut": Arm(),
    "two rounds of importance": Arm("kl_two_rounds", Cut("two_rounds", source=Cut("width_115m", HALF))),
    "two cuts with training between": Arm(
        "kl_chain", Cut("chain", source=BETWEEN), ("data.seed=1235",), STEPS // 2, cache=()
    ),
}
CLAIMS = [
    Claim("two rounds of importance", "one round, one cut", expected=False),
    Claim("two cuts with training between", "one round, one cut"),
]

if __name__ == "__main__":
    main("importance_rounds", __doc__, ARMS, CLAIMS)
