"""What the server gives to the page, to whom, and what a run's own pages may do."""

import json
import re
from urllib.parse import quote

import pytest
from fastapi import FastAPI
from pages import NASTY, Page, many
from starlette.testclient import TestClient

from glmtune.config.serving import ServeSettings
from glmtune.evaluation.page import html
from glmtune.serving.guards import Guards
from glmtune.serving.pages import FILES, POLICY, add_pages, find_watch
from glmtune.serving.watch import RunWatch

KEY = "correct horse"


def served(run=None, **settings):
    """A client of the page alone, behind the server's guards."""
    settings = ServeSettings(base="glm-tiny", **settings)
    app = FastAPI()
    app.add_middleware(Guards, settings=settings)
    add_pages(app, settings, has_model=True, run=run and RunWatch.of(run))
    return TestClient(app, base_url="http://127.0.0.1:8000")


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "compare").mkdir(parents=True)
    (folder / "compare" / "compare.html").write_text(html(many(3)), encoding="utf-8")
    (folder / "metrics.jsonl").write_text('{"loss": 2.0, "step": 1}\n{"loss": 1.0, "step": 2}\n')
    (folder / "recipe.yaml").write_text("max_steps: 2 # \x1b[31m\n")
    (tmp_path / "secret.txt").write_text("secret")
    return folder


def test_the_page_loads_its_own_files_alone():
    client = served()
    answer = client.get("/")
    assert answer.headers["content-security-policy"] == POLICY
    assert "unsafe" not in POLICY
    page = Page(answer.text.replace("<link ", "<meta ").replace("<img ", "<meta "))
    asked = [a.get("src") or a.get("href") for tag, a in page.tags if tag in ("script", "meta")]
    named = {path.removeprefix("/page/") for path in filter(None, asked)}
    assert named <= FILES.keys()
    for _, attributes in page.tags:
        assert not {"style", "onclick", "onload"} & attributes.keys()
    for name in FILES:
        found = client.get(f"/page/{name}")
        assert found.status_code == 200
        assert found.headers["x-content-type-options"] == "nosniff"
        imported = re.findall(r'from "\./(.*?)"', found.text)
        assert set(imported) <= FILES.keys()
    assert client.get("/page/main.js").headers["content-type"].startswith("text/javascript")
    assert client.get("/page/icon.svg").headers["content-type"] == "image/svg+xml"


def test_no_script_makes_markup_of_a_text():
    client = served()
    for name in (name for name in FILES if name.endswith(".js")):
        text = client.get(f"/page/{name}").text
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


@pytest.mark.parametrize("name", ["../pages.py", "pages.py", "index.html", "%2e%2e%2fpages.py", ""])
def test_other_files_are_not_there(name):
    assert served().get(f"/page/{name}").status_code == 404


def test_without_a_run_there_is_nothing_of_one():
    client = served()
    assert client.get("/page/about.json").json() == {"chat": True, "run": False}
    assert client.get("/run/status").status_code == 404


def test_the_run_is_told_with_its_curves_once(run):
    client = served(run)
    assert client.get("/page/about.json").json() == {"chat": True, "run": True}
    told = client.get("/run/status").json()
    assert told["state"] == "preparing" or told["state"] == "stopped"
    assert told["numbers"]["loss"] == 1.0
    assert "<svg" in told["plots"][0]
    again = client.get("/run/status", params={"known": told["version"]}).json()
    assert "plots" not in again
    assert [file["name"] for file in told["files"]] == [
        "compare.html", "metrics.jsonl", "recipe.yaml"
    ]  # fmt: skip
    assert str(run) not in json.dumps(told)


@pytest.mark.parametrize(
    "name",
    ["../secret.txt", "..%2fsecret.txt", "status.json", "/etc/passwd", "compare/compare.html",
     "training_loss.png", "nothing", NASTY],
)  # fmt: skip
def test_only_named_files_of_the_run_are_given(run, name):
    client = served(run)
    answer = client.get(f"/run/files/{name if '%' in name else quote(name)}")
    assert answer.status_code == 404
    assert "secret" not in answer.text
    assert str(run) not in answer.text


def test_a_page_of_the_run_keeps_its_own_scripts_in_a_sandbox(run):
    client = served(run)
    answer = client.get("/run/files/compare.html")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts")
    assert "allow-same-origin" not in policy
    assert "'unsafe-inline'" not in policy
    assert "default-src 'none'" in policy
    for hashed in re.findall(r"'sha256-[^']+'", answer.text.partition("</head>")[0]):
        assert hashed in policy, "what the page itself allows"
    recipe = client.get("/run/files/recipe.yaml")
    assert recipe.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert "\\x1b[31m" in recipe.text


def test_the_run_is_for_the_key_alone(run):
    client = served(run, api_key=KEY)
    for path in ("/", "/run", "/page/about.json", "/page/main.js"):
        assert client.get(path).status_code == 200, "the page asks for the key"
    for path in ("/run/status", "/run/files/compare.html"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
            refused = client.get(path, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
    assert client.post("/run/session").status_code == 401
    right = {"Authorization": f"Bearer {KEY}"}
    assert client.get("/run/status", headers=right).status_code == 200
    cookie = client.post("/run/session", headers=right).headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Max-Age" not in cookie, "it ends with the browser's session"
    assert KEY not in cookie
    assert client.get("/run/files/compare.html").status_code == 200, "the client sends it back"
    other = served(run, api_key="another key")
    other.cookies.set("glmtune_run", client.cookies["glmtune_run"], path="/run")
    assert other.get("/run/files/compare.html").status_code == 401
    changing = client.post("/run/session")
    assert changing.status_code == 401, "the cookie opens files and nothing else"
    assert client.get("/run/status").status_code == 401


def test_the_run_of_an_adapter_is_shown(run, tmp_path):
    """Of the first that lies in a run folder, or in a checkpoint of one."""
    alone = tmp_path / "alone"
    alone.mkdir()
    (run / "checkpoint-2").mkdir()

    def found(**settings):
        watch = find_watch(ServeSettings(**settings))
        return watch and watch.folder

    assert found(adapter=f"a={alone}") is None
    assert found(adapter=f"a={alone},b={run}") == run
    assert found(adapter=f"a={run / 'checkpoint-2'}") == run
    assert found(adapter=f"a={run}", run=str(alone)) == alone
