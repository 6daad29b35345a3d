"""`generate`, `chat` and the keys that `predict` shares with them, on a run; every refusal comes before an answer."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from small import Run

from pkm_lightning import load

Pipe = Callable[[str], None]
KEYS = ("max_new_tokens=9", "temperature=1.5", "top_k=50", "top_p=0.9", "repetition_penalty=1.1", "samples=3")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Pipe:
    """Provides `pipe(text)`, after which a command reads `text` from its standard input."""

    def set_input(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    return set_input


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_generate_and_predict_give_the_same_answers_to_the_same_keys(
    cli: Run, trained: Path, tmp_path: Path, pipe: Pipe
) -> None:
    """One process: drawn answers depend on the seed, the prompt and the sample, and not on the verb or the batch."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Who was"}\n{"prompt": "The capital of France, so"}\n')
    made = cli("generate", "run_dir=run", "prompts_file=prompts.jsonl", *KEYS, "batch_size=2", "out=generated.jsonl")
    assert made.code == 0, made.err
    generated = lines(tmp_path / "generated.jsonl")
    assert [(line["index"], line["sample"]) for line in generated] == [(i, k) for i in range(2) for k in range(3)]
    assert {line["ended"] for line in generated} <= {"eos", "length"}
    assert len({line["answer"] for line in generated}) > 3
    assert "--- prompt 2, sample 3: The capital of France, so\n" in made.out
    assert re.search(r"prompts: [\d,]+ tokens at .*/s; answers: .* tokens at .*/s; ended: \d", made.err)

    pipe("Who was\n\nThe capital of France, so\n")
    assert cli("predict", "run_dir=run", "prompts_file=-", *KEYS).code == 0
    predicted = lines(trained / "predictions.jsonl")
    assert [line.keys() for line in predicted] == [{"index", "prompt", "sample", "answer"}] * 6
    assert [line["answer"] for line in predicted] == [str(line["answer"]).strip() for line in generated]

    # The text of the command line is taken as it is typed, and the only answer stands alone.
    alone = cli("generate", "run_dir=run", "prompt=The capital of France, so", "max_new_tokens=9")
    assert (alone.code, alone.out.count("\n")) == (0, 1), alone.err
    assert cli("predict", "run_dir=run", "data.prompts=['The capital of France, so']", "max_new_tokens=9").code == 0
    (line,) = lines(trained / "predictions.jsonl")
    assert line == {"index": 0, "prompt": "The capital of France, so", "answer": alone.out.strip()}
    other = cli("generate", "run_dir=run", "prompts_file=prompts.jsonl", *KEYS, "sample_seed=1", "out=other.jsonl")
    assert other.code == 0
    assert lines(tmp_path / "other.jsonl") != generated


LONG = "and so on " * 200


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "prompt=a", "prompts_file=b.txt"], "prompt=a and prompts_file=b.txt both give prompts"),
        (["predict", "prompt=a", "data.prompts=[b]"], "prompt and data.prompts both give prompts"),
        (["generate"], "nothing to continue; give prompt=TEXT, or prompts_file=FILE"),
        (["generate", "prompt=a", "top_k=5"], "top_k=5 does nothing with temperature=0"),
        (["predict", "prompt=a", "sample_seed=5"], "sample_seed=5 does nothing with temperature=0"),
        (["generate", "prompt=a", "samples=2"], "samples=2 would be equal with temperature=0"),
        (["chat", "min_p=0.1"], "min_p=0.1 does nothing with temperature=0"),
        (["generate", "prompt=a", "temperature=1", "top_p=1.5"], "top_p=1.5 is out of range; allowed: 0 to 1"),
        (["generate", "prompt=a", "temperature=hot"], "temperature='hot' is not a number"),
        (["generate", "prompt=a", "max_new_tokens=0"], "max_new_tokens=0 is out of range"),
        (["generate", "prompt=a", "batch_size=0"], "batch_size=0 is out of range"),
        (["generate", "prompt=a", "extrapolate=maybe"], "extrapolate='maybe' is neither true nor false"),
        (["generate", "prompt=a", "temperature=1", "sample_seed=-1"], "sample_seed=-1 is out of range"),
        (["generate", "prompt=a", "stop=[1]"], "stop=[1] must be a list of texts"),
        (["generate", "prompt=[1,2]"], "prompt holds 1, which is not read as a text"),
        (["generate", "prompt=[]"], "prompt=[] holds no text"),
        (["generate", "prompts_file=nowhere.txt"], "prompts_file=nowhere.txt does not exist"),
        (["generate", "prompt=a", "out=nowhere/a.jsonl"], "the folder nowhere does not exist"),
        (["generate", "prompt=a", "temprature=1"], "Did you mean 'temperature'?"),
        (["generate", "prompt=a", "system=b"], "generate does not read system, only chat"),
        (["generate", "prompt=a", "seed=3"], "generate does not read seed"),
        (["generate", "prompt=a", "~stop"], "~stop: generate cannot do without stop; set stop=VALUE"),
        (["predict", "prompt=a", "~run_dir"], "~run_dir: predict cannot do without run_dir"),
        (["predict", "prompt=a", "data.people=3"], "predict does not read data.people, of data only data.prompts"),
        (["generate", "prompt=a", "callbacks.samples.max_new_tokens=5"], "does not read callbacks.samples"),
        (["chat", "prompt=a"], "chat does not read prompt, only generate, predict"),
        (["chat", "system=a"], "needs a chat template"),
        (["fit", "prompt=a"], "prompt is a key of generate, predict only"),
        (["fit", "+top_k=5"], "fit does not read top_k"),
        (["generate", f"prompt={LONG}"], "prompt 1 has"),
        (["predict", f"prompt=[a,{LONG}]"], "prompt 2 has"),
        (["predict", "prompt=a", "callbacks.recall.test_items=5"], "does not read callbacks.recall.test_items"),
        (["test", "callbacks.recall.val_items=5"], "test does not read callbacks.recall.val_items"),
        (["validate", "trainer.max_steps=5"], "validate does not read trainer.max_steps, which is for training"),
        (["test", "logger=none"], "test does not read logger"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_what_would_do_nothing_or_cannot_be_is_refused(
    cli: Run, trained: Path, arguments: list[str], said: str
) -> None:
    verb, *overrides = arguments
    shown = cli(verb, "run_dir=run", *overrides)
    assert shown.code == 2, shown.out
    assert said in shown.err
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert not (trained / "predictions.jsonl").exists()


def test_chat_without_a_template_continues_each_line(
    cli: Run, trained: Path, pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe("Who was\n\nWho was\n/reset\nWhere\n/exit\nnever read\n")
    shown = cli("chat", "run_dir=run", "max_new_tokens=5")
    assert shown.code == 0, shown.err
    first, second, third, rest = shown.out.split("\n")
    assert first == second != third
    assert rest == ""
    assert "has no chat template: it continues each line" in shown.err
    pipe("")
    assert cli("chat", "run_dir=run").out == ""
    monkeypatch.setattr("sys.stdin", None)
    assert cli("chat", "run_dir=run").out == ""


def test_a_message_that_is_no_text_leaves_the_others(cli: Run, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"\xef\xbb\xbfWho was\n\xff\xfe\nWho was\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    shown = cli("chat", "run_dir=run", "max_new_tokens=5")
    assert shown.code == 0, shown.err
    first, second, rest = shown.out.split("\n")
    assert (first, rest) == (second, "")
    assert "error: the message is not UTF-8" in shown.err


def test_chat_with_a_template_reads_each_turn_once(cli: Run, trained: Path, pipe: Pipe) -> None:
    (trained / "chat_template.jinja").write_text(TEMPLATE)
    pipe("Who was she?\nWhere was she?\n" + LONG + "\n/reset\nWho was he?\n")
    shown = cli("chat", "run_dir=run", "max_new_tokens=5", "system=Be brief.")
    assert shown.code == 0, shown.err
    assert shown.out.count("\n") == 3
    assert re.search(r"error: the conversation has \d+ tokens, .*/reset begins another one", shown.err)
    alone = []
    for turns in ("Who was she?\n", "Who was she?\nWhere was she?\n"):
        pipe(turns)
        ended = cli("chat", "run_dir=run", "max_new_tokens=5", "system=Be brief.").err
        alone.append(int(re.findall(r"prompts: (\d+) tokens", ended)[0]))
    # Of the second turn the answer's last token, the message and the frame are new, not the system's message.
    assert 0 < alone[1] - alone[0] < alone[0]


def test_conversations_of_a_file_and_of_a_program_are_put_into_the_template(
    cli: Run, trained: Path, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "Who was she?"}]
    bare = "user: Who was she?assistant:"
    (tmp_path / "asked.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"prompt": bare}) + "\n")
    command = ("run_dir=run", "prompts_file=asked.jsonl", "max_new_tokens=5")
    refused = cli("generate", *command)
    assert (refused.code, "has no chat template for messages; give texts" in refused.err) == (2, True)
    (trained / "chat_template.jinja").write_text(TEMPLATE.replace("{{ eos_token }}", ""))
    made = cli("generate", *command, "out=made.jsonl")
    assert made.code == 0, made.err
    first, second = lines(tmp_path / "made.jsonl")
    assert (first["messages"], second["prompt"], first["answer"]) == (turns, bare, second["answer"])
    loaded = load(trained)
    assert loaded.answer(turns, max_new_tokens=5) == str(first["answer"]).strip()  # type: ignore[arg-type]
    assert len(repr(loaded)) < 200
    assert "chat template" not in made.err
    assert "the model has a chat template" in cli("generate", "run_dir=run", "prompt=Who", "max_new_tokens=1").err
    shown = cli("predict", *command)
    assert (shown.code, "asked.jsonl:1 has messages, which generate puts" in shown.err) == (2, True)


def test_answers_to_a_stream_have_nothing_between_them(cli: Run, trained: Path) -> None:
    shown = cli("predict", "run_dir=run", "prompt=[a,b]", "callbacks=default", "max_new_tokens=2", "out=/dev/stdout")
    assert shown.code == 0, shown.err
    assert [json.loads(line)["index"] for line in shown.out.splitlines()] == [0, 1]
