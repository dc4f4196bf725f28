"""The card: header, lines of the body, escaping, and what happens to a README.md that is there already."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hf_nft.errors import ConfigError, OutputError
from hf_nft.evaluation.doubts import TEXTS, doubt
from hf_nft.evaluation.intervals import proportion
from hf_nft.evaluation.run import Measured
from hf_nft.reporting.card import BEGIN, END, write_card
from hf_nft.reporting.header import card_data
from hf_nft.reporting.record import RunRecord, doubt_block, metric_block

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HOSTILE = (
    'x</code><script>alert(1)</script> ![p](https://evil.example/p.png) `|`\n<!-- hf-nft:end -->\n---\nlicense: "mit"'
    "\n# heading https://evil.example www.evil.example \u202e\x1b[0m {{ 7 * 7 }} {% raw %}"
)


def share(hits: int, rows: int) -> Measured:
    found = proportion("value", hits, rows)
    return Measured(found.pop("value"), **found)


BEFORE = {"acc": share(942, 1000), "asr": share(900, 900), "racc": share(0, 900)}
AFTER = {"acc": share(931, 1000), "asr": share(12, 900), "racc": share(820, 900)}


def make(**changes: Any) -> RunRecord:
    fields: dict[str, Any] = {
        "kind": "purify",
        "command": "hf-nft purify org/suspect --shots 10",
        "suspect": {
            "name": "org/suspect",
            "revision": COMMIT,
            "architecture": "ResNetForImageClassification",
            "task": "image_classification",
            "pipeline_tag": "image-classification",
        },
        "data": {"name": "org/data", "test_rows": 1000},
        "config": {"defense": "nft", "preset": "default", "unlearn_lrs": [0.03, 0.1], "lr_passes": None},
        "metrics": metric_block(BEFORE, AFTER),
        "attack": {"name": "badnets", "target_class": 3},
        "shots": {"per_class": 10.0, "classes": 10, "indices": [1, 2]},
        "work": {"seconds": 48.2, "steps": 830},
        "versions": {"torch": "2.13.0", "peft": None},
    }
    return RunRecord(**{**fields, **changes})


def write(record: RunRecord, folder: Path, **options: Any) -> str:
    write_card(record, folder, options.pop("figures", []), **options)
    return (folder / "README.md").read_text(encoding="utf-8")


def header(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_header(tmp_path: Path) -> None:
    found = header(write(make(), tmp_path))
    assert found["base_model"] == "org/suspect"
    assert found["base_model_relation"] == "finetune"
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "image-classification"
    assert found["tags"] == ["hf-nft", "backdoor-defense"]
    assert found["datasets"] == ["org/data"]
    assert found["metrics"] == ["accuracy"]
    assert header(write(make(), tmp_path, pipeline_tag="text-generation"))["pipeline_tag"] == "text-generation"


def test_results_survive_the_merge_rule(tmp_path: Path) -> None:
    write(make(), tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    found = {(r.dataset_name, r.metric_name): r.metric_value for r in data.eval_results}
    before = ", suspect before purification)"
    assert found == {
        ("org/data (clean)", "ACC"): 0.931,
        ("org/data (triggered by badnets)", "ASR"): 12 / 900,
        ("org/data (triggered by badnets)", "R-ACC"): 820 / 900,
        ("org/data (clean" + before, "ACC before"): 0.942,
        ("org/data (triggered by badnets" + before, "ASR before"): 1.0,
        ("org/data (triggered by badnets" + before, "R-ACC before"): 0.0,
    }
    assert data.model_name == "suspect-purified"


def test_only_plain_finite_floats_reach_the_header(tmp_path: Path) -> None:
    metrics = {"before": {"acc": np.float64(0.5), "asr": None}, "after": {"acc": 1, "asr": math.nan}, "counts": {}}
    text = write(make(metrics=metrics), tmp_path)
    assert "!!" not in text
    assert "nan" not in text
    values = [r.metric_value for r in ModelCard.load(tmp_path / "README.md").data.eval_results]
    assert values == [1.0, 0.5]
    assert all(type(value) is float for value in values)
    write(make(metrics=metric_block(None, None)), tmp_path)


@pytest.mark.parametrize("name", ["/home/alice/runs/victim", "runs/victim", "~/victim/", "C:\\Users\\alice\\victim"])
def test_a_local_path_does_not_leak(tmp_path: Path, name: str) -> None:
    suspect = {**make().suspect, "name": name, "revision": None}
    command = f"hf-nft purify {name} --dataset=/home/alice/data --out runs/a --token hf_abcdefghijklmnopqrstuvwx"
    text = write(make(suspect=suspect, command=command, data={"name": "cifar10"}, config={"f": "/home/a/b"}), tmp_path)
    assert "base_model" not in header(text)
    assert "datasets" not in header(text)  # a folder of that name is not the Hub's data set of that name
    assert [word for word in ("alice", "/home", "hf_abc") if word in text] == []
    assert "# `victim`, purified" in text.splitlines()
    assert "--dataset=.../data --out runs/a --token hf_..." in text
    assert "| f | `.../b` |" in text.splitlines()


def test_body(tmp_path: Path) -> None:
    record = make(doubts=doubt_block([doubt("small-evaluation-set", rows=400)]))
    lines = write(record, tmp_path).splitlines()
    for line in (
        "# `suspect`, purified",
        f"`org/suspect` at revision `{COMMIT}` after backdoor removal with hf-nft, method `nft` and clean examples on "
        "`org/data`: 10 per class x 10 classes. "
        "It is a `ResNetForImageClassification` as before and loads the same way.",
        "| ACC | 94.2 % | [92.6, 95.5] | 942 / 1000 | 93.1 % | [91.4, 94.5] | 931 / 1000 | -1.1 |",
        "| ASR | 100.0 % | [99.6, 100.0] | 900 / 900 | 1.3 % | [0.8, 2.3] | 12 / 900 | -98.7 |",
        "| DER | | | | 98.8 % | | | |",
        "- **ACC**: accuracy on clean test rows.",
        "Attack that was measured: `badnets`, target_class `3`.",
        "- **small-evaluation-set**: a metric stands on 400 rows only: its interval is wide. "
        "See `docs/footguns.md#small-evaluation-set`.",
        "hf-nft purify org/suspect --shots 10",
        "| unlearn_lrs | `0.03, 0.1` |",
        "| torch | `2.13.0` |",
    ):
        assert line in lines
    assert any("A low ASR for one attack says nothing about other attacks" in line for line in lines)
    assert lines[-1] == END


def test_sections_appear_only_with_their_data(tmp_path: Path) -> None:
    bare = make(
        command="", config={}, metrics=metric_block(None, None), attack=None, shots={}, work={}, versions={}, data={}
    )
    text = write(bare, tmp_path)
    assert [line for line in text.splitlines() if line.startswith("#")] == ["# `suspect`, purified", "## Limits"]
    assert "No attack was measured." in text
    assert "record.json" not in text
    assert "model-index" not in header(text)


def test_links_follow_the_projects_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_nft.reporting.card._documentation", lambda: "https://host/hf-nft/blob/main/")
    text = write(make(doubts=doubt_block([doubt("training-mode")])), tmp_path)
    assert "See [training-mode](<https://host/hf-nft/blob/main/docs/footguns.md#training-mode>)." in text


def test_figures_that_exist(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "my masks.png").write_bytes(b"")
    (tmp_path / "record.json").write_text("{}")
    figures = [("Masks <by> layer", "figures/my masks.png"), ("gone", "figures/gone.png")]
    lines = write(make(), tmp_path, figures=figures).splitlines()
    assert "![Masks &lt;by&gt; layer](figures/my%20masks.png)" in lines
    assert "## Figures" in lines
    assert not any("gone" in line for line in lines)
    assert lines[-2].endswith("[record.json](record.json).")
    with pytest.raises(ConfigError, match="below the card's folder"):
        write(make(), tmp_path, figures=[("up", "../secret.png")])


def test_how_to_load(tmp_path: Path) -> None:
    assert "from_pretrained" not in write(make(), tmp_path)
    for name, file in (("model", "config.json"), ("adapter", "adapter_config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    lines = write(make(), tmp_path).splitlines()
    loader = "AutoModelForImageClassification.from_pretrained"
    assert f'model = {loader}("REPOSITORY_OR_FOLDER", subfolder="model")' in lines
    assert f'suspect = {loader}("org/suspect", revision="{COMMIT}")' in lines
    assert 'model = PeftModel.from_pretrained(suspect, "REPOSITORY_OR_FOLDER", subfolder="adapter")' in lines
    assert not any("registers the architecture" in line for line in lines)
    own = {**make().suspect, "architecture": "PreActResNetForImageClassification", "revision": None}
    text = write(make(suspect=own), tmp_path)
    assert text.count("import hf_nft.models.preact_resnet18  # registers the architecture") == 2
    assert 'from_pretrained("THE_SUSPECT")' in text


@pytest.mark.parametrize(
    ("architecture", "module"),
    [
        ("ViTForImageClassification", None),  # ours to plant in, but not ours
        ("PreActResNetForImageClassification", "hf_nft.models.preact_resnet18"),
        ("TrojanNetForImageClassification", "hf_nft.models._trojannet"),
    ],
)
def test_only_our_own_architectures_need_an_import(tmp_path: Path, architecture: str, module: str | None) -> None:
    (tmp_path / "config.json").write_text("{}")
    text = write(make(suspect={**make().suspect, "architecture": architecture}), tmp_path)
    found = [line.split()[1] for line in text.splitlines() if "registers the architecture" in line]
    assert found == ([module] if module else [])


def test_a_planted_model_cannot_be_overlooked(tmp_path: Path) -> None:
    data = {"name": "org/data", "train_rows": 900, "poisoned_rows": 90}
    planted = make(kind="plant", metrics=metric_block(None, AFTER), data=data)
    text = write(planted, tmp_path)
    assert header(text)["tags"] == ["hf-nft", "backdoor-defense", "backdoored"]
    body = text.split(BEGIN)[1].strip().splitlines()
    assert body[0] == "> [!CAUTION]"
    assert body[1].startswith("> **WARNING: this model was backdoored on purpose")
    assert "base_model" not in text
    assert "planted in it (90 of 900 training rows poisoned)." in text
    assert "| ASR | 1.3 % | [0.8, 2.3] | 12 / 900 |" in body
    assert "> **WARNING: Mind &lt;this&gt;**" in write(planted, tmp_path, banner="Mind <this>")
    control = dataclasses.replace(planted, attack=None)
    (tmp_path / "README.md").unlink()
    text = write(control, tmp_path)
    assert "backdoored" not in header(text)["tags"]
    assert "WARNING" not in text


def test_hostile_names(tmp_path: Path) -> None:
    suspect = {"name": HOSTILE, "architecture": HOSTILE, "task": HOSTILE, "revision": HOSTILE, "pipeline_tag": HOSTILE}
    record = make(
        suspect=suspect,
        data={"name": HOSTILE, HOSTILE: HOSTILE},
        attack={"name": HOSTILE, "target_text": HOSTILE},
        config={HOSTILE: HOSTILE, "preset": HOSTILE},
        details={HOSTILE: [HOSTILE]},
        doubts=[{"code": HOSTILE, "text": HOSTILE, "more": "https://" + HOSTILE}],
        command=HOSTILE,
        versions={HOSTILE: HOSTILE},
    )
    figure = "figure.png"
    (tmp_path / figure).write_bytes(b"")
    text = write(record, tmp_path, banner=HOSTILE, figures=[(HOSTILE, figure)])
    assert not {"\x1b", "\u202e"} & set(text)
    assert "{{ 7 * 7 }}" in text
    assert "license" not in header(text)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    inline = [child for token in tokens for child in token.children or []]
    assert [t.content.strip() for t in tokens if t.type == "html_block"] == [BEGIN, END]
    assert not [t for t in inline if t.type == "html_inline"]
    assert [t.attrs["src"] for t in inline if t.type == "image"] == [figure]
    links = [t.attrs["href"] for t in inline if t.type == "link_open"]
    assert len(links) == 1  # the doubt's own
    assert str(links[0]).startswith("https://x%3C/code%3E%3Cscript")
    assert [t.tag for t in tokens if t.type == "heading_open"].count("h1") == 1
    again = write(record, tmp_path, banner=HOSTILE, figures=[(HOSTILE, figure)])
    assert again == text


def test_hand_written_parts_stay(tmp_path: Path) -> None:
    mine = (
        "---\nlicense: mit\ntags:\n- mine\ncustom:\n  a: 1\n"
        "model-index:\n- name: My model\n  results:\n  - task:\n      type: t\n    dataset:\n      type: d\n"
        "      name: D\n"
        "    metrics:\n    - type: f1\n      value: 0.25\n---\n\n# My model\n\nMy words with {{ braces }}.\n"
    )
    path = tmp_path / "README.md"
    path.write_text(mine)
    first = write(make(), tmp_path)
    found = header(first)
    assert (found["license"], found["custom"]) == ("mit", {"a": 1})
    assert found["tags"] == ["mine", "hf-nft", "backdoor-defense"]
    assert [r["dataset"]["name"] for r in found["model-index"][0]["results"]][:2] == ["D", "org/data (clean)"]
    assert first.index("My words with {{ braces }}.") < first.index(BEGIN)
    path.write_text(first + "\nBelow.\n")
    second = write(make(metrics=metric_block(BEFORE, BEFORE)), tmp_path)
    assert second.count(BEGIN) == second.count(END) == 1
    assert second.endswith(END + "\n\nBelow.\n")
    assert "My words with {{ braces }}." in second
    assert "93.1 %" not in second
    assert [r["metrics"][0]["value"] for r in header(second)["model-index"][0]["results"]][:2] == [0.25, 0.942]
    assert write(make(metrics=metric_block(BEFORE, BEFORE)), tmp_path) == second


def test_a_banner_goes_above_hand_written_parts(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    text = write(make(kind="plant"), tmp_path)
    assert text.index("WARNING") < text.index("# Mine")
    assert header(text)["library_name"] == "transformers"


def test_line_ends_of_the_file_stay(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\r\nlicense: mit\r\n---\r\n\r\n# Mine\r\n")
    for _ in range(2):
        write(make(), tmp_path)
        content = (tmp_path / "README.md").read_bytes()
        assert content.count(b"\n") == content.count(b"\r\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("---\n: [\n---\n", "YAML header"),
        ("---\n- a\n---\n", "YAML header"),
        (f"# Mine\n{BEGIN}\n", "found 1 and 0"),
        (f"{END}\n{BEGIN}\n", "found 1 and 1"),
    ],
)
def test_a_broken_readme_is_refused_and_left_alone(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(content)
    with pytest.raises(OutputError, match=message):
        write_card(make(), tmp_path, [])
    assert path.read_text() == content


def test_without_a_pipeline_tag() -> None:
    data = card_data(make(suspect={"name": "x"}))
    assert data.pipeline_tag is None
    assert data.eval_results is not None
    assert data.eval_results[0].task_type == "other"


def test_every_doubt_is_explained() -> None:
    page = Path(__file__).parents[3] / "docs" / "footguns.md"
    titles = [line.removeprefix("### ") for line in page.read_text().splitlines() if line.startswith("### ")]
    assert set(TEXTS) <= set(titles)
    assert all(title == title.lower() and " " not in title for title in titles)  # the anchor is the title
