import itertools
import random
import re

import pytest
import torch

from helpers import word_problems
from helpers.warm_up import _right_pad
from helpers.word_problems import (
    HINT_TEMPLATE,
    WordEncoder,
    build_model,
    build_tokenizer,
    extract_answer,
    is_held_out,
    make_problem,
    make_rows,
    make_splits,
    warm_up,
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def problem_texts(rows):
    return [row["prompt"][0]["content"] for row in rows]


def draw(num_problems, seed=0):
    rng = random.Random(seed)
    return [make_problem(rng) for _ in range(num_problems)]


def evaluate_equations(solution):
    """Recomputes every equation of a solution and checks that each starts where the last ended."""
    start, *equations, final = solution.split(" ; ")
    value = int(start.removeprefix("start "))
    values = []
    for equation in equations:
        left, operator, right, _, result = equation.split()
        assert int(left) == value
        value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operator](value, int(right))
        assert int(result) == value
        values.append(value)
    assert final == f"#### {value}"
    return values


def test_solution_reference_and_answer_agree():
    for example in draw(300):
        values = evaluate_equations(example["solution"])
        assert len(values) in (2, 3)
        assert all(1 <= value <= 99 for value in values)
        assert example["reference"] == " ".join(map(str, values))
        assert example["answer"] == str(values[-1])
        assert extract_answer(example["solution"]) == example["answer"]


def test_story_states_the_operands_of_the_solution():
    for example in draw(300):
        start, *equations, _ = example["solution"].split(" ; ")
        operands = [start.split()[1], *(equation.split()[2] for equation in equations)]
        assert re.findall(r"\d+", example["problem"]) == operands


def test_rows_are_what_the_trainers_read():
    row = make_rows(1, seed=3)[0]
    assert set(row) == {"prompt", "hint", "completion", "answer"}
    assert [message["role"] for message in row["prompt"]] == ["user"]
    assert row["completion"] == f"{row['hint']} ; #### {row['answer']}"
    assert row["hint"].split()[-1] == row["answer"]


def test_rows_depend_on_the_seed_only():
    assert make_rows(50, seed=1) == make_rows(50, seed=1)
    assert make_rows(50, seed=1) == make_rows(80, seed=1)[:50]
    assert make_rows(50, seed=1) != make_rows(50, seed=2)


def test_held_out_rows_are_the_same_for_every_seed():
    train_a, test_a = make_splits(20, 64, seed=0)
    train_b, test_b = make_splits(20, 64, seed=1)
    assert test_a == test_b
    assert train_a != train_b


def test_no_text_is_both_trained_on_and_held_out():
    _, test = make_splits(0, 400, seed=0)
    held_out = set(problem_texts(test))
    assert len(held_out) == 400
    for seed in range(3):
        train, _ = make_splits(2000, 0, seed)
        texts = problem_texts(train)
        assert len(set(texts)) == 2000
        assert held_out.isdisjoint(texts)
        # Also those that a larger evaluation would draw.
        assert not any(map(is_held_out, texts))


def test_about_one_problem_in_eight_is_held_out():
    share = sum(is_held_out(example["problem"]) for example in draw(4000)) / 4000
    assert 0.10 < share < 0.15


@pytest.mark.parametrize("sizes", [(-1, 0), (0, -1)])
def test_negative_number_of_rows_is_refused(sizes):
    with pytest.raises(ValueError, match="at least 0, got -1"):
        make_splits(*sizes, seed=0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("start 4 ; 4 + 9 = 1 3 ; #### 1 3", "13"),
        ("#### 13", "13"),
        ("####7 <end>", "7"),
        ("#### 4 2 ; #### 9", "42"),
        ("#### 4 2\n7", "42"),
        ("the answer is 13", None),
        ("#### ; 13", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_every_word_is_known_and_every_digit_is_one_token(tokenizer):
    for example in draw(300):
        for text in (example["problem"], example["solution"], example["reference"]):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert len(ids) == len(re.sub(r"(\d)", r" \1 ", text).split())
    assert tokenizer.unk_token_id not in tokenizer(HINT_TEMPLATE.format(hint="1"))["input_ids"]
    assert tokenizer("zebra")["input_ids"] == [tokenizer.unk_token_id]


def test_padding_is_on_the_left(tokenizer):
    batch = tokenizer(["has", "how many ?"], padding=True)["input_ids"]
    assert batch[0][:2] == [tokenizer.pad_token_id] * 2


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    text = draw(1)[0]["problem"] + " <end>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.padding_side == "left"


def test_cached_encoding_equals_the_chat_template(tokenizer):
    encoder = WordEncoder(tokenizer)
    for example in draw(300):
        user = {"role": "user", "content": example["problem"]}
        hint = {"role": "system", "content": HINT_TEMPLATE.format(hint=example["reference"])}
        reply = {"role": "assistant", "content": example["solution"]}
        for messages in ([user], [hint, user], [hint, user, reply, user]):
            expected = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )["input_ids"]
            assert encoder.encode_prompt(messages) == expected
        assert encoder.encode_text(example["solution"]) == tokenizer(example["solution"]).input_ids


def test_model_size_and_seed(tokenizer):
    state = torch.get_rng_state()
    model = build_model(tokenizer, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.numel() for p in model.parameters()) == 372_192
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    same, other = build_model(tokenizer, seed=0), build_model(tokenizer, seed=1)
    assert torch.equal(model.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


def take_examples(tokenizer, num_examples):
    examples = word_problems._warm_up_examples(WordEncoder(tokenizer), tokenizer.eos_token_id, 0)
    taken = []
    for ids, labels in itertools.islice(examples, num_examples):
        start = labels.count(-100)
        taken.append((tokenizer.decode(ids[:start]), tokenizer.decode(labels[start:])))
    return taken


def join_digits(text):
    return re.sub(r"(?<=\d) (?=\d)", "", text)


def story_of(context):
    return join_digits(re.search(r"<user> (.*?) <end>", context).group(1))


def test_warm_up_sees_no_held_out_problem(tokenizer):
    stories = [story_of(context) for context, _ in take_examples(tokenizer, 600)]
    # The text is rebuilt from tokens; that it is the original is what makes the next line count.
    assert set(stories) & {example["problem"] for example in draw(600, seed="warm-up 0")}
    assert not any(map(is_held_out, stories))


def test_warm_up_mixes_hinted_unaided_and_planted_errors(tokenizer):
    examples = take_examples(tokenizer, 2000)
    hinted = [pair for pair in examples if "<system>" in pair[0]]
    planted = [pair for pair in examples if not pair[0].endswith("<assistant>")]
    assert abs(1 - len(hinted) / 2000 - word_problems._UNAIDED_SHARE) < 0.04
    # A few planted steps lead out of the range of the task and are left out.
    assert 0.2 < len(planted) / len(hinted) < 0.35
    assert all("<system>" in context for context, _ in planted)
    assert all(target.endswith("<end>") for _, target in examples)


def test_planted_error_is_wrong_once_and_then_consistent():
    rng = random.Random(0)
    outcomes = []
    for example in draw(400):
        planted = word_problems._plant_error(rng, example["solution"])
        outcomes.append(planted is not None)
        if planted is None:
            continue
        given, rest = planted
        *right_steps, wrong_step = given.removesuffix(" ;").split(" ; ")
        assert example["solution"].startswith(" ; ".join(right_steps) + " ; ")
        left, bad = wrong_step.split(" = ")
        assert f"{left} = " in example["solution"]
        assert wrong_step not in example["solution"].split(" ; ")
        # What follows must continue from the wrong value.
        evaluate_equations(f"start {bad} ; {rest}")
        original = example["solution"].count(" ; ")
        assert given.count(" ;") + rest.count(" ; ") == original
    assert 0 < outcomes.count(False) < 200


def weights_after(tokenizer, **options):
    model = build_model(tokenizer, seed=0).eval()
    warm_up(model, tokenizer, batch_size=8, progress=False, **options)
    assert not model.training
    assert model.lm_head.weight.grad is None
    return model.lm_head.weight.detach()


def test_warm_up_is_deterministic_for_a_seed(tokenizer):
    first = weights_after(tokenizer, steps=3, seed=0)
    random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(first, weights_after(tokenizer, steps=3, seed=0))
    assert not torch.equal(first, weights_after(tokenizer, steps=3, seed=1))


def test_warm_up_trains_on_the_target_only(tokenizer):
    examples = word_problems._warm_up_examples(WordEncoder(tokenizer), tokenizer.eos_token_id, 99)
    for ids, labels in itertools.islice(examples, 50):
        start = max(i for i, label in enumerate(labels) if label == -100) + 1
        assert labels == [-100] * start + ids[start:]
        text = tokenizer.decode(ids[:start])
        assert text.startswith(("<system> hint :", "<user>"))
        assert "<assistant>" in text
        assert "####" in tokenizer.decode(ids[start:])


def test_examples_are_padded_on_the_right():
    input_ids, labels = _right_pad([([7, 1], [-100, 1]), ([7, 8, 9], [-100, -100, 9])], 0)
    assert input_ids.tolist() == [[7, 1, 0], [7, 8, 9]]
    assert labels.tolist() == [[-100, 1, -100], [-100, -100, 9]]


def test_warm_up_lowers_the_loss(tokenizer):
    examples = word_problems._warm_up_examples(WordEncoder(tokenizer), tokenizer.eos_token_id, 99)
    input_ids, labels = _right_pad([next(examples) for _ in range(16)], 0)
    model = build_model(tokenizer, seed=0)
    before = model(input_ids=input_ids, labels=labels).loss.item()
    warm_up(model, tokenizer, steps=40, batch_size=16, progress=False)
    after = model(input_ids=input_ids, labels=labels).loss.item()
    assert after < before - 1


@pytest.mark.parametrize("option", ["steps", "batch_size"])
def test_warm_up_refuses_sizes_below_one(tokenizer, option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        warm_up(build_model(tokenizer, seed=0), tokenizer, **{option: 0})
