"""Forward KL against cross-entropy and their sum.

The papers train on KL(teacher || student) of the logits alone: 2.107 against 2.117 with cross-entropy added (arXiv 2407.14679,
table 15); at equal compute it had an MMLU of 37.8, cross-entropy alone 24.6 (table 14). Reverse KL was behind: 2.665 against
2.155 (table 16).
"""

from arms import Arm
from verdicts import Claim, main

ARMS = {
    "KL": Arm(),
    "cross-entropy": Arm("cross_entropy", train=("distill.kd_weight=0", "distill.lm_weight=1")),
    "KL + cross-entropy": Arm("kl_and_cross_entropy", train=("distill.lm_weight=1",)),
    "reverse KL": Arm("reverse_kl", train=("distill.divergence=reverse_kl",)),
}
CLAIMS = [Claim("KL", other) for other in list(ARMS)[1:]]

if __name__ == "__main__":
    main("divergence", __doc__, ARMS, CLAIMS)
