"""Tests of completions as text: their ends, and tokens that are not text."""

import pytest
import tokenizers
import transformers

from mmrl_jax.pretrained.chat import ChatTokenizer, Template, stop_tokens

WORDS = ["</s>", "<|im_end|>", "<|im_start|>", "<image>", "two", "red"]
END, TURN, START, IMAGE, TWO, RED = range(6)


@pytest.fixture(scope="module")
def tokenizer():
    """Returns a word tokenizer whose first four tokens are special."""
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({x: i for i, x in enumerate(WORDS)}, unk_token="</s>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": WORDS[1:4]})
    return made


def test_nothing_but_the_end_of_a_completion_is_left_out(tokenizer):
    chat = ChatTokenizer(tokenizer, Template("", "", "", (TURN, END)), IMAGE, len(WORDS))
    assert chat.stop == chat.pad == TURN and chat.stops == (TURN, END)
    for ids, text in (
        ([TWO, RED, TURN], "two red"),
        ([TWO, RED, END], "two red"),  # The other stop token.
        ([TWO, RED], "two red"),  # Truncated.
        ([TWO, TURN, RED], "two"),  # What follows the end.
        ([START, TWO, TURN], "<|im_start|> two"),
        ([TWO, IMAGE, TURN], "two <image>"),
        ([TWO, 99, 98, RED, TURN], "two\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}red"),
        ([TURN], ""),
    ):
        assert chat.decode(ids) == text


@pytest.mark.parametrize(
    ("listed", "expected"),
    [("absent", (TURN, END)), (None, (TURN, END)), (END, (TURN, END)), ([5, TURN], (TURN, END, 5))],
)
def test_stop_tokens_are_those_of_the_turn_the_tokenizer_and_generation(
    listed, expected, tokenizer, tmp_path
):
    if listed != "absent":
        generation = transformers.GenerationConfig(eos_token_id=listed)
        generation.save_pretrained(tmp_path)
    assert stop_tokens(tokenizer, tmp_path, TURN) == expected


@pytest.mark.parametrize("text", ['{"eos_token_id": ["</s>"]}', '{"eos_token_id": -1}', "[]", "{"])
def test_a_generation_config_that_has_no_ids_is_refused(text, tokenizer, tmp_path):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match="generation_config.json"):
        stop_tokens(tokenizer, tmp_path)
