"""The documents: their commands are accepted, their code parses, their links lead somewhere."""

import importlib
import importlib.metadata
import itertools
import json
import re
import shlex
import subprocess
import sys

from support.project import PROJECT

import click
import pytest

DOCUMENTS = sorted({*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md"), *PROJECT.glob("benchmarks/*.md")})
DOCUMENTS.remove(PROJECT / "CHANGELOG.md")  # it names what earlier versions had
SCRIPTS = [path.name for path in PROJECT.glob("*.py") if "def parse_arguments()" in path.read_text()]
PROGRAMS = ("python", "python3", "mlflow", "prefect", "dask", "pip")  # commands of other programs are not checked
COMMAND = rf"([A-Z_]+=\S+ |\$Env:[^;]*; )*(venv/bin/)?({'|'.join(PROGRAMS)}) \S"

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def read_blocks(text: str) -> list[tuple[str, str]]:
    """Return the language and the content of each code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def split_commands(code: str) -> list[list[str]]:
    """Return the words of each command in shell code, without variables, pipes, redirections and comments."""
    commands, is_redirected = [[]], False
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()<")
        lexer.whitespace_split, lexer.commenters = True, ""
        commands.append([])
        for word in lexer:
            if word.startswith("#"):
                break
            if set(word) <= set(";&|()"):
                commands.append([])
            elif word == "<" or is_redirected:
                is_redirected = word == "<"
            elif commands[-1] or not re.match(r"[A-Z_]+=", word):
                commands[-1].append(word)
    return [command for command in commands if command]


def read_commands(text: str) -> list[list[str]]:
    """Return the commands in shell blocks and in inline code."""
    codes = []
    for language, code in read_blocks(text):
        if language == "bash":
            codes.append(code)
        elif language == "powershell":
            codes.append(code.replace("\\", "/"))
        elif language == "console":
            codes += re.findall(r"^\$ (.*)$", code, re.MULTILINE)
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    codes += [code for code in inline if re.match(COMMAND, code)]
    return [command for code in codes for command in split_commands(code)]


ALL_COMMANDS = {tuple(command) for path in DOCUMENTS for command in read_commands(path.read_text())}
CHECKED_COMMANDS = sorted(command for command in ALL_COMMANDS if command[0].rpartition("/")[2] in PROGRAMS)


@pytest.mark.parametrize("command", CHECKED_COMMANDS, ids=lambda command: " ".join(command)[:90])
def test_command_is_accepted(command, monkeypatch, capsys):
    program, *words = command
    name = program.rpartition("/")[2]
    if name in ("python", "python3"):
        check_python(words, monkeypatch, capsys)
    elif name in ("mlflow", "dask"):
        check_click(load_command(name), words)
    elif name == "prefect":
        check_prefect(words)
    elif name == "pip":
        check_pip(words)


def check_python(words: list[str], monkeypatch, capsys) -> None:
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1])
        assert all((PROJECT / word).exists() for word in words[2:] if word.startswith("tests"))
        return
    script, *options = words
    assert (PROJECT / script).is_file(), script
    if script in SCRIPTS:
        monkeypatch.setattr(sys, "argv", [script, *options])
        module = importlib.import_module(script.removesuffix(".py"))
        status = 0
        try:
            module.parse_arguments()
        except SystemExit as end:  # --help exits, too
            status = end.code
        assert status == 0, capsys.readouterr().err
    else:
        source = (PROJECT / script).read_text()
        assert all(f'"{option}"' in source for option in options if option.startswith("-")), words


def load_command(name: str) -> click.Command:
    """Return the click command of a program."""
    if name == "dask":
        from dask.cli import cli

        plugins = {entry.name: entry.load() for entry in importlib.metadata.entry_points(group="dask_cli")}
        return click.Group("dask", commands=plugins | cli.commands)
    return next(iter(importlib.metadata.entry_points(group="console_scripts", name=name))).load()


def check_click(command: click.Command, words: list[str]) -> None:
    words = list(words)
    while isinstance(command, click.Group):
        name = words.pop(0)
        assert name in command.commands, name
        command = command.commands[name]
    with click.Context(command, info_name="documented") as context:
        command.make_parser(context).parse_args(words)  # raises UsageError for an unknown option


def check_prefect(words: list[str]) -> None:
    from prefect.cli._app import _app

    quiet = {"exit_on_error": False, "print_error": False}
    _, bound, _ = _app.meta.parse_args(words, **quiet)  # consumes global options such as --no-prompt
    _app.parse_args(bound.args, **quiet)


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    for option, file in itertools.pairwise(words):
        assert option != "-r" or (PROJECT / file).is_file(), file


@each_document
def test_code_block_parses_in_its_language(document):
    for language, code in read_blocks(document.read_text()):
        if language == "bash":
            end = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
            assert end.returncode == 0, end.stderr
        elif language == "python":
            compile(code, document, "exec")
        elif language == "json":
            json.loads(code)


def heading_anchors(text: str) -> set[str]:
    """Return the anchors that GitHub generates for the headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_link_leads_somewhere(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text):
        if not target.startswith("https://"):
            name, _, section = target.partition("#")
            path = document.parent / name if name else document
            assert path.exists(), target
            assert not section or section in heading_anchors(path.read_text()), target


def test_evidence_in_the_lab_report_is_a_test():
    named = set(re.findall(r"`(test_[a-z]\w+)`", (PROJECT / "lab_report.md").read_text()))
    sources = "\n".join(path.read_text() for path in PROJECT.glob("tests/**/test_*.py"))
    assert named - {"test_loss", "test_accuracy"} <= set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))
