"""Videos and strips of frames of episodes, with their instructions as captions.

imageio and PIL are imported inside the functions, so that training itself does not need them.
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


def add_captions(frames: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Returns the frames enlarged to at least 256 pixels, each with a caption below.

    Args:
        frames: Frames, uint8 `[T, H, W, 3]`.
        captions: Caption of each frame. Long captions are wrapped.

    Returns:
        Captioned frames, uint8 `[T, H', W', 3]`. They are enlarged by an integer factor (nearest
        neighbor, so that a pixel becomes a square), then the lines of the caption are appended, and
        H' and W' are padded to even numbers, which video codecs require.

    Raises:
        ValueError: If the frames have another shape or dtype, or the number of captions is not the
            number of frames.
    """
    _check_frames(frames, axes="[T, H, W, 3]")
    if len(captions) != len(frames):
        raise ValueError(f"{len(captions)} captions for {len(frames)} frames: give one for each.")
    factor = max(1, math.ceil(_TILE_PIXELS / min(frames.shape[1:3])))
    enlarged = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    bars = _caption_bars(captions, width=enlarged.shape[2])
    with_bars = np.concatenate([enlarged, bars], axis=1)
    height, width = with_bars.shape[1:3]
    return _padded(with_bars, height + height % 2, width + width % 2)


def tile_clips(clips: np.ndarray, *, columns: int) -> np.ndarray:
    """Arranges clips in a grid, row by row.

    Args:
        clips: Clips, uint8 `[N, T, H, W, 3]`.
        columns: Number of clips in a row, at least 1.

    Returns:
        Frames of the grid, uint8 `[T, rows * H + gaps, columns * W + gaps, 3]`. Unused cells are
        dark.
    """
    _check_frames(clips, axes="[N, T, H, W, 3]")
    if columns < 1:
        raise ValueError(f"columns is {columns}, but must be at least 1.")
    count, steps, height, width, _ = clips.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    pitch_y, pitch_x = height + _GAP_PIXELS, width + _GAP_PIXELS
    grid_size = rows * pitch_y - _GAP_PIXELS, columns * pitch_x - _GAP_PIXELS
    grid = np.empty((steps, *grid_size, 3), np.uint8)
    grid[:] = _BACKGROUND
    for i, clip in enumerate(clips):
        top, left = i // columns * pitch_y, i % columns * pitch_x
        grid[:, top : top + height, left : left + width] = clip
    return grid


def episodes_video(
    path: str | os.PathLike[str],
    frames: np.ndarray,
    captions: Sequence[str],
    fps: float,
    columns: int,
) -> pathlib.Path | epath.Path:
    """Writes a video of captioned episodes in a grid, as mp4 if ffmpeg is available, else as gif.

    Args:
        path: File to write. Its suffix is replaced by `.mp4` or `.gif`; a path that ends in `.gif`
            is always written as gif.
        frames: Frames of N episodes, uint8 `[N, T, H, W, 3]`.
        captions: Caption of each episode.
        fps: Frames per second, above 0.
        columns: Number of episodes in a row, at least 1.

    Returns:
        The path of the written file.

    Raises:
        ValueError: If the frames have another shape or dtype, the number of captions is not the
            number of episodes, or `fps` or `columns` is out of range.
    """
    _check_frames(frames, axes="[N, T, H, W, 3]")
    count, steps = frames.shape[:2]
    if len(captions) != count:
        raise ValueError(f"{len(captions)} captions for {count} episodes: give one for each.")
    # All episodes are captioned at once, so that all caption bars have the same height.
    every_caption = [caption for caption in captions for _ in range(steps)]
    clips = add_captions(frames.reshape(-1, *frames.shape[2:]), every_caption)
    grid = tile_clips(clips.reshape(count, steps, *clips.shape[1:]), columns=columns)
    return _write_frames(file_path(path), grid, fps)


def episode_strip(
    path: str | os.PathLike[str], frames: np.ndarray, caption: str, *, count: int
) -> pathlib.Path | epath.Path:
    """Writes `count` frames of an episode as a PNG, in a row from first to last, with a caption.

    Args:
        path: PNG file to write.
        frames: Frames of the episode, uint8 `[T, H, W, 3]`.
        caption: Caption of the strip.
        count: Number of frames to show, evenly spaced, at least 1.

    Returns:
        The path of the written file.

    Raises:
        ValueError: If the frames have another shape or dtype, or `count` is below 1.
    """
    _check_frames(frames, axes="[T, H, W, 3]")
    if count < 1:
        raise ValueError(f"count is {count}, but must be at least 1.")
    chosen = np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))
    factor = max(1, math.ceil(_TILE_PIXELS / min(frames.shape[1:3])))
    enlarged = frames[chosen].repeat(factor, axis=1).repeat(factor, axis=2)
    row = tile_clips(enlarged[:, None], columns=len(chosen))[0]
    bar = _caption_bars([caption], width=row.shape[1])[0]
    strip = np.concatenate([row, bar])

    from PIL import Image

    return save_file(file_path(path), lambda local_path: Image.fromarray(strip).save(local_path))


def _caption_bars(captions: Sequence[str], *, width: int) -> np.ndarray:
    """Renders captions as uint8 `[N, h, width, 3]`; h fits the caption with the most lines."""
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
    """Wraps a text at spaces into lines of `width` pixels; a longer word gets a separate line."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _padded(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    padded = np.empty((len(frames), height, width, 3), np.uint8)
    padded[:] = _BACKGROUND
    padded[:, : frames.shape[1], : frames.shape[2]] = frames
    return padded


def _write_frames(
    path: pathlib.Path | epath.Path, frames: np.ndarray, fps: float
) -> pathlib.Path | epath.Path:
    if not fps > 0:
        raise ValueError(f"fps is {fps}, but must be above 0.")
    with warnings.catch_warnings():
        # The warning is about JAX's threads, which the child never runs: it only starts ffmpeg.
        warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
        if path.suffix != ".gif" and _has_ffmpeg():
            return save_file(path.with_suffix(".mp4"), lambda local: _write_mp4(local, frames, fps))
    return save_file(path.with_suffix(".gif"), lambda local: _write_gif(local, frames, fps))


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
    # Browsers require yuv420p, which halves the color planes and therefore needs even sizes.
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
    # GIF stores durations in hundredths of a second, and players slow down below two of them.
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
    """Returns a path in a bucket as `epath.Path`, and a local path as `pathlib.Path`."""
    return workdir_lib.as_path(path) if workdir_lib.is_remote(path) else pathlib.Path(path)


def save_file(
    path: pathlib.Path | epath.Path, write: Callable[[pathlib.Path], None]
) -> pathlib.Path | epath.Path:
    """Writes a file, which may be in a bucket, with a function that writes local files only.

    Args:
        path: File to write. Its directory is created if it does not exist.
        write: Writes the file to the local path that it is given. For a path in a bucket that is a
            temporary file, which is then copied.

    Returns:
        `path`.
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
