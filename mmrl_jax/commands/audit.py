r"""Finds bad samples in demonstrations or in image-text data, and weighs them.

  mmrl-audit --data=demos/reach --output=audit
  mmrl-audit --data=so100_pick --features=pixels=observation.images.front --output=audit
  mmrl-audit --data=pictures --output=audit
  mmrl-audit --data=hub --files='data/train-*.parquet' --files='data/test-*.parquet' --output=audit

The data are demonstrations as RLDS or LeRobot, or records of image, prompt and answer as
metadata.jsonl, other .jsonl or .parquet files. Several splits are compared with each other: those
of demonstrations, all or the ones that --split names, the tables of each --files, and each --data.

The output has

  audit.json           counts, thresholds, and the scores and flags of all samples
  weights.jsonl        the weight of each sample, 0 for most flagged ones; weights-<split>.jsonl if
                       there are several splits. A run uses it by --config.bc.data.weights=FILE or
                       --config.dataset.weights=FILE
  audit.html           the worst samples with their images, and why they were flagged

The exit code is 0 if no check flags more than its limit, 2 if one does, and 1 if the data cannot be
audited. --limit=label_noise=0.05 and --threshold=label_noise=0.5 change a limit, which is a
fraction, and a threshold.
"""

from collections.abc import Sequence
import math
import pathlib
import sys

from absl import flags

from mmrl_jax.auditing import checks, reading
from mmrl_jax.auditing.checks import AUDIT
from mmrl_jax.commands.common import clean_exit, refuse_arguments, run_command
from mmrl_jax.reporting import audit_page

FLAGS = flags.FLAGS
PAGE = "audit.html"
EXCEEDED = 2  # Exit code if a limit is exceeded.


def pairs(texts: Sequence[str], flag: str) -> dict[str, str]:
    """Returns the values of a flag 'name=value', which may be repeated, by their names.

    Raises:
      ValueError: If a text has another form, or a name occurs twice.
    """
    parts = [text.partition("=") for text in texts]
    values = {name: value for name, _, value in parts}
    if len(values) < len(parts) or not all(name and value for name, _, value in parts):
        raise ValueError(f"--{flag}={list(texts)}: give each name once, as --{flag}=NAME=VALUE.")
    return values


def numbers(texts: Sequence[str], flag: str) -> dict[str, float]:
    """Returns the values of a flag 'name=number', by their names.

    Raises:
      ValueError: If a text has another form, or a number is not finite.
    """
    found = {}
    for name, text in pairs(texts, flag).items():
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = math.nan
        if not math.isfinite(found[name]):
            raise ValueError(f"--{flag}={name}={text}: give a finite number.")
    return found


def fractions(texts: Sequence[str], flag: str) -> dict[str, float]:
    """Returns the values of a flag 'name=fraction', by their names.

    Raises:
      ValueError: If a text has another form, or a number is not in [0, 1].
    """
    found = numbers(texts, flag)
    for name, x in found.items():
        if not 0 <= x <= 1:
            raise ValueError(f"--{flag}={name}={x:g}: give a fraction in [0, 1], for example 0.05.")
    return found


def make_output(output: pathlib.Path, directories: Sequence[str]) -> None:
    """Makes the directory of the results.

    Raises:
      ValueError: If it is one of the data sets or in one, which it would change, or cannot be made.
    """
    for directory in directories:
        if output.resolve().is_relative_to(pathlib.Path(directory).resolve()):
            raise ValueError(
                f"--output={output} is in --data={directory}; give a directory outside of it."
            )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output={output} cannot be made ({error}); give another directory."
        ) from error


def audit(
    directories: Sequence[str],
    output: pathlib.Path,
    *,
    splits: Sequence[str] = (),
    tables: Sequence[str] = (),
    features: Sequence[str] = (),
    columns: Sequence[str] = (),
    thresholds: Sequence[str] = (),
    limits: Sequence[str] = (),
) -> checks.Report:
    """Audits data sets of one kind, writes the results, and prints them.

    Args:
      directories: Directories of the data sets.
      output: Directory of the results, outside of the data sets.
      splits: Splits of demonstrations; () for all.
      tables: Patterns of the tables of records, of one split each; () for the usual ones.
      features: Fields of demonstrations, as 'NAME=FIELD' or 'NAME=FIELD,FIELD'.
      columns: Columns of records, as 'NAME=COLUMN'.
      thresholds: Thresholds of checks, as 'CHECK=NUMBER'.
      limits: Limits of checks, as 'CHECK=FRACTION'.

    Raises:
      ImportError: If a package that the format needs is not installed.
      ValueError: If an argument is wrong, or the data cannot be read.
    """
    fields = {name: tuple(x.split(",")) for name, x in pairs(features, "features").items()}
    names = pairs(columns, "columns")
    least, allowed = numbers(thresholds, "threshold"), fractions(limits, "limit")
    chosen, demonstrations = reading.parts(directories, splits, tables)
    if demonstrations and names or not demonstrations and fields:
        raise ValueError("--features is for demonstrations, and --columns for records.")
    rows = checks.DEMONSTRATIONS if demonstrations else checks.IMAGE_TEXT
    checks.refuse_unknown(rows, thresholds=least, limits=allowed)
    make_output(output, directories)
    samples = (
        reading.read_episodes(chosen, fields)
        if demonstrations
        else reading.read_records(chosen, names)
    )
    report = checks.run(
        samples,
        rows,
        thresholds=least,
        limits=allowed,
        progress=lambda name: print(f"Checking {name} ...", file=sys.stderr, flush=True),
    )
    weights = checks.write(report, output)
    audit_page.write(output / PAGE, report, f"Audit of {', '.join(directories)}")
    print(checks.table(report))
    print(f"Wrote {', '.join(str(path) for path in (output / AUDIT, *weights, output / PAGE))}")
    return report


def main(argv: list[str]) -> int:
    """Runs the command line."""
    refuse_arguments(argv)
    with clean_exit(ValueError, ImportError):
        report = audit(
            FLAGS.data,
            pathlib.Path(FLAGS.output),
            splits=FLAGS.split,
            tables=FLAGS.files,
            features=FLAGS.features,
            columns=FLAGS.columns,
            thresholds=FLAGS.threshold,
            limits=FLAGS.limit,
        )
    if report.failed:
        print(f"More samples are flagged than allowed: {', '.join(report.failed)}", file=sys.stderr)
        return EXCEEDED
    return 0


def run() -> None:
    """Parses the flags and runs the command."""
    flags.DEFINE_multi_string("data", None, "Directory of a data set; may be repeated.")
    flags.mark_flag_as_required("data")
    flags.DEFINE_string(
        "output", None, "Directory of the results, outside of the data.", required=True
    )
    flags.DEFINE_multi_string("split", [], "Split of demonstrations; may be repeated.")
    flags.DEFINE_multi_string("files", [], "Pattern of the tables of a split; may be repeated.")
    flags.DEFINE_multi_string(
        "features", [], "Field of demonstrations, NAME=FIELD; see docs/demonstrations.md."
    )
    flags.DEFINE_multi_string("columns", [], "Column of records, NAME=COLUMN; see docs/data.md.")
    flags.DEFINE_multi_string("threshold", [], "Least flagged score, CHECK=NUMBER.")
    flags.DEFINE_multi_string("limit", [], "Flagged fraction that is allowed, CHECK=FRACTION.")
    run_command(main)


if __name__ == "__main__":
    run()
