"""Proves that position tables, patch filters and relative positions are resampled as their definitions say, against
references in float64 that share no code with them; that what fits already is not touched; and that every resampled
tensor of an encoder is named."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crossmae.checkpoints.resample import (
    adapt_channels,
    channel_note,
    fit,
    fit_positions,
    is_sincos,
    resample_patches,
    resample_positions,
    resample_relative,
    table_grid,
    window_of,
)
from crossmae.checkpoints.weights import encoder_arguments
from crossmae.errors import UserError
from crossmae.models.crossmae import CrossMAE
from crossmae.models.positions import sincos_pos_embed

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cubic(distance: float, a: float) -> float:
    """Keys' convolution kernel."""
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def interpolation(old: int, new: int, *, reach: int) -> np.ndarray:
    """(new, old) matrix of cubic (reach 2) or linear (reach 1) interpolation; beyond the border its last value."""
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for j in range(int(np.floor(centre)) - 3, int(np.floor(centre)) + 5):
            weight = cubic(j - centre, -0.75) if reach == 2 else max(0.0, 1 - abs(j - centre))
            matrix[i, min(max(j, 0), old - 1)] += weight
    return matrix


def antialiased(old: int, new: int) -> np.ndarray:
    """(new, old) matrix of cubic interpolation as Pillow does it: as wide as a new pixel, without what lies outside."""
    scale = max(old / new, 1.0)
    distances = np.arange(old)[None] + 0.5 - (np.arange(new)[:, None] + 0.5) * old / new
    weights = np.vectorize(cubic)(distances / scale, -0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def encoder(**overrides: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Plain tensors and arguments of an encoder with random positions, without a decoder."""
    names = ("cls_token", "pos_embed", "patch_embed.", "blocks.")
    tensors = {name: tensor for name, tensor in pretraining(**overrides).items() if name.startswith(names)}
    tensors["pos_embed"] = noise(*tensors["pos_embed"].shape)
    return tensors, encoder_arguments(tensors)


def pretraining(**overrides: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in CrossMAE(**SIZES | DECODER | overrides).state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are not the very same objects."""
    assert list(before) == list(after)
    return {name for name in before if before[name] is not after[name]}


# Position tables.


@pytest.mark.parametrize("class_rows", (0, 1, 2))
@pytest.mark.parametrize(
    ("grid", "new_grid"), (((4, 4), (6, 6)), ((6, 4), (3, 9)), ((14, 14), (7, 7)), ((1, 1), (2, 3)))
)
def test_positions_are_bicubic(grid: tuple[int, int], new_grid: tuple[int, int], class_rows: int) -> None:
    table = noise(1, class_rows + grid[0] * grid[1], 5)
    rows, columns = (interpolation(old, new, reach=2) for old, new in zip(grid, new_grid, strict=True))
    patches = table[0, class_rows:].double().numpy().reshape(*grid, 5)
    expected = np.einsum("ah,bw,hwe->abe", rows, columns, patches).reshape(-1, 5)
    actual = resample_positions(table, grid, new_grid, class_rows=class_rows)
    assert torch.equal(actual[:, :class_rows], table[:, :class_rows])
    np.testing.assert_allclose(actual[0, class_rows:], expected, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_types_are_rounded_once(dtype: torch.dtype) -> None:
    table, filters, relative = noise(1, 17, 4, dtype=dtype), noise(2, 3, 6, 6, dtype=dtype), noise(9, 4, dtype=dtype)
    tensors = {"pos_embed": table, "patch_embed.proj.weight": filters, "blocks.0.attn.rel_pos_h": relative}
    wanted = {"img_size": 40, "patch_size": 8, "in_chans": 4, "window": 7}
    arguments = {"img_size": 24, "patch_size": 6, "in_chans": 3}
    wide = fit({name: tensor.float() for name, tensor in tensors.items()}, arguments, wanted).tensors
    for name, tensor in fit(tensors, arguments, wanted).tensors.items():
        assert tensor.dtype == dtype, name
        assert torch.equal(tensor, wide[name].to(dtype)), name
    for how in ("repeat", "mean", "pad"):
        assert torch.equal(adapt_channels(filters, 4, how), adapt_channels(filters.float(), 4, how).to(dtype))
    assert torch.equal(resample_patches(filters, 8), resample_patches(filters.float(), 8).to(dtype))


def test_what_fits_is_the_same_object() -> None:
    half = torch.float16
    table, filters, relative = noise(1, 9, 4, dtype=half), noise(2, 3, 6, 6, dtype=half), noise(9, 4, dtype=half)
    assert resample_positions(table, (2, 4), (2, 4)) is table
    assert fit_positions(sincos_pos_embed(8, (2, 4)), (2, 4), (2, 4), fixed=True)[1] == ""
    assert fit_positions(table, (2, 4), (2, 4), fixed=True)[0] is table
    assert resample_patches(filters, 6) is filters
    assert all(adapt_channels(filters, 3, how) is filters for how in ("repeat", "mean", "pad"))
    assert resample_relative(relative, 5) is relative


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("class_rows", (0, 1))
def test_fixed_positions_are_computed_again(class_rows: int, dtype: torch.dtype) -> None:
    def fixed(grid: tuple[int, int]) -> Tensor:
        return sincos_pos_embed(16, grid)[:, 1 - class_rows :].to(dtype)

    # As CrossMAE computes it, up to 3e-6 off; in half precision some values then round to a neighbour.
    table = (sincos_pos_embed(16, (3, 4))[:, 1 - class_rows :] + 3e-6).to(dtype)
    assert is_sincos(table, (3, 4))
    assert not is_sincos(table, (4, 3))
    new, note = fit_positions(table, (3, 4), (5, 2), fixed=True)
    assert torch.equal(new, fixed((5, 2)))
    assert new.dtype == dtype
    assert note == "sine-cosine positions made again, 3 x 4 to 5 x 2"
    new, note = fit_positions(table, (3, 4), (5, 2), fixed=False)
    assert torch.equal(new, resample_positions(table, (3, 4), (5, 2), class_rows=class_rows))
    assert note == "resampled 3 x 4 to 5 x 2"


@pytest.mark.parametrize("change", (2e-4, -1.0))
def test_learned_positions_are_never_computed_again(change: float) -> None:
    table = sincos_pos_embed(16, (3, 4))
    assert is_sincos(table, (3, 4))
    table[0, 5, 7] += change
    assert not is_sincos(table, (3, 4))
    assert fit_positions(table, (3, 4), (5, 2), fixed=True)[1] == "resampled 3 x 4 to 5 x 2"
    assert not is_sincos(noise(1, 13, 6), (3, 4))  # a width that no such table has
    assert not is_sincos(table.int(), (3, 4))


@pytest.mark.parametrize(
    ("rows", "img_size", "grid", "class_rows"),
    (
        (197, None, (14, 14), 1),
        (196, None, (14, 14), 0),
        (9, None, (3, 3), 0),
        (10, None, (3, 3), 1),
        (1, None, (1, 1), 0),
        (2, None, (1, 1), 1),
        (17, (16, 64), (2, 8), 1),  # not 4 x 4
        (16, [64, 16], (8, 2), 0),
        (5, 16, (2, 2), 1),
        (13, None, (3, 4), 1),  # fits nothing but the wanted grid
        (12, None, (3, 4), 0),
    ),
)
def test_grid_of_a_table(rows: int, img_size: Any, grid: tuple[int, int], class_rows: int) -> None:
    assert table_grid(rows, img_size, 8, (3, 4)) == (grid, class_rows)


@pytest.mark.parametrize(
    ("rows", "img_size", "wanted", "message"),
    (
        (13, None, None, "Give img_size, the height and width"),
        (13, None, (4, 4), "Give img_size, the height and width"),
        (0, None, None, "Give img_size"),
        (17, 40, (4, 4), "40 with patch_size 8 is a grid of 5 x 5, but pos_embed has 17 rows and not 25"),
        (17, 33, None, "33 is not a multiple of patch_size 8"),
    ),
)
def test_unknown_grids(rows: int, img_size: Any, wanted: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        table_grid(rows, img_size, 8, wanted)


# Patch filters.


@pytest.mark.parametrize(("old", "new"), ((8, 16), (14, 16), (4, 7), (16, 14), (16, 8), (1, 2)))
def test_filters_are_the_least_squares_solution(old: int, new: int, capfd: pytest.CaptureFixture[str]) -> None:
    """The filters of least norm that come nearest to the old tokens on resized images, for every image."""
    filters = noise(4, 2, old, old)
    resize = np.kron(antialiased(old, new), antialiased(old, new))  # (new * new, old * old)
    expected = np.linalg.lstsq(resize.T, filters.double().numpy().reshape(8, -1).T, rcond=None)[0]
    actual = resample_patches(filters, new)
    np.testing.assert_allclose(actual.reshape(8, -1).T, expected, atol=1e-4)
    assert capfd.readouterr() == ("", "")


def test_channels() -> None:
    filters, grey = noise(4, 3, 2, 2), noise(5, 1, 2, 2, seed=1)
    R, G, B = filters.unbind(1)
    token = F.conv2d(grey.expand(-1, 3, -1, -1), filters)
    assert torch.equal(adapt_channels(filters, 1, "repeat")[:, 0], filters.sum(1))
    assert torch.equal(adapt_channels(filters, 4, "repeat"), torch.stack([R, G, B, R], 1) * (3 / 4))
    assert torch.equal(adapt_channels(filters, 2, "repeat"), torch.stack([R, G], 1) * (3 / 2))
    assert torch.equal(adapt_channels(filters, 5, "pad"), torch.stack([R, G, B, 0 * R, 0 * R], 1))
    assert torch.allclose(adapt_channels(filters, 2, "mean"), filters.mean(1, keepdim=True).expand(-1, 2, -1, -1) * 1.5)
    ways = [(1, "repeat"), (6, "repeat"), (1, "mean"), (2, "mean"), (4, "mean"), (7, "mean")]
    for channels, how in ways:
        same = F.conv2d(grey.expand(-1, channels, -1, -1), adapt_channels(filters, channels, how))
        assert torch.allclose(same, token, atol=1e-5), (channels, how)


def test_channel_notes() -> None:
    assert channel_note(3, 1, "repeat") == "3 channels to 1: summed"
    assert channel_note(3, 4, "repeat") == "3 channels to 4: repeated, times 3/4"
    assert channel_note(4, 3, "repeat") == "4 channels to 3: the first ones, times 4/3"
    assert channel_note(3, 4, "mean") == "3 channels to 4: the mean of all, times 3/4"
    assert channel_note(3, 4, "pad") == "3 channels to 4: the further ones zero"


# Relative positions.


@pytest.mark.parametrize(("old", "new"), ((14, 16), (16, 14), (14, 64), (1, 3), (5, 1)))
def test_relative_positions_are_linear(old: int, new: int) -> None:
    table = noise(2 * old - 1, 6)
    expected = interpolation(2 * old - 1, 2 * new - 1, reach=1) @ table.double().numpy()
    actual = resample_relative(table, new)
    assert actual.is_contiguous()
    np.testing.assert_allclose(actual, expected, atol=1e-5)  # torch's coordinates are of float32
    assert (window_of(table), window_of(actual)) == (old, new)


@pytest.mark.parametrize(("old", "new"), ((14, 16), (16, 14), (7, 32)))
def test_relative_positions_are_those_of_detectron2(old: int, new: int) -> None:
    get_rel_pos = pytest.importorskip("detectron2.modeling.backbone.utils").get_rel_pos
    table = noise(2 * old - 1, 8)
    assert torch.equal(get_rel_pos(new, new, resample_relative(table, new)), get_rel_pos(new, new, table))


# Errors of single tensors.


@pytest.mark.parametrize(
    ("call", "message"),
    (
        (lambda: resample_positions(noise(1, 16, 4), (4, 4), (5, 5)), "(1, 16, 4) is not for a grid of 4 x 4"),
        (lambda: resample_positions(noise(17, 4), (4, 4), (5, 5)), "(1, 17, width)"),
        (lambda: fit_positions(noise(1, 18, 4), (4, 4), (5, 5), fixed=True), "(1, 18, 4) is not for a grid of 4 x 4"),
        (
            lambda: resample_patches(noise(4, 3, 8, 6), 8),
            "the shape is (4, 3, 8, 6). It must be (width, channels, p, p)",
        ),
        (lambda: resample_patches(noise(4, 192), 8), "the shape is (4, 192)"),
        (lambda: adapt_channels(noise(4, 192), 4), "the shape is (4, 192)"),
        (lambda: adapt_channels(noise(4, 3, 2, 2), 2, "pad"), "pad cannot reduce 3 channels to 2"),
        (lambda: adapt_channels(noise(4, 3, 2, 2), 2, "max"), "unknown method 'max'. Use one of repeat, mean, pad"),
        (
            lambda: resample_relative(noise(26, 4), 16),
            "the shape is (26, 4). It must be (2 * window - 1, width of a head)",
        ),
        (lambda: window_of(noise(27)), "the shape is (27,)"),
        (lambda: window_of(noise(27, 0)), "the shape is (27, 0)"),
        (lambda: fit_positions(noise(1), (4, 4), (5, 5), fixed=True), "(1,) is not for a grid of 4 x 4"),
        (lambda: resample_positions(noise(1, 17, 0), (4, 4), (5, 5)), "(1, 17, 0) is not for a grid of 4 x 4"),
    ),
)
def test_errors_say_what_was_expected(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        call()


# A whole encoder.


@pytest.mark.parametrize("wanted", ({}, {"img_size": 32}, {"img_size": [32, 32], "patch_size": 8, "in_chans": 3}))
def test_an_encoder_that_fits_is_not_touched(wanted: dict[str, Any]) -> None:
    for tensors in (encoder()[0], pretraining()):
        arguments = encoder_arguments(tensors)
        fitted = fit(tensors, arguments, wanted, fixed=True)
        assert changed(tensors, fitted.tensors) == set()
        assert (fitted.notes, fitted.arguments) == ({}, arguments)


@pytest.mark.parametrize(
    ("wanted", "img_size", "grid"),
    (
        ({"img_size": 64}, 64, (8, 8)),
        ({"img_size": (16, 48)}, (16, 48), (2, 6)),
        ({"patch_size": 16}, 64, (4, 4)),  # the grid stays
        ({"patch_size": 16, "img_size": 64}, 64, (4, 4)),
        ({"patch_size": 16, "img_size": 32, "in_chans": 1}, 32, (2, 2)),
        ({"in_chans": 5}, 32, (4, 4)),
    ),
)
def test_an_encoder_for_other_sizes(wanted: dict[str, Any], img_size: Any, grid: tuple[int, int]) -> None:
    tensors, arguments = encoder()
    fitted = fit(tensors, arguments, wanted)
    assert fitted.arguments == arguments | wanted | {"img_size": img_size}
    filters = {"patch_embed.proj.weight"} if {"patch_size", "in_chans"} & wanted.keys() else set()
    assert (
        changed(tensors, fitted.tensors)
        == fitted.notes.keys()
        == filters | ({"pos_embed"} if grid != (4, 4) else set())
    )
    assert torch.equal(fitted.tensors["pos_embed"], resample_positions(tensors["pos_embed"], (4, 4), grid))
    shapes = CrossMAE(**SIZES | DECODER | fitted.arguments).state_dict()
    assert all(tensor.shape == shapes[name].shape for name, tensor in fitted.tensors.items())


def test_notes_name_every_step() -> None:
    tensors, arguments = encoder()
    fitted = fit(tensors, arguments, {"patch_size": 16, "in_chans": 4, "img_size": (32, 64)}, channels="pad")
    assert fitted.notes == {
        "patch_embed.proj.weight": "resampled 8 x 8 to 16 x 16 pixels, 3 channels to 4: the further ones zero",
        "pos_embed": "resampled 4 x 4 to 2 x 4",
    }
    filters = adapt_channels(resample_patches(tensors["patch_embed.proj.weight"], 16), 4, "pad")
    assert torch.equal(fitted.tensors["patch_embed.proj.weight"], filters)
    assert fit(tensors, arguments, {"in_chans": 1}).notes == {"patch_embed.proj.weight": "3 channels to 1: summed"}


def test_a_pretraining_model_for_another_image_size() -> None:
    tensors = pretraining()
    fitted = fit(tensors, encoder_arguments(tensors), {"img_size": (48, 32)}, fixed=True)
    expected = pretraining(img_size=(48, 32))
    note = "sine-cosine positions made again, 4 x 4 to 6 x 4"
    assert fitted.notes == {"pos_embed": note, "decoder_pos_embed": note}
    for name in fitted.notes:
        assert torch.equal(fitted.tensors[name], expected[name])
    assert changed(tensors, fitted.tensors) == fitted.notes.keys()


@pytest.mark.parametrize("wanted", ({"patch_size": 16}, {"in_chans": 4}, {"patch_size": 16, "in_chans": 4}))
def test_a_decoder_keeps_its_pixels(wanted: dict[str, int]) -> None:
    tensors = pretraining()
    with pytest.raises(UserError, match=f"{' and '.join(wanted)}: cannot change for a model with a decoder"):
        fit(tensors, encoder_arguments(tensors), wanted)


def test_windows_change_and_global_attention_stays() -> None:
    tensors, arguments = encoder()
    for index, rows in enumerate((27, 127, 27)):
        tensors |= {f"blocks.{index}.attn.rel_pos_{axis}": noise(rows, 8, seed=index) for axis in "hw"}
    fitted = fit(tensors, arguments, {"window": 16})
    windows = {f"blocks.{index}.attn.rel_pos_{axis}" for index in (0, 2) for axis in "hw"}
    assert changed(tensors, fitted.tensors) == fitted.notes.keys() == windows
    assert set(fitted.notes.values()) == {"resampled, window 14 to 16"}
    for name in windows:
        assert torch.equal(fitted.tensors[name], resample_relative(tensors[name], 16))
    assert fitted.arguments == arguments
    same = fit(tensors, arguments, {"window": 14})
    assert (changed(tensors, same.tensors), same.notes) == (set(), {})


def test_second_table_of_a_detector() -> None:
    tensors, arguments = encoder()
    tensors["pos_embed_global"] = noise(1, 16, 24)
    fitted = fit(tensors, arguments, {"img_size": 48})
    expected = resample_positions(tensors["pos_embed_global"], (4, 4), (6, 6), class_rows=0)
    assert torch.equal(fitted.tensors["pos_embed_global"], expected)


@pytest.mark.parametrize(
    ("wanted", "message"),
    (
        ({"img_size": 30}, "the nearest valid sizes are 24 and 32"),
        ({"img_size": 32, "patch_size": 14}, "img_size 32 is not a multiple of patch_size 14"),
        ({"patch_size": 0}, "patch_size: 0 is too small. It must be at least 1"),
        ({"in_chans": 0}, "in_chans: 0 is too small"),
        ({"window": 0}, "window: 0 is too small"),
        ({"window": 7}, "window: has no effect without relative positions"),
    ),
)
def test_sizes_that_do_not_go(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit(*encoder(), wanted)


def test_a_grid_that_nothing_tells_matters_only_for_the_table() -> None:
    tensors, _ = encoder(img_size=(24, 32))
    arguments = encoder_arguments(tensors)
    assert "img_size" not in arguments
    assert "img_size" not in fit(tensors, arguments, {"patch_size": 16, "in_chans": 1}).arguments
    assert changed(tensors, fit(tensors, arguments, {"img_size": (24, 32)}).tensors) == set()
    with pytest.raises(UserError, match="pos_embed: 13 rows are not a square"):
        fit(tensors, arguments, {"img_size": 32})


def test_shapes_are_known_without_values() -> None:
    tensors, arguments = encoder()
    meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    wanted = {"img_size": 64, "patch_size": 16, "in_chans": 4}
    real, planned = fit(tensors, arguments, wanted, fixed=True), fit(meta, arguments, wanted, fixed=True)
    assert {name: tensor.shape for name, tensor in planned.tensors.items()} == {
        name: tensor.shape for name, tensor in real.tensors.items()
    }
    assert (planned.notes, planned.arguments) == (real.notes, real.arguments)
    assert not is_sincos(sincos_pos_embed(8, (2, 2)).to("meta"), (2, 2))
