"""The page in a real browser: what people do with it, what it refuses, and how it ends."""

import base64
import http.client
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serve_cases import coloured_pictures, ended_by

pytestmark = pytest.mark.long
pytest.importorskip("gradio", reason="the page needs the extra serve")
playwright = pytest.importorskip("playwright.sync_api", reason="driving a browser needs the extra test-all")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("there is no Chromium on this machine", allow_module_level=True)

REPOSITORY = Path(__file__).resolve().parents[2]
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync"
MAX_BYTES = 300_000
PATIENCE = 180  # seconds after which a start, an answer or an end counts as stuck


class Server:
    """`python -m llava.serve.web` on a free port, its files in a folder of their own."""

    def __init__(self, folder, *flags):
        self.temporary, self.log = folder / "tmp", folder / "stderr.txt"
        self.temporary.mkdir()
        command = [sys.executable, "-m", "llava.serve.web", "--port", "0", "--max-image-bytes", str(MAX_BYTES), *flags]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, cwd=REPOSITORY, text=True,
                env=os.environ | {"TMPDIR": str(self.temporary), "CUDA_VISIBLE_DEVICES": ""},
            )  # fmt: skip
        line = self.process.stdout.readline()  # the end of the process ends it too
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, self.log.read_text()
        self.address = found[0]

    def end(self, how=signal.SIGTERM):
        """(exit code, what it said on stderr)"""
        self.process.send_signal(how)
        try:
            return self.process.wait(PATIENCE), self.log.read_text()
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.end()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    with new_page(browser, server) as page:
        yield page


class new_page:
    """A page in a browser context of its own. Nothing may come from elsewhere, and nothing may fail in the browser."""

    def __init__(self, browser, server, **settings):
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, **settings)
        self.context.set_default_timeout(PATIENCE * 1000)
        self.address, self.elsewhere, self.errors = server.address, [], []

    def __enter__(self):
        page = self.context.new_page()
        page.on("request", self._note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(self.address)
        page.wait_for_selector("#ask")
        page.wait_for_selector("#card-A .answer")
        return page

    def __exit__(self, kind, *exception):
        self.context.close()
        if kind is None:
            assert not self.elsewhere and not self.errors

    def _note(self, request):
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.elsewhere.append(request.url)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return coloured_pictures("v1.6", tmp_path_factory.mktemp("pictures"))


def upload(page, path):
    page.set_input_files("#picture input[type=file]", str(path))
    page.wait_for_selector("#picture img")


def write(page, question):
    page.fill("#question textarea", question)


def ask(page, cards=3):
    """Ask and wait: [(answer, "58 of 420 vision tokens", pixels of the first view)] per configuration."""
    before = [card_html(page, letter) for letter in "ABC"[:cards]]
    page.click("#ask")
    for letter, html in zip("ABC", before, strict=False):
        page.wait_for_function(
            """([id, before]) => { const card = document.querySelector(id);
               return card.querySelector('[data-state=done]') && card.innerHTML !== before; }""",
            arg=[f"#card-{letter}", html],
        )
    page.wait_for_function(
        "n => document.querySelectorAll('.card[data-state=done]').length >= n && !document.querySelector('.cursor')",
        arg=cards,
    )
    return [read_card(page, letter) for letter in "ABC"[:cards]]


def card_html(page, letter):
    return page.locator(f"#card-{letter}").inner_html()


def read_card(page, letter):
    card = page.locator(f"#card-{letter}")
    source = card.locator("img").first.get_attribute("src")
    picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    return card.locator(".answer").inner_text(), card.locator(".kept span").first.inner_text(), np.asarray(picture)


def set_tokens(page, letter, tokens):
    page.fill(f"#tokens-{letter} input[type=number]", str(tokens))
    page.keyboard.press("Tab")


def choose(page, letter, method):
    page.click(f"#method-{letter} input")
    page.fill(f"#method-{letter} input", method)
    page.keyboard.press("Enter")


def note(page):
    page.wait_for_selector("#note .sentence")
    return page.locator("#note .sentence").inner_text()


def bright(pixels):
    """Share of the pixels that are as bright as the picture, not as a dropped patch."""
    return (pixels.max(axis=-1) > 75).mean()


def test_upload_ask_and_see_the_overlay_change(page, pictures):
    path, question, answer = pictures[0]
    upload(page, path)
    write(page, question)
    few = ask(page)
    assert [row[1].split(" of ")[0] for row in few[:2]] == ["58", "58"]
    total = few[2][1].split(" of ")[1].split()[0]
    assert few[2][1].split(" of ")[0] == total  # none keeps everything
    assert few[2][0] == answer  # and the checkpoint knows this one

    set_tokens(page, "A", 200)
    many = ask(page)
    assert many[0][1] == f"200 of {total} vision tokens"
    assert many[0][2].shape == few[0][2].shape
    assert (many[0][2] != few[0][2]).any(axis=-1).mean() > 0.05
    assert bright(many[0][2]) > bright(few[0][2])
    assert (many[1][2] == few[1][2]).all() and (many[2][2] == few[2][2]).all()  # the others were not touched

    cost = page.locator("#card-A dl").inner_text()
    assert re.search(r"first token\s+\d+ ms", cost) and re.search(r"KV cache\s+[\d.]+ (kB|MB)", cost)


def test_three_two_one_configurations(page, pictures):
    path, question, answer = pictures[0]
    upload(page, path)
    write(page, question)
    choose(page, "A", "none")
    choose(page, "B", "random")
    choose(page, "C", "visionzip")
    page.wait_for_selector("#tokens-A", state="hidden")  # none has no budget
    page.wait_for_selector("#tokens-B")
    page.wait_for_selector("#tokens-C")  # which had none before
    rows = ask(page)
    assert rows[0][0] == answer
    assert [row[1].startswith("58 of") for row in rows] == [False, True, True]
    assert len({row[2].tobytes() for row in rows}) == 3
    page.click("#count label:has-text('one')")
    page.wait_for_selector("#column-B", state="hidden")
    page.wait_for_selector("#column-C", state="hidden")
    assert ask(page, cards=1)[0][0] == answer


def test_the_adaptive_cache_can_be_switched_on(page, pictures):
    path, question, _ = pictures[0]
    upload(page, path)
    write(page, question)
    choose(page, "A", "none")
    page.click("#advanced-A button")
    page.click("#advanced-A label:has-text('A-VL on the image') >> nth=0")

    def bytes_of(letter):
        number, unit = re.search(
            r"KV cache\s+([\d.]+) (kB|MB)", page.locator(f"#card-{letter} dl").inner_text()
        ).groups()
        return float(number) * {"kB": 1, "MB": 1000}[unit]

    ask(page)
    assert bytes_of("A") < 0.75 * bytes_of("C")  # half of the image's entries are evicted
    rate = page.locator("#advanced-A input[type=number]").first
    rate.fill("0.9")  # above the share that is not read
    page.keyboard.press("Tab")
    page.click("#ask")
    page.wait_for_selector("#card-A .sentence")
    assert "vision_adaptive_attention_compute_rate" in page.locator("#card-A .sentence").inner_text()
    page.wait_for_selector("#card-C [data-state=done]")  # the others are answered


def test_enter_asks_and_shift_enter_breaks_the_line(page, pictures):
    upload(page, pictures[0][0])
    question = page.locator("#question textarea")
    question.press_sequentially("Two")
    question.press("Shift+Enter")
    question.press_sequentially("lines?")
    assert question.input_value() == "Two\nlines?" and not page.locator(".card .asked").count()
    question.press("Enter")
    page.wait_for_selector("#card-A [data-state=done]")
    assert question.input_value() == page.locator("#card-A .asked").text_content() == "Two\nlines?"


def test_advanced_boxes_do_not_scroll(page):
    """Whatever the browser's fonts and sliders take: they grow with what is in them."""
    for letter in "ABC":
        page.click(f"#advanced-{letter} button")
    page.wait_for_selector("#advanced-C input[type=range]")
    page.add_style_tag(content="[id^=advanced] input { margin-bottom: -9px; position: relative; top: 9px; }")
    scrolling = """() => [...document.querySelectorAll("[id^=advanced], [id^=advanced] *")].filter(element =>
        ["auto", "scroll"].includes(getComputedStyle(element).overflowY) && element.scrollHeight > element.clientHeight)"""
    assert page.evaluate(f"({scrolling})().length") == 0


def test_examples_can_be_taken(page):
    page.click("#examples button >> nth=3")
    page.wait_for_selector("#picture img")
    page.wait_for_function("() => document.querySelector('#question textarea').value.length > 0")
    rows = ask(page)
    assert all(row[0] for row in rows)


def is_cleared(page):
    page.wait_for_function("() => document.querySelectorAll('.card .answer.empty').length == 3")
    assert not page.locator(".card img, .card .kept, .card .asked").count()


def test_no_answer_stands_below_another_picture(page, pictures):
    (path, question, answer), (other, other_question, other_answer) = pictures
    upload(page, path)
    write(page, question)
    assert ask(page)[2][0] == answer
    write(page, "Is there something else?")  # the picture is still the same one
    assert page.locator("#card-C .asked").inner_text() == question
    assert page.locator("#card-C .answer").inner_text() == answer
    page.click("#examples button >> nth=3")
    is_cleared(page)
    ask(page)
    page.click("#picture button[aria-label='Remove Image']")
    is_cleared(page)
    upload(page, other)
    write(page, other_question)
    assert ask(page)[2][0] == other_answer
    assert page.locator("#card-C .asked").inner_text() == other_question


def test_folded_pictures_fit_their_card(page, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 100, 3), np.uint8)).save(tmp_path / "tall.png")
    upload(page, tmp_path / "tall.png")
    write(page, "What color is the shape?")
    page.click("#count label:has-text('two')")
    choose(page, "B", "pyramiddrop")
    page.wait_for_selector("#column-C", state="hidden")
    ask(page, cards=2)
    for letter, pictures_of_fold in (("A", 2), ("B", 1)):
        page.click(f"#card-{letter} summary")
        fold = page.locator(f"#card-{letter} details div")
        assert fold.locator("img").count() == pictures_of_fold
        assert fold.evaluate("e => e.scrollWidth <= e.clientWidth && e.clientWidth <= e.closest('.card').clientWidth")
        assert all(fold.locator("img").evaluate_all("all => all.map(e => e.complete && e.clientWidth > 200)"))


def test_what_is_no_good_is_told_in_a_sentence(page, pictures, tmp_path):
    page.click("#ask")
    assert "no picture yet" in note(page)
    upload_only(page, pictures[0][0])
    page.wait_for_selector("#note .sentence", state="detached")
    page.click("#ask")
    assert "no question yet" in note(page)

    clear(page)
    (tmp_path / "text.png").write_text("this is no picture")
    upload_only(page, tmp_path / "text.png")
    page.wait_for_function("() => document.querySelector('#note').innerText.includes('not an image')")
    assert str(tmp_path) not in note(page) and "adav-page" not in note(page)  # no path of the server

    for side, said in ((8_000, "8,000 x 8,000 pixels"), (60_000, "too many pixels")):
        clear(page)
        (tmp_path / "bomb.png").write_bytes(png_of_size(side, side))
        upload_only(page, tmp_path / "bomb.png")
        page.wait_for_function("said => document.querySelector('#note').innerText.includes(said)", arg=said)

    clear(page)
    (tmp_path / "notes.txt").write_text("this is no picture")
    upload_only(page, tmp_path / "notes.txt")
    page.wait_for_selector("[data-testid=toast-body]")
    assert "Invalid file type" in page.locator("[data-testid=toast-body]").inner_text()

    clear(page)
    (tmp_path / "large.png").write_bytes(os.urandom(MAX_BYTES + 1))
    upload_only(page, tmp_path / "large.png")
    page.wait_for_selector("[data-testid=toast-body]")
    assert "exceed the maximum allowed size" in page.locator("[data-testid=toast-body]").inner_text()


def upload_only(page, path):
    page.set_input_files("#picture input[type=file]", str(path))


def clear(page):
    page.reload()
    page.wait_for_selector("#card-A .answer")


def png_of_size(width, height):
    """A small file whose header promises many pixels."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def test_two_visitors_at_once_do_not_mix(browser, server, pictures):
    alone = []
    for path, question, _ in pictures:
        with new_page(browser, server) as page:
            upload(page, path)
            write(page, question)
            alone.append(ask(page))
    assert alone[0][2][0] != alone[1][2][0]
    with new_page(browser, server) as one, new_page(browser, server) as other:
        for page, (path, question, _) in zip((one, other), pictures, strict=True):
            upload(page, path)
            write(page, question)
        for _ in range(3):
            for page in (one, other):
                page.evaluate("() => document.querySelectorAll('.card[data-state=done]').forEach(c => c.remove())")
            one.click("#ask")
            other.click("#ask")
            for page, expected in zip((one, other), alone, strict=True):
                page.wait_for_function("() => document.querySelectorAll('.card[data-state=done]').length == 3")
                for letter, row in zip("ABC", expected, strict=True):
                    answer, kept, pixels = read_card(page, letter)
                    assert (answer, kept) == row[:2] and (pixels == row[2]).all()


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (400, "light"), (1280, "dark")])
def test_it_fits_its_window(browser, server, width, scheme):
    with new_page(browser, server, color_scheme=scheme) as page:
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        assert "cannot answer questions about photographs" in page.locator("#limits").inner_text()  # what the demo is worth
        dark = page.evaluate("() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(c => c < 60)")
        assert dark == (scheme == "dark")


def get(server, path, data=None, headers=None):
    """The status of a request, and its body."""
    request = urllib.request.Request(server.address + path, data=data, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_no_file_of_the_server_can_be_read(server):
    names = ["/etc/passwd", f"{REPOSITORY}/README.md", "README.md", "../README.md", "adav_configs.json", __file__]
    uploads = next(server.temporary.glob("adav-page-*"))
    names += [f"{uploads}/../../stderr.txt", f"{uploads}/%2e%2e/%2e%2e/stderr.txt", "file:///etc/passwd"]
    for route in (
        "/gradio_api/file=",
        "/file=",
        "/gradio_api/file/",
        "/file/",
        "/static/",
        "/assets/",
        "/gradio_api/proxy=",
    ):
        for name in names:
            status, body = get(server, route + name)
            assert status in (403, 404), (route, name)
            assert b"root:" not in body and b"AdaV" not in body
    assert get(server, "/static/../../../../../../etc/passwd")[0] == 404
    (example,) = uploads.glob("examples/example-1.png")
    assert get(server, f"/gradio_api/file={example}")[0] == 200  # what the page itself shows


def test_no_file_of_the_server_can_be_named_as_a_picture(server):
    """Not even in a request that goes around the browser: gradio would copy the file to where it can be read."""
    config = json.loads(get(server, "/config")[1])
    functions = [one["id"] for one in config["dependencies"]]
    for path in ("/etc/passwd", str(REPOSITORY / "README.md"), "http://127.0.0.1:1/x.png"):
        picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
        for function in functions:
            body = json.dumps({"data": [picture] * 40, "fn_index": function, "session_hash": "abc"}).encode()
            headers = {"Content-Type": "application/json"}
            assert get(server, "/gradio_api/queue/join", body, headers)[0] == 403
            for route in ("/gradio_api/run/predict", "/gradio_api/call/answer", "/gradio_api/api/answer"):
                assert get(server, route, body, headers)[0] == 404


def test_uploads_are_limited_without_the_page_too(server):
    def post(size):
        boundary = b"x" * 20
        part = b'Content-Disposition: form-data; name="files"; filename="../../a.png"\r\nContent-Type: image/png'
        body = b"--" + boundary + b"\r\n" + part + b"\r\n\r\n" + b"0" * size + b"\r\n--" + boundary + b"--\r\n"
        return get(
            server, "/gradio_api/upload", body, {"Content-Type": f"multipart/form-data; boundary={boundary.decode()}"}
        )

    status, body = post(1000)
    (path,) = json.loads(body)
    assert status == 200 and Path(path).resolve().is_relative_to(server.temporary.resolve())
    assert post(MAX_BYTES + 1000)[0] == 413
    # Far too much is refused before it is read.
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=PATIENCE)
    connection.request("POST", "/gradio_api/upload", headers={"Content-Length": str(10 << 30)})
    assert connection.getresponse().status == 413
    connection.close()


@pytest.fixture
def talkative(tmp_path):
    """The demo checkpoint with an end token that it never says: its answers are as long as they may be."""
    return ended_by(tmp_path / "talkative", "<pad>")


def test_stop_and_an_end_in_the_middle_of_answers(browser, pictures, tmp_path, talkative):
    server = Server(tmp_path, "--model-path", str(talkative), "--max-new-tokens", "1800")
    with new_page(browser, server) as page:
        upload(page, pictures[0][0])
        write(page, pictures[0][1])
        page.click("#ask")
        page.wait_for_selector("#card-A .cursor")
        page.click("#stop")
        for letter in "ABC":
            page.wait_for_function(
                "id => document.querySelector(id).innerText.includes('stopped')", arg=f"#card-{letter}"
            )
        page.click("#ask")
        page.wait_for_selector("#card-A .cursor")
        code, said = server.end()
    assert (code, said.strip()) == (0, "ended")


def test_a_visitor_who_leaves_is_answered_no_further(pictures, talkative):
    """Gradio closes the generator of an event whose visitor has gone."""
    from llava.config import AdaVConfig
    from llava.model.decoding.sampling import Sampling
    from llava.serve.service.image_input import ImageLimits
    from llava.serve.service.service import Service
    from llava.serve.web_page.page import KEYS, build_page

    config = AdaVConfig(method="none")
    with Service.load(talkative, config=config, device_map="cpu") as service:
        sizes = {"most_tokens": 144, "users": 1, "queue": 1}
        blocks = build_page(service, ImageLimits(), Sampling(1800), name="", caveat="", examples=[], **sizes)
        answer = next(function.fn for function in blocks.fns.values() if function.name == "answer")
        path, question, _ = pictures[0]
        updates = answer({"path": str(path)}, question, 3, *[getattr(config, key) for key in KEYS] * 3)
        next(updates)
        next(updates)
        updates.close()
        while service.stats()["waiting"] or service.stats()["running"]:
            time.sleep(0.1)
        assert service.stats()["answered"] == 0


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_cleanly_with_visitors(browser, pictures, tmp_path, how):
    server = Server(tmp_path)
    with new_page(browser, server) as page:
        upload(page, pictures[0][0])
        write(page, pictures[0][1])
        page.click("#ask")
        assert any(server.temporary.rglob("scene*.png"))
        code, said = server.end(how)
    assert (code, said.strip()) == (0, "ended")
    assert not list(server.temporary.glob("adav-*")) + list(server.temporary.rglob("*.png"))  # uploads are gone


@pytest.mark.parametrize(
    "flags",
    [
        ("--port", "70000"),
        ("--host", "999.1.1.1"),
        ("--users", "0"),
        ("--method", "adaf"),
        ("--model-path", "no-model"),
    ],
)
def test_a_bad_start_is_one_sentence(flags):
    command = [sys.executable, "-m", "llava.serve.web", *flags]
    done = subprocess.run(command, capture_output=True, cwd=REPOSITORY, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_taken_port_is_one_sentence(server):
    port = server.address.rpartition(":")[2]
    command = [sys.executable, "-m", "llava.serve.web", "--port", port]
    done = subprocess.run(command, capture_output=True, cwd=REPOSITORY, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and f"port {port}" in done.stderr and done.stderr.count("\n") == 1
