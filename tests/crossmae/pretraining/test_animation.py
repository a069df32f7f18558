"""Proves that an animation shows what its frames hold, forth and back, with still parts staying still."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from crossmae.pretraining.gallery import END_MS, FRAME_MS, animation_frame, save_gif
from crossmae.pretraining.reconstruction import Panels


def panels(height: int, width: int, hidden_rows: int) -> Panels:
    torch.manual_seed(0)
    given, predicted = torch.rand(2, 1, 3, height, width).round(decimals=1)
    hidden = torch.zeros(1, 1, height, width, dtype=torch.bool)
    hidden[:, :, :hidden_rows] = True
    return Panels(given, torch.where(hidden, predicted, given), hidden, norm_pix_loss=False)


def test_a_frame_holds_both_panels_pixel_by_pixel() -> None:
    frame = np.asarray(animation_frame(panels(16, 24, 8), 0.5, 12.34))
    enlarged = 10  # 24 pixels to 240
    pasted = (panels(16, 24, 8).pasted[0] * 255).round().byte().permute(1, 2, 0).numpy()
    big = pasted.repeat(enlarged, 0).repeat(enlarged, 1)
    height, width, _ = big.shape
    places = [
        (y, x)
        for y in range(frame.shape[0] - height + 1)
        for x in range(frame.shape[1] - width + 1)
        if (frame[y, x : x + width] == big[0]).all() and (frame[y : y + height, x : x + width] == big).all()
    ]
    assert len(places) == 1
    assert places[0][1] > frame.shape[1] / 2 - 1


@pytest.mark.parametrize(("height", "width"), [(32, 32), (128, 128), (224, 224), (1024, 512), (64, 16), (16, 64)])
def test_frames_are_moderate_and_wide_enough_for_their_text(height: int, width: int) -> None:
    frame = animation_frame(panels(height, width, 8), 0.95, 100.0)
    assert 512 <= frame.width <= 760
    assert frame.height <= 440
    border = np.concatenate([np.asarray(frame)[:, :4].ravel(), np.asarray(frame)[:, -4:].ravel()])
    assert (border == 255).all()


def test_a_gif_plays_forth_and_back(tmp_path: Path) -> None:
    frames = [animation_frame(panels(32, 32, rows), rows / 32, 10.0 + rows) for rows in (8, 16, 24)]
    save_gif(frames, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.info["loop"] == 0
        shown = [(frame.convert("RGB"), frame.info["duration"]) for frame in ImageSequence.Iterator(gif)]
    assert [duration for _, duration in shown] == [END_MS, FRAME_MS, END_MS, FRAME_MS]
    pictures = [np.asarray(picture).astype(int) for picture, _ in shown]
    for picture, index in zip(pictures, (0, 1, 2, 1), strict=True):
        assert np.abs(picture - np.asarray(frames[index])).mean() < 6  # 256 colours
    np.testing.assert_array_equal(pictures[1], pictures[3])
    # Rows that no mask reached are the same in every frame of the right panel.
    right = [picture[230:280, 280:500] for picture in pictures]
    assert all(np.array_equal(right[0], other) for other in right)


def test_one_frame_is_a_gif_as_well(tmp_path: Path) -> None:
    save_gif([animation_frame(panels(32, 32, 8), 0.25, float("inf"))], tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert getattr(gif, "n_frames", 1) == 1
