r"""Completes your own prompts about your own images with a trained token policy.

  mmrl-generate --workdir=runs/vqa --image=photo.png --prompt="How many red circles are there?"
  mmrl-generate --workdir=runs/vqa --image=photo.png --prompt="..." --num_completions=4 \
      --temperature=1 --top_p=0.9 --sort_by=mean_log_prob
  mmrl-generate --workdir=runs/vqa --image=photo.png --prompt="Is it red?" --choices=yes,no
  mmrl-generate --workdir=runs/vqa --image=photo.png      # Reads a prompt from each line of input.

Several prompts are given by repeating --prompt, with one --image for all of them or one for each.
Tokens are greedy unless --temperature is above 0. Each completion is printed with its log-prob in
nats and the mean over its tokens, and is marked if it was truncated at --max_new_tokens. With
--choices nothing is generated: the given completions are printed with their exact probabilities
among each other, the most likely one first.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import sys
import typing
from typing import Any

from absl import flags

from mmrl_jax import restoring
from mmrl_jax.commands.common import clean_exit, refuse_arguments, run_command
from mmrl_jax.problems.completion import Choice, Completion, Order
from mmrl_jax.rollouts.sampling import Sampling
from mmrl_jax.tasks.reward_workers import printable

FLAGS = flags.FLAGS
SAMPLING_OPTIONS = tuple(field.name for field in dataclasses.fields(Sampling))
# Flags without an effect on --choices.
GENERATION_FLAGS = (
    *SAMPLING_OPTIONS,
    *("num_completions", "max_new_tokens", "stop_string", "sort_by", "seed"),
)


def batches(prompts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yields the prompts of the command line at once, or else the lines of the input one by one."""
    if prompts:
        yield prompts
        return
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield [line.strip()]


def answers(loaded: restoring.Loaded, prompts: Sequence[str], sampling: Sampling) -> list[Any]:
    """Returns the choices or the completions of each prompt, by the flags of the command line."""
    images = FLAGS.image * len(prompts) if len(FLAGS.image) == 1 else FLAGS.image
    if FLAGS.choices is not None:
        return loaded.choose(prompts, images, FLAGS.choices)
    return loaded.generate(
        prompts,
        images,
        num_completions=FLAGS.num_completions,
        sampling=sampling,
        max_new_tokens=FLAGS.max_new_tokens,
        seed=FLAGS.seed,
        stop_strings=FLAGS.stop_string,
        sort_by=FLAGS.sort_by,
    )


def line(answer: Completion | Choice) -> str:
    """Returns a line of the output for a completion or a choice."""
    if isinstance(answer, Choice):
        numbers = f"probability {answer.probability:.3f}, log-prob {answer.log_prob:.2f}"
    else:
        end = "" if answer.finished else ", truncated"
        numbers = f"log-prob {answer.log_prob:.2f}, mean {answer.mean_log_prob:.2f}{end}"
    # A model may also write escape sequences of the terminal.
    return f"  {printable(answer.text, len(answer.text))}   ({numbers})"


def _refuse_sampling() -> None:
    """Raises ValueError for flags of sampling beside --choices, which samples nothing."""
    given = [name for name in GENERATION_FLAGS if FLAGS[name].present]
    if FLAGS.choices is not None and given:
        raise ValueError(
            f"--{given[0]} has no effect with --choices, which computes the probabilities of the "
            "given completions; omit one of them."
        )


def main(argv: list[str]) -> None:
    """Runs the command line."""
    refuse_arguments(argv)
    with clean_exit(ValueError):
        _refuse_sampling()
        options: dict[str, Any] = {name: FLAGS[name].value for name in SAMPLING_OPTIONS}
        sampling = Sampling(**options)
        loaded = restoring.load(FLAGS.workdir, which=FLAGS.which, trust_modules=FLAGS.trust_modules)
        for prompts in batches(FLAGS.prompt):
            answered = answers(loaded, prompts, sampling)
            for prompt, row in zip(prompts, answered, strict=True):
                print(prompt, *map(line, row), sep="\n", flush=True)


def run() -> None:
    """Parses the flags and runs the command."""
    flags.DEFINE_string("workdir", None, "Working directory of a stage.", required=True)
    flags.DEFINE_multi_string("prompt", [], "Text of a prompt; may be repeated.")
    flags.DEFINE_multi_string(
        "image", [], "File of an image; one for all prompts, or one for each."
    )
    flags.DEFINE_integer(
        "num_completions", 1, "Number of completions of each prompt.", lower_bound=1
    )
    flags.DEFINE_float("temperature", 0.0, "Sampling temperature; 0 for greedy decoding.")
    flags.DEFINE_integer("top_k", None, "Number of most likely tokens that are sampled from.")
    flags.DEFINE_float("top_p", 1.0, "Total probability of the tokens that are sampled from.")
    flags.DEFINE_float("min_p", 0.0, "Smallest probability, as a fraction of the largest one.")
    flags.DEFINE_float(
        "repetition_penalty",
        1.0,
        "Factor above 1 that makes tokens of the prompt and of the completion less likely.",
    )
    flags.DEFINE_integer(
        "min_new_tokens", 0, "Number of tokens before a completion may end with a stop token."
    )
    flags.DEFINE_integer(
        "max_new_tokens",
        None,
        "Maximum number of tokens; that of the run by default.",
        lower_bound=1,
    )
    flags.DEFINE_multi_string(
        "stop_string",
        [],
        "Text that ends a completion, which is truncated before it; may be repeated.",
    )
    flags.DEFINE_enum(
        "sort_by",
        None,
        typing.get_args(Order),
        "Number that the completions of a prompt are sorted by, the largest first.",
    )
    flags.DEFINE_list(
        "choices", None, "Completions, separated by commas, whose probabilities are computed."
    )
    flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
    flags.DEFINE_string("which", "latest", "Checkpoint: 'latest', 'best' or a step.")
    flags.DEFINE_bool("trust_modules", False, "Import the modules that the run's config names.")
    run_command(main)


if __name__ == "__main__":
    run()
