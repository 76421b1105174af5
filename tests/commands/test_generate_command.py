"""`Loaded.generate` and the command `experiments.generate` on a tiny run."""

import pathlib
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

import mmrl_jax
from mmrl_jax.problems import completion
from mmrl_jax.rollouts.generate import Sampling
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run, its sample completions, and the file of the image of the first one."""
    workdir = tmp_path_factory.mktemp("run")
    trained = mmrl_jax.train(tiny.token_config(stages=("sft",)), workdir)
    samples = trained.problem.samples(trained.variables, 8)
    path = workdir / "image.png"
    PIL.Image.fromarray(samples[0].image).save(path)
    return workdir, samples, path


def test_completions_are_those_of_the_evaluation(run):
    workdir, samples, path = run
    loaded = mmrl_jax.load(workdir)
    images = [path, *(sample.image for sample in samples[1:])]
    completed = loaded.generate([sample.prompt for sample in samples], images)
    assert [[x.text for x in row] for row in completed] == [[x.completion] for x in samples]
    # Each image belongs to its own prompt.
    turned = loaded.generate([sample.prompt for sample in samples[::-1]], images[::-1])
    for (one,), (other,) in zip(completed, turned[::-1], strict=True):
        assert one.text == other.text and one.log_prob == pytest.approx(other.log_prob, abs=1e-4)


def test_samples_are_many_and_repeat_with_the_seed(run):
    workdir, samples, path = run
    loaded = mmrl_jax.load(workdir)
    hot = {"num_completions": 8, "sampling": Sampling(temperature=5.0)}
    (one,), (same,), (other,) = (
        loaded.generate([samples[0].prompt], [path], seed=seed, **hot) for seed in (0, 0, 1)
    )
    assert one == same != other and len({x.text for x in one}) > 1
    (cut,) = loaded.generate([samples[0].prompt], [path], max_new_tokens=1, **hot)
    assert all(x.text == "" for x in cut if x.finished) and not all(x.finished for x in cut)
    assert all(x.log_prob < 0 for x in one)
    # There are more prompts than are completed at once, and each has samples of its own.
    count = 2 * loaded.problem.eval_batch_size()
    many = loaded.generate(
        [samples[0].prompt] * count, [path] * count, sampling=Sampling(temperature=5.0)
    )
    half = count // 2
    assert many[:half] != many[half:]


def test_choices_have_their_exact_probabilities(run):
    workdir, samples, path = run
    loaded = mmrl_jax.load(workdir)
    prompts, images = [x.prompt for x in samples], [path, *(x.image for x in samples[1:])]
    texts = list(loaded.problem.model.texts.answers)
    texts.append(f"{texts[0]} {texts[1]}")  # The first one begins this one.
    chosen = loaded.choose(prompts, images, texts)
    completed = loaded.generate(prompts, images)  # Greedy log-probs are those at temperature 1.
    matched = 0
    for row, (greedy,) in zip(chosen, completed, strict=True):
        log_probs = np.array([x.log_prob for x in row])
        assert {x.text for x in row} == set(texts) and np.all(np.diff(log_probs) <= 0)
        shares = np.exp(log_probs) / np.exp(log_probs).sum()
        np.testing.assert_allclose([x.probability for x in row], shares, rtol=1e-4)
        same = {x.text: x.log_prob for x in row}.get(greedy.text) if greedy.finished else None
        if same is not None:
            matched += 1
            assert same == pytest.approx(greedy.log_prob, abs=1e-4)
    assert matched


def test_choices_that_cannot_be_compared_are_named(run):
    workdir, samples, path = run
    loaded = mmrl_jax.load(workdir)
    answer = loaded.problem.model.texts.answers[0]
    for choices, message in (
        ([answer], "give at least 2"),
        ([answer, f" {answer}"], "have the same tokens"),
        ([answer, "zebra"], r"\['zebra'\].* are not in the vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded.choose([samples[0].prompt], [path], choices)


def test_completions_end_at_stop_strings_and_are_sorted(run):
    workdir, samples, path = run
    loaded = mmrl_jax.load(workdir)

    def generate(**options):
        sampling = Sampling(temperature=5.0)
        options |= {"sampling": sampling, "num_completions": 8, "max_new_tokens": 6}
        return loaded.generate([samples[0].prompt], [path], **options)[0]

    free = generate()
    word = next(x.text.split()[1] for x in free if len(x.text.split()) > 1)
    for one, whole in zip(generate(stop_strings=[word]), free, strict=True):
        before, found, _ = whole.text.partition(word)
        assert one.text == before and one.finished == (whole.finished or bool(found))
        assert one == whole or one.log_prob > whole.log_prob or whole.text.endswith(word)
        if found:  # A token is a word.
            assert one.num_tokens == len(before.split()) + 1
    for key in ("log_prob", "mean_log_prob"):
        values = [getattr(x, key) for x in generate(sort_by=key)]
        assert values == sorted((getattr(x, key) for x in free), reverse=True)
    with pytest.raises(ValueError, match="empty text"):
        generate(stop_strings=[""])
    with pytest.raises(ValueError, match="sort_by='text' must be one of"):
        generate(sort_by="text")


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        # Tokens are letters with log-probs of -1, -2, -4, ...; the stop string ends with the 4th.
        (["XY", "d"], ("ab", -15.0, True, 4)),
        (["bX", "XY"], ("a", -7.0, True, 3)),
        (["z"], ("abXYcd", -63.0, False, 6)),
        ([], ("abXYcd", -63.0, False, 6)),
    ],
)
def test_the_tokens_of_a_stop_string_count(stops, expected):
    tokens = np.array([ord(letter) for letter in "abXYcd"])
    log_probs = -(2.0 ** np.arange(6))

    def decode(ids):
        return "".join(map(chr, ids))

    found = completion._decode(decode, tokens, log_probs, False, stops)
    assert found == expected and found.mean_log_prob == expected[1] / expected[3]


def test_what_cannot_be_completed_is_named(run, tmp_path):
    workdir, samples, path = run
    loaded, prompt = mmrl_jax.load(workdir), samples[0].prompt
    with pytest.raises(ValueError, match="no prompt"):
        loaded.generate([], [])
    with pytest.raises(ValueError, match="2 prompts, but 1 images; give one image for each"):
        loaded.generate([prompt] * 2, [path])
    with pytest.raises(ValueError, match="'zebras'.* are not in the vocabulary"):
        loaded.generate(["how many zebras"], [path])
    (tmp_path / "text.png").write_text("no image")
    for name in ("absent.png", "text.png"):
        with pytest.raises(ValueError, match=f"image .*{name}' cannot be read: "):
            loaded.generate([prompt], [tmp_path / name])
    with pytest.raises(ValueError, match="The image cannot be read: image is float64"):
        loaded.generate([prompt], [np.zeros((8, 8, 3))])


def test_a_longer_prompt_of_the_same_padded_length_compiles_nothing(run):
    workdir, samples, path = run
    loaded = mmrl_jax.load(workdir)
    loaded.generate([samples[0].prompt], [path])
    before = completion._generate._cache_size()
    loaded.generate([f"{samples[0].prompt} {samples[0].prompt.split()[-1]}"], [path])
    assert completion._generate._cache_size() == before


def test_the_command_completes_prompts_of_the_command_line_and_of_the_input(run):
    workdir, samples, path = run

    def command(*arguments, lines=None):
        return subprocess.run(
            [
                sys.executable, "-m", "experiments.generate", f"--workdir={workdir}",
                f"--image={path}", *arguments,
            ],
            cwd=ROOT, input=lines, capture_output=True, text=True,
        )  # fmt: skip

    expected = f"{samples[0].prompt}\n  {samples[0].completion}   (log-prob -"
    result = command(lines=f"{samples[0].prompt}\n\n")
    assert result.returncode == 0 and result.stdout.startswith(expected), result
    result = command("--prompt=how many zebras")
    assert result.returncode == 1 and result.stderr.startswith("error: The words ['zebras']")
    result = command("--choices=zero,one", f"--prompt={samples[0].prompt}")
    lines = result.stdout.splitlines()
    assert lines[0] == samples[0].prompt and len(lines) == 3, result
    assert {line.split()[0] for line in lines[1:]} == {"zero", "one"}
    assert all(" (probability 0." in line and ", log-prob -" in line for line in lines[1:])
    result = command("--choices=zero,one", "--top_p=0.9")
    assert result.returncode == 1
    assert result.stderr.startswith("error: --top_p has no effect with --choices")
