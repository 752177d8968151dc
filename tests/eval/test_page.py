"""The page of a comparison, in headless Chromium: players that move together, sorting, heat map, no network.

Screenshots of it stay in ``outputs/screenshots`` (not in git).
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_sparse.eval.charts import curves, front, scatter
from dit_sparse.eval.comparison import Cell, Clip, Comparison, Mask, Row
from dit_sparse.eval.masks import png_of
from dit_sparse.eval.page import render
from dit_sparse.video import write_frames

CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
browser_only = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: make browser")
SCREENSHOTS = Path(__file__).parents[2] / "outputs/screenshots"
HOSTILE = (
    "</script><script>document.title='pwned'</script><img src=x onerror=document.title='pwned'> & 'ä' $x_1$"
)
LOCAL = re.compile("(file|blob|data):")
FRAMES, FPS = 24, 8
PIXEL = png_of(torch.zeros(1, 1, dtype=torch.uint8))


CONTRASTS = r"""() => {
    const channels = (c) => {
        const v = c.match(/[\d.]+/g).map(Number);
        return [...v.slice(0, 3).map((x) => (c.startsWith("color(") ? x : x / 255)), v.length > 3 ? v[3] : 1];
    };
    const light = (v) => {
        const [r, g, b] = v.map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const paper = (e) => {
        if (!e) return [1, 1, 1];
        const over = channels(getComputedStyle(e).backgroundColor);
        const a = over.pop();
        return a === 1 ? over : paper(e.parentElement).map((under, i) => a * over[i] + (1 - a) * under);
    };
    const texts = [...document.body.querySelectorAll("*")].filter((e) =>
        !e.closest("script, style, title, desc, metadata, [hidden]") &&
        [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
    return [[light(paper(document.body))], texts.map((e) => {
        const style = getComputedStyle(e);
        const ink = channels(e.namespaceURI.endsWith("svg") ? style.fill : style.color).slice(0, 3);
        const [a, b] = [light(ink), light(paper(e))].sort((x, y) => y - x);
        return [(a + 0.05) / (b + 0.05), e.textContent];
    })];
}"""
"""The light of the page, and contrast (WCAG 2) with its text, of every element with text of its own."""
OVERLAPS = """() => [...document.querySelectorAll(".chart:not([hidden]) svg")].flatMap((svg) => {
    const all = [...svg.querySelectorAll("text")].map((e) => [e.textContent, e.getBoundingClientRect()]);
    const beyond = (p, q) => p.left >= q.right || p.top + 2 >= q.bottom;
    const apart = (p, q) => beyond(p, q) || beyond(q, p);
    return all.flatMap(([a, p], i) => all.slice(i + 1).filter(([, q]) => !apart(p, q)).map(([b]) => [a, b]));
})"""
"""Pairs of texts in a chart that lie on each other."""


def clip(folder: Path, label: str, name: str, decibels: float | None, frames: int, suffix: str) -> Clip:
    """A video in which a bar moves by its own width each frame, so that a frame can be told."""
    video = torch.zeros(frames, 34, 58, 3, dtype=torch.uint8)
    for i in range(frames):
        video[i, :, 2 * i : 2 * i + 4] = 200
    file, error = f"{label}/{name}{suffix}", f"{label}/{name}_error{suffix}"
    (folder / label).mkdir(exist_ok=True)
    for path in (file, error):
        write_frames(folder / path, video, None if suffix == ".png" else FPS)
    return Clip(
        file=file,
        error_file=None if label == "dense" else error,
        seconds={"total": [2.0, 2.2], "attention": [1.0, 1.1]},
        density={"full_run": 0.5, "sparse_calls": 0.3},
        quality={"psnr": decibels, "ssim": 0.9},
        per_frame={"psnr": [None if i == 3 else decibels for i in range(frames)], "ssim": [0.9] * frames},
        identical_frames=1,
    )


def row(folder: Path, label: str, kind: str, decibels: float | None, speed: float, **more: Any) -> Row:
    suffix, frames = (".png", 1) if more.pop("image", False) else (".mp4", FRAMES)
    clips = [clip(folder, label, name, decibels, frames, suffix) for name in ("a", "b")]
    places = [
        (model, step, layer, branch)
        for model in ("transformer", "transformer_2")
        for step in range(5)
        for layer in range(3)
        for branch in ("cond", "uncond")
    ]
    cells = [
        Cell(m, s, i, f"blocks.{i}.attn1", b, "dense" if s < 2 else "sparse", 1.0 if s < 2 else 0.25 + i / 10,
             "model" if s < 2 else "cpu", "schedule" if s < 2 else "", 1, [1.0] if s < 2 else [0.125, 0.375])
        for m, s, i, b in places
    ]  # fmt: skip
    masks = [Mask("transformer", 3, 1, "cond", heads, (16, 8), 0.25, PIXEL) for heads in ([0, 2], [1])]
    mean = {"mean": decibels, "interval": None if decibels is None else [decibels - 1, decibels + 1]}
    summary = {
        "psnr": mean,
        "ssim": {"mean": 0.9, "interval": [0.8, 0.95]},
        "seconds": {"total": 2.1, "attention": 1.05},
        "speed_up": {"median": speed, "low": speed - 0.1, "high": speed + 0.1, "ratios": [speed] * 4},
        "density": {"full_run": 0.5, "sparse_calls": 0.3},
        "peak_memory_mib": None,
    }
    return Row(label, kind, f"{label}()", "always", "x", None, "", clips, cells, masks, [None], summary)


def made(folder: Path, image: bool = False) -> Comparison:
    rows = [
        row(folder, "dense", "dense", None, 1.0, image=image),
        row(folder, "noise-floor", "floor", 60.0, 1.0, image=image),
        row(folder, "radial-0.5", "method", 30.0, 1.5, image=image),
        row(folder, "draft-0.25", "method", 35.0, 1.2, image=image),
        row(folder, "draft-0.1", "method", 25.0, 1.4, image=image),
        Row("paro-0.1", "method", "paro", "", "", 0.1, f"floor {HOSTILE}"),
    ]
    return Comparison(
        command=f"dit-sparse compare --prompt '{HOSTILE}'",
        created="2026-11-29T00:00:00+00:00",
        versions={"torch": "2"},
        device={"name": "x86_64 CPU", "threads": 2},
        model={"asked": HOSTILE, "pipeline": "WanPipeline", "location": "/a/b"},
        settings={"height": 34, "width": 58} | ({} if image else {"fps": FPS, "num_frames": FRAMES}),
        prompts=[HOSTILE, "a second one\u2028"],
        seeds=[0, 1],
        negative_prompt=HOSTILE,
        image=None,
        protocol={"name": "default", "psnr": "mean", "ssim": "gauss"},
        rounds=2,
        rows=rows,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    text = render(made(folder), folder)
    (folder / "report.html").write_text(text, encoding="utf-8")
    return text


def test_the_data_survives_a_file(folder: Path, html: str) -> None:
    made(folder).save(folder / "results.json")
    assert Comparison.load(folder / "results.json") == made(folder)
    (folder / "other.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match=r"other.json is no comparison of dit-sparse"):
        Comparison.load(folder / "other.json")


def test_nothing_in_it_is_markup_or_points_elsewhere(html: str, folder: Path) -> None:
    assert html == render(made(folder), folder)
    assert "<img src=x" not in html
    assert html.count("<script") == 2
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)
    assert json.loads(scripts[0])["rows"][2]["label"] == "radial-0.5"
    assert not re.search(r"""(src|href)=["'](?!data:|#|blob:)""", html)
    assert "default-src 'none'" in html


def test_a_missing_clip_is_named(folder: Path, html: str) -> None:
    lost = made(folder)
    lost.rows[2].clips[0] = replace(lost.rows[2].clips[0], file="gone.mp4")
    with pytest.raises(ValueError, match=r"gone\.mp4 of the comparison cannot be read: No such file"):
        render(lost, folder)


def test_the_front_is_what_nothing_beats(folder: Path) -> None:
    rows = made(folder).rows[2:5]
    assert [r.label for r in front(rows)] == ["draft-0.25", "radial-0.5"]
    twin = replace(rows[0], label="twin")
    assert [r.label for r in front([*rows, twin])] == ["draft-0.25", "radial-0.5", "twin"]


def test_the_run_in_a_line(folder: Path) -> None:
    result = made(folder)
    result.settings |= {"num_inference_steps": 6, "guidance_scale": None}
    found = re.findall("<span>(.*?)</span>", render(result, folder))
    assert found[:5] == ["34 pixels high", "58 wide", f"{FRAMES} frames", "6 steps", "x86_64 CPU"]
    del result.settings["height"], result.settings["width"]  # made by the pipeline from an image
    assert f"<span>{FRAMES} frames</span>" in render(result, folder)


def test_charts_of_little(folder: Path) -> None:
    lone = made(folder)
    lone.rows = lone.rows[:3]
    for part in (lone.rows[2].summary["psnr"], lone.rows[2].summary["ssim"]):
        part["interval"] = None
    lone.rows[2].summary["speed_up"]["ratios"] = [1.5]
    assert "radial-0.5 1.50 times, 30.00 dB. Pareto front: radial-0.5." in scatter(lone)
    lone.rows[2].summary["psnr"]["mean"] = None  # nothing differs: no place among decibels
    assert scatter(lone) == ""
    lone.rows[2].clips[0].quality["psnr"] = None
    lone.rows[2].clips[0].per_frame["psnr"] = [None] * FRAMES
    assert "radial-0.5 identical" in curves(lone, 0)
    assert "no frame differs" in render(lone, folder)


def test_heads_of_a_real_model_are_packed(folder: Path, html: str) -> None:
    grids = json.loads(re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)[0])["rows"][2]["grids"]
    assert [(g["model"], g["branch"]) for g in grids] == [
        (model, branch) for model in ("transformer", "transformer_2") for branch in ("cond", "uncond")
    ]
    assert grids[0]["layers"] == [[i, f"blocks.{i}.attn1"] for i in range(3)]
    assert grids[0]["shares"] == [[1000], [125, 375]]
    assert grids[0]["cells"][1] == [[0, 1.0, 0]] * 2 + [[1, 0.35, 1]] * 3


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


class Opened:
    """A page in a browser, with what it complained of and what it asked the network for."""

    def __init__(self, chromium: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.problems: list[str] = []
        self.page.route(lambda url: not LOCAL.match(url), lambda route: route.abort())
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda r: self.problems.append(r.url) if not LOCAL.match(r.url) else None)
        self.page.goto(path.as_uri())
        self.ready()

    def ready(self) -> None:
        """Wait until every shown clip has a frame to show, and no seek is under way."""
        self.until("clips().every(c => c.tagName === 'IMG' ? c.complete : c.readyState >= 2 && !c.seeking)")

    def until(self, expression: str) -> None:
        """Ask again and again: the page's policy lets nobody evaluate a string in it."""
        start = time.monotonic()
        while not self.page.evaluate(expression):
            assert time.monotonic() - start < 30, expression
            self.page.wait_for_timeout(10)

    def times(self) -> list[float]:
        return self.page.evaluate("clips().map(c => c.currentTime)")

    def seen(self) -> list[int]:
        """The frames that the shown clips show, told by where their bar is."""
        return self.page.evaluate("""clips().map((c) => {
            const copy = Object.assign(document.createElement("canvas"), { width: 58, height: 34 });
            const pen = copy.getContext("2d");
            pen.drawImage(c, 0, 0);
            const line = pen.getImageData(0, 17, 58, 1).data;
            return Array.from({ length: 58 }, (_, x) => line[4 * x]).findIndex((v) => v > 100) / 2;
        })""")

    def order(self) -> list[str]:
        return self.page.locator("#results tbody.methods th").all_inner_texts()


@pytest.fixture
def opened(chromium: Any, folder: Path, html: str) -> Iterator[Opened]:
    found = Opened(chromium, folder / "report.html")
    yield found
    assert found.problems == []
    assert found.page.title() == f"3 settings on {HOSTILE}: dit-sparse compare"
    found.page.close()


@browser_only
def test_players_move_together(opened: Opened) -> None:
    page = opened.page
    assert len(opened.times()) == 4  # the noise floor is hidden at first
    page.get_by_role("button", name="Play").click()
    opened.until("clips()[0].currentTime > 0.5")
    # Within a frame, which a loaded machine may take a moment for.
    opened.until(f"(t => Math.max(...t) - Math.min(...t) < {1 / FPS})(clips().map(c => c.currentTime))")
    page.get_by_role("button", name="Pause").click()
    opened.ready()
    assert len(set(opened.times())) == 1
    for name, frame in (("Frame forward", 11), ("Frame forward", 12), ("Frame back", 11)):
        if (name, frame) == ("Frame forward", 11):
            page.locator("#scrub").fill("10")
        page.get_by_role("button", name=name).click()
        opened.ready()
        assert set(opened.times()) == {(frame + 0.5) / FPS}
        opened.until(f"{frame} === frame")
        assert opened.seen() == [frame] * 4
        assert page.locator("#frame").inner_text() == f"{frame + 1} of {FRAMES}"
    page.locator("#loop").uncheck()
    page.locator("#scrub").fill(str(FRAMES - 3))
    page.locator("h1").click()
    page.keyboard.press("Space")  # the keyboard plays too, to the end
    opened.until("!playing")
    opened.ready()
    assert page.locator("#frame").inner_text() == f"{FRAMES} of {FRAMES}"
    page.locator("#loop").check()
    page.locator("#rate").select_option("2")
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Play").click()  # from the end it begins anew, and goes round
    opened.until("clips()[0].currentTime < 1 && playing")
    assert page.evaluate("clips()[0].playbackRate") == 2


@browser_only
def test_a_player_that_falls_out_of_step_is_fetched_back(opened: Opened) -> None:
    opened.page.locator("#rate").select_option("0.25")
    opened.page.get_by_role("button", name="Play").click()
    opened.until("clips()[0].currentTime > 0.2")
    opened.page.evaluate("clips()[2].currentTime = 2.5")
    apart = "Math.abs(clips()[2].currentTime - clips()[0].currentTime)"
    opened.until(f"clips()[0].currentTime > 1 || {apart} < 1 / {FPS}")
    assert opened.times()[0] < 1
    assert opened.page.evaluate("playing")


@browser_only
def test_what_is_shown_is_what_was_chosen(opened: Opened) -> None:
    page = opened.page
    sources = page.evaluate("clips().map(c => c.src)")
    page.locator("#prompt").select_option("1")
    opened.ready()
    assert not set(sources) & set(page.evaluate("clips().map(c => c.src)"))
    page.get_by_role("checkbox", name="noise-floor").check()
    page.get_by_role("checkbox", name="dense").uncheck()
    opened.ready()
    assert page.locator(".player:visible").count() == 4
    page.locator("#scrub").fill("7")
    page.locator("#overlay").fill("50")
    opened.ready()
    assert len(opened.times()) == 8  # the errors beside the clips
    assert set(opened.times()) == {7.5 / FPS}
    assert page.locator(".player:visible .error").first.evaluate("e => getComputedStyle(e).opacity") == "0.5"


@browser_only
def test_the_table_sorts(opened: Opened) -> None:
    page = opened.page
    assert opened.order() == ["radial-0.5", "draft-0.25", "draft-0.1"]
    page.get_by_role("button", name="PSNR, dB").click()
    assert opened.order() == ["draft-0.1", "radial-0.5", "draft-0.25"]
    head = page.get_by_role("columnheader", name="PSNR, dB")
    assert head.get_attribute("aria-sort") == "ascending"
    page.get_by_role("button", name="PSNR, dB").press("Enter")
    assert opened.order() == ["draft-0.25", "radial-0.5", "draft-0.1"]
    page.get_by_role("button", name="setting", exact=True).press("Space")
    assert opened.order() == ["draft-0.1", "draft-0.25", "radial-0.5"]
    assert head.get_attribute("aria-sort") == "none"
    fixed = page.locator("#results tbody.fixed tr").all_inner_texts()
    assert [text.split()[0] for text in fixed] == ["dense", "noise-floor"]


@browser_only
def test_the_heat_map_tells_of_heads_and_masks(opened: Opened) -> None:
    page = opened.page
    x, y = page.evaluate("(({ w, h }) => [numbersWide + 3.5 * w, above + 1.5 * h])(sizes())")
    page.locator("#heat").hover(position={"x": x - page.evaluate("2 * sizes().w"), "y": y})
    assert page.get_attribute("#heat", "title") == "Step 1, layer 1 (blocks.1.attn1): left dense, schedule."
    page.locator("#heat").click(position={"x": x, "y": y})
    assert "Step 3, layer 1 (blocks.1.attn1): sparse by cpu, density 0.350" in page.inner_text("#heat-text")
    assert page.inner_text("#heads").split() == ["head", "0", "0.125", "head", "1", "0.375"]
    page.locator("#heat").press("ArrowLeft")
    page.locator("#heat").press("ArrowLeft")
    page.locator("#heat").press("Enter")
    assert "Step 1, layer 1 (blocks.1.attn1): left dense, schedule" in page.inner_text("#heat-text")
    assert page.inner_text("#heads").split() == ["all", "heads", "1.000"]
    captions = page.locator("#masks figcaption").all_inner_texts()
    assert page.inner_text("#mask-step") == "Taken at step 3."
    assert captions == ["heads 0, 2: density 0.250, blocks of 16x8", "head 1: density 0.250, blocks of 16x8"]
    page.locator("#where-grid").select_option(label="transformer_2, uncond")
    assert "No call" in page.inner_text("#masks")


@browser_only
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(chromium: Any, folder: Path, html: str, width: int, scheme: str) -> None:
    opened = Opened(chromium, folder / "report.html", width, scheme)
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    papers, contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 150
    assert min(contrasts)[0] >= 4.5, min(contrasts)
    assert (papers[0] < 0.05) == (scheme == "dark")
    assert page.evaluate(OVERLAPS) == []
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"report-{width}-{scheme}.png", full_page=True)
    assert opened.problems == []
    page.close()


@browser_only
def test_the_keyboard_reaches_everything(opened: Opened) -> None:
    page = opened.page
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "[document.activeElement].map((e) => [e.id || e.className || e.tagName,"
            " getComputedStyle(e).outlineStyle])[0]"
        )
        assert name == "BODY" or outline != "none", name
        reached.add(name)
    assert reached >= {"prompt", "show", "back", "play", "next", "scrub", "rate", "loop", "overlay"}
    assert reached >= {"scroll", "where-row", "where-grid", "heat", "mask-layer", "SUMMARY", "copy"}
    page.locator("#copy").focus()
    page.keyboard.press("Enter")
    opened.until("document.getElementById('copy').textContent !== 'Copy the command'")
    assert page.evaluate("String(getSelection())") == f"dit-sparse compare --prompt '{HOSTILE}'"


@browser_only
def test_images_have_no_transport(chromium: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(render(made(tmp_path, image=True), tmp_path), encoding="utf-8")
    opened = Opened(chromium, path)
    assert opened.page.locator("#play").count() == 0
    assert opened.page.locator(".player:visible img.clip").count() == 4
    opened.page.locator("#overlay").fill("100")
    opened.page.locator("#prompt").select_option("1")
    opened.ready()
    assert opened.problems == []
