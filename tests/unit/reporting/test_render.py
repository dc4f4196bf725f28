"""The console table of one run and the Markdown table of many."""

import dataclasses
from typing import Any

import pytest

from hf_nft.errors import UnknownNameError
from hf_nft.evaluation.doubts import doubt
from hf_nft.evaluation.intervals import proportion
from hf_nft.evaluation.run import Measured
from hf_nft.reporting.record import RunRecord, doubt_block, metric_block
from hf_nft.reporting.render import attack_of, summary_table
from hf_nft.reporting.tables import results_table
from hf_nft.reporting.text import code, markdown, plain

HOSTILE = "a\x1b[31m|`<b>\u202e\u200b\n# x"


def share(hits: int, rows: int) -> Measured:
    found = proportion("value", hits, rows)
    return Measured(found.pop("value"), **found)


BEFORE = {"acc": share(942, 1000), "asr": share(900, 900), "racc": share(0, 900)}
AFTER = {"acc": share(931, 1000), "asr": share(12, 900), "racc": share(820, 900)}


def make(**changes: Any) -> RunRecord:
    fields: dict[str, Any] = {
        "kind": "purify",
        "command": "hf-nft purify org/suspect",
        "suspect": {"name": "org/suspect", "revision": "0123456789abcdef", "architecture": "ResNet"},
        "data": {"name": "org/data", "test_rows": 1000},
        "config": {"defense": "nft", "preset": "default"},
        "metrics": metric_block(BEFORE, AFTER),
        "attack": {"name": "badnets", "seed": 0},
        "shots": {"per_class": 10.0, "classes": 10},
        "work": {"seconds": 48.234, "steps": 830, "peak_memory_mb": 912.3, "device": "cpu"},
    }
    return RunRecord(**{**fields, **changes})


def test_the_summary_is_aligned_and_in_percent() -> None:
    lines = summary_table(make()).splitlines()
    assert lines[0] == "model   org/suspect (ResNet, revision 0123456789ab)"
    assert lines[4] == "shots   10 per class x 10 classes"
    assert lines[5] == "time    48.2 s, 830 steps, 912 MiB peak, on cpu"
    assert lines[7:12] == [
        "        before                  after                change",
        "ACC     94.2 %  [92.6, 95.5]   93.1 %  [91.4, 94.5]    -1.1",
        "ASR    100.0 %  [99.6, 100.0]   1.3 %  [0.8, 2.3]     -98.7",
        "R-ACC    0.0 %  [0.0, 0.4]     91.1 %  [89.1, 92.8]   +91.1",
        "DER                            98.8 %",
    ]


@pytest.mark.parametrize(
    ("details", "shown"),
    [
        ({"units_cut": 98, "masks": 1952}, ["cut     98 of 1952 units"]),
        (
            {"units_cut": 41, "masks": 2064, "cut_by_push": 40, "push_scores": {"7": -5.9, "0": -10.7}},
            ["found   an easy way to class 7", "cut     41 of 2064 units"],
        ),
        (
            {
                "units_cut": 0,
                "cut_by_push": 0,
                "push_scores": {"7": -5.9, "0": -10.7},
                "adversary_radii": [1.5, 3.0],
                "adversary_window": [[0, 8], [24, 32]],
            },
            ["found   an easy way to class 7, within 0 to 8 x 24 to 32"],
        ),
        ({"units_cut": 0, "masks": 2064, "cut_by_push": 0, "push_scores": {"7": -9.9}}, []),
    ],
)
def test_what_was_found_and_cut_is_told(details: dict[str, Any], shown: list[str]) -> None:
    told = summary_table(make(details=details)).splitlines()
    assert [line for line in told if line.startswith(("found", "cut"))] == shown


@pytest.mark.parametrize(
    ("attack", "shown"),
    [
        ({"name": "badnets", "label_map": "all_to_one", "preset": "nft"}, "badnets"),
        ({"name": "badnets", "label_map": "all_to_all", "preset": "standard"}, "badnets (all_to_all, standard)"),
        ({"name": "sig", "preset": "standard"}, "sig"),
        ({"name": "sig", "preset": "nft"}, "sig (nft)"),
        ({"name": "of a stranger", "label_map": "all_to_one"}, "of a stranger"),
        ({"seed": 0}, "unnamed"),
        (None, "none"),
    ],
)
def test_an_attack_is_named_with_what_is_unusual_about_it(attack: dict[str, Any] | None, shown: str) -> None:
    assert attack_of(make(attack=attack)) == shown


def test_doubts_have_lines_with_codes() -> None:
    record = make(doubts=doubt_block([doubt("not-recovered", racc=0.3), doubt("training-mode")]))
    lines = summary_table(record).splitlines()[-4:]
    assert lines[0] == "doubts:"
    assert lines[1].startswith("  not-recovered  triggered rows get")
    assert lines[2].startswith("  training-mode  some modules")
    assert lines[3] == "  each explained in docs/footguns.md"


def test_a_run_with_one_side_shows_one_column() -> None:
    record = make(kind="evaluate", metrics=metric_block(None, AFTER), shots={}, work={})
    text = summary_table(record)
    assert "before" not in text
    assert "change" not in text
    assert "ACC    93.1 %  [91.4, 94.5]" in text
    assert "shots" not in text


def test_a_missing_attack_and_a_number_that_is_no_share() -> None:
    metrics = metric_block({"perplexity": Measured(12.3456, total=70)}, {"perplexity": Measured(11.1, total=70)})
    text = summary_table(make(metrics=metrics, attack=None))
    assert "none named, so ASR is not measured" in text
    line = next(line for line in text.splitlines() if line.startswith("perplexity"))
    assert line.split() == ["perplexity", "12.35", "11.1", "-1.246"]


def test_no_change_is_not_a_loss() -> None:
    metrics = metric_block({"acc": Measured(0.9)}, {"acc": Measured(0.89999)})
    assert "+0.0" in summary_table(make(metrics=metrics))


def test_a_terminal_gets_no_control_characters() -> None:
    text = summary_table(make(suspect={"name": HOSTILE}, data={"name": HOSTILE}))
    assert not {"\x1b", "\u202e", "\u200b"} & set(text)
    assert "\n# x" not in text


def test_escapes() -> None:
    assert plain(HOSTILE) == "a [31m|`<b> # x"
    assert plain("x" * 400) == "x" * 297 + "..."
    assert markdown("*a*_b_ c_d <b> [x](y) https://e.org") == (r"\*a\*\_b\_ c_d &lt;b&gt; \[x\]\(y\) https&#58;//e.org")
    assert code("a`b|c<!--") == r"`a'b\|c<! --`"
    assert code("\u200b") == "`(unnamed)`"


def test_rows_of_many_records() -> None:
    tuned = make(config={"defense": "finetune"}, metrics=metric_block(BEFORE, BEFORE), work={})
    paper = make(config={"defense": "nft", "preset": "paper"}, shots={"per_class": 5.0}, attack={"name": "sig"})
    lines = results_table([paper, tuned, make()]).splitlines()
    assert lines == [
        "| attack | shots | method | ACC before | ACC after | ASR before | ASR after | R-ACC before | R-ACC after "
        "| ACC drop | seconds |",
        "| :-- | :-- | :-- | --: | --: | --: | --: | --: | --: | --: | --: |",
        r"| sig | 5 | nft \(paper\) | 94.2 | 93.1 | 100.0 | 1.3 | 0.0 | 91.1 | 1.1 | 48.2 |",
        "| badnets | 10 | finetune | 94.2 | 94.2 | 100.0 | 100.0 | 0.0 | 0.0 | 0.0 | - |",
        "| badnets | 10 | nft | 94.2 | 93.1 | 100.0 | 1.3 | 0.0 | 91.1 | 1.1 | 48.2 |",
    ]


def test_shots_ascend_as_numbers() -> None:
    lines = results_table([make(shots={"per_class": n}) for n in (50.0, 5.0, 10.0)], ["shots"]).splitlines()
    assert lines[2:] == ["| 5 |", "| 10 |", "| 50 |"]


def test_repeated_runs_share_a_row_and_different_data_does_not() -> None:
    other = make(metrics=metric_block(BEFORE, {"acc": share(911, 1000)}))
    assert results_table([make(), other], ["attack", "acc_after"]).splitlines()[2] == "| badnets | 92.1 ± 1.4 | 2 |"
    lines = results_table([make(), dataclasses.replace(other, data={"name": "b|c"})], ["acc_after"]).splitlines()
    assert lines == ["| data | ACC after |", "| :-- | --: |", "| org/data | 93.1 |", r"| b\|c | 91.1 |"]


def test_columns() -> None:
    models = [make(suspect={"architecture": name}) for name in ("ViTForImageClassification", "GPT2LMHeadModel", "Own")]
    assert results_table(models, ["model"]).splitlines()[2:] == ["| ViT |", "| GPT2 |", "| Own |"]
    assert results_table([], ["attack", "der"]) == "| attack | DER |\n| :-- | --: |"
    with pytest.raises(UnknownNameError, match="acc_after"):
        results_table([], ["acc_aftr"])
