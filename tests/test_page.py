"""The page and the phone app as people use them: a real browser, the real service, a model whose answer is known."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.browser import CHROMIUM, in_browser, launch
from tests.helpers import ROOT, crops, encode
from tests.served import SIDES, Served, bright, replace, stand_in

MODULES = ROOT / "app/node_modules"
LAPTOP: dict[str, Any] = {"viewport": {"width": 1200, "height": 900}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
on_device = pytest.mark.skipif(not (MODULES / "onnxruntime-web").is_dir(), reason="`npm ci --prefix app` was not run")

Opens = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield launch(playwright)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(write(tmp_path_factory.mktemp("model") / "model.onnx")) as service:
        yield service


@pytest.fixture
def opens(browser: Browser) -> Iterator[Opens]:
    """A way to open a service's page; what the page asks for, and what goes wrong in it, is kept in the context."""
    contexts: list[BrowserContext] = []

    def go(service: Served, path: str = "", **settings: Any) -> Page:
        context = browser.new_context(**(LAPTOP | settings))
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: pytest.fail(f"the page fails: {error}"))
        asked(context, service)
        page.goto(service.url + path)
        return page

    yield go
    for context in contexts:
        context.close()


def write(path: Path, **card: object) -> Path:
    known = {"accuracy": 0.9, "accuracy_low": 0.85, "accuracy_high": 0.94, "test_images": 200, "network": "sides"}
    path.write_bytes(stand_in(**{**known, **card}))  # type: ignore[arg-type]
    return path


def asked(context: BrowserContext, service: Served) -> list[str]:
    """Every request from now on, as METHOD path; one to any other host fails the test."""
    found: list[str] = []

    def note(request: Any) -> None:
        assert request.url.startswith((service.url, "blob:", "data:")), f"the page asks {request.url}"
        found.append(f"{request.method} {request.url.removeprefix(service.url)}")

    context.on("request", note)
    return found


def picture(side: str, name: str | None = None, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    data = encode(bright(side, (90, 60)), kind, **options)
    return {"name": name or f"{side}.png", "mimeType": f"image/{kind.lower()}", "buffer": data}


def answers(page: Page, count: int = 1) -> list[str]:
    """The likeliest class on each card, when there are so many."""
    expect(page.locator(".bars")).to_have_count(count)
    for bars in page.locator(".bars").all():
        expect(bars.locator("li").first).to_be_visible()
    return [bars.locator("li").first.inner_text().split("\n")[0] for bars in page.locator(".bars").all()]


# --- pictures come, answers are shown ---------------------------------------------------------------------------------


def test_chosen_pictures_are_answered_each_on_a_card_of_its_own(served: Served, opens: Opens) -> None:
    page = opens(served)
    page.set_input_files("#files", [picture(side) for side in SIDES])
    assert answers(page, 4) == list(SIDES)
    expect(page.locator(".card h3")).to_have_text([f"{side}.png" for side in SIDES])
    expect(page.locator("#status")).to_have_text("4 pictures looked at")
    shares = page.locator(".bars").first.locator("span:last-child").all_inner_texts()
    assert len(shares) == 4
    assert sum(float(share.rstrip("%")) for share in shares) == pytest.approx(100, abs=0.3)
    widths = [row.bounding_box()["width"] for row in page.locator(".bars").first.locator("i").all()]  # type: ignore[index]
    row = page.locator(".bars li").first.bounding_box()
    assert row
    assert widths[0] / row["width"] == pytest.approx(float(shares[0].rstrip("%")) / 100, abs=0.02)
    page.get_by_role("button", name="Remove right.png").click()
    assert answers(page, 3) == ["left", "top", "bottom"]
    page.get_by_role("button", name="Remove all").click()
    expect(page.locator("#results")).to_be_hidden()


GIVE = """([bytes, kind]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], `${kind}.png`, {type: "image/png"}));
  const event = kind === "drop" ? new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})
    : new ClipboardEvent("paste", {clipboardData: data, bubbles: true});
  document.body.dispatchEvent(event);
  return event.defaultPrevented;
}"""


def test_pictures_can_be_dropped_and_pasted(served: Served, opens: Opens) -> None:
    page = opens(served)
    assert page.evaluate(GIVE, [list(picture("top")["buffer"]), "drop"]), "the browser would open the file instead"
    assert answers(page) == ["top"]
    page.evaluate(GIVE, [list(picture("right")["buffer"]), "paste"])
    assert answers(page, 2) == ["right", "top"]  # the newest first


def test_the_camera_takes_a_picture(served: Served, opens: Opens) -> None:
    page = opens(served)
    page.get_by_role("button", name="Take a photo").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.wait_for_timeout(300)
    page.get_by_role("button", name="Take it").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    answers(page)
    expect(page.locator(".card h3")).to_contain_text("Photo")
    assert page.evaluate("document.querySelector('#video').srcObject") is None, "the camera stays on"


@pytest.mark.parametrize("path", ["/", pytest.param("/?device", marks=on_device)])
def test_an_answer_below_the_threshold_is_not_sure_in_words(served: Served, opens: Opens, path: str) -> None:
    page = opens(served, path)
    page.set_input_files("#files", [{**picture("left"), "buffer": encode(Image.new("RGB", (40, 40), "gray"))}])
    expect(page.locator(".verdict")).to_contain_text("Not sure")
    expect(page.locator("#status")).to_contain_text("not sure, perhaps")


@pytest.mark.parametrize("path", ["/", pytest.param("/?device", marks=on_device)])
def test_without_a_threshold_an_answer_is_shown_with_its_confidence_alone(
    opens: Opens, tmp_path: Path, path: str
) -> None:
    with Served(write(tmp_path / "model.onnx", sure_from=None)) as service:
        page = opens(service, path)
        page.set_input_files("#files", [{**picture("left"), "buffer": encode(Image.new("RGB", (40, 40), "gray"))}])
        answers(page)
        expect(page.locator("#status")).to_contain_text(": left, 25%")
        expect(page.locator(".verdict")).to_have_text("")
        expect(page.locator(".card.unsure")).to_have_count(0)
        expect(page.locator("#accuracy")).to_contain_text("is not known: too few validation pictures")


def test_where_it_looked_lies_over_that_part_of_the_picture(served: Served, opens: Opens) -> None:
    """The stand-in's heat is the light in the centre square, so the bright half stays and the other goes dark."""
    page = opens(served, color_scheme="light")
    page.set_input_files("#files", [picture("left")])
    answers(page)
    look = page.get_by_role("button", name="Where it looked")
    assert look.get_attribute("aria-pressed") == "false"
    look.click()
    assert look.get_attribute("aria-pressed") == "true"
    shot = Image.open(io.BytesIO(page.locator("figure").screenshot())).convert("L")
    square, thumbnail = page.locator("canvas").bounding_box(), page.locator("img").bounding_box()
    assert square == thumbnail
    left, right = (np.asarray(shot.crop((x, 20, x + 10, shot.height - 20))).mean() for x in (15, shot.width - 25))
    assert left > 200
    assert right < 40
    look.click()
    expect(page.locator("canvas")).to_be_hidden()


def test_a_model_without_a_heat_map_offers_none(tmp_path: Path, opens: Opens) -> None:
    with Served(write(tmp_path / "model.onnx", heat=False)) as service:
        page = opens(service)
        page.set_input_files("#files", [picture("left")])
        answers(page)
        expect(page.locator(".look")).to_be_hidden()


def test_what_is_no_picture_says_so_on_its_card_and_can_be_tried_again(served: Served, opens: Opens) -> None:
    page = opens(served)
    page.set_input_files("#files", [{**picture("left"), "name": "text.png", "buffer": b"no picture"}, picture("top")])
    expect(page.locator(".failed .verdict")).to_contain_text("known format")
    expect(page.locator("#status")).to_have_text("2 pictures looked at: 1 failed")
    assert page.locator(".card").nth(1).locator(".bars li").first.inner_text().startswith("top")
    requests = asked(page.context, served)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".failed .verdict")).to_contain_text("known format")
    assert [request for request in requests if request.startswith("POST /predict")] != []


def test_a_busy_service_is_waited_for(served: Served, opens: Opens) -> None:
    page = opens(served)
    refusals = [{"status": 503, "headers": {"Retry-After": "1"}, "json": {"detail": "the queue is full"}}] * 2
    page.route("**/predict*", lambda route: route.fulfill(**refusals.pop()) if refusals else route.continue_())
    page.set_input_files("#files", [picture("left")])
    expect(page.locator(".verdict")).to_have_text("The service is busy; trying again in 1 s")
    assert answers(page) == ["left"]


def test_a_service_with_a_key_asks_for_it_and_goes_on(tmp_path: Path, opens: Opens) -> None:
    with Served(write(tmp_path / "model.onnx"), api_key="sesame") as service:
        page = opens(service)
        page.set_input_files("#files", [picture("left"), picture("top")])
        for key in ("wrong", "sesame"):
            page.get_by_label("This service wants a key").fill(key)
            page.keyboard.press("Enter")
        assert answers(page, 2) == ["left", "top"]
        assert page.evaluate("JSON.stringify(localStorage)") == "{}"


def test_names_of_files_and_classes_are_text(tmp_path: Path, opens: Opens) -> None:
    classes = ["<img src=x onerror=alert(1)>", "b", "c", "d"]
    with Served(write(tmp_path / "model.onnx", classes=classes)) as service:
        page = opens(service)
        page.set_input_files("#files", [picture("left", "<b>x</b>.png")])
        assert answers(page) == [classes[0]]
        expect(page.locator(".card h3")).to_have_text("<b>x</b>.png")


# --- for everyone -----------------------------------------------------------------------------------------------------


def test_the_keyboard_alone_suffices(served: Served, opens: Opens) -> None:
    page = opens(served)
    reached = []
    for _ in range(5):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.value"))
    assert reached[:3] == ["server", "files", "camera"]
    page.keyboard.press("Shift+Tab")
    with page.expect_file_chooser() as chooser:
        page.locator("#files").focus()
        page.keyboard.press("Enter")
    chooser.value.set_files([picture("left")])
    answers(page)
    page.get_by_role("button", name="Where it looked").focus()
    page.keyboard.press("Space")
    expect(page.locator("canvas")).to_be_visible()
    page.get_by_role("button", name="Remove left.png").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "files"


def test_it_says_what_the_model_knows_and_how_well(served: Served, opens: Opens) -> None:
    page = opens(served)
    page.get_by_text("What it knows").click()
    expect(page.locator("#classes")).to_contain_text("4 classes: left, right, top, bottom")
    expect(page.locator("#accuracy")).to_contain_text("90% of 200 test pictures")
    expect(page.locator("#accuracy")).to_contain_text("85% to 94%")


@pytest.mark.skipif(not (MODULES / "axe-core").is_dir(), reason="`npm ci --prefix app` was not run")
@pytest.mark.parametrize("screen", [LAPTOP, PHONE, {"viewport": {"width": 320, "height": 640}}], ids=str)
def test_axe_finds_nothing_to_mend(served: Served, opens: Opens, screen: dict[str, Any]) -> None:
    page = opens(served, **screen)
    axe = (MODULES / "axe-core/axe.min.js").read_text(encoding="utf-8")

    def check(state: str) -> None:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.evaluate(axe)
            found = page.evaluate("axe.run()")
            assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found["violations"]] == [], (state, scheme)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{state}: wider than the screen"

    check("empty")
    page.get_by_text("What it knows").click()
    broken = {**picture("left"), "name": "text.png", "buffer": b"no picture"}
    unsure = {**picture("left"), "name": "gray.png", "buffer": encode(Image.new("RGB", (40, 40), "gray"))}
    page.set_input_files("#files", [picture("left"), broken, unsure])
    expect(page.locator("#status")).to_contain_text("3 pictures")
    page.get_by_role("button", name="Where it looked").first.click()
    check("with answers")
    page.get_by_role("button", name="Take a photo").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    check("with the camera")


# --- on this device ---------------------------------------------------------------------------------------------------


def settled(page: Page) -> None:
    expect(page.locator("#status")).to_have_text("The model is on this device, and works without network.")


@on_device
def test_the_phone_answers_without_network_and_no_picture_leaves_it(tmp_path: Path, opens: Opens) -> None:
    with Served(write(tmp_path / "model.onnx")) as service:
        page = opens(service, "/?device", **PHONE)
        requests = asked(page.context, service)
        settled(page)
        expect(page.locator("#privacy")).to_have_text("No picture leaves this device.")
        page.set_input_files("#files", [picture("left")])
        assert answers(page) == ["left"]
        service.stop()
        page.context.set_offline(True)
        page.reload()
        settled(page)
        page.set_input_files("#files", [picture(side) for side in SIDES])
        assert answers(page, 4) == list(SIDES)
        page.get_by_role("button", name="Take a photo").tap()
        page.wait_for_timeout(300)
        page.get_by_role("button", name="Take it").tap()
        answers(page, 5)
        assert {request.split()[0] for request in requests} == {"GET"}


@on_device
def test_a_page_that_loses_the_network_goes_on_by_itself(tmp_path: Path, opens: Opens) -> None:
    with Served(write(tmp_path / "model.onnx")) as service:
        page = opens(service)
        page.get_by_label("On this device").check(force=True)
        settled(page)
        page.get_by_label("On the server").check(force=True)
        service.stop()
        page.set_input_files("#files", [picture("bottom")])
        assert answers(page) == ["bottom"]
        expect(page.get_by_label("On this device")).to_be_checked()


@on_device
def test_without_a_model_and_without_network_it_says_what_to_do(tmp_path: Path, opens: Opens) -> None:
    with Served(write(tmp_path / "model.onnx")) as service:
        page = opens(service)
        page.evaluate("navigator.serviceWorker.ready.then(() => true)")
        service.stop()
        page.context.set_offline(True)
        page.reload()
        expect(page.locator("#status")).to_contain_text("connect once to get it")


@on_device
def test_a_new_model_takes_the_place_of_the_old_one_whole_or_not_at_all(tmp_path: Path, opens: Opens) -> None:
    model = write(tmp_path / "model.onnx")
    with Served(model) as service:
        page = opens(service, "/?device")
        settled(page)
        replace(model, stand_in(classes=["left", "right", "sky", "ground"], accuracy=0.8, test_images=1))
        service.wait_for("loaded", 5)
        page.route("**/model.onnx", lambda route: route.fulfill(body=b"half a model"))
        page.reload()
        settled(page)  # with the one that is kept
        page.set_input_files("#files", [picture("top")])
        assert answers(page) == ["top"]
        page.unroute("**/model.onnx")
        page.reload()
        settled(page)
        page.set_input_files("#files", [picture("top")])
        assert answers(page) == ["sky"]


@on_device
def test_the_browser_answers_as_onnxruntime_does_for_the_same_file(served: Served, opens: Opens) -> None:
    page = opens(served, "/?device")
    settled(page)
    turned = Image.Exif()
    turned[0x0112] = 6
    photos = crops(6)
    files = [encode(photo, "JPEG", quality=90) for photo in photos] + [encode(photos[0]), encode(photos[1], "WEBP")]
    files.append(encode(photos[2], "JPEG", exif=turned))
    glass = photos[3].convert("RGBA")
    glass.putalpha(Image.linear_gradient("L").resize(glass.size))
    files.append(encode(glass))
    session = onnxruntime.InferenceSession(stand_in())
    for data, found in zip(files, in_browser(page, files), strict=True):
        assert np.abs(found - by_hand(session, data)).max() < 2e-3


def by_hand(session: onnxruntime.InferenceSession, data: bytes) -> NDArray[np.float32]:
    """Decode by Pillow alone, and ask onnxruntime."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    answered: NDArray[np.float32] = session.run(["probabilities"], {"images": pixels[None]})[0][0]
    return answered


@on_device
def test_it_can_be_installed(served: Served, opens: Opens) -> None:
    page = opens(served)
    page.evaluate("navigator.serviceWorker.ready.then(() => true)")
    session = page.context.new_cdp_session(page)
    manifest = session.send("Page.getAppManifest")
    assert manifest["errors"] == []
    assert json.loads(manifest["data"])["start_url"] == "./?device"
    errors = session.send("Page.getInstallabilityErrors")["installabilityErrors"]
    assert [error["errorId"] for error in errors] == ["in-incognito"], (
        "all that is in the way is the test's own context"
    )
