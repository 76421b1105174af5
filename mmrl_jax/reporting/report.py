"""Reports of a run and of a study: learning curves, intervals and a page of sample completions.

matplotlib and PIL are imported inside the functions, so that training itself does not need them.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import html
import io
import math
import os
import pathlib
import sys
from typing import Any

from etils import epath
import numpy as np

from mmrl_jax import workdir as workdir_lib
from mmrl_jax.distributed import multihost
from mmrl_jax.evaluation.prompts import Sample
from mmrl_jax.monitoring import metric_definitions, metrics
from mmrl_jax.reporting.videos import file_path, save_file

# Style of the pages with tables of samples.
STYLE = """body { font: 16px/1.4 sans-serif; margin: 2em; color: #222; }
table { border-collapse: collapse; }
td, th { padding: 6px 16px; border-bottom: 1px solid #ddd; text-align: left; }
td.text { max-width: 28em; white-space: pre-wrap; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
img { image-rendering: pixelated; display: block; }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
{style}th {{ position: sticky; top: 0; background: #fff; white-space: nowrap; }}
img {{ width: 128px; }}
.right {{ color: #187a2f; }} .wrong {{ color: #b3261e; }}
.right::before {{ content: "\\2713\\00a0"; }} .wrong::before {{ content: "\\2717\\00a0"; }}
</style></head><body><h1>{title}</h1>
<p>{summary}</p>
<table><tr><th>image</th><th>prompt</th><th>reference</th><th>completion</th>
<th class="number">reward</th></tr>
{rows}
</table></body></html>
"""

# Metrics of each panel by its title. A name may contain a `<part>`, as in `METRIC_DEFINITIONS`.
# Panels without data are omitted.
CURVES: dict[str, tuple[str, ...]] = {
    "success": ("episode/success", "eval/<split>/success"),
    "accuracy": (
        "completion/correct",
        "eval/<split>/accuracy",
        "eval/<split>/shuffled_image/accuracy",
    ),
    "completion length": ("completion/length",),
    "return": ("episode/return", "eval/<split>/return"),
    "reward functions": ("eval/<split>/reward/<function>",),
    "total loss": ("loss/total",),
    "policy loss": ("loss/policy",),
    "value loss": ("loss/value", "loss/critic"),
    "behavior cloning loss": ("loss/bc", "loss/awr"),
    "auxiliary loss": ("loss/auxiliary",),
    "KL per update": ("policy/approx_kl",),
    "entropy": ("policy/entropy",),
    "explained variance": ("value/explained_variance",),
    "gradient norm": ("grad/norm",),
}


@contextlib.contextmanager
def tolerate_errors(what: str) -> Iterator[None]:
    """Prints an error instead of raising it, because a failed report must not end the run.

    Args:
      what: Description of the action, which begins the message, for example "Drawing curves.png".
    """
    try:
        yield
    except Exception as error:
        if multihost.is_lost(error):
            raise
        print(
            f"{what} failed, and the run continues without it: {workdir_lib.one_line(error)}",
            file=sys.stderr,
            flush=True,
        )


def learning_curves(
    jsonl_path: str | os.PathLike[str],
    out_png: str | os.PathLike[str],
    *,
    x: str = "progress/env_steps",
) -> pathlib.Path | epath.Path:
    """Plots the logged metrics of a run in a grid of panels.

    Args:
        jsonl_path: Path of the `metrics.jsonl` of a run.
        out_png: PNG file to write. Its directory is created if it does not exist.
        x: Metric of the horizontal axis, or "step", which is also used if the file does not have
            the metric. A row without the metric, for example of a separate evaluation, gets the
            value of the last row that has it.

    Returns:
        The path of the written file.

    Raises:
        ValueError: If the file has no rows, or none of the metrics in `CURVES`.
    """
    rows = metrics.read_jsonl(jsonl_path)
    if not rows:
        raise ValueError(f"{jsonl_path} has no rows: give the metrics.jsonl of a run that began.")
    if not any(x in row for row in rows):
        x = "step"
    panels = {title: metric_series(rows, x, names) for title, names in CURVES.items()}
    panels = {title: series for title, series in panels.items() if series}
    if not panels:
        raise ValueError(f"{jsonl_path} has none of the metrics in report.CURVES.")

    # The figure is made without pyplot, which has global state and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    label = "step" if x == "step" else metric_definitions.lookup(x).meaning.lower()
    for axis, (title, series) in zip(axes.flat, panels.items(), strict=False):
        for name, (x_values, values) in series.items():
            _draw_curve(axis, x_values, values, name)
        unit = metric_definitions.lookup(next(iter(series))).unit
        axis.set_title(title if unit == "1" else f"{title} ({unit})", fontsize=10)
        axis.set_xlabel(label, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if unit == "fraction":
            axis.set_ylim(-0.03, 1.03)
        if len(series) > 1:
            axis.legend(fontsize=7)
    return save_file(file_path(out_png), lambda path: figure.savefig(path, dpi=110))


def stage_curves(
    lines: Mapping[str, Sequence[str | os.PathLike[str]]],
    out_png: str | os.PathLike[str],
    *,
    metric: str,
) -> pathlib.Path | epath.Path:
    """Plots one metric of consecutive stages over the training time.

    Args:
        lines: Workdirs of consecutive stages by the label of their line. The values of the last
            stage are plotted. They are shifted by the training time of the earlier stages and begin
            with the last value of the stage before.
        out_png: PNG file to write. Its directory is created if it does not exist.
        metric: Name of the metric. If `<metric>_lo` and `<metric>_hi` were logged too, they are
            plotted as a band.

    Returns:
        The path of the written file.

    Raises:
        ValueError: If a stage logged no value of the metric.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    names = (metric, f"{metric}_lo", f"{metric}_hi")
    for label, workdirs in lines.items():
        before_s, points = 0.0, np.empty((0, 4))
        for workdir in workdirs:
            rows = metrics.read_jsonl(workdir_lib.as_path(workdir) / metrics.JSONL_NAME)
            logged = [
                (before_s + row["time/wall_s"], *(row.get(name, row[metric]) for name in names))
                for row in rows
                if row.get(metric) is not None
            ]
            if not logged:
                raise ValueError(f"{workdir} logged no {metric}: '{label}' cannot be plotted.")
            points = np.concatenate([points[-1:], np.array(logged, float)])
            before_s += rows[-1]["time/wall_s"]
        seconds, values, low, high = points.T
        (line,) = axis.plot(seconds / 60, values, label=label, marker="o", markersize=3)
        axis.fill_between(seconds / 60, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axis.set_xlabel("training time (minutes)")
    axis.set_ylabel(metric)
    if metric_definitions.lookup(metric).unit == "fraction":
        axis.set_ylim(-0.03, 1.03)
    axis.grid(alpha=0.3)
    axis.legend()
    return save_file(file_path(out_png), lambda path: figure.savefig(path, dpi=110))


def study_figure(
    intervals: Mapping[str, tuple[float, float, float]],
    scores: Mapping[str, Sequence[float]],
    out_png: str | os.PathLike[str],
    *,
    metric: str,
) -> pathlib.Path | epath.Path:
    """Plots the interval of each variant of a study, and the performance profiles of its runs.

    Args:
        intervals: (interquartile mean, low, high) by the name of the variant.
        scores: One score for each run by the name of the variant.
        out_png: PNG file to write. Its directory is created if it does not exist.
        metric: Name of the scores for the axis labels.

    Returns:
        The path of the written file.

    Source: Agarwal et al., NeurIPS 2021, section 4.2 (performance profiles).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.5 + 0.5 * max(4, len(intervals))), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for i, (variant, (mean, low, high)) in enumerate(intervals.items()):
        color = f"C{i}"
        left.errorbar(mean, i, xerr=[[mean - low], [high - mean]], fmt="o", capsize=4, color=color)
        runs = np.sort(np.asarray(scores[variant], float))
        above = 1 - np.arange(len(runs) + 1) / len(runs)
        right.stairs(
            above,
            [min(0.0, runs[0]), *runs, max(1.0, runs[-1])],
            baseline=None,
            color=color,
            label=variant,
        )
    left.set_yticks(range(len(intervals)), intervals)
    left.invert_yaxis()
    left.set_xlabel(f"{metric}, IQM with 95 % interval")
    left.grid(axis="x", alpha=0.3)
    right.set_xlabel(f"score in {metric}")
    right.set_ylabel("fraction of runs above it")
    figure.legend(*right.get_legend_handles_labels(), loc="outside right center")
    right.grid(alpha=0.3)
    return save_file(file_path(out_png), lambda path: figure.savefig(path, dpi=110))


def metric_series(
    rows: Sequence[dict[str, Any]], x: str, patterns: Sequence[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns {name: (x values, y values)} of the metrics that match, in the order of patterns."""
    names = [
        name
        for pattern in patterns
        for name in dict.fromkeys(key for row in rows for key in row)
        if metric_definitions.matches(pattern, name)
    ]
    series = {}
    for name in names:
        last, points = 0.0, []
        for row in rows:
            last = row.get(x, last)
            if row.get(name) is not None:
                points.append((last, row[name]))
        if points:
            x_values, values = np.array(points, float).T
            series[name] = (x_values, values)
    return series


def _draw_curve(axis: Any, x_values: np.ndarray, values: np.ndarray, name: str) -> None:
    """Plots the values of a metric, and for a long curve its centered running mean too."""
    window = len(values) // 20
    if window < 2:
        marker = "." if len(values) < 9 else ""
        axis.plot(x_values, values, label=name, linewidth=1.2, marker=marker)
        return
    (line,) = axis.plot(x_values, values, linewidth=0.6, alpha=0.35)
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    start = window // 2
    axis.plot(
        x_values[start : start + len(mean)], mean, label=name, linewidth=1.4, color=line.get_color()
    )


def sample_table(path: str | os.PathLike[str], samples: Sequence[Sample], title: str) -> None:
    """Writes a page with a table of prompts, images, references, completions and rewards.

    The images are embedded, so that the page is a single file.

    Args:
        path: HTML file to write.
        samples: Samples, one for each row of the table.
        title: Title of the page.
    """
    rows = "\n".join(
        "<tr><td><img src='{}' alt=''></td><td class='text'>{}</td>"
        "<td class='text'>{}</td><td class='text {}'>{}</td><td class='number'>{}</td></tr>"
        "".format(
            data_uri(sample.image),
            html.escape(sample.prompt),
            html.escape(sample.answer),
            {True: "right", False: "wrong", None: ""}[sample.correct],
            html.escape(sample.completion) or "(nothing)",
            f"{sample.reward:.2f}" if math.isfinite(sample.reward) else "none",
        )
        for sample in samples
    )
    page = _PAGE.format(title=html.escape(title), style=STYLE, summary=_summary(samples), rows=rows)
    write_page(path, page)


def write_page(path: str | os.PathLike[str], page: str) -> None:
    """Writes an HTML file in UTF-8."""

    def write(local_path: pathlib.Path) -> None:
        local_path.write_text(page, encoding="utf-8")

    save_file(file_path(path), write)


def _summary(samples: Sequence[Sample]) -> str:
    """Returns sentences with the number of correct samples, if known, and their mean reward."""
    rewards = [sample.reward for sample in samples if math.isfinite(sample.reward)]
    texts = []
    if any(sample.correct is not None for sample in samples):
        correct = sum(sample.correct is True for sample in samples)
        texts.append(
            f"{correct} of {len(samples)} completions are correct (&#10003;); the others are "
            "marked &#10007;."
        )
    if rewards:
        texts.append(f"The mean reward of {len(rewards)} completions is {np.mean(rewards):.2f}.")
    if len(rewards) < len(samples):
        missing = len(samples) - len(rewards)
        texts.append(f"{missing} have no reward, because a reward function failed or none applies.")
    return " ".join(texts)


def data_uri(image: np.ndarray) -> str:
    """Returns an image uint8 [H, W, 3], or [H, W, 4] with opacity, as a PNG within a URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
