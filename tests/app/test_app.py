"""The app in a real browser: pick the demonstration, run it, see the table, take the folder; and what is no markup."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import SpaceCard

from hf_nft.app.form import serve
from hf_nft.app.orders import Demonstration, Order, carry_out
from hf_nft.errors import ConfigError

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = [
    *(name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None),
    *(name for name, found in (("chromium", BROWSER), ("chromedriver", DRIVER)) if found is None),
]
in_a_browser = pytest.mark.skipif(bool(MISSING), reason=f"the app in a browser needs {', '.join(MISSING)}")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
PATIENCE = 540
HOSTILE = "<img src=x onerror=document.title='owned'>"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start `hf-nft app` on a free loopback port, as its user does."""
    settings = {"GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("sent")), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "hf_nft.cli.main", "app"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **settings}) as server:
        assert server.stdout is not None
        found = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in server.stdout)
        yield next(match.group() for match in found if match)
        server.terminate()


@pytest.fixture
def page(address: str, tmp_path: Path) -> Iterator[Any]:
    """Open the app in a headless Chromium that downloads into `tmp_path`."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as driver:
        driver.get(address)
        yield driver


@pytest.fixture
def wait(page: Any) -> Callable[[Callable[[Any], Any]], Any]:
    """Wait until something is there, and return it."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(page, PATIENCE, ignored_exceptions=[StaleElementReferenceException]).until


def all_of(selector: str) -> Callable[[Any], list[Any]]:
    return lambda page: page.find_elements("css selector", selector)


def error_of(page: Any) -> str:
    return "".join(box.get_property("value") for box in all_of("#error textarea")(page))


def type_into(page: Any, wait: Any, field: str, text: str) -> None:
    box = wait(all_of(f"#{field} input[type=number], #{field} textarea"))[0]
    page.execute_script("arguments[0].select()", box)
    box.send_keys(text)


@in_a_browser
def test_the_demonstration_from_form_to_download(page: Any, wait: Any, tmp_path: Path) -> None:
    wait(all_of("#run"))
    assert "Demonstration" in wait(all_of("#kind label.selected"))[0].text
    all_of("#run")(page)[0].click()
    assert "plant" in wait(lambda page: [e.text for e in all_of(".progress-level-inner")(page) if "plant" in e.text])[0]
    wait(all_of("#table td"))
    rows = [[cell.text for cell in row.find_elements("css selector", "td")] for row in all_of("#table tbody tr")(page)]
    shown = {name: (float(before.split()[0]), float(after.split()[0])) for name, before, after in rows}
    assert shown["ASR"][0] > 90 > shown["ASR"][1]
    assert shown["ACC"][1] > 80
    figures = wait(all_of("#masks img, #card img"))
    assert len(figures) >= 2
    wait(lambda page: all(figure.get_property("naturalWidth") for figure in figures))
    assert "after backdoor removal" in all_of("#card")(page)[0].text
    wait(all_of("#folder a"))[0].click()
    archive = wait(lambda page: [file for file in tmp_path.glob("*.zip") if zipfile.is_zipfile(file)])[0]
    with zipfile.ZipFile(archive) as held:
        assert {"record.json", "README.md", "model/model.safetensors", "figures/masks.png"} <= set(held.namelist())
        record = json.loads(held.read("record.json"))
    assert record["shots"]["per_class"] == 10
    assert f"{100 * record['metrics']['after']['asr']:.1f}" == f"{shown['ASR'][1]}"


@in_a_browser
def test_names_are_no_markup_and_errors_are_text(page: Any, wait: Any, suspect_folder, image_rows, tmp_path) -> None:
    hostile, data = suspect_folder.rename(tmp_path / HOSTILE), tmp_path / "data"
    for name, seed in (("train", 1), ("test", 2)):
        image_rows(40, 16, seed=seed).to_parquet(str(data / f"{name}.parquet"))
    wait(all_of("#kind input"))[1].click()
    all_of("#run")(page)[0].click()
    wait(lambda page: "expected a name, found none" in error_of(page))
    type_into(page, wait, "model", HOSTILE)  # not a folder where the server runs, and no Hub id
    all_of("#run")(page)[0].click()
    wait(lambda page: f"model '{HOSTILE}': expected a folder or a Hub id" in error_of(page))
    type_into(page, wait, "model", str(hostile))
    type_into(page, wait, "dataset", str(data))
    type_into(page, wait, "shots", "2")
    all_of("#run")(page)[0].click()
    wait(all_of("#card h1"))
    assert HOSTILE in all_of("#card h1")(page)[0].text
    assert "hf-nft purify" in all_of("#card")(page)[0].text
    assert not all_of("#error textarea, img[src=x], #card script")(page)
    assert page.title == "hf-nft"


@pytest.mark.parametrize("name", ["/etc", "../victim", "runs/..", "a/b/c", ".", "~", "org/model/../x", "org/here"])
def test_guests_read_no_folders(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/here").mkdir(parents=True)
    with pytest.raises(ConfigError, match="Folders are not read"):
        carry_out(Order(name, "", 1, "default"), Demonstration(), tmp_path, guest=True)


def test_too_many_shots(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 50, found 51"):
        carry_out(Order("", "", 51, "default"), Demonstration(), tmp_path, guest=False)


def test_without_gradio_the_command_to_install_it_is_told(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError, match=r"pip install 'hf-nft\[app\]'"):
        serve()


def test_the_space_has_a_valid_header(root: Path) -> None:
    folder = root / "docs/space"
    header = SpaceCard.load(folder / "README.md").data
    assert header.sdk == "gradio"
    assert (folder / header.app_file).is_file()
    assert len(header.short_description) <= 60  # more is refused by the Hub
    assert {header.colorFrom, header.colorTo} <= {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert "hf-nft[app]" in (folder / "requirements.txt").read_text()
