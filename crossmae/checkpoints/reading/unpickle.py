"""Read pickled data without running anything in it, in bounded time and memory.

A pickle is a program. The interpreters of Python and torch use as much memory and time as this program requests. This
includes torch's weights-only reader: 140 bytes of nested tuples keep it busy for 33 s, and 30 bytes can request
gigabytes. This module therefore interprets the opcodes that training programs write. Nothing is imported. `GLOBALS`
lists the globals that a file may refer to, each with a function that builds plain data. Objects of `_SETTINGS` become
`Skipped`. Any other global is refused.

Bounds: at most `MAX_OPCODES` opcodes; data of at most `MAX_GROWTH` times the file's size; only keys that hash quickly.
"""

from __future__ import annotations

import argparse
import math
import mmap
import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crossmae.errors import UserError

MAX_OPCODES = 1_000_000  # at most 3 s and 250 MB; a ViT-H with the state of its optimizer has 50,000 opcodes
MAX_GROWTH, GROWTH_BASE = 4, 1 << 26
MAX_DIMENSIONS = 16
_MAX_DTYPE = 12  # most characters of a dtype's name, such as "<f4" or "U1000000"
_ENTRY_BYTES = 100  # approximate memory of one entry of a container
_SPECIAL = re.compile(r"torch\._utils\._rebuild_(sparse|qtensor|nested|meta|wrapper)|torch\.Q\w+")
# Files that are a part of something, by the globals that they refer to.
_PARTS = {
    r"deepspeed\.": "a part of a DeepSpeed checkpoint, such as one process's optimizer. In the folder with the file "
    "`latest`, run `python zero_to_fp32.py . OUT`, and name the file in OUT.",
    r"torch\.distributed\.checkpoint\.": "the index of a distributed checkpoint (DCP). Name its folder.",
    r"torch\.distributed\.": "one process's part of a sharded model (FSDP, DTensor). In the program that wrote it, "
    "collect the model by torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True)), and save it.",
}
# Settings of a run, which are skipped: their classes and the builtins in them. No attribute of a module is looked up.
_SETTINGS = re.compile(
    r"(omegaconf|hydra|yacs|fvcore\.common\.config|addict|easydict|ml_collections|munch|box|mmengine\.config|mmcv\.utils|"
    r"pytorch_lightning|lightning|lightning_fabric|transformers\.train\w+|torch\.optim|torch\.torch_version|pathlib|"
    r"datetime|uuid|typing|enum)\..+|collections\.(defaultdict|deque)|types\.SimpleNamespace|copyreg\._reconstructor|"
    r"builtins\.(dict|list|tuple|int|long|float|complex|str|bool|object|type|slice|range)"
)
_KEYS = (str, bytes, bool, type(None))
# Most numbers as keys in one file. Numbers with colliding hashes make each insertion as slow as all earlier ones.
MAX_NUMBER_KEYS = 30_000


def read_numpy_pickle(path: Path) -> Any:
    """Read a pickle of numpy arrays, as in detectron2's model zoo."""
    return read_mapped(path, lambda file: Unpickler(path, GLOBALS).load(file))


def read_mapped(path: Path, read: Callable[[mmap.mmap], Any]) -> Any:
    """Memory-map a file and return `read(mapped)`.

    Raises UserError if the file is damaged, or `read` stops before the end of the file.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            content = read(mapped)
            if mapped.tell() != len(mapped):
                raise ValueError(f"there are {len(mapped) - mapped.tell():,} bytes after its end")
            return content
    except (UserError, MemoryError):
        raise
    except Exception as error:  # wrong bytes can raise almost any exception
        raise damaged(path, error) from None


def refusal(path: Path, name: str) -> UserError:
    """Return the error for a global that is not in `GLOBALS`."""
    name = name if name.isprintable() and len(name) <= 200 else ascii(name[:200])
    if _SPECIAL.match(name):
        return UserError(
            f"{path}: has a tensor that is sparse, quantized or otherwise special ({name}). Nothing in the file was "
            "run. Save it dense and dequantized in the program that wrote it."
        )
    if part := next((text for pattern, text in _PARTS.items() if re.match(pattern, name)), None):
        return UserError(f"{path}: {part} Nothing in the file was run ({name}).")
    return UserError(
        f"{path}: refused, because it refers to {name}, and not only to tensors, arrays, numbers, plain containers and "
        "argparse.Namespace. Nothing in the file was run. Only if you trust its author, run in a sandbox: "
        f"python tools/convert_checkpoint.py {path} DST --to crossmae --trust"
    )


def damaged(path: Path, error: Exception) -> UserError:
    """Return the error for a truncated or damaged weight file."""
    what = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return UserError(
        f"{path}: truncated or damaged ({path.stat().st_size:,} bytes): {what}"
        f"{' '.join(str(error).split())[:200]}. Copy or download it again. If it is whole, save only its state dict "
        "with torch.save."
    )


@dataclass(frozen=True)
class Global:
    """A global of a pickle and its builder. The builder is None for a global that is never called."""

    name: str
    build: Callable[..., Any] | None


class Skipped:
    """A placeholder for settings of a run: nothing of them is built or kept."""

    def __init__(self, *_: Any) -> None:
        pass


class Unpickler:
    """An interpreter for the pickles of one file.

    Args:
        path: the file, named in errors. Its size bounds the size of the data.
        known: builder or value of each allowed global, by canonical name.
        persistent: function that loads a persistent id. If None, a persistent id in the file is an error.
    """

    def __init__(self, path: Path, known: Mapping[str, Any], persistent: Callable[[Any], Any] | None = None) -> None:
        self._path, self._known, self._persistent = path, known, persistent
        self._budget = allowance(path)
        self._number_keys = 0
        self._stack: list[Any]
        self._marked: list[list[Any]]
        self._memo: dict[int, Any]

    def load(self, file: Any) -> Any:
        """Read one pickle at the position of `file`.

        Wrong bytes can raise any exception.
        """
        self._stack, self._marked, self._memo = [], [], {}
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count == MAX_OPCODES:
                raise ValueError(f"more than {MAX_OPCODES:,} pickle opcodes")
            if opcode.name not in _ACTIONS:
                raise ValueError(f"pickle opcode {opcode.name}, which no weight file has")
            _ACTIONS[opcode.name](self, argument)
        (content,) = self._stack
        return content

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _mark(self, _: Any) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _tuple(self, count: int) -> None:
        items = [self._stack.pop() for _ in range(count)]
        self._stack.append(tuple(reversed(items)))

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], Skipped):
            expect(self._stack[-1], list).extend(items)

    def _set_items(self, items: list[Any]) -> None:
        if isinstance(self._stack[-1], Skipped):
            return
        target = expect(self._stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value
        self._count_keys(sum(isinstance(key, int | float) for key in items[::2]))

    def _add_items(self, items: list[Any]) -> None:
        self._count_keys(len(items))
        if not isinstance(self._stack[-1], Skipped):
            expect(self._stack[-1], set).update(map(_key, items))

    def _count_keys(self, number: int) -> None:
        self._number_keys += number
        if self._number_keys > MAX_NUMBER_KEYS:
            raise ValueError(f"more than {MAX_NUMBER_KEYS:,} numbers as keys, or things in sets")

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _global(self, module: str, name: str) -> None:
        canonical = _canonical(f"{module}.{name}")
        if canonical not in self._known and not _SETTINGS.fullmatch(canonical):
            raise refusal(self._path, f"{module}.{name}")
        value = self._known.get(canonical, Skipped)
        self._stack.append(Global(canonical, value) if value is None or callable(value) else value)

    def _stack_global(self, _: Any) -> None:
        name, module = expect(self._stack.pop(), str), expect(self._stack.pop(), str)
        self._global(module, name)

    def _call(self, _: Any) -> None:
        arguments, target = expect(self._stack.pop(), tuple), expect(self._stack.pop(), Global)
        if target.build is None:
            raise ValueError(f"{target.name} is called")
        self._spend(*arguments)
        self._stack.append(target.build(*arguments))

    def _set_state(self, _: Any) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, np.ndarray):
            self._spend(*expect(state, tuple))
            _fill_array(target, state)
        elif isinstance(target, _DType):
            target.value = target.value.newbyteorder(expect(expect(state, tuple)[1], str))
        elif isinstance(target, argparse.Namespace):
            self._spend(expect(state, dict))
            vars(target).update({expect(key, str): value for key, value in state.items()})
        elif not isinstance(target, dict | Skipped):  # the attributes of a state dict (module versions) are unused
            raise ValueError(f"a state for an object of type {type(target).__name__}")

    def _load_persistent(self, _: Any) -> None:
        if self._persistent is None:
            raise ValueError("a reference to data outside the pickle")
        self._stack.append(self._persistent(self._stack.pop()))

    def _spend(self, *values: Any) -> None:
        """Count the size of copied data, and raise ValueError above the bound.

        One object may be referenced a million times.
        """
        for value in values:
            if isinstance(value, str | bytes | bytearray):
                self._budget -= len(value)
            elif isinstance(value, list | tuple | dict | set):
                self._budget -= len(value) * _ENTRY_BYTES
        if self._budget < 0:
            raise ValueError("it would unpack to many times its own size")


def allowance(path: Path) -> int:
    """Return the largest size in bytes that a file may unpack to."""
    return MAX_GROWTH * path.stat().st_size + GROWTH_BASE


_LITERALS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
_ACTIONS: dict[str, Callable[[Unpickler, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda self, _: None),
    **dict.fromkeys(_LITERALS, Unpickler._push),
    "NONE": lambda self, _: self._push(None),
    "NEWTRUE": lambda self, _: self._push(True),
    "NEWFALSE": lambda self, _: self._push(False),
    "EMPTY_TUPLE": lambda self, _: self._push(()),
    "EMPTY_LIST": lambda self, _: self._push([]),
    "EMPTY_DICT": lambda self, _: self._push({}),
    "EMPTY_SET": lambda self, _: self._push(set()),
    "MARK": Unpickler._mark,
    "TUPLE": lambda self, _: self._push(tuple(self._since_mark())),
    "TUPLE1": lambda self, _: self._tuple(1),
    "TUPLE2": lambda self, _: self._tuple(2),
    "TUPLE3": lambda self, _: self._tuple(3),
    "APPEND": lambda self, _: self._extend([self._stack.pop()]),
    "APPENDS": lambda self, _: self._extend(self._since_mark()),
    "SETITEM": lambda self, _: self._set_items([self._stack.pop(-2), self._stack.pop()]),
    "SETITEMS": lambda self, _: self._set_items(self._since_mark()),
    "ADDITEMS": lambda self, _: self._add_items(self._since_mark()),
    "FROZENSET": lambda self, _: self._push(_set(self._since_mark())),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), Unpickler._put),
    "MEMOIZE": lambda self, _: self._put(len(self._memo)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda self, index: self._push(self._memo[index])),
    "GLOBAL": lambda self, names: self._global(*names.split(" ", 1)),
    "STACK_GLOBAL": Unpickler._stack_global,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), Unpickler._call),
    "BUILD": Unpickler._set_state,
    "BINPERSID": Unpickler._load_persistent,
}


def expect(value: Any, kind: Any) -> Any:
    """Return the value. Raise ValueError if it has another type."""
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} where a {getattr(kind, '__name__', kind)} belongs")
    return value


def _key(value: Any) -> Any:
    """Return a key. Raise ValueError if it may hash slowly.

    Hashing nested tuples takes exponential time.
    """
    if isinstance(value, _KEYS) or (isinstance(value, int) and value.bit_length() <= 64) or isinstance(value, float):
        return value
    raise ValueError(f"a key of type {type(value).__name__}")


def _canonical(name: str) -> str:
    """Unify the name of a global across Python and numpy versions."""
    return name.replace("numpy._core.", "numpy.core.").replace("__builtin__.", "builtins.")


# Builders of globals


def _mapping(entries: Any = ()) -> dict[Any, Any]:
    pairs = entries.items() if isinstance(entries, dict) else expect(entries, list | tuple)
    if len(pairs) > MAX_NUMBER_KEYS:
        raise ValueError(f"more than {MAX_NUMBER_KEYS:,} entries added to a dict in one step")
    return {_key(key): value for key, value in (expect(pair, list | tuple) for pair in pairs)}


def _set(items: Any = ()) -> set[Any]:
    if len(expect(items, list | tuple | set)) > MAX_NUMBER_KEYS:
        raise ValueError(f"a pickled set has more than {MAX_NUMBER_KEYS:,} items")
    return {_key(item) for item in items}


def _latin1_bytes(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise ValueError("bytes in another encoding than latin1")
    return expect(text, str).encode("latin1")


@dataclass
class _DType:
    """A numpy data type. A later opcode sets its byte order."""

    value: np.dtype


def _dtype(text: str, align: Any = False, copy: Any = True) -> _DType:
    """Build a data type. Raise ValueError except for numbers and fixed-length text."""
    text = expect(text, str)[: _MAX_DTYPE + 1]
    dtype = np.dtype(text) if len(text) <= _MAX_DTYPE else None
    if dtype is None or not dtype.itemsize or dtype.hasobject or dtype.names or dtype.subdtype:
        raise ValueError(f"the data type {text!r} is not that of an array of numbers")
    return _DType(dtype)


def _fill_array(array: np.ndarray, state: tuple[Any, ...]) -> None:
    _, shape, dtype, fortran, data = state
    data = _raw(data)
    if array.size or array.base is not None:  # another array may already be a view of it
        raise ValueError("an array is filled twice")
    sides = _checked_shape(shape, dtype, data)
    array.__setstate__((1, sides, dtype.value, bool(fortran), data))  # type: ignore[arg-type]  # a plain bool works


def _array_from_buffer(
    data: Any, dtype: _DType, shape: tuple[int, ...], order: str, axes: tuple[int, ...] | None = None
) -> np.ndarray:
    data = _raw(data)
    shape = _checked_shape(shape, dtype, data)
    flat: np.ndarray = np.frombuffer(data, dtype.value)
    if order == "K" and axes is not None:
        return flat.reshape(shape).transpose(axes)
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: _DType, data: Any) -> Any:
    return _array_from_buffer(data, dtype, (), "C")[()]


def _raw(data: Any) -> bytes:
    """Return the bytes of an array. Python 2 pickled them as text."""
    return data.encode("latin1") if isinstance(data, str) else expect(data, bytes | bytearray)


def _checked_shape(shape: Any, dtype: Any, data: bytes) -> tuple[int, ...]:
    sides = tuple(expect(side, int) for side in expect(shape, tuple))
    if len(sides) > MAX_DIMENSIONS or any(side < 0 for side in sides):
        raise ValueError(f"an array of {len(sides)} dimensions")
    if math.prod(sides) * expect(dtype, _DType).value.itemsize != len(data):
        raise ValueError(f"{len(data):,} bytes for an array of shape {sides} and type {dtype.value}")
    return sides


GLOBALS: dict[str, Callable[..., Any] | None] = {
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "argparse.Namespace": argparse.Namespace,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "builtins.bytes": lambda data=b"": bytes(expect(data, bytes)),
    "builtins.bytearray": lambda data=b"": bytes(expect(data, bytes)),
    "_codecs.encode": _latin1_bytes,
    "numpy.ndarray": None,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray._reconstruct": lambda *_: np.empty(0, np.int8),
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array_from_buffer,
}
