"""Tests of mmrl_jax.monitoring.metrics."""

import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from mmrl_jax.monitoring import metric_definitions, metrics


class _Terminal(io.StringIO):
    def isatty(self):
        return True


class _Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def _open(workdir, **changes):
    arguments = {
        "total_steps": 10,
        "max_wall_s": None,
        "resume_step": None,
        "console_names": ("episode/success",),
        "console_interval_s": 30.0,
        "stream": io.StringIO(),
    }
    return metrics.MetricWriter(workdir, **(arguments | changes))


def _events(workdir):
    """Returns {tag: [(step, value), ...]} of the TensorBoard files, in the order of their files."""
    from tensorboardX import proto

    found = {}
    for path in sorted((workdir / metrics.TENSORBOARD_NAME).iterdir()):
        data = path.read_bytes()
        while data:
            # A TFRecord: length uint64, its crc uint32, the data, the data's crc uint32.
            length = int.from_bytes(data[:8], "little")
            event = proto.event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_jsonl_and_tensorboard_hold_what_was_written(tmp_path):
    with _open(tmp_path) as writer:
        writer.write(1, {"loss/total": jnp.float32(0.5), "episode/success": np.float64(0.25)})
        # Flushed: a killed run keeps the line.
        assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss/total"] == 0.5
        writer.write(2, {"eval/heldout_colour_shape/success": 1, "loss/total": math.nan})
    assert metrics.read_jsonl(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss/total": 0.5, "episode/success": 0.25},
        {"step": 2, "eval/heldout_colour_shape/success": 1.0, "loss/total": None},
    ]
    events = _events(tmp_path)
    assert events["episode/success"] == [(1, 0.25)]
    assert events["loss/total"][0] == (1, 0.5) and math.isnan(events["loss/total"][1][1])


@pytest.mark.parametrize("cut_off", [False, True])
def test_resume_leaves_no_duplicate_steps(tmp_path, cut_off):
    with _open(tmp_path) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, {"loss/total": step})
    path = tmp_path / "metrics.jsonl"
    if cut_off:
        path.write_text(path.read_text() + '{"step": 5, "loss/to')
    # The checkpoint was of step 2: steps 3 and 4 are done again.
    with _open(tmp_path, resume_step=2) as writer:
        for step in (3, 4, 5):
            writer.write(step, {"loss/total": 10 * step})
    rows = metrics.read_jsonl(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["loss/total"] for row in rows] == [1, 2, 30, 40, 50]


@pytest.mark.parametrize(("resume_step", "left"), [(20, [10, 20]), (25, [10, 20]), (None, [])])
def test_samples_of_updates_that_are_done_again_are_removed(tmp_path, resume_step, left):
    path = tmp_path / metrics.SAMPLES_NAME
    path.write_text("".join(f'{{"update": {n}, "reward": NaN}}\n' for n in (10, 20, 30, 40)))
    _open(tmp_path, resume_step=resume_step).close()
    assert [json.loads(line)["update"] for line in path.read_text().splitlines()] == left


def test_fresh_start_forgets_the_lines_of_a_run_without_checkpoint(tmp_path):
    with _open(tmp_path) as writer:
        writer.write(0, {"loss/total": 1})
    (events,) = (tmp_path / metrics.TENSORBOARD_NAME).iterdir()
    events.rename(events.with_name(f"{events.name}.1"))  # Named by the second it is opened in.
    with _open(tmp_path) as writer:
        writer.write(0, {"loss/total": 2})
    assert metrics.read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 0, "loss/total": 2.0}]
    assert _events(tmp_path)["loss/total"] == [(0, 2.0)]


def test_unknown_names_are_refused_with_the_nearest(tmp_path):
    with _open(tmp_path) as writer:
        with pytest.raises(ValueError, match="nearest defined name is 'policy/clip_fraction'"):
            writer.write(1, {"policy/clip_frac": 0.1})
        with pytest.raises(ValueError, match="nearest defined name is 'eval/<split>/success'"):
            writer.write(1, {"eval/train/sucess": 0.1})
        # The place of a split is one part, not two.
        with pytest.raises(ValueError, match="is not defined"):
            writer.write(1, {"eval/train/again/success": 0.1})
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    with pytest.raises(ValueError, match="episode/success"):
        _open(tmp_path, console_names=("episode/succes",))


def test_lines_of_an_earlier_version_have_the_names_of_today(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "policy/kl": 0.5, "eval/train/malformed": 0.25, "lr": 2}\n')
    expected = {"step": 1, "policy/approx_kl": 0.5, "eval/train/invalid_fraction": 0.25, "lr": 2}
    assert metrics.read_jsonl(path) == [expected]
    for name in metric_definitions.RENAMED.values():
        metric_definitions.lookup(name)


def test_bad_values(tmp_path):
    with pytest.raises(ValueError, match="total_steps is 0"):
        _open(tmp_path, total_steps=0)
    with _open(tmp_path, resume_step=4) as writer:
        with pytest.raises(ValueError, match=r"shape \(2,\)"):
            writer.write(5, {"loss/total": np.zeros(2)})
        with pytest.raises(ValueError, match="write in order"):
            writer.write(3, {"loss/total": 0})


def test_console_without_terminal_prints_now_and_then(tmp_path):
    stream, clock = io.StringIO(), _Clock()
    with _open(tmp_path, stream=stream, clock=clock, total_steps=100) as writer:
        writer.write(10, {"episode/success": 0.25, "time/wall_s": 5})
        for step, seconds in ((20, 10), (30, 20), (40, 40), (50, 50)):
            clock.now = 100 + seconds
            writer.write(step, {"episode/success": step / 100, "time/wall_s": 5 + seconds / 2})
    # Lines at 0 s, at 40 s (the first after 30 s), and the last. Half of the time goes into
    # evaluations, which the rate leaves out. Since the first line: 30 steps in 20 s = 1.5 a second,
    # 60 left = 40 s; 40 steps in 25 s = 1.6 a second, 50 left = 31.25 s.
    assert stream.getvalue().splitlines() == [
        "[##------------------]  10 % 10/100 | episode/success 0.25",
        "[########------------]  40 % 40/100 | 1.5 updates/s, 0:40 left | episode/success 0.4",
        "[##########----------]  50 % 50/100 | 1.6 updates/s, 0:31 left | episode/success 0.5",
    ]


def test_console_shows_the_limit_that_ends_first(tmp_path):
    stream = io.StringIO()
    with _open(
        tmp_path, stream=stream, console_interval_s=0, total_steps=1000, max_wall_s=200
    ) as writer:
        writer.write(100, {"time/wall_s": 40})
        writer.write(200, {"time/wall_s": 60})
        writer.write(400, {"time/wall_s": 75})
    # 40 of 200 s are 20 %, more than 100 of 1000 steps. Then 60 of 200 s are 30 %, at 100 steps in
    # 20 s = 5 a second, and 140 s are left (by steps: 160 s). Last 75 of 200 s are 37.5 %, less
    # than 400 of 1000 steps: 300 steps in 35 s = 8.57 a second, 600 left = 70 s.
    assert stream.getvalue().splitlines() == [
        "[####----------------]  20 % 0:40/3:20, update 100",
        "[######--------------]  30 % 1:00/3:20, update 200 | 5 updates/s, 2:20 left",
        "[########------------]  40 % 400/1,000 | 8.57 updates/s, 1:10 left",
    ]


def test_the_time_left_has_the_evaluations_to_come(tmp_path):
    stream = io.StringIO()
    with _open(tmp_path, stream=stream, console_interval_s=0, eval_interval=4) as writer:
        writer.write(0, {"time/wall_s": 0, "time/eval_s": 100})  # It compiles.
        writer.write(2, {"time/wall_s": 4})
        writer.write(4, {"time/wall_s": 8, "time/eval_s": 10})
        writer.write(8, {"time/wall_s": 16, "time/eval_s": 20})
        writer.write(10, {"time/wall_s": 20, "time/eval_s": 30})
    # An update takes 2 s. After update 2 there are 8 more, 16 s, and the evaluations at 4, 8 and
    # 10, of 100 s each as far as is known. After update 4 they are 2 of 10 s, after 8 one of 15 s.
    left = [line.split("updates/s, ")[1] for line in stream.getvalue().splitlines()[1:]]
    assert left == ["5:16 left", "0:32 left", "0:19 left", "0:00 left"]


def test_the_time_left_until_a_limit_of_time_has_them_too(tmp_path):
    stream = io.StringIO()
    with _open(
        tmp_path,
        stream=stream,
        console_interval_s=0,
        total_steps=1000,
        max_wall_s=20,
        eval_interval=4,
    ) as writer:
        writer.write(0, {"time/wall_s": 0, "time/eval_s": 1})
        writer.write(4, {"time/wall_s": 8, "time/eval_s": 5})
    # 12 s are left, which are 6 updates: to update 10, with evaluations at 8 and there.
    assert stream.getvalue().splitlines()[1].endswith("0.5 updates/s, 0:22 left")


def test_console_on_a_terminal_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = _Terminal()
    with _open(tmp_path, stream=stream, label="ppo") as writer:
        writer.write(1, {"episode/success": 0.1})
        writer.message("saved")
        writer.write(10, {"episode/success": 0.9})
    text = stream.getvalue()
    assert text.count("\n") == 2  # The message and the end.
    lines = text.replace("\n", "\r").split("\r")
    assert "\x1b[Kppo [##------------------]  10 % 1/10" in [line.rstrip(" |") for line in lines]
    assert all(len(line.replace("\x1b[K", "")) < 40 for line in lines)


def test_inactive_writer_writes_nothing(tmp_path):
    with _open(tmp_path / "run", active=False) as writer:
        writer.write(1, {"loss/total": 1})
        writer.message("x")
        with pytest.raises(ValueError, match="is not defined"):
            writer.write(1, {"loss/totl": 1})
    assert not (tmp_path / "run").exists()


def test_definitions_are_complete_and_become_a_table():
    table = metric_definitions.definitions_markdown().splitlines()
    assert len(table) == len(metric_definitions.METRIC_DEFINITIONS) + 2
    assert all(line.count("|") == 5 for line in table)  # No cell holds a bar.
    assert all(all(entry) for entry in metric_definitions.METRIC_DEFINITIONS.values())
    chosen = metric_definitions.definitions_markdown(["lr", "eval/train/success"]).splitlines()
    assert [line.split("`")[1] for line in chosen[2:]] == ["lr", "eval/train/success"]
