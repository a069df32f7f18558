"""An evaluation of frozen features from its config: open, extract once, run the methods, write down the results."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import scipy
import sklearn
import torch
from torch import Tensor

from crossmae.checkpoints.metadata import PIXEL_MEAN, PIXEL_STD
from crossmae.checkpoints.pretrained import BIT_DEPTH, IMAGENET_MEAN, IMAGENET_STD
from crossmae.checkpoints.weights import Weights, read_weights
from crossmae.classification.data import find_classes, find_several, label_targets, warn_of_absent
from crossmae.classification.evaluation.intervals import accuracy_of, mean_of
from crossmae.classification.probe import few_shot as few_shots
from crossmae.classification.probe import knn, linear, logistic
from crossmae.classification.probe.cache import Labelled, cached, data_digest, is_cached, tensors_digest
from crossmae.classification.probe.config import LabelledConfig, ProbeRunConfig
from crossmae.classification.probe.features import Opened, Views, extract, open_encoder, random_weights
from crossmae.classification.probe.report import REACH, build_page
from crossmae.data.broken import find_broken, refuse_broken
from crossmae.data.pixels import published_crop_pct
from crossmae.data.sources import Source, open_source, warn_of_overlap
from crossmae.errors import UserError
from crossmae.files import check_writable, make_folder, sha256, write_json
from crossmae.pretraining.neighbours import standardize
from crossmae.training.devices import choose_precision, open_device
from crossmae.training.processes import find_ranks
from crossmae.training.versions import versions

RESULTS, PAGE = "results.json", "report.html"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MAX_NAMES = 10

log = logging.getLogger(__name__)


def probe(config: ProbeRunConfig, force: bool = False) -> dict[str, Any]:
    """Evaluate frozen features; writes results.json and report.html into `output_dir`, features into the cache.

    Args:
        config: all of it is read.
        force: replace the results of an earlier call.

    Returns:
        What results.json holds.

    Raises:
        UserError: whatever is wrong with config, weights or data, before results are written.
    """
    if find_ranks().world_size > 1:
        raise UserError("a probe runs in one process; start it without torchrun")
    clock = Clock()
    cache = config.features.cache_dir or config.output_dir / "features"
    _check_folders(config, cache, force)
    device = open_device(config.runtime.device, "runtime.device")
    sources = open_labelled(config.data)
    classes = sources["train"].classes
    labels = {name: label_targets(source, f"data.{name}", classes) for name, source in sources.items()}
    for name, of_one in labels.items():
        warn_of_absent(of_one, f"data.{name}", classes)
    methods = plan_methods(config, labels["train"], classes)
    weights, digest = _open_weights(config)
    opened = open_encoder(
        weights, config.features.pool, config.features.block, config.runtime.seed, **_architecture(config)
    )
    views, assumed = views_of(config.data, weights, opened)
    notes = [*opened.notes, *assumed]
    for note in notes:
        log.info("%s", note)
    decisive = {
        "weights": digest,
        "architecture": asdict(opened.architecture),
        "block": opened.encoder.block,
        "final_norm": opened.encoder.norm,
        "pool": opened.encoder.pool,
        "views": asdict(views),
        "dtype": config.features.dtype,
        "precision": choose_precision(config.runtime.precision, device),
        "classes": list(classes),
    }
    clock.lap("start")
    data = _features(config, cache, decisive, sources, labels, opened, views, device)
    clock.lap("features")
    found: dict[str, Any] = {}
    for name, method in methods.items():
        found[name] = method(data["train"], data["val"], len(classes), device)
        clock.lap(name)

    results = _record(config, weights, decisive, sources, found)
    results["features"] |= {"width": opened.encoder.width, "notes": notes}
    results["seconds"] = clock.seconds
    make_folder(config.output_dir, "output_dir")
    write_json(config.output_dir / RESULTS, results)
    build_page(results).write(config.output_dir / PAGE)
    return results


def _record(
    config: ProbeRunConfig,
    weights: Weights,
    decisive: dict[str, Any],
    sources: dict[str, Source],
    found: dict[str, Any],
) -> dict[str, Any]:
    """What was evaluated, on what, by what, and what came out."""
    data: dict[str, Any] = {
        name: {"description": source.description, "images": len(source)} for name, source in sources.items()
    }
    return {
        "weights": {
            "path": None if config.weights is None else str(weights.path),
            "sha256": decisive["weights"],
            "format": weights.format,
            "random": config.weights is None,
        },
        "features": {key: value for key, value in decisive.items() if key not in ("weights", "classes")},
        "data": data | {"classes": decisive["classes"]},
        "methods": found,
        "config": config.model_dump(mode="json"),
        "versions": versions() | {"scikit-learn": sklearn.__version__, "scipy": scipy.__version__},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


class Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a lap."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now


# --- Data -------------------------------------------------------------------------------------------------


def open_labelled(data: LabelledConfig) -> dict[str, Source]:
    """Both data sets, "train" and "val".

    Raises:
        UserError: one can not be opened, or has no labels or several per image.
    """
    sources = {
        "train": open_source(data.train, "data.train", data.root),
        "val": open_source(data.val, "data.val", data.val_root),
    }
    for name, source in sources.items():
        log.info("data.%s: %s", name, source.description)
        if several := find_several(find_classes(source, f"data.{name}")):
            raise UserError(
                f"data.{name}: the label {several[0]!r} names several classes; several labels per image can not be "
                "probed, tools/finetune.py takes them"
            )
    train, val = sources.values()
    warn_of_overlap(train, "data.train", val, "data.val")
    return sources


# --- Encoder and features ---------------------------------------------------------------------------------


def _check_folders(config: ProbeRunConfig, cache: Path, force: bool) -> None:
    check_writable(config.output_dir, "output_dir")
    check_writable(cache, "features.cache_dir")
    if (config.output_dir / RESULTS).exists() and not force:
        raise UserError(
            f"output_dir: {config.output_dir} holds the {RESULTS} of an earlier call; name another folder, or replace "
            "them with --force"
        )


def _open_weights(config: ProbeRunConfig) -> tuple[Weights, str]:
    """Weights and their SHA-256: of the file, or of the random tensors."""
    if config.weights is None:
        assert config.model.name is not None  # the config has been checked
        weights = random_weights(config.model.name, config.runtime.seed, **_architecture(config))
        return weights, tensors_digest(weights.tensors)
    if config.model.name is not None:
        log.info("ignored, because there are weights: model.name")
    weights = read_weights(config.weights)
    return weights, sha256(weights.path)


def _architecture(config: ProbeRunConfig) -> dict[str, Any]:
    return config.model.model_dump(exclude={"name"})


def views_of(data: LabelledConfig, weights: Weights, opened: Opened) -> tuple[Views, list[str]]:
    """How images are to be seen, and sentences on what was taken for granted.

    Raises:
        UserError: the pixels' mean and deviation are not known, or not one for each channel.
    """
    channels, size = opened.architecture.in_chans, opened.architecture.img_size
    notes: list[str] = []
    statistics: list[tuple[float, ...]] = []
    for key, given, record, usual in (
        ("mean", data.mean, PIXEL_MEAN, IMAGENET_MEAN),
        ("std", data.std, PIXEL_STD, IMAGENET_STD),
    ):
        recorded = _recorded(weights, record)
        if given is not None and recorded is not None and list(given) != recorded:
            log.warning("%s was trained with data.%s=%s, not %s", weights.path, key, recorded, list(given))
        values = tuple(given or recorded or usual)
        if len(values) != channels:
            raise UserError(
                f"data.{key} needs one value for each of the {channels} channels, got {list(values)}; "
                "tools/dataset_stats.py measures them"
            )
        statistics.append(values)
        if given is None and recorded is None:
            notes.append(f"assumed: data.{key} is that of ImageNet, as the weights record none")
    crop_pct = data.crop_pct or _recorded(weights, "crop_pct") or published_crop_pct(size)
    bit_depth = data.bit_depth or int(_recorded(weights, BIT_DEPTH) or 8)
    return Views(size, crop_pct, statistics[0], statistics[1], bit_depth), notes


def _recorded(weights: Weights, key: str) -> Any:
    """What a file's metadata say, or None: a converted file may not know."""
    try:
        return json.loads(weights.metadata.get(key, "null"))
    except json.JSONDecodeError:
        return None


def _features(
    config: ProbeRunConfig,
    cache: Path,
    decisive: dict[str, Any],
    sources: dict[str, Source],
    labels: dict[str, Tensor],
    opened: Opened,
    views: Views,
    device: torch.device,
) -> dict[str, Labelled]:
    """Features of both sources; from the cache what is there, and everything is looked at before any is extracted."""
    keys = {name: decisive | {"data": data_digest(source, name)} for name, source in sources.items()}
    missing = {name: source for name, source in sources.items() if not is_cached(cache, name, keys[name])}
    if config.data.check:
        for name, source in missing.items():
            refuse_broken(find_broken(source, range(len(source)), len(views.mean), views.bit_depth), f"data.{name}")

    def extracted(name: str) -> Labelled:
        where, precision, dtype = f"data.{name}", decisive["precision"], DTYPES[decisive["dtype"]]
        size, workers = config.features.batch_size, config.data.workers
        try:
            features = extract(
                opened.encoder, sources[name], labels[name], views, device, precision, dtype, size, workers, where
            )
        except torch.OutOfMemoryError:
            raise UserError(f"features.batch_size: {size} images are too many for the memory of the GPU") from None
        return Labelled(features, labels[name])

    return {name: cached(cache, name, keys[name], lambda name=name: extracted(name)) for name in sources}  # type: ignore[misc]


# --- Methods ----------------------------------------------------------------------------------------------

RunMethod = Callable[[Labelled, Labelled, int, torch.device], dict[str, Any]]


@dataclass(frozen=True)
class Methods:
    """Every method as its section of the config has it, on features of training and validation images.

    Each returns JSON: what it found, and the settings that are not in the config as they are.
    """

    config: ProbeRunConfig
    ks: tuple[int, ...]

    def knn(self, train: Labelled, val: Labelled, num_classes: int, device: torch.device) -> dict[str, Any]:
        """See `crossmae.classification.probe.knn.sweep`; on standardised features."""
        standard = standardize(train.features.to(device), val.features.to(device))
        temperatures = self.config.knn.temperature
        labels = train.labels.to(device), val.labels.to(device)
        return asdict(knn.sweep(standard[0], labels[0], standard[1], labels[1], num_classes, self.ks, temperatures))

    def linear(self, train: Labelled, val: Labelled, num_classes: int, device: torch.device) -> dict[str, Any]:
        """See `crossmae.classification.probe.linear.train_linear`."""
        section, settings = self.config.linear, linear_settings(self.config, len(train.labels))
        features, labels, others = (t.to(device) for t in (train.features, train.labels, val.features))
        runs: list[dict[str, Any]] = []
        for seed in section.seeds:
            head = linear.train_linear(features, labels, num_classes, settings, seed)
            accuracies = [
                accuracy_of(linear.classify(head, part), truth)
                for part, truth in ((others, val.labels), (features, train.labels))
            ]
            runs.append({"seed": seed, "val": asdict(accuracies[0]), "train_accuracy": accuracies[1].accuracy})
        mean = mean_of([run["val"]["accuracy"] for run in runs])
        reach = settings.reach(len(labels))
        return {"settings": asdict(settings), "reach": reach, "runs": runs, "mean": asdict(mean)}

    def logistic(self, train: Labelled, val: Labelled, num_classes: int, device: torch.device) -> dict[str, Any]:
        """See `crossmae.classification.probe.logistic`; the strength that is chosen is fitted again on all images."""
        section = self.config.logistic
        choice = logistic.choose_strength(
            train.features, train.labels, section.strengths, section.max_iterations, self.config.runtime.seed
        )
        fitted = logistic.fit(train.features, train.labels, choice.strength, section.max_iterations, "logistic")
        table = [{"strength": strength, "held_out": asdict(accuracy)} for strength, accuracy in choice.table]
        accuracy = accuracy_of(fitted.classify(val.features), val.labels)
        found = {"strength": choice.strength, "converged": fitted.converged, "table": table, "val": asdict(accuracy)}
        return found | {"is_largest": choice.strength == max(section.strengths)}

    def few_shot(self, train: Labelled, val: Labelled, num_classes: int, device: torch.device) -> dict[str, Any]:
        """See `crossmae.classification.probe.few_shot`."""
        section = self.config.few_shot
        found = few_shots.few_shot(
            train.features, train.labels, val.features, val.labels,
            section.shots, section.seeds, section.strength, section.max_iterations,
        )  # fmt: skip
        return {"strength": section.strength, "shots": [asdict(one) for one in found]}


def linear_settings(config: ProbeRunConfig, images: int) -> linear.LinearSettings:
    """Settings of the linear probe; the batch is no larger than the data set."""
    section = config.linear
    return linear.LinearSettings(
        section.epochs, section.warmup_epochs, min(section.batch_size, images), section.base_lr
    )


def plan_methods(config: ProbeRunConfig, labels: Tensor, classes: Sequence[str]) -> dict[str, RunMethod]:
    """The methods that were asked for, in a fixed order, ready to run.

    Raises:
        UserError: there are too few training images for one of them.
    """
    images = len(labels)
    ks = tuple(k for k in config.knn.k if k < images)
    if "knn" in config.methods and len(ks) < len(config.knn.k):
        left_out = sorted(set(config.knn.k) - set(ks))
        if not ks:
            raise UserError(f"knn.k: {left_out} need more than the {images} images of data.train")
        log.warning("knn.k: %s are left out, data.train has %d images", left_out, images)
    if "linear" in config.methods:
        reach = linear_settings(config, images).reach(images)
        if reach < 1:
            log.warning("linear: %d images are too few steps: %s", images, REACH)
    if "few_shot" in config.methods:
        few_shots.check_shots(labels, classes, config.few_shot.shots, "few_shot.shots")
    if "logistic" in config.methods and int(torch.bincount(labels).max()) < 2:
        raise UserError("methods: logistic holds out training images, and no class of data.train has two")
    methods = Methods(config, ks)
    known: dict[str, RunMethod] = {
        "knn": methods.knn, "linear": methods.linear, "logistic": methods.logistic, "few_shot": methods.few_shot
    }  # fmt: skip
    return {name: method for name, method in known.items() if name in config.methods}
