"""From any weight file to the layout of another program: read, place every tensor, resample, write, prove, commit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from crossmae import __version__
from crossmae.checkpoints.conversion.planning import (
    ASKED_TO_DROP,
    Plan,
    check_square,
    plan,
    refusal_of,
    source_arguments,
)
from crossmae.checkpoints.conversion.proof import (
    TOLERANCE,
    Encoder,
    Proof,
    detectron2_encoder,
    file_encoder,
    image_size,
    plain_encoder,
    prove,
    source_encoder,
)
from crossmae.checkpoints.conversion.targets import (
    CONFIG,
    FOLDER,
    PREPROCESSOR,
    TARGETS,
    TENSORS,
    Content,
)
from crossmae.checkpoints.formats.keys import CLASS_ROW_ADDED
from crossmae.checkpoints.formats.timm_folder import is_timm_folder
from crossmae.checkpoints.metadata import FORMAT, MODEL_ARGUMENTS, NORM_EPS, NORM_EPS_OF_PLAIN
from crossmae.checkpoints.provenance import provenance
from crossmae.checkpoints.reading.files import find_file, shards
from crossmae.checkpoints.report import LoadReport, Status
from crossmae.checkpoints.resample import RELATIVE, Channels, fit
from crossmae.checkpoints.weights import Weights, encoder_part, encoder_tensors, plain_size, plain_tensors, read_weights
from crossmae.errors import UserError, shorten
from crossmae.files import allow_reading, check_destination, check_writable, sync_folder, write_json

OF_A_HEAD = ("classes", "class_names", "multi_label", "pool", "head", "crop_pct")  # keys of the metadata
FIXED_POSITIONS = ("crossmae", "mae", "hf-vitmae")  # layouts whose models do not train their position table
MAX_NAME = 200  # bytes of a destination's name: a temporary one beside it is longer
REPORT_SUFFIX = ".conversion.json"
FILE_SUFFIXES = (".safetensors", ".pth", ".pkl", ".pt", ".bin", ".npz")  # that no folder has


@dataclass(frozen=True)
class Conversion:
    """What a conversion did. The same is in the JSON file beside the destination."""

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
        """For a JSON file: every tensor with its fate, the proof, and where the weights come from."""
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


@dataclass(frozen=True)
class Sizes:
    """What the encoder is to have instead of its own sizes; None is left as it is.

    Attributes:
        img_size: pixels, one number or (height, width), that positions are for.
        patch_size: pixels. Without `img_size` the grid of patches stays, and the image grows along.
        in_chans: channels of the input.
        channels: how filters for other channels are made, see `adapt_channels`; None is "repeat".
        window: side in patches of the windows of relative positions.
    """

    img_size: int | tuple[int, int] | None = None
    patch_size: int | None = None
    in_chans: int | None = None
    channels: Channels | None = None
    window: int | None = None

    def wanted(self) -> dict[str, Any]:
        """Those that are given."""
        return {key: value for key, value in asdict(self).items() if value is not None and key != "channels"}


def convert(
    source: str | Path,
    destination: str | Path,
    to: str,
    *,
    sizes: Sizes | None = None,
    given: Mapping[str, Any] | None = None,
    encoder_only: bool = False,
    drop: tuple[str, ...] = (),
    tolerance: float = TOLERANCE,
    report: str | Path | None = None,
    ema: bool = False,
    trust: bool = False,
    force: bool = False,
) -> Conversion:
    """Convert a weight file.

    Every tensor of the source has a place in the target or a reason why not. Nothing is written unless the encoder of
    the written file, in its own library, gives the same tokens as the source's for a random image; where that library
    is not installed, the proof says so.

    Args:
        source: see `read_weights`. It is never changed.
        destination: a file or folder to write; its suffix says which kind, see `TARGETS`.
        to: one of `TARGETS`.
        sizes: resample to these.
        given: arguments of the source's model (`ViTEncoder`, `CrossMAE`) that neither the file nor its shapes tell.
        encoder_only: leave decoder and heads behind.
        drop: regular expressions, matched from the start of a plain name, for tensors that may be left behind although
            the encoder computes something else without them.
        tolerance: of the proof, over the largest value.
        report: where the JSON of the conversion goes; None: beside the destination.
        ema: take the moving average in the file.
        trust: unpickle whatever the file refers to. That can run any code.
        force: overwrite.

    Raises:
        UserError: whatever keeps it from being done; nothing was written.
    """
    source, destination, given = Path(source).expanduser(), Path(destination).expanduser(), dict(given or {})
    report_path = Path(report).expanduser() if report else report_beside(destination)
    sizes = sizes or Sizes()
    check_conversion(source, destination, to, report_path, force=force)
    weights = read_weights(source, ema=ema, trust=trust, img_size=given.get("img_size"))
    planned = plan(weights, to, encoder_only=encoder_only, drop=drop)
    if planned.refused:
        raise UserError(refusal_of(weights, to, planned))
    content, planned, assumed = _content(weights, to, planned, sizes, given, destination.suffix)
    with _new_files(destination, report_path) as (temporary, temporary_report):
        names = _write(to, temporary, content)
        entries = [replace(entry, targets=names.get(entry.plain, ())) for entry in planned.report.entries]
        table = LoadReport(str(weights.path), to, entries)
        _check_complete(table, weights, names)
        proof = _prove(weights, content, planned, to, temporary, tolerance)
        if proof.ran and not proof.equal:
            what = "could not be proven to compute the same" if proof.reason else "computes something else"
            raise UserError(f"{weights.path}: what was written {what}, and is gone.\n{proof.sentence()}")
        done = Conversion(
            source=weights.path,
            destination=destination,
            to=to,
            report=table,
            proof=proof,
            metadata=content.metadata,
            report_path=report_path,
            assumed=assumed,
            beside=weights.beside,
        )
        write_json(temporary_report, done.record())
        _commit(temporary, destination)
        _commit(temporary_report, report_path)
    return done


def check_conversion(source: Path, destination: Path, to: str, report: Path, *, force: bool = False) -> None:
    """Whatever can be known before a large file is read.

    Raises:
        UserError: unknown target, a suffix it does not write, or something that must not, or can not, be written.
    """
    if to not in TARGETS:
        raise UserError(f"--to {to}: unknown format; known: {', '.join(TARGETS)}")
    suffixes = TARGETS[to].suffixes
    folder = FOLDER in suffixes and destination.suffix not in FILE_SUFFIXES
    if destination.suffix not in suffixes and not folder:
        files = [suffix for suffix in suffixes if suffix != FOLDER]
        known = " or ".join(filter(None, ("a folder, without a suffix" * (FOLDER in suffixes), ", ".join(files))))
        raise UserError(f"{destination}: the suffix says the kind of file to write; for --to {to}: {known}")
    file = find_file(source)
    for path, what in ((destination, "the destination"), (report, "the report")):
        if len(os.fsencode(path.name)) > MAX_NAME or not path.name:
            raise UserError(f"{path}: not a name for {what}; at most {MAX_NAME} bytes, and not only dots")
        theirs = {found.resolve() for found in (file, *shards(file))}
        if path.resolve() in theirs | {parent for found in theirs for parent in found.parents}:
            raise UserError(f"{path}: is, or holds, the source, which is never touched; name another file as {what}")
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: a link to nowhere; name another file as {what}")
        check_writable(path.parent, str(path))
    if report.resolve() == destination.resolve() or destination.resolve() in report.resolve().parents:
        raise UserError(f"--report {report}: is, or is in, the destination; name another file")
    check_destination(report, force=force)
    if folder and destination.is_dir():
        _check_folder(destination, force)
    else:
        check_destination(destination, force=force)


def _check_folder(destination: Path, force: bool) -> None:
    """A folder may be replaced by --force, but for files in it that are not ours to replace."""
    if any(destination.iterdir()) and not force:
        raise UserError(f"{destination}: exists already and is left as it is; name another folder, or use --force")
    ours = (CONFIG, TENSORS, PREPROCESSOR)
    foreign = sorted(entry.name for entry in destination.iterdir() if entry.name not in ours)
    if foreign:
        raise UserError(
            f"{destination}: holds {', '.join(foreign[:3])}, which --force would delete; name another folder"
        )


def report_beside(destination: Path) -> Path:
    """`backbone.pth` has its report in `backbone.pth.conversion.json`, a folder in the one beside it."""
    return destination.with_name(f"{destination.name}{REPORT_SUFFIX}")


def _content(
    weights: Weights, to: str, planned: Plan, sizes: Sizes, given: dict[str, Any], suffix: str
) -> tuple[Content, Plan, tuple[str, ...]]:
    """Everything that is written, resampled; the plan that says so; and what was assumed."""
    arguments, assumed = source_arguments(weights, planned, given)
    fitted = planned.tensors
    if sizes.channels and sizes.in_chans in (None, arguments["in_chans"]):
        raise UserError(f"--channels {sizes.channels}: in vain, the number of channels stays; leave that out")
    if wanted := sizes.wanted():
        try:
            fixed = to in FIXED_POSITIONS
            how: Channels = sizes.channels or "repeat"
            fitted, notes, arguments = fit(planned.tensors, arguments, wanted, channels=how, fixed=fixed)
        except UserError as error:
            raise UserError(f"{weights.path}: {error}") from None
        planned = replace(planned, report=_with_notes(planned.report, notes, fitted))
    try:
        check_square(to, arguments)
    except UserError as error:
        raise UserError(f"{weights.path}: {error}; --img-size resamples them") from None
    if suffix == ".pkl":
        halves = {name: "bfloat16 to float32" for name, tensor in fitted.items() if tensor.dtype == torch.bfloat16}
        planned = replace(planned, report=_with_notes(planned.report, halves, fitted, "used"))
    metadata = provenance(weights)
    if not any(name.startswith("head.") for name in fitted):
        metadata = {key: value for key, value in metadata.items() if key not in OF_A_HEAD}
    # transformers and timm look for "pt" where ours say the layout.
    metadata |= {FORMAT: "pt" if to in ("timm", "hf-vit", "hf-vitmae") else to, MODEL_ARGUMENTS: json.dumps(arguments)}
    content = Content(fitted, arguments, metadata, float(metadata.get(NORM_EPS, NORM_EPS_OF_PLAIN)))
    if any(CLASS_ROW_ADDED in note for note in weights.notes.values()):
        assumed += (
            f"positions of {plain_size(arguments['img_size'])} pixels, without one of the class token; a grid that is "
            "not square may have as many rows: --set 'img_size=[HEIGHT,WIDTH]' says so",
        )
    if content.norm_eps != NORM_EPS_OF_PLAIN and not to.startswith("hf-"):
        assumed += (
            f"the layer norms of the source have an epsilon of {content.norm_eps:g}, those of {to} one of "
            f"{NORM_EPS_OF_PLAIN:g}; the proof is with the source's",
        )
    return content, planned, assumed


def _with_notes(
    report: LoadReport, notes: Mapping[str, str], tensors: Mapping[str, Tensor], status: Status = "resampled"
) -> LoadReport:
    entries = []
    for entry in report.entries:
        if entry.status == "used" and entry.plain in notes:
            reason = "; ".join(filter(None, (entry.reason, notes[entry.plain])))
            shape = tuple(tensors[entry.plain].shape)
            entry = replace(entry, status=status, reason=reason, model_shape=shape)
        entries.append(entry)
    return LoadReport(report.source, report.target, entries)


def _check_complete(table: LoadReport, weights: Weights, names: Mapping[str, tuple[str, ...]]) -> None:
    """Every tensor of the source and of the target is in the table, once."""
    listed = [entry.name for entry in table.entries if entry.status != "new"]
    written = {entry.plain for entry in table.entries if entry.status != "dropped"}
    if sorted(listed) != sorted(weights.tensors) or written != names.keys():
        odd = sorted(set(listed) ^ set(weights.tensors) | (written ^ names.keys()))
        raise UserError(f"{weights.path}: not accounted for in the conversion: {', '.join(odd)}; nothing was kept")


def _prove(weights: Weights, content: Content, planned: Plan, to: str, written: Path, tolerance: float) -> Proof:
    """The same image through the source's encoder and that of the written file."""
    encoder, arguments = encoder_part(content.tensors), content.arguments
    class_token = "cls_token" in encoder
    whole = encoder_part(plain_tensors(weights))
    dropped = {entry.plain for entry in planned.report.entries if ASKED_TO_DROP in entry.reason}
    lost = sorted(dropped | set(whole) - set(encoder) - {"cls_token"})
    changed = [entry.plain for entry in planned.report.entries if entry.status == "resampled"]
    folded = any("layer scale" in note for note in weights.notes.values()) and not is_timm_folder(weights.path)
    words = [
        "all tokens" if class_token else "patch tokens, without a class token",
        "after resampling" * bool(changed),
        "layer scale folded in on both sides" * folded,
        f"without {shorten(lost)}" * bool(lost),
    ]
    relative = any(RELATIVE.fullmatch(name) for name in encoder)

    def source() -> Encoder:
        if not (changed or lost):
            left = () if class_token else ("cls_token",)
            tensors = {name: tensor for name, tensor in whole.items() if name not in left}
            path, eps = weights.path, content.norm_eps
            return source_encoder(path, weights.layout, tensors, arguments, norm_eps=eps, class_token=class_token)
        make = detectron2_encoder if relative else plain_encoder
        options = {} if relative else {"class_token": class_token}
        return make(encoder, arguments, norm_eps=content.norm_eps, **options)

    def target() -> Encoder:
        if class_token or to == "timm" or to == "detectron2":
            return file_encoder(written, to, arguments, norm_eps=content.norm_eps)
        # our own encoder has a class token always; what starts from such a file makes a new one
        kept = encoder_tensors(read_weights(written))
        return plain_encoder(kept, arguments, norm_eps=content.norm_eps, class_token=False)

    return prove(
        source,
        target,
        size=image_size(encoder, arguments),
        in_chans=arguments["in_chans"],
        what=", ".join(filter(None, words)),
        tolerance=tolerance,
    )


@contextmanager
def _new_files(destination: Path, report: Path) -> Iterator[tuple[Path, Path]]:
    """Paths of the same names in hidden folders beside them, which are gone in the end."""
    made = [folder for path in (destination, report) for folder in path.absolute().parents if not folder.exists()]
    hidden = f".{os.getpid()}.tmp"
    temporary = [path.absolute().parent / f".{path.name}{hidden}" / path.name for path in (destination, report)]
    try:
        for path in temporary:
            path.parent.mkdir(parents=True)
        if destination.suffix not in FILE_SUFFIXES:
            temporary[0].mkdir()
        yield temporary[0], temporary[1]
    except OSError as error:
        raise UserError(f"{destination}: can not be written: {error.strerror or error}") from None
    finally:
        for path in temporary:
            shutil.rmtree(path.parent, ignore_errors=True)
        for folder in made:  # the innermost first; those that hold something by now stay
            with suppress(OSError):
                folder.rmdir()


def _write(to: str, path: Path, content: Content) -> dict[str, tuple[str, ...]]:
    """Write, and give the files the rights that new ones have."""
    try:
        names = TARGETS[to].write(path, content)
    except (SafetensorError, RuntimeError) as error:  # what safetensors and torch make of a full disk
        raise UserError(f"{path.name}: can not be written: {' '.join(str(error).split())[:200]}") from None
    for file in [path, *path.glob("*")]:
        if file.is_file():
            allow_reading(file)
    return names


def _commit(temporary: Path, destination: Path) -> None:
    """Put what was written and proven in its place: a file in one step, a folder in two, the old one aside."""
    for path in [temporary, *temporary.glob("*")]:
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if not destination.is_dir():
        os.replace(temporary, destination)
    else:
        old = temporary.with_name("old")
        destination.rename(old)
        try:
            os.replace(temporary, destination)
        except BaseException:
            old.rename(destination)
            raise
    sync_folder(destination.absolute().parent)
