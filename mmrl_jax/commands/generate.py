"""Completes your own prompts about your own images with a trained token policy.

  mmrl-generate --workdir=runs/vqa --image=photo.png --prompt="How many red circles are there?"
  mmrl-generate --workdir=runs/vqa --image=photo.png --prompt="..." --num_completions=4 \
      --temperature=1 --top_p=0.9
  mmrl-generate --workdir=runs/vqa --image=photo.png      # Reads a prompt from each line of input.

Several prompts are given by repeating --prompt, with one --image for all of them or one for each.
Tokens are greedy unless --temperature is above 0. Each completion is printed with its log-prob in
nats, and is marked if it was truncated at --max_new_tokens.
"""

from collections.abc import Iterator, Sequence
import sys

from absl import flags

from mmrl_jax import restoring
from mmrl_jax.commands.common import clean_exit, refuse_arguments, run_command
from mmrl_jax.rollouts.generate import Sampling
from mmrl_jax.tasks.reward_workers import printable

FLAGS = flags.FLAGS


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


def main(argv: list[str]) -> None:
    """Runs the command line."""
    refuse_arguments(argv)
    with clean_exit(ValueError):
        sampling = Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p, FLAGS.min_p)
        loaded = restoring.load(FLAGS.workdir, which=FLAGS.which, trust_modules=FLAGS.trust_modules)
        for prompts in batches(FLAGS.prompt):
            images = FLAGS.image * len(prompts) if len(FLAGS.image) == 1 else FLAGS.image
            completed = loaded.generate(
                prompts,
                images,
                num_completions=FLAGS.num_completions,
                sampling=sampling,
                max_new_tokens=FLAGS.max_new_tokens,
                seed=FLAGS.seed,
            )
            for prompt, completions in zip(prompts, completed, strict=True):
                print(prompt)
                for x in completions:
                    end = "" if x.finished else ", truncated"
                    # A model may also write escape sequences of the terminal.
                    text = printable(x.text, len(x.text))
                    print(f"  {text}   (log-prob {x.log_prob:.2f}{end})", flush=True)


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
    flags.DEFINE_integer(
        "max_new_tokens",
        None,
        "Maximum number of tokens; that of the run by default.",
        lower_bound=1,
    )
    flags.DEFINE_integer("seed", 0, "Seed of the sampling.")
    flags.DEFINE_string("which", "latest", "Checkpoint: 'latest', 'best' or a step.")
    flags.DEFINE_bool("trust_modules", False, "Import the modules that the run's config names.")
    run_command(main)


if __name__ == "__main__":
    run()
