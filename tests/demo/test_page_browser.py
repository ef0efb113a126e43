"""The demo's page in Chromium: upload, type, click, result, and a sentence for everything that is wrong.

Needs Gradio, Playwright and a Chromium: `make test-slow` sets up an environment with them.
"""

import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openvision.demo.chat import DemoChat, load_chat
from openvision.demo.collection import open_collection
from openvision.demo.serve import serving
from openvision.inference.vector_folder import encode_folder
from openvision.multimodal.model.toy import write_toy_llm
from tests.multimodal import tiny

pytestmark = pytest.mark.slow
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60_000


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio", reason="Gradio is not installed here: run `make test-slow`")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed here: run `make test-slow`"
    )
    program = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium here: run `make test-slow`, which installs it")
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> DemoChat:
    folder = tmp_path_factory.mktemp("chat")
    return load_chat(tiny.write_model(write_toy_llm(folder / "llm"), folder / "vlm"), torch.device("cpu"))


@pytest.fixture(scope="module")
def address(browser, both, chat, shapes_images, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with serving(both, open_collection(shapes_images, both, None, cache), port, cache, chat) as found:
        yield found


@pytest.fixture
def page(browser, address):
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(SECONDS)
    requests: list[str] = []
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(address)
    opened.wait_for_selector("#labels input, #labels textarea")
    yield opened
    # Nothing was asked of any other server.
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
    context.close()


def fill(page, name: str, text: str) -> None:
    page.fill(f"#{name} input, #{name} textarea", text)


def upload(page, file: Path) -> None:
    page.click("#image button[aria-label='Clear'], #image button[aria-label='Remove Image']")
    with page.expect_response(lambda response: "upload" in response.url):
        page.set_input_files("#image input[type=file]", file)
    page.wait_for_selector("#image img")


def sentence(page) -> str:
    page.wait_for_selector(".toast-body")
    return page.inner_text(".toast-body")


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def test_upload_type_click_result(page, shapes_images):
    upload(page, shapes_images / "blue-corner.png")
    fill(page, "labels", "a blue corner, a red bar, ,")
    page.click("#classify-run")
    page.wait_for_selector(".probabilities .confidence-set >> nth=3")
    for shown in page.locator(".probabilities").all():
        assert {"a blue corner", "a red bar"} <= set(shown.inner_text().split("\n"))


def test_search_by_text_and_by_image(page, shapes_images):
    tab(page, "Search")
    assert "16 images" in page.inner_text("#opened")
    fill(page, "query", "a red bar")
    page.click("#search-text")
    page.wait_for_selector(".found img")
    upload(page, shapes_images / "green-pole.png")
    page.click("#search-image")
    page.get_by_text("1.000 green-pole.png").first.wait_for()
    assert page.locator(".found").count() == 2


def test_patches(page):
    tab(page, "Patches")
    for button in ("#map-run", "#pca-run"):
        page.click(button)
        page.wait_for_function("document.querySelectorAll('.map img').length == 2")


def test_chat_about_the_image(page, chat, shapes_images):
    tab(page, "Chat")
    asked = "<b>Which</b> colour &amp; $$x^2$$? <img src='http://elsewhere.invalid/x.png'>"
    fill(page, "question", asked)
    upload(page, shapes_images / "blue-corner.png")
    page.click("#chat-run")
    # No second question before the answer's end, but it can be typed meanwhile.
    page.wait_for_selector("#chat-run[disabled]")
    fill(page, "question", "And the shape?")
    page.wait_for_selector("#chat-run:not([disabled])")
    page.wait_for_selector("#chat .bot")
    # As it was typed, not as HTML: no image is asked of another server.
    assert page.inner_text("#chat .user").strip() == asked
    assert page.input_value("#question textarea, #question input") == "And the shape?"
    page.click("#chat-run")
    page.wait_for_selector("#chat-run[disabled]")
    page.wait_for_selector("#chat-run:not([disabled])")
    page.wait_for_function("document.querySelectorAll('#chat .user.message, #chat .user .message').length >= 2")
    fill(page, "question", " ")
    page.click("#chat-run")
    assert "the question is empty" in sentence(page)
    page.click("#chat-new")
    page.wait_for_function("document.querySelectorAll('#chat .bot').length == 0")


def test_no_label_is_one_sentence(page):
    fill(page, "labels", " , ")
    page.click("#classify-run")
    assert "there are no labels to choose from" in sentence(page)


def test_a_checkpoint_that_cannot_caption(page):
    tab(page, "Caption")
    fill(page, "alt", "a red bar")
    page.click("#caption-run")
    assert "tiny (2) cannot caption" in sentence(page)


@pytest.mark.parametrize("what", ["empty", "nothing", "vectors"])
def test_a_folder_that_cannot_be_searched(page, both, shapes_images, tmp_path, what):
    (tmp_path / "empty").mkdir()
    encode_folder(both[1].encoder, shapes_images, tmp_path / "vectors")
    tab(page, "Search")
    fill(page, "folder", str(tmp_path / what))
    page.press("#folder input, #folder textarea", "Enter")
    expected = {"empty": "has no images", "nothing": "is not a folder", "vectors": "vectors of another checkpoint"}
    assert expected[what] in sentence(page)


def test_an_image_that_is_none(page, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    upload(page, tmp_path / "broken.png")
    page.click("#classify-run")
    assert "broken.png cannot be used" in sentence(page)


def test_a_photo_of_20_megapixels(page, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (365, 548, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    upload(page, tmp_path / "photo.jpg")
    page.click("#classify-run")
    page.wait_for_selector(".probabilities .confidence-set")


def test_two_users_at_once(address, shapes_images):
    client = pytest.importorskip("gradio_client", reason="gradio_client is not installed here")
    users = [client.Client(address, verbose=False) for _ in range(2)]
    files = [shapes_images / "blue-corner.png", shapes_images / "red-bar.png"]
    alone = [users[0].predict(client.handle_file(file), "red, blue", api_name="/classify") for file in files]
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(users[n % 2].predict, client.handle_file(files[n % 2]), "red, blue", api_name="/classify")
            for n in range(8)
        ]
        together = [job.result() for job in jobs]
    assert together == alone * 4
    assert alone[0] != alone[1]
