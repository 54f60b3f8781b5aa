"""The teacher's largest logits instead of all.

Up to k = 100 accuracy dropped; larger k was no better than the whole vocabulary (arXiv 2407.14679, appendix A.5). Here all other
tokens are one entry.
"""

from arms import Arm
from verdicts import Claim, main

ARMS = {"all": Arm()} | {f"k = {k}": Arm(f"top_k_{k}", train=(f"distill.top_k={k}",)) for k in (10, 100)}
CLAIMS = [Claim("all", "k = 10"), Claim("all", "k = 100")]

if __name__ == "__main__":
    main("top_k", __doc__, ARMS, CLAIMS)
