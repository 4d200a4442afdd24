# SPDX-License-Identifier: Apache-2.0
"""The demo as its users meet it: in Chromium, and over HTTP by many at once.

Addresses of this machine only. Screenshots go to the folder VTC_ARTEFACTS, if it is set. Without
Chromium the tests in the browser are skipped, or fail where VTC_REQUIRE_BROWSER=1.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import threading
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from leaks import resident
from PIL import Image

gr = pytest.importorskip("gradio", exc_type=ImportError)

from vtc.benchmarks.support.mini_models import mini_llava, mini_processor  # noqa: E402
from vtc.demos import choices, loading, server, uploads  # noqa: E402
from vtc.demos.engine import Engine, draw  # noqa: E402
from vtc.demos.examples import EXAMPLES  # noqa: E402
from vtc.demos.results import BASELINE, COMPRESSED  # noqa: E402
from vtc.method import PLACES  # noqa: E402
from vtc.methods.fastv import FastV  # noqa: E402

pytestmark = pytest.mark.slow

http = httpx.Client(timeout=60)
QUESTION = "is there a red circle ?"
MINUTE = 60_000  # milliseconds
LAPTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
GROWTH = 40 * 2**20
"""Bytes that 100 requests may add to the process, after 30 to warm up."""


@pytest.fixture(scope="module")
def site():
    """The page with the embedded models."""
    engine = Engine(loading.embedded())
    with server.serving(engine) as address:
        yield address
    engine.close()


@pytest.fixture(scope="module")
def small():
    """The page with a random model that takes milliseconds: (address, engine)."""
    net = mini_llava()
    engine = Engine([choices.PageModel("mini", net, mini_processor(net), "noise", "model = ...")])
    with server.serving(engine) as address:
        yield address, engine
    engine.close()


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path, sync_playwright = None, None
    if not path:
        if os.environ.get("VTC_REQUIRE_BROWSER") == "1":
            pytest.fail("VTC_REQUIRE_BROWSER=1, and there is no Chromium (or no playwright)")
        pytest.skip("no Chromium: apt-get install chromium, pip install playwright")
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    folder = os.environ.get("VTC_ARTEFACTS")
    made = Path(folder) if folder else tmp_path_factory.mktemp("screenshots")
    made.mkdir(parents=True, exist_ok=True)
    return made


class Visit:
    """A page, with what it asked for over the network and what went wrong in it."""

    def __init__(self, browser, address: str, device: dict) -> None:
        self.context = browser.new_context(**device)
        self.page = self.context.new_page()
        self.page.set_default_timeout(MINUTE)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("console", self._heard)
        self.address = address
        self.page.goto(address)
        self.page.wait_for_selector("#ask")

    def _heard(self, message) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def upload(self, path: Path) -> None:
        self.page.locator("input[type=file]").first.set_input_files(path)

    def status(self, text: str) -> None:
        """Wait for a status line with a text."""
        self.page.locator(".vtc-status:visible", has_text=text).first.wait_for()

    def shot(self, path: Path) -> None:
        """A screenshot of the whole page, which must fit its width."""
        self.page.wait_for_timeout(500)  # let transitions end
        self.page.screenshot(path=path, full_page=True)
        width = self.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= self.page.viewport_size["width"], f"{path.name} scrolls sideways"
        assert width[1] <= self.page.viewport_size["width"], f"{path.name} is wider than the screen"

    def leave(self) -> None:
        host = urlsplit(self.address).netloc
        foreign = {u for u in self.requests if u.startswith("http") and urlsplit(u).netloc != host}
        assert not foreign
        assert not self.errors
        self.context.close()


@pytest.fixture
def visit(browser):
    visits: list[Visit] = []

    def come(address: str, device: dict) -> Visit:
        visits.append(Visit(browser, address, device))
        return visits[-1]

    yield come
    for one in visits:
        one.context.close()


@pytest.mark.parametrize("device", ["laptop", "phone"])
def test_a_visit(site, visit, artefacts, tmp_path, device):
    """Upload, ask, move the sliders; compare methods; search. With pictures of everything."""
    here = visit(site, LAPTOP if device == "laptop" else PHONE)
    page = here.page
    here.shot(artefacts / f"{device}-1-start.png")

    example = EXAMPLES[0]
    example.draw().save(tmp_path / "scene.png")
    page.get_by_label("Remove Image").first.click()
    here.upload(tmp_path / "scene.png")
    here.status("ready: ask a question")
    page.fill("#question-ask textarea", example.question)
    page.locator("#keep input[type=number]").fill("10")
    page.locator("#keep input[type=number]").press("Tab")
    page.locator("#code", has_text="keep_ratio=0.1").wait_for()
    page.click("#ask")
    here.status("done: ")
    assert page.inner_text("#before .said") == example.answer
    assert page.inner_text("#after .said")
    assert "58 image tokens" in page.inner_text("#after .who")
    figures = page.inner_text("#figures")
    for row in ("time to first token", "total time", "peak memory", "KV cache"):
        assert row in figures
    assert "not measured here" not in figures and "..." not in figures
    first = page.locator("#picture img").get_attribute("src")
    here.shot(artefacts / f"{device}-2-answer.png")

    page.locator("#layer input[type=number]").fill("0")
    page.locator("#layer input[type=number]").press("Tab")
    page.locator("#caption", has_text="at first: 576 of 576").wait_for()
    page.wait_for_function("s => document.querySelector('#picture img').src != s", arg=first)
    page.locator("#kind").get_by_text("merge groups").click()
    page.locator("#caption", has_text="share a colour").wait_for()

    page.get_by_role("tab", name="Compare methods").click()
    page.wait_for_function(
        "q => document.querySelector('#question-compare textarea').value == q", arg=example.question
    )
    page.click("#compare")
    page.locator("#sheet img").first.wait_for()
    assert page.locator("#comparison tbody tr").count() == 6
    assert page.locator("#sheet img").count() == 6
    page.locator("#chart img").wait_for()
    here.shot(artefacts / f"{device}-3-compare.png")

    page.get_by_role("tab", name="Retrieval").click()
    page.click("#search")
    page.locator("#found-after img").first.wait_for()
    assert page.locator("#found-before img").count() == 6
    assert "rank of the described scene" in page.inner_text("#ranking")
    here.shot(artefacts / f"{device}-4-retrieval.png")
    here.leave()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_image_or_too_large_is_said_so(site, visit, artefacts, tmp_path):
    here = visit(site, LAPTOP)
    page = here.page
    (tmp_path / "words.png").write_text("these are words")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    for name, says in (("words", "not an image"), ("huge", "100 megapixels (10000 x 10000)")):
        page.get_by_label("Remove Image").first.click()
        here.upload(tmp_path / f"{name}.png")
        here.status(says)
        here.shot(artefacts / f"refused-{name}.png")
        page.click("#ask")
        here.status("upload an image or pick an example")
        page.locator("#examples img").first.click()
        here.status("the right answer is")
    page.get_by_label("Remove Image").first.click()
    (tmp_path / "notes.txt").write_text("these are words")
    here.upload(tmp_path / "notes.txt")
    page.get_by_text(
        re.compile("only image/\\* allowed|Invalid file type|not an image")
    ).first.wait_for()
    here.shot(artefacts / "refused-type.png")
    here.context.close()


# ---- over HTTP ---------------------------------------------------------------------------------


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (56, 72, 3), dtype=np.uint8))


def send(address: str, image: object, length: int = 6, names: tuple[str, ...] = ("fastv",)) -> list:
    """One question through the page's own API, as a new user; an error is [its text]."""
    data = [image, QUESTION, "mini", names, 25, length, 0]
    call = http.post(f"{address}gradio_api/call/ask", json={"data": data})
    told = http.get(f"{address}gradio_api/call/ask/{call.json()['event_id']}").text
    event, last = told.strip().split("\n\n")[-1].split("\n")
    content = json.loads(last.removeprefix("data: "))
    return content if event == "event: complete" else [str(content)]


def uploaded(address: str, image: Image.Image) -> dict:
    raw = BytesIO()
    image.save(raw, "PNG")
    file = {"files": ("image.png", raw.getvalue())}
    (path,) = http.post(f"{address}gradio_api/upload", files=file).json()
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def ask(address: str, image: Image.Image, length: int = 6) -> list:
    """An upload and a question about it."""
    return send(address, uploaded(address, image), length)


def page_does(address: str, session: str, name: str, *data: object) -> list:
    """Updates that an open page gets for an event of its own; None is what it keeps."""
    events = http.get(f"{address}config").json()["dependencies"]
    (number,) = [event["id"] for event in events if event["api_name"] == name]
    call = {"data": data, "fn_index": number, "session_hash": session}
    http.post(f"{address}gradio_api/queue/join", json=call)
    told = http.get(f"{address}gradio_api/queue/data", params={"session_hash": session}).text
    messages = [json.loads(x.removeprefix("data: ")) for x in told.strip().split("\n\n")]
    (end,) = [m for m in messages if m["msg"] == "process_completed"]
    assert end["success"], end
    return end["output"]["data"]


def said(card: str) -> str:
    return re.search(r'class="said">(.*?)</div>', card, re.S).group(1)


def test_ten_users_at_once_see_their_own_answers_and_pictures(small):
    address, engine = small
    model = engine.models["mini"]
    expected = {}
    for seed in range(10):
        *_, end = engine.answer("mini", picture(seed), QUESTION, ["fastv"], 0.25, 6, rounds=0)
        drawn = draw(end.report, picture(seed), model.processor, "kept", end.report.stages()[-1][0])
        expected[seed] = end.sides[BASELINE].text, end.sides[COMPRESSED].text, drawn.tobytes()
    assert len({shown for *_, shown in expected.values()}) == 10
    got = {}

    def one(seed: int) -> None:
        _, before, after, _, _, shown, *_ = ask(address, picture(seed))
        content = http.get(shown["url"]).content
        got[seed] = said(before), said(after), Image.open(BytesIO(content)).tobytes()

    users = [threading.Thread(target=one, args=(seed,)) for seed in range(10)]
    for user in users:
        user.start()
    for user in users:
        user.join(timeout=60)
    assert got == expected


def test_a_failing_request_says_so_and_the_next_one_works(small, monkeypatch):
    address, engine = small

    def broken(self, v):
        raise RuntimeError("a secret of the server")

    with monkeypatch.context() as patch:
        patch.setattr(FastV, "score", broken)
        status = ask(address, picture(0))[0]
    assert "failed (RuntimeError)" in status
    assert "secret" not in status
    assert "vtc" not in engine.models["mini"].net.__dict__
    assert "done" in ask(address, picture(0))[0]


def test_the_page_says_what_it_cannot_do_in_words(small):
    address, _ = small
    image = uploaded(address, picture(0))
    code, _ = page_does(address, "words", "settings_changed", "mini", QUESTION, [], 25, 6)
    assert code == "# choose at least one method"
    caption = page_does(address, "words", "redraw", None, "kept", 0)[1]
    assert "this result is no longer kept: ask again" in caption
    page_does(address, "words", "ask", image, QUESTION, "mini", ["pool"], 25, 2, 0)
    shown, caption, _ = page_does(address, "words", "redraw", None, "scores", 1)
    assert shown is None
    assert "4 of 16 tokens. pool(" in caption and "no step up to there ranks" in caption
    status = page_does(address, "words", "compare", image, QUESTION, "mini", [], 25)[0]
    assert "choose between 1 and 8 methods" in status and 'role="alert"' in status
    status = page_does(address, "words", "search", "x" * 501, ["pitome"], 25)[0]
    assert "a description has at most 500 characters" in status and 'role="alert"' in status


def test_the_methods_on_offer_are_those_of_the_model_and_the_stage(small, monkeypatch):
    address, engine = small
    able = {n: stages for n, stages in engine.methods["mini"].items() if n != "divprune"}
    monkeypatch.setitem(engine.methods, "mini", able)

    def offered(event: str, *data: object) -> tuple[list[str], list[str]]:
        (update,) = page_does(address, "offer", event, "mini", *data)
        return [name for name, _ in update["choices"]], update["value"]

    assert offered("filtered", "anywhere", ["fastv", "divprune"]) == (sorted(able), ["fastv"])
    names, chosen = offered("filtered", PLACES["vision"], ["fastv"])
    assert chosen == ["fastv"]  # what was chosen stays, wherever it acts
    assert set(names) == {"fastv", *(n for n in able if "vision" in able[n])}
    assert offered("usable", ["divprune", "pitome"]) == (list(able), ["pitome"])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_does_not_grow_over_100_requests(small, record_property):
    address, _ = small
    image = Image.new("RGB", (800, 600), "teal")  # 1.4 MB in memory, little to upload
    for _ in range(server.SESSIONS + 6):  # all places for sessions are taken
        ask(address, image, length=2)
    before = resident()
    for _ in range(100):
        assert "done" in ask(address, image, length=2)[0]
    after = resident()
    record_property("resident_before", before)
    record_property("resident_after", after)
    print(f"resident: {before / 2**20:.1f} MiB before 100 requests, {after / 2**20:.1f} behind")
    assert after - before < GROWTH


OUTSIDE = [
    "/etc/passwd",
    "//etc/passwd",
    "/proc/self/environ",
    "../../../../../../etc/passwd",
    "%2e%2e%2f%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "..%2f..%2f..%2f..%2f..%2fetc/passwd",
    "/proc/self/root/etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:9/x",
    str(Path(__file__).resolve()),
    str(Path(__file__).resolve().parents[2] / "pyproject.toml"),
    str(Path(server.__file__).resolve()),
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_no_file_outside_the_session_is_served(small, path):
    address, _ = small
    for prefix in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/"):
        got = http.get(f"{address}{prefix}{path}")
        assert got.status_code in (400, 403, 404, 405), prefix
        assert "root:" not in got.text and "SPDX" not in got.text


@pytest.mark.parametrize("path", ["/etc/passwd", __file__, "http://127.0.0.1:9/x.png", None])
def test_a_path_that_was_not_uploaded_is_not_read(small, path):
    address, _ = small
    image = {"path": path, "url": "data:image/png;base64,AAAA" if path is None else None}
    got = send(address, {**image, "meta": {"_type": "gradio.FileData"}})
    assert len(got) == 1, got
    assert "root:" not in got[0] and "SPDX" not in got[0]


def test_strangers_and_floods_are_turned_away(small):
    address, _ = small
    ok = http.get(address)
    assert ok.status_code == 200
    policy = ok.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http:" not in policy and "https:" not in policy
    assert http.get(address, headers={"host": "evil.example"}).status_code == 400
    big = b"x" * (uploads.MAX_BYTES + 2**20 + 1)
    assert http.post(f"{address}gradio_api/queue/join", content=big).status_code == 413
    unknown = http.post(f"{address}gradio_api/queue/join", content=iter([b"{}"]))
    assert unknown.status_code == 411
    file = {"files": ("big.png", b"x" * (uploads.MAX_BYTES + 1))}
    assert http.post(f"{address}gradio_api/upload", files=file).status_code == 413


def test_the_page_loads_nothing_from_elsewhere(small):
    address, _ = small
    html = http.get(address).text
    loads = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']([^\"']+)", html)
    assert loads
    own = urlsplit(address).netloc
    assert {u for u in loads if urlsplit(u).netloc not in ("", own)} == set()
    assert "fonts.googleapis" not in html
    assert '"analytics_enabled":false' in html.replace(" ", "")


def test_it_listens_on_this_machine_only_and_cleans_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = mini_llava()
    engine = Engine([choices.PageModel("mini", net, mini_processor(net), "", "")])
    folders = set(Path(tempfile.gettempdir()).glob("vtc-demo-*"))
    try:
        with server.serving(engine) as address:
            assert urlsplit(address).hostname == "127.0.0.1"
            (own,) = set(Path(tempfile.gettempdir()).glob("vtc-demo-*")) - folders
            assert any(own.rglob("*.png"))
            port = urlsplit(address).port
            with pytest.raises(OSError), server.serving(engine, port=port):
                pass
        assert not own.exists()
    finally:
        engine.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(httpx.ConnectError):
        http.get(address)
