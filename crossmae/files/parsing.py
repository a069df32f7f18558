"""JSON, YAML settings, XML and Python literals that others wrote, parsed within bounds. Only ValueError is raised."""

from __future__ import annotations

import ast
import gc
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from xml.etree import ElementTree

import yaml

try:  # three times faster for large files
    from orjson import loads as _load_strictly
except ImportError:  # pragma: no cover
    _load_strictly = None  # type: ignore[assignment,unused-ignore]

# Bounds of texts that others wrote. Larger values would exhaust memory, the stack, or the numbers of numpy and torch.
MAX_DEPTH = 100  # lists and mappings in each other
MAX_DIGITS, MAX_SETTING = 300, 10**18  # digits of a whole number in JSON; absolute value of a setting
MAX_SETTINGS_TEXT, MAX_SETTINGS = 1 << 18, 100_000  # characters of settings; their values, with aliases counted again
MAX_XML_TEXT = 1 << 25  # characters


def load_json(text: str | bytes) -> Any:
    """Parse JSON within bounds.

    Raises ValueError if the text is not JSON, is nested too deeply, or has a number with too many digits.
    """
    with suppress(ValueError):
        return load_plain_json(text.encode() if isinstance(text, str) else text)
    digits = (text.encode(errors="replace") if isinstance(text, str) else text).translate(_DIGITS_AS_ZERO)
    try:
        value = json.loads(text, parse_int=_whole_number if _TOO_LONG_NUMBER in digits else None)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_bounds(value)
    return value


def load_plain_json(data: bytes) -> Any:
    """Parse UTF-8 JSON with the fast library.

    Raises ValueError for everything that has to be looked at more closely, for which `load_json` has an error or a
    value: NaN, half characters, long numbers, deep nesting, and text that is not JSON.
    """
    # The library would make floats of numbers above 64 bits.
    if _load_strictly is None or _LONG_NUMBER in data.translate(_DIGITS_AS_ZERO):
        raise ValueError("not plain")
    value = _load_strictly(data)
    if not _is_shallow(data):
        raise ValueError(_TOO_DEEP)
    return value


@contextmanager
def paused_garbage_collection() -> Iterator[None]:
    """Pause garbage collection, which would double the reading time.

    Afterwards all objects count as old, so that the next collection does not visit each of them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            if not gc.get_freeze_count():  # what a caller froze stays frozen
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def load_yaml(text: str) -> Any:
    """Parse YAML settings within bounds, and run nothing.

    Raises ValueError if the text is not YAML, too long, nested too deeply, or has a number that is too large, a key
    that is given again, or aliases that multiply.
    """
    if len(text) > MAX_SETTINGS_TEXT:
        raise ValueError(f"{len(text):,} characters are more than {MAX_SETTINGS_TEXT:,}")
    if _DEEP_START.search(text):  # PyYAML takes seconds for it
        raise ValueError(_TOO_DEEP)
    try:
        value = _SettingsLoader(text).get_single_data()
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:  # a tag for another kind of value
        raise ValueError(f"a tag does not fit its value ({error})") from None
    _check_bounds(value, MAX_SETTINGS)
    return value


def load_xml(text: str) -> ElementTree.Element:
    """Parse XML without entities of its own, which could multiply.

    Raises ValueError if the text is not XML, declares entities, or has too many characters.
    """
    if len(text) > MAX_XML_TEXT:
        raise ValueError(f"{len(text):,} characters are more than {MAX_XML_TEXT:,}")
    if "<!ENTITY" in text:
        raise ValueError("it declares entities")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"not XML: {error}") from None


def load_literal(text: str) -> Any:
    """Parse a Python literal within the bounds of `load_yaml`.

    Raises ValueError for other text.
    """
    if len(text) > MAX_SETTINGS_TEXT:
        raise ValueError(f"{len(text):,} characters are more than {MAX_SETTINGS_TEXT:,}")
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:  # of the parser, for deep nesting
        raise ValueError(f"not a literal: {error or type(error).__name__}") from None
    _check_bounds(value, MAX_SETTINGS)
    return value


class _SettingsLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a key that is given again."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        given = node.value if isinstance(node, yaml.MappingNode) else []
        plain = [key.value for key, _ in given if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge")]
        if len(set(plain)) < len(plain):
            again = next(key for at, key in enumerate(plain) if key in plain[:at])
            raise yaml.constructor.ConstructorError(None, None, f"the key {again!r} is given again", node.start_mark)
        return dict(super().construct_mapping(node, deep))


_DEEP_START = re.compile(rf"(?:[\[{{]\s*){{{MAX_DEPTH + 1}}}")
_DIGITS_AS_ZERO = bytes.maketrans(b"123456789", b"000000000")
_LONG_NUMBER, _TOO_LONG_NUMBER = b"0" * 19, b"0" * (MAX_DIGITS + 1)
_ONE_BRACKET = bytes.maketrans(b"{}", b"[]")
_NO_BRACKET = bytes(set(range(256)) - set(b'{}[]"'))
_STRING = re.compile(rb'"[^"]*"')
_NESTED = frozenset({dict, list, tuple, set})  # the parsers make no subclasses
_TOO_DEEP = f"more than {MAX_DEPTH} lists or mappings in each other"


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits, more than {MAX_DIGITS}")
    return int(digits)


def _is_shallow(text: bytes) -> bool:
    """Check the depth of valid JSON by its brackets.

    This takes a tenth of the time of a look at all values. Values of repeated keys count, too.
    """
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = _STRING.sub(b"", text.translate(_ONE_BRACKET, _NO_BRACKET).replace(b'""', b""))
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")  # the innermost
    return not brackets


def _inner(many: Any) -> Any:
    return many.values() if type(many) is dict else many


def _check_bounds(value: Any, most: int | None = None) -> None:
    """Raise ValueError for deep nesting and, with `most`, many values."""
    level: list[Any] = [[value]]
    count = 0
    for _ in range(MAX_DEPTH + 1):
        if most is not None:
            values = [one for many in level for one in _inner(many)]
            count += len(values)
            if count > most:
                raise ValueError(f"more than {most:,} values, with those behind aliases")
            if any(isinstance(one, int) and abs(one) > MAX_SETTING for one in values):
                raise ValueError(f"a number is greater than {MAX_SETTING:.0e}")
        # The first condition skips lists of coordinates, of which an annotation file has millions of values.
        nested = [many for many in level if not _NESTED.isdisjoint(map(type, _inner(many)))]
        level = [one for many in nested for one in _inner(many) if type(one) in _NESTED]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to values by dotted key, tuples to lists."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found
