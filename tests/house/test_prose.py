"""Holds the prose: short summaries that open with a verb or a noun, and plain words in docstrings, messages and docs.

Every rule is a function that returns what breaks it; the tests apply the rules to the product and to a planted fault.
CONTRIBUTING.md states the rules in words. ruff holds the form (D205, D400, D401).
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator

import pytest

from tests.house.tree import ROOT, Module, read_product

MOST_WORDS = 12
OPENINGS = re.compile(r"(What|Whether|Which|How|Of|Those|That|Inside|From)\b")
INSTEAD = {  # pattern of what is not written, and what is
    r"can\s+not": "cannot",
    r"in\s+vain": "unused, ignored or has no effect",
    r"anew": "again or new",
    r"go(es)?\s+on": "continue",
    r"(?<!\.)beside(?![:\"])": "next to",  # not the key and attribute of that name
    r"is\s+(told|said)": "is logged, printed or reported",
}
TEXT_TOKENS = {"COMMENT", "STRING", "FSTRING_MIDDLE"}
Modules = dict[str, Module]
Texts = dict[str, str]


def summaries(modules: Modules) -> Iterator[tuple[str, ast.AST, str]]:
    """Yield (place, node, summary) of every docstring; the summary is its first paragraph."""
    for module in modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and (text := ast.get_docstring(node)):
                yield f"{module.file}:{getattr(node, 'lineno', 1)}", node, " ".join(text.split("\n\n")[0].split())


def bad_openings(modules: Modules) -> list[str]:
    """Find summaries that open with a fragment's first word."""
    return [
        f"{place}: {text!r} opens with {found[0]!r}. Open a function with a verb, a class or a module with a noun."
        for place, _, text in summaries(modules)
        if (found := OPENINGS.match(text))
    ]


def semicolons(modules: Modules) -> list[str]:
    """Find summaries that hold a semicolon."""
    return [f"{place}: {text!r}. Make two sentences of it." for place, _, text in summaries(modules) if ";" in text]


def long_summaries(modules: Modules) -> list[str]:
    """Find functions whose summary is too long."""
    return [
        f"{place}: {count} words, at most {MOST_WORDS}: {text!r}. Move what is left to a second paragraph."
        for place, node, text in summaries(modules)
        if isinstance(node, ast.FunctionDef) and (count := len(text.split())) > MOST_WORDS
    ]


def words_in_code(modules: Modules) -> list[str]:
    """Find words that have a plainer one in docstrings, comments and messages."""
    found = []
    for module in modules.values():
        for token in tokenize.generate_tokens(io.StringIO(module.source).readline):
            if tokenize.tok_name[token.type] in TEXT_TOKENS:
                found += [f"{module.file}:{token.start[0] + line}: {rest}" for line, rest in _words(token.string)]
    return found


def words_in_texts(texts: Texts) -> list[str]:
    """Find words that have a plainer one in documents; `code` in them is not prose."""
    return [
        f"{file}:{line + 1}: {rest}"
        for file, text in texts.items()
        for line, rest in _words(re.sub(r"`[^`\n]+`", "``", text))
    ]


def _words(text: str) -> Iterator[tuple[int, str]]:
    for pattern, plain in INSTEAD.items():
        for match in re.finditer(rf"\b{pattern}\b", text, re.IGNORECASE):
            yield text.count("\n", 0, match.start()), f"{' '.join(match[0].split())!r}. Write {plain}."


def read_texts() -> Texts:
    """Read the documents and the configs."""
    paths = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/**/*.yaml")]
    return {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in paths}


PRODUCT = read_product()
RULES = [bad_openings, semicolons, long_summaries, words_in_code]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_product_keeps_the_rule(rule: Callable[[Modules], list[str]]) -> None:
    assert rule(PRODUCT) == []


def test_the_documents_keep_the_words() -> None:
    texts = read_texts()
    assert {"README.md", "CONTRIBUTING.md", "docs/architecture.md"} <= texts.keys()
    assert words_in_texts(texts) == []


@pytest.mark.parametrize(
    "rule, source, line",
    [
        (bad_openings, '"""What a file is."""', 1),
        (bad_openings, 'x = 1\nclass A:\n    """Of the model."""', 2),
        (bad_openings, 'class A:\n    def f(self):\n        """Whether it fits."""', 2),
        (semicolons, 'def f():\n    """Read it; write\n    it."""', 1),
        (long_summaries, f'def f():\n    """{"word " * 13}."""', 1),
        (words_in_code, '"""Title.\n\nThis can\nnot be."""', 3),
        (words_in_code, "x = 1  # it goes on", 1),
        (words_in_code, 'x = f"{1} stays in vain"', 1),
        (words_in_code, 'x = "beside it"', 1),
    ],
)
def test_a_planted_fault_is_found(rule: Callable[[Modules], list[str]], source: str, line: int) -> None:
    (found,) = rule({"a": Module("a", "a.py", source)})
    assert found.startswith(f"a.py:{line}: ")


@pytest.mark.parametrize(
    "source",
    [
        'def f():\n    """Read the file.\n\n    What it holds; whether it fits: how long this is does not matter."""',
        'class A:\n    """Howitzer, inside of a class whose summary may have as many words as its author likes."""',
        "x = 1  # besides, cannot; going on",
        "beside = can_not = 1",
    ],
)
def test_plain_prose_passes(source: str) -> None:
    modules = {"a": Module("a", "a.py", source)}
    assert [line for rule in RULES for line in rule(modules)] == []


def test_words_of_a_document_are_found_outside_of_code() -> None:
    found = words_in_texts({"a.md": "It `can not` fail.\nIt can\nnot fail, and Goes  on."})
    assert [line.partition(". ")[0] for line in found] == ["a.md:2: 'can not'", "a.md:3: 'Goes on'"]
