"""Tests of the checks: planted faults are found, clean data pass, and values derived by hand.

The thresholds of the checks were chosen on the seeds 100 to 104 of the same generators.
"""

import dataclasses
import functools
import json
import tracemalloc

import numpy as np
import pytest

from mmrl_jax.auditing import checks, demonstrations, image_text, images, statistics, windows
from tests.auditing import planted

ADVICE = {"answer_imbalance", "instruction_imbalance", "action_imbalance"}
KINDS = {
    "image_texts": (planted.image_texts, checks.IMAGE_TEXT, 400),
    "episodes": (planted.episodes, checks.DEMONSTRATIONS, 200),
}


@functools.cache
def run(kind, seed, *, faults):
    make, rows, count = KINDS[kind]
    samples, faults = make(seed, count, faults=faults)
    return checks.run(samples, rows, thresholds={}, limits={}), faults


def check_found(report, faults):
    """Checks that at least nine of ten planted faults are flagged, and nine of ten flags right."""
    for name, result in report.results.items():
        planted_ones = faults.get(name, ())
        flagged = set(np.flatnonzero(result.flagged))
        # What has another fault may have this one too: random actions reach no named block.
        others = {i for other, x in faults.items() if other != name for i in x} - {*planted_ones}
        found = flagged & {*planted_ones}
        assert len(found) >= 0.9 * len(planted_ones), name
        assert len(found) >= 0.9 * len(flagged - others), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_faults_are_found_and_little_else(kind, seed):
    report, faults = run(kind, seed, faults=True)
    assert set(report.failed) == {*faults}
    check_found(report, faults)


@pytest.mark.parametrize("aspect", [3 / 4, 16 / 9])
@pytest.mark.parametrize("kind", KINDS)
def test_faults_of_images_are_found_at_any_aspect_ratio(kind, aspect):
    make, rows, count = KINDS[kind]
    samples, faults = make(0, count, aspect=aspect)
    names = {"constant_image", "noise_image", "broken_images", "frozen_images", "near_duplicate"}
    rows = {name: check for name, check in rows.items() if name in names}
    check_found(checks.run(samples, rows, thresholds={}, limits={}), faults)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [2, 3])
def test_clean_data_pass(kind, seed):
    report, _ = run(kind, seed, faults=False)
    assert report.failed == []
    assert report.weights().mean() > 0.99


def test_thresholds_limits_and_weights():
    samples, faults = planted.image_texts(0, 400)
    rows = {name: checks.IMAGE_TEXT[name] for name in ("noise_image", "answer_imbalance")}
    report = checks.run(
        samples, rows, thresholds={"answer_imbalance": 0.0}, limits={"noise_image": 0.05}
    )
    # The imbalance flags every record, but only informs.
    assert report.results["answer_imbalance"].flagged.all()
    noise = int(faults["noise_image"][0])
    assert report.flags(noise) == ("noise_image", "answer_imbalance")
    # 20 of 400 are noise, exactly the limit, and have the weight 0.
    assert report.results["noise_image"].fraction == 0.05
    assert report.failed == ["answer_imbalance"]
    assert report.weights().sum() == 380 and report.weights()[noise] == 0
    with pytest.raises(ValueError, match="'nois_image' is no check .* 'noise_image'"):
        checks.refuse_unknown(checks.IMAGE_TEXT, thresholds={"nois_image": 0.1}, limits={})
    with pytest.raises(ValueError, match="'unreadable' is no check .* with a threshold"):
        checks.refuse_unknown(checks.IMAGE_TEXT, thresholds={"unreadable": 0.1}, limits={})
    with pytest.raises(ValueError, match="with a limit; there are .*'unreadable'"):
        checks.refuse_unknown(checks.IMAGE_TEXT, thresholds={}, limits={"nois_image": 0.1})
    checks.refuse_unknown(checks.IMAGE_TEXT, thresholds={}, limits={"unreadable": 0.1})


def test_an_unbalanced_answer_that_no_image_tells_is_no_label_noise():
    rng = np.random.default_rng(0)
    pixels, _ = planted.shapes(rng, 300)
    answers = rng.choice(["no", "yes"], 300, p=[0.75, 0.25])
    data = planted.records(pixels, ["Is it?"] * 300, answers)
    # Giving always "no" agrees with 3 of 4 answers, and is no skill.
    assert np.isnan(image_text.label_noise(data).scores).all()


def test_copies_of_a_few_images_have_no_label_noise(recwarn):
    pixels, _ = planted.shapes(np.random.default_rng(0), 1)
    answers = ["a", "b"] * 30
    data = planted.records(np.repeat(pixels, 60, axis=0), ["?"] * 60, answers)
    data = dataclasses.replace(data, image_digests=("x",) * 60)
    # All records of an image are in one fold, so that no model could be fitted to others.
    assert np.isnan(image_text.label_noise(data).scores).all() and not recwarn.list


def test_images_are_compared_by_descriptors_that_are_computed_once(monkeypatch):
    calls = []
    compute = images.descriptors
    monkeypatch.setattr(images, "descriptors", lambda x: calls.append(len(x)) or compute(x))
    pixels, _ = planted.shapes(np.random.default_rng(0), 4)
    data = planted.records(pixels, ["?"] * 4, ["a"] * 4, [0, 0, 1, 1])
    image_text.near_duplicate(data)
    image_text.split_leak(data)
    assert calls == [4]
    pairs = []
    images.most_similar(data.descriptors, lambda i, j: pairs.append((i.shape, j.shape)) or i != j)
    # Only close pairs are asked for: an image and itself.
    assert pairs == [((4,), (4,))]


def peak_mib(function, *arguments):
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


def test_a_long_text_takes_memory_once():
    # As an array of texts of one length, 4,000 prompts are 4,000 * 20,000 * 4 bytes = 305 MiB.
    count = 4000
    long = "word " * 4000
    data = planted.records(
        np.zeros((count, 16, 16, 3), np.uint8), [long] + ["?"] * (count - 1), ["a", long] * 2000
    )
    for check in (
        image_text.near_duplicate,
        image_text.text_only,
        lambda x: list(image_text._groups(x)),
    ):
        assert peak_mib(check, data) < 100


def test_many_episodes_are_scored_in_chunks():
    one = planted.episode(np.random.default_rng(0))
    short = one | {name: one[name][:4] for name in ("pixels", "proprio", "action")}
    # The first images in the 8 bytes of an index are 4000 * 32^2 * 3 * 8 bytes = 94 MiB.
    assert peak_mib(demonstrations._outcome, planted.joined([short] * 4000)) < 130
    # The means of 22,000 images in those of a float64 are 22000 * 192 * 8 bytes = 32 MiB, of which
    # there would be two, and the more than 200 features of their steps are 34 MiB.
    assert peak_mib(demonstrations.random_actions, planted.joined([one] * 1000)) < 50


def test_images_and_episodes_of_two_splits_are_compared():
    rng = np.random.default_rng(0)
    pixels, labels = planted.shapes(rng, 6)
    pixels[5] = np.clip(pixels[1] + rng.normal(8, 3, pixels[1].shape), 0, 255)
    split = [0, 0, 0, 1, 1, 1]
    data = planted.records(pixels, ["?"] * 6, labels.astype(str), split)
    finding = image_text.split_leak(data)
    assert (np.flatnonzero(finding.scores > 0.95) == [1, 5]).all()
    assert finding.partner[1] == 5 and finding.partner[5] == 1
    # Within a split, nothing is repeated.
    assert (image_text.near_duplicate(data).scores < 0.95).all()
    assert np.isnan(
        image_text.split_leak(planted.records(pixels, ["?"] * 6, ["a"] * 6)).scores
    ).all()
    several = [planted.episode(rng) for _ in range(6)]
    several[4] = several[2]
    finding = demonstrations.split_leak(planted.joined(several, split))
    np.testing.assert_array_equal(finding.scores, [0, 0, 1, 0, 1, 0])
    assert finding.partner[2] == 4 and finding.partner[4] == 2


def test_the_same_path_in_another_scene_is_no_duplicate():
    rng = np.random.default_rng(0)
    several = [planted.episode(rng) for _ in range(4)]
    several[3] = several[0] | {"pixels": 255 - several[0]["pixels"]}
    assert (demonstrations.near_duplicate(planted.joined(several)).scores == 0).all()
    several[3] = several[0]
    scores = demonstrations.near_duplicate(planted.joined(several)).scores
    np.testing.assert_array_equal(scores, [0, 0, 0, 1])


def test_windows_do_not_cross_episodes():
    rng = np.random.default_rng(0)
    several = [planted.episode(rng) for _ in range(2)]
    for x, count in zip(several, (9, 3), strict=True):
        x.update({name: x[name][:count] for name in ("pixels", "proprio", "action")})
    data = planted.joined(several)
    x, means, episode = windows.windows(data)
    # (9 - 8) // 4 + 1 = 1 window, and one of an episode with fewer steps.
    assert x.shape == (2, 8 * 4) and means.shape == (2, 192) and list(episode) == [0, 1]
    steps = x[1].reshape(8, 4)
    np.testing.assert_array_equal(steps[3:], np.tile(steps[2], (5, 1)))


@pytest.mark.parametrize("count", [1, 2])
def test_a_few_samples_have_few_scores_and_raise_nothing(count):
    rng = np.random.default_rng(0)
    several = planted.joined([planted.episode(rng) for _ in range(count)])
    report = checks.run(several, checks.DEMONSTRATIONS, thresholds={}, limits={})
    assert report.results["random_actions"].scored == 0 and report.failed == []
    pixels, labels = planted.shapes(rng, count)
    data = planted.records(pixels, ["?"] * count, planted.NAMES[labels])
    report = checks.run(data, checks.IMAGE_TEXT, thresholds={}, limits={})
    assert report.results["label_noise"].scored == 0


def test_imbalance_is_the_share_of_the_value():
    pixels, _ = planted.shapes(np.random.default_rng(0), 5)
    data = planted.records(pixels, ["?"] * 5, ["a", "a", "b", "a", "a"])
    scores = image_text.answer_imbalance(data).scores
    np.testing.assert_allclose(scores, [0.8, 0.8, 0.2, 0.8, 0.8], rtol=1e-6)
    several = [planted.episode(np.random.default_rng(i)) for i in range(4)]
    for i, x in enumerate(several):
        x["action"] = np.zeros_like(x["action"]) if i < 3 else x["action"]
        x["template"], x["name"] = "{}", "red" if i else "tan"
    scores = demonstrations.instruction_imbalance(planted.joined(several)).scores
    np.testing.assert_allclose(scores, [0.25, 0.75, 0.75, 0.75])
    scores = demonstrations.action_imbalance(planted.joined(several)).scores
    assert (scores[:3] == 1).all() and scores[3] < 0.5


def test_image_statistics():
    flat = np.full((1, 8, 8, 3), 9, np.uint8)
    board = np.zeros((1, 8, 8, 3), np.uint8)
    board[0, ::2, ::2] = board[0, 1::2, 1::2] = 200
    # Neighbors differ by 200 everywhere, and the variance is 100^2: 200^2 / 2 / 100^2 = 2.
    assert images.roughness(board) == 2 and images.roughness(flat) == 0
    assert images.deviation(board) == 100 and images.deviation(flat) == 0
    # The halves of 3 columns are the means of 1.5 columns each.
    row = np.array([0, 90, 30], np.uint8)
    halves = images.shrink(np.broadcast_to(row[None, None, :, None], (1, 3, 3, 3)), 2)
    np.testing.assert_allclose(halves[0, 0, :, 0], [30, 50])


def test_hashes_survive_brightness_and_noise():
    rng = np.random.default_rng(0)
    one, _ = planted.shapes(rng, 20)
    two = np.clip(one + rng.normal(6, 3, one.shape), 0, 255).astype(np.uint8)
    a, b = images.perceptual_hash(one), images.perceptual_hash(two)
    assert (np.bitwise_count(a ^ b) <= images.HASH_BITS).all()
    different = np.bitwise_count(a[:, None] ^ a)[np.triu_indices(20, 1)]
    assert (different > images.HASH_BITS).mean() > 0.9


def test_confident_learning_by_hand():
    p = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6], [0.1, 0.9], [0.55, 0.45]])
    labels = np.array([0, 0, 0, 1, 1, 1])
    # The thresholds are (0.9 + 0.7 + 0.2) / 3 = 0.6 and (0.6 + 0.9 + 0.45) / 3 = 0.65. Of the other
    # class, only sample 2 reaches it, with 0.8 - 0.2. The last one does not, although the other
    # class is more probable.
    margin, best = statistics.confident_margin(p, labels)
    np.testing.assert_allclose(margin, [-1, -1, 0.6, -1, -1, -1])
    np.testing.assert_array_equal(best, [0, 0, 1, 1, 1, 1])


def test_no_sample_is_scored_by_a_model_that_has_seen_it():
    rng = np.random.default_rng(0)
    x, targets = rng.normal(size=(200, 150)), np.eye(2)[rng.integers(0, 2, 200)]
    fold = statistics.folds(np.arange(200))
    p = statistics.out_of_fold([x], targets, fold, statistics.softmax)
    # A model that had seen them would give random labels a probability near 1.
    assert (p * targets).sum(axis=1).mean() < 0.6
    assert (
        statistics.folds(["a", "b", "a", "b"])[:2] == statistics.folds(["a", "b", "a", "b"])[2:]
    ).all()
    y = rng.normal(size=(200, 1))
    predictions = statistics.ridge_out_of_fold(lambda rows: x[rows], y, fold, max_fit=1000)
    assert np.abs(predictions).max() == 0


def test_a_ridge_regression_in_chunks_is_the_one_of_all_rows(monkeypatch):
    rng = np.random.default_rng(0)
    x, fold = rng.normal(size=(100, 3)), np.arange(100) % 2
    y = x @ rng.normal(size=(3, 2))
    monkeypatch.setattr(statistics, "CHUNK", 7)
    predictions = statistics.ridge_out_of_fold(lambda rows: x[rows], y, fold, max_fit=30)
    # Of the 50 rows of the other fold, every second one is fitted, with the least penalty, 1e-3.
    for k in (0, 1):
        a, b = x[fold != k][::2], y[fold != k][::2]
        weights = np.linalg.solve(a.T @ a + 1e-3 * 25 * np.eye(3), a.T @ b)
        np.testing.assert_allclose(predictions[fold == k], x[fold == k] @ weights)


def test_the_regression_finds_the_minimum():
    # With a penalty on the weight alone, the optimum of the bias of a constant feature is the
    # log odds of the events: log(0.75 / 0.25).
    x, targets = np.zeros((4, 1)), np.array([[1.0], [1.0], [1.0], [0.0]])
    weights = statistics.fit_linear(x, targets, statistics.sigmoid, 1e-3)
    np.testing.assert_allclose(weights, [[0], [np.log(3)]], atol=1e-4)


def test_the_report_is_json_with_null_for_samples_without_a_score():
    report, _ = run("image_texts", 0, faults=True)
    values = json.loads(json.dumps(checks.to_json(report), allow_nan=False))
    noise = values["checks"]["label_noise"]
    assert noise["scores"].count(None) == 400 - noise["scored"] > 0
    assert values["checks"]["noise_image"]["flagged"] == sorted(
        np.flatnonzero(report.results["noise_image"].flagged).tolist()
    )
