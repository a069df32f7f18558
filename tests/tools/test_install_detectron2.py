"""The promises of tools/install_detectron2.py, without a network and without touching this environment.

- The wheel that it makes has the Python sources of the index's wheel or of a Git commit, byte for byte, and nothing
  else. Its RECORD, tag, name, version and requirements are right, and pip accepts it.
- Files of another SHA-256 install nothing: exit code 2, one line, no installation, no temporary files.
- If the index has no wheel or another one, Git is next. A wheel that was written on another machine needs neither.
- What works is left alone; a distribution that owns the same files is removed before the installation.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from email.parser import Parser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import install_detectron2 as installer

INFO = "sal_detectron2-0.7.2+purepy.dist-info"
STRIPPED = ("detectron2/_C.cpython-310-x86_64-linux-gnu.so", "tools/__init__.py", "tools/train_net.py")
SOURCES = {
    "detectron2/__init__.py": b'__version__ = "0.7.2"\n',
    "detectron2/_Configs.py": b"",
    "detectron2/tools/x.py": b"1\n",
}
LICENCE = {"LICENSE": b"Apache\n"}
# A repository laid out like upstream's, and where its files are in the wheel; None: nowhere.
REPOSITORY: dict[str, tuple[str | None, bytes]] = {
    "detectron2/__init__.py": ("detectron2/__init__.py", b'__version__ = "0.6"\r\n'),
    "detectron2/layers/nms.py": ("detectron2/layers/nms.py", b"1\n"),
    "configs/Base.yaml": ("detectron2/model_zoo/configs/Base.yaml", b"A: 1\n"),
    "projects/PointRend/point_rend/__init__.py": ("detectron2/projects/point_rend/__init__.py", b"2\n"),
    "LICENSE": ("LICENSE", b"Apache\n"),
    "detectron2/layers/csrc/vision.cpp": (None, b"int x;"),
    "detectron2/data/README.md": (None, b"words"),
    "projects/TensorMask/x.py": (None, b"3\n"),
    "tools/train_net.py": (None, b"4\n"),
    "setup.py": (None, b"raise SystemExit('no code of the repository is run')"),
}


def index_wheel(folder: Path, sources: dict[str, bytes] = SOURCES) -> Path:
    """A wheel laid out like the index's, with `sources` as its package."""
    wheel = folder / "sal_detectron2-0.7.2-cp310-none-any.whl"
    info = "sal_detectron2-0.7.2.dist-info"
    files = dict.fromkeys(STRIPPED, b"\x7fELF or stray") | sources
    files |= {f"{info}/{name}": b"stale" for name in ("METADATA", "WHEEL", "top_level.txt", "RECORD")}
    files |= {f"{info}/LICENSE": b"Apache\n"}
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return wheel


def unpack(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def git(*words: str | Path) -> str:
    who = {f"GIT_{role}_{part}": "x@y" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
    environment = os.environ | who | {"GIT_CONFIG_GLOBAL": os.devnull}
    return subprocess.run(["git", *words], env=environment, check=True, capture_output=True, text=True).stdout.strip()


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
def _trusted_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of the fake wheel are the pinned ones."""
    pinned = replace(installer.SNAPSHOT, sha256=installer.fingerprint(SOURCES | LICENCE))
    monkeypatch.setattr(installer, "SNAPSHOT", pinned)


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Git repository whose first commit and its files are the pinned ones. The second commit differs."""
    root = tmp_path / "upstream"
    git("init", "--quiet", root)
    for name, (_, content) in REPOSITORY.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    for message in ("pinned", "later"):
        git("-C", root, "add", "--all")
        git("-C", root, "commit", "--quiet", "--message", message)
        (root / "detectron2" / "layers" / "nms.py").write_bytes(b"changed later\n")
    monkeypatch.setattr(installer, "UPSTREAM_COMMIT", git("-C", root, "rev-parse", "HEAD~"))
    files = {home: content for home, content in REPOSITORY.values() if home}
    monkeypatch.setattr(installer, "UPSTREAM", replace(installer.UPSTREAM, sha256=installer.fingerprint(files)))
    return root


def no_index(*arguments: str) -> None:
    raise installer.InstallError("pip download failed with exit code 1.")


PATHS = st.from_regex(r"detectron2/([a-zA-Z_]{1,8}/){0,2}[a-z_]{1,8}\.(py|yaml)", fullmatch=True)


@settings(max_examples=25, deadline=None)
@given(sources=st.dictionaries(PATHS, st.binary(max_size=200), max_size=6))
def test_keeps_every_source_byte_for_byte_and_records_it(sources: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        read = installer.read_wheel(index_wheel(Path(name), sources))
        files = unpack(installer.write_wheel(read, installer.SNAPSHOT, Path(name)))

    info = {f"{INFO}/{name}" for name in ("METADATA", "LICENSE", "WHEEL", "top_level.txt", "RECORD")}
    assert set(files) == set(sources) | info
    assert {name: files[name] for name in sources} == sources
    record = {path: (digest, size) for path, digest, size in csv.reader(files[f"{INFO}/RECORD"].decode().splitlines())}
    assert set(record) == set(files)
    for name, content in files.items():
        expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        is_record = name.endswith("/RECORD")  # cannot hold its own hash
        assert record[name] == (("", "") if is_record else (f"sha256={expected}", str(len(content))))


def test_is_tagged_as_plain_python_and_says_that_it_was_changed(tmp_path: Path) -> None:
    for release, info in ((installer.SNAPSHOT, INFO), (installer.UPSTREAM, "detectron2-0.6+02b5c4e2.purepy.dist-info")):
        wheel = installer.write_wheel(SOURCES | LICENCE, release, tmp_path)
        files = unpack(wheel)
        tag = Parser().parsestr(files[f"{info}/WHEEL"].decode())
        metadata = Parser().parsestr(files[f"{info}/METADATA"].decode())

        assert wheel.name == f"{info.removesuffix('.dist-info')}-py3-none-any.whl"
        assert (tag["Root-Is-Purelib"], tag["Tag"]) == ("true", "py3-none-any")
        assert files[f"{info}/top_level.txt"] == b"detectron2\n"
        assert (metadata["Name"], metadata["Version"]) == (release.name, release.version)
        needed = metadata.get_all("Requires-Dist") or []
        assert {"numpy", "fvcore<0.1.6,>=0.1.5", "iopath<0.1.10,>=0.1.7"} <= set(needed)
        assert "black" not in needed


@pytest.mark.parametrize("change", ["content", "name", "a file more", "a file less"])
def test_every_change_has_another_fingerprint(change: str) -> None:
    changed = {
        "content": SOURCES | {"detectron2/_Configs.py": b"import os\n"},
        "name": {name.replace("_Configs", "_configs"): content for name, content in SOURCES.items()},
        "a file more": SOURCES | {"detectron2/y.py": b""},
        "a file less": dict(list(SOURCES.items())[1:]),
    }[change]
    assert installer.fingerprint(changed) != installer.fingerprint(SOURCES)
    assert installer.fingerprint(dict(reversed(SOURCES.items()))) == installer.fingerprint(SOURCES)


def test_is_the_same_file_every_time(tmp_path: Path) -> None:
    first = installer.write_wheel(SOURCES | LICENCE, installer.SNAPSHOT, tmp_path).read_bytes()
    wheel = installer.write_wheel(SOURCES | LICENCE, installer.SNAPSHOT, tmp_path)
    assert wheel.read_bytes() == first
    with zipfile.ZipFile(wheel) as archive:
        assert {member.date_time[0] for member in archive.infolist()} == {1980}  # no trace of today


def test_pip_accepts_the_wheel(tmp_path: Path) -> None:
    wheel = installer.write_wheel(SOURCES | LICENCE, installer.UPSTREAM, tmp_path)
    target = tmp_path / "site"
    options = ("-qq", "--no-index", "--no-deps", "--target", str(target))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=True)
    assert sorted(path.name for path in target.iterdir()) == ["detectron2", "detectron2-0.6+02b5c4e2.purepy.dist-info"]


def test_other_files_in_a_wheel_install_nothing(
    pip_calls: list[tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = index_wheel(tmp_path)
    assert installer.main(["--wheel", str(wheel)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"error: {wheel}: the SHA-256 of the files is {installer.fingerprint(SOURCES | LICENCE)},")
    assert installer.SNAPSHOT.sha256 in error
    assert installer.UPSTREAM.sha256 in error
    assert "Nothing was installed." in error
    assert pip_calls == []
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.usefixtures("_trusted_index")
@pytest.mark.parametrize("local", [False, True], ids=["from the index", "--wheel"])
def test_installs_the_stripped_wheel_and_leaves_nothing_behind(
    local: bool, pip_calls: list[tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert installer.main(["--wheel", str(index_wheel(tmp_path))] if local else []) == 0
    assert [call[0] for call in pip_calls] == ["download"] * (not local) + ["install"]
    assert Path(pip_calls[-1][-1]).name == "sal_detectron2-0.7.2+purepy-py3-none-any.whl"
    assert list((tmp_path / "tmp").iterdir()) == []
    out = capsys.readouterr().out
    assert all(f"[{step}/5]" in out for step in range(1, 6))


def test_git_has_the_files_of_the_pinned_commit(repository: Path, tmp_path: Path) -> None:
    files = installer.fetch_from_git(str(repository), tmp_path)
    assert files == {home: content for home, content in REPOSITORY.values() if home}


@pytest.mark.parametrize("trouble", ["asked for", "gone", "refused"])
def test_git_is_next_if_the_index_has_not_the_pinned_files(
    trouble: str,
    pip_calls: list[tuple[str, ...]],
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if trouble == "gone":
        pip = installer.pip
        monkeypatch.setattr(installer, "pip", lambda *words: (no_index if words[0] == "download" else pip)(*words))
    words = ["--from", "git"] if trouble == "asked for" else []
    assert installer.main([*words, "--repository", str(repository)]) == 0
    assert pip_calls[-1][0] == "install"
    assert Path(pip_calls[-1][-1]).name == "detectron2-0.6+02b5c4e2.purepy-py3-none-any.whl"
    reason = {"asked for": "fetch commit", "gone": "exit code 1", "refused": "the SHA-256 of the files is"}[trouble]
    assert reason in capsys.readouterr().out


def test_another_commit_or_other_files_of_git_install_nothing(
    pip_calls: list[tuple[str, ...]],
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = ["--from", "git", "--repository", str(repository)]
    monkeypatch.setattr(installer, "UPSTREAM", replace(installer.UPSTREAM, sha256="0" * 64))
    assert installer.main(words) == 2
    assert f"error: {repository}: the SHA-256 of the files is" in capfd.readouterr().err
    monkeypatch.setattr(installer, "UPSTREAM_COMMIT", "0" * 40)
    assert installer.main(words) == 2
    error = capfd.readouterr().err
    assert "error: git failed with exit code 128. See the message of git above. Nothing was installed." in error
    assert "--save FOLDER" in error
    assert pip_calls == []


def test_no_source_at_all_names_both_reasons(
    pip_calls: list[tuple[str, ...]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert installer.main(["--repository", str(tmp_path / "absent")]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "sal-detectron2==0.7.2: the SHA-256 of the files is" in line
    assert "git failed with exit code 128" in line
    assert [call[0] for call in pip_calls] == ["download"]


def test_a_saved_wheel_is_installed_on_a_machine_without_a_network(
    pip_calls: list[tuple[str, ...]], repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--from", "git", "--repository", str(repository)]
    monkeypatch.setattr(installer.importlib.util, "find_spec", lambda name: None if name == "torch" else name)
    assert installer.main([*words, "--save", str(tmp_path / "usb" / "stick")]) == 0
    (wheel,) = (tmp_path / "usb" / "stick").iterdir()
    assert pip_calls == []
    monkeypatch.undo()
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(installer, "pip", lambda *words: calls.append(words))
    monkeypatch.setattr(installer, "installed_version", lambda name: None)
    monkeypatch.setattr(installer, "import_failure", lambda modules=(): None)
    files = {home: content for home, content in REPOSITORY.values() if home}
    monkeypatch.setattr(installer, "UPSTREAM", replace(installer.UPSTREAM, sha256=installer.fingerprint(files)))
    assert installer.main(["--wheel", str(wheel)]) == 0
    assert [(call[0], Path(call[-1]).name) for call in calls] == [("install", wheel.name)]


@pytest.mark.usefixtures("_trusted_index")
@pytest.mark.parametrize("mine", ["sal-detectron2", "detectron2"])
def test_the_other_distribution_is_removed_before(
    mine: str, pip_calls: list[tuple[str, ...]], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "installed_version", {"sal-detectron2": "0.7.2+purepy", "detectron2": "0.6"}.get)
    source = {"sal-detectron2": "index", "detectron2": "git"}[mine]
    assert installer.main(["--force", "--from", source, "--repository", str(repository)]) == 0
    (other,) = {"sal-detectron2", "detectron2"} - {mine}
    assert [call[0] for call in pip_calls][-2:] == ["uninstall", "install"]
    assert pip_calls[-2][-1] == other


@pytest.mark.parametrize(
    "name, version, words",
    [
        ("sal-detectron2", "0.7.2+purepy", []),
        ("detectron2", "0.6", []),
        ("detectron2", "0.6", ["--compile"]),
        ("detectron2", "0.6+02b5c4e2.purepy", ["--from", "git"]),
    ],
)
def test_a_working_installation_is_left_alone(
    name: str,
    version: str,
    words: list[str],
    pip_calls: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(installer, "installed_version", {name: version}.get)
    assert installer.main(words) == 0
    assert pip_calls == []
    assert f"{name} {version} is installed" in capsys.readouterr().out


def test_the_unstripped_broken_or_other_one_is_replaced(
    pip_calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "installed_version", {"sal-detectron2": "0.7.2"}.get)
    assert installer.working_installation("index") is None
    monkeypatch.setattr(installer, "installed_version", {"sal-detectron2": "0.7.2+purepy"}.get)
    assert installer.working_installation("git") is None
    assert installer.working_installation("compile") is None
    monkeypatch.setattr(installer, "installed_version", {"detectron2": "0.6"}.get)
    assert installer.working_installation("git") is None
    monkeypatch.setattr(installer, "import_failure", lambda modules=(): "no _C" if "detectron2._C" in modules else None)
    assert installer.working_installation("index") == "detectron2 0.6"
    assert installer.working_installation("compile") is None
    monkeypatch.setattr(installer, "import_failure", lambda modules=(): "ImportError: no")
    assert installer.working_installation("index") is None


@pytest.mark.parametrize("builds", [True, False])
def test_compile_replaces_only_after_a_successful_build(
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
    assert installer.main(["--compile"]) == (0 if builds else 2)
    assert [call[0] for call in pip_calls] == ["install", "wheel", *(["uninstall", "install"] if builds else [])]
    assert "--no-build-isolation" in pip_calls[1]
    assert pip_calls[1][-1].endswith("detectron2.git@02b5c4e295e990042a714712c21dc79b731e8833")


@pytest.mark.usefixtures("_trusted_index")
def test_an_installation_that_does_not_import_is_an_error(
    pip_calls: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(installer, "import_failure", lambda modules=(): "ImportError: no fvcore")
    assert installer.main([]) == 2
    assert "does not import: ImportError: no fvcore" in capsys.readouterr().err


def test_user_errors_are_one_line(
    pip_calls: list[tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert installer.main(["--wheel", "no/such.whl"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no/such.whl: cannot be read: No such file or directory. Nothing was installed.")
    (tmp_path / "torn.whl").write_bytes(b"PK")
    assert installer.main(["--wheel", str(tmp_path / "torn.whl")]) == 2
    assert "torn.whl: cannot be read: File is not a zip file." in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    for words in (["--from", "git"], ["--compile"]):
        assert installer.main(words) == 2
        assert capsys.readouterr().err.startswith("error: git: is missing. Install git")
    monkeypatch.setattr(installer.importlib.util, "find_spec", lambda name: None if name == "torch" else name)
    assert installer.main([]) == 2
    assert 'pip install -e ".[det]"' in capsys.readouterr().err
    assert pip_calls == []
    with pytest.raises(SystemExit, match="2"):
        installer.main(["--compile", "--save", str(tmp_path)])


@pytest.mark.usefixtures("_trusted_index")
def test_a_folder_that_cannot_be_written_is_one_line(
    pip_calls: list[tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert installer.main(["--save", str(tmp_path / "file")]) == 2
    assert "cannot be written: File exists. Name another folder." in capsys.readouterr().err


def test_a_failing_pip_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(installer.InstallError, match=r"pip no-such-command failed with exit code 1"):
        installer.pip("no-such-command")
    assert "no-such-command" in capfd.readouterr().err  # pip's own message is not swallowed


def test_import_failure_gives_the_last_line() -> None:
    assert installer.import_failure(("json",)) is None
    assert installer.import_failure(("no_such_module",)) == "ModuleNotFoundError: No module named 'no_such_module'"
