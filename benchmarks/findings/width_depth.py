"""Width against depth at 100 M parameters, before and after training.

Of the 15 B model, the cut in depth was better before training and the one in width after 200 steps (arXiv 2407.14679, table 13 and
figure 6). Depth here: the run of ten blocks whose removal costs least, of 30 (99.1 M parameters; width 100.3 M).
"""

from arms import Arm, Cut
from verdicts import Claim, main

ARMS = {
    "width": Arm(),
    "depth": Arm("kl_depth", Cut("depth", prune=("prune=keep",), without=("loss", 10))),
}
CLAIMS = [Claim("depth", "width", "before"), Claim("width", "depth")]

if __name__ == "__main__":
    main("width_depth", __doc__, ARMS, CLAIMS)
