"""Intermediate states for a student of half the depth.

Matching the embeddings and the output of the last block but two besides the logits took the loss of a 16-block student of 32 from
2.155 to 2.141 (arXiv 2407.14679, table 17); its successor trained a student of half the depth on logits alone (arXiv 2408.11796).
The student here is SmolLM2-135M without the run of fifteen blocks whose removal costs least.
"""

from arms import Arm, Cut
from verdicts import Claim, main

HALF = Cut("half_loss", prune=("prune=keep",), without=("loss", 15))
STATES = ("distill.hidden_state_loss.weight=1", "distill.hidden_state_loss.dynamic=true")
ARMS = {
    "logits": Arm("kl_half_loss", HALF),
    "logits and states": Arm("states_half_loss", HALF, STATES, cache=()),
}
CLAIMS = [Claim("logits and states", "logits")]

if __name__ == "__main__":
    main("hidden_states", __doc__, ARMS, CLAIMS)
