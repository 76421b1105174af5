"""Prompts from files, with a user's own reward functions in Python.

    records of the update -> [completions] -> texts -> reward functions -> [learning] -> next update

In brackets are the two compiled programs of an update; what lies between happens on the host. The
records' own answers can be learned from first, as labels.
"""

from collections.abc import Callable
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mmrl_jax.config.options import (
    Group,
    options_of,
)
from mmrl_jax.distributed import mesh as mesh_lib
from mmrl_jax.evaluation.chunks import in_chunks
from mmrl_jax.evaluation.questions import Sample
from mmrl_jax.evaluation.rewards import describe
from mmrl_jax.learners import grpo, registry
from mmrl_jax.learners.token_learner import ScoredCompletions, TokenState
from mmrl_jax.models import lora
from mmrl_jax.pretrained.chat import ChatTokenizer
from mmrl_jax.problems import dataset_options, problem, token_models, token_problem
from mmrl_jax.problems.host_rewards import (
    Scored,
    Scorer,
    Split,
    completion_rows,
    open_split,
    prompt_rows,
    tell_images,
    tell_rejected,
)
from mmrl_jax.problems.sources import Collected, Constants, Learn, Source, update_keys
from mmrl_jax.problems.token_problem import CompletionOptions, LabelOptions, TokenProblem
from mmrl_jax.rollouts.generate import Completions, Sampling
from mmrl_jax.tasks.folder import METADATA, Batch
from mmrl_jax.tasks.question import Prompt, Texts
from mmrl_jax.tasks.rewards import RewardWorkerPool
from mmrl_jax.training import fingerprints
from mmrl_jax.training.prefetch import Prefetch
from mmrl_jax.training.stage import Carry, HostUpdate
from mmrl_jax.types import Metrics, Params

VALIDATION, TEST = SPLITS = ("validation", "test")


def options(config: Any) -> Group:
    """Returns the keys that a config of this problem has, by its stages and its kind of model."""
    kinds = {"labels": (LabelOptions,), "completions": (CompletionOptions,)}
    keys = problem.options_of_problem(
        dataset=options_of(dataset_options.DatasetOptions),
        rewards=options_of(dataset_options.RewardOptions),
        model=token_models.options(config),
        **token_problem.stage_options(config, kinds),
    )
    # The evaluation is of all validation records.
    keys["run"] = {name: x for name, x in keys["run"].items() if name != "eval_episodes"}
    return keys


class Dataset(TokenProblem):
    """The problem of prompts from files, see `problem.Problem`; it reads the whole folder.

    Attributes:
      chat: The model's texts.
      records: The records of the folder, read once a run.
      scorer: Rewards of completions.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        dataset_options.check(config)
        d, size = config.dataset, (config.dataset.height, config.dataset.width)
        functions = dataset_options.reward_functions(config)
        spec = token_models.read_spec(config.model, size)
        assert spec is not None  # See `dataset_options.check`.
        self.chat: ChatTokenizer = spec.chat
        self._image_tokens = token_models.image_tokens(config.model, spec, size)
        rows = prompt_rows(self.chat, [""], length=d.prompt_tokens, images=self._image_tokens)
        # No prompt and no answer is known beforehand: this is what the shapes are read from.
        texts = Texts(("",), (), *rows, np.zeros((0, d.completion_tokens), np.int32), self.chat)
        model = token_models.make_model(config.model, spec, texts, size)
        super().__init__(config, model, f"eval/{VALIDATION}/return")
        self._labels = [n for n in config.stages if registry.TOKEN[n].experience == "labels"]
        self.check_sizes(
            *(
                token_problem.check_groups(config, name, d.completion_tokens)
                for name in config.stages
                if name not in self._labels
            )
        )
        self.records = self._open()
        self.splits = {split: len(getattr(self.records, split)) for split in SPLITS}
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

    @functools.cached_property
    def scorer(self) -> Scorer:
        """Scores completions by the functions of the config; its processes start with it.

        Raises:
          RuntimeError: See `RewardWorkerPool`.
        """
        return Scorer(self._pool(), self.chat)

    def _open(self) -> Split:
        """Opens the folder.

        Raises:
          ValueError: See `open_split`.
        """
        d = self.config.dataset
        return open_split(
            self.chat,
            directory=pathlib.Path(d.directory).resolve(),
            test_directory=d.test_directory and pathlib.Path(d.test_directory).resolve(),
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

    def dependencies(self) -> dict[str, str]:
        """See `problem.Problem`."""
        d = self.config.dataset
        tables = [
            (pathlib.Path(place) / METADATA).read_bytes()
            for place in (d.directory, d.test_directory)
            if place is not None
        ]
        images = [
            (name, info.digest)
            for part in self.records
            for name, info in zip(part.names, part.images, strict=True)
        ]
        code = {name: dataset_options.source_code(name) for name in self._functions}
        return super().dependencies() | {
            "records": fingerprints.digest(tables, sorted(images)),
            "reward_functions": fingerprints.digest(sorted(code.items())),
        }

    # -- Experience --------------------------------------------------------------------------------

    def prompts(self, batch: Batch) -> Prompt:
        """Returns the B prompts of a batch, split over the devices."""
        tokens, mask = prompt_rows(
            self.chat,
            batch.prompts,
            length=self.config.dataset.prompt_tokens,
            images=self._image_tokens,
        )
        unnamed = np.zeros(len(tokens), np.int32)  # Of no table of a task's texts.
        arrays = tokens, mask, batch.images, *(unnamed,) * 4
        return Prompt(*mesh_lib.put_batch(arrays, mesh=self.mesh))

    def source(self, name: str) -> Source:
        """See `TokenProblem`.

        Raises:
          NoRewards: Not a single answer of the first records has a reward.
          RuntimeError: See `RewardWorkerPool`.
        """
        if name == self.config.stages[0]:
            d = self.config.dataset
            tell_rejected(self.records)
            tell_images(self.records, (d.height, d.width), resize=d.resize)
        labels = name in self._labels
        size = self.config[name].batch_size if labels else self.config[name].prompts_per_update
        train = self.records.train.with_batch_size(size)
        self.scorer.rehearse(train)
        if labels:
            return self._labelled(name, train)
        return self._completions(name, train)

    def _labelled(self, name: str, train: Any) -> Source:
        """The records' own answers, read batch by batch while the devices learn from the last."""
        s, length = self.config[name], self.config.dataset.completion_tokens

        def read(update: int) -> ScoredCompletions:
            batch = train.batch(update)
            rows = completion_rows(self.chat, batch.answers, length=length)
            rows = mesh_lib.put_batch(rows, mesh=self.mesh)
            return ScoredCompletions.labelled(self.prompts(batch), *rows)

        def on_host(learn: Learn) -> Callable[[Carry, Any], HostUpdate]:
            def step(
                carry: Carry, constants: Constants, batch: ScoredCompletions
            ) -> tuple[Carry, Metrics]:
                return learn(carry, constants, Collected(None, batch, carry.rng, {}))

            def compiled(carry: Carry, constants: Constants) -> HostUpdate:
                replicated = mesh_lib.replicated(self.mesh)
                jitted = jax.jit(step, donate_argnums=0, out_shardings=replicated)
                lowered = jitted.lower(carry, constants, read(0))
                program, batches = lowered.compile(), Prefetch(read, updates=s.num_updates)

                def collect(carry: Carry, _: Any) -> ScoredCompletions:
                    return batches(int(jax.device_get(carry.updates)))

                shapes = mesh_lib.replicated_shapes(lowered.out_info[1], mesh=self.mesh)
                return HostUpdate(collect, program, shapes)

            return compiled

        return Source(stream=problem.FIXED_SET, samples_per_update=s.batch_size, on_host=on_host)

    def _completions(self, name: str, train: Any) -> Source:
        r = self.config[name]
        return Source(
            stream=problem.COMPLETIONS,
            samples_per_update=r.prompts_per_update * r.num_completions,
            on_host=lambda learn: functools.partial(self._compile, name, train, learn),
            console=("completion/reward", "completion/unscored"),
        )

    def _compile(
        self, name: str, train: Any, learn: Learn, carry: Carry, constants: Constants
    ) -> HostUpdate:
        """Compiles the two programs of an update, between which the rewards are computed."""
        r, replicated = self.config[name], mesh_lib.replicated(self.mesh)
        placed = functools.partial(mesh_lib.replicated_shapes, mesh=self.mesh)
        generate = jax.jit(functools.partial(self._generate, name), out_shardings=replicated)

        @functools.partial(jax.jit, donate_argnums=0, out_shardings=replicated)
        def step(
            carry: Carry, constants: Constants, scored: tuple, failed: jax.Array
        ) -> tuple[Carry, Metrics]:
            batch = ScoredCompletions.single_turn(*scored)
            batch = token_problem.shape_rewards(batch, r.overlong_buffer)
            key = update_keys(carry, 2)[1]
            carry, metrics = learn(carry, constants, Collected(None, batch, key, {}))
            unscored = 1 - jnp.mean(batch.valid)
            metrics |= {"completion/unscored": unscored, "reward/failed": failed}
            return carry, metrics | grpo.describe(batch)

        def read(update: int) -> tuple[Batch, Prompt]:
            batch = train.batch(update)
            return batch, self.prompts(batch)

        _, prompts = read(0)
        generating = generate.lower(
            carry.learner.params, constants.frozen, prompts, carry.rng, carry.updates
        )
        number = placed(np.empty((r.prompts_per_update, r.num_completions), np.float32))
        scored = prompts, placed(generating.out_info), number, number
        stepping = step.lower(carry, constants, scored, placed(np.float32(0)))
        generated, stepped = generating.compile(), stepping.compile()
        batches = Prefetch(read, updates=r.num_updates)

        def collect(carry: Carry, constants: Constants) -> tuple[tuple, jax.Array]:
            batch, prompts = batches(int(jax.device_get(carry.updates)))
            completions = generated(
                carry.learner.params, constants.frozen, prompts, carry.rng, carry.updates
            )
            _, rewards = self.scorer(train, batch, completions)
            # NaN times a mask of 0 is NaN.
            reward = np.where(rewards.valid, rewards.reward, 0)
            numbers = reward, rewards.valid.astype(np.float32), np.float32(rewards.failed)
            reward, valid, failed = jax.device_put(numbers, replicated)
            return (prompts, completions, reward, valid), failed

        return HostUpdate(
            collect,
            lambda carry, constants, collected: stepped(carry, constants, *collected),
            placed(stepping.out_info[1]),
        )

    def _generate(
        self,
        name: str,
        params: Params,
        frozen: Any,
        prompts: Prompt,
        rng: jax.Array,
        updates: jax.Array,
    ) -> Completions:
        """The completions of an update of a stage; traced."""
        # Each device completes its part.
        prompts = mesh_lib.constrain_batch(prompts, mesh=self.mesh)
        return self.model.policy.answer(
            params,
            frozen,
            prompts,
            jax.random.split(jax.random.fold_in(rng, updates))[0],
            group=self.config[name].num_completions,
            sampling=Sampling(temperature=getattr(self.options(name), "temperature", 1.0)),
        )

    # -- Evaluation --------------------------------------------------------------------------------

    def greedy(self, episodes: int | None = None) -> Callable[[Params, str], tuple[Batch, Scored]]:
        """Returns (variables, split) -> its records, and the greedy completions of them, G = 1.

        Args:
          episodes: The first so many records of a split; None for all.
        """

        @functools.cache  # An evaluation is repeated, and images are read from files.
        def read(split: str) -> Batch:
            part = getattr(self.records, split)
            count = len(part) if episodes is None else episodes
            if count > len(part):
                raise ValueError(
                    f"{count} episodes, but split {split!r} has {len(part)} records; ask for as "
                    "many at most."
                )
            return part.read(range(count))

        @jax.jit
        def complete(variables: Params, prompts: Prompt) -> Completions:
            halves, sampling = lora.split(variables, ".*"), Sampling(temperature=0.0)
            return self.model.policy.answer(
                *halves, prompts, jax.random.key(0), group=1, sampling=sampling
            )

        def greedy(variables: Params, split: str) -> tuple[Batch, Scored]:
            batch, part = read(split), getattr(self.records, split)
            completions = in_chunks(
                lambda indices: complete(variables, self.prompts(batch.take(indices))),
                np.arange(len(batch.records)),
                max_size=self.eval_batch_size(),
                devices=self.mesh.size,
            )
            return batch, self.scorer(part, batch, completions, allow_none=True)

        return greedy

    def measure(
        self, *, episodes: int | None = None, ablations: bool = False
    ) -> Callable[[Params, str], dict[str, float]]:
        """See `problem.Problem` and `evaluation.rewards.describe`.

        The function raises ValueError if a split has fewer records.
        """
        greedy = self.greedy(episodes)

        def measure(variables: Params, split: str) -> dict[str, float]:
            _, (_, rewards) = greedy(variables, split)
            return describe(rewards, split, max_failed=self.config.rewards.max_failed)

        return measure

    def periodic_evaluation(self, frozen: Any) -> Callable[[TokenState], dict[str, float]]:
        """See `TokenProblem`."""
        return self.periodic(self.measure(), frozen, VALIDATION)

    def samples(self, variables: Params, count: int) -> tuple[list[Sample], dict[str, float]]:
        """See `problem.Problem`: the first test records, and the metrics of all of them."""
        batch, (completions, rewards) = self.greedy()(variables, TEST)
        described = describe(rewards, TEST, max_failed=self.config.rewards.max_failed)
        samples = [
            Sample(
                batch.images[i],
                batch.prompts[i],
                batch.answers[i],
                text,
                float(rewards.reward[i, 0]),
                correct=None,  # What is right, the reward functions alone can say.
            )
            for i, (text,) in enumerate(completions[:count])
        ]
        return samples, {f"eval/{TEST}/{name}": value for name, value in described.items()}
