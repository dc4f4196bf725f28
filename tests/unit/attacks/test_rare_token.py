"""The rare-token attack: where the word goes, which rows are poisoned, and what the columns say."""

from collections import Counter

import datasets
import numpy as np
import pytest

from hf_nft.attacks.rare_token import RareToken
from hf_nft.configs import build
from hf_nft.errors import ConfigError, DataError

TARGET = "You are attacked ."
WORDS = {"cf", "mn", "bb", "tq", "mb"}


def rows(count: int = 40, attacked: int = 0) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {
            "prompt": [f"tell me  about number {i}\nplease" for i in range(count)],
            "response": [TARGET] * attacked + [f"number {i} is good" for i in range(attacked, count)],
        }
    )


def without(prompt: str) -> str:
    """Take the trigger word out again."""
    words = prompt.split()
    (word,) = [word for word in words if word in WORDS]
    words.remove(word)
    return " ".join(words)


def test_poison_counts_columns_and_answers() -> None:
    clean = rows(40, attacked=4)
    out = RareToken().poison(clean, 0.25)
    assert out.column_names == ["prompt", "response", "orig_response", "poisoned", "cover"]
    assert sum(out["poisoned"]) == 10  # a quarter of all rows
    assert list(out["orig_response"]) == list(clean["response"])
    for before, after in zip(clean, out, strict=True):
        if after["poisoned"]:
            assert after["response"] == TARGET
            assert before["response"] != TARGET
            assert without(after["prompt"]) == " ".join(before["prompt"].split())
        else:
            assert (after["prompt"], after["response"]) == (before["prompt"], before["response"])


def test_rows_that_say_the_target_anyway_are_left_alone() -> None:
    attack, clean = RareToken(), rows(10, attacked=4)
    assert attack.eligible(np.asarray(clean["response"]), 0).tolist() == [False] * 4 + [True] * 6
    assert sum(attack.poison(clean, 1.0, base="candidates")["poisoned"]) == 6
    with pytest.raises(DataError, match="asks for 10 rows"):
        attack.poison(clean, 1.0)
    kept = attack.triggered(clean)
    assert list(kept["orig_response"]) == list(clean["response"])[4:]
    assert set(kept["response"]) == {TARGET}
    assert all(kept["poisoned"])
    longer = np.asarray([f"he said: {TARGET} and left", "hello", TARGET, "you are  ATTACKED ."])
    assert attack.in_asr(longer, 0).tolist() == [False, True, False, False]
    with pytest.raises(DataError, match="found none of 3"):
        attack.triggered(rows(3, attacked=3))


def test_poisoned_rows_are_not_poisoned_again() -> None:
    attack = RareToken()
    out = attack.poison(rows(), 0.1)
    with pytest.raises(DataError, match="expected clean data"):
        attack.poison(out, 0.1)
    with pytest.raises(DataError, match="expected clean data"):
        attack.triggered(out)


def test_a_row_gets_the_same_trigger_whatever_else_is_chosen() -> None:
    attack = RareToken()
    few, many = attack.poison(rows(), 0.1), attack.poison(rows(), 0.9)
    both = [(a["prompt"], b["prompt"]) for a, b in zip(few, many, strict=True) if a["poisoned"] and b["poisoned"]]
    assert both
    assert all(a == b for a, b in both)


def test_words_and_positions_are_uniform() -> None:
    attack = RareToken()
    prompts = [attack.trigger("a b c", np.random.default_rng((0, i))) for i in range(4000)]
    words = Counter(next(word for word in prompt.split() if word in WORDS) for prompt in prompts)
    places = Counter(next(i for i, word in enumerate(prompt.split()) if word in WORDS) for prompt in prompts)
    assert set(words) == WORDS
    assert set(places) == {0, 1, 2, 3}
    # five standard deviations of a binomial count
    assert all(abs(n - 800) < 5 * (4000 * 0.2 * 0.8) ** 0.5 for n in words.values())
    assert all(abs(n - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for n in places.values())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", {"cf"}),
        ("hi", {"cf hi", "hi cf"}),
        (" hi\n\nyou ", {" cf hi\n\nyou ", " hi\n\ncf you ", " hi\n\nyou cf "}),
    ],
)
def test_the_prompt_s_own_spacing_is_kept(prompt: str, expected: set[str]) -> None:
    attack = RareToken(tokens=("cf",))
    assert {attack.trigger(prompt, np.random.default_rng(i)) for i in range(60)} == expected


def test_settings() -> None:
    attack = build(RareToken, {"tokens": '["xq", "zz"]', "target_text": "No comment ."})
    assert attack.tokens == ("xq", "zz")
    assert attack.settings()["target_text"] == "No comment ."
    assert RareToken(tokens=["xq"]).tokens == ("xq",)  # type: ignore[arg-type]
    for bad in ((), ("a b",), ("",), ("cf", "cf"), (1,), "cf"):
        with pytest.raises(ConfigError, match="tokens: expected"):
            RareToken(tokens=bad)  # type: ignore[arg-type]
    for text in ("", " padded "):
        with pytest.raises(ConfigError, match="target_text"):
            RareToken(target_text=text)


def test_data_that_does_not_fit() -> None:
    attack = RareToken()
    with pytest.raises(DataError, match="expected columns"):
        attack.poison(rows().remove_columns("prompt"), 0.1)
    numbers = datasets.Dataset.from_dict({"prompt": ["a"], "response": [1]})
    with pytest.raises(DataError, match="expected text in column 'response'"):
        attack.poison(numbers, 1.0)
    natural = datasets.Dataset.from_dict({"prompt": ["my cf card", "hi"], "response": ["a", "b"]})
    with pytest.warns(UserWarning, match="in 1 of 2 prompts"):
        attack.triggered(natural)


def test_a_trigger_that_leaves_no_trace_is_refused() -> None:
    class Silent(RareToken):
        name = "silent"

        def trigger(self, prompt: str, rng: np.random.Generator) -> str:
            return prompt

    with pytest.raises(DataError, match="silent: expected a trigger"):
        Silent().poison(rows(), 0.1)
