"""What README.md and lab_report.md tell: each command is accepted, each name exists, each link leads somewhere."""

import ast
import importlib
import importlib.metadata
import itertools
import json
import re
import shlex
import subprocess
import sys
import tomllib

import ml_workflow
from make_docs import read_region
from support.project import PROJECT
from workflow.data.split import MIN_IMAGES_PER_CLASS
from workflow.tracking.run import SAMPLING_SECONDS

import click
import pytest
from PIL import Image

DOCUMENTS = ("README.md", "lab_report.md", "benchmarks/README.md", "CONTRIBUTING.md")
PARSERS = [path.name for path in PROJECT.glob("*.py") if "def parse_arguments()" in path.read_text()]
ELSEWHERE = (
    "docker",
    "az",
    "cd",
    "curl",
    "base64",
    "printf",
    "tr",
    "grep",
    "which",
    "conda",
    "jupyter",
)  # programs that are none of Python's
SHELLS = ("bash", "powershell", "console")
OTHER_TOOLS = "### The same steps elsewhere"  # the section whose names are not ours
OUTSIDE = {  # names of things outside the repository that no file of it says
    "PATH",
    ".prefect",
    "venv/lib/python3.11/site-packages",
    "venv/Lib/site-packages",
    "venv/bin",
    "venv/Scripts",
    "venv",
    "-m",
    "-k",
    ".netrc",
    "client_max_body_size 100m;",
    "UnusableError.serialize_as_json",
    "flow.parameters.properties",
    "python",
    "mlflow.autolog()",
    "mlflow.tensorflow.autolog",
    "input_data",
    "steps_per_execution",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING=true",
    "rm -rf dataset",
    "git clone",
    "mlflow.enable_system_metrics_logging()",
    "apples/apple-1.jpeg",
    "oranges/orange-10.jpeg",
}
EXAMPLES = r"photo\.jpeg|photos|FOLDER|RUN_ID"  # what a reader puts something of his own for


def text_of(document: str) -> str:
    return (PROJECT / document).read_text()


def blocks(document: str) -> list[tuple[str, str]]:
    """The language and the text of each code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text_of(document), re.MULTILINE | re.DOTALL)


def inline_codes(document: str) -> list[str]:
    """What stands between single backticks, but for the section on other tools."""
    text = re.sub(r"^```.*?^```", "", text_of(document), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(rf"^{OTHER_TOOLS}$.*?^## ", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def split_commands(code: str, shell: str) -> list[list[str]]:
    """The commands in a piece of shell code, each as its words, without settings, pipes and prompts."""
    if shell == "console":
        code = "\n".join(line.removeprefix("$ ") for line in code.splitlines() if line.startswith("$ "))
    if shell == "powershell":
        code = code.replace("\\", "/")
    lexer = shlex.shlex(code.replace("\\\n", " ").replace("\n", " ; "), posix=True, punctuation_chars=";&|()<")
    lexer.whitespace_split, lexer.commenters = True, ""
    commands, after_redirect = [[]], False
    for word in lexer:
        if word.startswith("#"):
            break
        if set(word) <= set(";&|()"):
            commands.append([])
        elif word == "<" or after_redirect:
            after_redirect = word == "<"
        else:
            commands[-1].append(word)
    for command in commands:
        while command and (re.match(r"[A-Z_]+=", command[0]) or command[0].startswith("$Env:")):
            del command[: 3 if command[0].startswith("$Env:") and not re.search("=", command[0]) else 1]
    return [command for command in commands if command]


def commands(document: str) -> list[list[str]]:
    """All commands of a document: those in its blocks for a shell, and those in its text and tables."""
    found = [words for shell, code in blocks(document) if shell in SHELLS for words in split_commands(code, shell)]
    for code in inline_codes(document):
        if is_command(code):
            found += split_commands(code, "powershell" if "\\" in code else "bash")
    return found


def is_command(code: str) -> bool:
    programs = r"(venv/bin/)?python3?|mlflow|prefect|dask|pip|source|docker|az|conda|jupyter"
    return bool(re.match(rf"([A-Z_]+=\S+ |\$Env:.*; )*({programs}) \S", code)) or "Activate.ps1" in code


ALL_COMMANDS = sorted({(document, *words) for document in DOCUMENTS for words in commands(document)})


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=lambda command: " ".join(command[1:])[:90])
def test_command_is_accepted(command, monkeypatch, capsys):
    program, *words = command[1:]
    name = program.removesuffix(".exe").rpartition("/")[2]
    if name in ("python", "python3"):
        check_python(words, monkeypatch, capsys)
    elif name in ("mlflow", "dask"):
        check_click(console_command(name), words)
    elif name == "prefect":
        check_prefect(words)
    elif name == "pip":
        check_pip(words)
    elif name in ("source", "activate", "Activate.ps1", "deactivate"):
        assert all(word in ("venv/bin/activate",) for word in words)
    else:
        assert name in ELSEWHERE, f"{name}: no program that this test knows"


def check_python(words: list[str], monkeypatch, capsys) -> None:
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1])
        if words[1] == "pytest":
            check_pytest(words[2:])
        return
    script, *options = words
    assert (PROJECT / script).is_file(), script
    if script in PARSERS:
        monkeypatch.setattr(sys, "argv", [script, *options])
        module = importlib.import_module(script.removesuffix(".py"))
        status = 0
        try:
            module.parse_arguments()
        except SystemExit as end:  # --help ends so, too
            status = end.code
        assert status == 0, capsys.readouterr().err
    else:
        source = text_of(script)
        for option in options:
            if option.startswith("-") or script == "tests/make_docs.py":
                assert f'"{option}"' in source, f"{script} {option}"


def check_pytest(words: list[str]) -> None:
    """The files that a command of pytest names exist, and the markers are those of pyproject.toml."""
    settings = tomllib.loads(text_of("pyproject.toml"))["tool"]["pytest"]["ini_options"]["markers"]
    known = {re.match(r"\w+", marker)[0] for marker in settings}
    for option, word in itertools.pairwise(["", *words]):
        if option == "-m":
            assert set(re.findall(r"\w+", word)) - {"or", "and", "not"} <= known
        elif word.startswith("tests"):
            assert (PROJECT / word).exists(), word


def console_command(name: str):
    """The click command behind a program, or behind a plug-in of it."""
    command = next(iter(importlib.metadata.entry_points(group="console_scripts", name=name))).load()
    if name == "dask":  # it finds its plug-ins when it runs
        from dask.cli import cli as command

        plugins = importlib.metadata.entry_points(group="dask_cli")
        return click.Group("dask", commands={entry.name: entry.load() for entry in plugins} | command.commands)
    return command


def check_click(command: click.Command, words: list[str]) -> None:
    words = list(words)
    while isinstance(command, click.Group):
        name = words.pop(0)
        assert name in command.commands, name
        command = command.commands[name]
    with click.Context(command, info_name="documented") as context:
        command.make_parser(context).parse_args(words)  # UsageError for what it does not know


def check_prefect(words: list[str]) -> None:
    from prefect.cli._app import _app

    quiet = {"exit_on_error": False, "print_error": False}
    _, bound, _ = _app.meta.parse_args(words, **quiet)  # takes --no-prompt, which is of all commands
    _app.parse_args(bound.args, **quiet)


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    for option, file in itertools.pairwise(words):
        assert option != "-r" or (PROJECT / file).is_file(), file


@pytest.mark.parametrize("document", DOCUMENTS)
def test_code_blocks_can_be_read_by_their_language(document):
    for language, code in blocks(document):
        if language == "bash":
            end = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
            assert end.returncode == 0, end.stderr
        elif language == "python":
            compile(code, document, "exec")
        elif language == "json":
            json.loads(code)
        else:
            assert language in ("", "powershell", "console")


def anchor(heading: str) -> str:
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_link_leads_somewhere(document):
    text = text_of(document)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    for target in targets:
        if not target.startswith("https://"):
            name, _, section = target.partition("#")
            path = (PROJECT / document).parent / name if name else PROJECT / document
            assert path.exists(), target
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if section else []
            assert not section or section in map(anchor, headings), target


def sources() -> str:
    """All that the repository says outside of its documents."""
    patterns = ("*.py", "workflow/**/*.py", "examples/**/*.py", "tests/**/*.py", "benchmarks/**/*.py")
    files = [path for pattern in patterns for path in PROJECT.glob(pattern) if path.name != "test_docs.py"]
    names = (".gitignore", "requirements.txt", "pyproject.toml", "MLproject", ".ci/run")
    files += [PROJECT / name for name in names]
    return "\n".join(path.read_text() for path in files)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_name_exists(document):
    """What stands in backticks is a command, a path, or a word of the code."""
    code, folder = sources(), (PROJECT / document).parent
    for name in set(inline_codes(document)) - OUTSIDE:
        name = re.sub(r"\\", "/", name)
        if (
            name in OUTSIDE
            or is_command(name)
            or name.startswith("--")
            or any((at / name).exists() for at in (folder, PROJECT))
        ):
            continue
        word = re.escape(re.sub(rf"/({EXAMPLES})|=$|\(\)$", "", name).removesuffix("/"))
        assert not re.fullmatch(r"[\w/]+\.(py|md|ipynb|toml)", name), f"{document}: there is no file {name}"
        assert re.search(rf"(?<![\w-]){word}(?![\w-])", code), f"{document}: {name}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_option_exists(document, monkeypatch, capsys):
    """An option that the text names outside of a command is one of our programs' own."""
    options = {code.split()[0] for code in inline_codes(document) if code.startswith("--")}
    known = ""
    for script in PARSERS:
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit):
            importlib.import_module(script.removesuffix(".py")).parse_arguments()
        known += capsys.readouterr().out
    assert options <= set(re.findall(r"--[a-z-]+", known))


def defined(path) -> set[str]:
    """The names that a file defines at its top."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.Assign):
            names |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


def test_name_that_is_said_to_be_in_a_file_is_there():
    found = []
    for document in DOCUMENTS:
        text = " ".join(text_of(document).split())
        found += re.findall(r"`(\w+)` in (?:\[|`)([\w/]+\.py)", text)
    assert len(found) >= 3
    for name, file in found:
        assert name in defined(PROJECT / file), f"{name} in {file}"


def test_evidence_is_a_test_of_the_file_beside_it():
    items = re.split(r"^\s*- |^\| ", text_of("lab_report.md"), flags=re.MULTILINE)
    everywhere = {name for path in PROJECT.glob("tests/**/test_*.py") for name in defined(path)}
    count = 0
    for item in items:
        files = re.findall(r"\]\((tests/[\w/]+\.py)\)", item)
        there = {name for file in files for name in defined(PROJECT / file)} if files else everywhere
        for name in re.findall(r"`(test_[a-z]\w+)`", item):
            if name not in ("test_loss", "test_accuracy"):
                count += 1
                assert name in there, name
    assert count >= 20


@pytest.mark.parametrize(
    ("words", "number", "constant"),
    [
        ("four at a time", 4, ml_workflow.DOWNLOADS_AT_ONCE),
        ("three usable photos", 3, MIN_IMAGES_PER_CLASS),
        ("every half second", 0.5, SAMPLING_SECONDS),
    ],
)
def test_number_in_words_is_that_of_the_code(words, number, constant):
    texts = " ".join(" ".join(map(text_of, DOCUMENTS)).split())
    assert words in texts
    assert number == constant


def test_files_of_a_url_are_those_that_are_fetched():
    assert f"`{ml_workflow.FILES[0]}` to `{ml_workflow.FILES[-1]}`" in text_of("README.md")


def test_printed_texts_are_of_one_run():
    first, log = read_region("README.md", "first run"), read_region("lab_report.md", "log")
    predicted = read_region("lab_report.md", "predict")
    assert re.search(r"flow-run/([0-9a-f-]{36})", first)[1] == re.search(r"flow-run/([0-9a-f-]{36})", log)[1]
    assert re.search(r"runs/([0-9a-f]{32})", first)[1] == re.search(r"run ([0-9a-f]{32})", predicted)[1]


def test_newest_heading_of_the_changelog_is_a_version_with_its_date():
    heading = re.search(r"^## (.*)$", text_of("CHANGELOG.md"), re.MULTILINE)[1]
    assert re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", heading)


def test_steps_are_those_of_the_flow():
    table = re.findall(r"^\| `(\w+)` \| ", text_of("README.md"), re.MULTILINE)
    tree = ast.parse(text_of("ml_workflow.py"))
    tasks = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("task" in ast.unparse(d) for d in node.decorator_list)
    ]
    assert table == tasks


def test_pictures_are_small_and_all_shown():
    shown = {target for document in DOCUMENTS for target in re.findall(r"\((img/[^)]+)\)", text_of(document))}
    pictures = {f"img/{path.name}" for path in PROJECT.glob("img/*")}
    assert pictures == shown
    for picture in pictures:
        assert (PROJECT / picture).stat().st_size < 300_000
        with Image.open(PROJECT / picture) as image:
            assert 900 <= image.width <= 1200


@pytest.mark.parametrize("document", DOCUMENTS)
def test_document_names_no_folder_of_one_machine(document):
    assert not re.search(r"(?<![\w.])/(home|root|tmp|Users|work|opt)/", text_of(document))
