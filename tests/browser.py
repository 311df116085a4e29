"""A real browser: Chromium as the system has it, and the phone app's model in it."""

import base64
import shutil

import numpy as np
from numpy.typing import NDArray
from playwright.sync_api import Browser, Page, Playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --use-fake-device-for-media-stream --use-fake-ui-for-media-stream"
).split()
"""No window, no word to anyone outside, and a camera that shows a moving test picture."""

CLASSIFY = """async (files) => {
  const device = await import("./device.js");
  const found = [];
  for (const file of files) {
    const bytes = Uint8Array.from(atob(file), (letter) => letter.charCodeAt(0));
    found.push(Array.from((await device.classify(new Blob([bytes]))).probabilities));
  }
  return found;
}"""


def launch(playwright: Playwright) -> Browser:
    """Start Chromium; it ends with Playwright."""
    return playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


def in_browser(page: Page, files: list[bytes]) -> NDArray[np.float64]:
    """Give what the phone app answers for files, as they are: (N, classes)."""
    return np.array(page.evaluate(CLASSIFY, [base64.b64encode(file).decode() for file in files]))
