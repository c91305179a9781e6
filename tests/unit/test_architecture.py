"""The functions of a training step and of a token that docs/architecture.md lists, run in order."""

import re
import sys
from importlib import import_module
from operator import attrgetter

import pytest
import torch

from glmtune.adapters import attach_lora
from glmtune.generation import Decoder, EncodedPrompt, GenerationSettings
from glmtune.models.loading import load_base_model
from glmtune.models.resolve import GLM_TINY
from glmtune.training import loop

ROOMS = ("config", "data", "ops", "models", "training", "generation")


def listed(root, title):
    """The functions of a numbered list in the document, as code objects with their names."""
    text = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    part = text.partition(f"## {title}")[2].partition("\n## ")[0]
    names = re.findall(r"^\d+\. `([\w.]+)`:", part, re.MULTILINE)
    found = []
    for name in names:
        module, attribute = re.match(r"((?:[a-z_0-9]+\.)+?)((?:[A-Z]\w*\.)?\w+)$", name).groups()
        function = attrgetter(attribute)(import_module(f"glmtune.{module.rstrip('.')}"))
        found.append((name, getattr(function, "__wrapped__", function).__code__))
    return found


def order_of_first_calls(codes, work):
    """The names of code objects in the order in which they are first called while `work` runs."""
    names, seen = {code: name for name, code in codes}, []

    def look(frame, event, _):
        if event == "call" and (name := names.get(frame.f_code)) and name not in seen:
            seen.append(name)

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.usefixtures("no_curve")
def test_the_ten_functions_of_a_training_step(root, toy_run):
    codes = listed(root, "A training step")
    names = [name for name, _ in codes]
    assert len(names) == 10
    settings = toy_run(layout="packed", tokens_per_step=64, max_steps=1)
    train_step, calls = loop.train_step, []

    def traced(*given):
        result = []
        calls.extend(order_of_first_calls(codes, lambda: result.append(train_step(*given))))
        return result[0]

    loop.train_step = traced
    try:
        loop.train(settings)
    finally:
        loop.train_step = train_step
    assert calls == names


def test_the_eight_functions_of_a_token(root):
    codes = listed(root, "A token of an answer")
    names = [name for name, _ in codes]
    assert len(names) == 8
    model = attach_lora(load_base_model(GLM_TINY, dtype=torch.float32)).eval()
    config = model.config
    prompt = EncodedPrompt([5, 6, 7, config.gmask_token_id, config.bos_token_id], 0)
    decoder = Decoder(model, [])
    calls = order_of_first_calls(
        codes, lambda: list(decoder.stream([prompt], GenerationSettings(max_new_tokens=3)))
    )
    assert sorted(calls) == sorted(names)
    # The first token is chosen and looked at before the first step.
    assert [name for name in calls if name not in (names[6], names[7])] == names[:6]


def test_the_chinese_page_lists_the_same_functions(root):
    both = []
    for page in ("architecture.md", "architecture.zh.md"):
        text = (root / "docs" / page).read_text(encoding="utf-8")
        both.append(re.findall(r"^(\d+)\. `([\w.]+)`[:：]", text, re.MULTILINE))
    assert len(both[0]) == 10 + 8
    assert both[0] == both[1]


@pytest.mark.parametrize("page", ["architecture.md", "architecture.zh.md"])
def test_the_picture_has_every_room_and_is_short(root, page):
    text = (root / "docs" / page).read_text(encoding="utf-8")
    picture = text.split("```")[1]
    assert picture.count("\n") <= 60
    package = root / "src" / "glmtune"
    rooms = [path.name for path in package.iterdir() if (path / "__init__.py").is_file()]
    rooms += [f"training/{name}" for name in ("planning", "saving", "faults")]
    assert [room for room in rooms if f"{room.split('/')[-1]}/" not in picture] == []
