"""The model card of an exported model: README.md, as the Hugging Face hub shows it.

It has what the run recorded: the options that differ from their defaults, fingerprints, hardware
and results with their intervals. Nothing is measured for it.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any, NamedTuple

from etils import epath

from mmrl_jax import problems
from mmrl_jax import workdir as workdir_lib
from mmrl_jax.config import schema
from mmrl_jax.pretrained import hub_repository
from mmrl_jax.training import fingerprints

NAME = "README.md"
SHUFFLED = "shuffled_"  # Begins the name of a row of evaluation.json with inputs of others.

_LOAD_MODEL = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
```

mmrl_jax trains it further with `--config=vlm_grpo --config.model.checkpoint={checkpoint}`,
and reads it in Python with

```python
from mmrl_jax.pretrained import chat, hub

model, variables, config = hub.load_vision_language_model(chat.directory_of("{checkpoint}"))
```"""

_LOAD_ADAPTER = """```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{name}")
processor = AutoProcessor.from_pretrained("{base}")
```

mmrl_jax reads the directory of the merged model, which these lines write:

```python
model.merge_and_unload().save_pretrained("merged")
processor.save_pretrained("merged")
```"""


class ExportedModel(NamedTuple):
    """An exported model.

    Attributes:
      name: Name from which it is loaded, `owner/name` on the hub or a directory.
      base: Name of the pretrained model on the hub, `owner/name`; None if it is unknown.
      stage: Name of the stage whose checkpoint was exported.
      step: Number of updates of the checkpoint.
      adapter: Whether only the adapters were exported.
      dtype: Data type of the parameters.
    """

    name: str
    base: str | None
    stage: str
    step: int
    adapter: bool
    dtype: str


class Result(NamedTuple):
    """A measured metric.

    Attributes:
      split: Name of the split.
      shuffled: Name of the modality that is another sample's; '' for the policy's own inputs.
      metric: Name of the metric.
      values: Mean, and lower and upper bound of its 95 % interval.
      samples: Number of episodes, prompts or records; None if it was not recorded.
    """

    split: str
    shuffled: str
    metric: str
    values: tuple[float, float, float]
    samples: int | None


def write(output: pathlib.Path, exported: ExportedModel, workdir: epath.Path) -> None:
    """Writes the model card of an exported model.

    Args:
      output: Directory of the exported model.
      exported: What was exported.
      workdir: Working directory of the stage.
    """
    stored = workdir_lib.stored_config(workdir)
    assert stored is not None, workdir
    config = problems.complete(stored)
    last = exported.step == config[exported.stage].num_updates
    results = read_results(workdir, exported.step, last=last)
    on_hub = hub_repository.is_name(exported.name)
    load = (_LOAD_ADAPTER if exported.adapter else _LOAD_MODEL).format(
        name=exported.name,
        base=exported.base or "BASE",
        checkpoint=f"{hub_repository.SCHEME if on_hub else ''}{exported.name}",
    )
    sections = {
        f"# {exported.name.rpartition('/')[2]}": _description(exported, config),
        "## Training": _training(exported, config, workdir),
        "## Options that differ from the defaults": _options(config),
        "## Results": _results(exported, results, workdir),
        "## Known limits": _limits(exported, config, results),
        "## How to load it": load,
    }
    text = "\n\n".join(f"{title}\n\n{body}" for title, body in sections.items())
    card = f"---\n{_metadata(exported, config)}\n---\n\n{text}\n"
    (output / NAME).write_text(card, encoding="utf-8")


def read_results(workdir: epath.Path, step: int, *, last: bool) -> list[Result]:
    """Returns the results of a checkpoint from evaluation.json, and else from summary.json.

    Args:
      workdir: Working directory of the stage.
      step: Number of updates of the checkpoint; results of other checkpoints are left out.
      last: Whether it is the last checkpoint of the stage, of which summary.json has the results.
    """
    table = _read_json(workdir / "evaluation.json")
    results = [x for x in _results_of(table) if table.get(f"{_row(x)}/checkpoint") == step]
    if results or not last:
        return results
    summary = _read_json(workdir / "summary.json")
    return _results_of(
        {k.removeprefix("final/"): x for k, x in summary.items() if k.startswith("final/")}
    )


def _results_of(table: Mapping[str, Any]) -> list[Result]:
    """Returns the metrics of a table of names '<split>/[shuffled_<modality>/]<metric>'."""
    results = []
    for name in table:
        mean, low, high = (table.get(f"{name}{end}") for end in ("", "_lo", "_hi"))
        if mean is None or low is None or high is None:  # A value that was not finite is null.
            continue
        split, _, metric = name.partition("/")
        shuffled = ""
        if metric.startswith(SHUFFLED):
            shuffled, _, metric = metric.removeprefix(SHUFFLED).partition("/")
        result = Result(split, shuffled, metric, (mean, low, high), None)
        results.append(result._replace(samples=table.get(f"{_row(result)}/episodes")))
    return results


def _row(result: Result) -> str:
    """Returns the name of a result's row in evaluation.json."""
    shuffled = f"{SHUFFLED}{result.shuffled}" if result.shuffled else ""
    # Other rows are of levels of difficulty; 'reward/<function>' is a metric.
    level = result.metric.rpartition("/")[0]
    return "/".join(filter(None, (result.split, shuffled, level if level != "reward" else "")))


def _metadata(exported: ExportedModel, config: Any) -> str:
    """Returns the metadata of the hub as YAML."""
    # Imported here because training does not need it.
    from huggingface_hub import ModelCardData

    return ModelCardData(
        base_model=exported.base,
        library_name="peft" if exported.adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["mmrl_jax", *config.stages, *(["lora"] if exported.adapter else [])],
    ).to_yaml()


def _description(exported: ExportedModel, config: Any) -> str:
    base = exported.base or os.path.basename(config.model.checkpoint)
    what = (
        f"Low-rank adapters, in the format of PEFT, for the vision-language model `{base}`"
        if exported.adapter
        else f"The vision-language model `{base}`, fine-tuned, with its adapters merged"
    )
    return (
        f"{what}. It completes prompts about an image with text. "
        "It was trained and exported with mmrl_jax, which wrote this card from the run."
    )


def _training(exported: ExportedModel, config: Any, workdir: epath.Path) -> str:
    run = fingerprints.read(workdir)
    made_with = _read_json(workdir / fingerprints.NAME).get("made_with") or {}
    wall_s = _read_json(workdir / "summary.json").get("wall_s")
    data = config.get("dataset", {}).get("directory") or config.get("task", {}).get("name")
    rows = [
        ("stages", ", ".join(f"{x} ({config[x].num_updates} updates)" for x in config.stages)),
        ("checkpoint", f"update {exported.step} of the stage {exported.stage}"),
        ("problem", config.problem),
        ("data", data and os.path.basename(data.rstrip("/"))),
        ("reward functions", ", ".join(config.get("rewards", {}).get("functions", ()))),
        ("seed", config.seed),
        ("hardware", made_with.get("hardware")),
        ("wall time", None if wall_s is None else f"{wall_s / 60:.1f} minutes"),
        ("commit of mmrl_jax", made_with.get("commit")),
        (
            "versions",
            ", ".join(f"{name} {x}" for name, x in (made_with.get("versions") or {}).items()),
        ),
        *((f"fingerprint: {k}", x) for k, x in (run.fingerprints if run else {}).items()),
    ]
    return _table(("", ""), [row for row in rows if row[1] not in (None, "")])


def _options(config: Any) -> str:
    """Returns the options of the run that differ from their defaults as a table."""
    options = schema.flatten_group(problems.options(config))
    # Options inside a dictionary of options, such as `task.options`, have no default here.
    defaults = {name: option.default for name, option in options.items()}
    rows = [
        (f"`{name}`", _shown(value), _shown(defaults.get(name, dataclasses.MISSING)))
        for name, value in schema.flatten(config).items()
        if name not in defaults or not _same(value, defaults[name])
    ]
    return _table(("option", "value", "default"), rows)


def _same(value: Any, default: Any) -> bool:
    # A list of the command line is a tuple in a dataclass.
    return (list(value) if isinstance(value, tuple) else value) == (
        list(default) if isinstance(default, tuple) else default
    )


def _results(exported: ExportedModel, results: Sequence[Result], workdir: epath.Path) -> str:
    if not results:
        return (
            f"No results of update {exported.step} were recorded. `python -m experiments.evaluate` "
            "measures them."
        )
    rows = [
        (
            x.split,
            f"{x.shuffled} of another sample" if x.shuffled else "its own",
            x.metric,
            "{:.3f} [{:.3f}, {:.3f}]".format(*x.values),
            "" if x.samples is None else x.samples,
        )
        for x in results
    ]
    table = _table(("split", "input", "metric", "mean [95 % interval]", "samples"), rows)
    note = (
        "If the result with the image of another sample is as high as the ordinary one, the "
        "model does not use its images."
    )
    return f"{table}\n\n{note}" if any(x.shuffled for x in results) else table


def _limits(exported: ExportedModel, config: Any, results: Sequence[Result]) -> str:
    limits = [
        "It was evaluated on the splits above only. Nothing is known about other prompts and "
        "images, and it was not tested for harmful completions.",
        "The limits and the license of the pretrained model apply.",
    ]
    if not any(x.shuffled for x in results):
        limits.append(
            "It was not evaluated with the images of other samples, so that the results do not "
            "show whether it uses its images."
        )
    if exported.stage != config.stages[-1]:
        limits.append(f"The stages after {exported.stage!r} are not part of it.")
    if exported.dtype != "float32":
        limits.append(
            f"The parameters were rounded to {exported.dtype}; the results are those before."
        )
    return "\n".join(f"- {text}" for text in limits)


def _shown(value: Any) -> str:
    """Returns a value as code, without the directories above that of an absolute path."""
    return "" if value is dataclasses.MISSING else f"`{_shortened(value)!r}`"


def _shortened(value: Any) -> Any:
    """Returns a value whose absolute paths have their last names only."""
    if isinstance(value, str) and os.path.isabs(value):
        return os.path.basename(value.rstrip("/"))
    if isinstance(value, tuple | list):
        return type(value)(map(_shortened, value))
    if isinstance(value, Mapping):
        return {key: _shortened(x) for key, x in value.items()}
    return value


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = [[" ".join(str(x).split()).replace("|", "\\|") for x in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _read_json(path: epath.Path) -> dict[str, Any]:
    """Returns the object in a JSON file; an empty one if it is missing or damaged."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
