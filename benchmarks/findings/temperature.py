"""The temperature of the distributions.

Of 0.1, 0.5, 1 and 3, 1 was best (arXiv 2407.14679, appendix A.5).
"""

from arms import Arm
from verdicts import Claim, main

ARMS = {"1": Arm()} | {
    text: Arm(f"temperature_{text}", train=(f"distill.temperature={text}",)) for text in ("0.5", "3")
}
CLAIMS = [Claim("1", other) for other in list(ARMS)[1:]]

if __name__ == "__main__":
    main("temperature", __doc__, ARMS, CLAIMS)
