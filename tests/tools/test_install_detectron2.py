"""The promises of tools/install_detectron2.py, without a network and without touching this environment.

- The wheel it makes is the index's wheel less the extension and the stray `tools` package, every other file
  byte for byte; its RECORD, tag, name, version and requirements are right, and pip accepts it.
- A file with another sha256 installs nothing: exit code 2, one line, no call of pip, no temporary files.
- What works is left alone; a distribution that owns the same files is removed before the installation.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import install_detectron2 as installer

INFO = "sal_detectron2-0.7.2.dist-info"
NEW_INFO = "sal_detectron2-0.7.2+purepy.dist-info"
METADATA = """Metadata-Version: 2.1
Name: sal-detectron2
Version: 0.7.2
Requires-Dist: termcolor>=1.1
Requires-Dist: numpy<2
Requires-Dist: black
Provides-Extra: dev
Requires-Dist: black==23.3.0; extra == "dev"
"""
STRIPPED = ("detectron2/_C.cpython-310-x86_64-linux-gnu.so", "tools/__init__.py", "tools/train_net.py")
SOURCES = {
    "detectron2/__init__.py": b'__version__ = "0.7.2"\n',
    "detectron2/_Configs.py": b"",
    "detectron2/tools/x.py": b"1\n",
}


def index_wheel(folder: Path, sources: dict[str, bytes] = SOURCES) -> Path:
    """A wheel laid out like the index's, with `sources` as its package."""
    wheel = folder / "sal_detectron2-0.7.2-cp310-none-any.whl"
    files = dict.fromkeys(STRIPPED, b"\x7fELF or stray") | sources
    files |= {f"{INFO}/METADATA": METADATA.encode(), f"{INFO}/LICENSE": b"Apache\n"}
    files |= {f"{INFO}/WHEEL": b"Root-Is-Purelib: false\nTag: cp310-cp310-linux_x86_64\n"}
    files |= {f"{INFO}/top_level.txt": b"detectron2\ntools\n", f"{INFO}/RECORD": b"detectron2/_C.so,sha256=stale,1\n"}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # dated 1980
    return wheel


def unpack(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def pip_calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """Replaces pip by a recorder, which "downloads" the fake wheel; temporary files go to tmp_path/tmp."""
    calls: list[tuple[str, ...]] = []

    def record(*arguments: str) -> None:
        calls.append(arguments)
        if arguments[0] == "download":
            index_wheel(Path(arguments[arguments.index("--dest") + 1]))

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(installer, "pip", record)
    monkeypatch.setattr(installer, "installed_version", lambda name: None)
    monkeypatch.setattr(installer, "import_failure", lambda modules=(): None)
    return calls


@pytest.fixture
def trusted_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A fake wheel whose sha256 is the expected one."""
    wheel = index_wheel(tmp_path)
    monkeypatch.setattr(installer, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return wheel


PATHS = st.from_regex(r"detectron2/([a-zA-Z_]{1,8}/){0,2}[a-z_]{1,8}\.(py|yaml)", fullmatch=True)


@settings(max_examples=25, deadline=None)
@given(sources=st.dictionaries(PATHS, st.binary(max_size=200), max_size=6))
def test_keeps_every_source_byte_for_byte_and_records_it(sources: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        wheel = installer.make_pure_wheel(index_wheel(Path(name), sources), Path(name))
        files = unpack(wheel)

    info = {f"{NEW_INFO}/{name}" for name in ("METADATA", "LICENSE", "WHEEL", "top_level.txt", "RECORD")}
    assert set(files) == set(sources) | info
    assert {name: files[name] for name in sources} == sources
    record = {
        path: (digest, size) for path, digest, size in csv.reader(files[f"{NEW_INFO}/RECORD"].decode().splitlines())
    }
    assert set(record) == set(files)
    for name, content in files.items():
        expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        is_record = name.endswith("/RECORD")  # cannot hold its own hash
        assert record[name] == (("", "") if is_record else (f"sha256={expected}", str(len(content))))


def test_is_tagged_as_plain_python_and_says_that_it_was_changed(tmp_path: Path) -> None:
    wheel = installer.make_pure_wheel(index_wheel(tmp_path), tmp_path)
    files = unpack(wheel)
    tag = Parser().parsestr(files[f"{NEW_INFO}/WHEEL"].decode())
    metadata = Parser().parsestr(files[f"{NEW_INFO}/METADATA"].decode())

    assert wheel.name == "sal_detectron2-0.7.2+purepy-py3-none-any.whl"
    assert (tag["Root-Is-Purelib"], tag["Tag"]) == ("true", "py3-none-any")
    assert files[f"{NEW_INFO}/top_level.txt"] == b"detectron2\n"
    assert (metadata["Name"], metadata["Version"]) == ("sal-detectron2", "0.7.2+purepy")
    assert metadata.get_all("Requires-Dist") == [
        "termcolor>=1.1",
        "numpy",
        "fvcore<0.1.6,>=0.1.5",
        "iopath<0.1.10,>=0.1.7",
        'black==23.3.0; extra == "dev"',
    ]


def test_is_the_same_file_every_time(tmp_path: Path) -> None:
    source = index_wheel(tmp_path)
    first = installer.make_pure_wheel(source, tmp_path).read_bytes()
    wheel = installer.make_pure_wheel(source, tmp_path)
    assert wheel.read_bytes() == first
    with zipfile.ZipFile(wheel) as archive:
        assert {member.date_time[0] for member in archive.infolist()} == {1980}  # no trace of today


def test_pip_accepts_the_wheel(tmp_path: Path) -> None:
    wheel = installer.make_pure_wheel(index_wheel(tmp_path), tmp_path)
    target = tmp_path / "site"
    options = ("-qq", "--no-index", "--no-deps", "--target", str(target))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    assert sorted(path.name for path in target.iterdir()) == ["detectron2", NEW_INFO]


@pytest.mark.parametrize("downloaded", [True, False], ids=["from the index", "--wheel"])
def test_another_sha256_installs_nothing(
    downloaded: bool, pip_calls: list[tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [] if downloaded else ["--wheel", str(index_wheel(tmp_path))]

    assert installer.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: sal_detectron2-0.7.2-cp310-none-any.whl: sha256 is ")
    assert installer.WHEEL_SHA256 in error
    assert [call[0] for call in pip_calls] == ["download"] * downloaded
    assert list((tmp_path / "tmp").iterdir()) == []


def test_installs_the_stripped_wheel_and_leaves_nothing_behind(
    pip_calls: list[tuple[str, ...]], trusted_wheel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert installer.main(["--wheel", str(trusted_wheel)]) == 0
    (call,) = pip_calls
    assert call[0] == "install"
    assert Path(call[-1]).name == "sal_detectron2-0.7.2+purepy-py3-none-any.whl"
    assert list((tmp_path / "tmp").iterdir()) == []
    out = capsys.readouterr().out
    assert all(f"[{step}/5]" in out for step in range(1, 6))


def test_the_other_distribution_is_removed_before(
    pip_calls: list[tuple[str, ...]], trusted_wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "installed_version", {"detectron2": "0.6"}.get)
    assert installer.main(["--force", "--wheel", str(trusted_wheel)]) == 0
    assert [call[0] for call in pip_calls] == ["uninstall", "install"]
    assert pip_calls[0][-1] == "detectron2"


@pytest.mark.parametrize("name, version", [("sal-detectron2", "0.7.2+purepy"), ("detectron2", "0.6")])
def test_a_working_installation_is_left_alone(
    name: str,
    version: str,
    pip_calls: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(installer, "installed_version", {name: version}.get)
    assert installer.main([]) == 0
    assert pip_calls == []
    assert f"{name} {version} is installed" in capsys.readouterr().out


def test_the_unstripped_or_broken_one_is_replaced(
    pip_calls: list[tuple[str, ...]], trusted_wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "installed_version", {"sal-detectron2": "0.7.2"}.get)
    assert installer.working_installation("index") is None
    monkeypatch.setattr(installer, "installed_version", {"sal-detectron2": "0.7.2+purepy"}.get)
    assert installer.working_installation("git") is None
    monkeypatch.setattr(installer, "import_failure", lambda modules=(): "ImportError: no")
    assert installer.working_installation("index") is None


@pytest.mark.parametrize("builds", [True, False])
def test_from_git_replaces_only_after_a_successful_build(
    builds: bool, pip_calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: str) -> None:
        pip_calls.append(arguments)
        if arguments[0] == "wheel" and not builds:
            raise installer.InstallError("pip wheel failed")
        if arguments[0] == "wheel":
            (Path(arguments[arguments.index("--wheel-dir") + 1]) / "detectron2-0.6-cp311-cp311-any.whl").touch()

    monkeypatch.setattr(installer, "pip", build)
    monkeypatch.setattr(installer.shutil, "which", lambda program: program)
    monkeypatch.setattr(installer, "installed_version", {"sal-detectron2": "0.7.2+purepy"}.get)
    assert installer.main(["--from", "git"]) == (0 if builds else 2)
    assert [call[0] for call in pip_calls] == ["install", "wheel", *(["uninstall", "install"] if builds else [])]
    assert "--no-build-isolation" in pip_calls[1]
    assert pip_calls[1][-1].endswith("detectron2.git@a59f05630a8f205756064244bf5beb8661f96180")


def test_an_installation_that_does_not_import_is_an_error(
    pip_calls: list[tuple[str, ...]],
    trusted_wheel: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(installer, "import_failure", lambda modules=(): "ImportError: no fvcore")
    assert installer.main(["--wheel", str(trusted_wheel)]) == 2
    assert "does not import: ImportError: no fvcore" in capsys.readouterr().err


def test_user_errors_are_one_line(
    pip_calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert installer.main(["--wheel", "no/such.whl"]) == 2
    error = capsys.readouterr().err
    assert error == "error: no/such.whl: cannot be read: No such file or directory. Nothing was installed.\n"
    monkeypatch.setenv("PATH", "")
    assert installer.main(["--from", "git"]) == 2
    assert capsys.readouterr().err.startswith("error: --from git needs git")
    monkeypatch.setattr(installer.importlib.util, "find_spec", lambda name: None if name == "torch" else name)
    assert installer.main([]) == 2
    assert 'pip install -e ".[det]"' in capsys.readouterr().err
    assert pip_calls == []


def test_a_failing_pip_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(installer.InstallError, match=r"pip no-such-command failed with exit code 1"):
        installer.pip("no-such-command")
    assert "no-such-command" in capfd.readouterr().err  # pip's own message is not swallowed


def test_import_failure_gives_the_last_line() -> None:
    assert installer.import_failure(("json",)) is None
    assert installer.import_failure(("no_such_module",)) == "ModuleNotFoundError: No module named 'no_such_module'"
