"""Health of a run: a warning where its loss is above what the recipe is known to show, never a stop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Band = Sequence[tuple[float, float, float]]

SETTLED = 0.1  # share of the schedule after which a loss must have fallen; later where the warm-up is long
MOVED = 0.97  # of the first loss, or of 1, the loss of predicting each patch's mean


class Health:
    """Watch over the training loss of one run.

    Args:
        band: rows of (share of the schedule, lowest, highest expected loss), shares rising. Limits are interpolated
            between rows; before the first row nothing is expected.
        normalised: targets are standardised per patch, so that predicting nothing costs 1.
        warmup: share of the schedule in which the learning rate rises.
    """

    def __init__(self, band: Band, measured_on: str, normalised: bool, warmup: float) -> None:
        self.band, self.measured_on, self.normalised = band, measured_on, normalised
        self.settled = max(SETTLED, 2 * warmup)
        self.is_above = self.is_stuck = False

    def warnings(self, share: float, loss: float, first: float) -> list[str]:
        """Warn about a loss, once for each trouble until it is over.

        Args:
            share: steps done over all steps, 0 to 1.
            first: first loss of the run; inf where a good start cannot fall much.
        """
        found = []
        limits = self.limits(share)
        was_above, self.is_above = self.is_above, limits is not None and loss > limits[1]
        if self.is_above and not was_above and limits is not None:
            found.append(
                f"health: the loss, {loss:.3f} at {share:.0%} of the schedule, is above the band "
                f"{limits[0]:.3f} to {limits[1]:.3f} that this recipe showed on {self.measured_on}"
            )
        ceiling = MOVED * min(first, 1.0 if self.normalised else first)
        was_stuck, self.is_stuck = self.is_stuck, share >= self.settled and loss > ceiling
        if self.is_stuck and not was_stuck:
            found.append(
                f"health: the loss did not move: {first:.3f} at first, {loss:.3f} at {share:.0%} of the schedule"
                + (" (1 is what predicting each patch's mean costs)" if self.normalised else "")
                + ". Check the learning rate, and whether the reconstructions show anything"
            )
        return found

    def limits(self, share: float) -> tuple[float, float] | None:
        """Interpolate the limits of the loss, None before the first row."""
        if not self.band or share < self.band[0][0]:
            return None
        shares, lows, highs = zip(*self.band, strict=True)
        return float(np.interp(share, shares, lows)), float(np.interp(share, shares, highs))
