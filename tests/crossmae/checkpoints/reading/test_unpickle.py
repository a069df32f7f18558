"""Proves that pickles of plain data and arrays are read as Python reads them, that nothing else in them is ever run,
and that no pickle of a few bytes takes long or much memory."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import struct
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crossmae.checkpoints.reading.unpickle import read_numpy_pickle
from crossmae.checkpoints.weights import read_weights
from crossmae.errors import UserError

PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)


# What is read


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_data_is_read_as_python_reads_it(tmp_path: Path, protocol: int) -> None:
    shared = [1, 2]
    content = {
        "numbers": [0, -1, 255, 65536, -(2**31), 2**70, 1.5, True, False, None],
        "texts": ("", "é", "x" * 300, b"", b"\xff" * 300, bytearray(b"ab")),
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "sets": ({1, "a"}, frozenset({b"c", None}), set()),
        "dicts": OrderedDict(a=Counter("aab"), b={2.5: 1, None: 2, True: 3}),
        "shared": [shared, shared],
        "args": argparse.Namespace(lr=1e-4, betas=(0.9, 0.95)),
        "scalars": (np.float32(0.1), np.int64(-3), np.bool_(True)),
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    found = read_numpy_pickle(tmp_path / "a.pkl")
    assert found == content
    assert found["shared"][0] is found["shared"][1]
    assert [type(value) for value in found["scalars"]] == [type(value) for value in content["scalars"]]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("numpy_1", [False, True])
def test_pickled_arrays(tmp_path: Path, protocol: int, numpy_1: bool) -> None:
    arrays = {
        "backbone.net.patch_embed.proj.weight": np.random.default_rng(0).normal(size=(4, 3, 2, 2)),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "transposed": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(1, 0, 2),
        "big_endian": np.arange(3, dtype=">f4"),
        "scalar": np.array(3, np.int64),
        "empty": np.zeros((0, 3), np.float16),
        "flags": np.array([True, False]),
    }
    content = pickle.dumps({"model": OrderedDict(arrays), "__author__": "me"}, protocol)
    if numpy_1 and protocol < 4:  # names are length-prefixed from protocol 4 on
        content = content.replace(b"numpy._core", b"numpy.core")
    (tmp_path / "a.pkl").write_bytes(content)
    weights = read_weights(tmp_path / "a.pkl")
    assert weights.format == "detector"
    assert weights.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        found = weights.tensors[name].numpy()
        assert found.dtype == array.dtype.newbyteorder("="), name
        assert found.shape == array.shape, name
        assert np.array_equal(found, array), name


def test_arrays_of_python_2(tmp_path: Path) -> None:
    """Text in place of bytes, as in detectron2's older files."""
    values = np.arange(200, 204, dtype=np.uint8)
    array = call(
        "numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray") + b"K\x00\x85" + short(b"b") + b"\x87"
    )
    state = b"(K\x01K\x04\x85" + dtype("u1") + b"\x89" + short(values.tobytes()) + b"tb"
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02}" + short(b"w") + array + state + b"s.")
    assert read_weights(tmp_path / "a.pkl").tensors["w"].tolist() == values.tolist()


# What is refused


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sentinel),)


class Stateful:
    """Makes a folder when its state is set."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __setstate__(self, state: dict[str, Any]) -> None:
        os.mkdir(state["sentinel"])


def in_setstate(sentinel: Path) -> Any:
    return {"model": {"a": torch.zeros(2)}, "extra": Stateful(sentinel)}


PLACES: dict[str, Callable[[Path], Any]] = {
    "alone": Payload,
    "in the model": lambda sentinel: {"model": {"a": Payload(sentinel)}},
    "in args": lambda sentinel: {"model": {"a": torch.zeros(2)}, "args": argparse.Namespace(x=[Payload(sentinel)])},
    "in EMA weights": lambda sentinel: {"model": {"a": torch.zeros(2)}, "model_ema": {"a": Payload(sentinel)}},
    "in the optimizer": lambda sentinel: {
        "model": {"a": torch.zeros(2)},
        "optimizer": {"state": {0: Payload(sentinel)}},
    },
    "as a key": lambda sentinel: {"model": {"a": torch.zeros(2)}, Payload(sentinel): 1},
    "in a state": in_setstate,
}


@pytest.mark.parametrize("place", PLACES)
def test_payloads_never_run(tmp_path: Path, place: str) -> None:
    sentinel, files = tmp_path / "sentinel", tmp_path / "files"
    files.mkdir()
    content = PLACES[place](sentinel)
    for protocol in PROTOCOLS:
        torch.save(content, files / f"zip-{protocol}.pth", pickle_protocol=protocol)
        old = files / f"legacy-{protocol}.pth"
        torch.save(content, old, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (files / f"{protocol}.pkl").write_bytes(pickle.dumps(content, protocol))
    (files / "disguised.safetensors").write_bytes(pickle.dumps(content))
    for path in files.iterdir():
        # Protocols 0 and 1 have no marker at their start, and no weight file has them.
        no_marker = path.name in ("0.pkl", "1.pkl")
        told = "not a weight file" if no_marker else r"refused, because it refers to (posix\.mkdir|.*Stateful|torch\.)"
        with pytest.raises(UserError, match=told) as caught:
            read_weights(path)
        assert str(path) in str(caught.value)
        assert not sentinel.exists(), path.name
    pickle.loads((files / "4.pkl").read_bytes())  # the payload does work where pickle is trusted
    assert sentinel.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"(S'{path}'\nios\nmkdir\n.",  # INST
        b"(cos\nmkdir\nX\x01\x00\x00\x00xo.",  # OBJ
        b"\x82\x01.",  # EXT1
        b"P{path}\n.",  # PERSID
        b"X\x01\x00\x00\x00xQ.",  # BINPERSID
        b"cos\nmkdir\nX\x01\x00\x00\x00x\x85R.",
        b"\x8c\x02os\x8c\x05mkdir\x93\x8c\x01x\x85R.",
        b"cargparse\nNamespace\n)\x81(cos\nmkdir\nX\x01\x00\x00\x00xdb.",
        b"cargparse\nNamespace\nN}X\x06\x00\x00\x00__eq__Ns\x86b.",  # would change the class
        b"cargparse\nNamespace.__init__.__globals__\n.",
        b"cnumpy\nload\n.",
        b"cbuiltins\neval\n.",
        b"c__builtin__\ngetattr\n.",
        b"ctorch.storage\n_load_from_bytes\n.",
        b"cnumpy.core.numeric\n_frombuffer\n(K\x01K\x02tR.",
        b"ccollections\nOrderedDict\n)\x92.",  # NEWOBJ_EX
    ],
)
def test_every_way_to_a_function_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opcodes: bytes) -> None:
    monkeypatch.chdir(tmp_path)
    equality = argparse.Namespace.__eq__
    for name, start in (("a.pkl", b""), ("a.pth", None)):
        if start is None:
            torch_archive(tmp_path / name, b"\x80\x04" + opcodes)
        else:
            (tmp_path / name).write_bytes(b"\x80\x04" + opcodes)
        with pytest.raises(UserError):
            read_weights(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pkl", "a.pth"]
    assert argparse.Namespace.__eq__ is equality


def test_a_refusal_names_the_global_and_the_way_on(tmp_path: Path) -> None:
    for content, name in (
        ({"model": {}, "args": Stateful(tmp_path)}, f"{__name__}.Stateful"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    ):
        path = tmp_path / f"{name}.pth"
        torch.save(content, path)
        with pytest.raises(UserError, match=f"refers to {name}") as caught:
            read_weights(path)
        assert "Nothing in the file was run" in str(caught.value)
        assert f"tools/convert_checkpoint.py {path} DST --to crossmae --trust" in str(caught.value)


def test_settings_of_a_run_are_skipped(tmp_path: Path) -> None:
    """Their classes are neither imported nor built, and the tensors next to them are read."""
    optimizer = torch.optim.AdamW([torch.zeros(2)])
    content = {
        "state_dict": {"a": torch.arange(3.0)},
        "args": argparse.Namespace(output=Path("x"), at=datetime(2024, 1, 1), groups=defaultdict(list, a=[1])),
        "optimizer": optimizer,
        "types": [int, dict],
    }
    torch.save(content, tmp_path / "a.pth")
    class_of_settings = b"cyacs.no_such_module\nNode\n)\x81}" + text("k") + b"]K\x01asb" + text("a") + b"K\x01s"
    (tmp_path / "b.pkl").write_bytes(b"\x80\x02}" + text("hparams") + class_of_settings + b"s.")
    assert list(read_numpy_pickle(tmp_path / "b.pkl")) == ["hparams"]
    found = read_weights(tmp_path / "a.pth")
    assert found.tensors["a"].tolist() == [0, 1, 2]
    assert {"args", "optimizer", "types"} <= set(found.beside)


# What is bounded: files put together by hand, as no program writes them


def short(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def integer(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(module: str, attribute: str, arguments: bytes) -> bytes:
    return name(module, attribute) + arguments + b"R"


def dtype(kind: str) -> bytes:
    return call("numpy", "dtype", text(kind) + b"\x89\x88\x87")


def nested(depth: int) -> bytes:
    """A tuple of the same tuple twice, of the same tuple twice, ...: 2 ** depth leaves in 4 * depth bytes."""
    return b")q\x00" + b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(depth))


def model(value: bytes, before: bytes = b"") -> bytes:
    return b"\x80\x02}" + before + text("model") + b"}" + text("a") + value + b"ss."


def stored(count: int, size: tuple[int, ...], stride: tuple[int, ...], key: str = "0") -> bytes:
    storage = b"(" + text("storage") + name("torch", "FloatStorage") + text(key) + text("cpu") + integer(count) + b"tQ"
    sides = b"".join(b"(" + b"".join(map(integer, numbers)) + b"t" for numbers in (size, stride))
    return call("torch._utils", "_rebuild_tensor_v2", b"(" + storage + b"K\x00" + sides + b"\x89)t")


def torch_archive(path: Path, content: bytes, data: bytes = b"\0\0\x80\x3f", kind: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/data/0", data, kind)


def settings(value: bytes) -> bytes:
    return text("args") + name("argparse", "Namespace") + b")\x81}" + text("x") + value + b"sbs"


GIB = 1 << 30
DEPTH = 27  # some seconds where it is walked: more would hang the test, as a hash cannot be interrupted
ONE_MB = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\x01"
SIDES = b"(C\0" + dtype("f4") + b"(" + b"K\0" * 99 + b"t" + text("C") + b"t"
MANY = b"".join(text(str(number)) + b"N" for number in range(10_000))
BOMBS = {
    "bytes4": (b"\x80\x02B" + struct.pack("<I", 0xFFFFFFF0) + b"abc.", "bytes4"),
    "bytes8": (b"\x80\x04\x8e" + struct.pack("<Q", 4 * GIB) + b"abc.", "bytes8"),
    "bytearray8": (b"\x80\x05\x96" + struct.pack("<Q", 4 * GIB) + b"abc.", "bytearray8"),
    "frame": (
        b"\x80\x04\x95" + struct.pack("<Q", 4 * GIB) + b"N.",
        "not a state dict of named tensors, but a NoneType",
    ),
    "bytearray": (model(call("builtins", "bytearray", integer(4 * GIB) + b"\x85")), "int where a bytes"),
    "array": (model(call("numpy", "ndarray", b"(" + integer(GIB) + b"t\x85")), "numpy.ndarray is called"),
    "hash": (b"\x80\x02}" + nested(DEPTH) + b"Ns.", "a key of type tuple"),
    "hash in a set": (b"\x80\x04\x8f(" + nested(DEPTH) + b"\x90.", "a key of type tuple"),
    "long integer": (b"\x80\x02}\x8b" + struct.pack("<I", 1 << 20) + b"\1" * (1 << 20) + b"Ns.", "opcode LONG4"),
    "copies": (
        b"\x80\x02" + ONE_MB + (name("_codecs", "encode") + b"h\x01" + text("latin1") + b"\x86R") * 4000 + b".",
        "unpack to many times its own size",
    ),
    "one object again and again": (
        b"\x80\x02cargparse\nNamespace\n)\x81}q\x01(" + MANY + b"ub" + b"h\x01b" * 5000 + b".",
        "unpack to many times its own size",
    ),
    "dimensions": (model(call("numpy.core.numeric", "_frombuffer", SIDES)), "99 dimensions"),
    "record": (model(dtype("f4,f4")), "data type 'f4,f4'"),
    "subarray": (model(dtype("999999f4")), "data type '999999f4'"),
    "objects": (model(dtype("O8")), "data type 'O8'"),
    "no bytes": (model(dtype("V0")), "data type 'V0'"),
    "a name of nested tuples": (model(call("numpy", "dtype", nested(DEPTH) + b"\x89\x88\x87")), "a tuple where a str"),
    "an encoding of nested tuples": (
        model(call("_codecs", "encode", text("a") + nested(DEPTH) + b"\x86")),
        "bytes in another encoding",
    ),
    "numbers as keys": (
        b"\x80\x02}(" + b"".join(b"J" + struct.pack("<i", number) + b"N" for number in range(40_000)) + b"u.",
        "more than 30,000 numbers as keys",
    ),
    "a name without end": (b"\x80\x02c" + b"\x1b[2J" * 100_000 + b"\nx\n.", r"refers to '\\x1b"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickles_that_ask_for_much_are_errors(tmp_path: Path, bounded: Any, bomb: str) -> None:
    content, told = BOMBS[bomb]
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(UserError, match=told), bounded():
        read_weights(tmp_path / "a.pkl")


def test_the_number_of_steps_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossmae.checkpoints.reading.unpickle.MAX_OPCODES", 1000)
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02" + b"]" * 1000 + b".")
    with pytest.raises(UserError, match="more than 1,000 pickle opcodes"):
        read_weights(tmp_path / "a.pkl")


def test_a_large_memo_index_costs_nothing(tmp_path: Path, bounded: Any) -> None:
    content = pickle.dumps({"a": np.arange(3)}, 2)
    (tmp_path / "a.pkl").write_bytes(content.replace(b"}q\x00", b"}r\xff\xff\xff\x7f"))
    with bounded():
        assert read_weights(tmp_path / "a.pkl").tensors["a"].tolist() == [0, 1, 2]


def test_no_array_looks_into_memory_that_is_given_back(tmp_path: Path) -> None:
    """An array made as a view of another, which is then filled anew: in Python's unpickler, use after free."""
    first = call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray") + b"K\x00\x85C\x01b\x87") + b"q\x05"
    state = b"(K\x01K\x64\x85" + dtype("u1") + b"\x89C\x64" + bytes(100) + b"tb"
    view = call("numpy.core.numeric", "_frombuffer", b"(h\x05" + dtype("u1") + b"K\x64\x85" + text("C") + b"t")
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02]" + first + state + b"a" + view + b"a.")
    with pytest.raises(UserError, match="a ndarray where"):
        read_weights(tmp_path / "a.pkl")
    (tmp_path / "b.pkl").write_bytes(b"\x80\x02" + first + state + state[:-1] + b"b.")
    with pytest.raises(UserError, match="filled twice"):
        read_weights(tmp_path / "b.pkl")


@pytest.mark.parametrize("value", [nested(DEPTH), b"]q\x00h\x00a"], ids=["exponential", "circular"])
def test_settings_without_end(tmp_path: Path, bounded: Any, value: bytes) -> None:
    torch_archive(tmp_path / "a.pth", model(stored(1, (1,), (1,)), before=settings(value)))
    with bounded():
        weights = read_weights(tmp_path / "a.pth")
    assert weights.tensors["a"].tolist() == [1.0]
    assert weights.beside == ("args",)
    assert len(weights.metadata["published_args"]) < 100


@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        (stored(1, (1 << 20, 1 << 12), (0, 0)), {}, "views that repeat few values"),
        (stored(1, (1 << 40, 1 << 40), (0, 0)), {}, "does not fit its storage"),
        (stored(1, (2,), (1,)), {}, "does not fit its storage of 1 values"),
        (stored(1, (1,), (-1,)), {}, "not a plain tensor"),
        (stored(1, (1,) * 99, (1,) * 99), {}, "not a plain tensor"),
        (stored(2, (1,), (1,)), {}, "a storage of 4 bytes where 2 values"),
        (call("torch", "Size", stored(1, (1 << 24,), (0,)) + b"\x85"), {}, "a Tensor where a"),
        (call("builtins", "set", stored(1, (1 << 24,), (0,)) + b"\x85"), {}, "a Tensor where a"),
        (stored(1, (1 << 24,), (0,)) + b"Q", {}, "a Tensor where a tuple"),
        (stored(1 << 24, (1,), (1,)), {"data": bytes(1 << 26), "kind": zipfile.ZIP_DEFLATED}, "is compressed"),
    ],
)
def test_torch_archives_that_ask_for_much_are_errors(
    tmp_path: Path, request: pytest.FixtureRequest, content: bytes, options: dict[str, Any], told: str
) -> None:
    torch_archive(tmp_path / "a.pth", model(content), **options)
    bounded = request.getfixturevalue("bounded")  # after the zip bomb has been made
    with pytest.raises(UserError, match=told), bounded():
        read_weights(tmp_path / "a.pth")


def test_overlapping_entries_are_an_error(tmp_path: Path, bounded: Any) -> None:
    """A zip bomb without compression: the same bytes, listed again and again."""
    path = tmp_path / "a.pth"
    torch_archive(path, model(stored(1, (1,), (1,))), bytes(1 << 16))
    with zipfile.ZipFile(path, "a") as archive:
        entry = archive.getinfo("a/data/0")
        for number in range(1, 50):
            twin = zipfile.ZipInfo(f"a/data/{number}")
            twin.file_size = twin.compress_size = entry.file_size
            twin.CRC, twin.header_offset, twin.external_attr = entry.CRC, entry.header_offset, 0
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
        archive.writestr("a/version", "3")
    with pytest.raises(UserError, match="entries of its archive are larger than the file"), bounded():
        read_weights(path)


def test_a_legacy_file_reserves_no_more_than_its_size(tmp_path: Path, bounded: Any) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(4)}, path, _use_new_zipfile_serialization=False)
    changed = re.sub(rb"(?<=cpuq.)K\x04", lambda _: b"J\xff\xff\xff\x7f", path.read_bytes())
    assert len(changed) == path.stat().st_size + 3
    path.write_bytes(changed)
    with pytest.raises(UserError, match="the tensors need more bytes than the file has"), bounded():
        read_weights(path)
