"""Reports with the figures of benchmarks in them, and through templates of somebody's own."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from run_samples import LENET, make_run
from test_bench_conv import ROW

from runner.faults import ConfigError
from runner.pages.report import report

STEP = {"against": "float32", "time_low": 0.5, "time_high": 0.75, "peak": 1.0}


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    for quant in ("none", "lsq"):
        make_run(tmp_path / "outputs" / "runs" / quant, epochs=3, layers=LENET, drops=(), quant=quant)
    return tmp_path / "outputs"


def leave_benchmarks(folder: Path) -> None:
    """What `bench conv` and `bench step` write, with figures that stand nowhere else, and files that are none of theirs."""
    folder.mkdir()
    facts = {"cpu": "a <processor>", "threads": 3, "model": "lenet5", "batch": 16}
    conv = [
        asdict(replace(ROW, figure="channels", in_channels=c, kernel_speedup=s)) for c, s in ((64, 9.5), (256, 27.4))
    ]
    step = [STEP | {"name": name, "time": time, "saved": time} for name, time in (("float32", 1.0), ("lsq", 0.625))]
    (folder / "conv-batch1-threads3.json").write_text(json.dumps({"facts": facts, "rows": conv}))
    (folder / "step-lenet5-16-cpu.json").write_text(json.dumps({"facts": facts, "rows": step}))
    (folder / "step-torn.json").write_text('{"rows": [')
    (folder / "notes.json").write_text("[]")


def test_benchmarks_that_were_run_are_in_the_report(outputs: Path, tmp_path: Path) -> None:
    assert report([str(outputs / "runs"), "--format", "html", "--out", str(tmp_path / "without")]) == 0
    leave_benchmarks(outputs / "bench")
    assert report([str(outputs / "runs"), "--format", "html", "--out", str(tmp_path / "with")]) == 0
    before, page = ((tmp_path / place / "report.html").read_text() for place in ("without", "with"))
    assert "bench conv: not run" in before
    assert "bench step: not run" in before
    assert "bench conv: not run" not in page
    assert "bench step: not run" not in page
    assert "up to 27.4 times as fast as float32 (256 channels" in page
    assert "the fastest quantized step is lsq&#x27;s, 0.62 of the time of float32" in page
    assert "a &lt;processor&gt;" in page
    figures = {path.name for path in (tmp_path / "with" / "figures").iterdir()}
    drawn = {"conv-batch1-threads3-channels.svg", "step-lenet5-16-cpu-time.svg", "step-lenet5-16-cpu-saved.svg"}
    assert figures - {path.name for path in (tmp_path / "without" / "figures").iterdir()} == drawn
    assert page.count("<svg") == before.count("<svg") + len(drawn)


def test_a_template_of_a_lab(outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = tmp_path / "ours.tex"
    template.write_text(
        r"\title{100 {{ '%' | latex }}}{% for row in results.rows %}{{ row[2] | latex }}&{{ row[5] }};{% endfor %}"
        "{{ groups | length }},{{ rows | length }},{{ holes | length > 0 }},{{ discussion | length }}"
    )
    assert report([str(outputs), "--template", str(template)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(r"\title{100 \%}none&")
    assert "lsq&" in said
    assert said.rstrip().endswith(";2,2,True,1")
    assert report([str(outputs), "--template", str(template), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.tex").read_text().strip() == said.strip()


def test_a_template_for_a_page_escapes_what_runs_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "runs" / "r", epochs=2, layers=LENET, drops=(), words="<img src=x onerror=hit()>")
    template = tmp_path / "ours.html"
    template.write_text("{% for row in rows %}<p>{{ row.code }}</p>{% endfor %}")
    assert report([str(tmp_path / "runs"), "--template", str(template)]) == 0
    assert "<p>&lt;img src=x onerror=hit()&gt;</p>" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["{{ ''.__class__.__mro__ }}", "{{ nothing_of_that_name }}", "{% for %}", "{{ rows.clear() }}"]
)
def test_a_template_runs_nothing_and_says_what_it_lacks(content: str, outputs: Path, tmp_path: Path) -> None:
    template = tmp_path / "bad.txt"
    template.write_text(content)
    with pytest.raises(ConfigError, match=r"bad\.txt"):
        report([str(outputs), "--template", str(template)])
