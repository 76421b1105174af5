"""Episodes as videos and strips of pictures, with their instructions.

imageio and PIL are imported inside the functions, so that a training host needs neither until it
draws.
"""

from collections.abc import Callable, Sequence
import math
import os
import pathlib
import tempfile
from typing import Any
import warnings

from etils import epath
import numpy as np

from mmrl_jax import workdir as workdir_lib

_TILE_PIXELS = 256
_GAP_PIXELS = 8
_FONT_PIXELS = 18
_BACKGROUND = (24, 24, 24)
_TEXT = (240, 240, 240)


def captioned(frames: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Returns the frames enlarged to at least 256 pixels, each with its caption beneath.

    Args:
        frames: uint8 `[T, H, W, 3]`.
        captions: One text for each frame; long ones are wrapped.

    Returns:
        uint8 `[T, H', W', 3]`: whole multiples of H and W (nearest neighbor, so that a pixel of
        the policy's view is a square), plus the caption's lines; H' and W' even, as video needs.

    Raises:
        ValueError: Frames of another shape or dtype, or not one caption for each.
    """
    _check_frames(frames, axes="[T, H, W, 3]")
    if len(captions) != len(frames):
        raise ValueError(f"{len(captions)} captions for {len(frames)} frames: give one for each.")
    factor = max(1, math.ceil(_TILE_PIXELS / min(frames.shape[1:3])))
    images = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    bars = _caption_bars(captions, width=images.shape[2])
    whole = np.concatenate([images, bars], axis=1)
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
) -> pathlib.Path | epath.Path:
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
    return _write_frames(file_path(path), grid, fps)


def episode_strip(
    path: str | os.PathLike[str], frames: np.ndarray, caption: str, *, count: int
) -> pathlib.Path | epath.Path:
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
    images = frames[chosen].repeat(factor, axis=1).repeat(factor, axis=2)
    row = tiled(images[:, None], columns=len(chosen))[0]
    bar = _caption_bars([caption], width=row.shape[1])[0]
    strip = np.concatenate([row, bar])

    from PIL import Image

    return saved(file_path(path), lambda place: Image.fromarray(strip).save(place))


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


def _write_frames(
    path: pathlib.Path | epath.Path, frames: np.ndarray, fps: float
) -> pathlib.Path | epath.Path:
    if not fps > 0:
        raise ValueError(f"fps is {fps}, but must be over 0.")
    with warnings.catch_warnings():
        # The child only starts ffmpeg; JAX's threads, which the warning is about, never run in it.
        warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
        if path.suffix != ".gif" and _has_ffmpeg():
            return saved(path.with_suffix(".mp4"), lambda place: _write_mp4(place, frames, fps))
    return saved(path.with_suffix(".gif"), lambda place: _write_gif(place, frames, fps))


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
    # yuv420p is what browsers play; it halves the color planes, hence the even sizes.
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

    images = [Image.fromarray(frame) for frame in frames]
    # GIF counts in hundredths of a second, and players slow down below two of them.
    duration_ms = max(20, round(100 / fps) * 10)
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration_ms, loop=0)


def _check_frames(frames: np.ndarray, *, axes: str) -> None:
    ndim = axes.count(",") + 1
    if frames.ndim != ndim or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(
            f"frames are {frames.dtype} {frames.shape}, but must be uint8 {axes}: "
            "convert floats with (255 * x).astype(np.uint8)."
        )
    if 0 in frames.shape:
        raise ValueError(f"frames have shape {frames.shape}: give at least one frame.")


def file_path(path: workdir_lib.PathLike) -> pathlib.Path | epath.Path:
    """Returns where a file lies, on a local disk or in a bucket."""
    return workdir_lib.as_path(path) if workdir_lib.is_remote(path) else pathlib.Path(path)


def saved(
    path: pathlib.Path | epath.Path, write: Callable[[pathlib.Path], None]
) -> pathlib.Path | epath.Path:
    """Makes the directory of a path, lets `write` write there, and returns the path.

    In a bucket the file is a copy of a local one, for what writes pictures knows local disks alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not workdir_lib.is_remote(path):
        write(pathlib.Path(path))
        return path
    with tempfile.TemporaryDirectory() as directory:
        local = pathlib.Path(directory) / path.name
        write(local)
        path.write_bytes(local.read_bytes())
    return path
