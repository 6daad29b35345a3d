"""What strangers type to bring their own files, and what the pages say that they then see."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import OURS, furnish, small_version
from small import Run
from tree import ROOT

#: Headings and pages. Of a block without a language each line is printed by the commands of the block before it.
SECTIONS = {
    "### Datasets of Hugging Face": ("data.md", r"^python -m pkm_lightning (?!fit data=hf)"),
    "## A tokenizer that you train yourself": ("tokenizers.md", ""),
}


@pytest.mark.parametrize("heading", SECTIONS)
def test_a_transcript_is_what_its_commands_print(cli: Run, tmp_path: Path, heading: str) -> None:
    furnish(tmp_path)
    page, chosen = SECTIONS[heading]
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = re.split(r"^#+ ", text.partition(f"{heading}\n")[2], maxsplit=1, flags=re.M)[0]
    printed, compared = "", 0
    for language, block in re.findall(r"```(\w*)\n(.*?)```", section, re.S):
        if language == "bash":
            printed = ""
            for command in block.splitlines():
                if command.startswith(OURS) and re.search(chosen, command):
                    shown = cli(*small_version(command, silent=True))
                    assert shown.code == 0, f"{command}\n{shown.err}"
                    printed += shown.out + shown.err
        elif not language:
            missing = [line for line in block.splitlines() if line not in printed]
            assert missing == [], printed
            compared += 1
    assert compared
