"""Proves the position table against a loop in Python floats, and its layout (method specification, 1.7)."""

from __future__ import annotations

import math

import pytest

from crossmae.models.positions import sincos_pos_embed


@pytest.mark.parametrize("grid", [(14, 14), (3, 5)])
def test_equals_a_loop(grid: tuple[int, int]) -> None:
    dim = 24
    table = sincos_pos_embed(dim, grid)
    assert table.shape == (1, grid[0] * grid[1] + 1, dim)
    assert (table[0, 0] == 0).all()  # the class row
    quarter = dim // 4
    for row in range(grid[0]):
        for column in range(grid[1]):
            for i in range(quarter):
                frequency = 1 / 10000 ** (i / quarter)
                token = table[0, 1 + row * grid[1] + column]
                expected = [
                    math.sin(column * frequency),
                    math.cos(column * frequency),
                    math.sin(row * frequency),
                    math.cos(row * frequency),
                ]
                for part, value in enumerate(expected):
                    assert token[part * quarter + i].item() == pytest.approx(value, abs=3e-6)


def test_width_must_be_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="width of 6"):
        sincos_pos_embed(6, (2, 2))
