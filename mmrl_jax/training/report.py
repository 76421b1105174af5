"""Pictures of a run: learning curves, videos and strips of episodes with their instructions.

matplotlib, imageio and PIL are imported inside the functions, so that a training host needs none
of them until it draws.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
import html
import io
import math
import os
import pathlib
from typing import Any
import warnings

import numpy as np

from mmrl_jax.evaluation.questions import Sample
from mmrl_jax.training import metrics

_TILE_PIXELS = 256
_GAP_PIXELS = 8
_FONT_PIXELS = 18
_BACKGROUND = (24, 24, 24)
_TEXT = (240, 240, 240)

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.4 sans-serif; margin: 2em; color: #222; }}
table {{ border-collapse: collapse; }}
th {{ position: sticky; top: 0; background: #fff; white-space: nowrap; }}
td, th {{ padding: 6px 16px; border-bottom: 1px solid #ddd; text-align: left; }}
td.text {{ max-width: 28em; white-space: pre-wrap; overflow-wrap: anywhere; }}
td.reward, th.reward {{ text-align: right; font-variant-numeric: tabular-nums; }}
img {{ width: 128px; image-rendering: pixelated; display: block; }}
.right {{ color: #187a2f; }} .wrong {{ color: #b3261e; }}
.right::before {{ content: "\\2713\\00a0"; }} .wrong::before {{ content: "\\2717\\00a0"; }}
</style></head><body><h1>{title}</h1>
<p>{right} of {all} answers are the right one, word for word (&#10003;); the others are marked
&#10007;.</p>
<table><tr><th>picture</th><th>question</th><th>right answer</th><th>answer</th>
<th class="reward">reward</th></tr>
{rows}
</table></body></html>
"""

# One panel each; a name may hold a `<part>` as in the glossary. Panels without data are left out.
CURVES: dict[str, tuple[str, ...]] = {
    "success": ("episode/success", "eval/<split>/success"),
    "right answers": ("answer/correct", "eval/<split>/accuracy", "eval/<split>/blind_accuracy"),
    "answer length": ("answer/length",),
    "return": ("episode/return", "eval/<split>/return"),
    "reward functions": ("eval/<split>/reward/<function>",),
    "total loss": ("loss/total",),
    "policy loss": ("loss/policy",),
    "value loss": ("loss/value",),
    "cloning loss": ("loss/cloning",),
    "auxiliary loss": ("loss/auxiliary",),
    "KL per update": ("policy/kl",),
    "entropy": ("policy/entropy",),
    "explained variance": ("value/explained_variance",),
    "gradient norm": ("grad/norm",),
}


def learning_curves(
    jsonl_path: str | os.PathLike[str],
    out_png: str | os.PathLike[str],
    *,
    x: str = "progress/env_steps",
) -> pathlib.Path:
    """Draws small multiples of what a run logged.

    Args:
        jsonl_path: `metrics.jsonl` of a run.
        out_png: Picture to write; its directory is made if absent.
        x: Name of the horizontal axis, or "step". Where the file does not have it, "step". A line
            without it gets the value of the last line that had it, so an evaluation written by
            itself still lands in its place.

    Returns:
        The path written.

    Raises:
        ValueError: The file has no line, or none of the names in `CURVES`.
    """
    rows = metrics.read_jsonl(jsonl_path)
    if not rows:
        raise ValueError(f"{jsonl_path} has no line: give the metrics.jsonl of a run that began.")
    if not any(x in row for row in rows):
        x = "step"
    panels = {title: _series(rows, x, names) for title, names in CURVES.items()}
    panels = {title: series for title, series in panels.items() if series}
    if not panels:
        raise ValueError(f"{jsonl_path} has none of the metrics that learning curves show.")

    # The figure is made without pyplot: no global state, and no display is looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    label = "step" if x == "step" else metrics.lookup(x).meaning.lower()
    for axis, (title, series) in zip(axes.flat, panels.items(), strict=False):
        for name, (across, values) in series.items():
            _draw_curve(axis, across, values, name)
        unit = metrics.lookup(next(iter(series))).unit
        axis.set_title(title if unit == "1" else f"{title} ({unit})", fontsize=10)
        axis.set_xlabel(label, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if unit == "fraction":
            axis.set_ylim(-0.03, 1.03)
        if len(series) > 1:
            axis.legend(fontsize=7)
    return _saved(pathlib.Path(out_png), lambda path: figure.savefig(path, dpi=110))


def stage_curves(
    lines: Mapping[str, Sequence[str | os.PathLike[str]]],
    out_png: str | os.PathLike[str],
    *,
    metric: str,
) -> pathlib.Path:
    """Draws one metric over the time of the updates, of stages that follow each other.

    Args:
        lines: Label to the workdirs of a stage and of those before it, the earliest first. The last
            one's values are drawn, to the right of the time that the others took, from where
            the one before it ended.
        out_png: Picture to write; its directory is made if absent.
        metric: Name of the metric; where `<metric>_lo` and `<metric>_hi` were logged too, they are
            drawn as a band.

    Returns:
        The path written.

    Raises:
        ValueError: A stage logged no value of the metric.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    wanted = (metric, f"{metric}_lo", f"{metric}_hi")
    for label, workdirs in lines.items():
        before_s, points = 0.0, np.empty((0, 4))
        for workdir in workdirs:
            rows = metrics.read_jsonl(pathlib.Path(workdir) / metrics.JSONL_NAME)
            found = [
                (before_s + row["time/wall_s"], *(row.get(name, row[metric]) for name in wanted))
                for row in rows
                if row.get(metric) is not None
            ]
            if not found:
                raise ValueError(f"{workdir} logged no {metric}: nothing to draw for '{label}'.")
            points = np.concatenate([points[-1:], np.array(found, float)])
            before_s += rows[-1]["time/wall_s"]
        minutes, middle, low, high = points.T
        (line,) = axis.plot(minutes / 60, middle, label=label, marker="o", markersize=3)
        axis.fill_between(minutes / 60, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axis.set_xlabel("time of the updates (minutes)")
    axis.set_ylabel(metric)
    if metrics.lookup(metric).unit == "fraction":
        axis.set_ylim(-0.03, 1.03)
    axis.grid(alpha=0.3)
    axis.legend()
    return _saved(pathlib.Path(out_png), lambda path: figure.savefig(path, dpi=110))


def study_figure(
    intervals: Mapping[str, tuple[float, float, float]],
    scores: Mapping[str, Sequence[float]],
    out_png: str | os.PathLike[str],
    *,
    metric: str,
) -> pathlib.Path:
    """Draws a study: each variant's interval, and the fraction of its runs above every score.

    Args:
        intervals: Variant -> (interquartile mean, low, high).
        scores: Variant -> one score for each run.
        out_png: Picture to write; its directory is made if absent.
        metric: What the scores are, for the axes.

    Returns:
        The path written.

    Source: performance profiles are those of Agarwal et al., NeurIPS 2021, section 4.2.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.5 + 0.5 * max(4, len(intervals))), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for i, (variant, (mean, low, high)) in enumerate(intervals.items()):
        colour = f"C{i}"
        left.errorbar(mean, i, xerr=[[mean - low], [high - mean]], fmt="o", capsize=4, color=colour)
        runs = np.sort(np.asarray(scores[variant], float))
        above = 1 - np.arange(len(runs) + 1) / len(runs)
        right.stairs(
            above,
            [min(0.0, runs[0]), *runs, max(1.0, runs[-1])],
            baseline=None,
            color=colour,
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
    return _saved(pathlib.Path(out_png), lambda path: figure.savefig(path, dpi=110))


def captioned(frames: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Returns the frames enlarged to at least 256 pixels, each with its caption beneath.

    Args:
        frames: uint8 `[T, H, W, 3]`.
        captions: One text for each frame; long ones are wrapped.

    Returns:
        uint8 `[T, H', W', 3]`: whole multiples of H and W (nearest neighbour, so that a pixel of
        the policy's view is a square), plus the caption's lines; H' and W' even, as video needs.

    Raises:
        ValueError: Frames of another shape or dtype, or not one caption for each.
    """
    _check_frames(frames, axes="[T, H, W, 3]")
    if len(captions) != len(frames):
        raise ValueError(f"{len(captions)} captions for {len(frames)} frames: give one for each.")
    factor = max(1, math.ceil(_TILE_PIXELS / min(frames.shape[1:3])))
    pictures = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    bars = _caption_bars(captions, width=pictures.shape[2])
    whole = np.concatenate([pictures, bars], axis=1)
    height, width = whole.shape[1:3]
    return _padded(whole, height + height % 2, width + width % 2)


def tiled(clips: np.ndarray, *, columns: int) -> np.ndarray:
    """Returns clips side by side.

    Args:
        clips: uint8 `[N, T, H, W, 3]`.
        columns: Clips in a row, at least 1.

    Returns:
        uint8 `[T, rows * H + gaps, columns * W + gaps, 3]`, row by row; unused places are dark.
    """
    _check_frames(clips, axes="[N, T, H, W, 3]")
    if columns < 1:
        raise ValueError(f"columns is {columns}, but must be at least 1.")
    count, steps, height, width, _ = clips.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    down, across = height + _GAP_PIXELS, width + _GAP_PIXELS
    grid = np.empty((steps, rows * down - _GAP_PIXELS, columns * across - _GAP_PIXELS, 3), np.uint8)
    grid[:] = _BACKGROUND
    for i, clip in enumerate(clips):
        top, left = i // columns * down, i % columns * across
        grid[:, top : top + height, left : left + width] = clip
    return grid


def episodes_video(
    path: str | os.PathLike[str],
    frames: np.ndarray,
    captions: Sequence[str],
    fps: float,
    columns: int,
) -> pathlib.Path:
    """Writes episodes side by side, each with its caption, as mp4 where ffmpeg is there, or gif.

    Args:
        path: File to write; its suffix becomes `.mp4` or `.gif`. A path that ends in `.gif` is
            always written as gif.
        frames: uint8 `[N, T, H, W, 3]`.
        captions: One text for each episode.
        fps: Frames per second, over 0.
        columns: Episodes in a row, at least 1.

    Returns:
        The path written.

    Raises:
        ValueError: Frames of another shape or dtype, not one caption for each episode, fps or
            columns out of range.
    """
    _check_frames(frames, axes="[N, T, H, W, 3]")
    count, steps = frames.shape[:2]
    if len(captions) != count:
        raise ValueError(f"{len(captions)} captions for {count} episodes: give one for each.")
    # All at once: the caption bars then have one height.
    every_caption = [caption for caption in captions for _ in range(steps)]
    clips = captioned(frames.reshape(-1, *frames.shape[2:]), every_caption)
    grid = tiled(clips.reshape(count, steps, *clips.shape[1:]), columns=columns)
    return _write_frames(pathlib.Path(path), grid, fps)


def episode_strip(
    path: str | os.PathLike[str], frames: np.ndarray, caption: str, *, count: int
) -> pathlib.Path:
    """Writes one episode as a PNG: `count` frames from first to last in a row, caption beneath.

    Args:
        path: Picture to write.
        frames: uint8 `[T, H, W, 3]`.
        caption: Text of the whole strip.
        count: Frames to show, at least 1; evenly spaced.

    Returns:
        The path written.

    Raises:
        ValueError: Frames of another shape or dtype, or count below 1.
    """
    _check_frames(frames, axes="[T, H, W, 3]")
    if count < 1:
        raise ValueError(f"count is {count}, but must be at least 1.")
    chosen = np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))
    factor = max(1, math.ceil(_TILE_PIXELS / min(frames.shape[1:3])))
    pictures = frames[chosen].repeat(factor, axis=1).repeat(factor, axis=2)
    row = tiled(pictures[:, None], columns=len(chosen))[0]
    bar = _caption_bars([caption], width=row.shape[1])[0]
    strip = np.concatenate([row, bar])

    from PIL import Image

    return _saved(pathlib.Path(path), lambda place: Image.fromarray(strip).save(place))


def _series(
    rows: Sequence[dict[str, Any]], x: str, patterns: Sequence[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns {name: (x values, y values)} of the names that match, in the order of patterns."""
    names = [
        name
        for pattern in patterns
        for name in dict.fromkeys(key for row in rows for key in row)
        if metrics.matches(pattern, name)
    ]
    series = {}
    for name in names:
        last, points = 0.0, []
        for row in rows:
            last = row.get(x, last)
            if row.get(name) is not None:
                points.append((last, row[name]))
        if points:
            across, values = np.array(points, float).T
            series[name] = (across, values)
    return series


def _draw_curve(axis: Any, across: np.ndarray, values: np.ndarray, name: str) -> None:
    """Draws the values, and over a long noisy curve its centred running mean."""
    window = len(values) // 20
    if window < 2:
        axis.plot(across, values, label=name, linewidth=1.2, marker="." if len(values) < 9 else "")
        return
    (line,) = axis.plot(across, values, linewidth=0.6, alpha=0.35)
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    start = window // 2
    axis.plot(
        across[start : start + len(mean)], mean, label=name, linewidth=1.4, color=line.get_color()
    )


def sample_table(path: str | os.PathLike[str], samples: Sequence[Sample], title: str) -> None:
    """Writes a page of questions with their pictures, right and given answers and rewards.

    The pictures are inside the page, so that it can be copied by itself.

    Args:
        path: HTML file to write.
        samples: its rows.
        title: of the page.
    """
    rows = "\n".join(
        "<tr><td><img src='data:image/png;base64,{}' alt=''></td><td class='text'>{}</td>"
        "<td class='text'>{}</td><td class='text {}'>{}</td><td class='reward'>{:.2f}</td></tr>"
        "".format(
            _png(sample.image),
            html.escape(sample.question),
            html.escape(sample.right),
            "right" if sample.answer == sample.right else "wrong",
            html.escape(sample.answer) or "(nothing)",
            sample.reward,
        )
        for sample in samples
    )
    right = sum(sample.answer == sample.right for sample in samples)
    page = _PAGE.format(title=html.escape(title), right=right, all=len(samples), rows=rows)

    def write(place: pathlib.Path) -> None:
        place.write_text(page, encoding="utf-8")

    _saved(pathlib.Path(path), write)


def _png(image: np.ndarray) -> str:
    """A picture uint8 [H, W, 3] as base64 of a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _caption_bars(captions: Sequence[str], *, width: int) -> np.ndarray:
    """Returns uint8 `[len(captions), h, width, 3]`; h fits the caption with the most lines."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=_FONT_PIXELS)
    line_pixels = _FONT_PIXELS + 6
    wrapped = {text: _wrap(text, font, width - 2 * _GAP_PIXELS) for text in dict.fromkeys(captions)}
    height = max(len(lines) for lines in wrapped.values()) * line_pixels + _GAP_PIXELS
    bars = {}
    for text, lines in wrapped.items():
        image = Image.new("RGB", (width, height), _BACKGROUND)
        draw = ImageDraw.Draw(image)
        for i, line in enumerate(lines):
            draw.text((_GAP_PIXELS, i * line_pixels + 3), line, font=font, fill=_TEXT)
        bars[text] = np.asarray(image)
    return np.stack([bars[text] for text in captions])


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Returns the lines of a text, broken at spaces; a longer word has a line of its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _padded(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    whole = np.empty((len(frames), height, width, 3), np.uint8)
    whole[:] = _BACKGROUND
    whole[:, : frames.shape[1], : frames.shape[2]] = frames
    return whole


def _write_frames(path: pathlib.Path, frames: np.ndarray, fps: float) -> pathlib.Path:
    if not fps > 0:
        raise ValueError(f"fps is {fps}, but must be over 0.")
    with warnings.catch_warnings():
        # The child only starts ffmpeg; JAX's threads, which the warning is about, never run in it.
        warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
        if path.suffix != ".gif" and _has_ffmpeg():
            return _saved(path.with_suffix(".mp4"), lambda place: _write_mp4(place, frames, fps))
    return _saved(path.with_suffix(".gif"), lambda place: _write_gif(place, frames, fps))


def _has_ffmpeg() -> bool:
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        return False
    return True


def _write_mp4(path: pathlib.Path, frames: np.ndarray, fps: float) -> None:
    import imageio_ffmpeg

    height, width = frames.shape[1:3]
    frames = _padded(frames, height + height % 2, width + width % 2)
    # yuv420p is what browsers play; it halves the colour planes, hence the even sizes.
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (frames.shape[2], frames.shape[1]),
        fps=fps,
        codec="libx264",
        pix_fmt_out="yuv420p",
        macro_block_size=1,
        quality=8,
        ffmpeg_log_level="error",
    )
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def _write_gif(path: pathlib.Path, frames: np.ndarray, fps: float) -> None:
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in frames]
    # GIF counts in hundredths of a second, and players slow down below two of them.
    duration_ms = max(20, round(100 / fps) * 10)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=duration_ms, loop=0)


def _saved(path: pathlib.Path, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    return path


def _check_frames(frames: np.ndarray, *, axes: str) -> None:
    ndim = axes.count(",") + 1
    if frames.ndim != ndim or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(
            f"frames are {frames.dtype} {frames.shape}, but must be uint8 {axes}: "
            "convert floats with (255 * x).astype(np.uint8)."
        )
    if 0 in frames.shape:
        raise ValueError(f"frames have shape {frames.shape}: give at least one frame.")
