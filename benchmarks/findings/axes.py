"""What to cut for 100 M parameters: channels of the residual stream, or only the MLPs, or MLPs and a few blocks.

Of the 15 B model, neurons and heads alone were better before training, and neurons, heads and channels after a few steps (arXiv
2407.14679); its successor keeps the heads and cuts MLPs and channels (arXiv 2408.11796). All arms keep the heads
here and have 99.6 to 100.3 M parameters.
"""

from arms import Arm, Cut
from verdicts import Claim, main

MLPS = Cut("mlps", prune=("prune.ffn=872",))
MLPS_AND_BLOCKS = Cut("mlps_and_blocks", prune=("prune.ffn=968",), without=("scattered", 2))
ARMS = {
    "MLPs and channels": Arm(),
    "MLPs": Arm("kl_mlps", MLPS),
    "MLPs and two blocks": Arm("kl_mlps_and_blocks", MLPS_AND_BLOCKS),
}
CLAIMS = [
    Claim("MLPs", "MLPs and channels", "before"),
    Claim("MLPs and channels", "MLPs"),
    Claim("MLPs and channels", "MLPs and two blocks"),
]

if __name__ == "__main__":
    main("axes", __doc__, ARMS, CLAIMS)
