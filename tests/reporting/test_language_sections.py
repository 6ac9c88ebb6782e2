"""The report of what is measured on held-out text: a table, curves, and no board of answers that were not scored."""

import json

import pytest

from vlm_distill.reporting.report import write_report

SCORES = {"measures": ["rouge_l", "perplexity", "kl"], "n": 24, "tokens": 1234}


@pytest.fixture
def run(tmp_path):
    def make(name, perplexity, kl):
        folder = tmp_path / name
        student, teacher = (folder / "evaluation" / "talks" / who for who in ("student", "teacher"))
        for where, scores in (
            (student, {"perplexity": perplexity, "kl": kl, "rouge_l": 0.25}),
            (teacher, {"perplexity": 4.5}),
        ):
            where.mkdir(parents=True)
            (where / "scores.json").write_text(json.dumps(SCORES | scores))
        lines = [
            {"kind": "eval", "step": s, "seconds": s, "data": "talks", "n": 5, "perplexity": 9 - s, "kl": 1 / s}
            for s in (1, 2, 3)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "config.yaml").write_text("output: x\n")
        return folder

    return make


def test_a_table_and_curves(run):
    page = write_report([run("one", 6.125, 0.52504), run("two", 7.0, 0.25)]).read_text()
    assert "Held out · talks" in page
    for text in ("6.12", "0.5250", "25.0%", "4.50", "24 samples", "1,234 supervised tokens"):
        assert text in page
    assert "Perplexity by step · talks" in page
    assert "KL to the teacher, nats per token by second · talks" in page
    assert page.count(" best") == page.count('<td class="c0 best">') + page.count('<td class="c1 best">')
    assert '<td class="c0 best">6.12' in page
    assert '<td class="c1 best">0.2500' in page
    assert "Exact match." not in page


def test_other_reports_have_none(make_run):
    assert "Held out" not in write_report([make_run()]).read_text()
