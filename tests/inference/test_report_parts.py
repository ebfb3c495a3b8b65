"""The parts of the report page that only special runs have."""

import itertools
import json
from types import SimpleNamespace

import pytest

from distdl.inference import report_page
from distdl.inference.options import ReportOptions


def test_failures_survived_are_listed_and_runs_without_any_have_no_such_part(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"recoveries": []}))
    assert report_page._time(tmp_path) == []
    recoveries = [{"step": 7, "lost_ranks": [0, 2], "ranks": 2}, {"step": 9, "lost_ranks": [1], "ranks": 1}]
    (tmp_path / "summary.json").write_text(json.dumps({"recoveries": recoveries}))
    heading, table = report_page._time(tmp_path)
    assert heading == "<h2>Failures survived</h2>"
    assert "<tr><th>step 7</th><td>ranks 0, 2 lost, 2 continued</td></tr>" in table
    assert "<tr><th>step 9</th><td>ranks 1 lost, 1 continued</td></tr>" in table


def test_the_time_of_a_run_is_that_of_its_epochs(tmp_path):
    shares = {"compute_share": 0.5, "reduction_share": 0.25, "wait_share": 0.25}
    records = [{"train_seconds": 1.0, **shares}, {"other": 1}, {"train_seconds": 3.0, **shares, "compute_share": 0.7}]
    (tmp_path / "timing.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    heading, table = report_page._time(tmp_path)
    assert heading == "<h2>Where the time went</h2>"
    assert "<tr><th>training</th><td>4.0 s in 2 epochs</td></tr><tr><th>compute</th><td>65.0%</td></tr>" in table


@pytest.mark.parametrize("count", range(1, 40))
def test_a_few_layers_at_equal_distances_are_shown_with_the_last_one(count):
    shown = list(report_page._some({f"layer_{number}": number for number in range(count)}).values())
    assert len(shown) <= report_page.MOST_LAYERS
    assert shown[-1] == count - 1
    assert len({after - before for before, after in itertools.pairwise(shown)}) <= 1
    assert shown == list(range(count)) or len(shown) > report_page.MOST_LAYERS // 2


def test_the_warnings_about_the_network_are_printed(tmp_path, monkeypatch, capsys):
    """Such as the one that this machine has no compiled kernels."""
    (tmp_path / "config.toml").touch()
    monkeypatch.setattr(report_page.figures, "need_matplotlib", lambda: None)
    monkeypatch.setattr(report_page, "_load", lambda *_: (SimpleNamespace(warnings=["it has other kernels"]), "absent"))
    monkeypatch.setattr(report_page, "page_of", lambda *_: "")
    report_page.write_report(ReportOptions(run=tmp_path))
    assert "distdl: warning: it has other kernels\n" in capsys.readouterr().err
