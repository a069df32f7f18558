"""A report page is one file that loads nothing, shows what it was given, and lets no string become markup."""

from __future__ import annotations

import base64
import io
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from crossmae.reports.page import (
    Bar,
    Commands,
    Fact,
    Gallery,
    Missing,
    PictureRow,
    Report,
    Section,
    Table,
    Words,
    embed_image,
    folded,
    format_bytes,
    format_seconds,
    percent,
)
from tests.crossmae.reports.pages import EVIL, plot


class Page(HTMLParser):
    """All elements, their attributes and the text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.elements if name in attrs]


def full_page(text: str = EVIL) -> str:
    picture = embed_image(np.zeros((4, 6, 3), np.uint8), alt=text)
    blocks = [
        plot(text),
        plot("Second"),
        Gallery([PictureRow([picture, picture], text)], caption=text),
        Table([text, "AP"], [[text, Bar(text, 0.5)], [text, text]], text, [text, text]),
        Commands([(text, text)]),
        Commands([(text, text)], folded=text),
        Words([(text, text), ("", text)]),
        Words([(text, text)], large=True),
        Missing(Path(text), text),
    ]
    sections = [Section("One", text, blocks)]
    return Report(text, text, [Fact(text, text, text)], sections, [(text, text)], answer=text).to_html()


def test_no_string_becomes_markup():
    page = Page(full_page())
    assert "script" not in {tag for tag, _ in page.elements}
    # Every place that takes a string shows it letter by letter: 8 in the head of page and section, 8 in and
    # under the plots, 2 in the gallery, 8 in the table, 3 in folded commands, 5 in words, 2 each in commands, missing
    # file and environment.
    assert page.text.count(EVIL) == 40
    assert page.values("alt") == [EVIL, EVIL]


def test_names_cannot_hide_on_a_page() -> None:
    page = Page(Report("a\x1bb \u202egnp.exe \udce9\n 5\N{NO-BREAK SPACE}%", "日本").to_html())
    assert "a\\x1bb \\u202egnp.exe \\udce9\n 5\N{NO-BREAK SPACE}%" in page.text
    assert "日本" in page.text


def test_page_loads_nothing():
    page = Page(full_page())
    links = page.values("src") + page.values("href") + page.values("xlink:href")
    assert links
    assert all(link.startswith(("data:image/", "#")) for link in links)
    policies = [attrs["content"] for tag, attrs in page.elements if tag == "meta" and "http-equiv" in attrs]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert not re.findall(r"url\((?!#)|@import", full_page("plain"))


def test_ids_are_unique_and_references_resolve():
    html = full_page("plain")
    ids = Page(html).values("id")
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', html)) <= set(ids)


def test_plots_side_by_side_other_blocks_alone():
    missing = Missing(Path("x"), "y")
    html = Report("t", "l", sections=[Section("s", "", [plot("A"), plot("B"), missing, plot("C")])]).to_html()
    assert [name for name in Page(html).values("class") if name.startswith("plots")] == [
        "plots",
        "plots single",
    ]


def test_folded_commands_wait_for_a_click_and_words_are_large_on_demand() -> None:
    commands = [("Evaluate", "python a.py")]
    blocks = [Commands(commands, folded="All commands"), Commands(commands), Words([("", "b")]), Words([], large=True)]
    page = Page(Report("t", "l", sections=[Section("s", "", blocks)]).to_html())
    assert [tag for tag, _ in page.elements].count("details") == 1
    assert page.text.count("python a.py") == 2
    assert [name for name in page.values("class") if name.startswith("card words")] == [
        "card words",
        "card words large",
    ]


def test_lossless_picture_keeps_every_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 20, 3), dtype=np.uint8)
    picture = embed_image(pixels, alt="noise", density=2, lossless=True)
    data = base64.b64decode(picture.source.removeprefix("data:image/png;base64,"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    assert (picture.width, picture.height) == (10, 5)


def test_missing_artifact_is_named():
    html = Report("t", "l", sections=[Section("s", "", [Missing(Path("a/b.json"), "curve")])]).to_html()
    assert "No curve: a/b.json: the file does not exist." in Page(html).text


def test_failed_page_leaves_the_old_one(tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(UndefinedError):
        Report("title", "lead", sections=[Section("s", "", ["no block"])]).write(path)  # type: ignore[list-item]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"),
        (12.4, "12 s"),
        (59.7, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_format_seconds(seconds: float, text: str):
    assert format_seconds(seconds) == text


def test_undefined_shares_are_dashes():
    assert [percent(share) for share in (0.123, None, float("nan"))] == ["12.3\N{NO-BREAK SPACE}%", "-", "-"]


def test_format_bytes():
    assert [format_bytes(n) for n in (12 * 2**20, 2**30, 1.84 * 2**30)] == ["12 MiB", "1.00 GiB", "1.84 GiB"]


def test_folded_command_is_the_same_command() -> None:
    command = "python tools/train_net.py --config-file a.yaml " + " ".join(f"KEY{i}='va lue'" for i in range(9))
    text = folded(command)
    assert text.count("\n") == 10
    assert shlex.split(text.replace("\\\n", "")) == shlex.split(command)
    assert folded("python a.py --short") == "python a.py --short"
