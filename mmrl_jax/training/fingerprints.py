"""Fingerprints of the inputs of a run other than its config, which are stored with the run.

    workdir/run.json    {"stage": "sft", "fingerprints": {"base_weights": "9f0c...", ...}}

`dependencies()` of a problem returns the current fingerprints. The commands that resume, evaluate
or export a run compare them with the stored ones.
"""

from collections.abc import Collection, Mapping
import hashlib
import json
from typing import Any, NamedTuple

from mmrl_jax import workdir as workdir_lib
from mmrl_jax.distributed import multihost

NAME = "run.json"
# Description of the input of each fingerprint, for error messages.
MEANINGS = {
    "base_weights": "the tensors in the directory of model.checkpoint",
    "text_encoder": "the tensors in the directory of model.text_encoder",
    "vision_encoder": "the tensors in the directory of model.vision_encoder",
    "chat_template": "the prompts that tokenizer and chat template make",
    "demonstrations": "the files in the directory of demonstrations",
    "records": "the tables or the images of dataset.directory",
    "reward_functions": "the source of the modules in rewards.functions",
    "weights": "the weights of samples in dataset.weights or <stage>.data.weights",
}
# Inputs that may change intentionally. Changed tensors are never accepted, because the policy of a
# checkpoint was never trained with them.
ACCEPTABLE = ("chat_template", "demonstrations", "records", "reward_functions", "weights")


class Run(NamedTuple):
    """Stored description of a run.

    Attributes:
      stage: Name of the stage whose checkpoints are in the directory, for example 'sft' or 'ppo'.
      fingerprints: Digest of each input by its name, a key of MEANINGS.
    """

    stage: str
    fingerprints: dict[str, str]


def digest(*parts: object) -> str:
    """Returns a digest of bytes, or of the `repr` of other objects, as 32 hexadecimal digits."""
    result = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogatepass")
        result.update(len(data).to_bytes(8, "little") + data)
    return result.hexdigest()


def read(workdir: workdir_lib.PathLike) -> Run | None:
    """Returns the stored description of a run; None if it is missing or damaged."""
    try:
        run = json.loads((workdir_lib.as_path(workdir) / NAME).read_bytes())
        return Run(str(run["stage"]), {str(k): str(v) for k, v in run["fingerprints"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write(
    workdir: workdir_lib.PathLike, run: Run, *, made_with: Mapping[str, Any] | None = None
) -> None:
    """Writes the description of a run; in a multi-host run only the first process writes.

    Args:
      workdir: Working directory of the stage.
      run: Description of the run.
      made_with: Provenance of the run, see `provenance.provenance`, which is stored for people to
        read.
    """
    if multihost.is_primary():
        path = workdir_lib.as_path(workdir) / NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        workdir_lib.write_text(
            path, json.dumps(run._asdict() | {"made_with": made_with or {}}, indent=2) + "\n"
        )


def check_accepted(accept: Collection[str]) -> None:
    """Checks the names of inputs that may have changed.

    Raises:
      ValueError: If a name is not in ACCEPTABLE.
    """
    unknown = [name for name in accept if name not in ACCEPTABLE]
    if unknown:
        raise ValueError(
            f"--accept_changes={','.join(unknown)}: only {', '.join(ACCEPTABLE)} may change."
        )


def check(
    workdir: workdir_lib.PathLike, now: Mapping[str, str], *, accept: Collection[str] = ()
) -> None:
    """Compares current fingerprints with those with which a run began.

    Args:
      workdir: Working directory of the run. Nothing is compared if it has no stored fingerprints.
      now: Current digests by the names of the inputs.
      accept: Names of inputs that may have changed, a subset of ACCEPTABLE.

    Raises:
      ValueError: If another input has changed, or a name in `accept` is not in ACCEPTABLE.
    """
    check_accepted(accept)
    run = read(workdir)
    before = run.fingerprints if run is not None else {}
    changed = [
        name for name in now if name in before and before[name] != now[name] and name not in accept
    ]
    if not changed:
        return
    lines = "\n".join(f"  {name}: {MEANINGS[name]}" for name in changed)
    acceptable = ",".join(name for name in changed if name in ACCEPTABLE)
    raise ValueError(
        f"An input of the run in {workdir} has changed since it began:\n{lines}\n"
        "Restore the original input, or train in a fresh workdir."
        + (f" If the change is intended, add --accept_changes={acceptable}." if acceptable else "")
    )
