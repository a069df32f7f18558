"""From any weight file to the layout of another program: read, place every tensor, resample, write, prove, commit."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from crossmae import __version__
from crossmae.checkpoints.keys import not_plain
from crossmae.checkpoints.loading import OUTSIDE
from crossmae.checkpoints.metadata import FORMAT, MODEL_ARGUMENTS, NORM_EPS, recorded_arguments
from crossmae.checkpoints.proof import (
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
from crossmae.checkpoints.provenance import provenance
from crossmae.checkpoints.report import Entry, LoadReport
from crossmae.checkpoints.resample import Channels, fit
from crossmae.checkpoints.targets import (
    CONFIG,
    FOLDER,
    PREPROCESSOR,
    RELATIVE,
    TARGETS,
    TENSORS,
    Content,
    Head,
    missing_norm,
    refusal,
)
from crossmae.checkpoints.weights import (
    Weights,
    check_destination,
    encoder_arguments,
    encoder_home,
    encoder_tensors,
    read_weights,
)
from crossmae.errors import UserError
from crossmae.files import sync_folder, write_json
from crossmae.model import CrossMAE
from crossmae.pretrained import arguments_of
from crossmae.vit import ENCODER_PREFIXES, ViTEncoder

OF_A_HEAD = ("classes", "class_names", "multi_label", "pool", "head", "crop_pct")  # keys of the metadata
FIXED_POSITIONS = ("crossmae", "mae", "hf-vitmae")  # layouts whose models do not train their position table
NORM_EPS_OF_PLAIN = 1e-6  # what timm, detectron2's ViTDet and this toolkit have in their layer norms
REPORT_SUFFIX = ".conversion.json"
FILE_SUFFIXES = (".safetensors", ".pth", ".pkl", ".pt", ".bin", ".npz")  # that no folder has
ENCODER_ARGUMENTS = set(inspect.signature(ViTEncoder).parameters)
MODEL_DEFAULTS = {key: parameter.default for key, parameter in inspect.signature(CrossMAE).parameters.items()}


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
        channels: how filters for other channels are made, see `adapt_channels`.
        window: side in patches of the windows of relative positions.
    """

    img_size: int | tuple[int, int] | None = None
    patch_size: int | None = None
    in_chans: int | None = None
    channels: Channels = "repeat"
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
    source, destination = Path(source).expanduser(), Path(destination).expanduser()
    report_path = Path(report).expanduser() if report else report_beside(destination)
    check_conversion(source, destination, to, force=force)
    check_destination(report_path, force=force)
    weights = read_weights(source, ema=ema, trust=trust)
    planned = plan(weights, to, encoder_only=encoder_only, drop=drop)
    if planned.refused:
        raise UserError(_refusal(weights, to, planned))
    content, planned, assumed = _content(weights, to, planned, sizes or Sizes(), dict(given or {}))
    with _new_files(destination) as temporary:
        names = TARGETS[to].write(temporary, content)
        entries = [replace(entry, targets=names.get(entry.plain, ())) for entry in planned.report.entries]
        table = LoadReport(str(weights.path), to, entries)
        _check_complete(table, weights, names)
        proof = _prove(weights, content, planned, to, temporary, tolerance)
        if proof.ran and not proof.equal:
            raise UserError(
                f"{weights.path}: what was written computes something else, and is gone.\n{proof.sentence()}"
            )
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
        _commit(temporary, destination)
    write_json(report_path, done.record())
    return done


def check_conversion(source: Path, destination: Path, to: str, *, force: bool = False) -> None:
    """Whatever can be known before a large file is read.

    Raises:
        UserError: unknown target, a suffix it does not write, or a destination that must not be written.
    """
    if to not in TARGETS:
        raise UserError(f"--to {to}: unknown format; known: {', '.join(TARGETS)}")
    suffixes = TARGETS[to].suffixes
    if destination.suffix not in suffixes and not (FOLDER in suffixes and destination.suffix not in FILE_SUFFIXES):
        known = ", ".join(suffix or "none (a folder)" for suffix in suffixes)
        raise UserError(f"{destination}: the suffix says the kind of file to write; for --to {to} one of {known}")
    if destination.exists() and source.exists() and destination.samefile(source):
        raise UserError(f"{destination}: source and destination are the same; the source is never touched")
    if destination.absolute() in source.absolute().parents:
        raise UserError(f"{destination}: holds the source, which is never touched")
    if not (destination.is_dir() and FOLDER in suffixes):
        return check_destination(destination, force=force)
    if any(destination.iterdir()) and not force:
        raise UserError(f"{destination}: exists already and is left as it is; name another folder, or use --force")
    foreign = sorted(entry.name for entry in destination.iterdir() if entry.name not in (CONFIG, TENSORS, PREPROCESSOR))
    if foreign:
        raise UserError(
            f"{destination}: holds {', '.join(foreign[:3])}, which --force would delete; name another folder"
        )
    return None


def report_beside(destination: Path) -> Path:
    """`backbone.pth` has its report in `backbone.conversion.json`, a folder in the one beside it."""
    return destination.with_name(f"{destination.stem if destination.suffix else destination.name}{REPORT_SUFFIX}")


@dataclass(frozen=True)
class Plan:
    """Where every tensor of a source goes.

    Attributes:
        tensors: what the target holds, under plain names.
        report: every tensor of the source, and what the target gets beside them.
        refused: plain names of tensors without a place, without which the encoder would compute something else.
        whole: a whole pretraining model goes over, its decoder included.
    """

    tensors: dict[str, Tensor]
    report: LoadReport
    refused: tuple[str, ...]
    whole: bool


def plan(weights: Weights, to: str, *, encoder_only: bool = False, drop: tuple[str, ...] = ()) -> Plan:
    """Decide what becomes of every tensor; works on meta tensors, that is from the header of a file.

    Raises:
        UserError: no encoder in the file, or one without what the target needs.
    """
    encoder_tensors(weights)  # raises where there is none
    target, home = TARGETS[to], encoder_home(weights.tensors) or ""
    plain = {name.removeprefix(home): tensor for name, tensor in weights.tensors.items() if name.startswith(home)}
    if target.class_token == "required" and "cls_token" not in plain:
        raise UserError(f"{weights.path}: holds no class token, and {to} has none of its own to put there")
    content, head = "encoder" if encoder_only else weights.format, _head(plain)
    kept: dict[str, Tensor] = {}
    report, refused = LoadReport(str(weights.path), to), []
    for name, tensor in weights.tensors.items():
        inside = name.removeprefix(home)
        reason, harmless = (OUTSIDE, True) if not name.startswith(home) else refusal(target, inside, content, head)
        if name.startswith(home) and any(re.match(pattern, inside) for pattern in drop):
            reason, harmless = "left behind as asked with --drop", True
        if not reason and encoder_only and inside.startswith(("fc_norm.", "head.")):
            reason = "a head, where the encoder alone was asked for"
        if reason:
            refused += [] if harmless else [inside]
        else:
            kept[inside] = tensor
        report.entries.append(_entry(weights, name, inside, tensor, reason, harmless))
    if to == "timm":
        _as_timm(kept, report)
    new = missing_norm(target, kept)
    for name, tensor in new.items():
        shape = tuple(tensor.shape)
        entry = Entry(name, "new", "the source has no final norm: scale 1, shift 0", model_shape=shape, plain=name)
        report.entries.append(entry)
    return Plan(kept | new, report, tuple(refused), any(name.startswith("decoder_") for name in kept))


def _entry(weights: Weights, name: str, plain: str, tensor: Tensor, reason: str, harmless: bool) -> Entry:
    shape, sources = tuple(tensor.shape), weights.sources.get(name, (name,))
    if reason:
        return Entry(name, "dropped", reason, shape, None, harmless, plain, sources)
    return Entry(name, "used", weights.notes.get(name, ""), shape, shape, True, plain, sources)


def _as_timm(kept: dict[str, Tensor], report: LoadReport) -> None:
    """timm's model with `fc_norm` has no `norm`; the one without class token has no row for it."""
    for index, entry in enumerate(report.entries):
        if entry.status != "used":
            continue
        if entry.plain in ("norm.weight", "norm.bias") and "fc_norm.weight" in kept:
            del kept[entry.plain]
            report.entries[index] = replace(entry, status="dropped", reason="average pooling has no norm before it")
        if entry.plain == "pos_embed" and "cls_token" not in kept:
            report.entries[index] = replace(entry, reason="without the row of the class token, which is not there")


def _head(plain: Mapping[str, Tensor]) -> Head | None:
    """Which classification head there is, by the norm before it (method specification, section 1.3)."""
    if "head.1.weight" in plain:
        return "batchnorm"
    if "head.weight" not in plain:
        return None
    return "avg" if "fc_norm.weight" in plain else "cls"


def _refusal(weights: Weights, to: str, planned: Plan) -> str:
    """Why nothing is converted, with the words that would convert it nevertheless."""
    kinds = [kind for kind in not_plain(weights.tensors) if any(name in kind for name in planned.refused)]
    patterns = sorted({re.sub(r"\d+", r"\\d+", name.replace(".", r"\.")) for name in planned.refused})
    words = " ".join(f"--drop '{pattern}'" for pattern in patterns)
    what = "; ".join(kinds) or f"{', '.join(planned.refused[:3])}: no place in {to}"
    return (
        f"{weights.path}: can not become {to}: {what}. Without that the encoder computes something else; to leave it "
        f"behind nevertheless, add {words}\n{planned.report.table()}"
    )


def _content(
    weights: Weights, to: str, planned: Plan, sizes: Sizes, given: dict[str, Any]
) -> tuple[Content, Plan, tuple[str, ...]]:
    """Everything that is written, resampled; the plan that says so; and what was assumed."""
    arguments, assumed = _arguments(weights, planned, given)
    fitted = planned.tensors
    if wanted := sizes.wanted():
        try:
            fixed = to in FIXED_POSITIONS
            fitted, notes, arguments = fit(planned.tensors, arguments, wanted, channels=sizes.channels, fixed=fixed)
        except UserError as error:
            raise UserError(f"{weights.path}: {error}") from None
        planned = replace(planned, report=_with_notes(planned.report, notes, fitted))
    metadata = provenance(weights)
    if not any(name.startswith("head.") for name in fitted):
        metadata = {key: value for key, value in metadata.items() if key not in OF_A_HEAD}
    # transformers and timm look for "pt" where ours say the layout.
    metadata |= {FORMAT: "pt" if to in ("timm", "hf-vit", "hf-vitmae") else to, MODEL_ARGUMENTS: json.dumps(arguments)}
    content = Content(fitted, arguments, metadata, float(metadata.get(NORM_EPS, "1e-6")))
    if content.norm_eps != NORM_EPS_OF_PLAIN and not to.startswith("hf-"):
        assumed += (
            f"the layer norms of the source have an epsilon of {content.norm_eps:g}, those of {to} one of "
            f"{NORM_EPS_OF_PLAIN:g} unless told otherwise; the proof is with the source's",
        )
    return content, planned, assumed


def _with_notes(report: LoadReport, notes: Mapping[str, str], tensors: Mapping[str, Tensor]) -> LoadReport:
    entries = []
    for entry in report.entries:
        if entry.status == "used" and entry.plain in notes:
            reason = "; ".join(filter(None, (entry.reason, notes[entry.plain])))
            shape = tuple(tensors[entry.plain].shape)
            entry = replace(entry, status="resampled", reason=reason, model_shape=shape)
        entries.append(entry)
    return LoadReport(report.source, report.target, entries)


def _arguments(weights: Weights, planned: Plan, given: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The constructor arguments that the source has, of the whole model or of its encoder, and what was assumed."""
    encoder = _encoder(planned.tensors)
    try:
        found = encoder_arguments(encoder, weights.metadata)
        if planned.whole:
            arguments, assumed = arguments_of(weights, given)
            return MODEL_DEFAULTS | found | arguments, tuple(assumed)
    except UserError as error:
        raise UserError(f"{weights.path}: {error}") from None
    recorded = recorded_arguments(weights.metadata)
    wrong = [
        key for key in given if key in found and found[key] != given[key] and (key != "num_heads" or key in recorded)
    ]
    if unknown := sorted(given.keys() - set(MODEL_DEFAULTS)):
        raise UserError(f"--set {', '.join(unknown)}: no argument of the model; known: {', '.join(MODEL_DEFAULTS)}")
    if wrong:
        names = ", ".join(wrong)
        raise UserError(f"{weights.path}: --set {names}: the file says otherwise")
    missing = [key for key in ("img_size", "num_heads") if key not in found | given]
    if missing:
        words = {"img_size": "'img_size=[HEIGHT,WIDTH]'", "num_heads": "num_heads=N"}
        raise UserError(
            f"{weights.path}: neither its shapes nor its record tell {' and '.join(missing)} of the encoder; "
            f"add --set {' '.join(words[key] for key in missing)}"
        )
    guessed = "num_heads" not in recorded | given
    sentence = f"{found.get('num_heads')} attention heads, as in the published models of this width"
    known = found | {key: value for key, value in given.items() if key in ENCODER_ARGUMENTS}
    return known, (sentence,) if guessed else ()


def _encoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(ENCODER_PREFIXES)}


def _check_complete(table: LoadReport, weights: Weights, names: Mapping[str, tuple[str, ...]]) -> None:
    """Every tensor of the source and of the target is in the table, once."""
    listed = [entry.name for entry in table.entries if entry.status != "new"]
    written = {entry.plain for entry in table.entries if entry.status != "dropped"}
    if sorted(listed) != sorted(weights.tensors) or written != names.keys():
        odd = sorted(set(listed) ^ set(weights.tensors) | (written ^ names.keys()))
        raise UserError(f"{weights.path}: not accounted for in the conversion: {', '.join(odd)}; nothing was kept")


def _prove(weights: Weights, content: Content, planned: Plan, to: str, written: Path, tolerance: float) -> Proof:
    """The same image through the source's encoder and that of the written file."""
    encoder, arguments = _encoder(content.tensors), content.arguments
    class_token = "cls_token" in encoder
    home = encoder_home(weights.tensors) or ""
    whole = {name.removeprefix(home): tensor for name, tensor in weights.tensors.items() if name.startswith(home)}
    lost = sorted(set(_encoder(whole)) - set(encoder) - {"cls_token"})
    changed = [entry.plain for entry in planned.report.entries if entry.status == "resampled"]
    what = "all tokens" if class_token else "patch tokens, without a class token,"
    what += ", after resampling," if changed else ""
    what += f", without {', '.join(lost[:2])}{'...' if lost[2:] else ''}," if lost else ""
    relative = any(RELATIVE.match(name) for name in encoder)

    def source() -> Encoder:
        if not (changed or lost):
            tensors = {name: tensor for name, tensor in _encoder(whole).items() if class_token or name != "cls_token"}
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
        what=what,
        tolerance=tolerance,
    )


@contextmanager
def _new_files(destination: Path) -> Iterator[Path]:
    """A path of the destination's name in a hidden folder beside it, which is gone in the end."""
    folder = destination.absolute().parent / f".{destination.name[:40]}.{os.getpid()}.tmp"
    temporary = folder / destination.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if destination.suffix not in FILE_SUFFIXES:
            temporary.mkdir()
        yield temporary
    except OSError as error:
        raise UserError(f"{destination}: can not be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _commit(temporary: Path, destination: Path) -> None:
    """Put what was written and proven in its place, in one step."""
    for path in [temporary, *temporary.glob("*")]:
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if destination.is_dir():  # a folder can not be renamed over one that holds something
        destination.rename(temporary.with_name("old"))
    os.replace(temporary, destination)
    sync_folder(destination.absolute().parent)
