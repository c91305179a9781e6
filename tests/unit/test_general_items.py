"""The items of a general set: those that come with glmtune, a base's own, and a user's file."""

import json
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from glmtune.demo.general import KINDS as TOY_KINDS
from glmtune.demo.general import general_lines
from glmtune.errors import UserError
from glmtune.evaluation.price import KINDS
from glmtune.general.items import LANGUAGES, OF_BASE, OWN_NAME, find_general, own_set, parse
from glmtune.models.resolve import GLM_TINY

OWN = own_set()
TOY = find_general(True, GLM_TINY)
ITEM = {"kind": "facts", "question": "Where?", "answer": "Here.", "wrong": ["a", "b", "c"]}


def of_language(items, language):
    return [item for item in items if item.language == language]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("general", [OWN, TOY], ids=["own", "toy"])
def test_a_set_has_200_items_of_twelve_kinds_in_each_language(general, language):
    items = of_language(general.items, language)
    kinds = Counter(item.kind for item in items)
    assert len(items) >= 200
    assert len(kinds) == 12
    assert min(kinds.values()) >= 15
    assert set(kinds) == {item.kind for item in general.items}
    assert set(kinds) <= set(KINDS)
    assert len({(item.asked, item.answer) for item in items}) == len(items)


def test_our_questions_are_asked_once_and_are_not_those_of_another_kind():
    asked = [item.asked for item in OWN.items]
    assert len(set(asked)) == len(asked)
    assert not any(item.is_text for item in OWN.items)
    assert all(item.is_text for item in TOY.items)


@pytest.mark.parametrize("item", OWN.items, ids=lambda item: item.asked[:20])
def test_no_choice_begins_with_another(item):
    # Choices are scored without an end, so the longer one would also say the shorter.
    for choice in item.choices:
        others = [other for other in item.choices if other is not choice]
        assert choice == choice.strip()
        assert not any(other.startswith(choice) for other in others)


@pytest.mark.parametrize("pick", [max, min])
@pytest.mark.parametrize("language", LANGUAGES)
def test_length_gives_no_answer_away(language, pick):
    """The right answer is the longest, and the shortest, in about a quarter; equal ones share."""
    shares = []
    for item in of_language(OWN.items, language):
        lengths = [len(choice) for choice in item.choices]
        extreme = pick(lengths)
        shares.append((lengths[0] == extreme) / lengths.count(extreme))
    assert 0.2 < sum(shares) / len(shares) < 0.3


def test_the_files_are_in_the_package():
    folder = resources.files("glmtune.general")
    for language in LANGUAGES:
        lines = folder.joinpath(f"{language}.jsonl").read_text("utf-8").splitlines()
        assert len(lines) == len(of_language(OWN.items, language))


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_toy_worlds_items_are_those_that_its_grammar_makes(language):
    """Where this fails: python tools/write_toy_general.py."""
    kept = Path(GLM_TINY, OF_BASE.format(language)).read_text("utf-8")
    assert kept.splitlines() == list(general_lines(language))
    kinds = {json.loads(line)["kind"] for line in kept.splitlines()}
    assert kinds == set(TOY_KINDS)


def test_a_bases_own_set_goes_before_ours_and_a_file_before_both(tmp_path):
    assert TOY.name == "glm-tiny's own"
    assert find_general(True, str(tmp_path)).name == OWN_NAME
    assert find_general(True, "THUDM/chatglm-6b") == OWN
    assert find_general(False, GLM_TINY) is None
    (tmp_path / "mine.jsonl").write_text(json.dumps(ITEM) + "\n", encoding="utf-8")
    mine = find_general(str(tmp_path / "mine.jsonl"), GLM_TINY)
    assert (mine.name, mine.items[0].choices) == ("mine.jsonl", ("Here.", "a", "b", "c"))
    assert len({mine.digest, OWN.digest, TOY.digest}) == 3


@pytest.mark.parametrize(
    ("fields", "language"),
    [({}, "en"), ({"language": "zh"}, "zh"), ({"question": "在哪里？", "answer": "这里"}, "zh")],
)
def test_an_item_is_in_the_language_that_it_names_or_is_written_in(fields, language):
    (item,) = parse(json.dumps(ITEM | fields), "a.jsonl")
    assert item.language == language


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "a.jsonl:2: not JSON"),
        ("[1]", "a.jsonl:2: [1] is no object"),
        ({"wrong": ["a", "b"]}, 'wrong is ["a", "b"]; give a list of 3'),
        ({"wrong": ["a", "b", "a"]}, "are not 4 different choices"),
        ({"wrong": ["a", "b", "Here. "]}, "are not 4 different choices"),
        ({"wrong": ["a", "b", ""]}, 'wrong answer 3 is ""'),
        ({"wrong": ["a", "b", 7]}, "wrong answer 3 is 7"),
        ({"answer": None}, "answer is null"),
        ({"kind": " "}, 'kind is " "'),
        ({"text": "Once"}, "give either question, or text"),
        ({"language": "fr"}, 'language is "fr"; give zh or en'),
        ({"anwser": "x"}, '["anwser"] is no field of an item'),
        ({"kind": "sums"}, "the same item as line 1"),
    ],
)
def test_a_flaw_is_one_line_with_its_place(line, message):
    text = line if isinstance(line, str) else json.dumps(ITEM | line)
    with pytest.raises(UserError) as error:
        parse(f"{json.dumps(ITEM)}\n{text}\n", "a.jsonl")
    assert str(error.value).startswith("a.jsonl:2: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_only_a_line_feed_ends_an_item():
    item = json.dumps(ITEM | {"answer": "one\u2028two"}, ensure_ascii=False)
    assert parse(f"{item}\r\n\r\n", "a.jsonl")[0].answer == "one\u2028two"


def test_several_flaws_are_counted_and_an_empty_file_is_refused():
    with pytest.raises(UserError, match=r"a.jsonl:1: not JSON.*\(1 more line has a flaw\)"):
        parse("x\ny\n", "a.jsonl")
    with pytest.raises(UserError, match=r"\(2 more lines have a flaw\)"):
        parse("x\ny\nz\n", "a.jsonl")
    with pytest.raises(UserError, match="holds no item"):
        parse("\n", "a.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        find_general("nowhere.jsonl", GLM_TINY)
