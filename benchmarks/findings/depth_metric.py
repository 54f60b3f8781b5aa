"""Which blocks to drop for half the depth: by loss, alone or as a run, or by WinoGrande.

Sixteen scattered blocks of Llama-3.1-8B, each the cheapest by loss, gave a better loss than a run of sixteen, but a WinoGrande
accuracy of chance, and the gap stayed in training (arXiv 2408.11796, figures 8 and 9). The papers chose the run by WinoGrande.
Blocks are chosen on the same text for all seeds, so the losses before training have no error.
"""

from arms import Arm, Cut
from verdicts import Claim, main


def half(rule: str) -> Arm:
    return Arm(f"kl_half_{rule}", Cut(f"half_{rule}", prune=("prune=keep",), without=(rule, 15)))


ARMS = {"run by loss": half("loss"), "scattered by loss": half("scattered"), "run by WinoGrande": half("accuracy")}
CLAIMS = [
    Claim("scattered by loss", "run by WinoGrande", "before"),
    Claim("scattered by loss", "run by WinoGrande"),
    Claim("run by loss", "scattered by loss"),
]

if __name__ == "__main__":
    main("depth_metric", __doc__, ARMS, CLAIMS)
