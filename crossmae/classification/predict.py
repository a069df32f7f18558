"""Predict the classes of images, as objects or as JSON and CSV files.

    OUTPUT.json    {"about": {...}, "images": [{"name": ..., "classes": [{"class", "name", "probability"}, ...]}, ...],
                   "unreadable": [...]}
    OUTPUT.csv     a row per image. One class per image: name,top1,score1,top2,score2,... Several classes: name,
                   then a column per class, which has the probability if it reaches the threshold

Threads read images while the model computes. Answers are written immediately, so memory stays bounded.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from crossmae.classification import BATCH_SIZE, LABEL_THRESHOLD, STDOUT, TOP_K
from crossmae.classification.classifier import Classifier
from crossmae.data.images import IMAGE_LIMITS, ImageLimits
from crossmae.data.parallel import READERS, Progress, map_in_order
from crossmae.data.paths import match_pattern, without_system_names
from crossmae.data.pixels import Normalize, centre_view, read_pixels
from crossmae.data.sources import LISTS, Source, open_source
from crossmae.data.sources.idx import IDX_SUFFIXES
from crossmae.data.sources.shard_files import is_url
from crossmae.data.sources.source import ImageFiles
from crossmae.data.sources.tar_shards import SHARD_SUFFIXES
from crossmae.errors import UserError
from crossmae.files import JsonArray, check_destination, make_folder, sha256, stream_text


@dataclass(frozen=True)
class Answer:
    """Predicted classes of a named image, most probable first, as positions in `Classifier.classes`."""

    name: str
    classes: tuple[int, ...]
    probabilities: tuple[float, ...]

    @property
    def rounded(self) -> list[float]:
        """The probabilities, rounded as in files."""
        return [float(f"{probability:.6g}") for probability in self.probabilities]


@dataclass(frozen=True)
class Selection:
    """Limits on an answer: `top_k` best classes. With several labels: all classes from the probability `threshold`."""

    top_k: int = TOP_K
    threshold: float = LABEL_THRESHOLD


def predict_images(
    classifier: Classifier,
    paths: Sequence[str | Path],
    top_k: int = TOP_K,
    threshold: float = LABEL_THRESHOLD,
    batch_size: int = BATCH_SIZE,
) -> list[Answer]:
    """Predict the classes of image files, in order.

    The device of the classifier's model computes. `top_k` limits the classes per image; for multi-label classifiers,
    `threshold` does. Raises UserError if an image cannot be read.
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
    """Yield an answer, or the read error, for each image.

    Raises:
        UserError: a probability is not finite. The error names the image.
    """

    def read_view(sample: tuple[Source, int]) -> tuple[str, Tensor] | UserError:
        source, index = sample
        try:
            pixels = read_pixels(source, index, classifier.architecture.in_chans, classifier.bit_depth)
        except UserError as error:
            return error
        return source.name(index), centre_view(pixels, classifier.architecture.img_size, classifier.crop_pct)

    normalize = Normalize(classifier.mean, classifier.std, next(classifier.model.parameters()).device)
    views = map_in_order(read_view, ((source, index) for source in sources for index in range(len(source))), READERS)
    while batch := list(islice(views, batch_size)):
        readable = [view for view in batch if not isinstance(view, UserError)]
        answers = iter(_answer_batch(classifier, normalize, readable, selection))
        for view in batch:
            yield view if isinstance(view, UserError) else next(answers)


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
            raise UserError(f"{name}: the probabilities are not finite. Replace the weights {classifier.path}.")
        best = row.topk(len(row) if classifier.multi_label else min(selection.top_k, len(row)))
        ranked = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        if classifier.multi_label:
            ranked = [(position, score) for position, score in ranked if score >= selection.threshold]
        answers.append(Answer(name, tuple(at for at, _ in ranked), tuple(score for _, score in ranked)))
    return answers


def expand_inputs(arguments: Sequence[str]) -> list[str]:
    """Replace patterns by the matching files. Keep shard patterns."""
    expanded = []
    for argument in without_system_names(arguments):
        path = Path(os.path.expanduser(argument))
        are_shards = argument.endswith(SHARD_SUFFIXES) and any(letter in argument for letter in "*{")
        if is_url(argument):
            expanded.append(argument)
        else:
            expanded += [str(path)] if os.path.exists(path) or are_shards else match_pattern(argument, "INPUT")
    return expanded


def open_inputs(inputs: Sequence[str], limits: ImageLimits = IMAGE_LIMITS) -> list[Source]:
    """Open all image files as one source, then other sources."""
    files: dict[str, None] = {}
    packed: list[Source] = []
    for name in inputs:
        is_many = Path(name).suffix.lower() in LISTS or name.endswith((*SHARD_SUFFIXES, *IDX_SUFFIXES))
        source = None if Path(name).is_file() and not is_many else open_source(name, "INPUT")
        if source is None:
            files[name] = None
        elif type(source) is ImageFiles:
            files |= dict.fromkeys(map(source.name, range(len(source))))
        else:
            packed.append(source)
    sources = [*([ImageFiles(list(files), "image files")] if files else []), *packed]
    for source in sources:
        source.limits = limits
    return sources


def check_output(output: str, inputs: Sequence[str], force: bool) -> None:
    """Reject an OUTPUT of unknown format, an input, or an existing file."""
    if output == STDOUT:
        return
    path = Path(output)
    if path.suffix.lower() not in WRITERS:
        names = " or ".join(WRITERS)
        raise UserError(
            f"--output {output}: unknown format. Name a file that ends with {names}, or - for the terminal."
        )
    if path.resolve() in {Path(name).resolve() for name in inputs}:
        raise UserError(f"--output: {path} is an input and would be overwritten. Name another file.")
    check_destination(path, force=force)


def write_answers(
    classifier: Classifier, sources: Sequence[Source], selection: Selection, output: str, batch_size: int = BATCH_SIZE
) -> list[str]:
    """Predict all images. Write OUTPUT completely, or not at all.

    Standard output receives each answer immediately. Returns one line for each image that could not be read.

    Raises:
        UserError: the folder of OUTPUT is not writable, or `predict` raises it.
    """
    failures: list[str] = []
    mixed = output == STDOUT and sys.stdout.isatty()  # a progress bar would appear between the answers

    def answers() -> Iterator[Answer]:
        found, total = predict(classifier, sources, selection, batch_size), sum(map(len, sources))
        for answer in Progress(found, "predict", total, unit="image", shown=not mixed):
            if isinstance(answer, UserError):
                failures.append(str(answer))
            else:
                yield answer

    write = WRITERS[".json" if output == STDOUT else Path(output).suffix.lower()]
    if output == STDOUT:
        write(sys.stdout, answers(), failures, classifier, selection)
    else:
        make_folder(Path(output).parent, "--output")
        stream_text(Path(output), lambda file: write(file, answers(), failures, classifier, selection))
    return failures


def _write_json(
    file: TextIO, answers: Iterable[Answer], failures: Sequence[str], classifier: Classifier, selection: Selection
) -> None:
    """Write the answers, then the failures collected meanwhile."""
    facts = json.dumps(about(classifier, selection), ensure_ascii=False, allow_nan=False)
    file.write(f'{{"about": {facts},\n"images": ')
    images = JsonArray(file)
    for answer in answers:
        found = [
            {"class": classifier.classes[at], "name": classifier.class_names[at], "probability": score}
            for at, score in zip(answer.classes, answer.rounded, strict=True)
        ]
        images.add({"name": answer.name, "classes": found})
    images.close()
    file.write(f',\n"unreadable": {json.dumps(failures, ensure_ascii=False)}}}\n')


def _write_csv(
    file: TextIO, answers: Iterable[Answer], failures: Sequence[str], classifier: Classifier, selection: Selection
) -> None:
    """Write a row per answer. Failures are not written."""
    names, rows = classifier.class_names, csv.writer(file, lineterminator="\n")
    places = range(1, min(selection.top_k, len(names)) + 1)
    best = [column for place in places for column in (f"top{place}", f"score{place}")]
    rows.writerow(["name", *(names if classifier.multi_label else best)])
    for answer in answers:
        scores = dict(zip(answer.classes, answer.rounded, strict=True))
        if classifier.multi_label:
            rows.writerow([answer.name, *(scores.get(at, "") for at in range(len(names)))])
        else:
            rows.writerow([answer.name, *(cell for at, score in scores.items() for cell in (names[at], score))])


WRITERS = {".json": _write_json, ".csv": _write_csv}


def about(classifier: Classifier, selection: Selection) -> dict[str, Any]:
    """Describe the classifier and the limits on its answers."""
    facts: dict[str, Any] = {"weights": str(classifier.path), "sha256": sha256(classifier.path)}
    recorded = ("classes", "class_names", "multi_label", "crop_pct", "mean", "std", "bit_depth", "assumed")
    facts |= {key: getattr(classifier, key) for key in recorded} | {"img_size": classifier.architecture.img_size}
    return facts | ({"threshold": selection.threshold} if classifier.multi_label else {"top_k": selection.top_k})
