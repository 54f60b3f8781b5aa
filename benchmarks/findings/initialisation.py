"""Pruned weights against random ones.

After 1.8 B tokens the pruned 8 B model had a loss of 2.06, the same model from random weights 3.95 (arXiv 2407.14679, table 1). In
arXiv 2408.11796, figure 6, pruning by scores was ahead of a random cut and of random weights. The third claim was added after the
runs: losses of random cuts differ so much by seed that the other two were not decided.
"""

from arms import Arm, Cut
from verdicts import Claim, main

ARMS = {
    "pruned by scores": Arm(),
    "pruned by random scores": Arm("kl_random_scores", Cut("random_scores", random="scores")),
    "random weights": Arm("kl_random_weights", Cut("random_weights", random="weights")),
}
CLAIMS = [
    Claim("pruned by scores", "pruned by random scores"),
    Claim("pruned by random scores", "random weights"),
    Claim("pruned by scores", "random weights"),
]

if __name__ == "__main__":
    main("initialisation", __doc__, ARMS, CLAIMS)
