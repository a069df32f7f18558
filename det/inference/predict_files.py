"""Predictions for image and video files, as pictures and one COCO file in a folder.

    OUTPUT/NAME.png            an image and its objects; NAME is the image's path relative to the common folder
    OUTPUT/NAME.mp4            a video with its objects
    OUTPUT/labels/             the same as label files of another tool, if requested
    OUTPUT/predictions.json    all predictions as COCO annotations; written last: if it exists, it is complete

Files are read in batches, so that memory stays bounded.
"""

from __future__ import annotations

import errno
import glob
import json
import logging
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import partial
from importlib.util import find_spec
from itertools import chain, count, islice
from pathlib import Path, PurePosixPath
from typing import Any, Generic, TextIO, TypeVar

import numpy as np
from detectron2.structures import Instances
from numpy.typing import NDArray
from PIL import Image

from crossmae.data.images import count_frames
from crossmae.data.parallel import Progress
from crossmae.data.paths import IMAGE_SUFFIXES, VIDEO_SUFFIXES, find_inputs
from crossmae.data.sources.source import evenly_spaced
from crossmae.errors import UserError, printable
from crossmae.files import JsonArray, WriteError, make_folder, name_write_errors, stream_text, write_atomically
from crossmae.files.leftovers import SHARED_SECONDS, sweep
from crossmae.reports.figures import PNG_LEVEL
from det.inference.arguments import COCO_FILE
from det.inference.draw import draw_large, instances_from_coco
from det.inference.label_files import LABEL_FOLDER, LabelWriter
from det.inference.ordered_threads import encode_in_order
from det.inference.predict import Classes, Predictor, coco_annotations, read_rgb
from det.inference.video import Frame, Video, is_video, pyav, write_video

LOOKED_AGAIN = 16  # files, for the highest score below the threshold
BROKEN_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)  # no other file can be written, either
MAX_FILE_NAME = 255  # bytes, in usual file systems
Item = TypeVar("Item")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MediaInput:
    """One file to predict: its path, its name in the common folder, and the name of its output file."""

    path: Path
    name: str
    target: str


def find_media(arguments: Sequence[str]) -> tuple[Path, list[MediaInput]]:
    """Find the named files, and their common folder.

    A folder stands for the images in it and its subfolders, and for the videos if PyAV is installed.
    """
    arguments = [_expand_home(argument) for argument in arguments]
    suffixes = IMAGE_SUFFIXES | (VIDEO_SUFFIXES if find_spec("av") else frozenset())
    paths = list(dict.fromkeys(Path(os.path.abspath(path)) for path in find_inputs(arguments, suffixes)))
    if any(is_video(path) for path in paths):
        pyav()
    first = Path(arguments[0]).absolute()
    root = first if len(arguments) == 1 and first.is_dir() else Path(os.path.commonpath([p.parent for p in paths]))
    names = [Path(os.path.relpath(path, root)).as_posix() for path in paths]
    return root, [MediaInput(*parts) for parts in zip(paths, names, output_names(names), strict=True)]


def _expand_home(argument: str) -> str:
    expanded = argument if os.path.lexists(argument) else os.path.expanduser(argument)
    return os.path.abspath(expanded) if expanded.startswith("~") else expanded


def output_names(names: Sequence[str]) -> list[str]:
    """Name the drawn files.

    The suffix is replaced. If the name is taken, the new suffix is appended, and then a number.
    """
    targets: list[str] = []
    taken = {str(folder).casefold() for name in names for folder in PurePosixPath(name).parents}
    for name in names:
        suffix, stem = ".mp4" if is_video(name) else ".png", PurePosixPath(name).with_suffix("")
        numbered = (f"{stem}-{number}{suffix}" for number in count(2))
        candidates = chain([f"{stem}{suffix}", f"{name}{suffix}"], numbered)
        targets.append(next(target for target in candidates if target.casefold() not in taken))
        taken.add(targets[-1].casefold())  # some file systems ignore case
    return targets


def check_output(
    output: Path, inputs: Sequence[MediaInput], arguments: Sequence[str], force: bool, labels: Sequence[Path] = ()
) -> None:
    """Reject an unwritable output folder, or one with files to overwrite.

    An input is never overwritten. The output folder must not be searched for inputs. `labels` are further files to
    write.
    """
    planned = [output / COCO_FILE, *(output / one.target for one in inputs), *labels]
    for argument in map(_expand_home, arguments):
        if _searches(argument, output, planned):
            raise UserError(
                f"--output: {output} is in {argument}, so the next call would read it. Name another folder."
            )
    sources = {one.path.resolve() for one in inputs}
    folders = {folder for path in planned for folder in path.parents}
    for path in planned:
        fault = "it is also the folder of other files" if path in folders else _fault(path)
        if fault:
            raise UserError(f"--output: {path} cannot be written: {fault}. Name another folder.")
        if path.resolve() in sources:
            raise UserError(f"--output: {path} is an image to predict and would be overwritten. Name another folder.")
    existing = [path for path in planned if path.exists()]
    if existing and not force:
        raise UserError(f"--output: {existing[0]} exists already. Name another folder, or overwrite with --force.")


def _searches(argument: str, output: Path, planned: Sequence[Path]) -> bool:
    """Check whether the same argument would find the output next time."""
    if os.path.exists(argument):
        return Path(argument).is_dir() and output.resolve().is_relative_to(Path(argument).resolve())
    wanted = Path(os.path.normpath(os.path.join(glob.escape(os.getcwd()), argument))).parts
    paths = [Path(os.path.abspath(path)).parts for path in planned]
    if "**" in wanted:
        wanted = wanted[: wanted.index("**")]
        paths = [parts[: len(wanted)] for parts in paths]
    return any(len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted)) for parts in paths)


def _fault(path: Path) -> str | None:
    """Find out why a file cannot be written, without writing it."""
    if len(os.fsencode(path.name)) > MAX_FILE_NAME:
        return os.strerror(errno.ENAMETOOLONG)
    try:
        return os.strerror(errno.EISDIR) if stat.S_ISDIR(path.stat().st_mode) else None
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.strerror


@dataclass(frozen=True)
class _Detected(Generic[Item]):
    item: Item
    entry: dict[str, Any]
    pixels: NDArray[np.uint8]
    instances: Instances
    number: int


@dataclass
class FilePredictions:
    """Prediction of files. Counts images (including video frames) and objects, and keeps a line per failure.

    `threads` threads encode masks while the device predicts the next images.
    """

    predictor: Predictor
    classes: Classes
    output: Path
    batch_size: int = 8
    draw: bool = True
    threads: int = 0
    labels: LabelWriter | None = None
    images: int = 0
    objects: int = 0
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # height and width of the inputs by name
    failures: list[str] = field(default_factory=list)

    def write(self, inputs: Sequence[MediaInput], info: dict[str, Any]) -> None:
        """Remove an older predictions.json, predict all files, write the results."""
        make_folder(self.output, "--output")
        sweep(self.output, min_age=SHARED_SECONDS)
        (self.output / COCO_FILE).unlink(missing_ok=True)
        if self.labels:
            self.labels.start(self.output / LABEL_FOLDER)

        def write(file: TextIO) -> None:
            coco = CocoStream(file, self.classes)
            self._predict_images([one for one in inputs if not is_video(one.name)], coco)
            for video in (one for one in inputs if is_video(one.name)):
                self._predict_video(video, coco)
            coco.finish(info)

        stream_text(self.output / COCO_FILE, write)

    def highest_score(self, inputs: Sequence[MediaInput]) -> tuple[float, int]:
        """Find the highest score in some of the files, and count these.

        At most LOOKED_AGAIN files are looked at, and the first frame of videos. Unreadable files are left out.
        """
        highest, number = 0.0, 0
        for index in evenly_spaced(len(inputs), LOOKED_AGAIN):
            path = inputs[index].path
            with suppress(UserError):
                pixels = next(iter(Video(path))).pixels if is_video(path) else read_rgb(path, self.predictor.limits)
                highest, number = max(highest, self.predictor.highest_score([pixels])), number + 1
        return highest, number

    def _predict_images(self, inputs: Sequence[MediaInput], coco: CocoStream) -> None:
        bar = Progress(inputs, "predict", unit="image", shown=bool(inputs))
        for path, drawn in self._predict(self._read_images(bar), coco):
            if self.draw:
                save = partial(Image.fromarray(drawn).save, format="png", compress_level=PNG_LEVEL)
                self._save(path, partial(write_atomically, path, save))

    def _read_images(self, inputs: Iterable[MediaInput]) -> Iterator[tuple[Path, dict[str, Any], NDArray[np.uint8]]]:
        for one in inputs:
            try:
                yield self.output / one.target, {"file_name": one.name}, read_rgb(one.path, self.predictor.limits)
                if (frames := count_frames(one.path)) > 1:
                    log.warning("%s has %d frames, of which the first is predicted", printable(one.path), frames)
            except UserError as error:
                self.failures.append(str(error))

    def _predict_video(self, one: MediaInput, coco: CocoStream) -> None:
        try:
            video = Video(one.path)
        except UserError as error:
            self.failures.append(str(error))
            return
        frames = (Frame(drawn, time) for time, drawn in self._predict(self._read_video(video, one.name), coco))
        if self.draw:
            path = self.output / one.target
            self._save(path, lambda: write_video(path, frames, video.rate))
        deque(frames, maxlen=0)  # count the frames, even if they are not drawn or written

    def _read_video(self, video: Video, name: str) -> Iterator[tuple[Fraction, dict[str, Any], NDArray[np.uint8]]]:
        """Yield time, entry and pixels of frames until the video is damaged."""
        bar = Progress(video, printable(name), video.frames, unit="frame")
        try:
            for number, frame in enumerate(bar):
                entry = {"file_name": name, "frame": number, "time": round(float(frame.time), 6)}
                if video.pixel_aspect != 1:
                    entry["pixel_aspect"] = round(float(video.pixel_aspect), 6)
                yield frame.time, entry, frame.pixels
        except UserError as error:
            self.failures.append(str(error))

    def _predict(
        self, images: Iterable[tuple[Item, dict[str, Any], NDArray[np.uint8]]], coco: CocoStream
    ) -> Iterator[tuple[Item, NDArray[np.uint8]]]:
        """Predict batches of (item, entry, pixels). Yield items with drawn pixels."""
        names, detected = self.classes.by_id(), self._detect(images, len(coco.images))
        annotated = encode_in_order(self._annotate, detected, self.threads, lambda one: one.entry["file_name"])
        for one, found in annotated:
            coco.add(one.entry, found)
            if self.labels and "frame" not in one.entry:
                self._save(self.labels.paths[one.entry["file_name"]], partial(self.labels.write, one.entry, found))
            self.images += 1
            self.objects += len(found)
            pixels = one.pixels
            if self.draw:
                pixels = draw_large(pixels, instances_from_coco(found, names))
            yield one.item, pixels

    def _detect(
        self, images: Iterable[tuple[Item, dict[str, Any], NDArray[np.uint8]]], first: int
    ) -> Iterator[_Detected[Item]]:
        """Detect objects in batches. `first` images were numbered before."""
        queue, numbers = iter(images), count(first + 1)
        while batch := list(islice(queue, self.batch_size)):
            found = self.predictor.predict_raw([pixels for _, _, pixels in batch])
            for (item, entry, pixels), instances in zip(batch, found, strict=True):
                sizes = {"width": pixels.shape[1], "height": pixels.shape[0]}
                self.sizes[entry["file_name"]] = pixels.shape[0], pixels.shape[1]
                yield _Detected(item, {**entry, **sizes}, pixels, instances, next(numbers))

    def _annotate(self, one: _Detected[Item]) -> tuple[_Detected[Item], list[dict[str, Any]]]:
        size = one.entry["height"], one.entry["width"]
        return one, coco_annotations(one.instances, one.number, *size, self.classes)

    def _save(self, path: Path, write: Callable[[], object]) -> None:
        """Write a file. Note a failure, unless no file can be written."""
        try:
            with name_write_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write()
        except WriteError as error:
            if error.errno in BROKEN_DISK:
                raise
            self.failures.append(str(error))


class CocoStream:
    """A COCO file that is written during prediction: first annotations, then images and categories."""

    def __init__(self, file: TextIO, classes: Classes) -> None:
        file.write('{"annotations": ')
        self.file, self.classes, self.annotations = file, classes, JsonArray(file)
        self.images: list[dict[str, Any]] = []

    def add(self, image: dict[str, Any], annotations: Sequence[Mapping[str, Any]]) -> None:
        """Write the annotations of the next image."""
        self.images.append({"id": len(self.images) + 1, **image})
        for annotation in annotations:
            self.annotations.add({"id": self.annotations.count + 1, **annotation})

    def finish(self, info: dict[str, Any]) -> None:
        self.annotations.close()
        categories = [{"id": number, "name": name} for number, name in self.classes.by_id().items()]
        rest = {"images": self.images, "categories": categories, "info": info}
        self.file.write(", " + json.dumps(rest, ensure_ascii=False, allow_nan=False)[1:] + "\n")
