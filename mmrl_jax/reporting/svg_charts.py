"""Line charts as SVG within a page, whose style has the colors --line-0 to --line-3."""

from collections.abc import Mapping
import html

import numpy as np

_DASHES = ("none", "6 3", "2 3", "8 3 2 3")
_WIDTH, _HEIGHT = 360, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 8, 22, 22


def line_color(i: int) -> str:
    """Returns the color of line i, from 0 on, as a value of CSS."""
    return f"var(--line-{i % len(_DASHES)})"


def line_chart(
    title: str, series: Mapping[str, tuple[np.ndarray, np.ndarray]], x_label: str
) -> str:
    """Returns a chart of one or more lines.

    Args:
      title: Title for readers of the screen, which is not shown.
      series: Values (x, y), float [n] each, by the name of the line. Values that are not finite
        interrupt a line.
      x_label: Label of the horizontal axis.
    """
    every_x = np.concatenate([np.asarray(x, float) for x, _ in series.values()])
    every_y = np.concatenate([np.asarray(y, float) for _, y in series.values()])
    every_y = every_y[np.isfinite(every_y)]
    if not len(every_y):
        return ""
    x_range, y_range = _range(every_x), _range(every_y)
    across, up = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        right = (x - x_range[0]) / (x_range[1] - x_range[0])
        above = (y - y_range[0]) / (y_range[1] - y_range[0])
        return _LEFT + across * right, _TOP + up * (1 - above)

    lines, legend, offset = "", "", float(_LEFT)
    for i, (name, (x, y)) in enumerate(series.items()):
        dash = _DASHES[i % len(_DASHES)]
        stroke = f'style="stroke: {line_color(i)}" stroke-dasharray="{dash}"'
        pen, path = "M", ""
        for point in zip(map(float, x), map(float, y), strict=True):
            if np.isfinite(point[1]):
                path += "{}{:.1f} {:.1f}".format(pen, *at(*point))
            pen = "L" if np.isfinite(point[1]) else "M"
        lines += (
            f'<path d="{path}" fill="none" stroke-width="1.8" stroke-linecap="round" {stroke}/>'
        )
        legend += (
            f'<path d="M{offset:.0f} 9h18" stroke-width="2.4" {stroke}/>'
            f'<text x="{offset + 22:.0f}" y="13">{html.escape(name)}</text>'
        )
        offset += 34 + 6.6 * len(name)
    ends = ", ".join(f"{name} from {y[0]:.3g} to {y[-1]:.3g}" for name, (_, y) in series.items())
    label = html.escape(f"{title}: {ends}")
    return (
        f'<svg class="chart" role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        f"{_axes(x_range, y_range, x_label, at(0, 0)[1])}{lines}{legend}</svg>"
    )


def _axes(
    x_range: tuple[float, float], y_range: tuple[float, float], x_label: str, zero: float
) -> str:
    """Returns axes with the bounds of both ranges, and a line at y = 0 if it is in between."""
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    texts = (
        (_LEFT - 4, _TOP + 8, "end", f"{y_range[1]:.3g}"),
        (_LEFT - 4, bottom, "end", f"{y_range[0]:.3g}"),
        (_LEFT, _HEIGHT - 7, "start", f"{x_range[0]:.5g}"),
        ((_LEFT + right) // 2, _HEIGHT - 7, "middle", html.escape(x_label)),
        (right, _HEIGHT - 7, "end", f"{x_range[1]:.5g}"),
    )
    shown = f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none"/>'
    if y_range[0] < 0 < y_range[1]:
        shown += f'<path class="axis" d="M{_LEFT} {zero:.1f}H{right}" stroke-dasharray="1 3"/>'
    return shown + "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'
        for x, y, anchor, text in texts
    )


def _range(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)
