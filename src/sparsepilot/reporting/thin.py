"""Long series made short without losing their extremes."""

from __future__ import annotations

import math
from collections.abc import Sequence

MOST_POINTS = 5000
"""Points of a series that a page still draws and zooms at once."""


def thin(
    x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS, log_x: bool = False
) -> tuple[list[float], list[float]]:
    """At most `most` of the points: the least and the greatest y of each of most / 2 equal stretches of the axis.

    The first and the last point stay, so noise keeps its width, a spike its height and the curve its ends.

    Args:
        x: ascending; y: as long.
        log_x: whether stretches are equal on a log axis.

    >>> thin([0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 9, 0, 0, 0, -5, 0, 0], most=4)
    ([0, 2, 6, 8], [0, 9, -5, 0])
    """
    if len(x) <= most:
        return list(x), list(y)
    place = [math.log(v) for v in x] if log_x else x
    num_bins = (most - 2) // 2
    width = (place[-1] - place[0]) / num_bins or 1.0
    least: dict[int, int] = {}
    greatest: dict[int, int] = {}
    for i in range(len(x)):
        stretch = min(num_bins - 1, int((place[i] - place[0]) / width))
        if stretch not in least or y[i] < y[least[stretch]]:
            least[stretch] = i
        if stretch not in greatest or y[i] > y[greatest[stretch]]:
            greatest[stretch] = i
    kept = sorted({0, len(x) - 1, *least.values(), *greatest.values()})
    return [x[i] for i in kept], [y[i] for i in kept]
