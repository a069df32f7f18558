"""Convert any weight file to the layout of another program: read, plan, resample, write, check, move into place."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crossmae import __version__
from crossmae.checkpoints.conversion import TOLERANCE, proof, targets
from crossmae.checkpoints.conversion.proof import Proof
from crossmae.checkpoints.conversion.targets import NO_SUFFIX, TARGETS, ConversionPlan
from crossmae.checkpoints.formats.facts import ENCODER_FACTS, SET_OPTION, assumed_lines, condition
from crossmae.checkpoints.formats.huggingface import PREPROCESSOR
from crossmae.checkpoints.formats.keys import CLASS_ROW_ADDED
from crossmae.checkpoints.formats.timm_folder import is_timm_folder
from crossmae.checkpoints.load_report import LoadReport, Status
from crossmae.checkpoints.metadata import FORMAT, MODEL_ARGUMENTS, NORM_EPS_OF_PLAIN, marked
from crossmae.checkpoints.pretrained import RECORDED, with_metadata
from crossmae.checkpoints.provenance import provenance
from crossmae.checkpoints.reading.files import HUB_CONFIG, find_file, shards
from crossmae.checkpoints.resample import Channels, fit
from crossmae.checkpoints.run_checkpoint import MODEL
from crossmae.checkpoints.weights import Weights, encoder_part, plain_size, plain_tensors, read_weights
from crossmae.errors import UserError, shorten
from crossmae.files import (
    allow_reading,
    check_destination,
    check_writable,
    expand_path,
    name_write_errors,
    put_in_place,
    sync_file,
    sync_folder,
    temporary_folder,
    write_json,
)
from crossmae.files.leftovers import SHARED_SECONDS, sweep

HEAD_KEYS = ("classes", "class_names", "multi_label", "pool", "head", "crop_pct")  # metadata of a classification head
FIXED_POSITIONS = ("crossmae", "mae", "hf-vitmae")  # layouts whose models do not train their position embeddings
MOST_NAME_BYTES = 200  # longest name of a destination; the temporary name is longer
REPORT_SUFFIX = ".conversion.json"
FILE_SUFFIXES = (".safetensors", ".pth", ".pkl", ".pt", ".bin", ".npz")  # a destination with such a suffix is a file


@dataclass(frozen=True)
class Sizes:
    """New sizes of an encoder. None leaves a size unchanged.

    Attributes:
        img_size: image size in pixels, one number or (height, width).
        patch_size: side of a patch in pixels. Without `img_size`, the grid stays and the image size changes.
        channels: method for another number of channels, see `adapt_channels`; None means "repeat".
        window: side in patches of the attention windows that have relative positions.
    """

    img_size: int | tuple[int, int] | None = None
    patch_size: int | None = None
    in_chans: int | None = None
    channels: Channels | None = None
    window: int | None = None


@dataclass(frozen=True)
class ConversionRequest:
    """The input, output and options of a conversion.

    Attributes:
        source, ema, trust: see `read_weights`. The source is never changed.
        destination: file or folder to write. The suffix decides the kind of file, see `TARGETS`.
        given: arguments of the source model (`ViTEncoder` or `CrossMAE`) and `RECORDED` metadata, which neither the
            file nor its shapes show.
        encoder_only: drop decoder and heads.
        drop: regular expressions, matched from the start of a plain name. A matching tensor may be dropped although the
            encoder computes something else without the tensor.
        tolerance: largest difference allowed in the equality check, relative to the largest value.
        report: path of the report; None means next to the destination.
        force: overwrite an existing destination and report.
    """

    source: Path
    destination: Path
    to: str
    sizes: Sizes = field(default_factory=Sizes)
    given: Mapping[str, Any] = field(default_factory=dict)
    encoder_only: bool = False
    drop: tuple[str, ...] = ()
    tolerance: float = TOLERANCE
    report: str | Path | None = None
    ema: bool = False
    trust: bool = False
    force: bool = False

    @property
    def report_path(self) -> Path:
        """Path of the report."""
        if self.report:
            return expand_path(self.report, "--report")
        return self.destination.with_name(f"{self.destination.name}{REPORT_SUFFIX}")

    @property
    def is_folder(self) -> bool:
        """True if the destination is a folder."""
        return NO_SUFFIX in TARGETS[self.to].suffixes and self.destination.suffix not in FILE_SUFFIXES


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion, which the JSON report contains."""

    source: Path
    destination: Path
    to: str
    report: LoadReport
    proof: Proof
    metadata: dict[str, str]
    report_path: Path
    assumed: tuple[str, ...]
    beside: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Return the content of the JSON report."""
        return {
            "source": self.source.name,
            "destination": self.destination.name,
            "to": self.to,
            "converter_version": __version__,
            "proof": self.proof.record(),
            "assumed": list(self.assumed),
            "not_converted": list(self.beside),
            "summary": self.report.summary(),
            "tensors": [asdict(entry) for entry in self.report.entries],
            "metadata": self.metadata,
        }


def convert(source: str | Path, destination: str | Path, to: str, **options: Any) -> Conversion:
    """Convert a weight file. `options` are attributes of `ConversionRequest`.

    Every tensor of the source is converted, or dropped with a reason. The equality check then sends random images
    through the source encoder and through the written encoder, which runs in the target's library. If their tokens
    differ, the written file is deleted and an error is raised. If the target's library is not installed, the check
    cannot run: the file is kept unchecked, and the report says so.

    Raises:
        UserError: the conversion is not possible, or the tokens differ. No new file is left.
    """
    request = ConversionRequest(expand_path(source, "SRC"), expand_path(destination, "DST"), to, **options)
    check_request(request)
    weights = read_weights(request.source, ema=request.ema, trust=request.trust, img_size=request.given.get("img_size"))
    weights = with_metadata(weights, {key: value for key, value in request.given.items() if key in RECORDED})
    given = {key: value for key, value in request.given.items() if key not in RECORDED}
    planned = targets.plan(weights, to, encoder_only=request.encoder_only, drop=request.drop)
    if planned.refused:
        raise UserError(targets.describe_refusal(weights, planned))
    planned = targets.with_arguments(weights, planned, given)
    planned = _resample(weights, planned, request.sizes)
    if request.destination.suffix == ".pkl":
        halves = [name for name, tensor in planned.tensors.items() if tensor.dtype == torch.bfloat16]
        planned = _with_notes(planned, dict.fromkeys(halves, "bfloat16 to float32"), "used")
    planned = replace(planned, metadata=_metadata(weights, planned))
    with _new_files(request) as (temporary, temporary_report):
        names = TARGETS[planned.to].write(temporary, planned)
        entries = [replace(entry, targets=names.get(entry.plain, ())) for entry in planned.report.entries]
        proven = _prove(weights, planned, temporary, request.tolerance)
        if proven.ran and not proven.equal:
            what = "could not be proven to compute the same" if proven.reason else "computes something else"
            raise UserError(f"{weights.path}: the written file {what}. The file was deleted.", proven.sentence())
        done = Conversion(
            source=weights.path,
            destination=request.destination,
            to=to,
            report=replace(planned.report, entries=entries),
            proof=proven,
            metadata=planned.metadata,
            report_path=request.report_path,
            assumed=(*assumed_lines(planned.assumed, SET_OPTION), *_assumptions(weights, planned)),
            beside=weights.beside,
        )
        write_json(temporary_report, done.record())
        _commit(temporary, request.destination)
        _commit(temporary_report, request.report_path)
    return done


def check_request(request: ConversionRequest) -> None:
    """Check the arguments of a request before the source is read.

    Raises UserError if the target is unknown, or the destination or the report cannot be written.
    """
    destination, report, to = request.destination, request.report_path, request.to
    if to not in TARGETS:
        raise UserError(f"--to {to}: unknown format. Use one of {', '.join(TARGETS)}.")
    suffixes = TARGETS[to].suffixes
    if destination.suffix not in suffixes and not request.is_folder:
        known = " or ".join(suffix or "a folder, without a suffix" for suffix in suffixes)
        raise UserError(f"{destination}: --to {to} does not write files with this suffix. Use {known}.")
    file = find_file(request.source)
    theirs = {found.resolve() for found in (file, *shards(file))}
    for path, what in ((destination, "the destination"), (report, "the report")):
        if len(os.fsencode(path.name)) > MOST_NAME_BYTES or not path.name:
            raise UserError(f"{path}: not a name for {what}. Use at most {MOST_NAME_BYTES} bytes, and not only dots.")
        if path.resolve() in theirs | {parent for found in theirs for parent in found.parents}:
            raise UserError(f"{path}: is the source, or a folder that contains it. Choose another path for {what}.")
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: a link to a file that does not exist. Name another file as {what}.")
        check_writable(path.parent, str(path))
    if report.resolve() == destination.resolve() or destination.resolve() in report.resolve().parents:
        raise UserError(f"--report {report}: is the destination, or is in it. Name another file.")
    check_destination(report, force=request.force)
    if not (request.is_folder and destination.is_dir()):
        check_destination(destination, force=request.force)
        return
    held = sorted(entry.name for entry in destination.iterdir())
    if held and not request.force:
        raise UserError(f"{destination}: exists already. Name another folder, or overwrite it with --force.")
    if foreign := [name for name in held if name not in (HUB_CONFIG, MODEL, PREPROCESSOR)]:
        raise UserError(f"{destination}: has {shorten(foreign)}, which --force would delete. Name another folder.")


def _resample(weights: Weights, planned: ConversionPlan, sizes: Sizes) -> ConversionPlan:
    if sizes.channels and sizes.in_chans in (None, planned.arguments["in_chans"]):
        raise UserError(f"--channels {sizes.channels}: has no effect, the number of channels stays. Leave it out.")
    try:
        wanted = {key: value for key, value in asdict(sizes).items() if value is not None and key != "channels"}
        if wanted:
            how: Channels = sizes.channels or "repeat"
            fixed = planned.to in FIXED_POSITIONS
            tensors, notes, arguments = fit(planned.tensors, planned.arguments, wanted, channels=how, fixed=fixed)
            planned = _with_notes(replace(planned, tensors=tensors, arguments=arguments), notes, "resampled")
        targets.check_square(planned.to, planned.arguments)
    except UserError as error:
        raise UserError(f"{weights.path}: {error}") from None
    return planned


def _with_notes(planned: ConversionPlan, notes: Mapping[str, str], status: Status) -> ConversionPlan:
    entries = []
    for entry in planned.report.entries:
        if entry.status == "used" and entry.plain in notes:
            reason, shape = (
                ", ".join(filter(None, (entry.reason, notes[entry.plain]))),
                planned.tensors[entry.plain].shape,
            )
            entry = replace(entry, status=status, reason=reason, model_shape=tuple(shape))
        entries.append(entry)
    return replace(planned, report=replace(planned.report, entries=entries))


def _metadata(weights: Weights, planned: ConversionPlan) -> dict[str, str]:
    metadata = provenance(weights)
    if not any(name.startswith("head.") for name in planned.tensors):
        metadata = {key: value for key, value in metadata.items() if key not in HEAD_KEYS}
    # transformers and timm require the value "pt" under this key. Other files have the layout.
    layout = "pt" if planned.to in ("timm", "hf-vit", "hf-vitmae") else planned.to
    model = {FORMAT: layout, MODEL_ARGUMENTS: json.dumps(planned.arguments)}
    return metadata | model | marked(planned.assumed)


def _assumptions(weights: Weights, planned: ConversionPlan) -> Iterator[str]:
    if any(CLASS_ROW_ADDED in note for note in weights.notes.values()):
        yield (
            f"positions of {plain_size(planned.arguments['img_size'])} pixels, without a row for the class token. A "
            "grid that is not square may have as many rows: --set 'img_size=[HEIGHT,WIDTH]' gives its sides"
        )
    if planned.norm_eps != NORM_EPS_OF_PLAIN and not planned.to.startswith("hf-"):
        yield (
            f"the layer norms of the source have an epsilon of {planned.norm_eps:g}, the layer norms of {planned.to} "
            f"one of {NORM_EPS_OF_PLAIN:g}. The proof uses the epsilon of the source"
        )


def _prove(weights: Weights, planned: ConversionPlan, written: Path, tolerance: float) -> Proof:
    encoder, arguments, eps = encoder_part(planned.tensors), planned.arguments, {"norm_eps": planned.norm_eps}
    whole = encoder_part(plain_tensors(weights))
    if "cls_token" not in encoder:
        whole.pop("cls_token", None)
    dropped = {entry.plain for entry in planned.report.entries if targets.ASKED_TO_DROP in entry.reason}
    lost = sorted(dropped | set(whole) - set(encoder))
    changed = bool(planned.report.names("resampled"))
    words = ["all tokens" if "cls_token" in encoder else "patch tokens, without a class token"]
    if changed:
        words.append("after resampling")
    if any("layer scale" in note for note in weights.notes.values()) and not is_timm_folder(weights.path):
        words.append("layer scale folded in on both sides")
    if lost:
        words.append(f"without {shorten(lost)}")

    tensors, layout = (encoder, "") if changed or lost else (whole, weights.layout)
    source = partial(proof.source_encoder, weights.path, layout, tensors, arguments, **eps)
    target = partial(proof.file_encoder, written, planned.to, arguments, **eps)
    sizes, channels = proof.image_size(encoder, arguments), arguments["in_chans"]
    proven = proof.prove(source, target, size=sizes, in_chans=channels, what=", ".join(words), tolerance=tolerance)
    taken = condition({key: fact for key, fact in planned.assumed.items() if key in ENCODER_FACTS})
    return replace(proven, what=", ".join(filter(None, (proven.what, taken))))


@contextmanager
def _new_files(request: ConversionRequest) -> Iterator[tuple[Path, Path]]:
    """Yield temporary paths for the destination and the report.

    The names stay the same, in hidden folders that are removed at the end. Raises WriteError if a file cannot be
    written.
    """
    targets = [path.absolute() for path in (request.destination, request.report_path)]
    made = [folder for path in targets for folder in path.parents if not folder.exists()]
    try:
        for path in targets:
            with name_write_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
        sweep(targets[0].parent, depth=0, min_age=SHARED_SECONDS)
        # The inner folder is that of the destination, because errors without a name count as errors of the inner one.
        with temporary_folder(targets[1]) as report_place, temporary_folder(targets[0]) as place:
            if request.is_folder:
                (place / targets[0].name).mkdir()
            yield place / targets[0].name, report_place / targets[1].name
    finally:
        for folder in made:  # the innermost folder first; folders that are not empty stay
            with suppress(OSError):
                folder.rmdir()


def _commit(temporary: Path, destination: Path) -> None:
    """Move a file or folder to the destination, replacing an existing one."""
    for path in (path for path in (temporary, *temporary.glob("*")) if path.is_file()):
        allow_reading(path)
        sync_file(path)
    if temporary.is_dir():
        put_in_place(temporary, destination.absolute())
    else:
        os.replace(temporary, destination)
        sync_folder(destination.absolute().parent)
