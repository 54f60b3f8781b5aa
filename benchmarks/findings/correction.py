"""Teacher correction on text that the teacher does not know well.

A teacher first trained on the distillation text gave the student a loss more than 6 % lower; pruning the original and
distilling from the corrected teacher was on par (arXiv 2408.11796, figure 5). Correction here: a third of the tokens (at a
quarter of the peak rate of distillation; the papers took a fifth of the teacher's own), then two thirds of distillation. Both
budgets are shown: the papers count the student's tokens; at equal tokens in all, the plain arm trains the student half as long
again.
"""

from arms import Arm, Cut
from verdicts import Claim, main

CORRECTED = Arm("correct", stage="correct", steps=16)
ARMS = {
    "not corrected, 32 steps": Arm("plain_32", steps=32, cache=()),
    "not corrected, 48 steps": Arm("plain_48", steps=48, cache=()),
    "corrected, then pruned: 16 + 32": Arm(
        "corrected_32", Cut("corrected", source=CORRECTED), steps=32, teacher=CORRECTED
    ),
    "original pruned, teacher corrected: 16 + 32": Arm("corrected_teacher_32", steps=32, teacher=CORRECTED),
}
CLAIMS = [
    Claim("corrected, then pruned: 16 + 32", "not corrected, 32 steps"),
    Claim("corrected, then pruned: 16 + 32", "not corrected, 48 steps"),
    Claim("original pruned, teacher corrected: 16 + 32", "not corrected, 48 steps"),
]

if __name__ == "__main__":
    main("correction", __doc__, ARMS, CLAIMS)
