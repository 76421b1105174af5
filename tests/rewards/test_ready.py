"""Tests of the reward functions that are ready: what they accept, and what they must not."""

import json
import pickle
import time

import numpy as np
import pytest

from mmrl_jax import rewards
from mmrl_jax.problems import dataset_options
from mmrl_jax.tasks.reward_signatures import read_signature, with_options
from mmrl_jax.tasks.rewards import RewardWorkerPool, on_failure

LONG = "x" * 1_000_000
HONEST = {
    rewards.exact_match: {
        "red cube": [
            "red cube", "Red Cube.", "  red\ncube ", '"red cube"', "**Red cube**",
            "<think>blue?</think> red cube", "so blue? no</think>red cube",
            "<think>a</think><answer>red cube</answer>", r"It is \boxed{red cube}",
            "I saw it: <answer> red cube </answer>",
        ],
        "5": ["5", "5.", "'5'"],
        "caf\u00e9": ["cafe\u0301", "CAF\u00c9"],
        "*": ["*", " * "],
        # References are read as completions are.
        "<think>4?</think>red cube": ["red cube", "<think>blue?</think>red cube"],
        r"So it is \boxed{red cube}": ["red cube", r"\boxed{red cube}"],
        "<answer>red cube</answer>": ["red cube", "<answer>Red cube.</answer>"],
    },
    rewards.number: {
        "5": [
            "5", "5.0", "+5", "05", "5e0", ".5e1", "The answer is 5.", "x = 5", "**5**", "$5$",
            "5!", "**Answer:** 5", "**Answer: 5**", "x = **5**", "Answer: 5\nI think", "A: 5",
            "There are 5 squares", "5 I think", r"**\boxed{5}**", r"$x = \boxed{5}$",
            "It's 5", "That\u2019s 5.", r"2 + 3 => \boxed{5}", "so \u2192 \\boxed{5}",
            "There are 5 cubes, I think", "Answer:5", "(5)", r"so \boxed{5}", "5 cm",
            "<think>3 or 4? or six</think> 5", "3 or 4</think>5",
            "<think>9</think><answer>5</answer>", "between 3 and 8: <answer>5</answer>",
        ],
        "-5": ["-5", "-$5", "-$5$", "$-5$", "**-5**", "-**5**", "x = -5"],
        "-1,200.5": ["-1200.5", "-1,200.5", "it is -1.2005e3"],
        "0.001": ["1e-3", ".001", "0.0010"],
        "12345": ["12345", "12,345", "12,345.", "a total of 12,345, I think"],
    },
    rewards.choice: {
        "B": [
            "B", "b", "(B)", "B.", "B)", "**B**", "Answer: B", "Answer:B", "answer is (B).",
            "The answer is B.", "The correct answer is: B", "Option B",
            "My final answer is option B",
            "<think>A? C?</think>B", "<answer>B</answer>", r"\boxed{B}", '"B"', "answer\n\nB",
        ],
        "(a)": ["A", "a"],
    },
    rewards.box_iou: {
        "[10, 20, 30, 40]": [
            "[10, 20, 30, 40]", "(10,20,30,40)", "[10.0, 20.0, +30.0, 40]",
            "The box is [10,20,30,40].",
            '[{"bbox_2d": [10, 20, 30, 40], "label": "cube"}]', "<answer>[10, 20, 30, 40]</answer>",
            "<think>[0, 0, 9, 9]</think>[10, 20, 30, 40]", "[[10, 20, 30, 40]]",
            '```json\n{"bbox_2d": [10, 20, 30, 40]}\n```',
        ],
    },
    rewards.point_in_region: {
        "[0.10000000149011612, 2e-1, 0.30000001192092896, 0.4]": ["(0.2, 0.3)"],
        "[10, 20, 30, 40]": ["[10, 20]", "(30, 40)", "(11.5, 39.9)", '{"point_2d": [20, 30]}',
                             "I click at (20, 30)."],
        # A triangle.
        "[[0, 0], [10, 0], [0, 10]]": ["(1, 1)", "(4.9, 4.9)", "[0.5, 9]"],
        # A U, open at the top: its left and right arm, and its bottom.
        "[[0, 0], [9, 0], [9, 9], [6, 9], [6, 3], [3, 3], [3, 9], [0, 9]]": [
            "(1, 8)", "(8, 8)", "(5, 1)"],
    },
}  # fmt: skip
REFUSED = {
    rewards.exact_match: {
        "red cube": [
            "", " \n\t", "red", "red cube or blue cube", "red cube, blue cube", "red  cube blue",
            "not red cube", "r\u0435d cube", "red\u200b cube", "redcube", "red cube</answer>",
            "<think>red cube</think>", "<think>red cube", "<think>red cube</think>blue",
            "red cube <think>x</think>", "<think>a<think>b</think>red cube",
            "<think>a</think>red cube</think>", "<think>a</think><think>b</think>red cube",
            "<answer>red cube</answer><answer>blue cube</answer>", "<answer>blue</answer>red cube",
            "</answer>red cube<answer>", "<answer>red cube", "</answer><answer>red cube",
            "<answer>red cube</answer><answer>blue", "<answer>red cube</answer></answer>",
            "<think><answer>red cube</answer></think>",
            r"\boxed{red cube} \boxed{blue}", r"\boxed{red cube", r"\boxed{\boxed{red cube}}",
            "red cube" * 200_000, LONG + "red cube",
        ],
        "5": ["\uff15", "\u0665", "\u2464", "5\u20e3", "five", "5 5", "\U0001d7d3"],
        "*": ["", "**", '"'],
    },
    rewards.number: {
        "5": [
            "", " ", "4", "five", "4 5", "5 or 6", "5 or six", "one 5", "1 2 3 4 5 6 7 8 9", "5, 6",
            "4 or 5", "5/1", "10/2", "5-6", "3-5", "2+3=5", "55", "15", "5.5.5", "5,0", "1,5",
            "5,00",
            "x5", "5x", "5cm", "5%", "5 %", "~5", "\u22485", ">5", "> 5", "\u22125", "\u2212 5",
            "- 5", "--5", "\u00b15", "#5", "v5", "_5_", "O5", "5O", "5l", "l5", "5e", "0x5", "5_0",
            "\uff15", "\u0665", "\u2464", "\u00bd 5", "5\u00b2", "5 \u4e94", "\u0665 5", "5\u200b",
            "\u200b5", "nan", "inf", "infinity", "-inf", "5e999", "5e9999999999", "1e400",
            "5e-9999",
            "<think>5</think>", "<think>5", "<THINK>5</THINK>", "<thinking>5</thinking>",
            "[THINK]5[/THINK]", "[5]", "{5}", "<5>", "5 thousand", "half of 5", "5 dozens",
            "<answer>5</answer><answer>6</answer>", "<answer>4 5</answer>", r"\boxed{5}\boxed{5}",
            "5" * 5000, "0" * 60 + "5", "5 " * 5000, LONG + " 5", "5 " + LONG, "5." + "0" * 100,
            "1,2345", "12,34,5", "5\n6", "+-5", "5e+", "5 e0", "5.,6",
            # The opposite, or another number that is computed from it.
            "-$5", "-(5)", "-**5**", '- "5"', r"-\boxed{5}", r"- $\boxed{5}$", "-\u200b 5",
            r"- -> \boxed{5}",
            "-\ufe0f 5", "\u2796 5", "\u02d7 5", "x != 5", "x -= 5", "-: 5", "-.\n5", "-{5}",
            "minus 5", "negative 5", "Minus (5)", "mi\u200bnus 5", "not 5", "plus or minus 5",
            "twice 5", "double 5", "thrice 5", "the square root of 5", "sqrt 5", "sqrt(5)",
            r"\sqrt 5", "\u221a 5", "x / 5", "x * 5", "x \u00d7 5", "x^ 5", "x ** 5", "x 5",
            "f(5)", "5 squared", "5 cubed", "5 percent", "5 per cent", "5 \u2030", "5 tenths",
            "5 hundredths", "a fifth of 5", "5 k", "5 M", "5 \u03c0", "5 i", "5 ^ x", "5 ^2",
            "5 / x",
            "5 * x", "5 \u00d7 x", "5 - x", "5 + x", "5 \u2212 x", r"5 \pi", "5 times x", "**5",
            "* 5",
        ],
        "-5": ["- $5", "-$ 5", "--$5", "5", "-(5)", "x-$5"],
        "12345": ["1,2345", "12,34,5", "123,45", "12, 345", "12.345", "12 345", "12,3456"],
        "0.001": ["0", "1e-4", "0.001000001", "1e-33", "1e-003x"],
    },
    rewards.choice: {
        "B": [
            "", " ", "A", "A B C D", "A, B", "A or B", "B or C", "B and C", "B, C", "B/C", "BC",
            "AB",
            "B B", "Bad", "Bob", "B2", "Be", "a Bee", "Boxes", "The answer is Blue",
            "I like B best",
            "\u0412", "\uff22", "\u0392", "\U0001d401", "B\u0301", "B\u200b", "\u212c",
            "<think>B</think>", "<think>B", "<think>B</think>A", "optionB", "answerB",
            "<answer>A</answer>B", "B. C.", "B) C)", "(B) (C)", "B: C", "B" * 20_000, "B " + LONG,
            "B. blue", "the answer is A. B", "A\nB",
        ],
        "K": ["\u212a", "\u212a."],
        "S": ["\u017f"],
    },
    rewards.box_iou: {
        "[10, 20, 30, 40]": [
            "", "[30, 40, 10, 20]", "[30, 20, 10, 40]", "[10, 40, 30, 20]", "[10, 20, 10, 40]",
            "[0, 0, 1000, 1000]", "[0, 0, 100, 100]", "[-10, -20, 30, 40]", "[-10, 20, 30, 40]",
            "[10, 20, 30]", "[10, 20, 30, 40, 50]", "[10, 20, 30, 40] [10, 20, 30, 40]",
            "[10,20,30,40],[50,60,70,80]", "10, 20, 30, 40", "[nan, 20, 30, 40]",
            "[10, 20, inf, 40]", "[10, 20, 3e1, 40]", "[10, 20, 1e999, 40]",
            "[10, 20, 30, 4\u0660]",
            "[\uff11\uff10, 20, 30, 40]", "5 [10, 20, 30, 40]", "[10, 20, 30, 40] or 7",
            "<think>[10, 20, 30, 40]</think>", "<think>[10, 20, 30, 40]", "[50, 60, 70, 80]",
            "[10, 20, 30, 99999999999]", "[" * 5000, "[10," + " " * 9000, "[1, " * 2000,
            "[10, 20, 30, 40]" * 5000, "[10, 20, 30, 40]" + LONG, "[10, 20][30, 40]",
        ],
    },
    rewards.point_in_region: {
        "[10, 20, 30, 40]": [
            "", "(9.9, 30)", "(20, 41)", "(-20, 30)", "[10, 20, 30, 40]", "(20, 30), (25, 35)",
            "20, 30", "(nan, 30)", "(20, inf)", "(2e1, 30)", "(20, 3\u0660)", "(20)", "(20, 30, 1)",
            "<think>(20, 30)</think>", "(1, 1) or (20, 30)", "(20, 30) 7", "(" * 5000,
            "(20, 30)" + LONG,
        ],
        "[[0, 0], [10, 0], [0, 10]]": ["(6, 6)", "(-1, 1)", "(11, 0)"],
        "[[0, 0], [9, 0], [9, 9], [6, 9], [6, 3], [3, 3], [3, 9], [0, 9]]": ["(4.5, 6)", "(10, 5)"],
    },
}  # fmt: skip


def cases(table):
    return [
        pytest.param(function, answer, text, id=f"{function.__name__}-{answer[:9]}-{text[:30]!a}")
        for function, answers in table.items()
        for answer, texts in answers.items()
        for text in texts
    ]


@pytest.mark.parametrize(("function", "answer", "text"), cases(HONEST))
def test_honest_variants_are_rewarded(function, answer, text):
    assert function(prompt="p", completion=text, answer=answer, finished=True, level=3) == 1
    # What was truncated has no final answer.
    assert function(prompt="p", completion=text, answer=answer, finished=False) == 0


@pytest.mark.parametrize(("function", "answer", "text"), cases(REFUSED))
def test_what_is_no_answer_is_not_rewarded(function, answer, text):
    start = time.monotonic()
    assert function(prompt="p", completion=text, answer=answer, finished=True) == 0
    assert time.monotonic() - start < 5


def test_numbers_within_a_tolerance_are_exact():
    def within(text, answer, **bounds):
        return rewards.number(completion=text, answer=answer, **bounds) == 1

    # As floats, 0.4 - 0.3 is above 0.1.
    assert within("0.4", "0.3", tolerance=0.1) and not within("0.41", "0.3", tolerance=0.1)
    assert within("101", "100", relative_tolerance=0.01)
    assert not within("101.1", "100", relative_tolerance=0.01)
    assert within("-99", "-100", relative_tolerance=0.01)
    # The larger bound counts.
    assert within("-98", "-100", tolerance=2, relative_tolerance=0.001)
    assert not within("-1e999", "-100", relative_tolerance=1)
    assert not within("1e999", "1e-999", tolerance=5) and within("1e-999", "0", tolerance=1e-9)


def test_the_text_of_the_right_choice_may_follow_its_letter():
    def chosen(text, choices=("one", "two", "Three cubes")):
        return rewards.choice(completion=text, answer="B", choices=choices)

    for text in (
        "B. two",
        "(B) Two.",
        "B: two",
        "**B**: two",
        "B) **two**",
        "The answer is B. two",
    ):
        assert chosen(text) == 1, text
    for text in (
        "B. one",
        "B two",
        "two",
        "A. two",
        "B. two or one",
        "B. two C. Three cubes",
        "B.two",
    ):
        assert chosen(text) == 0, text


def test_boxes_are_rewarded_by_their_overlap():
    # 10 x 10 and the same moved by 5: 50 of 150. Half of it: 50 of 100.
    right = "[0, 0, 10, 10]"
    assert rewards.box_iou(completion="[5, 0, 15, 10]", answer=right) == 0
    third = rewards.box_iou(completion="[5, 0, 15, 10]", answer=right, threshold=0.3)
    assert third == pytest.approx(1 / 3)
    assert rewards.box_iou(completion="[0, 0, 10, 5]", answer=right) == 0.5


def test_reference_boxes_may_have_the_digits_of_floats():
    # What json.dumps writes of float32 values, and of small ones.
    right = "[0.10000000149011612, 1e-05, 0.30000001192092896, 0.4]"
    assert rewards.box_iou(completion="[0.1, 0, 0.3, 0.4]", answer=right) > 0.99
    assert rewards.box_iou(completion=right, answer=right) == 0  # Completions are read strictly.
    for same in ("(1, 2, 3, 4)", '[{"bbox_2d": [1, 2, 3, 4]}]', "box [1.0, 2.0, 3, 4]"):
        assert rewards.box_iou(completion="[1, 2, 3, 4]", answer=same) == 1


THINK = "<think>why</think><answer>5</answer>"


@pytest.mark.parametrize(
    ("text", "pattern", "reward"),
    [
        (THINK, None, 1), ("<think>\na\n\nb</think>\n\n<answer>5\n</answer>\n", None, 1),
        ("", None, 0), ("<answer>5</answer>", None, 0), ("<think></think><answer>5</answer>", None,
        0),
        (f"x{THINK}", None, 0), (f"{THINK}x", None, 0), (THINK * 2, None, 0),
        ("<think>a</think><think>b</think><answer>5</answer>", None, 0),
        ("<think>a<answer>4</answer></think><answer>5</answer>", None, 0),
        ("<think>a</think><answer>5</answer><answer>6</answer>", None, 0),
        ("<think> </think><answer> </answer>", None, 0),
        ("<think>a</think><answer>\n</answer>", None, 0),
        ("<think>\u200b</think><answer>5</answer>", None, 0),
        ("<think>a</think><answer>\u00a0\u2800\ufeff\u3164\U000e0020</answer>", None, 0),
        ("<think>a</think><answer> \u200b<b> \u4e94\u200b</answer>", None, 1),
        ("<think>" + " " * 100_000, None, 0), ("<think>a " + " a" * 100_000, None, 0),
        ("<think>" * 20_000, None, 0), (f"<think>{'a' * 100_000}", None, 0),
        ("12", r"\d+", 1), ("12\n", r"\d+$", 0), ("x12", r"\d+", 0), ("12x", r"\d+", 0),
        ("\u0661\u0662", r"\d+", 0), ("a", "a|b", 1), ("ab", "a|b", 0), ("a\nb", "a.b", 1),
        (" ", ".*", 0), ("", ".*", 0), ("x\n12", r"^\d+$", 0),
    ],
)  # fmt: skip
def test_a_format_is_that_of_the_whole_completion(text, pattern, reward):
    options = {} if pattern is None else {"pattern": pattern}
    start = time.monotonic()
    assert rewards.format_match(completion=text, answer="5", **options) == reward
    assert rewards.format_match(completion=text, finished=False, **options) == 0
    assert time.monotonic() - start < 5


def test_a_pattern_without_end_gives_no_reward():
    function = with_options("m:f", rewards.format_match, {"pattern": "(a+)+b"})
    with RewardWorkerPool({"f": function}, {"f": 1.0}, workers=1, timeout_s=1.0) as pool:
        scored = pool(["p"], [["aab", "a" * 40]], ["x"], [{}])
    np.testing.assert_array_equal(scored.reward, [[1, np.nan]])
    assert scored.failures[0].reason == "no result within 1.0 s"


SCHEMA = {
    "type": "object",
    "title": "An answer",
    "properties": {
        "color": {"enum": ["red", "blue"]},
        "count": {"type": "integer", "minimum": 0, "exclusiveMaximum": 10},
        "size": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
        "tags": {"type": "array", "items": {"type": "string", "minLength": 2, "maxLength": 3},
                 "minItems": 1, "maxItems": 2},
        "kind": {"const": 1},
    },
    "required": ["color", "count"],
    "additionalProperties": False,
}  # fmt: skip
GOOD = '{"color": "red", "count": 3'


@pytest.mark.parametrize(
    "text",
    [
        GOOD + "}", f"\n {GOOD}}} \n", f"```json\n{GOOD}}}\n```", f"```\n{GOOD}}}\n```",
        f"<think>{{}}</think>{GOOD}}}", f"<answer>{GOOD}}}</answer>", GOOD.replace("3",
        "3.0") + "}",
        GOOD + ', "size": null}', GOOD + ', "size": 1}', GOOD + ', "tags": ["ab", "abc"]}',
        GOOD + ', "kind": 1}', GOOD + ', "kind": 1.0}', '{"count": 0, "color": "blue"}',
    ],
)  # fmt: skip
def test_json_that_fits_its_schema_is_rewarded(text):
    for schema in (SCHEMA, json.dumps(SCHEMA), SCHEMA | {"required": ("color", "count")}):
        assert rewards.json_schema(completion=text, schema=schema) == 1
    assert rewards.json_schema(completion=text, schema=SCHEMA, finished=False) == 0


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "{}", "[]", "null", '"red"', GOOD, GOOD + "} x", f"x {GOOD}}}",
        f"{GOOD}}}{GOOD}}}",
        GOOD + ",}", GOOD + ', "count": 3}', '{"count": 9, "color": "red", "count": 3}',
        GOOD.replace("3", "NaN") + "}", GOOD.replace("3", "Infinity") + "}",
        GOOD.replace("3", "1e999") + "}", GOOD.replace("3", "1" * 5000) + "}",
        GOOD.replace("3", "\u0663") + "}", GOOD.replace("3", "true") + "}",
        GOOD.replace("3", '"3"') + "}", GOOD.replace("3", "3.5") + "}", GOOD.replace("3",
        "-1") + "}",
        GOOD.replace("3", "10") + "}", GOOD.replace("red", "green") + "}",
        GOOD.replace("red", "r\u0435d") + "}", GOOD + ', "other": 1}', '{"color": "red"}',
        GOOD + ', "size": 0}', GOOD + ', "size": 1.1}', GOOD + ', "size": true}',
        GOOD + ', "tags": []}', GOOD + ', "tags": ["ab", "ab", "ab"]}', GOOD + ', "tags": ["a"]}',
        GOOD + ', "tags": ["abcd"]}', GOOD + ', "tags": [12]}', GOOD + ', "tags": "ab"}',
        GOOD + ', "kind": true}', GOOD + ', "kind": 2}', GOOD.replace('"', "'") + "}",
        f"<think>{GOOD}}}</think>", f"```json\n{GOOD}}}",
        f"```json\n{GOOD}}}\n```\n```\n{GOOD}}}\n```",
        f"Here: ```json\n{GOOD}}}\n```", "[" * 9000, "[" * 4000 + "]" * 4000, '{"a":' * 1500,
        GOOD + "}" + LONG, GOOD + " " * 1_000_000 + "}",
    ],
)  # fmt: skip
def test_other_json_is_not_rewarded(text):
    assert rewards.json_schema(completion=text, schema=SCHEMA) == 0


def test_an_array_of_numbers_bounded_by_a_schema():
    schema = {"items": {"type": "number", "minimum": 2}, "type": "array"}
    assert rewards.json_schema(completion="[2, 3.5]", schema=schema) == 1
    assert rewards.json_schema(completion="[2, 1]", schema=schema) == 0
    assert rewards.json_schema(completion='{"a": 1}', schema={"additionalProperties": False}) == 0
    assert rewards.json_schema(completion='{"a": 1}', schema={"properties": {"a": False}}) == 0
    nested = {"enum": [[1, {"a": True}]]}
    assert rewards.json_schema(completion='[1.0, {"a": true}]', schema=nested) == 1
    assert rewards.json_schema(completion='[1, {"a": 1}]', schema=nested) == 0


@pytest.mark.parametrize(
    ("text", "bounds", "reward"),
    [
        ("abc", {"max_length": 3}, 1), ("  abc\n", {"max_length": 3}, 1), ("abcd",
        {"max_length": 3}, 0),
        ("a  \n b", {"max_length": 3}, 1), ("", {"max_length": 3}, 0), (" \n", {"max_length": 3},
        0),
        ("\u200b\u200b\u200b", {"max_length": 3}, 0), ("a\u200b" * 3, {"max_length": 9,
        "min_length": 4}, 0),
        ("a" + " " * 50, {"max_length": 99, "min_length": 10}, 0),
        ("a" + "\n" * 50 + "b", {"max_length": 99, "min_length": 10}, 0),
        (LONG, {"max_length": 99}, 0),
        ("two words", {"max_length": 2, "min_length": 2, "unit": "words"}, 1),
        ("two - words", {"max_length": 2, "unit": "words"}, 1),
        (". . . . .", {"max_length": 9, "min_length": 2, "unit": "words"}, 0),
        ("\u200b \u200b", {"max_length": 9, "unit": "words"}, 0),
        ("a b c", {"max_length": 2, "unit": "words"}, 0),
    ],
)  # fmt: skip
def test_lengths_count_what_can_be_read(text, bounds, reward):
    assert rewards.length_bounds(completion=text, **bounds) == reward
    assert rewards.length_bounds(completion=text, finished=False, **bounds) == 0


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (rewards.exact_match, {"answer": "<think>5"}, "answer='<think>5' has no final answer"),
        (rewards.exact_match, {"answer": r"\boxed{4} \boxed{5}"}, "has no final answer"),
        (rewards.number, {"answer": "two"}, "answer='two' is not a number"),
        (rewards.number, {"answer": "nan"}, "answer='nan' is not a number"),
        (rewards.number, {"answer": "5", "tolerance": -1}, "tolerance=-1 must be at least 0"),
        (rewards.number, {"answer": "5", "tolerance": float("inf")}, "tolerance=inf"),
        (rewards.number, {"answer": "5", "relative_tolerance": float("nan")}, "relative_tol.*=nan"),
        (rewards.choice, {"answer": "two"}, "answer='two' is not the letter; write A"),
        (rewards.choice, {"answer": "C", "choices": ["x", "y"]},
        "'C' is not the letter of the 2 ch"),
        (rewards.box_iou, {"answer": "[3, 2, 1, 4]"}, r"answer='\[3, 2, 1, 4\]' is not a box"),
        (rewards.box_iou, {"answer": "[1, 2, 3, 4]", "threshold": 0}, "threshold=0 must be in"),
        (rewards.box_iou, {"answer": "[true, 2, 3, 4]"}, "is not a box"),
        (rewards.box_iou, {"answer": f"[1, 2, 3, 1{'0' * 400}]"}, "is not a box"),
        (rewards.box_iou, {"answer": "[1, 2, 3, 1e999]"}, "is not a box"),
        (rewards.point_in_region, {"answer": "[1, 2]"}, "neither a box"),
        (rewards.point_in_region, {"answer": "[[1, 2], [3, 4]]"}, "three corners"),
        (rewards.point_in_region, {"answer": "[[1, 2], [3, 4], [NaN, 1]]"}, "three corners"),
        (rewards.format_match, {"pattern": "("}, r"pattern='\(' is not a regular expression"),
        (rewards.json_schema, {"schema": "{"}, "schema='{' is not JSON"),
        (rewards.json_schema, {"schema": [1]}, "schema=.1. is not an object"),
        (rewards.json_schema, {"schema": {"pattern": "a"}}, "schema has 'pattern'; only type"),
        (rewards.json_schema, {"schema": {"type": "int"}}, r"schema.'type'. has .'int'"),
        (rewards.json_schema, {"schema": {"type": {"a": 1}}}, r"schema.'type'. has .{'a': 1}"),
        (rewards.json_schema, {"schema": {"type": [["string"]]}}, r"has .\['string'\]"),
        (rewards.json_schema, {"schema": {"properties": {"a": {"$ref": "#"}}}}, r"'a'. has '.ref'"),
        (rewards.json_schema, {"schema": {"items": [1]}}, r"schema.'items'.=.1. is not an object"),
        (rewards.json_schema, {"schema": {"properties": 1}}, "'properties'.=1 is not an object"),
        (rewards.json_schema, {"schema": {"required": "a"}}, "'required'.='a' is not a list"),
        (rewards.json_schema, {"schema": {"minimum": "1"}}, "'minimum'.='1' is not a number"),
        (rewards.length_bounds, {"max_length": 0}, "min_length=1, max_length=0"),
        (rewards.length_bounds, {"max_length": 5, "min_length": 0}, "min_length=0, max_length=5"),
        (rewards.length_bounds, {"max_length": 5, "unit": "tokens"}, "unit='tokens' must be"),
    ],
)  # fmt: skip
def test_bad_references_and_options_are_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(completion="5", **arguments)


READY = (*HONEST, rewards.format_match, rewards.json_schema, rewards.length_bounds)


@pytest.mark.parametrize("function", READY)
def test_every_function_can_be_named_in_a_config(function):
    signature = read_signature("m:f", pickle.loads(pickle.dumps(function)))
    assert not signature.batched and signature.accepts("any column")
    assert "Returns" in function.__doc__


@on_failure(-1.0)
def declared(*, completion, scale, **columns):
    return scale * float(completion)


def test_options_are_bound_and_a_column_replaces_them():
    functions = {"declared": with_options("declared", declared, {"scale": 2})}
    with RewardWorkerPool(functions, {"declared": 1.0}, workers=1, timeout_s=20.0) as pool:
        scored = pool(["p"] * 2, [["3", "x"]] * 2, ["a"] * 2, [{}, {"scale": 5}])
    np.testing.assert_array_equal(scored.reward, [[6, -1], [15, -1]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tolerence": 1},
            r"rewards.options has 'tolerence' for 'm:f', .* are \['tolerance', 'rel",
        ),
        ({"answer": "5"}, "rewards.options has 'answer'"),
        ({"columns": {}}, "rewards.options has 'columns'"),
    ],
)
def test_options_that_a_function_does_not_have_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        with_options("m:f", rewards.number, options)


def test_the_default_function_is_ready():
    (name,) = dataset_options.RewardOptions().functions
    assert name == "mmrl_jax.rewards:exact_match"
