"""Benchmarks, layouts and families from outside; and their mistakes."""

import json

import pytest
from outside import install, module
from run_files import write

from data import plugin_layouts
from data.errors import BadSample, UserError
from data.in_memory import samples_in_memory
from data.opening import open_source
from vlm_distill.config.file import load_config
from vlm_distill.evaluation import benchmark_lookup
from vlm_distill.evaluation.benchmark_lookup import get_benchmark
from vlm_distill.evaluation.scoring import scorers
from vlm_distill.losses.plugins import load
from vlm_distill.models import families
from vlm_distill.models.families import Family, family


def test_benchmarks_and_families_are_listed_and_found(here, monkeypatch, command, registered):
    module(
        here / "her_parts.py",
        """
        from vlm_distill.models.families import Family
        CHARTS = {"source": {"path": "charts.jsonl"}, "scorer": "her_parts:score"}
        FACTS = Family(softcap=True)
        def score(table, rules):
            pass
        """,
    )
    points = {"her_charts": "her_parts:CHARTS", "mmstar": "her_parts:CHARTS"}
    models = {"her_vlm": "her_parts:FACTS", "wrong": "her_parts:CHARTS"}
    install(here / "hers", monkeypatch, "hers", benchmarks=points, families=models)

    assert get_benchmark("her_charts").name == "her_charts"
    assert get_benchmark("mmstar").tsv is not None
    _, out, err = command("benchmarks")
    assert "plug-in: her_parts:CHARTS of hers 1.0" in out
    assert "tsv, huggingface; rules: vlmevalkit, lmms-eval" in out
    assert "benchmark mmstar: her_parts:CHARTS of hers 1.0 cannot have this name" in err

    assert family("her_vlm").softcap
    assert not family("unknown").softcap
    with pytest.raises(UserError, match=r"family wrong: is a dict; make it a vlm_distill.models.families.Family"):
        family("wrong")
    assert "her_vlm" in command("models")[1]


# Families


def test_a_family_is_registered_but_never_named_by_a_model(here, registered):
    module(here / "trap.py", "raise RuntimeError('imported')")
    families.register("mine", Family(norm_after=True))
    assert family("mine").norm_after
    assert family("trap:FACTS") == Family()
    with pytest.raises(UserError, match=r"family llava: .* cannot have this name, which vlm_distill.models.families"):
        families.register("llava", Family())


# Layouts


def records(folder):
    rows = [{"picture": "0.png", "ask": ["a", "b"], "say": ["c", "d"]}, {"picture": "0.png", "ask": ["a"], "say": []}]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module(
        folder / "my_data.py",
        """
        from data.errors import BadSample
        def read_record(record):
            messages = []
            for question, answer in zip(record.pop("ask"), record["say"], strict=True):
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return {"messages": messages, "images": [record["picture"]]}
        def nothing(record):
            return None
        def refuse(record):
            raise BadSample("too old", "1999")
        NUMBER = 3
        """,
    )
    return folder / "records.jsonl", rows


def test_a_layout_of_ones_own_reads_records(here):
    path, _ = records(here)
    source = open_source(path, layout="my_data:read_record")
    sample = source[0]
    assert [message["role"] for message in sample.messages] == ["user", "assistant"] * 2
    assert sample.images == (str(here / "0.png"),)
    assert (sample.source, sample.line) == ("records", 1)
    with pytest.raises(
        BadSample, match=r"^layout my_data:read_record failed: ValueError: zip\(\) argument 2 is shorter"
    ):
        source[1]
    with pytest.raises(BadSample, match="layout my_data:nothing returned no record: a NoneType"):
        open_source(path, layout="my_data:nothing")[0]
    with pytest.raises(BadSample, match=r"^too old: 1999$"):
        open_source(path, layout="my_data:refuse")[0]


def test_a_layout_leaves_samples_in_memory_as_they_are(here, registered):
    _, rows = records(here)
    plugin_layouts.register("mine", load("my_data:read_record"))
    with samples_in_memory({"memory:x": rows}):
        source = open_source("memory:x", layout="mine")
        assert source[0].messages == source[0].messages
    assert "ask" in rows[0]


def test_mistakes_about_layouts(here):
    path, _ = records(here)
    with pytest.raises(UserError, match="no layout is called 'mine'; there are none with a name; name yours as pack"):
        open_source(path, layout="mine")
    with pytest.raises(UserError, match="layout my_data:NUMBER: is a int, not a function"):
        open_source(path, layout="my_data:NUMBER")
    with pytest.raises(UserError, match="leave columns or layout out"):
        open_source(path, layout="my_data:nothing", columns={"image": "picture"})
    train = {"path": "x", "layout": "my_data:nothing"}
    for more in ({"columns": {"image": "a"}}, {"format": "text"}):
        with pytest.raises(UserError, match="layout reads the records' own keys"):
            load_config(write(here, {"data": {"train": [train | more]}}))


# Benchmarks


def charts(folder):
    rows = [{"question": "what?", "answer": "Red"}, {"question": "which?", "answer": "blue"}]
    (folder / "charts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module(
        folder / "my_benchmarks.py",
        """
        from vlm_distill.evaluation.scoring.scores import Scores
        def score(table, rules, worth=1):
            right = [float(row["prediction"].lower() == row["answer"].lower()) for row in table]
            main = 100 * worth * sum(right) / len(right)
            return Scores("accuracy", main, {"accuracy": main}, rows=right)
        CHARTS = {"source": {"path": "charts.jsonl"}, "scorer": "my_benchmarks:score", "scorer_options": {"worth": 0.5}}
        WRONG = {"source": {"path": "charts.jsonl"}, "scorer": "my_benchmarks:NUMBER"}
        UNKNOWN = {"tvs": {"name": "Charts"}, "scorer": "vqa"}
        NUMBER = 3
        """,
    )


def test_a_benchmark_of_ones_own_is_scored_by_its_function(here):
    charts(here)
    benchmark = get_benchmark("my_benchmarks:CHARTS")
    assert benchmark.name == "CHARTS"
    table = [{"prediction": "red", "answer": "Red"}, {"prediction": "no", "answer": "blue"}]
    found = scorers.score(benchmark.scorer, table, "lmms-eval", **benchmark.scorer_options)
    assert (found.main, list(found.rows)) == (25.0, [1.0, 0.0])
    assert len(benchmark_lookup.find_questions("my_benchmarks:CHARTS", here)) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_benchmarks:NUMBER", "benchmark my_benchmarks:NUMBER: is a int; make it a mapping with keys"),
        (
            "my_benchmarks:WRONG",
            "benchmark my_benchmarks:WRONG: scorer: scorer my_benchmarks:NUMBER: is a int, not a fun",
        ),
        ("my_benchmarks:UNKNOWN", "benchmark my_benchmarks:UNKNOWN: tvs: unknown key; did you mean 'tsv'"),
        ("my_benchmarks:MISSING", "benchmark my_benchmarks:MISSING: my_benchmarks .* has no MISSING"),
    ],
)
def test_mistakes_about_benchmarks(here, name, message):
    charts(here)
    with pytest.raises(UserError, match=message):
        get_benchmark(name)
