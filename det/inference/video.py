"""Frames of video files, read upright and one at a time, and written as MP4 that browsers play."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossmae.errors import UserError, import_extra
from crossmae.files import printable, write_atomically

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset({".avi", ".mkv", ".mov", ".mp4", ".webm"})

QUALITY = "18"  # constant rate factor of x264: lines and letters stay sharp
TICKS = 90000  # that a second is written in: a whole number a frame, for all usual rates
BT709 = 1  # number of the standard in H.264
UNKNOWN_RATE = Fraction(25)  # frames per second where a file does not tell


@dataclass(frozen=True)
class Frame:
    """One picture of a video.

    Attributes:
        pixels: (H, W, 3) uint8 RGB, upright.
        time: seconds since the first frame.
    """

    pixels: NDArray[np.uint8]
    time: Fraction


class Video:
    """The first video stream of a file; iterating over it reads it from its beginning.

    Args:
        path: of the file.

    Attributes:
        rate: frames per second, on average.
        frames: how many there should be, by the file's index or its length; None where neither is there.

    Raises:
        UserError: PyAV is not installed, the file can not be read, or has no pictures.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._open() as container:
            stream, seconds = container.streams.video[0], (container.duration or 0) / 1_000_000
            self.rate = Fraction(stream.average_rate or UNKNOWN_RATE)
            self._listed = int(stream.frames)
            self.frames = self._listed or round(seconds * self.rate) or None

    def __iter__(self) -> Iterator[Frame]:
        """All frames, turned as the file says; fewer than it lists are a warning in the log.

        Raises:
            UserError: the file can not be read to its end; the frames before that have been given then.
        """
        number, start = 0, Fraction(0)
        with self._open() as container:
            container.streams.video[0].thread_type = "AUTO"
            try:
                for picture in container.decode(video=0):
                    time = number / self.rate if picture.pts is None else picture.pts * Fraction(picture.time_base)
                    start = start if number else time
                    yield Frame(_upright(picture), time - start)
                    number += 1
            except pyav().FFmpegError as error:
                raise UserError(
                    f"{printable(self.path)}: can not be read after frame {number}: {error.strerror}"
                ) from error
        if not number:
            raise UserError(f"{printable(self.path)}: has no picture that could be read")
        if number < self._listed:  # cut off, or trimmed without writing its pictures again
            log.warning("%s: %d frames could be read, the file lists %d", printable(self.path), number, self._listed)

    def _open(self) -> Any:
        try:
            container = pyav().open(str(self.path))
        except (pyav().FFmpegError, OSError) as error:
            raise UserError(f"{printable(self.path)}: can not be read as a video: {error.strerror}") from error
        if not container.streams.video:
            container.close()
            raise UserError(f"{printable(self.path)}: has no pictures, only {len(container.streams)} other streams")
        return container


def is_video(path: str | Path) -> bool:
    """Whether a file's name says that it is a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def write_video(path: Path, frames: Iterable[Frame], rate: Fraction) -> None:
    """Write H.264 in MP4 (yuv420p, index first), every frame at its time; atomically, and nothing if there is none.

    Args:
        path: ends in .mp4.
        frames: all of one size; a last odd row or column is doubled, because the format has even sides alone.
        rate: frames per second, on average.

    Raises:
        UserError: PyAV is not installed.
        OSError: the file can not be written; what is left of `frames` has not been taken then.
    """
    queue = iter(frames)
    first = next(queue, None)
    if first is not None:
        shape = first.pixels.shape
        try:
            write_atomically(path, lambda temporary: _encode(temporary, chain([first], queue), shape[:2], rate))
        except pyav().FFmpegError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


def _encode(path: Path, frames: Iterable[Frame], size: tuple[int, ...], rate: Fraction) -> None:
    with pyav().open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": QUALITY})
        stream.height, stream.width = (side + side % 2 for side in size)
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.time_base = Fraction(1, TICKS)
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        tick = -1
        for frame in frames:
            tick = max(round(frame.time * TICKS), tick + 1)  # times have to rise
            container.mux(stream.encode(_picture(frame.pixels, tick)))
        container.mux(stream.encode(None))


def _picture(pixels: NDArray[np.uint8], tick: int) -> Any:
    """Pixels (H, W, 3), with an even number of rows and columns, as PyAV encodes them."""
    height, width = pixels.shape[:2]
    even = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    picture = pyav().VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
    picture = picture.reformat(format="yuv420p", dst_colorspace="itu709")
    picture.pts, picture.time_base = tick, Fraction(1, TICKS)
    return picture


def _upright(picture: Any) -> NDArray[np.uint8]:
    """(H, W, 3) RGB. Telephones store what their sensor saw, and by how much to turn it, counter-clockwise."""
    return np.ascontiguousarray(np.rot90(picture.to_ndarray(format="rgb24"), round(picture.rotation / 90)))


def pyav() -> Any:
    """The library that reads and writes videos.

    Raises:
        UserError: it is not installed.
    """
    return import_extra("av", "reading and writing videos", extra="video")
