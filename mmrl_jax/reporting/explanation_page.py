"""The page of an explanation: one HTML file with its style, its script and its images.

The page is static, except for the opacity of the heat maps, the filter of episodes and the exports,
which are in explanation_page.js. It loads nothing, and its content security policy forbids that.
"""

from collections.abc import Mapping, Sequence
import html
from importlib import resources
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from mmrl_jax.reporting.explanation_text import PARTS, SHARED, trust, usage
from mmrl_jax.reporting.report import data_uri
from mmrl_jax.reporting.svg_charts import line_chart, line_color

if TYPE_CHECKING:
    from mmrl_jax.reporting.explanation import Explanation

FOR, AGAINST = (230, 97, 1), (94, 60, 153)  # Orange and purple, which the color-blind tell apart.
MAX_BYTES = 16e6  # Size of the figures on a page; episodes that do not fit are left out.
PAIRS = 8  # Episodes whose instruction is swapped on a page.
TOP_WORDS = 20  # Words in the table of their mean scores.
CURVES = tuple(f"modality_share/{target}/<modality>" for target in SHARED)  # Metrics that it shows.
Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><header><h1>{title}</h1>{lead}</header>
<main>{sections}</main>
<script type="application/json" id="numbers">{numbers}</script><script>{script}</script>
</body></html>
"""


def page(explanation: "Explanation", *, title: str, curves: Curves | None = None) -> str:
    """Returns the page of an explanation.

    Args:
      explanation: Explanation of N episodes.
      title: Title of the page, which is also the beginning of the names of exported files.
      curves: Curves (updates, values) of the metrics `modality_share/<target>/<modality>` of the
        run; None or empty if the run has none.
    """
    order = _order(explanation)
    pairs = _pairs(explanation, order)
    cards, records = _episodes(explanation, order, MAX_BYTES - len(pairs))
    sections = [
        _controls(explanation, len(cards)),
        _section("Episodes", _episodes_text(explanation, len(cards)), *cards),
        pairs,
        _modalities(explanation.numbers),
        _training(curves or {}),
        _faithfulness(explanation.numbers),
        _words(explanation.numbers),
    ]
    numbers = {"title": title, "sentences": explanation.sentences, **explanation.numbers}
    assets = resources.files(__package__)
    return _PAGE.format(
        title=html.escape(title),
        style=assets.joinpath("explanation_page.css").read_text(),
        script=assets.joinpath("explanation_page.js").read_text(),
        lead=_lead(explanation.numbers),
        sections="".join(sections),
        numbers=_json({**numbers, "episode_scores": records}),
    )


def in_frame(page: str) -> str:
    """Returns a frame that shows a page within another one, for example in a notebook."""
    return (
        f'<iframe title="Explanation" srcdoc="{html.escape(page)}" '
        'sandbox="allow-scripts allow-downloads" '
        'style="width: 100%; height: 48em; border: 1px solid #8888"></iframe>'
    )


def _order(explanation: "Explanation") -> list[int]:
    """Returns the numbers of the episodes: failures first, then by return, the lowest first."""
    episodes = explanation.course.episodes
    returns = np.asarray(episodes.episode_return)
    success = np.zeros_like(returns) if episodes.success is None else np.asarray(episodes.success)
    return [int(n) for n in np.lexsort((returns, success))]


def _lead(numbers: Mapping[str, Any]) -> str:
    *tests, verdict = trust(numbers)
    uses = "".join(f"<p>{html.escape(line)}</p>" for line in usage(numbers))
    tested = "".join(f"<li>{html.escape(line)}</li>" for line in tests)
    kind = "doubt" if "not" in verdict else "trust"
    return (
        f'{uses}<p class="verdict {kind}">{html.escape(verdict)}</p>'
        f"<details><summary>How this was tested</summary><ul>{tested}</ul></details>"
    )


def _section(title: str, *parts: str) -> str:
    name = title.lower().replace(" ", "-")
    return (
        f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{"".join(parts)}</section>'
    )


def _controls(explanation: "Explanation", shown: int) -> str:
    radios = ""
    if explanation.course.episodes.success is not None:
        radios = "".join(
            f'<label><input type="radio" name="filter" value="{value}"{checked}> {value}</label>'
            for value, checked in (("all", " checked"), ("failed", ""), ("succeeded", ""))
        )
        radios = f"<fieldset><legend>Episodes</legend>{radios}</fieldset>"
    return (
        '<div class="controls" role="group" aria-label="Controls"><label>Opacity of the heat maps '
        '<input type="range" id="opacity" min="0" max="100" value="70"></label>'
        f'{radios}<output id="count">{shown} episodes</output>'
        '<button type="button" id="save-numbers">Save numbers as JSON</button></div>'
    )


def _episodes_text(explanation: "Explanation", shown: int) -> str:
    names = list(explanation.numbers["modalities"]["behavior"]["share"])
    legend = "".join(
        f'<li><span class="swatch" style="background: {line_color(i)}"></span>{html.escape(x)}</li>'
        for i, x in enumerate(names)
    )
    method = html.escape(explanation.numbers["method"].replace("_", " "))
    count = len(explanation.words)
    left_out = (
        ""
        if shown == count
        else f" {count - shown} of {count} episodes are left out for their size."
    )
    return (
        f"<p>Heat maps and words are colored by {method}: "
        f'<span class="key" style="background: {_rgba(FOR, 0.55)}">orange</span> speaks for the '
        "action that the policy took rather than the action of another episode, "
        f'<span class="key" style="background: {_rgba(AGAINST, 0.55)}">purple</span> against it. '
        "The strongest color is the largest score of an episode. A word has its mean score over "
        f"the steps that are shown; hover over it or focus it to read it.{left_out}</p>"
        f"<p>Bars below frames are the shares of the modalities in the action:</p>"
        f'<ul class="legend">{legend}</ul>'
    )


def _episodes(
    explanation: "Explanation", order: Sequence[int], max_bytes: float
) -> tuple[list[str], list[dict[str, Any]]]:
    """Returns the cards of the first episodes that fit, at least one, and their numbers."""
    cards, records, size = [], [], 0
    for n in order:
        card, record = _card(explanation, n), _record(explanation, n)
        size += len(card) + len(_json(record))
        if cards and size > max_bytes:
            break
        cards.append(card)
        records.append(record)
    return cards, records


def _record(explanation: "Explanation", n: int) -> dict[str, Any]:
    """Returns the numbers of an episode for the export."""
    course, steps = explanation.course, _running(explanation, n)
    last = int(course.running[:, n].sum())
    success = course.episodes.success
    words = explanation.words[n]
    names = explanation.numbers["modalities"]["behavior"]["share"]
    return {
        "episode": n,
        "success": None if success is None else float(success[n]),
        "return": float(course.episodes.episode_return[n]),
        "words": words,
        "steps": explanation.steps[steps].tolist(),
        "word_scores": _rounded(explanation.word_scores[steps, n, : len(words)]),
        "patches": _rounded(explanation.patches[steps, n]),
        "shares": {
            target: {name: _rounded(x[i, steps, n]) for i, name in enumerate(names)}
            for target, x in explanation.shares.items()
        },
        "value": _rounded(course.value[:last, n]),
        "advantage": None if course.advantage is None else _rounded(course.advantage[:last, n]),
    }


def _card(explanation: "Explanation", n: int) -> str:
    """Returns an episode: its instruction, its frames with heat maps and shares, and its values."""
    course, episodes = explanation.course, explanation.course.episodes
    steps = _running(explanation, n)
    outcome, data = "", ""
    if episodes.success is not None:
        outcome = "succeeded" if episodes.success[n] > 0.5 else "failed"
        data, outcome = f' data-outcome="{outcome}"', f" {outcome},"
    length = int(course.running[:, n].sum())
    bound = _bound(explanation.patches[steps, n])
    names = list(explanation.numbers["modalities"]["behavior"]["share"])
    strip = "".join(
        '<div class="step">'
        + _frame(explanation.frames[t, n], explanation.patches[t, n], bound, explanation.steps[t])
        + f"<span>step {explanation.steps[t]}</span>"
        + _share_bar(names, explanation.shares["behavior"][:, t, n])
        + "</div>"
        for t in steps
    )
    series = {"value": (np.arange(length), course.value[:length, n])}
    if course.advantage is not None:
        series["advantage"] = (np.arange(length), course.advantage[:length, n])
    words = explanation.words[n]
    scores = explanation.word_scores[steps, n, : len(words)].mean(0)
    return _figure(
        f"Episode {n}",
        f"<h3>Episode {n}:{outcome} return {episodes.episode_return[n]:.3g}, {length} steps</h3>"
        f'{_colored(words, scores, _bound(scores))}<div class="course">'
        f'<div class="strip">{strip}</div>{line_chart(f"Value of episode {n}", series, "step")}'
        "</div>",
        data,
    )


def _pairs(explanation: "Explanation", order: Sequence[int]) -> str:
    """Returns episodes with their own instruction and with that of the next episode."""
    swapped = explanation.swapped
    chosen = [n for n in order if swapped.differs[n]][:PAIRS]
    if not chosen:
        text = "<p>All episodes have the same instruction, so that none could be swapped.</p>"
        return _section("Another instruction", text)
    text = (
        "<p>The same first image, with the instruction of the episode on the left and with that of "
        "another episode on the right. A change of the action shows that it depends on the "
        "instruction, and not that the new action is right; the other instruction may name what is "
        "not in the image.</p>"
    )
    return _section("Another instruction", text, *(_pair(explanation, n) for n in chosen))


def _pair(explanation: "Explanation", n: int) -> str:
    swapped = explanation.swapped
    words = explanation.words[n]
    others = explanation.words[(n + 1) % len(explanation.words)]
    own_scores = explanation.word_scores[0, n, : len(words)]
    other_scores = swapped.word_scores[0, n, : len(others)]
    sides = (
        ("own", words, own_scores, explanation.patches[0, n], swapped.action[0, n]),
        ("of another episode", others, other_scores, swapped.patches[0, n],
         swapped.swapped_action[0, n]),
    )  # fmt: skip
    word_bound = _bound(np.concatenate([own_scores, other_scores]))
    bound = _bound(np.stack([side[3] for side in sides]))
    shown = ""
    for name, texts, scores, patches, action in sides:
        frame = _frame(explanation.frames[0, n], patches, bound, 0)
        shown += (
            f'<div class="side"><h4>Instruction: {name}</h4>'
            f"{_colored(texts, scores, word_bound)}{frame}"
            f"<p>Most likely action: {_action(action)}</p></div>"
        )
    name = f"Episode {n} with another instruction"
    return _figure(name, f'<h3>Episode {n}</h3><div class="pair">{shown}</div>')


def _modalities(numbers: Mapping[str, Any]) -> str:
    modalities = numbers["modalities"]
    rows = [
        [name, *(f"{modalities[target]['share'][name]:.1%}" for target in SHARED)]
        for name in modalities["behavior"]["share"]
    ]
    pairs = [
        [name, *(_signed(modalities[target]["interaction"][name]) for target in SHARED)]
        for name in modalities["behavior"]["interaction"]
    ]
    return _section(
        "Modalities",
        "<p>The share of a modality is its mean absolute Shapley value, divided by the sum over "
        "modalities. An interaction above 0 means that two modalities are worth more together, "
        "one below 0 that they say the same; it is divided by the same sum.</p>",
        _table(["share", *SHARED.values()], rows),
        _table(["interaction", *SHARED.values()], pairs) if pairs else "",
    )


def _training(curves: Curves) -> str:
    charts = ""
    for target, what in SHARED.items():
        prefix = f"modality_share/{target}/"
        series = {
            name.removeprefix(prefix): curve
            for name, curve in curves.items()
            if name.startswith(prefix)
        }
        if series:
            title = f"Shares of the modalities in the {what}"
            chart = line_chart(title, series, "update")
            charts += _figure(title, f"<h3>{title}</h3>{chart}")
    if not charts:
        charts = (
            "<p>The run has no curves: train it with the probe <code>modality_shares</code>.</p>"
        )
    return _section("During training", charts)


def _faithfulness(numbers: Mapping[str, Any]) -> str:
    rows = []
    for method, gains in numbers["faithfulness"].items():
        name = method.replace("_", " ") + (" (chosen)" if method == numbers["method"] else "")
        cells = []
        for part in PARTS:
            mean, low, high = gains[part]
            verdict = "better" if low > 0 else "no better"
            cells.append(f"{mean:.3g} [{low:.3g}, {high:.3g}], {verdict}")
        rows.append([name, *cells])
    return _section(
        "Faithfulness",
        "<p>Gain over random rankings of the same units by insertion and deletion, in nats, with "
        "its 95 % interval, on episodes that did not choose the method.</p>",
        _table(["method", *PARTS.values()], rows),
        f"<p>Completeness error of integrated gradients: {numbers['completeness_error']:.2g}. "
        "Rank correlation with randomized weights: "
        f"{numbers['randomization_correlation']:.2f}; below 0.5 the ranking depends on what was "
        "learned.</p>",
    )


def _words(numbers: Mapping[str, Any]) -> str:
    rows = [[word, _signed(x)] for word, x in list(numbers["word_scores"].items())[:TOP_WORDS]]
    return _section("Words", _table(["word", "mean score in nats"], rows))


def _figure(name: str, content: str, attributes: str = "") -> str:
    label = html.escape(name)
    return (
        f'<article class="figure" aria-label="{label}"{attributes}>{content}'
        f'<button type="button" class="save" aria-label="Save {label} as PNG">Save as PNG</button>'
        "</article>"
    )


def _frame(frame: np.ndarray, heat: np.ndarray, bound: float, step: int) -> str:
    """Returns a frame uint8 [H, W, 3] with scores [rows, columns] over it."""
    strength = np.abs(heat)[..., None] / bound
    color = np.where(heat[..., None] > 0, np.array(FOR), np.array(AGAINST))
    rgba = np.concatenate([color, 255 * strength], axis=-1).astype(np.uint8)
    return (
        f'<div class="frame"><img src="{data_uri(frame)}" alt="Frame at step {step}">'
        f'<img class="heat" src="{data_uri(rgba)}" alt=""></div>'
    )


def _share_bar(names: Sequence[str], shares: np.ndarray) -> str:
    label = ", ".join(f"{name} {x:.0%}" for name, x in zip(names, shares, strict=True))
    parts = "".join(
        f'<i style="width: {100 * x:.1f}%; background: {line_color(i)}"></i>'
        for i, x in enumerate(shares)
    )
    label = html.escape(label)
    return f'<div class="shares" role="img" aria-label="{label}" title="{label}">{parts}</div>'


def _colored(words: Sequence[str], scores: np.ndarray, bound: float) -> str:
    """Returns words that are colored by their scores, which are shown on hover and focus."""

    def colored(word: str, score: float) -> str:
        color = _rgba(FOR if score > 0 else AGAINST, 0.55 * abs(score) / bound)
        text, value = html.escape(word), f"{_signed(score)} nats"
        return (
            f'<span class="word" tabindex="0" role="note" aria-label="{text}: {value}" '
            f'style="background: {color}">{text}<span class="tip">{value}</span></span>'
        )

    return f'<p class="words">{" ".join(map(colored, words, map(float, scores)))}</p>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f'<th scope="col">{html.escape(x)}</th>' for x in head)
    body = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(x)}</td>" for x in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="table"><table><tr>{cells}</tr>{body}</table></div>'


def _action(action: np.ndarray) -> str:
    return ", ".join(_signed(float(x)) if action.ndim else str(x) for x in np.atleast_1d(action))


def _running(explanation: "Explanation", n: int) -> np.ndarray:
    """Returns the indices of the explained steps before the end of an episode."""
    return np.flatnonzero(explanation.course.running[explanation.steps, n])


def _bound(scores: np.ndarray) -> float:
    return max(float(np.abs(scores).max(initial=0.0)), 1e-30)


def _signed(x: float) -> str:
    return f"{x:+.3g}".replace("-", "\N{MINUS SIGN}")


def _rgba(color: tuple[int, int, int], alpha: float) -> str:
    return f"rgba({color[0]}, {color[1]}, {color[2]}, {alpha:.3f})"


def _rounded(x: np.ndarray) -> Any:
    return np.round(np.asarray(x, np.float64), 5).tolist()


def _json(value: Any) -> str:
    """Encodes a value for a script element; numbers that are not finite become null."""

    def finite(x: Any) -> Any:
        if isinstance(x, Mapping):
            return {key: finite(item) for key, item in x.items()}
        if isinstance(x, list | tuple):
            return [finite(item) for item in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    # "<" would allow a word to end the element.
    return json.dumps(finite(value)).replace("<", "\\u003c")
