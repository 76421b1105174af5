"""Compares pretrained vision-language models as token policies with transformers and torch."""

import copy
import functools
import json
import shutil

import huggingface_hub
import huggingface_hub.constants
import jax
import numpy as np
import peft
from PIL import Image
import pytest
from safetensors.numpy import load_file, save_file
import tokenizers
import torch
import transformers

import mmrl_jax
from mmrl_jax import problems
from mmrl_jax.commands import export
from mmrl_jax.configs import count_grpo, vlm_grpo
from mmrl_jax.learners.token_learner import TokenPolicy
from mmrl_jax.models import lora
from mmrl_jax.monitoring import metrics
from mmrl_jax.pretrained import hub, vision_chat
from mmrl_jax.pretrained.chat import ChatTokenizer, Template
from mmrl_jax.pretrained.peft_format import load_adapter, save_adapter
from mmrl_jax.problems import token_models
from mmrl_jax.tasks.prompts import Prompt
from tests import fake_hub, processors, tiny
from tests.tasks.test_folder import folder

SIZE = (24, 40)
ASKED = "how many red circles ?"
# What a turn of the template ends with, where that is not what ends a text.
ENDS = {"idefics3": "<end_of_utterance>", "smolvlm": "<end_of_utterance>"}
ENDS |= dict.fromkeys(("llava_onevision", "qwen2_5_vl", "qwen3_vl"), "<|im_end|>")
FAMILIES = sorted(processors.CHATS.keys() - {"idefics3_whole"})


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Returns a function family -> directory, transformers' processor and model."""

    @functools.cache
    def save(family):
        directory = tmp_path_factory.mktemp(family)
        return directory, *processors.save_chat(family, directory)

    return save


def read(directory, *, splitting=True, size=SIZE):
    return vision_chat.read_spec(
        directory, size, splitting=splitting, dtype=np.float32, remat=False
    )


def picture(seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(SIZE[::-1], Image.Resampling.BICUBIC))


def their_inputs(processor, image):
    """Returns transformers' inputs for a prompt and an image."""
    shown = {"type": "image", "image": Image.fromarray(image)}
    if processor.tokenizer.chat_template is None:
        text = f"<image>{ASKED}"
        found = dict(processor(text=text, images=[shown["image"]], return_tensors="pt"))
        return {name: x for name, x in found.items() if name != "labels"}
    turn = [{"role": "user", "content": [shown, {"type": "text", "text": ASKED}]}]
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    # The tokenizer puts it there once more, and transformers leaves that to the caller.
    text = text.removeprefix("<s>")
    return processor(text=text, images=[shown["image"]], return_tensors="pt")


@pytest.mark.parametrize(
    "family",
    # What Idefics3 does, SmolVLM does.
    [pytest.param(x, marks=[pytest.mark.slow] if x == "idefics3" else []) for x in FAMILIES],
)
def test_answers_have_the_probability_that_torch_gives_them(family, make):
    directory, processor, model = make(family)
    sight = read(directory)
    inputs = their_inputs(processor, picture())
    prompt = sight.chat.encode_prompt(ASKED, images=sight.image_tokens)
    assert prompt == inputs["input_ids"][0].tolist()
    assert prompt.count(sight.chat.image) == sight.image_tokens > 1

    answer = np.array(sight.chat.encode_completion("two"))
    assert answer[-1] == processor.tokenizer.convert_tokens_to_ids(ENDS.get(family, "</s>"))
    expected = their_log_probs(model, inputs, answer)
    params = lora.split(hub.load_vision_language_model(directory).params, ".*")
    found = log_probs(params, sight, prompt, answer, picture())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)  # Pixels may differ by a level.
    other = log_probs(params, sight, prompt, answer, picture(seed=1))
    assert np.abs(other - found).max() > 0.05  # It sees.


def their_log_probs(model, inputs, answer):
    """Of an answer, by a model of torch."""
    # What is not of the prompt is of type 1 to PaliGemma; to Qwen, what is no picture of type 0.
    behind = {"input_ids": torch.tensor(answer), "mm_token_type_ids": torch.zeros(len(answer))}
    extended = dict(inputs)
    for name in extended.keys() & {"attention_mask", "token_type_ids", *behind}:
        more = behind.get(name, torch.ones(len(answer)))[None].to(inputs[name].dtype)
        extended[name] = torch.cat([inputs[name], more], dim=1)
    with torch.no_grad():
        logits = model(**extended).logits[0, inputs["input_ids"].shape[1] - 1 : -1]
    return torch.log_softmax(logits, dim=-1)[range(len(answer)), answer].numpy()


def log_probs(params, sight, prompt, answer, image):
    """The same by our policy of two halves of variables, behind two more tokens of padding."""
    chat = sight.chat
    policy = TokenPolicy(
        sight.model, len(answer), chat.stops, chat.pad, sight.preprocess_images, sight.positions
    )
    tokens = np.array([[chat.pad] * 2 + prompt])
    prompts = Prompt(tokens, np.arange(len(prompt) + 2)[None] >= 2, image[None], *(None,) * 4)
    found = jax.jit(functools.partial(policy.log_probs, temperature=1.0))(
        *params,
        prompts,
        answer[None, None],
        np.ones((1, 1, len(answer)), bool),
    )
    return np.asarray(found.log_prob)[0, 0]


def test_a_picture_that_is_not_cut_is_one_tile(make):
    directory, _, _ = make("smolvlm")
    cut, whole = read(directory), read(directory, splitting=False)
    images = picture()[None]
    # 24 x 40 becomes 58 x 96, then 2 x 3 tiles of 32 x 32 and the whole, of 4 features each.
    assert (
        cut.preprocess_images(images).pixels.shape == (1, 7, 32, 32, 3) and cut.image_tokens == 28
    )
    assert (
        whole.preprocess_images(images).pixels.shape == (1, 1, 32, 32, 3)
        and whole.image_tokens == 4
    )
    text = cut.chat.tokenizer.decode(whole.chat.encode_prompt(ASKED, images=4))
    fake, words = "<fake_token_around_image>", "<image>" * 4
    assert text == (f"<s>User:{fake}<global-img>{words}{fake}{ASKED}<end_of_utterance>\nAssistant:")
    np.testing.assert_allclose(
        whole.preprocess_images(images).pixels[0, 0],
        cut.preprocess_images(images).pixels[0, -1],
        atol=0.2,
    )


def test_an_answer_begins_as_the_template_has_it(make):
    for family, said in (
        ("smolvlm", " two<end_of_utterance>"),
        ("llava", " two</s>"),
        ("qwen3_vl", "two<|im_end|>"),
    ):
        chat = read(make(family)[0]).chat
        assert chat.tokenizer.decode(chat.encode_completion("two")) == said
        assert chat.decode(chat.encode_completion("two")) == "two"


def test_a_whole_model_s_texts_are_recorded_whatever_an_image_s_tokens(make):
    digests = set()
    for family in ("smolvlm", "qwen2_5_vl"):
        directory = make(family)[0]
        config = small("vlm_grpo", directory)
        texts = read(directory).chat
        digests.add(token_models.dependencies(config.model, texts)["chat_template"])
        again = read(directory, splitting=False).chat
        digests.add(token_models.dependencies(config.model, again)["chat_template"])
    assert len(digests) == 2


def test_an_answer_is_read_behind_its_prompt():
    space = "\u2581"  # As SentencePiece writes it: one before any text, and before each word.
    words = ["</s>", space, f"{space}two", f"{space}user:", f"{space}?"]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({x: i for i, x in enumerate(words)}, unk_token="</s>")
    )
    inner.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend(space), tokenizers.normalizers.Replace(" ", space)]
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(space, "merged_with_next")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    assert tokenizer(" two")["input_ids"] == [1, 2]
    assert tokenizer("? user: two")["input_ids"] == [4, 3, 2]
    chat = ChatTokenizer(tokenizer, Template("", "? user:", " ", (0,)), image=9, vocabulary=9)
    assert chat.encode_completion("two") == [2, 0]


def test_a_question_with_a_mark_of_its_own_is_refused(make):
    for family, mark in (("llava", "<image>"), ("qwen2_5_vl", "<|image_pad|>")):
        sight = read(make(family)[0])
        with pytest.raises(ValueError, match=r"2 marks|1 images for 2"):
            sight.chat.encode_prompt(f"what is {mark} ?", images=sight.image_tokens)
        with pytest.raises(ValueError, match="image tokens, but the image has 3 features"):
            sight.chat.encode_prompt("what is it ?", images=3)


def test_a_model_without_a_template_is_refused(make, tmp_path):
    directory, _, _ = make("llava")
    shutil.copytree(directory, tmp_path / "base")
    for path in (tmp_path / "base").glob("chat_template*"):
        path.unlink()
    with pytest.raises(ValueError, match="has no chat_template"):
        read(tmp_path / "base")


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def small(name, directory, stages=("grpo",), **changes):
    """Returns a public config with a pretrained model, at a size that trains in seconds."""
    every = {
        "num_updates": 2,
        "updates_per_dispatch": 1,
        "eval_interval": 2,
        "checkpoint_interval": 1,
    }
    sampled = every | {
        "trainable": "lora/.*",
        "prompts_per_update": 4,
        "num_completions": 2,
        "num_minibatches": 1,
        "grad_accum_steps": 1,
        "kl_coef": 0.1,
        "optimizer": {"schedule": "constant", "learning_rate": 1e-2},
    }
    model = {
        "kind": "vlm",
        "checkpoint": str(directory),
        "lora": {"pattern": r"language/stack/.*/(query|value)", "rank": 2},
        "dtype": "float32",
        "remat": False,
    }
    base = {"count_grpo": count_grpo.CONFIG | {"model": {}}, "vlm_grpo": vlm_grpo.get_config()}[
        name
    ]
    return problems.complete(
        base,
        {
            "stages": stages,
            "mesh": {"data": 1},
            "model": model,
            "sft": every,
            "grpo": sampled,
            "ppo": sampled,
        },
        tiny.nested(changes, stages),
    )


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl"])
def test_a_whole_model_learns_from_a_folder(family, make, tmp_path, monkeypatch):
    directory, processor, model = make(family)
    config = small(
        "vlm_grpo",
        directory,
        mesh__data=1 if family == "smolvlm" else 2,
        dataset__directory=str(folder(tmp_path / "pictures", count=8)),
        dataset__height=SIZE[0], dataset__width=SIZE[1], dataset__prompt_tokens=128,
        dataset__completion_tokens=4, dataset__validation_size=2, dataset__test_size=2,
        rewards__functions=("tests.reward_functions:length",),
        rewards__workers=1,
    )  # fmt: skip
    trained = mmrl_jax.train(config, tmp_path / "run")
    before = by_path(hub.load_vision_language_model(directory).params)
    frozen = trained.problem.stage("grpo").constants.frozen
    assert by_path(frozen).keys() == before.keys()
    for path, x in by_path(frozen).items():
        np.testing.assert_array_equal(x, before[path], err_msg=path)
    moved = by_path(trained.last.carry.learner.params)
    assert all(path.startswith("lora/language/") for path in moved)
    assert all(np.any(np.asarray(x) != 0) for x in moved.values())
    _, *rows = metrics.read_jsonl(tmp_path / "run" / metrics.JSONL_NAME)
    assert abs(rows[0]["policy/reference_kl"]) < 1e-6 < rows[1]["policy/reference_kl"]
    assert all(row["optimizer/skipped_steps"] == 0 for row in rows)

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    write = functools.partial(
        export.export, tmp_path / "run", tmp_path / "lora", which="latest", adapter=True,
        dtype=np.float32, trust_modules=True, push_to="me/counting",
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not say its name on the hub.*--base_model"):
        write()
    with fake_hub.running() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        write(base_model="owner/base")
    files = {x.name: x.read_bytes() for x in (tmp_path / "lora").iterdir()}
    assert server.repositories == {"me/counting": files} and server.private["me/counting"]
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "owner/base"
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert card.data.base_model == "owner/base" and card.data.tags[-2:] == ["grpo", "lora"]
    assert "| test | its own | return | " in card.text and str(tmp_path) not in card.text
    tuned = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "lora"))
    compare(trained.last.carry.learner.params, frozen, config, processor, tuned.eval())


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_go_to_peft_and_back(family, make, tmp_path):
    directory, _, model = make(family)
    plan = hub.read_blueprint("vision_language_model", directory, dtype=np.float32, remat=False)
    params, key = plan.shapes(np.float32), jax.random.key(0)
    group = lora.LoraGroup(r"language/stack/.*|vision/.*/attention/out", 2, 4.0)
    drawn = lora.init(key, params, [group])
    drawn = jax.tree.map(lambda x: x + 1, drawn)
    save_adapter(tmp_path / "ours", drawn, plan.keys, base="x", task_type="CAUSAL_LM")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours"))
    theirs.save_pretrained(tmp_path / "theirs")
    found = by_path(load_adapter(tmp_path / "theirs", params, plan.keys))
    assert found.keys() == by_path(drawn).keys()
    for path, x in by_path(drawn).items():
        np.testing.assert_array_equal(x, found[path], err_msg=path)


def test_adapters_that_have_the_names_of_tensors_are_read_too(make, tmp_path):
    plan = hub.read_blueprint(
        "vision_language_model", make("qwen2_5_vl")[0], dtype=np.float32, remat=False
    )
    params = plan.shapes(np.float32)
    groups = [
        lora.LoraGroup("language/.*/query", 2, 8.0),
        lora.LoraGroup("language/stack/.*", 2, 4.0),
    ]
    drawn = lora.init(jax.random.key(0), params, groups)
    save_adapter(tmp_path, drawn, plan.keys, base="x", task_type="CAUSAL_LM")
    file = tmp_path / "adapter_model.safetensors"
    tensors = {n.replace("model.language_model.", "model."): x for n, x in load_file(file).items()}
    save_file(tensors, file)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace(r"language_model\\.", ""))
    found = load_adapter(tmp_path, params, plan.keys)
    jax.tree.map(np.testing.assert_array_equal, found, drawn)


def compare(params, frozen, config, processor, theirs):
    """Asserts that completions of a tuned model have the probabilities of a torch model."""
    sight, inputs = read(config.model.checkpoint), their_inputs(processor, picture())
    prompt = sight.chat.encode_prompt(ASKED, images=sight.image_tokens)
    assert prompt == inputs["input_ids"][0].tolist()
    answer = np.array(sight.chat.encode_completion("two"))
    found = log_probs((params, frozen), sight, prompt, answer, picture())
    np.testing.assert_allclose(found, their_log_probs(theirs, inputs, answer), rtol=0, atol=1e-3)


def test_a_whole_model_answers_questions_of_a_task(make, tmp_path):
    directory, processor, _ = make("llava")
    config = small(
        "count_grpo",
        directory,
        stages=("sft", "ppo"),
        run__eval_episodes=2, task__rows=2, task__counts=(0, 2), task__distractors=1,
        sft__num_updates=2, sft__examples=8, sft__counts=(0, 1), sft__batch_size=4,
        sft__updates_per_dispatch=1, sft__eval_interval=2, sft__checkpoint_interval=2,
        sft__trainable="params/vision/projector.*|lora/.*",
    )  # fmt: skip
    trained = mmrl_jax.train(config, tmp_path / "run")
    assert [result.updates for result in trained.results.values()] == [2, 2]
    start = mmrl_jax.load(tmp_path / "run" / "sft").variables
    aligned = by_path(trained.problem.partition(start, "sft")[0])
    tuned = by_path(trained.last.carry.learner.params)
    assert any(path.startswith("params/vision/projector") for path in aligned)
    assert any(path.startswith("value/") for path in tuned)
    assert all(path.startswith(("lora/", "value/")) for path in tuned)
    _, *rows = metrics.read_jsonl(tmp_path / "run" / metrics.JSONL_NAME)
    assert all(row["optimizer/skipped_steps"] == 0 for row in rows)

    written = {"which": "latest", "dtype": np.float32}
    export.export(tmp_path / "run", tmp_path / "tuned", adapter=False, **written)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "tuned")
    frozen = trained.problem.stage("ppo", start=start).constants.frozen
    compare(trained.last.carry.learner.params, frozen, config, processor, theirs.eval())
    for stage in ("run", "run/sft"):
        with pytest.raises(ValueError, match=r"the run trained \['lora', 'params'\]"):
            export.export(tmp_path / stage, tmp_path / "lora", adapter=True, **written)


def test_what_cannot_run_is_refused(make):
    # No multiple of a patch: images are resized.
    config = small("count_grpo", make("llava")[0], task__height=36, task__width=36)
    problems.make(config)
    config.model.lora.pattern = "query"
    with pytest.raises(ValueError, match="model.lora.pattern: 'query' matches no Dense"):
        problems.make(config)
    config.model.checkpoint = "nowhere"
    with pytest.raises(ValueError, match="model.checkpoint='nowhere': There is no directory"):
        problems.make(config)
