"""Frames of video files, decoded with the ffmpeg that imageio-ffmpeg brings."""

from collections.abc import Iterator
import pathlib
from typing import Any

import numpy as np

from mmrl_jax.data.records import Invalid


class VideoFrames:
    """Reads frames of video files in order.

    Frames that follow those of the last call are decoded without a seek, so that reading a file
    from front to back decodes each frame once. Seeking by time is not used, because it may be off
    by a frame; an earlier frame is reached from the start of the file.
    """

    def __init__(self) -> None:
        self._path: pathlib.Path | None = None
        self._next = 0
        self._frames: Iterator[np.ndarray] = iter(())

    def read(self, path: pathlib.Path, start: int, count: int) -> np.ndarray:
        """Returns frames of a file, uint8 [count, H, W, 3].

        Args:
          path: Path of the file.
          start: Number of the first frame.
          count: Number of frames.

        Raises:
          Invalid: If the file is missing, or has fewer frames that can be decoded.
        """
        if not path.is_file():
            raise Invalid("missing video", f"{path} does not exist.")
        if path != self._path or start < self._next:
            self._path, self._next, self._frames = path, 0, _decoded(path)
        frames = []
        try:
            while self._next < start + count:
                frame = next(self._frames)
                if self._next >= start:
                    frames.append(frame)
                self._next += 1
        except Exception as error:  # ffmpeg fails in many ways, StopIteration among them.
            found, self._path = self._next, None
            raise Invalid(
                "truncated video",
                f"{path} has {found} frames that can be decoded, but frames {start} to "
                f"{start + count - 1} are needed"
                + ("." if isinstance(error, StopIteration) else f" ({error})."),
            ) from error
        return np.stack(frames)


def _decoded(path: pathlib.Path) -> Iterator[np.ndarray]:
    """Yields the frames of a file, uint8 [H, W, 3]."""
    import imageio_ffmpeg

    # Every stored frame is given once, also where the times of frames are irregular.
    options = ["-fps_mode", "passthrough"]
    frames: Iterator[Any] = imageio_ffmpeg.read_frames(str(path), output_params=options)
    width, height = next(frames)["size"]
    for data in frames:
        yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
