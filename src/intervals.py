"""How far a share that was measured on some images can be trusted."""

import math

from src.runtime import counted, say

FEW = 100
"""A part with fewer images is reported: at 90 % right, the 95 % interval of 100 images is 12 points wide."""

ONE_SIDED = 1.645
"""The z of a bound that the true share lies beyond in 95 % of all cases."""


def wilson_interval(right: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of an accuracy measured on `count` images (Wilson 1927): the noise of those images alone."""
    share, spread = right / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def report_few(part: str, count: int, accuracy: float = 0.9) -> None:
    """Say how little the images of a part, validation or test, can measure where they are few."""
    if count < FEW:
        low, high = wilson_interval(accuracy * count, count)
        say(
            f"only {counted(count, f'{part} image')}: an accuracy of {100 * accuracy:.0f} % on them has a 95 % "
            f"interval of {100 * (high - low):.0f} points ({100 * low:.0f} to {100 * high:.0f} %); smaller differences "
            "are noise"
        )
