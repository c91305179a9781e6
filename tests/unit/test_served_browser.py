"""The served page in a real browser: a conversation with two models, and a run that is followed.

One browser and one server serve all tests. The server's answers are scripted, so that a test knows
when a word comes; tests/recipes has the page on the real server.
"""

import asyncio
import json
import re
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn
from browsers import DESKTOP, PHONE, grave_faults, launched
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pages import many
from playwright.sync_api import Error, expect

from glmtune.cli import main
from glmtune.config.serving import ServeSettings
from glmtune.evaluation.page import html
from glmtune.locks import held_alone
from glmtune.serving.guards import Guards
from glmtune.serving.pages import add_pages
from glmtune.serving.watch import RunWatch

MARKUP = "<b>bold</b><img src=x onerror=alert(1)>"
SLOW = 0.02
"""Seconds between two pieces of an answer."""


class Script:
    """The app: what it was asked, and who hung up."""

    def __init__(self, run, api_key=None):
        self.asked, self.hung_up = [], 0
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/chat/completions")(self.answer)
        settings = ServeSettings(base="glm-tiny", api_key=api_key)
        self.app.add_middleware(Guards, settings=settings)
        add_pages(self.app, settings, has_model=True, run=run)

    async def models(self):
        names = {"base": "chat", "style": "chat", "facts": "alpaca", "both": "chat"}
        listed = [{"id": name, "format": format} for name, format in names.items()]
        return {"object": "list", "data": [*listed, {"id": "both:facts", "format": "alpaca"}]}

    async def answer(self, request: Request):
        body = await request.json()
        self.asked.append(body)
        question = body["messages"][-1]["content"]
        if question == "refuse":
            return JSONResponse({"error": {"message": f"too long {MARKUP}"}}, status_code=400)
        return StreamingResponse(self.pieces(body, question), media_type="text/event-stream")

    async def pieces(self, body, question):
        text = f"{body['model']} 答：{question} {MARKUP}\n" + "一二三 " * (
            2000 if question == "long" else 3
        )

        def chunk(**choice):
            found = {"index": 0, "delta": {}, "finish_reason": None, **choice}
            return f"data: {json.dumps({'choices': [found]})}\n\n"

        try:
            yield chunk(delta={"role": "assistant"})
            pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
            for piece in pieces:
                yield chunk(delta={"content": piece})
                await asyncio.sleep(SLOW)
            yield chunk(finish_reason="stop")
            usage = {"completion_tokens": len(pieces)}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"
        except asyncio.CancelledError:
            self.hung_up += 1
            raise


@contextmanager
def listening(app, port=0):
    """Serve an app in a thread; gives its port."""
    config = uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=0)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser(browser_path):
    with launched(browser_path) as browser:
        yield browser


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of 30 steps, with sample answers and a comparison."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    (folder / "compare").mkdir(parents=True)
    (folder / "compare" / "compare.html").write_text(html(many(30)), encoding="utf-8")
    write_run(folder, 30)
    return folder


def write_run(folder, num):
    records = [{"loss": 3 / n, "tokens_per_second": 99.0 + n, "step": n} for n in range(1, num + 1)]
    records.append({"eval_loss": 0.5, "general": 50.0, "general_zh": 50.0, "step": num})
    samples = [
        {
            "step": step,
            "answers": [{"question": f"问{MARKUP}", "expected": "对", "answer": f"第{step}"}],
        }
        for step in range(0, num + 1, 10)
    ]
    for name, lines in (("samples.jsonl", samples), ("metrics.jsonl", records)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def script(run_folder):
    return Script(RunWatch.of(run_folder))


@pytest.fixture(scope="module")
def port(script):
    with listening(script.app) as port:
        yield port


class Tab:
    """A tab in a browser of its own, which listens for complaints and for requests elsewhere."""

    def __init__(self, browser, port, **settings):
        self.origin = f"http://127.0.0.1:{port}"
        settings = {"viewport": DESKTOP, "locale": "en-GB"} | settings
        self.context = browser.new_context(**settings)
        self.complaints = []
        self.context.on("page", self.listen)
        self.page = self.context.new_page()

    def listen(self, page):
        page.set_default_timeout(15_000)
        page.on("console", lambda message: self.complaints.append(message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        page.on("request", self.check)

    def check(self, request):
        if not request.url.startswith((self.origin, f"blob:{self.origin}")):
            self.complaints.append(request.url)

    def open(self, path="/"):
        self.page.goto(self.origin + path)
        return self.page


@pytest.fixture
def tab(browser, port):
    """A new tab, in which nothing may be complained of."""
    tab = Tab(browser, port)
    yield tab
    tab.context.close()
    assert tab.complaints == []


@pytest.fixture
def page(tab):
    page = tab.open()
    is_ready(page)
    return page


def is_ready(page):
    """Wait for the models: they come last, so all that is kept has been filled in."""
    expect(page.locator("#left option")).to_have_count(3)


def reload(page):
    page.reload()
    is_ready(page)


def ask(page, question, wait=True):
    page.fill("#question", question)
    page.press("#question", "Enter")
    if wait:
        is_done(page)


def is_done(page):
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("#turns > :last-child footer").last).to_be_visible()


def answers(page):
    return page.locator("#turns > :last-child .said").all_inner_texts()


def test_chinese_is_typed_and_answered_by_both(page, tab, script):
    page.focus("#question")
    typing = tab.context.new_cdp_session(page)
    for text in ("n", "ni", "ni h", "ni hao"):
        place = {"selectionStart": len(text), "selectionEnd": len(text)}
        typing.send("Input.imeSetComposition", {"text": text, **place})
    num = len(script.asked)
    for code in (13, 229):  # as the key is reported during a composition, and right after one
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": code}
        typing.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **key})
        typing.send("Input.dispatchKeyEvent", {"type": "keyUp", **key})
    assert page.locator("#turns > *").count() == 0, "Enter chose the word and sent nothing"
    page.fill("#question", "")
    typing.send("Input.imeSetComposition", {"text": "ni", "selectionStart": 2, "selectionEnd": 2})
    typing.send("Input.insertText", {"text": "你好"})
    assert page.input_value("#question") == "你好"
    page.keyboard.press("Shift+Enter")
    typing.send("Input.insertText", {"text": "吗"})
    page.keyboard.press("Enter")
    expect(page.locator("#turns .said").last).to_contain_text("答：你好")
    assert page.locator("#turns footer").count() < 2, "it is shown while it comes"
    is_done(page)
    assert page.input_value("#question") == ""
    base, tuned = answers(page)
    assert base.startswith(f"base 答：你好\n吗 {MARKUP}")
    assert tuned.startswith("style 答：")
    assert page.locator("#turns b, #turns .said img").count() == 0, "answers are no markup"
    assert page.locator("#turns .said").first.get_attribute("lang") == "zh-CN"
    assert len(script.asked) == num + 2
    assert script.asked[-1]["stream_options"] == {"include_usage": True}
    assert re.match(r"1\d tokens · \d+(\.\d)?/s$", page.locator(".cost").first.inner_text())


def test_an_answer_is_stopped(page, script):
    for way in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
        num = script.hung_up
        ask(page, "long", wait=False)
        expect(page.locator("#turns > :last-child .said").last).to_contain_text("一二三")
        assert page.locator("#send").is_hidden()
        way()
        is_done(page)
        assert "stopped" in page.locator("#turns > :last-child .cost").first.inner_text()
        before = answers(page)
        for _ in range(200):
            if script.hung_up == num + 2:
                break
            page.wait_for_timeout(25)
        assert script.hung_up == num + 2, "the server is not left answering"
        assert answers(page) == before
        assert page.locator("#send").is_visible()


def test_settings_reach_the_server_and_stay(page, script):
    page.click("#settings summary")
    for name, value in (
        ("temperature", "0.7"),
        ("top_p", "0.9"),
        ("seed", "5"),
        ("max_tokens", ""),
    ):
        page.fill(f"#{name}", value)
    page.fill("#system", "用中文回答")
    ask(page, "set")
    body = script.asked[-1]
    assert {name: body[name] for name in ("temperature", "top_p", "seed")} == {
        "temperature": 0.7, "top_p": 0.9, "seed": 5
    }  # fmt: skip
    assert "max_tokens" not in body, "left empty, it is the server's"
    assert body["messages"][0] == {"role": "system", "content": "用中文回答"}
    reload(page)
    assert page.input_value("#temperature") == "0.7"
    assert "top_p 0.9" in page.locator("#summary").inner_text()
    num = len(script.asked)
    page.click("#settings summary")
    page.fill("#top_p", "7")
    ask(page, "kept for later", wait=False)
    assert page.input_value("#question") == "kept for later"
    assert len(script.asked) == num


def test_good_answers_become_a_training_row(page, script, tmp_path, capsys):
    assert page.locator("#export").is_disabled()
    ask(page, "一")
    page.locator("#turns .keep").nth(0).click()
    expect(page.locator("#turns article.kept")).to_have_count(1)
    ask(page, "two")
    said = answers(page)
    for body in script.asked[-2:]:
        first = body["messages"][:2]
        assert first[0] == {"role": "user", "content": "一"}
        assert first[1]["content"].startswith("base 答："), "what was kept is the context of both"
    ask(page, "三")
    edits = page.locator("#turns > :last-child .actions").last.get_by_role("button", name="Edit")
    edits.click()
    page.fill(".edit", "改好的答案\n<i>")
    page.locator(".editing .main").click()
    assert "kept, edited" in page.locator("#turns > :last-child article.kept").inner_text()
    ask(page, "not kept")
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "rows.jsonl"
    download.value.save_as(file)
    (row,) = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    roles = [message["role"] for message in row["messages"]]
    assert roles == ["user", "assistant"] * 3, "no further than the last good answer"
    assert row["messages"][3] == {"role": "assistant", "content": said[1], "weight": 0}
    assert row["messages"][-1] == {"role": "assistant", "content": "改好的答案\n<i>"}
    assert main(["validate", str(file)]) == 0
    tokens = tmp_path / "tokens"
    flags = ["--jsonl_path", str(file), "--save_path", str(tokens), "--base", "glm-tiny"]
    assert main(["tokenize", *flags]) == 0
    told = capsys.readouterr().out
    assert "1 read, 1 kept" in told


def test_who_was_taught_single_questions_reads_one(page, script):
    page.select_option("#right", "facts")
    ask(page, "一")
    assert page.locator("#turns h3 small").count() == 0
    ask(page, "二")
    asked = {body["model"]: body["messages"] for body in script.asked[-2:]}
    assert len(asked["base"]) == 3
    assert asked["facts"] == [{"role": "user", "content": "二"}]
    assert "taught single questions" in page.locator("#turns h3 small").inner_text()


def test_all_good_answers_are_exported(page, tmp_path):
    for question in ("甲", "乙", "丙"):
        page.click("#new")
        ask(page, question)
        if question != "乙":
            page.locator("#turns .keep").last.click()
    expect(page.locator("#chats .has-kept")).to_have_count(2)
    with page.expect_download() as download:
        page.click("#export-all")
    download.value.save_as(tmp_path / "all.jsonl")
    rows = (tmp_path / "all.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(json.loads(row)["messages"][0]["content"] for row in rows) == ["丙", "甲"]


def test_models_and_language_are_switched_and_a_reload_keeps_all(page, script):
    page.select_option("#left", "facts")
    ask(page, "一")
    assert [text.split()[0] for text in answers(page)] == ["facts", "style"]
    page.select_option("#right", "")
    ask(page, "二")
    assert len(answers(page)) == 1
    page.click("#language")
    assert page.locator("#send").inner_text() == "发送"
    assert page.get_attribute("#question", "placeholder") == "输入问题"
    before = page.locator("#turns .said").all_inner_texts()
    reload(page)
    expect(page.locator("#turns .said")).to_have_count(3)
    assert page.locator("#turns .said").all_inner_texts() == before
    assert page.locator("#send").inner_text() == "发送"
    assert page.input_value("#left") == "facts"
    page.click("#turns .again:visible")
    is_done(page)
    assert page.locator("#turns > *").count() == 2, "asked again, in its place"
    page.click("#new")
    assert page.locator("#welcome").is_visible()
    page.locator("#chats .entry").first.click()
    expect(page.locator("#turns > *")).to_have_count(2)
    page.locator("#chats li").first.hover()
    page.locator("#chats .icon").first.click()
    assert page.locator("#chats li").count() == 0
    page.locator("#notice").get_by_role("button").click()
    expect(page.locator("#chats li")).to_have_count(1)


def test_a_reload_keeps_what_had_come(page):
    ask(page, "long", wait=False)
    expect(page.locator("#turns .said").last).to_contain_text("一二三")
    reload(page)
    expect(page.locator("#turns footer")).to_have_count(2)
    assert "一二三" in page.locator("#turns .said").first.inner_text()
    assert page.locator("#send").is_visible()


def test_what_is_refused_is_said(browser, port):
    tab = Tab(browser, port)
    page = tab.open()
    is_ready(page)
    ask(page, "refuse")
    assert page.locator(".fault").first.inner_text() == f"Refused: too long {MARKUP}"
    assert page.locator("#turns img").count() == 0
    ask(page, "again")
    assert len(answers(page)) == 2
    tab.context.close()
    assert all("400" in text for text in tab.complaints), tab.complaints


def test_the_server_goes_and_comes_back(browser, run_folder):
    tab = Tab(browser, 0)
    with listening(Script(None).app) as port:
        tab.origin = f"http://127.0.0.1:{port}"
        page = tab.open()
        is_ready(page)
        ask(page, "long", wait=False)
        expect(page.locator("#turns .said").last).to_contain_text("一二三")
    expect(page.locator("#gone")).to_be_visible()
    assert "the server broke off" in page.locator(".fault").first.inner_text()
    assert "一二三" in page.locator("#turns .said").first.inner_text(), "what had come stays"
    page.fill("#question", "still here")
    with listening(Script(None).app, port):
        expect(page.locator("#gone")).to_be_hidden()
        assert page.locator("#notice").inner_text() == "The server is back."
        page.press("#question", "Enter")
        is_done(page)
        assert answers(page)[1].startswith("style 答：still here")
    tab.context.close()
    assert not [text for text in tab.complaints if "net::ERR" not in text]


def test_the_key_is_asked_for_and_kept_for_the_session(browser, run_folder):
    with listening(Script(RunWatch.of(run_folder), api_key="open sesame").app) as port:
        tab = Tab(browser, port)
        page = tab.open()
        expect(page.locator("#key-wanted")).to_be_visible()
        page.keyboard.press("Escape")
        assert page.locator("#key-wanted").is_visible()
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        expect(page.locator("#key-wrong")).to_be_visible()
        assert grave_faults(page) == []
        page.fill("#key", "open sesame")
        page.press("#key", "Enter")
        is_ready(page)
        ask(page, "一")
        reload(page)
        assert page.locator("#key-wanted").is_hidden()
        page.click("#to-run")
        with tab.context.expect_page() as opened:
            page.locator(".files a").first.click()
        expect(opened.value.locator("#shown")).to_contain_text("30")
        kept = page.evaluate("JSON.stringify(localStorage) + document.cookie")
        assert "sesame" not in kept
        assert tab.context.new_page().goto(tab.origin).ok
        expect(tab.context.pages[-1].locator("#key-wanted")).to_be_visible()
        tab.context.close()
    assert all("401" in text for text in tab.complaints), tab.complaints


@pytest.fixture
def training(run_folder):
    """The run, held as by its training process."""
    write_run(run_folder, 30)
    with held_alone(run_folder):
        yield run_folder


def test_a_run_is_followed(page, training):
    page.click("#to-run")
    assert page.url.endswith("/run")
    figure = page.locator(".of-run .figure b").first
    expect(figure).to_have_text("30")
    expect(page.locator(".plot")).to_have_count(3)
    said = page.locator(".samples .of-tuned .text")
    expect(said).to_have_text("第30")
    slider = page.locator(".samples input")
    slider.focus()
    page.keyboard.press("Home")
    assert said.inner_text() == "第0"
    assert page.locator(".samples output .en").inner_text() == "step 0"
    write_run(training, 40)
    expect(figure).to_have_text("40", timeout=20_000)
    assert said.inner_text() == "第0", "what is read is not taken away"
    page.keyboard.press("End")
    assert said.inner_text() == "第40"
    assert page.locator("#run img").count() == 0
    page.click("#language")
    assert "留出问题" in page.locator(".samples h2").inner_text()
    assert grave_faults(page) == []
    page.go_back()
    assert page.locator("#chat").is_visible()


def test_the_comparison_works_and_cannot_reach_the_page(page, tab):
    page.evaluate("localStorage.setItem('secret', 'x')")
    page.click("#to-run")
    with tab.context.expect_page() as opened:
        page.locator(".files a").first.click()
    found = opened.value
    expect(found.locator("#shown")).to_contain_text("30 / 30")
    found.fill("#search", "第 7 号")
    expect(found.locator("#shown")).to_contain_text("3 / 30")
    assert found.evaluate("origin") == "null"
    with pytest.raises(Error, match="sandboxed"):
        found.evaluate("localStorage.secret")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_nobody_is_kept_out(browser, port, size, scheme):
    """No serious fault that axe knows, and nothing to scroll sideways."""
    tab = Tab(browser, port, viewport=size, color_scheme=scheme, locale="zh-CN")
    page = tab.open()
    is_ready(page)
    assert grave_faults(page) == []
    ask(page, "一个很长的问题" * 20)
    page.locator("#turns .keep").last.click()
    page.click("#settings summary")
    assert grave_faults(page) == []
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) == size["width"]
    if size is PHONE:
        assert page.locator("#side").is_hidden()
        page.click("#menu")
        expect(page.locator("#chats .entry")).to_be_visible()
        assert grave_faults(page) == []
        page.keyboard.press("Escape")
        expect(page.locator("#side")).to_be_hidden()
    page.click("#to-run")
    expect(page.locator(".plot").first).to_be_visible()
    assert grave_faults(page) == []
    assert page.evaluate("document.querySelector('#run').scrollWidth") <= size["width"]
    tab.context.close()
    assert tab.complaints == []
