"""`pare ui`: the checks before it serves, that nothing outlives it, and the pages in a real browser."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pare.tracking import report, ui
from pare.tracking.mlflow_log import MlflowTracker, TrackingError, resolve_uri
from pare.tracking.pareto import mark_front
from tests.tracking import records

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync"
RECORD = records.demo()
RECORD["trials"][5] = records.failed(RECORD["trials"][5])
mark_front(RECORD)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home in which the demo, one of its trials failed, was tracked."""
    path = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        report.write_report(RECORD, path / "report")
        MlflowTracker("auto", path / "artifacts", "pare").sync(RECORD, path / "report")
        yield path


def listener(port: int = 0) -> socket.socket:
    server = socket.socket()
    server.bind(("127.0.0.1", port))
    server.listen()
    return server


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_an_address_that_others_can_reach_is_refused(host: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="host must be a loopback address"):
        ui.serve(f"sqlite:///{tmp_path}/mlflow.db", tmp_path, host=host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_addresses_are_taken(host: str) -> None:
    assert ui.checked_host(host) == host


def test_a_port_in_use_is_refused_with_its_number() -> None:
    with listener() as taken, pytest.raises(TrackingError, match=rf"port {taken.getsockname()[1]} on 127.0.0.1 cannot be used"):
        ui.chosen_port("127.0.0.1", taken.getsockname()[1])


def test_in_place_of_the_default_port_a_free_one_serves_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    with listener() as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(ui, "DEFAULT_PORT", port)

        chosen = ui.chosen_port("127.0.0.1", port)

        assert chosen != port
        listener(chosen).close()


def test_a_port_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TrackingError, match=r"port 70000 on 127\.0\.0\.1 cannot be used \(ports go from 1 to 65535\)"):
        ui.chosen_port("127.0.0.1", 70000)


def test_without_anything_tracked_no_empty_store_is_made(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"nothing was tracked yet: there is no .*mlflow\.db\. `pare run experiment=demo`"):
        ui.serve(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "artifacts", port=free_port())

    assert list(tmp_path.iterdir()) == []


def free_port() -> int:
    with listener() as server:
        return int(server.getsockname()[1])


def test_a_server_that_is_away_is_told() -> None:
    with pytest.raises(TrackingError, match=r"MLflow at http://127\.0\.0\.1:1 does not answer"):
        ui.serve("http://127.0.0.1:1", Path("unused"))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_it_says_where_it_serves_and_takes_its_workers_with_it(home: Path, kind: signal.Signals, code: int) -> None:
    uri, port = resolve_uri("auto", home / "artifacts"), free_port()
    program = f"from pare.tracking import ui; ui.serve({uri!r}, {str(home / 'artifacts')!r}, port={port})"
    process = subprocess.Popen([sys.executable, "-u", "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None

    said = process.stdout.readline()
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(kind)
    process.wait(30)

    assert said.startswith(f"MLflow: http://127.0.0.1:{port}/#/experiments/")
    assert "/runs/" in said
    assert process.returncode == code
    assert workers
    assert psutil.wait_procs(workers, timeout=5)[1] == []
    assert ui.chosen_port("127.0.0.1", port) == port


@pytest.mark.ui
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
def test_a_browser_shows_the_sweep_its_trials_their_metrics_and_a_plot(home: Path, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'pare-lm[ui-test]'")
    shots = Path(os.environ.get("PARE_SCREENSHOTS") or tmp_path)
    shots.mkdir(parents=True, exist_ok=True)
    artifacts = home / "artifacts"
    best = next(t for t in RECORD["trials"] if t["recipe"] == "gptq" and t["pareto"])
    lost = next(t for t in RECORD["trials"] if t["status"] == "failed")
    with (
        ui.running(resolve_uri("auto", artifacts), artifacts, "127.0.0.1", free_port()) as (_, address),
        sync_api.sync_playwright() as driver,
    ):
        link = ui.deep_link(address, "pare", RECORD["sweep"])
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(60_000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))

        page.goto(link)
        for trial in RECORD["trials"]:
            page.get_by_role("link", name=trial["trial"], exact=True).wait_for()
        page.get_by_text("The front has").wait_for()
        page.screenshot(path=shots / "1-sweep.png")

        page.get_by_role("link", name=best["trial"], exact=True).click()
        page.get_by_text("quality/ppl_in_memory").first.wait_for()
        page.get_by_text("size/bytes").first.wait_for()
        page.get_by_text("pare.artifact").first.wait_for()
        page.get_by_text("size/bytes").first.scroll_into_view_if_needed()
        page.screenshot(path=shots / "2-trial.png")

        page.goto(link)
        page.get_by_role("link", name=lost["trial"], exact=True).click()
        page.get_by_text("Failed", exact=True).first.wait_for()
        page.screenshot(path=shots / "3-failed-trial.png")

        page.goto(link.replace("?", "/artifacts/plots/front.png?"))
        plot = page.locator("img[src^='blob:'], img[src*='front.png']").first
        plot.wait_for()
        page.wait_for_timeout(500)
        assert plot.evaluate("image => image.naturalWidth") > 1000
        page.screenshot(path=shots / "4-plot.png")

        page.get_by_text("report.html", exact=True).click()
        frame = page.frame_locator("iframe").first
        frame.get_by_role("heading", name="What it says").wait_for()
        page.screenshot(path=shots / "5-report.png")

        page.goto(link.split("/runs/")[0] + "/runs?workflowType=machine_learning")
        page.get_by_role("link", name=RECORD["sweep"], exact=True).first.wait_for()
        time.sleep(1)
        page.screenshot(path=shots / "6-runs.png")
        browser.close()

    assert {url.split("/")[2] for url in asked if url.startswith("http")} == {address.removeprefix("http://")}
