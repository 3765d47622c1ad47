"""The dashboard in a real browser, beside real jobs."""

import json
import os
import pathlib
import re
import signal
import urllib.error
import urllib.request

import flexmodel
import pytest
from webdriver import Browser, available

import harness

pytestmark = pytest.mark.skipif(not available(), reason="needs chromium and chromedriver")

HOOKS = "model.layers.*.mlp:forward,backward;lm_head"
MLP = "#/0/model.layers.1.mlp"
BADGE = """
    const row = document.querySelector(`[data-key="0/${arguments[0]}"] .badge`);
    return (row ? Number(row.textContent) : 0);
"""
CONNECTED = "return document.getElementById('state').dataset.state === arguments[0]"
TILE = "return document.querySelector(`[data-tile=${arguments[0]}] dd`).textContent"
PICTURE = """
    const hidden = document.querySelector(".picture")?.hidden ?? true;
    return !hidden && document.querySelector(".where").textContent.includes(arguments[0]);
"""
LENGTHS = """
    const lines = [...document.querySelectorAll(".chart")].map((chart) => chart.querySelector("path.line.train"));
    const lengths = lines.map((line) => line?.getTotalLength() ?? 0);
    return lengths.length === 4 && lengths.every((n) => n > 10);
"""
POINTS = "document.querySelector('.chart path.line').getAttribute('d').split('L').length"
RECORDS = "Number(document.querySelector('[data-tile=records] dd').textContent.replace(/[^0-9]/g, ''))"
BARS = """
    return [...document.querySelectorAll(".histogram .bin")].filter((bin) => bin.getAttribute("height") > 0).length;
"""
TABLE = """
    const rows = [...document.querySelectorAll(".stats tr")];
    return Object.fromEntries(rows.map((row) => [row.children[0].textContent, row.children[1].textContent]));
"""
COLOURS = """
    const canvas = document.querySelector("canvas.heat");
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    const seen = new Set();
    for (let i = 0; i < pixels.length; i += 4) seen.add(pixels.slice(i, i + 3).join());
    return seen.size;
"""


def address(text: str) -> str:
    """The dashboard's address, as it was printed."""
    found = re.search(r"http://127\.0\.0\.1:\d+/\?token=\w+", text)
    assert found, f"no address of a dashboard in\n{text}"
    return found[0]


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory):
    """A language model in training on two ranks, for as long as the tests look at it."""
    out = tmp_path_factory.mktemp("live") / "run"
    command = [
        harness.FLEXMODEL,
        "run",
        "--hooks",
        HOOKS,
        "--out",
        str(out),
        "--",
        *harness.torchrun("train_lm.py", "100000"),
    ]
    with harness.Job(command) as job:
        job.wait_for_line("step   0")
        yield out, address(job.err)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    """One browser for all tests here."""
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as one:
        yield one


@pytest.fixture
def page(training, browser):
    """The training's dashboard, freshly opened; nothing may be left on the console."""
    browser.console()
    browser.open("about:blank")
    browser.open(training[1])
    browser.wait(CONNECTED, "live", what="the state live")
    yield browser
    keep(browser, os.environ.get("PYTEST_CURRENT_TEST", "page"))
    assert browser.console() == []


def keep(browser: Browser, name: str) -> None:
    """Keeps a screenshot for people, if `FLEXMODEL_TEST_SCREENSHOTS` names a folder."""
    if folder := os.environ.get("FLEXMODEL_TEST_SCREENSHOTS"):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        browser.screenshot(pathlib.Path(folder) / f"{name.split('::')[-1].split(' ')[0]}.png")


def number(text: str) -> float:
    """A number as the page writes it."""
    return float(text.replace("\u2212", "-"))


def test_the_token_leaves_the_address_and_nothing_comes_from_elsewhere(page, training):
    assert "token" not in page.address()
    origin = training[1].split("/?")[0]
    loaded = page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert loaded and all(name.startswith(f"{origin}/") for name in loaded)
    assert "train_lm.py" in page.run("return document.getElementById('command').textContent")


def test_counts_rise_while_the_job_runs(page):
    before = page.wait(BADGE, "model.layers.0.mlp", what="a count in the tree")
    records = page.run(f"return {RECORDS}")
    page.wait(BADGE.replace("return", "return arguments[1] < "), "model.layers.0.mlp", before)
    page.wait(f"return {RECORDS} > arguments[0]", records, what=f"more than {records} records")
    assert page.run(TILE, "dropped") == "0"


def test_a_module_shows_its_charts_and_they_grow(page):
    page.wait(BADGE, "model.layers.1.mlp")
    page.click('[data-key="0/model.layers.1.mlp"] .name')
    page.wait(LENGTHS, what="four charts with lines")
    before = page.run(f"return {POINTS}")
    page.wait(f"return {POINTS} > arguments[0]", before, what=f"more than {before} points")
    tabs = page.run("return [...document.querySelectorAll('.tab')].map((t) => t.textContent)")
    assert [" ".join(tab.split()[:2]) for tab in tabs] == ["forward out", "backward in[0]"]


def test_a_record_shows_what_the_reader_reads(page, training):
    page.run("location.hash = arguments[0]", MLP)
    page.wait(PICTURE, "step", what="a picture")
    # Away from the newest, back to a step that will stay.
    page.run("const s = document.getElementById('record'); s.value = 1; s.dispatchEvent(new Event('input'))")
    page.wait("return document.querySelector('.where').textContent === 'step 1 · micro 0 · train'")
    assert page.run("return document.querySelector('.picker input[type=checkbox]').checked") is False
    tensor = flexmodel.open(training[0]).get("model.layers.1.mlp", kind="forward", step=1)
    wanted = {"mean": tensor.mean().item(), "l2 norm": tensor.norm().item(), "max": tensor.max().item()}
    shown = "const mean = [...document.querySelectorAll('.stats td')][0]?.textContent.replace('\\u2212', '-'); "
    page.wait(
        f"{shown} return Math.abs(Number(mean) - arguments[0]) < 1e-4 * Math.abs(arguments[0])",
        wanted["mean"],
        what=f"{wanted}",
    )
    table = page.run(TABLE)
    for name, value in wanted.items():
        assert number(table[name]) == pytest.approx(value, rel=1e-3)
    assert page.run(COLOURS) > 20
    assert page.run(BARS) > 10
    facts = page.run("return document.querySelector('.facts').innerText")
    assert "dp: shard of dim 0, 2 ranks" in facts and str(list(tensor.shape)) in facts


def test_one_rank_alone_and_the_readouts(page):
    page.run("location.hash = arguments[0]", MLP)
    page.wait("return document.querySelectorAll('.picker select option').length === 3", what="a choice of ranks")
    page.run("const s = document.querySelector('.picker select'); s.value = '1'; s.dispatchEvent(new Event('change'))")
    page.wait("return document.querySelector('.facts').innerText.includes('rank 1 alone')")
    for selector, readout in [(".heat", ".map .readout"), (".histogram", ".bin-readout"), (".chart", ".plot .readout")]:
        page.hover(selector)
        assert re.search(r"\d", page.run("return document.querySelector(arguments[0]).textContent", readout)), selector


def test_the_keyboard_reaches_everything(page):
    page.wait(BADGE, "lm_head")
    page.run("document.body.focus()")
    page.type("/")
    page.type("lm_h")
    rows = "return [...document.querySelectorAll('.row')].map((row) => row.dataset.key)"
    assert page.run(rows) == ["0/", "0/lm_head"]
    for key in ("down", "down", "enter"):
        page.type(key)
    page.wait("return document.querySelector('.title h2').textContent === 'lm_head'")
    page.wait(PICTURE, "step")
    page.run("document.getElementById('record').focus()")
    last = page.run("return Number(document.getElementById('record').value)")
    page.type("left")
    page.wait("return Number(document.getElementById('record').value) < arguments[0]", last + 1)
    assert page.run("return document.querySelector('.picker input[type=checkbox]').checked") is False


def test_a_stranger_gets_nothing(training):
    base = training[1].split("/?")[0]
    for path, headers, code in [
        ("/", {}, 401),
        ("/api/run", {"Authorization": "Bearer wrong"}, 401),
        ("/?token=wrong", {}, 401),
        ("/api/run", {"Host": "evil.example"}, 421),
        ("/api/run", {"Origin": "http://evil.example"}, 403),
    ]:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(base + path, headers=headers), timeout=30)
        assert refused.value.code == code, path
        refused.value.close()


def test_the_end_of_the_run_stays_on_the_page(tmp_path, browser):
    stop = tmp_path / "stop"
    program = harness.python("until.py", str(stop))
    command = [harness.FLEXMODEL, "run", "--hooks", "**.mlp", "--out", str(tmp_path / "run"), "--", *program]
    with harness.Job(command) as job:
        job.wait_for_line("step")
        browser.open(address(job.err))
        browser.wait("return Number(document.querySelector('[data-tile=step] dd').textContent) > 2", what="steps")
        stop.touch()
        job.wait().expect(0)
    browser.wait(CONNECTED, "finished", what="the state finished")
    banner = browser.run("return document.getElementById('banner').textContent")
    assert "exit code 0" in banner and str(tmp_path / "run") in banner
    keep(browser, "finished")


def test_a_killed_agent_is_told(tmp_path, browser):
    with harness.agent(tmp_path / "run", tmp_path / "a.sock") as agent:
        harness.wait_until(lambda: "token=" in agent.out + agent.err, "the address", job=agent)
        browser.open(address(agent.out + agent.err))
        browser.wait(CONNECTED, "waiting", what="the state waiting")
        os.kill(agent.process.pid, signal.SIGKILL)
        browser.wait(CONNECTED, "lost", what="the state lost")
        assert "does not answer" in browser.run("return document.getElementById('banner').textContent")
        keep(browser, "lost")
    browser.console()


def test_the_api_speaks_json(training):
    base, token = training[1].split("/?token=")
    request = urllib.request.Request(f"{base}/api/modules", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        modules = json.load(answer)
    tapped = [m["name"] for m in modules["models"][0]["modules"] if m["kinds"]]
    assert tapped == [*(f"model.layers.{i}.mlp" for i in range(4)), "lm_head"]
