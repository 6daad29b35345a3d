"""The habits of the house that can be measured: what lies at the root, sizes, names, words, types."""

from __future__ import annotations

import ast
import functools
import gc
import importlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import prose
import pytest
from tree import ROOT, listed_files

# On one worker, so that each file is parsed once.
pytestmark = pytest.mark.xdist_group("house")


@pytest.fixture(scope="module", autouse=True)
def _no_collections() -> Iterator[None]:
    """Spares the search of a million nodes of syntax trees, which hold no cycles."""
    gc.disable()
    yield
    gc.enable()


AGREED_ROOT = {
    *("pkm_lightning", "configs", "callbacks", "tests", "scripts", "docs", "examples"),
    *("pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "NOTICE", "Makefile"),
    *("constraints.txt", ".ci", ".github", ".gitignore", ".gitattributes", ".pre-commit-config.yaml"),
}
SOURCE = (".py", ".yaml", ".yml", ".toml", ".sh")
#: Names of variables that say nothing of what they hold.
VAGUE = {"found", "told", "own", "apart", "given", "taken", "kept", "seen", "made", "said", "asked", "mine", "theirs"}
VAGUE_NAMES = {"utils.py", "common.py", "helpers.py", "misc.py"}
# In two halves where this file would otherwise accuse itself.
FORBIDDEN_WORDS = {
    "reruns of numerics": r"\bfla" r"ky\b",
    "edits of sys.path": r"\bsys\.pa" r"th\.(?:insert|append|extend)|\bsys\.pa" r"th(?:\[[^\]]*\])?\s*\+?=",
    "gaps in a text": r"_PLACE" r"HOLDER\b",
    "promises": r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX)\b",
    "somebody's home": r"(?<![\w.])/(?:ho" r"me|Us" r"ers|ro" r"ot|wo" r"rk)/\w",
    "blanket ignores": r"#\s*(?:type:\s*ig" r"nore(?!\[)|no" r"qa(?!:))",
}


def sources(*suffixes: str, under: tuple[str, ...] = ()) -> list[Path]:
    """Listed regular files with one of the suffixes, in one of the top folders (all of them by default)."""
    return [
        path
        for path in listed_files()
        if path.suffix in suffixes and not (ROOT / path).is_symlink() and (not under or path.parts[0] in under)
    ]


def largest_allowed(path: Path) -> int:
    if path.parts[0] == "callbacks":
        return 200
    if path.suffix == ".yaml":
        return 60 if path.name == "facts.yaml" else 40
    if path.parts[0] == "tests":
        return 300
    return 500 if path.name == "triton.py" else 400


class Function(NamedTuple):
    """What is measured of a function; of its arguments the names and lines, by whether they are annotated."""

    name: str
    line: int
    length: int
    is_kernel: bool
    typed: list[tuple[str, int]]
    untyped: list[tuple[str, int]]


class Source(NamedTuple):
    """What is measured of a file: names in it as often as it binds them, modules as they may be imported from."""

    has_docstring: bool
    functions: list[Function]
    bound: list[str]
    imports: list[tuple[str, list[str]]]


@functools.cache
def source(path: Path) -> Source:
    """Parses a file once for all tests."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    of_file = Source(bool(ast.get_docstring(tree)), [], [], [])
    for node in ast.walk(tree):
        of_file.bound.extend(bound(node))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            of_file.functions.append(function(node))
        elif isinstance(node, ast.ImportFrom) and node.module:
            of_file.imports.append((node.module, [alias.name for alias in node.names]))
        elif isinstance(node, ast.Import):
            of_file.imports.extend((alias.name, []) for alias in node.names)
    return of_file


def function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Function:
    length = (node.end_lineno or node.lineno) - node.lineno + 1
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    is_kernel = any(word in decorator for word in ("triton.", "njit") for decorator in decorators)
    of_function = Function(node.name, node.lineno, length, is_kernel, [], [])
    for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
        kind = of_function.typed if argument.annotation else of_function.untyped
        kind.append((argument.arg, argument.lineno))
    return of_function


def bound(node: ast.AST) -> Iterator[str]:
    """Yields the name that a node binds: of a variable, an argument, a function or a class."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name


def test_the_root_holds_agreed_entries_only() -> None:
    assert {path.parts[0] for path in listed_files()} <= AGREED_ROOT


def test_files_keep_their_size() -> None:
    lengths = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in sources(".py", ".yaml")}
    assert not {str(path): n for path, n in lengths.items() if n > largest_allowed(path)}


def test_functions_keep_their_length() -> None:
    long = {}
    for path in sources(".py"):
        for one in source(path).functions:
            if one.length > (110 if one.is_kernel else 70):
                long[f"{path}:{one.line} {one.name}"] = one.length
    assert not long


def test_no_vague_file_names() -> None:
    assert not [str(path) for path in listed_files() if path.name in VAGUE_NAMES]


@pytest.mark.parametrize("what", FORBIDDEN_WORDS)
def test_forbidden_words(what: str) -> None:
    word = re.compile(FORBIDDEN_WORDS[what])
    found = []
    for path in sources(*SOURCE):
        text = (ROOT / path).read_text(encoding="utf-8")
        if word.search(text):
            found += [f"{path}:{n}: {line.strip()}" for n, line in enumerate(text.splitlines(), 1) if word.search(line)]
    assert not found, what


def test_arguments_are_typed() -> None:
    typed, untyped = 0, []
    for path in sources(".py", under=("pkm_lightning", "callbacks")):
        for one in source(path).functions:
            if not one.is_kernel:
                typed += len(one.typed)
                bare = [argument for argument in one.untyped if argument[0] not in ("self", "cls")]
                untyped += [f"{path}:{line} {one.name}({name})" for name, line in bare]
    assert typed >= 0.95 * (typed + len(untyped)), untyped


def test_every_module_says_its_idea() -> None:
    silent = [
        str(path)
        for path in sources(".py", under=("pkm_lightning", "callbacks", "configs", "scripts"))
        if not source(path).has_docstring
    ]
    assert not silent


PROSE = [
    ROOT / name for name in ("pkm_lightning", "callbacks", "configs", "scripts", "docs", "README.md", "CONTRIBUTING.md")
]


def test_the_prose_is_field_english() -> None:
    """No "bytes a token", functions' docstrings open with a verb, hardly a "tells", comments where one asks why."""
    found, rates = prose.findings(PROSE)
    to_rewrite = [finding for finding in found if not prose.REPORTING.fullmatch(finding.rpartition(": ")[2])]
    assert not to_rewrite, "\n".join(to_rewrite)
    assert rates["tells, told, says per 1,000 words"] < 0.3
    assert 3 <= rates["comments per 100 lines"] <= 12


def test_names_are_nouns_and_verbs() -> None:
    """Pronouns and participles name nothing: `found` rows are `rows`."""
    names = Counter(
        name for path in sources(".py", under=("pkm_lightning", "callbacks", "scripts")) for name in source(path).bound
    )
    vague = {name: n for name, n in names.items() if name.strip("_") in VAGUE}
    assert sum(vague.values()) <= 0.003 * names.total(), vague


@pytest.mark.parametrize(
    "text",
    [
        "bytes a token", "sub-keys a half", "one file an op", "FLOPs a layer", "rows per rank, and values a row",
    ],
)  # fmt: skip
def test_the_measure_of_prose_sees_what_it_should(text: str) -> None:
    assert prose.PER.search(text)
    assert not prose.PER.search(text.replace(" a ", " per ").replace(" an ", " per "))


def test_docstrings_of_the_measure() -> None:
    assert prose.opens_with_verb("Returns the loss.")
    assert prose.opens_with_verb("Refuse a value.")
    assert not prose.opens_with_verb("The loss of a batch.")
    assert not prose.opens_with_verb("True if it is sharded.")


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 2000


def imports() -> dict[str, set[str]]:
    """Each module of the package with those that it imports anywhere, also within functions and for type checking."""
    files = {}
    for path in sources(".py", under=("pkm_lightning", "callbacks")):
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        files[f"pkm_lightning.{name}" if path.parts[0] == "callbacks" else name] = path
    graph = {}
    for module, path in files.items():
        named = set()
        for name, parts in source(path).imports:
            named |= ({f"{name}.{part}" for part in parts} & files.keys()) or {name}
        graph[module] = (named & files.keys()) - {module}
    return graph


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = imports()
    while leaves := [module for module, named in graph.items() if not named]:
        graph = {module: named.difference(leaves) for module, named in graph.items() if module not in leaves}
    assert not graph, "a cycle among, or on the way to: " + ", ".join(sorted(graph))


def test_tolerances_live_in_one_table() -> None:
    strays = []
    for path in sources(".py", under=("tests",)):
        if path.name in ("tolerances.py", "test_house.py"):
            continue
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
            if re.search(r"assert_close\(.*\b[ra]tol\s*=", line):
                strays.append(f"{path}:{number}: {line.strip()}")
    assert not strays


def test_kernels_that_call_each_other_stand_in_one_file() -> None:
    """numba's cache of a kernel notices changes of its own file only: a stale one would write out of bounds."""
    dispatcher = pytest.importorskip("numba").core.dispatcher.Dispatcher
    foreign = []
    for path in sources(".py", under=("pkm_lightning",)):
        if path.name == "cpu.py":
            module = importlib.import_module(".".join(path.with_suffix("").parts))
            kernels = [value for value in vars(module).values() if isinstance(value, dispatcher)]
            foreign += [f"{path}: {k.py_func.__name__}" for k in kernels if k.py_func.__module__ != module.__name__]
    assert not foreign
