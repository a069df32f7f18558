"""Probe of frozen features, from the config to the results."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import scipy
import sklearn
import torch
from torch import Tensor

from crossmae.checkpoints.reading.candidates import split_choice
from crossmae.checkpoints.weights import Weights, read_weights
from crossmae.classification.data import Views, find_classes, find_several, label_targets, warn_of_absent
from crossmae.classification.probe import knn, linear, logistic
from crossmae.classification.probe.cache import CachedFeatures, cached, data_digest, is_cached, tensors_digest
from crossmae.classification.probe.config import LabelledConfig, ProbeRunConfig
from crossmae.classification.probe.features import choose_views, extract, open_encoder, random_weights
from crossmae.classification.probe.report import REACH, build_page
from crossmae.data.broken import find_broken, refuse_broken
from crossmae.data.sources import Source, open_source, warn_of_overlap
from crossmae.errors import UserError, counted, named_by
from crossmae.files import check_writable, make_folder, sha256, write_json
from crossmae.training.devices import choose_precision, open_device
from crossmae.training.processes import find_ranks
from crossmae.training.versions import versions

RESULTS, PAGE = "results.json", "report.html"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

log = logging.getLogger(__name__)


def probe(config: ProbeRunConfig, force: bool = False) -> dict[str, Any]:
    """Evaluate frozen features, write results.json and report.html, and return the results.

    With `force`, they replace the results of an earlier probe.

    Raises:
        UserError: config, weights or data are wrong. Nothing has been written then.
    """
    clock = [("", time.perf_counter())]
    data, wanted, seed, output = config.data, config.features, config.runtime.seed, config.output_dir
    cache = wanted.cache_dir or output / "features"
    _check_start(output, cache, force)
    device = open_device(config.runtime.device, "runtime.device")
    sources, labels = open_labelled(data)
    classes = sources["train"].classes
    batch_size = min(config.linear.batch_size, len(labels["train"]))
    head = config.linear.model_copy(update={"batch_size": batch_size})
    shots, given = config.few_shot.shots, set(config.model_fields_set & {"methods"})
    given |= {"knn.k"} if "k" in config.knn.model_fields_set else set()
    given |= {"few_shot.shots"} if "shots" in config.few_shot.model_fields_set else set()
    choice = choose_methods(config.methods, config.knn.k, shots, labels["train"], classes, given)
    if "linear" in choice.methods and linear.reach(head, len(labels["train"])) < 1:
        log.warning("linear: %d images are too few steps: %s", len(labels["train"]), REACH)

    sizes = config.model.model_dump(exclude={"name"})
    weights, about = _open_weights(config.weights, config.model.name, seed, sizes)
    encoder = open_encoder(weights, wanted.pool, wanted.block, seed, **sizes)
    views, assumed = choose_views(weights, encoder.architecture, data)
    notes = [*encoder.notes, *assumed]
    for note in notes:
        log.info("%s", note)
    precision = choose_precision(config.runtime.precision, device)
    decisive = {
        "architecture": asdict(encoder.architecture),
        "block": encoder.block,
        "final_norm": encoder.norm,
        "pool": encoder.pool,
        "views": asdict(views),
        "dtype": wanted.dtype,
        "precision": precision,
    }
    clock.append(("start", time.perf_counter()))

    def features_of(name: str) -> CachedFeatures:
        how = (views, device, precision, DTYPES[wanted.dtype], wanted.batch_size, data.workers)
        features = extract(encoder, sources[name], labels[name], *how, f"data.{name}")
        return CachedFeatures(features, labels[name])

    key = decisive | {"weights": about["sha256"], "classes": list(classes)}
    train, val = _load_features(cache, key, sources, views if data.check else None, features_of)
    clock.append(("features", time.perf_counter()))
    strengths, most, few = config.logistic.strengths, config.logistic.max_iterations, config.few_shot
    few_settings = (choice.shots, few.seeds, few.strength, few.max_iterations)
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "knn": lambda: knn.sweep(train, val, len(classes), choice.ks, config.knn.temperature, device),
        "linear": lambda: linear.run_linear(train, val, len(classes), head, device),
        "logistic": lambda: logistic.run_logistic(train, val, strengths, most, seed),
        "few_shot": lambda: logistic.run_few_shot(train, val, *few_settings),
    }
    found: dict[str, Any] = {}
    for name in (name for name in runs if name in choice.methods):
        found[name] = runs[name]()
        clock.append((name, time.perf_counter()))

    facts = {name: {"description": one.description, "images": len(one)} for name, one in sources.items()}
    results = {
        "weights": about,
        "features": decisive | {"width": encoder.width, "notes": notes},
        "data": facts | {"classes": list(classes)},
        "methods": found,
        "left_out": choice.left_out,
        "config": config.model_dump(mode="json"),
        "versions": versions() | {"scikit-learn": sklearn.__version__, "scipy": scipy.__version__},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": {name: round(end - begin, 3) for (_, begin), (name, end) in pairwise(clock)},
    }
    make_folder(output, "output_dir")
    write_json(output / RESULTS, results)
    build_page(results).write(output / PAGE)
    return results


def open_labelled(data: LabelledConfig) -> tuple[dict[str, Source], dict[str, Tensor]]:
    """Open "train" and "val", with labels as classes of "train"."""
    given = {"train": (data.train, "data.train", data.root), "val": (data.val, "data.val", data.val_root)}
    sources = {name: open_source(*how, data.limits) for name, how in given.items()}
    for name, source in sources.items():
        log.info("data.%s: %s", name, source.description)
        if several := find_several(find_classes(source, f"data.{name}")):
            several_labels = f"the label {several[0]!r} names several classes, which cannot be probed"
            raise UserError(f"data.{name}: {several_labels}. Use tools/finetune.py.")
    warn_of_overlap(sources["train"], "data.train", sources["val"], "data.val")
    classes = sources["train"].classes
    labels = {name: label_targets(source, f"data.{name}", classes) for name, source in sources.items()}
    for name, of_one in labels.items():
        warn_of_absent(of_one, f"data.{name}", classes)
    return sources, labels


@dataclass(frozen=True)
class Choice:
    """The methods that the training images suffice for, and what was left out, as sentences."""

    methods: tuple[str, ...]
    ks: tuple[int, ...]
    shots: tuple[int, ...]
    left_out: tuple[str, ...]


def choose_methods(
    methods: Sequence[str],
    ks: Sequence[int],
    shots: Sequence[int],
    labels: Tensor,
    classes: Sequence[str],
    given: Set[str] = frozenset(),
) -> Choice:
    """Leave out the default values that need more training images.

    Args:
        methods: names of methods.
        ks: numbers of neighbours.
        shots: numbers of images per class.
        labels: class numbers of the training images (N,).
        given: keys among "methods", "knn.k" and "few_shot.shots" that the user gave. These values are not left out.

    Raises:
        UserError: A given value needs more training images, or no method is left.
    """
    images, counts = len(labels), torch.bincount(labels, minlength=len(classes))
    kept, left_out = list(methods), []
    fitting = {"knn": tuple(k for k in ks if k < images), "few_shot": tuple(n for n in shots if n <= int(counts.min()))}

    def leave_out(method: str, sentence: str, advice: str) -> None:
        if "methods" in given:
            raise UserError(f"{sentence}. {advice}.")
        left_out.append(f"{sentence}. The method is left out")
        kept.remove(method)

    if "knn" in methods and len(fitting["knn"]) < len(ks):
        larger = sorted(set(ks) - set(fitting["knn"]))
        sentence = f"knn.k: {larger} need more than the {counted(images, 'image')} of data.train"
        if "knn.k" in given:
            raise UserError(f"{sentence}. Lower knn.k.")
        if fitting["knn"]:
            left_out.append(f"{sentence}. They are left out")
        else:
            leave_out("knn", sentence, "Leave knn out of methods")
    if "few_shot" in methods and len(fitting["few_shot"]) < len(shots):
        if "few_shot.shots" in given:
            logistic.check_shots(labels, classes, shots, "few_shot.shots")
        larger = sorted(set(shots) - set(fitting["few_shot"]))
        smallest = f"a class of data.train has only {int(counts.min())}"
        sentence = f"few_shot.shots: {larger} images per class are not there, {smallest}"
        if fitting["few_shot"]:
            left_out.append(f"{sentence}. They are left out")
        else:
            leave_out("few_shot", sentence, "Leave few_shot out of methods")
    if "logistic" in methods and int(counts.max()) < 2:
        leave_out("logistic", "methods: logistic needs two images of a class in data.train", "Leave it out")
    if not kept:
        raise UserError(
            f"methods: none of {', '.join(methods)} is possible with {counted(images, 'training image')}. Add images."
        )
    for sentence in left_out:
        log.warning("%s", sentence)
    return Choice(tuple(kept), fitting["knn"], fitting["few_shot"], tuple(left_out))


def _check_start(output: Path, cache: Path, force: bool) -> None:
    if find_ranks().world_size > 1:
        raise UserError("torchrun: a probe runs in one process. Start it without torchrun.")
    check_writable(output, "output_dir")
    check_writable(cache, "features.cache_dir")
    if (output / RESULTS).exists() and not force:
        has = f"has the {RESULTS} of an earlier call"
        raise UserError(f"output_dir: {output} {has}. Name another folder, or replace them with --force.")


def _open_weights(
    path: Path | None, name: str | None, seed: int, sizes: Mapping[str, Any]
) -> tuple[Weights, dict[str, Any]]:
    """Read or draw weights, and describe them for results.json."""
    if path is None:
        assert name is not None  # checked with the config
        weights = random_weights(name, seed, **sizes)
        digest = tensors_digest(weights.tensors)
    else:
        if name is not None:
            log.info("ignored, because there are weights: model.name")
        with named_by("weights", path):
            weights = read_weights(path)
        digest = sha256(weights.path) + split_choice(path)[1]  # the name of one of several encoders
    shown = None if path is None else str(weights.path)
    return weights, {"path": shown, "sha256": digest, "format": weights.format, "random": path is None}


def _load_features(
    cache: Path,
    key: dict[str, Any],
    sources: Mapping[str, Source],
    check: Views | None,
    extract_one: Callable[[str], CachedFeatures],
) -> tuple[CachedFeatures, CachedFeatures]:
    keys = {name: key | {"data": data_digest(source, name)} for name, source in sources.items()}
    for name, source in sources.items():  # all data sets, before any image is encoded
        if check is not None and not is_cached(cache, name, keys[name]):
            refuse_broken(find_broken(source, range(len(source)), len(check.mean), check.bit_depth), f"data.{name}")
    train, val = (cached(cache, name, keys[name], partial(extract_one, name)) for name in ("train", "val"))
    return train, val
