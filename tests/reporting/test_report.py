"""Tests of mmrl_jax.reporting.report and mmrl_jax.reporting.videos."""

import base64
import io
import json

import numpy as np
from PIL import Image
import pytest

from mmrl_jax.evaluation.prompts import Sample
from mmrl_jax.reporting import report, videos


def _frames(steps=3, size=32):
    """Returns frames of one flat color each, with a white pixel in the top left corner."""
    frames = np.zeros((steps, size, size, 3), np.uint8)
    frames[:] = (200, 40, 10)
    frames[:, 0, 0] = 255
    return frames


def _write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_captioned_enlarges_whole_pixels():
    # 32 -> 256 is a factor of 8: the white pixel becomes 8 x 8, sharp.
    big = videos.add_captions(_frames(), ["touch the red ball"] * 3)
    assert big.shape[2] == 256 and big.shape[1] > 256
    assert (big[:, :8, :8] == 255).all()
    assert (big[:, 8:256, :] == (200, 40, 10)).all()
    # Beneath it is dark, with letters in it.
    bar = big[0, 256:]
    assert (bar[0] == bar[0, 0]).all() and bar.max() > 200
    # 100 x 60 -> a factor of ceil(256 / 60) = 5; sizes even.
    odd = videos.add_captions(np.zeros((1, 100, 61, 3), np.uint8), ["x"])
    assert odd.shape[2] == 306 and odd.shape[1] >= 500 and odd.shape[1] % 2 == 0


def test_captions_differ_and_long_ones_wrap():
    texts = ["touch the red ball", "touch the green box", "touch " * 30]
    big = videos.add_captions(_frames(), texts)
    bars = big[:, 256:]
    assert not np.array_equal(bars[0], bars[1])
    # 30 words of "touch " do not fit in 256 pixels: the bar has many lines, the others one.
    assert (bars[2].max(axis=(1, 2)) > 200).sum() > 3 * (bars[0].max(axis=(1, 2)) > 200).sum()
    # Nothing is cut at the right edge.
    assert (bars[:, :, -4:] == bars[0, 0, 0]).all()


def test_tiled_puts_clips_row_by_row():
    # 3 clips of 4 x 6 in 2 columns, 8 pixels between: 4 + 8 + 4 = 16 high, 6 + 8 + 6 = 20 wide.
    clips = np.zeros((3, 2, 4, 6, 3), np.uint8)
    clips[0], clips[1], clips[2] = 10, 20, 30
    grid = videos.tile_clips(clips, columns=2)
    assert grid.shape == (2, 16, 20, 3)
    assert (grid[:, :4, :6] == 10).all()
    assert (grid[:, :4, 14:] == 20).all()
    assert (grid[:, 12:, :6] == 30).all()
    assert (grid[:, 12:, 14:] == 24).all() and (grid[:, 4:12] == 24).all()
    # One row where there are more columns than clips.
    assert videos.tile_clips(clips, columns=9).shape == (2, 4, 34, 3)


def test_mp4_reads_back(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    path = videos.episodes_video(tmp_path / "new" / "one", _frames(5)[None], ["red"], 10, 1)
    assert path == tmp_path / "new" / "one.mp4"
    reader = ffmpeg.read_frames(str(path))
    info = next(reader)
    width, height = info["size"]
    frames = [np.frombuffer(data, np.uint8).reshape(height, width, 3) for data in reader]
    assert len(frames) == 5 and info["fps"] == 10
    # Lossy, but the color is there.
    np.testing.assert_allclose(frames[2][128, 128], (200, 40, 10), atol=12)


def test_gif_where_there_is_no_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "_has_ffmpeg", lambda: False)
    frames = np.stack([_frames(3), 255 - _frames(3)])
    frames[:, 1] //= 2  # Equal frames would be merged into one.
    path = videos.episodes_video(tmp_path / "all.mp4", frames, ["one", "two"], 10, 2)
    assert path == tmp_path / "all.gif"
    with Image.open(path) as image:
        assert image.n_frames == 3
        assert image.info["duration"] == 100  # ms at 10 frames a second
        assert image.size[0] == 2 * 256 + 8
        first = np.asarray(image.convert("RGB"))
    np.testing.assert_allclose(first[128, 128], (200, 40, 10), atol=12)
    np.testing.assert_allclose(first[128, 400], (55, 215, 245), atol=12)


def test_episode_strip(tmp_path):
    frames = _frames(9)
    frames[:, 5:] = np.arange(9, dtype=np.uint8)[:, None, None, None] * 20
    path = videos.episode_strip(tmp_path / "strip.png", frames, "touch the red ball", count=3)
    picture = np.asarray(Image.open(path))
    assert picture.shape[1] == 3 * 256 + 2 * 8
    # First, middle and last of nine: 0, 4, 8.
    assert [picture[200, 264 * i + 100, 0] for i in range(3)] == [0, 80, 160]


def test_learning_curves(tmp_path):
    rows = [
        {
            "step": step,
            "progress/env_steps": 1000 * step,
            "episode/success": step / 50,
            "loss/total": None if step == 3 else 1 / (step + 1),
            "policy/entropy": -step,
        }
        for step in range(50)
    ]
    rows.insert(11, {"step": 10, "eval/train/success": 0.3})
    path = tmp_path / "metrics.jsonl"
    _write_jsonl(path, rows)
    out = report.learning_curves(path, tmp_path / "pictures" / "curves.png")
    picture = np.asarray(Image.open(out).convert("RGB"))
    assert picture.shape[1] > 1000  # Three panels in a row.
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    # The evaluation, which has no env steps of its own, lands at those of step 10.
    series = report.metric_series(rows, "progress/env_steps", report.CURVES["success"])
    assert list(series) == ["episode/success", "eval/train/success"]
    np.testing.assert_array_equal(series["eval/train/success"], ([10_000], [0.3]))
    loss_x, _ = report.metric_series(rows, "step", ("loss/total",))["loss/total"]
    assert len(loss_x) == 49 and 3 not in loss_x


def test_learning_curves_of_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    _write_jsonl(path, [])
    with pytest.raises(ValueError, match="has no rows"):
        report.learning_curves(path, tmp_path / "a.png")
    _write_jsonl(path, [{"step": 1, "lr": 0.1}])
    with pytest.raises(ValueError, match="none of the metrics"):
        report.learning_curves(path, tmp_path / "a.png")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: videos.add_captions(_frames()[0], ["a"]), r"uint8 \[T, H, W, 3\]"),
        (lambda p: videos.add_captions(_frames() / 255.0, ["a"] * 3), "float64"),
        (lambda p: videos.add_captions(_frames(), ["a"]), "1 captions for 3 frames"),
        (lambda p: videos.add_captions(_frames()[:0], []), "at least one frame"),
        (lambda p: videos.episodes_video(p, _frames()[None], ["a"], 0, 1), "fps is 0"),
        (lambda p: videos.episodes_video(p, _frames()[None], [], 9, 1), "for 1 episodes"),
        (lambda p: videos.episodes_video(p, _frames()[None], ["a"], 9, 0), "columns is 0"),
        (lambda p: videos.episode_strip(p, _frames(), "a", count=0), "count is 0"),
    ],
)
def test_bad_input(tmp_path, call, words):
    with pytest.raises(ValueError, match=words):
        call(tmp_path / "x.mp4")


def test_a_page_of_samples_is_whole_and_escaped(tmp_path):
    image = np.zeros((4, 4, 3), np.uint8)
    samples = [
        Sample(image, "is <this> one ?", "yes", "yes", 1.0, True),
        Sample(image, "and this ?", "no", "", -0.5, False),
    ]
    report.sample_table(tmp_path / "page.html", samples, "a & b")
    page = (tmp_path / "page.html").read_text()
    assert "is &lt;this&gt; one ?" in page and "a &amp; b" in page and "<this>" not in page
    assert page.count("class='text right'>yes<") == 1
    assert page.count("class='text wrong'>(nothing)<") == 1
    # Not by color alone, and rewards with as many digits below each other.
    assert (
        '.right::before { content: "\\2713' in page and '.wrong::before { content: "\\2717' in page
    )
    assert (
        "1 of 2 completions are correct" in page and "mean reward of 2 completions is 0.25" in page
    )
    assert "class='number'>1.00<" in page and "class='number'>-0.50<" in page
    encoded = page.split("base64,")[1].split("'")[0]
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))), image
    )


def test_no_sample_is_marked_where_rewards_alone_say_how_good_it_is(tmp_path):
    image = np.zeros((4, 4, 3), np.uint8)
    samples = [
        Sample(image, "?", "red", "The color is red.", 1.0, None),
        Sample(image, "?", "red", "red", 0.5, None),
        Sample(image, "?", "red", "red", float("nan"), None),
    ]
    report.sample_table(tmp_path / "page.html", samples, "title")
    page = (tmp_path / "page.html").read_text()
    assert "text right" not in page and "text wrong" not in page and "are correct" not in page
    assert "mean reward of 2 completions is 0.75. 1 have no reward" in page
    assert page.count("class='number'>none<") == 1
