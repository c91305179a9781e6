"""`glmtune reproduce`: its commands can be run as they stand, and it claims nothing."""

import shlex

import pytest

from glmtune.bench.published import WORKS
from glmtune.cli import VERBS, main
from glmtune.config.flags import split_arguments
from glmtune.config.reading import read_config
from glmtune.config.settings import SETTINGS
from glmtune.models.families import FAMILIES


def test_the_list_names_each_work(capsys):
    assert main(["reproduce"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in WORKS)


@pytest.mark.parametrize("name", WORKS)
def test_commands_figures_and_no_claim(name, capsys):
    assert main(["reproduce", name]) == 0
    out = capsys.readouterr().out
    work = WORKS[name]
    for line in (*work.needs, *work.commands, *work.figures, work.source, work.caution):
        assert line in out
    assert "none of these figures was measured by glmtune" in out


COMMANDS = [command for work in WORKS.values() for command in work.commands]


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS))
def test_commands_have_flags_that_exist(command):
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "glmtune.integrations.lm_eval"]:
        assert words[words.index("--model") + 1] == "glmtune"
        return
    assert words[0] == "glmtune"
    assert words[1] in VERBS
    read_config(SETTINGS[words[1]], *split_arguments(words[1], words[2:]))


def test_the_bases_are_published_names():
    known = {name for family in FAMILIES for name in family.published}
    for work in WORKS.values():
        assert work.needs[0].removesuffix("-base") in known


def test_a_name_that_is_none(capsys):
    assert main(["reproduce", "adgen-chatglm"]) == 2
    assert (
        "reproduce adgen-chatglm: no such work; there are adgen-chatglm-6b, "
        in capsys.readouterr().err
    )
