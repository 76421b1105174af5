"""Tests of chat templates, and of token ids and texts that no model can read."""

import datetime
import json
import re

from PIL import Image
import pytest
from transformers.utils import chat_template_utils

from mmrl_jax import problems
from mmrl_jax.pretrained import chat, qwen_processing
from mmrl_jax.problems import host_rewards
from mmrl_jax.tasks import prompts as prompts_lib
from tests import processors
from tests.problems.test_token_pretrained import make_config

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
ROWS = 400


def read(path, template, *, rows=ROWS, added=()):
    """Returns a chat tokenizer with a given template and additional tokens."""
    words = processors.tokenizer()
    words.add_tokens(list(added))
    words.chat_template = template
    words.save_pretrained(path)
    return chat.read_chat(path, rows)


def test_a_prompt_is_what_the_template_renders(tmp_path):
    said = read(tmp_path, HEAD + "{{ m.content | trim }}" + TAIL)
    for asked in ("how many ?", "is 1 < 2 & \"a\" 'b' ?\nor  {{ not }}", "\u00fc \U0001f600"):
        expected = said.tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, tokenize=False
        )
        assert said.tokenizer.decode(said.encode_prompt(asked, images=0)) == expected


PARTS = "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% else %}<image>{% endif %}"
BROKEN = {
    "of parts, where a text is given": HEAD + PARTS + "{% endfor %}" + TAIL,
    "escaped": HEAD + "{{ m.content | e }}" + TAIL,
    "escaped but for angles": HEAD + "{{ m.content | replace('&', '&amp;') }}" + TAIL,
    "cut at a line's end": HEAD + "{{ m.content.split('\n')[0] }}" + TAIL,
    "upper case": HEAD + "{{ m.content | upper }}" + TAIL,
    "repeated": HEAD + "{{ m.content }} Again: {{ m.content }}" + TAIL,
    "a reply without its spaces": HEAD + "{% if m.role == 'user' %}{{ m.content }}{% else %}"
    "{{ m.content | replace('  ', ' ') }}{% endif %}" + TAIL,
    "without replies": HEAD + "{% if m.role == 'user' %}{{ m.content }}{% endif %}" + TAIL,
}


@pytest.mark.parametrize("template", BROKEN.values(), ids=BROKEN)
def test_a_template_that_changes_what_it_is_given_is_refused(template, tmp_path):
    with pytest.raises(ValueError, match="must write each text once and unaltered, but from"):
        read(tmp_path, template)


def test_a_template_that_changes_the_text_beside_an_image_is_refused(tmp_path):
    words = processors.tokenizer()
    for text in ("c.text", "c.text | e"):
        words.chat_template = processors.TEMPLATES["qwen"].replace("c.text", text)
        if text == "c.text":
            template = chat.read_template(words, tmp_path, with_image=True)
            assert template.before.endswith("<|vision_start|><|image_pad|><|vision_end|>")
        else:
            with pytest.raises(ValueError, match="but from '<turn>' it made .*&lt;turn&gt;"):
                chat.read_template(words, tmp_path, with_image=True)


@pytest.mark.parametrize(
    "template",
    [
        HEAD + "{{ m.content.text.lower() }}" + TAIL,
        "{{ raise_exception('give a system prompt') }}",
        "{{ messages[0] + 1 }}",
        "{% for",
    ],
)
def test_a_template_that_does_not_render_is_refused(template, tmp_path):
    with pytest.raises(ValueError, match="The chat template of .* cannot render"):
        read(tmp_path, template)


DATED = (
    "\n  {% set day = strftime_now('%d %b %Y') %}\n<|im_start|>system\nToday: {{ day }}, "
    "{% macro when() %}{{ strftime_now('%A %-d/%m/%y %H:%M') }}{% endmacro %}{{ when() }}"
    "<|im_end|>\n" + HEAD + "{{ m.content }}" + TAIL
)


def test_a_template_that_writes_the_date_writes_always_the_same(tmp_path, monkeypatch):
    prompts = set()
    for day in (1, 2):
        # As transformers' own on the day that we give it, and on that day alone.
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return datetime.datetime(2030, 1, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        chat.read_chat.cache_clear()
        said = read(tmp_path, DATED)
        prompts.add(said.tokenizer.decode(said.encode_prompt("how many ?", images=0)))
    monkeypatch.setattr(Clock, "now", classmethod(lambda cls: datetime.datetime(2024, 7, 26)))
    turn = [{"role": "user", "content": "how many ?"}]
    theirs = said.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert prompts == {theirs} and "Today: 26 Jul 2024, Friday 26/07/24 00:00" in theirs


def test_what_is_rendered_is_data_that_a_run_can_record(tmp_path):
    first = read(tmp_path / "a", HEAD + "{{ m.content }}" + TAIL).rendered()
    assert json.loads(json.dumps(first)) == first
    assert first["before"] == "<|im_start|>user\n"
    assert first == read(tmp_path / "b", HEAD + "{{ m.content }}" + TAIL).rendered()
    other = read(tmp_path / "c", "<s>" + HEAD + "{{ m.content }}" + TAIL).rendered()
    assert other != first
    # The same text, of other tokens.
    tokens = read(tmp_path / "d", HEAD + "{{ m.content }}" + TAIL, added=["user\n"]).rendered()
    assert tokens != first and tokens["before"] == first["before"]


FAR = [f"<far_{i}>" for i in range(100)]  # The tokenizer has 323 tokens without them.


def test_a_token_without_a_row_is_refused_by_its_name(tmp_path):
    said = read(tmp_path, HEAD + "{{ m.content }}" + TAIL, added=FAR)
    first = said.tokenizer.convert_tokens_to_ids(FAR[0])
    last, clash = FAR[ROWS - first - 1], FAR[ROWS - first]
    assert said.tokenizer.convert_tokens_to_ids(clash) == ROWS == said.image
    assert said.encode_prompt(f"what is {last} ?", images=2).count(ROWS) == 2
    for token in (clash, FAR[-1]):
        with pytest.raises(
            ValueError, match=f"'what is {token} .*'{token}' .*has 400 rows.*resize"
        ):
            said.encode_prompt(f"what is {token} ?", images=2)
        with pytest.raises(ValueError, match=f"answer '{token}' has token '{token}' "):
            said.encode_completion(token)


def test_an_end_of_answers_without_a_row_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the end of a completion has token '<\|im_end\|>' \(2"):
        read(tmp_path, HEAD + "{{ m.content }}" + TAIL, rows=200)


def test_a_task_whose_template_has_a_token_without_a_row_is_refused(tmp_path):
    processors.save_decoder(tmp_path)
    words = processors.tokenizer()
    words.add_tokens(FAR)
    words.chat_template = f"{FAR[-1]}{processors.TEMPLATE}"
    words.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"prompt '.* has token '{FAR[-1]}'"):
        problems.make(make_config(tmp_path))


def test_every_text_of_a_task_is_checked_where_it_becomes_a_table(tmp_path):
    said = read(tmp_path, HEAD + "{{ m.content }}" + TAIL, added=FAR)
    with pytest.raises(ValueError, match=f"answer '{FAR[-1]}' has token"):
        prompts_lib.tokenize(["what is it ?"], ["two", FAR[-1]], said, image_tokens=4)


def records(path, lines):
    """Writes a folder of eight images, and returns the lines of its table."""
    path.mkdir()
    for i in range(len(lines)):
        Image.new("RGB", (8, 8), (30 * i, 255 - 30 * i, 7)).save(path / f"{i}.png")
    rows = [
        {"file_name": f"{i}.png", "prompt": f"which of {i} ?", "answer": str(i)} | line
        for i, line in enumerate(lines)
    ]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize(
    ("line", "learned", "reason"),
    [
        ({"prompt": f"what is {FAR[-1]} ?"}, None, f"prompt 'what is {FAR[-1]} .' has token"),
        ({"answer": FAR[-1]}, 8, f"answer '{FAR[-1]}' has token"),
        ({"prompt": "what is \ud83d ?"}, None, r"prompt 'what is \\ud83d .' has '\\ud83d', a lone"),
        ({"answer": "\ude00"}, None, r"answer '\\ude00' has '\\ude00', a lone surrogate"),
        ({"more": {"deep": ["\ud83d"]}}, None, r"column .*more.*has '\\ud83d', a lone surrogate"),
        ({"\ud83d": 1}, None, r"column .*has '\\ud83d', a lone surrogate"),
    ],
)
def test_a_record_with_what_cannot_be_read_is_set_aside(line, learned, reason, tmp_path):
    said = read(tmp_path / "model", HEAD + "{{ m.content }}" + TAIL, added=FAR)
    pictures = records(tmp_path / "pictures", [{}, line, {}, {"more": "\U0001f600"}])
    found, _ = host_rewards.open_split(
        said, validation_size=1, test_size=1, test_directory=None, split_seed=0,
        files=None, test_files=None, names={},
        completion_length=learned, length=64, images=4, directory=pictures, size=(8, 8),
        resize="stretch", batch_size=1, seed=0, max_rejected=0.5,
    )  # fmt: skip
    ((name, why),) = found.train.rejected
    assert name == "metadata.jsonl:2"
    assert [len(part) for part in (found.train, found.validation, found.test)] == [1, 1, 1]
    assert re.search(reason, why), why
    why.encode()  # It can be printed and written.


def test_marks_of_images_are_no_tokens_of_a_text(tmp_path):
    """Image features replace image tokens, for which some models have no embeddings."""
    words = processors.tokenizer()
    words.chat_template = processors.TEMPLATES["qwen"]
    token = words.convert_tokens_to_ids(qwen_processing.IMAGE)
    with pytest.raises(ValueError, match="has token"):
        chat.check_ids(words, [1, token], token, "prompt")
    chat.check_ids(words, [1, token - 1], token, "prompt")
