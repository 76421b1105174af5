"""What a run depends on beside its config, as fingerprints that are kept with the run.

    workdir/run.json    {"stage": "sft", "fingerprints": {"base_weights": "9f0c...", ...}}

A problem's `dependencies()` gives the fingerprints as they are now. Whoever resumes,
evaluates or exports a run compares them with those that it began with.
"""

from collections.abc import Collection, Mapping
import hashlib
import json
from typing import Any, NamedTuple

import jax

from mmrl_jax import workdir as workdir_lib

NAME = "run.json"
# What each fingerprint is of.
MEANINGS = {
    "base_weights": "the tensors in the directory of model.checkpoint",
    "text_encoder": "the tensors in the directory of model.text_encoder",
    "chat_template": "the prompts that tokenizer and chat template make",
    "records": "metadata.jsonl or the images of dataset.directory",
    "reward_functions": "the source of the modules in rewards.functions",
}
# These may change on purpose. With other weights a checkpoint is of a policy that never was.
ACCEPTABLE = ("chat_template", "records", "reward_functions")
OF_MODEL = ("base_weights", "text_encoder", "chat_template")


class Run(NamedTuple):
    """What is kept of a run.

    Attributes:
      stage: the stage that its checkpoints are of, e.g. 'sft' or 'ppo'.
      fingerprints: name, as in MEANINGS, to digest.
    """

    stage: str
    fingerprints: dict[str, str]


def digest(*parts: object) -> str:
    """Returns the digest of bytes, or of anything by its representation."""
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogatepass")
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()


def read(workdir: workdir_lib.PathLike) -> Run | None:
    """Returns what is kept of the run in a workdir; None of one from before this was kept."""
    try:
        kept = json.loads((workdir_lib.as_path(workdir) / NAME).read_bytes())
        return Run(str(kept["stage"]), {str(k): str(v) for k, v in kept["fingerprints"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write(
    workdir: workdir_lib.PathLike, run: Run, *, made_with: Mapping[str, Any] | None = None
) -> None:
    """Keeps what a run depends on; of a multi-host run the first process does.

    Args:
      workdir: Directory of a stage.
      run: What is kept.
      made_with: See `provenance.provenance`; kept for people to read.
    """
    if jax.process_index() == 0:
        path = workdir_lib.as_path(workdir) / NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        workdir_lib.write_text(
            path, json.dumps(run._asdict() | {"made_with": made_with or {}}, indent=2) + "\n"
        )


def check(
    workdir: workdir_lib.PathLike, now: Mapping[str, str], *, accept: Collection[str] = ()
) -> None:
    """Compares fingerprints with those that the run in a workdir began with.

    Args:
      workdir: of the run; nothing is compared if it keeps none.
      now: name to digest.
      accept: names of changes that are meant.

    Raises:
      ValueError: there are other changes; or a name in `accept` is none of ACCEPTABLE.
    """
    unknown = [name for name in accept if name not in ACCEPTABLE]
    if unknown:
        raise ValueError(
            f"--accept_changes={','.join(unknown)}: only {', '.join(ACCEPTABLE)} may change."
        )
    run = read(workdir)
    before = run.fingerprints if run is not None else {}
    changed = [
        name for name in now if name in before and before[name] != now[name] and name not in accept
    ]
    if not changed:
        return
    lines = "\n".join(f"  {name}: {MEANINGS[name]}" for name in changed)
    meant = [name for name in changed if name in ACCEPTABLE]
    raise ValueError(
        f"What the run in {workdir} depends on has changed since it began:\n{lines}\n"
        "Put back what it began with, or train in a fresh workdir."
        + (f" If the change is meant, add --accept_changes={','.join(meant)}." if meant else "")
    )
