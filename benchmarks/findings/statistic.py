"""How activations become scores, before and after training.

Mean over the tokens and L2 over the samples was best, before training (arXiv 2407.14679, table 11) and against L2 over both
after 400 steps (figure 5).
"""

from arms import Arm, Cut
from verdicts import Claim, main


def arm(sequence: str) -> Arm:
    return Arm(f"kl_{sequence}", Cut(f"width_{sequence}", statistic=(f"importance.sequence={sequence}",)))


ARMS = {"mean over tokens": Arm(), "L2 over tokens": arm("l2"), "variance over tokens": arm("variance")}
CLAIMS = [Claim("mean over tokens", other, key) for key in ("before", "after") for other in list(ARMS)[1:]]

if __name__ == "__main__":
    main("statistic", __doc__, ARMS, CLAIMS)
