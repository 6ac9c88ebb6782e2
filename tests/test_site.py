"""The documentation's site: pages are complete, and links lead to what they led to in the repository."""

import json
from pathlib import Path

import pytest

from vision.config import ClassifierConfig
from vlm_distill import cli
from vlm_distill.config.sections import RunConfig
from vlm_distill.evaluation.benchmark_entry import Benchmark
from vlm_distill.evaluation.benchmarks import BENCHMARKS
from vlm_distill.sweeping.sections import SweepSection

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def site(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")


def key_page(kind):
    import keys

    found = keys.Configurations(ROOT)
    built_in = [keys.Example(one.model_dump(exclude_unset=True), None) for one in BENCHMARKS]
    examples = {
        RunConfig: found.runs,
        ClassifierConfig: found.classifiers,
        SweepSection: found.sweeps,
        Benchmark: [*found.benchmarks, *built_in],
    }
    return keys.page_of("Keys", "All keys.", kind, examples[kind])


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (RunConfig, ["training.steps", "teacher.cache.form", "data.train.N.weight", "on_policy.server.url"]),
        (ClassifierConfig, ["data.views.N.crop", "training.ema"]),
        (SweepSection, ["axes", "limits.NAME.output"]),
        (Benchmark, ["scorer", "official.join.N.by"]),
    ],
)
def test_every_key_is_on_its_page(kind, keys):
    """A key that no configuration, page or docs/site/examples.yaml shows is an error here, as in `make docs`."""
    page = key_page(kind)
    assert all(f"{{#{key}}}" in page for key in keys)


def test_a_key_says_type_default_meaning_and_example():
    page = key_page(RunConfig)
    entry = page[page.index("{#training.batch_size}") :].split("\n\n`")[0]
    assert "Whole number above 0; default `64`. Samples of an optimizer step, over all ranks." in entry
    assert "Example: `batch_size: " in entry


def test_every_command_and_option_is_on_the_page():
    from commands import commands_page

    page = commands_page()
    names = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
    assert all(f"`vlm-distill {name}` {{#{name}}}" in page for name in names)
    assert "`--nproc`{#train.nproc}\n:   Whole number at least 1. Processes on this machine" in page


def test_links_lead_to_copies_in_the_site(tmp_path):
    import build

    names = build.pages() | {ROOT / "docs" / "reference" / "keys.md": "reference/keys.md"}
    text = "[a](../data.md#formats) [b](../../configs/demo/taid.yaml) [c](https://x.org) `[d](nowhere.md)`"
    mended = build.mended(text, ROOT / "docs" / "reference" / "keys.md", names, tmp_path)
    expected = "[a](../data.md#formats) [b](../files/configs/demo/taid.yaml) [c](https://x.org) `[d](nowhere.md)`"
    assert mended == expected
    assert (tmp_path / "files/configs/demo/taid.yaml").is_file()


def test_a_link_to_nothing_is_refused(tmp_path):
    import build

    with pytest.raises(build.SiteError, match=r"docs/data\.md: the link gone\.md leads to no file"):
        build.mended("[a](gone.md)", ROOT / "docs" / "data.md", build.pages(), tmp_path)


def test_the_newest_version_comes_first(tmp_path):
    import build

    for version in ("0.2.0", "0.10.0", "0.9.1"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "index.html").touch()
    build.write_versions(tmp_path)
    listed = [entry["version"] for entry in json.loads((tmp_path / "versions.json").read_text())]
    assert listed == ["0.10.0", "0.9.1", "0.2.0"]
    assert "url=0.10.0/index.html" in (tmp_path / "index.html").read_text()
