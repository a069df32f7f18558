"""Predictions for files of images and videos, as pictures and as one COCO file in one folder.

    OUTPUT/NAME.png            an image and its objects; NAME is the image's, with the folders under the common one
    OUTPUT/NAME.mp4            a video and its objects
    OUTPUT/predictions.json    all of them, as COCO annotations; written last, so that its presence says: complete

Files are read a batch at a time, so that there may be any number. One that can not be read is left out and reported; a
picture or video that can not be written is reported, too.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain, count, islice
from pathlib import Path, PurePosixPath
from typing import Any, TextIO, TypeVar

import numpy as np
from detectron2.structures import Instances
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from crossmae.data.paths import find_inputs
from crossmae.errors import DISK_TROUBLE, UserError
from crossmae.files import ODD_BYTES, make_folder, printable, write_atomically
from det.inference.draw import draw_instances, instances_from_coco
from det.inference.predict import Classes, Predictor, coco_annotations, read_rgb
from det.inference.video import Frame, Video, is_video, pyav, write_video

PREDICTIONS = "predictions.json"
SMALL = 512  # pixels: images whose sides are all shorter are drawn enlarged, by a whole number
LETTERS = 0.03  # of labels, over the longest side
LONGEST_NAME = 255  # bytes, of usual file systems
Item = TypeVar("Item")


@dataclass(frozen=True)
class Source:
    """One file to predict.

    Attributes:
        path: of the file.
        name: relative to the folder that all files have in common, with slashes.
        target: what its picture or video is called, relative to the output folder.
    """

    path: Path
    name: str
    target: str


def find_sources(arguments: Sequence[str]) -> tuple[Path, list[Source]]:
    """The files that arguments mean, and the folder that they have in common.

    Args:
        arguments: files, folders (their images, those of subfolders too, but not their videos) and patterns.

    Raises:
        UserError: an argument that leads to no file; or a video, and PyAV is not installed.
    """
    arguments = [_expanded(argument) for argument in arguments]
    paths = list(dict.fromkeys(Path(os.path.abspath(path)) for path in find_inputs(arguments)))
    if any(is_video(path) for path in paths):
        pyav()
    alone = Path(arguments[0]).absolute()
    root = alone if len(arguments) == 1 and alone.is_dir() else Path(os.path.commonpath([p.parent for p in paths]))
    names = [Path(os.path.relpath(path, root)).as_posix() for path in paths]
    return root, [Source(*parts) for parts in zip(paths, names, output_names(names), strict=True)]


def _expanded(argument: str) -> str:
    """With a home folder for `~`; what has such a name of its own, as `~photo.jpg` has, gets its folder before it."""
    expanded = argument if os.path.lexists(argument) else os.path.expanduser(argument)
    return os.path.abspath(expanded) if expanded.startswith("~") else expanded


def output_names(names: Sequence[str]) -> list[str]:
    """What to call the drawn files: .png or .mp4 for the old suffix, where that is taken behind it, else numbered."""
    targets: list[str] = []
    taken = {str(folder).casefold() for name in names for folder in PurePosixPath(name).parents}
    for name in names:
        suffix, stem = ".mp4" if is_video(name) else ".png", PurePosixPath(name).with_suffix("")
        numbered = (f"{stem}-{number}{suffix}" for number in count(2))
        candidates = chain([f"{stem}{suffix}", f"{name}{suffix}"], numbered)
        targets.append(next(target for target in candidates if target.casefold() not in taken))
        taken.add(targets[-1].casefold())  # some file systems do not tell cases apart
    return targets


def check_output(output: Path, sources: Sequence[Source], arguments: Sequence[str], force: bool) -> None:
    """Make sure that all can be written, and nothing is overwritten but, with `force`, what an earlier call wrote.

    Raises:
        UserError: the output folder is where images to predict are searched, a picture would replace such an image, a
            name can not be written, or something is there already.
    """
    planned = [output / PREDICTIONS, *(output / source.target for source in sources)]
    for argument in map(_expanded, arguments):
        if _searches(argument, output, planned):
            raise UserError(f"--output: {output} is in {argument}: the next call would take its pictures for input")
    inputs = {source.path.resolve() for source in sources}
    folders = {folder for path in planned for folder in path.parents}
    for path in planned:
        fault = "is the folder of others, too" if path in folders else _fault(path)
        if fault:
            raise UserError(f"--output: {path} can not be written: {fault}; name another folder")
        if path.resolve() in inputs:
            raise UserError(f"--output: {path} is an image to predict, and would be overwritten; name another folder")
    there = [path for path in planned if path.exists()]
    if there and not force:
        raise UserError(f"--output: {there[0]} exists already; name another folder, or overwrite with --force")


def _searches(argument: str, output: Path, planned: Sequence[Path]) -> bool:
    """Whether an argument is a folder around `output`, or a pattern that matches planned files, up to its `**`."""
    if os.path.exists(argument):
        return Path(argument).is_dir() and output.resolve().is_relative_to(Path(argument).resolve())
    wanted = Path(os.path.normpath(os.path.join(glob.escape(os.getcwd()), argument))).parts
    paths = [Path(os.path.abspath(path)).parts for path in planned]
    if "**" in wanted:
        wanted = wanted[: wanted.index("**")]
        paths = [parts[: len(wanted)] for parts in paths]
    return any(len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted)) for parts in paths)


def _fault(path: Path) -> str | None:
    """Why a file can not be written, as far as that can be seen."""
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        return os.strerror(errno.ENAMETOOLONG)
    try:
        return os.strerror(errno.EISDIR) if stat.S_ISDIR(path.stat().st_mode) else None
    except FileNotFoundError:
        return None
    except OSError as error:
        return error.strerror


@dataclass
class FilePredictions:
    """Predicts files, and counts what it finds.

    Attributes:
        predictor: the detector.
        classes: of the detector.
        output: folder to write.
        batch_size: images that are computed together.
        draw: whether to write pictures and videos, too.
        images, objects: how many images and frames were predicted, and objects found.
        failures: one line for each file that could not be read, or not to its end, or not be written.
    """

    predictor: Predictor
    classes: Classes
    output: Path
    batch_size: int = 8
    draw: bool = True
    images: int = 0
    objects: int = 0
    failures: list[str] = field(default_factory=list)

    def write(self, sources: Sequence[Source], info: dict[str, Any]) -> None:
        """Predict all files and write everything, see the head of this module; removes an older predictions.json first.

        Args:
            sources: from `find_sources`.
            info: kept in predictions.json.

        Raises:
            UserError: the folder can not be written in.
            OSError: the disk is full or broken.
        """
        make_folder(self.output, "--output")
        (self.output / PREDICTIONS).unlink(missing_ok=True)
        videos = [source for source in sources if is_video(source.name)]
        pictures = [source for source in sources if not is_video(source.name)]

        def write(temporary: Path) -> None:
            with open(temporary, "w", encoding="utf-8", errors=ODD_BYTES) as file:
                coco = CocoStream(file, self.classes)
                self._predict_images(pictures, coco)
                for video in videos:
                    self._predict_video(video, coco)
                coco.finish(info)

        write_atomically(self.output / PREDICTIONS, write)

    def _predict_images(self, sources: Sequence[Source], coco: CocoStream) -> None:
        with tqdm(total=len(sources), desc="predict", unit="img", disable=not sources, dynamic_ncols=True) as bar:
            for batch in batches(sources, self.batch_size):
                read = ((source, self._read(source)) for source in batch)
                readable = [(source, pixels) for source, pixels in read if pixels is not None]
                found = self.predictor.predict_raw([pixels for _, pixels in readable])
                for (source, pixels), instances in zip(readable, found, strict=True):
                    annotations = self._add(coco, {"file_name": source.name}, pixels, instances)
                    if self.draw:
                        self._save_picture(self.output / source.target, self._drawn(pixels, annotations))
                bar.update(len(batch))

    def _read(self, source: Source) -> NDArray[np.uint8] | None:
        """The image (H, W, 3), or None if it can not be read, which is noted."""
        try:
            return read_rgb(source.path)
        except UserError as error:
            self.failures.append(str(error))
            return None

    def _predict_video(self, source: Source, coco: CocoStream) -> None:
        try:
            video = Video(source.path)
        except UserError as error:
            self.failures.append(str(error))
            return
        with tqdm(total=video.frames, desc=printable(source.name), unit="frame", dynamic_ncols=True) as bar:
            frames = self._predict_frames(video, source, coco, bar)
            if self.draw:
                target = self.output / source.target
                self._write(target, lambda: write_video(target, frames, video.rate))
            deque(frames, maxlen=0)  # those that are not drawn, or not written, count all the same

    def _predict_frames(self, video: Video, source: Source, coco: CocoStream, bar: tqdm[Any]) -> Iterator[Frame]:
        """The frames of a video with what is found in them, drawn."""
        for batch in batches(enumerate(self._until_failure(video)), self.batch_size):
            found = self.predictor.predict_raw([frame.pixels for _, frame in batch])
            for (number, frame), instances in zip(batch, found, strict=True):
                entry = {"file_name": source.name, "frame": number, "time": round(float(frame.time), 6)}
                annotations = self._add(coco, entry, frame.pixels, instances)
                yield Frame(self._drawn(frame.pixels, annotations) if self.draw else frame.pixels, frame.time)
                bar.update()

    def _until_failure(self, video: Video) -> Iterator[Frame]:
        """The frames of a video, those before the damage if there is one, which is noted."""
        try:
            yield from video
        except UserError as error:
            self.failures.append(str(error))

    def _add(
        self, coco: CocoStream, entry: dict[str, Any], pixels: NDArray[np.uint8], instances: Instances
    ) -> list[dict[str, Any]]:
        annotations = coco.add({**entry, "width": pixels.shape[1], "height": pixels.shape[0]}, instances)
        self.images += 1
        self.objects += len(annotations)
        return annotations

    def _drawn(self, pixels: NDArray[np.uint8], annotations: Sequence[dict[str, Any]]) -> NDArray[np.uint8]:
        side = max(pixels.shape[:2])
        names = dict(zip(self.classes.category_ids, self.classes.names, strict=True))
        drawn = instances_from_coco(annotations, names, *pixels.shape[:2], decode=False)
        return draw_instances(pixels, drawn, longest_side=side * -(-SMALL // side), letters=LETTERS)

    def _save_picture(self, path: Path, pixels: NDArray[np.uint8]) -> None:
        self._write(path, lambda: write_atomically(path, partial(Image.fromarray(pixels).save, format="png")))

    def _write(self, path: Path, write: Callable[[], object]) -> None:
        """Note it if a file can not be written; but a full or broken disk, which no other file gets past, is raised."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write()
        except OSError as error:
            if error.errno in DISK_TROUBLE and error.errno != errno.EACCES:
                raise
            self.failures.append(f"{printable(path)}: can not be written: {error.strerror or error}")


class CocoStream:
    """A COCO file that is written while it is made: annotations as they come, then images and categories.

    Args:
        file: to write to.
        classes: of the detector.
    """

    def __init__(self, file: TextIO, classes: Classes) -> None:
        self.file, self.classes = file, classes
        self.images: list[dict[str, Any]] = []
        self.annotations = 0
        file.write('{"annotations": [')

    def add(self, image: dict[str, Any], instances: Instances) -> list[dict[str, Any]]:
        """Write what was found in one image; returns it.

        Args:
            image: its entry, without the id.
            instances: from `Predictor.predict_raw`.
        """
        self.images.append({"id": len(self.images) + 1, **image})
        annotations = coco_annotations(instances, len(self.images), image["height"], image["width"], self.classes)
        for annotation in annotations:
            self.annotations += 1
            self.file.write(",\n" if self.annotations > 1 else "\n")
            json.dump({"id": self.annotations, **annotation}, self.file, allow_nan=False)
        return annotations

    def finish(self, info: dict[str, Any]) -> None:
        """The rest of the file."""
        rest = {"images": self.images, "categories": self.classes.categories(), "info": info}
        self.file.write("\n], " + json.dumps(rest, ensure_ascii=False, allow_nan=False)[1:] + "\n")


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """`items` in lists of `size`; the last may be shorter."""
    queue = iter(items)
    while batch := list(islice(queue, size)):
        yield batch
