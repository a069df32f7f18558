"""Seeded mutations of files: bytes, JSON trees, lines of text, and pickles with code in them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

OUTSIDE = "../outside/secret.png"  # a file that exists, next to the folder of an input
SENTINEL = "executed"  # a folder that the code in pickles makes
NUMBERS: list[Any] = [0, -1, 1, 2, 255, 2**31, 2**63, 10**30, 10**299, 0.5, -0.0, 1e-320, 1e308, True, None]
NUMBERS += [float("nan"), float("inf"), -float("inf"), "1", "1e999", [], {}, [[]], [None]]
TEXTS = ["", " ", "\0", "a\0b", "\n", "\ud800", "é" * 300, "x" * 5000, OUTSIDE, "/proc/self/environ", "~nobody-here/x"]
TEXTS += ["${UNSET}/x", "NaN", "null", "[", "{0..99999999}", "*", "a::b", "file:///etc/passwd", "../", ".", "\x1b[31m"]
YAML = ["!!int abc", "!!float x", "!!timestamp x", "!!python/object/apply:os.mkdir [executed]", "&a [*a]", "[[[[", "{"]
YAML += ["9" * 5000, "-1", "0", "1e999", ".nan", ".inf", "2020-99-99", "!!binary x", "!!set {a}", "1:1:1", "''", "null"]
YAML += ["[]", "{}", "true", "x", "-9999999999", "[" * 3000, "0x" + "f" * 400, "? [a]", "!!omap [a]", "*b", '"\\ud800"']
YAML += ["()", "(0,)", "[0]", "nan", "inf", "((((", "1+" * 3000 + "1", "None", "'a'", "b'a'", "10**9", "-", "[-1, 0]"]
PAYLOAD = b"cos\nmkdir\n(V" + SENTINEL.encode() + b"\ntR."


def mutated(name: str, data: bytes, rng: random.Random) -> bytes:
    """One mutation of a file's content, as its name allows, and bytes in a fifth of the cases."""
    suffix = name.rpartition(".")[2]
    if rng.random() > 0.2:
        if suffix == "json" and name != "metrics.json":
            return json.dumps(changed_tree(json.loads(data), rng)).encode()
        if suffix in ("jsonl", "json"):
            lines = data.decode().splitlines()
            at = rng.randrange(len(lines))
            lines[at] = json.dumps(changed_tree(json.loads(lines[at]), rng))
            return "\n".join(lines).encode()
        if suffix in ("yaml", "txt", "csv", "tsv"):
            return changed_lines(data.decode(), rng).encode(errors="surrogatepass")
    if suffix in ("pkl", "pth", "pt", "bin") and rng.random() < 0.2:
        at = rng.choice([0, 2, rng.randrange(len(data)), max(data.find(b"\x80"), 0) + 2])
        return data[:at] + PAYLOAD + data[at:]
    return changed_bytes(data, rng)


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, overwrite, move or repeat bytes, most often near the start."""
    size = max(len(data), 1)
    start = rng.randrange(size) if rng.random() < 0.5 else rng.randrange(min(size, 128))
    end, other = min(size, start + rng.choice((1, 2, 4, 8, 64))), rng.randrange(size)
    extreme = rng.choice((b"\0", b"\xff", b"\x7f", b"\x80", b"\x01"))

    def flipped(count: int) -> bytes:
        changed = bytearray(data or b"\0")
        for _ in range(count):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)

    kinds: list[Callable[[], bytes]] = [
        lambda: data[:start],
        lambda: flipped(1),
        lambda: flipped(20),
        lambda: data[:start] + extreme * (end - start) + data[end:],
        lambda: data[:start] + rng.randbytes(end - start) + data[end:],
        lambda: data[:start] + data[end:],
        lambda: data[:end] + data[start:],
        lambda: data[:start] + data[other : other + end - start] + data[end:],
        lambda: data[:start] + rng.randbytes(7) + data[start:],
        lambda: rng.choice((b"", b"<html>", b"version https://git-lfs", b"\x1f\x8b", b"PK\x03\x04", rng.randbytes(40))),
    ]
    return rng.choice(kinds)()


def changed_tree(tree: Any, rng: random.Random) -> Any:
    """A copy of a JSON tree with one to three nodes changed."""
    tree = {"": copy.deepcopy(tree)}
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(tree))
        parent, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind < 3:
            parent[key] = copy.deepcopy(rng.choice(NUMBERS))
        elif kind < 5:
            parent[key] = rng.choice(TEXTS)
        elif kind == 5 and parent is not tree:
            del parent[key]
        elif kind == 6:
            other, name = rng.choice(places)
            parent[key] = copy.deepcopy(other[name])
        else:
            for _ in range(rng.choice((1, 50, 300))):
                parent[key] = [parent[key]]
    return tree[""]


def _places(node: Any) -> Any:
    """Every (container, key) of a tree."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(items):
        yield node, key
        if isinstance(value, dict | list):
            yield from _places(value)


def changed_lines(text: str, rng: random.Random) -> str:
    """A text with one to three lines changed: values, indentation, order."""
    lines = text.split("\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, kind = rng.randrange(len(lines)), rng.randrange(7)
        key, mark, _ = lines[at].partition(rng.choice((":", ",", " ", "\t")))
        odd = rng.choice(YAML if rng.random() < 0.7 else TEXTS)
        if kind < 4:
            lines[at] = f"{key}{mark or ':'} {odd}" if rng.random() < 0.8 else odd
        elif kind == 4:
            lines[at] = rng.choice(("  ", "\t", "- ", "{", '"', "#")) + lines[at]
        elif kind == 5:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif len(lines) > 1:
            del lines[at]
    return "\n".join(lines)
