"""The page of an explanation, in headless Chromium where it is installed."""

import json

import numpy as np
import pytest

from mmrl_jax.evaluation.evaluate import Episodes
from mmrl_jax.reporting import explanation, explanation_page, explanation_text, report
from tests import browser

EVIL = "<img src=x onerror=fail()>"  # A word of an instruction is data.
N, T, S = 6, 3, 9  # Episodes, explained steps and all steps.


def explained(**changes) -> explanation.Explanation:
    """Returns the explanation of six episodes, of which 1, 3 and 5 succeeded."""
    rng = np.random.default_rng(0)
    share = {"pixels": 0.5, "instruction": 0.3, "proprio": 0.2}
    pairs = ("pixels * instruction", "pixels * proprio", "instruction * proprio")
    table = {"share": share, "interaction": dict.fromkeys(pairs, -0.1)}
    gains = {"all": [2.0, 1.0, 3.0], "pixels": [1.0, -0.5, 2.0], "words": [2.0, 1.0, 3.0]}
    numbers = {
        "modalities": {"behavior": table, "prediction": table},
        "method": "occlusion",
        "faithfulness": {"occlusion": gains},
        "completeness_error": float("nan"),  # JSON has no NaN.
        "randomization_correlation": 0.1,
        "word_scores": {"red": 0.3, EVIL: -0.2},
        "instruction_swap": [0.8, 0.7, 0.9],
    }
    shares = np.broadcast_to(np.array([0.5, 0.3, 0.2])[:, None, None], (3, T, N))
    running = np.ones((S, N))
    running[4:, 0] = 0  # Episode 0 ends after four steps, so that its step 6 is not shown.
    patches = rng.normal(size=(2, T, N, 4, 4)).astype(np.float32)
    patches[0, 0, 0, 0, 0] = 5  # The largest score of episode 0.
    words = rng.normal(size=(2, T, N, 5)).astype(np.float32)
    actions = rng.normal(size=(2, T, N, 2)).astype(np.float32)
    success = np.array([0, 1, 0, 1, 0, 1.0])
    fields = {
        "numbers": numbers,
        "sentences": explanation_text.sentences(numbers),
        "frames": rng.integers(0, 255, (T, N, 16, 16, 3), np.uint8),
        "patches": patches[0],
        "words": [["touch", "the", "red", EVIL], ["touch", "the", "blue", "ball"]] * 3,
        "word_scores": words[0],
        "steps": np.array([0, 3, 6]),
        "shares": {"behavior": shares, "prediction": shares},
        "course": explanation.Course(
            Episodes(success, np.arange(N) - 3.0, running.sum(0)),
            running,
            rng.normal(size=(S, N)),
            rng.normal(size=(S, N)),
        ),
        "swapped": explanation.Swapped(patches[1], words[1], *actions, np.ones(N, bool)),
    } | changes
    return explanation.Explanation(**fields)


CURVES = {
    f"modality_share/behavior/{name}": (np.arange(5.0), np.linspace(0.1, 0.5, 5))
    for name in ("pixels", "instruction")
}


def test_the_first_lines_say_what_is_used_and_what_can_be_trusted():
    page = explanation_page.page(explained(), title="a & b")
    header = page[page.index("<header>") : page.index("</header>")]
    assert "pixels 50%, instruction 30%, proprio 20%" in header
    assert "changes by 80% [70%, 90%]" in header
    assert '<p class="verdict doubt">Do not trust the heat maps.</p>' in header
    assert "<title>a &amp; b</title>" in page


def test_failed_episodes_come_first_and_nothing_after_their_end_is_shown():
    page = explanation_page.page(explained(), title="x")
    # Failures 0, 2, 4 by their returns -3, -1, 1, then successes 1, 3, 5 by -2, 0, 2.
    found = [page.index(f"<h3>Episode {n}:") for n in (0, 2, 4, 1, 3, 5)]
    assert found == sorted(found)
    card = page[found[0] : found[1]]
    assert "failed, return -3, 4 steps" in card
    assert "<span>step 3</span>" in card and "<span>step 6</span>" not in card


def test_an_environment_without_success_has_no_filter():
    course = explained().course
    course = course._replace(episodes=course.episodes.replace(success=None), advantage=None)
    page = explanation_page.page(explained(course=course), title="x")
    assert 'name="filter"' not in page and "data-outcome" not in page.split("<script")[0]


def test_episodes_that_do_not_fit_are_left_out_and_said():
    # Noise is not compressed: a frame has 400 * 400 * 3 bytes, which are 0.64 MB in base64. Twelve
    # frames of pairs have 7.7 MB. Of the remaining 8.3 MB, episode 0 with two frames takes 1.3 MB,
    # and each other one with three frames 1.9 MB, so that three others fit.
    frames = np.random.default_rng(0).integers(0, 256, (T, N, 400, 400, 3), np.uint8)
    page = explanation_page.page(explained(frames=frames), title="x")
    assert 14e6 < len(page) < 20e6
    assert page.count(" steps</h3>") == 4
    assert "2 of 6 episodes are left out for their size." in page


def test_instructions_that_are_all_the_same_are_not_swapped():
    swapped = explained().swapped._replace(differs=np.zeros(N, bool))
    page = explanation_page.page(explained(swapped=swapped), title="x")
    assert "none could be swapped" in page and 'class="side"' not in page


def test_a_notebook_shows_the_page_in_a_frame():
    frame = explained()._repr_html_()
    assert frame.startswith("<iframe") and frame.count("<") == 2  # The page itself is escaped.


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "explanation.html"
    report.write_page(file, explanation_page.page(explained(), title="a & b", curves=CURVES))
    return file


@pytest.fixture(scope="module")
def tab():
    with browser.tab() as opened:
        yield opened


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_loads_without_an_error_or_a_request(tab, path, width):
    tab.open(path, width=width)
    assert tab.errors == [] and tab.requests == []
    decoded = "Promise.all([...document.images].map((x) => x.decode().then(() => x.naturalWidth)))"
    # Two images for each of 3 * 6 - 1 steps, and for each side of six pairs.
    widths = tab.evaluate(decoded)
    assert len(widths) == 2 * 17 + 4 * 6 and set(widths) == {16, 4}
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("document.querySelector('img[src=x]')") is None


def test_the_page_runs_in_the_frame_of_a_notebook(tab, tmp_path):
    notebook = tmp_path / "notebook.html"
    report.write_page(notebook, f"<!doctype html><meta charset=utf-8>{explained()._repr_html_()}")
    tab.open(notebook)
    decoded = "Promise.all([...document.images].map((x) => x.decode())).then((x) => x.length)"
    assert tab.evaluate_in_frame(decoded) == 2 * 17 + 4 * 6
    tab.evaluate_in_frame("document.querySelector('[value=failed]').click()")
    assert tab.evaluate_in_frame("document.getElementById('count').value") == "3 of 6 episodes"
    assert tab.errors == [] and tab.requests == []


def test_the_slider_changes_the_opacity_by_keyboard(tab, path):
    tab.open(path)
    opacity = "getComputedStyle(document.querySelector('.heat')).opacity"
    assert tab.evaluate(opacity) == "0.7"
    tab.evaluate("document.getElementById('opacity').focus()")
    tab.press("ArrowRight", 39)
    assert tab.evaluate(opacity) == "0.71"


def test_the_filter_hides_episodes(tab, path):
    tab.open(path)
    shown = (
        "[...document.querySelectorAll('[data-outcome]')].filter((x) => x.offsetHeight)"
        ".map((x) => x.getAttribute('aria-label'))"
    )
    tab.evaluate("document.querySelector('[value=all]').focus()")
    tab.press("ArrowRight", 39)  # The next radio button, 'failed'.
    assert tab.evaluate(shown) == ["Episode 0", "Episode 2", "Episode 4"]
    assert tab.evaluate("document.getElementById('count').value") == "3 of 6 episodes"
    tab.press("ArrowRight", 39)
    assert tab.evaluate(shown) == ["Episode 1", "Episode 3", "Episode 5"]


def test_a_word_shows_its_score_on_focus(tab, path):
    tab.open(path)
    tip = "getComputedStyle(document.querySelector('.word .tip')).display"
    assert tab.evaluate(tip) == "none"
    tab.evaluate("document.querySelector('.word').focus()")
    assert tab.evaluate(tip) == "block"


def test_what_can_be_focused_has_an_accessible_name(tab, path):
    tab.open(path)
    names = tab.names()
    assert all(name for _, name in names), names
    assert {"slider", "radio", "button", "note"} <= {role for role, _ in names}
    buttons = [name for role, name in names if role == "button"]
    assert len(set(buttons)) == len(buttons)  # Each button says what it saves.
    charts = tab.evaluate("[...document.querySelectorAll('[role=img]')].map((x) => x.ariaLabel)")
    assert all(charts)


def test_figures_and_numbers_are_exported(tab, path, tmp_path):
    tab.downloads(tmp_path)
    tab.open(path)
    tab.evaluate("document.getElementById('save-numbers').click()")
    numbers = json.loads(_downloaded(tab, tmp_path, "a-b.json"))
    assert numbers["completeness_error"] is None and numbers["method"] == "occlusion"
    first = numbers["episode_scores"][0]
    assert first["episode"] == 0 and first["steps"] == [0, 3] and len(first["value"]) == 4
    np.testing.assert_allclose(first["patches"], explained().patches[:2, 0], atol=1e-5)
    for i, name in enumerate(["Episode-0", "Episode-0-with-another-instruction"]):
        tab.evaluate(f"document.querySelectorAll('.save')[{6 * i}].click()")
        assert _downloaded(tab, tmp_path, f"a-b-{name}.png")[:4] == b"\x89PNG"
    # A frame is drawn under its heat map, whose opacity is that of the slider.
    drawn = tab.evaluate(_MIDDLE_OF_THE_FIRST_PATCH)
    frame = explained().frames[0, 0, 2, 2]
    expected = 0.3 * frame + 0.7 * np.array(explanation_page.FOR)
    np.testing.assert_allclose(drawn, expected, atol=3)
    assert tab.errors == [] and tab.requests == []


# The color of the exported figure of the first episode in the middle of pixel (2, 2) of its frame.
_MIDDLE_OF_THE_FIRST_PATCH = """(async () => {
  const figure = document.querySelector(".figure");
  const bitmap = await createImageBitmap(await figureImage(figure));
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const origin = figure.getBoundingClientRect();
  const box = figure.querySelector("img").getBoundingClientRect();
  const x = 2 * (box.x - origin.x + (2.5 / 16) * box.width);
  const y = 2 * (box.y - origin.y + (2.5 / 16) * box.height);
  return [...context.getImageData(x, y, 1, 1).data].slice(0, 3);
})()"""


def _downloaded(tab, directory, name):
    """Returns the bytes of a download once it is complete."""
    for _ in range(200):
        if (directory / name).exists():
            return (directory / name).read_bytes()
        tab.evaluate("new Promise((resolve) => setTimeout(resolve, 50))")
    raise AssertionError(f"{name} is not among {[x.name for x in directory.iterdir()]}.")
