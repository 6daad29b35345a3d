"""The measure of our English: rates and turns that STYLE asks for, over files; also a command: `prose.py PATH ...`."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

#: "tells a rank", "what it was told": reporting verbs where the field has `reports`, `returns`, `raises`.
REPORTING = re.compile(r"\b(?:tells?|told|telling|says|said)\b", re.IGNORECASE)
#: "bytes a token" for "bytes per token".
_COUNTED = (
    r"(?:bytes?|FLOPs?|GB|MiB|values?|rows?|slots?|keys|sub-keys|tokens?|parameters?|processes|neurons?|ranks?|files?|"
    r"figures?|numbers?|heads?|samples?|sequences?|experts?|micro-batch(?:es)?|lines?|questions?|prompts?|seconds?|reads|"
    r"states?|tables?|plugins?|units?|groups?|copies|copy|calls?|steps?|sums?|indices|sets?|facts?|blocks?|norms?|"
    r"seeds?|runs?|names?|buffers?|objects?|models?|one|each|once)"
)
_UNIT = (
    r"(?:token|half|head|row|step|rank|layer|device|node|form|forward|read|slot|group|block|line|value|model|seed|run|"
    r"fact|variant|arm|kind|op|relation|split|table|expert|column|process|machine|launch|member|variable|file|set)"
)
PER = re.compile(rf"\b{_COUNTED} an? {_UNIT}\b", re.IGNORECASE)
#: Third-person or imperative verbs that open a function's docstring; add the verb that is missing.
_VERBS = """
accept accumulate add adjust adopt advise aggregate align allocate allow answer append apply approximate arrange ask
assemble assert assign attach average balance bind block bootstrap break broadcast build cache calculate call cast
change check choose clear clip close collate collect combine compare compile compose compress compute concatenate
configure connect consume continue convert copy correct count cover create cut decide decode defer define delete
deliver derive describe detach determine disable discard dispatch display divide draw drop dump emit enable encode
end ensure enter enumerate escape estimate evaluate exchange exclude execute exit expand explain export extend
extract fail fetch fill filter find finish fit flatten flip flush fold follow forget format forward free gather
generate get give go group guard halve handle hash hold identify ignore import include increment index infer
initialise inject insert inspect instantiate interpolate invert iterate join judge keep label launch lay leave
lend limit link list load locate lock log look lower lookup make map mark mask match mean measure merge mix move
multiply name narrow negate normalise notify number observe offer open order overwrite pack pad parse partition pass
pause permute pick place plan plot point poll pool pop prefetch prepare prepend preserve print probe process produce
project propagate prove provide prune pull push put query quote raise rank rate read rebuild receive recompute record
recover reduce refer refuse register release reload remember remove rename render reorder repeat replace replay
report request require resample reserve reset reshape resize resolve restart restore restrict resume retry return
reuse reverse revive rewind rewrite roll rotate round route run sample save scale scan scatter schedule score search
seed select send separate serialise serve set shape shard share shift show shrink shuffle shut sign simulate size
skip slice solve sort split spread stack stage start state step stop store strip sum summarise suppress swap switch
synchronise take test time tokenise total track trace train transfer transform translate transpose trim try turn
undo unembed unflatten unmap unpack unregister update use validate verify view visit wait walk warn watch weight
widen wrap write yield zero zip advance
"""
VERBS = frozenset(_VERBS.split())
_IRREGULAR = {"does": "do", "goes": "go", "tries": "try", "copies": "copy", "has": "have", "is": "be", "are": "be"}
#: Comments for tools.
_DIRECTIVES = tuple(f"# {tool}" for tool in ("type:", "noqa", "fmt"))
_PROPERTY = ("property", "cached_property", "setter", "overload")


def texts(paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Yields every Python, YAML and Markdown file under `paths` with its text."""
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in (".py", ".md", ".yaml", ".jinja") and file.is_file() and "results" not in file.parts:
                yield file, file.read_text(encoding="utf-8")


def opens_with_verb(docstring: str) -> bool:
    """Returns whether the first word is a verb of `VERBS`, in the third person or the imperative."""
    word = re.split(r"[\s,:(]", docstring.strip(), maxsplit=1)[0].lower()
    stems = {word, _IRREGULAR.get(word, word), word.removesuffix("s"), word.removesuffix("es")}
    stems |= {word.removesuffix("ies") + "y"} if word.endswith("ies") else set()
    return bool(stems & (VERBS | {"do", "be", "have"}))


def nouns_first(source: str) -> Iterator[tuple[int, str, str]]:
    """Yields line, name and first words of public functions' docstrings that do not open with a verb."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        if any(ast.unparse(decorator).split(".")[-1] in _PROPERTY for decorator in node.decorator_list):
            continue
        docstring = ast.get_docstring(node)
        if docstring and not opens_with_verb(docstring):
            yield node.lineno, node.name, docstring.splitlines()[0][:70]


def comment_density(source: str) -> tuple[int, int]:
    """Returns the lines that hold a comment, and all lines of code."""
    comments, code = set(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(_DIRECTIVES):
            comments.add(token.start[0])
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
            code.update(range(token.start[0], token.end[0] + 1))
    return len(comments), len(code | comments)


def findings(paths: Iterable[Path]) -> tuple[list[str], dict[str, float]]:
    """Returns what to rewrite, as `file:line: text`, and the rates over all of `paths`."""
    found, words, reported, comments, lines = [], 0, 0, 0, 0
    for file, text in texts(paths):
        words += len(re.findall(r"[A-Za-z']{2,}", text))
        for number, line in enumerate(text.splitlines(), 1):
            hits = [m.group() for pattern in (REPORTING, PER) for m in pattern.finditer(line)]
            reported += len(REPORTING.findall(line))
            found += [f"{file}:{number}: {hit}" for hit in hits]
        if file.suffix == ".py":
            found += [f"{file}:{line}: {name}: {first}" for line, name, first in nouns_first(text)]
            of_comment, of_code = comment_density(text)
            comments, lines = comments + of_comment, lines + of_code
    rates = {
        "tells, told, says per 1,000 words": 1000 * reported / max(1, words),
        "comments per 100 lines": 100 * comments / max(1, lines),
    }
    return found, rates


if __name__ == "__main__":
    to_rewrite, measured = findings(Path(argument) for argument in sys.argv[1:])
    print(*to_rewrite, *(f"{name}: {rate:.2f}" for name, rate in measured.items()), sep="\n")
