"""Proves that the health check speaks exactly when a loss leaves its band or does not move, and never stops a run."""

from __future__ import annotations

from crossmae.pretraining.validation import Health

BAND = ((0.2, 0.6, 0.8), (1.0, 0.3, 0.5))


def test_above_the_band_is_told_once_until_it_is_over() -> None:
    health = Health(BAND, "the demo's data", normalised=True, warmup=0.1)
    assert health.warnings(0.1, 1.5, 1.5) == []  # before the first row nothing is expected
    (text,) = health.warnings(0.2, 0.81, 1.5)
    assert "0.810 at 20% of the schedule, is above the band 0.600 to 0.800" in text
    assert "the demo's data" in text
    assert health.warnings(0.3, 0.9, 1.5) == []
    assert health.warnings(0.6, 0.6, 1.5) == []
    assert len(health.warnings(0.6, 0.66, 1.5)) == 1
    assert health.warnings(0.6, 0.1, 1.5) == []  # below is no trouble


def test_limits_are_interpolated_between_rows() -> None:
    health = Health(BAND, "", normalised=True, warmup=0.0)
    assert health.limits(0.1) is None
    for share, low, high in ((0.2, 0.6, 0.8), (0.6, 0.45, 0.65), (1.0, 0.3, 0.5)):
        found = health.limits(share)
        assert found is not None
        assert abs(found[0] - low) + abs(found[1] - high) < 1e-9


def test_a_loss_that_does_not_move_is_told_after_the_warm_up() -> None:
    normalised = Health((), "", normalised=True, warmup=0.1)
    assert normalised.warnings(0.01, 1.8, 1.8) == []
    assert normalised.warnings(0.15, 1.0, 1.8) == []  # still warming up
    (text,) = normalised.warnings(0.25, 0.99, 1.8)  # fell from 1.8, but predicts no more than the mean
    assert "did not move" in text
    assert normalised.warnings(0.3, 0.99, 1.8) == []
    assert normalised.warnings(0.4, 0.9, 1.8) == []
    pixels = Health((), "", normalised=False, warmup=0.0)
    assert pixels.warnings(0.01, 0.2, 0.2) == []
    assert len(pixels.warnings(0.1, 0.199, 0.2)) == 1
    assert pixels.warnings(0.2, 0.15, 0.2) == []
