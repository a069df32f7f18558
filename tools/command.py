"""Run a subcommand of `crossmae`, which is the main function of a file in tools/.

    crossmae pretrain --config-file pretrain/small.yaml data.train=IMAGES output_dir=OUT
    crossmae detect --help

`crossmae NAME` has the arguments, messages and exit codes of the file. In bash and zsh, Tab completes subcommands,
options and names of configs after this line:

    eval "$(register-python-argcomplete crossmae)"
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import crossmae
from crossmae.errors import COMMANDS, UserError, advise, name_commands, run_cli

# The package of the tools: `crossmae_toolkit.tools` where crossmae is installed, `tools` if this file is run.
PACKAGE = __package__ or "tools"
TOOLS = Path(__file__).resolve().parent
if not __package__:
    sys.path.insert(0, str(TOOLS.parent))
NO_DETECTRON2 = "det needs detectron2"  # start of the message of det/__init__.py


def main(argv: Sequence[str] | None = None) -> None:
    """Run the subcommand that the first word names."""
    if "_ARGCOMPLETE" in os.environ:  # set by the shell, which asks for the words that may follow
        complete(os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])])
    words = list(sys.argv[1:] if argv is None else argv)
    run_cli(lambda: run_command(words))


def run_command(words: Sequence[str]) -> None:
    """Run a subcommand with its words, or print the list.

    Raises:
        UserError: There is no such subcommand, or a library that it needs is not installed.
        SystemExit: The exit code of the subcommand, if it is not 0.
    """
    name, *rest = words or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
        return
    if name == "--version":
        print(crossmae.__version__)
        return
    if name not in COMMANDS:
        begun = [one for one in COMMANDS if name and one.startswith(name)]
        near = begun or difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
        what_to_do = f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(COMMANDS)}."
        raise UserError(f"crossmae {name}: there is no such command. {what_to_do}")
    sys.argv = [f"crossmae {name}", *rest]  # the parser shows the first word as the name of the program
    try:
        if code := load(name).main():
            raise SystemExit(code)
    except ImportError as error:
        raise UserError(missing_library(name, error)) from error


def load(name: str) -> ModuleType:
    """Import the module of a subcommand, with its examples in the help."""
    top, *inner = Path(COMMANDS[name]).with_suffix("").parts
    module = importlib.import_module(".".join([PACKAGE if top == "tools" else top, *inner]))
    module.__doc__ = name_commands(module.__doc__ or "")
    return module


def complete(line: str) -> None:
    """Print how the last word of a line can end, and exit."""
    import argcomplete

    _, *words = f"{line}|".split()
    if len(words) > 1 and words[0] in COMMANDS:
        os.environ["_ARGCOMPLETE"] = "2"  # the subcommand takes the place of the program
        # Every tool builds its parser in its main function, and parses next.
        argparse.ArgumentParser.parse_args = _complete_options  # type: ignore[assignment, method-assign]
        argparse.ArgumentParser.parse_intermixed_args = _complete_options  # type: ignore[assignment, method-assign]
        load(words[0]).main()
    parser = argparse.ArgumentParser("crossmae")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("command", choices=list(COMMANDS))
    argcomplete.autocomplete(parser)


def _complete_options(parser: argparse.ArgumentParser, *_: Any) -> None:
    import argcomplete

    for action in parser._actions:
        if action.dest == "config_file":
            action.completer = _complete_config  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)


def _complete_config(prefix: str, **_: Any) -> list[str]:
    from argcomplete.completers import FilesCompleter

    from crossmae.training.config import CONFIG_ROOT

    names = [path.relative_to(CONFIG_ROOT).as_posix() for path in CONFIG_ROOT.rglob("*.yaml")]
    return [name for name in names if name.startswith(prefix)] + list(FilesCompleter(["yaml"])(prefix))


def missing_library(name: str, error: ImportError) -> str:
    """Describe how to install what a subcommand cannot import.

    Raises the error again if it is about no library that an extra of crossmae has.
    """
    if str(error).startswith(NO_DETECTRON2):
        return f"crossmae {name}: detectron2 is not installed. Run: {advise('python tools/install_detectron2.py')}"
    from crossmae.doctor import MODULES, library_name, read_lists

    absent = (error.name or "").partition(".")[0]
    for extra, requirements in read_lists().items():
        libraries = map(library_name, requirements)
        if extra not in ("core", "dev") and absent in (MODULES.get(one, one).partition(".")[0] for one in libraries):
            install = advise(f'pip install -e ".[{extra}]"')
            return f"crossmae {name}: {absent} is not installed. Run: {install}"
    raise error


def overview() -> str:
    """List the subcommands, each with the first line of its file."""
    width = max(map(len, COMMANDS))
    lines = ["usage: crossmae COMMAND ...", "", "commands:"]
    for name, path in COMMANDS.items():
        top, inner = path.split("/", 1)
        file = (TOOLS if top == "tools" else Path(crossmae.__file__).parent) / inner
        with file.open(encoding="utf-8") as text:
            lines.append(f"  {name:<{width}}  {text.readline().strip().strip(chr(34))}")
    example = "crossmae pretrain --config-file pretrain/small.yaml data.train=IMAGES output_dir=OUT"
    return "\n".join([*lines, "", "`crossmae COMMAND --help` has arguments and examples, such as:", f"  {example}"])


if __name__ == "__main__":
    main()
