"""Classes of any images, for programs as objects and for files as JSON or CSV.

    OUTPUT.json    {"about": {...}, "images": [{"name": ..., "classes": [{"class", "name", "probability"}, ...]}, ...],
                   "unreadable": [...]}
    OUTPUT.csv     a row per image. One class per image: name,top1,score1,top2,score2,...; several: name and a column
                   per class, with its probability where that reaches the threshold

Images are read in threads while the model computes, and written as they come, so that there may be any number.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from crossmae.classification.classifier import Classifier
from crossmae.classification.evaluation.metrics import LABEL_THRESHOLD
from crossmae.data.parallel import READERS, map_in_order
from crossmae.data.paths import match_pattern
from crossmae.data.pixels import Normalize, centre_view, read_pixels
from crossmae.data.sources import LISTS, Source, open_source
from crossmae.data.sources.idx import IDX_SUFFIXES
from crossmae.data.sources.shard_files import is_url
from crossmae.data.sources.source import ImageFiles
from crossmae.data.sources.tar_shards import SHARD_SUFFIXES
from crossmae.errors import UserError
from crossmae.files import ODD_BYTES, make_folder, sha256, write_atomically

STDOUT = "-"
TOP_K, BATCH_SIZE = 5, 32


@dataclass(frozen=True)
class Answer:
    """What a classifier takes an image for.

    Attributes:
        name: of the image, as its source calls it: the path, for a file.
        classes: positions in `Classifier.classes`, most probable first.
        probabilities: one for each: softmax, or sigmoid where an image can have several classes.
    """

    name: str
    classes: tuple[int, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Selection:
    """Which classes an answer has: the best `top_k`; of a multi-label classifier, those from `threshold`."""

    top_k: int = TOP_K
    threshold: float = LABEL_THRESHOLD


def predict_images(
    classifier: Classifier,
    paths: Sequence[str | Path],
    top_k: int = TOP_K,
    threshold: float = LABEL_THRESHOLD,
    batch_size: int = BATCH_SIZE,
) -> list[Answer]:
    """The classes of image files, in their order.

    Args:
        classifier: from `load_classifier`; computes on the device where its model is.
        paths: of image files.
        top_k: classes per image, at most; not for multi-label classifiers.
        threshold: smallest probability of a class, for multi-label classifiers alone.
        batch_size: images that are computed together.

    Raises:
        UserError: an image that can not be read, or probabilities that are not finite; names it.
    """
    found = []
    for answer in predict(classifier, [ImageFiles(list(map(str, paths)), "")], Selection(top_k, threshold), batch_size):
        if isinstance(answer, UserError):
            raise answer
        found.append(answer)
    return found


def predict(
    classifier: Classifier, sources: Sequence[Source], selection: Selection, batch_size: int = BATCH_SIZE
) -> Iterator[Answer | UserError]:
    """An answer for every image in turn, or, of one that can not be read, the reason.

    Raises:
        UserError: probabilities that are not finite; names the image.
    """
    normalize = Normalize(classifier.mean, classifier.std, next(classifier.model.parameters()).device)
    samples = ((source, index) for source in sources for index in range(len(source)))
    views = map_in_order(partial(_read_view, classifier), samples, READERS)
    while batch := list(islice(views, batch_size)):
        readable = [view for view in batch if not isinstance(view, UserError)]
        answers = iter(_answer_batch(classifier, normalize, readable, selection))
        for view in batch:
            yield view if isinstance(view, UserError) else next(answers)


def _read_view(classifier: Classifier, sample: tuple[Source, int]) -> tuple[str, Tensor] | UserError:
    """Name and pixels (C, H, W) of a sample as evaluation sees it."""
    source, index = sample
    try:
        pixels = read_pixels(source, index, classifier.architecture.in_chans, classifier.bit_depth)
    except UserError as error:
        return error
    return source.name(index), centre_view(pixels, classifier.architecture.img_size, classifier.crop_pct)


@torch.inference_mode()
def _answer_batch(
    classifier: Classifier, normalize: Normalize, views: Sequence[tuple[str, Tensor]], selection: Selection
) -> list[Answer]:
    if not views:
        return []
    images = torch.stack([pixels for _, pixels in views]).to(normalize.mean.device)
    logits = classifier.model(normalize(images)).float()  # (B, C)
    scores = (logits.sigmoid() if classifier.multi_label else logits.softmax(dim=1)).cpu()
    answers = []
    for (name, _), row in zip(views, scores, strict=True):
        if not row.isfinite().all():
            raise UserError(f"{name}: the probabilities are not finite; the weights {classifier.path} are damaged")
        best = row.topk(len(row) if classifier.multi_label else min(selection.top_k, len(row)))
        ranked = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        if classifier.multi_label:
            ranked = [(position, score) for position, score in ranked if score >= selection.threshold]
        answers.append(Answer(name, tuple(at for at, _ in ranked), tuple(score for _, score in ranked)))
    return answers


# --- Inputs -----------------------------------------------------------------------------------------------


def expand_inputs(arguments: Sequence[str]) -> list[str]:
    """Arguments with patterns replaced by the files that match them (`**` too); shards keep theirs.

    Raises:
        UserError: an argument that leads to no file.
    """
    expanded = []
    for argument in arguments:
        path = Path(argument).expanduser()
        if (
            is_url(argument)
            or path.exists()
            or (argument.endswith(SHARD_SUFFIXES) and any(c in argument for c in "*{"))
        ):
            expanded.append(argument if is_url(argument) else str(path))
            continue
        expanded += match_pattern(argument, "INPUT")
    return expanded


def open_inputs(inputs: Sequence[str]) -> list[Source]:
    """The sources of images that are meant: first all image files, each once, then what is packed in other ways.

    Args:
        inputs: from `expand_inputs`: image files, or what `open_source` knows.

    Raises:
        UserError: a source that can not be used.
    """
    files: dict[str, None] = {}
    packed: list[Source] = []
    for name in inputs:
        if _is_image_file(Path(name)):
            files[name] = None
            continue
        source = open_source(name, "INPUT")
        if type(source) is ImageFiles:
            files |= dict.fromkeys(map(source.name, range(len(source))))
        else:
            packed.append(source)
    return [*([ImageFiles(list(files), "image files")] if files else []), *packed]


def _is_image_file(path: Path) -> bool:
    """Whether a path is a single file, and no list or package of images; reading it will tell whether it is one."""
    is_many = path.suffix.lower() in LISTS or path.name.endswith((*SHARD_SUFFIXES, *IDX_SUFFIXES))
    return path.is_file() and not is_many


# --- Outputs ----------------------------------------------------------------------------------------------


def check_output(output: str, inputs: Sequence[str], force: bool) -> None:
    """Make sure that OUTPUT can be written, is none of the inputs, and is overwritten only with `force`.

    Raises:
        UserError: it can not be, is, or would be.
    """
    if output == STDOUT:
        return
    path = Path(output)
    if path.suffix.lower() not in WRITERS:
        raise UserError(f"--output {output}: expected a name that ends with {' or '.join(WRITERS)}, or - for JSON here")
    if path.resolve() in {Path(name).resolve() for name in inputs}:
        raise UserError(f"--output: {path} is an input, and would be overwritten; name another file")
    if path.is_dir():
        raise UserError(f"--output: {path} is a folder; name a file")
    if path.exists() and not force:
        raise UserError(f"--output: {path} exists already; name another file, or overwrite with --force")


class Writer(Protocol):
    """Writes answers to a file as they come."""

    def __init__(self, file: TextIO, classifier: Classifier, selection: Selection) -> None: ...

    def add(self, answer: Answer) -> None:
        """One image."""

    def finish(self, unreadable: Sequence[str]) -> None:
        """What comes after the last image."""


class JsonWriter:
    """See the head of this module."""

    def __init__(self, file: TextIO, classifier: Classifier, selection: Selection) -> None:
        self.file, self.classifier, self.count = file, classifier, 0
        facts = json.dumps(about(classifier, selection), ensure_ascii=False, allow_nan=False)
        file.write(f'{{"about": {facts},\n"images": [')

    def add(self, answer: Answer) -> None:
        """A line of the list."""
        classes, names = self.classifier.classes, self.classifier.class_names
        found = [
            {"class": classes[at], "name": names[at], "probability": _rounded(score)}
            for at, score in zip(answer.classes, answer.probabilities, strict=True)
        ]
        entry = json.dumps({"name": answer.name, "classes": found}, ensure_ascii=False, allow_nan=False)
        self.file.write(f",\n{entry}" if self.count else f"\n{entry}")
        self.count += 1

    def finish(self, unreadable: Sequence[str]) -> None:
        """Close the list, and say what is not in it."""
        self.file.write(f'\n],\n"unreadable": {json.dumps(list(unreadable), ensure_ascii=False)}}}\n')


class CsvWriter:
    """See the head of this module."""

    def __init__(self, file: TextIO, classifier: Classifier, selection: Selection) -> None:
        self.rows, self.classifier = csv.writer(file, lineterminator="\n"), classifier
        count = min(selection.top_k, len(classifier.classes))
        best = [column for place in range(1, count + 1) for column in (f"top{place}", f"score{place}")]
        self.rows.writerow(["name", *(classifier.class_names if classifier.multi_label else best)])

    def add(self, answer: Answer) -> None:
        """A row."""
        cells = zip(answer.classes, map(_rounded, answer.probabilities), strict=True)
        if self.classifier.multi_label:
            scores = dict(cells)
            self.rows.writerow([answer.name, *(scores.get(at, "") for at in range(len(self.classifier.classes)))])
        else:
            names = self.classifier.class_names
            self.rows.writerow([answer.name, *(cell for at, score in cells for cell in (names[at], score))])

    def finish(self, unreadable: Sequence[str]) -> None:
        """Nothing: a table has no place for it."""


WRITERS: dict[str, type[Writer]] = {".json": JsonWriter, ".csv": CsvWriter}


def about(classifier: Classifier, selection: Selection) -> dict[str, Any]:
    """What an answer depends on beside the image."""
    chosen = {"threshold": selection.threshold} if classifier.multi_label else {"top_k": selection.top_k}
    return {
        "weights": str(classifier.path),
        "sha256": sha256(classifier.path),
        "classes": list(classifier.classes),
        "class_names": list(classifier.class_names),
        "multi_label": classifier.multi_label,
        "img_size": list(classifier.architecture.img_size),
        "crop_pct": classifier.crop_pct,
        "mean": list(classifier.mean),
        "std": list(classifier.std),
        "bit_depth": classifier.bit_depth,
        "assumed": list(classifier.assumed),
        **chosen,
    }


def _rounded(probability: float) -> float:
    return float(f"{probability:.6g}")


@dataclass
class FileAnswers:
    """Predicts and writes, and counts what it did.

    Attributes:
        classifier: computes on the device where its model is.
        selection: of classes.
        batch_size: images that are computed together.
        images: how many are answered.
        failures: one line for each image that could not be read.
    """

    classifier: Classifier
    selection: Selection
    batch_size: int = BATCH_SIZE
    images: int = 0
    failures: list[str] = field(default_factory=list)

    def write(self, sources: Sequence[Source], output: str) -> None:
        """Predict all images and write OUTPUT, whole or not at all; or to standard output as they come.

        Raises:
            UserError: OUTPUT's folder can not be written in; see `predict`.
            OSError: the disk is full or broken.
        """
        if output == STDOUT:
            self._write(sources, sys.stdout, JsonWriter)
            return
        path = Path(output)
        make_folder(path.parent, "--output")

        def write(temporary: Path) -> None:
            with open(temporary, "w", encoding="utf-8", errors=ODD_BYTES, newline="") as file:
                self._write(sources, file, WRITERS[path.suffix.lower()])

        write_atomically(path, write)

    def _write(self, sources: Sequence[Source], file: TextIO, writer_type: type[Writer]) -> None:
        writer = writer_type(file, self.classifier, self.selection)
        total = sum(map(len, sources))
        found = predict(self.classifier, sources, self.selection, self.batch_size)
        mixed = file is sys.stdout and file.isatty()  # a bar would stand between the answers
        for answer in tqdm(found, "predict", total, unit="img", dynamic_ncols=True, disable=mixed):
            if isinstance(answer, UserError):
                self.failures.append(str(answer))
            else:
                writer.add(answer)
                self.images += 1
        writer.finish(self.failures)
