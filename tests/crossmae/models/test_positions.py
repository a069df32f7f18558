"""Proves the position table against a loop in Python floats, and its layout (method specification, 1.7)."""

from __future__ import annotations

import math

import pytest
import torch

from crossmae.models.positions import sincos_pos_embed


@pytest.mark.parametrize("grid", [(14, 14), (3, 5)])
def test_equals_a_loop(grid: tuple[int, int]) -> None:
    dim = 24
    table = sincos_pos_embed(dim, grid)
    assert table.shape == (1, grid[0] * grid[1] + 1, dim)
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


def test_class_row_is_zero_and_halves_vary_along_one_axis() -> None:
    table = sincos_pos_embed(16, (4, 6))[0]
    assert (table[0] == 0).all()
    cells = table[1:].view(4, 6, 16)
    assert torch.equal(cells[0, :, :8], cells[3, :, :8])  # the first half does not change with the row
    assert torch.equal(cells[:, 0, 8:], cells[:, 5, 8:])  # the second half does not change with the column
    assert not torch.equal(cells[0, 0, :8], cells[0, 1, :8])


def test_width_must_be_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="width of 6"):
        sincos_pos_embed(6, (2, 2))
