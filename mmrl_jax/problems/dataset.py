"""Problem of prompts from files, with reward functions of the user in Python.

    records of the update -> [completions] -> texts -> reward functions -> [learning] -> next update

The steps in brackets are the two compiled programs of an update; the others run on the host. In a
supervised stage, the answers of the records are the labels.
"""

from collections.abc import Callable, Sequence
import functools
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from mmrl_jax.config.options import Group, options_of
from mmrl_jax.data.files import file_digest
from mmrl_jax.data.weights import select
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.distributed import multihost
from mmrl_jax.distributed.rows import BatchRows, strided_shares
from mmrl_jax.evaluation.chunks import in_chunks
from mmrl_jax.evaluation.prompts import Sample
from mmrl_jax.evaluation.rewards import describe
from mmrl_jax.learners import registry
from mmrl_jax.learners.token_learner import ScoredCompletions, TokenState
from mmrl_jax.models import lora
from mmrl_jax.pretrained.chat import ChatTokenizer
from mmrl_jax.problems import (
    dataset_options,
    dataset_shapes,
    host_update,
    problem,
    token_models,
    token_options,
    token_problem,
)
from mmrl_jax.problems.host_rewards import (
    Scorer,
    Split,
    open_split,
    print_image_summary,
    print_rejected,
    tokenize_completions,
    tokenize_prompts,
)
from mmrl_jax.problems.sources import Source, batches_on_host
from mmrl_jax.problems.token_problem import LabelOptions, TokenProblem
from mmrl_jax.rollouts.generate import Completions, Sampling
from mmrl_jax.tasks import tables
from mmrl_jax.tasks.folder import Batch, Records
from mmrl_jax.tasks.prompts import Prompt, Texts, free_prompts
from mmrl_jax.tasks.reward_signatures import check_columns, read_signature
from mmrl_jax.tasks.rewards import Rewards, RewardWorkerPool
from mmrl_jax.training import fingerprints
from mmrl_jax.types import Params

VALIDATION, TEST = SPLITS = ("validation", "test")


def options(config: Any) -> Group:
    """Returns the keys of a config of this problem, by its stages and its kind of model."""
    kinds = {"labels": (LabelOptions,), "completions": (dataset_options.HostRewardOptions,)}
    keys = problem.options_of_problem(
        dataset=options_of(dataset_options.DatasetOptions),
        rewards=options_of(dataset_options.RewardOptions),
        model=token_options.options(config),
        **token_problem.stage_options(config, kinds),
    )
    # Evaluations always use all validation records.
    keys["run"] = {name: x for name, x in keys["run"].items() if name != "eval_episodes"}
    return keys


def other_images(images: Sequence[str]) -> np.ndarray:
    """Returns for each of B records the index of another record, for its image, int64 [B].

    Every index is returned once. The two records have different images, unless more than half of
    all records have the same image.

    Args:
      images: Digests of the images of the B records.
    """
    _, numbers, counts = np.unique(images, return_inverse=True, return_counts=True)
    # Records with the same image are adjacent in this order, which is rotated by the longest run.
    order = np.argsort(numbers, kind="stable")
    others = np.empty_like(order)
    others[order] = np.roll(order, -counts.max())
    return others


class Dataset(TokenProblem):
    """Problem of prompts from files, see `problem.Problem` for the interface.

    The records are opened and checked by `open_data`, or when they are first used. A trained policy
    can therefore be loaded on a machine without them. Until `open_data`, `splits` has the minimum
    numbers of the config, which for the test split is 0 with `dataset.test_directory`.

    Args:
      config: Config of the run, with the keys of `options`.

    Attributes:
      chat: Tokenizer and chat template of the model.
      scorer: Scores completions with the reward functions.

    Raises:
      ValueError: If the config is invalid.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        dataset_options.check(config)
        d, size = config.dataset, (config.dataset.height, config.dataset.width)
        functions = dataset_options.reward_functions(config)
        spec = token_models.read_spec(config.model, size)
        assert spec is not None  # See `dataset_options.check`.
        self.chat: ChatTokenizer = spec.chat
        self._image_tokens = token_models.image_tokens(config.model, spec, size)
        rows = tokenize_prompts(self.chat, [""], length=d.prompt_tokens, images=self._image_tokens)
        # Prompts and answers are not known in advance. These placeholders define the shapes.
        texts = Texts(("",), (), *rows, np.zeros((0, d.completion_tokens), np.int32), self.chat)
        model = token_models.make_model(config.model, spec, texts, size)
        super().__init__(config, model, f"eval/{VALIDATION}/return")
        self.test_split = TEST
        self._labels = [n for n in config.stages if registry.TOKEN[n].experience == "labels"]
        self.check_sizes(
            *(
                token_problem.check_groups(config, name, d.completion_tokens)
                for name in config.stages
                if name not in self._labels
            )
        )
        self.splits = {VALIDATION: d.validation_size, TEST: d.test_size}
        r = config.rewards
        self._functions = functions
        self._pool = functools.partial(
            RewardWorkerPool,
            functions,
            dict(zip(functions, r.weights, strict=True)),
            workers=r.workers,
            timeout_s=r.timeout_s,
            memory_mb=r.memory_mb,
        )

    def open_data(self) -> None:
        """Opens and checks the records, see `problem.Problem`."""
        if not mesh_lib.only_described():
            self.splits = {split: len(getattr(self.records, split)) for split in SPLITS}

    @property
    def records(self) -> Split:
        """Records of the folder, by split.

        Raises:
          ValueError: If the records cannot be used, see `open_split`, or have no column that a
            reward function needs.
        """
        return self._opened[0]

    @functools.cached_property
    def weighted_records(self) -> Records:
        """Training records by their weights, which evaluations do not need.

        Raises:
          InvalidData: If `dataset.weights` cannot be used, see `weights.select`.
          ValueError: If the records cannot be used, see `records`.
        """
        train, path = self.records.train, self.config.dataset.weights
        if path is None:
            return train
        weights = select(path, train.names, train.digests, key="dataset.weights")
        return train.with_weights(weights)

    @functools.cached_property
    def scorer(self) -> Scorer:
        """Scores completions with the reward functions; its first use starts the workers.

        Raises:
          RuntimeError: If a worker does not start.
        """
        return Scorer(self._pool(columns=self._opened[1]), self.chat)

    @functools.cached_property
    def _opened(self) -> tuple[Split, frozenset[str]]:
        """The records of the folder, and the names of their columns."""
        d = self.config.dataset
        records, columns = open_split(
            self.chat,
            directory=pathlib.Path(d.directory).resolve(),
            files=d.files,
            test_directory=d.test_directory and pathlib.Path(d.test_directory).resolve(),
            test_files=d.test_files,
            names=d.columns.to_dict(),
            validation_size=d.validation_size,
            test_size=d.test_size,
            split_seed=d.split_seed,
            size=(d.height, d.width),
            resize=d.resize,
            batch_size=self.eval_batch_size(),
            seed=self.config.seed,
            max_rejected=d.max_rejected,
            completion_length=d.completion_tokens if self._labels else None,
            length=d.prompt_tokens,
            images=self._image_tokens,
        )
        for name, function in self._functions.items():
            check_columns(name, read_signature(name, function), columns)
        return records, columns

    def dependencies(self, *, of_policy: bool = False) -> dict[str, str]:
        """Returns fingerprints of model, records and reward functions, see `problem.Problem`.

        The fingerprint of the weights is left out if their file does not exist: a trained policy
        can be evaluated without them.
        """
        if of_policy:
            return super().dependencies()
        d = self.config.dataset
        contents = [
            tables.fingerprint(path)
            for directory, files in ((d.directory, d.files), (d.test_directory, d.test_files))
            if directory is not None
            for path in tables.find_tables(pathlib.Path(directory), files)
        ]
        images = [
            (name, info.digest)
            for part in self.records
            for name, info in zip(part.names, part.images, strict=True)
        ]
        code = {name: dataset_options.source_code(name) for name in self._functions}
        found = super().dependencies() | {
            "records": fingerprints.digest(contents, sorted(images)),
            "reward_functions": fingerprints.digest(sorted(code.items())),
        }
        if d.weights is not None and pathlib.Path(d.weights).is_file():
            found["weights"] = file_digest(pathlib.Path(d.weights))
        return found

    # -- Experience --------------------------------------------------------------------------------

    def prompts(self, batch: Batch) -> Prompt:
        """Returns the prompts of a batch as host arrays."""
        tokens, mask = tokenize_prompts(
            self.chat,
            batch.prompts,
            length=self.config.dataset.prompt_tokens,
            images=self._image_tokens,
        )
        return free_prompts(tokens, mask, batch.images)

    def source(self, name: str) -> Source:
        """Returns the source of the experience of a stage, see `TokenProblem`.

        Raises:
          InvalidData: If the weights of the records cannot be used.
          NoRewards: If no answer of the records of the first batch has a reward.
          RuntimeError: If a worker for reward functions does not start.
        """
        if mesh_lib.only_described():
            return dataset_shapes.source(self, name)
        if name == self.config.stages[0] and multihost.is_primary():
            d = self.config.dataset
            print_rejected(self.records)
            print_image_summary(self.records, (d.height, d.width), resize=d.resize)
        labels = name in self._labels
        size = self.config[name].batch_size if labels else self.config[name].prompts_per_update
        train = multihost.on_all(lambda: self.weighted_records).with_batch_size(size)
        rows = BatchRows(self.mesh, size)
        multihost.on_all(lambda: self.scorer.check_functions(train, rows.held))
        if labels:
            return self._label_source(name, train, rows)
        return self._completion_source(name, train, rows)

    def _label_source(self, name: str, train: Records, rows: BatchRows) -> Source:
        """Returns a source of the records' answers, which are read one batch ahead."""
        s, length = self.config[name], self.config.dataset.completion_tokens

        def read(update: int) -> ScoredCompletions:
            batch = train.batch(update, rows.held)
            labels = tokenize_completions(self.chat, batch.answers, length=length)
            prompts, labels = rows.put((self.prompts(batch), labels))
            return ScoredCompletions.from_labels(prompts, *labels)

        return Source(
            stream=problem.FIXED_SET,
            samples_per_update=s.batch_size,
            on_host=batches_on_host(read, num_updates=s.num_updates, mesh=self.mesh),
        )

    def _completion_source(self, name: str, train: Records, rows: BatchRows) -> Source:
        """Returns a source of sampled completions with rewards on the host."""
        r = self.config[name]
        return Source(
            stream=problem.COMPLETIONS,
            samples_per_update=r.prompts_per_update * r.num_completions,
            on_host=lambda learn: functools.partial(
                host_update.compile_update, self, name, train, rows, learn
            ),
            in_flight=host_update.in_flight(self, name),
            console=("completion/reward", "completion/unscored"),
        )

    # -- Evaluation --------------------------------------------------------------------------------

    def greedy(
        self, episodes: int | None = None
    ) -> Callable[..., tuple[Batch, Completions, Rewards]]:
        """Returns a function that completes the records of a split greedily.

        Args:
          episodes: Number of records from the front of a split; None for all records.

        Returns:
          Function (variables, split, shuffle_images=False) -> (records, their completions, rewards
          of these), with G = 1; all processes have all of them. With `shuffle_images` the policy is
          given the image of another record, see `other_images`.
        """

        @functools.cache  # Evaluations are repeated, and reading the images from files is slow.
        def read(split: str) -> Batch:
            part = getattr(self.records, split)
            count = len(part) if episodes is None else episodes
            if count > len(part):
                raise ValueError(
                    f"{count} episodes, but split {split!r} has only {len(part)} records; give at "
                    "most that many."
                )
            return part.read(range(count))

        @jax.jit
        def complete(variables: Params, prompts: Prompt) -> Completions:
            trainable, frozen = lora.split(variables, ".*")
            return self.model.policy.generate(
                trainable,
                frozen,
                prompts,
                jax.random.key(0),
                num_completions=1,
                sampling=Sampling(temperature=0.0),
            )

        def greedy(
            variables: Params, split: str, shuffle_images: bool = False
        ) -> tuple[Batch, Completions, Rewards]:
            batch, part = multihost.on_all(lambda: read(split)), getattr(self.records, split)
            shown = batch
            if shuffle_images:
                others = other_images([part.images[i].digest for i in batch.records])
                shown = batch._replace(images=batch.images[others])

            def complete_chunk(indices: np.ndarray) -> Completions:
                prompts = self.prompts(shown.take(indices))
                return complete(variables, mesh_lib.put_batch(prompts, mesh=self.mesh))

            completions = in_chunks(
                complete_chunk,
                np.arange(len(batch.records)),
                max_size=self.eval_batch_size(),
                devices=mesh_lib.batch_shards(self.mesh),
            )
            shares = strided_shares(len(batch.records))
            share = shares[jax.process_index()]
            _, rewards, _ = self.scorer(
                part,
                batch.take(share),
                jax.tree.map(lambda x: x[share], completions),
                shares=shares,
                allow_none=True,
            )
            return batch, completions, rewards

        return greedy

    def measure(
        self, *, episodes: int | None = None, ablations: bool = False
    ) -> Callable[[Params, str], dict[str, float]]:
        """Returns the reported evaluation, see `problem.Problem` and `evaluation.rewards.describe`.

        With `ablations`, 'shuffled_image/<metric>' has the return, its interval and the failed
        fraction with the image of another record; the reward functions are called once more. The
        returned function raises ValueError if a split has fewer records than `episodes`.
        """
        greedy, r = self.greedy(episodes), self.config.rewards
        weighted = [name for name, w in zip(r.functions, r.weights, strict=True) if w]
        described = functools.partial(describe, max_failed=r.max_failed, weighted=weighted)

        def measure(variables: Params, split: str) -> dict[str, float]:
            metrics = described(greedy(variables, split)[2], split)
            if ablations:
                rewards = greedy(variables, split, shuffle_images=True)[2]
                shuffled = described(rewards, f"{split}, shuffled images")
                names = [name for name in shuffled if not name.startswith("reward/")]
                metrics |= {f"shuffled_image/{name}": shuffled[name] for name in names}
            return metrics

        return measure

    def periodic_evaluation(
        self, name: str, frozen: Any
    ) -> Callable[[TokenState], dict[str, float]]:
        """Returns the evaluation on the validation records, see `TokenProblem`."""
        return self.periodic(self.measure(), frozen, VALIDATION)

    def samples(self, variables: Params, count: int) -> list[Sample]:
        """Returns completions of the first test records, see `problem.Problem`."""
        greedy = _greedy_samples(self, min(count, len(self.records.test)))
        batch, completions, rewards = greedy(variables, TEST)
        return [
            Sample(
                batch.images[i],
                batch.prompts[i],
                batch.answers[i],
                text,
                float(rewards.reward[i, 0]),
                correct=None,  # Only the reward functions know what is correct.
            )
            for i, (text,) in enumerate(self.scorer.decode(completions))
        ]


@functools.lru_cache(maxsize=1)
def _greedy_samples(of: Dataset, count: int) -> Callable[..., tuple[Batch, Completions, Rewards]]:
    """Returns the function that completes sample records, which a run compiles only once."""
    return of.greedy(count)
