"""Scores, learning rate and batch of a short recovery.

No finding of the papers, but what conf/recipe/smollm2_laptop.yaml was chosen by. All arms keep the channels, cut the MLPs and
read as many tokens. One seed (--seeds 1), so nothing is decided; paired differences of other findings vary by 0.01 to 0.03
between seeds.
"""

from arms import STEPS, Arm, Cut
from axes import MLPS
from verdicts import main

L2 = Cut("mlps_l2", MLPS.prune, ("importance.sequence=l2",))
SMALL = ("distill.global_batch=2", "distill.micro_batch=2")
ARMS = {
    "mean over tokens, peak 8e-4": Arm("kl_mlps", MLPS),
    "L2 over tokens, peak 8e-4": Arm("kl_mlps_l2", L2),
    "L2 over tokens, peak 1.6e-3": Arm("kl_mlps_l2_fast", L2, ("distill.peak_lr=1.6e-3",)),
    "L2 over tokens, peak 4e-4": Arm("kl_mlps_l2_slow", L2, ("distill.peak_lr=4e-4",)),
    "L2 over tokens, peak 2e-4": Arm("kl_mlps_l2_slower", L2, ("distill.peak_lr=2e-4",)),
    "L2 over tokens, peak 8e-4, 48 steps of 512 tokens": Arm("kl_mlps_l2_48", L2, SMALL, 2 * STEPS, cache=()),
}
CLAIMS = []

if __name__ == "__main__":
    main("schedule", __doc__, ARMS, CLAIMS)
