"""The tables of results are what the results say, and the pages are what the command writes."""

import json

import pytest
from helpers import ROOT

from benchmarks import __main__ as figures
from benchmarks.records import HEAD, append_record, markdown, plain, read_records, table
from benchmarks.results import MISSING, PAGES, all_tables, filled


def record(name, seed, top1, **changes):
    fields = {
        "name": name,
        "seed": seed,
        "net": "ra92_cifar",
        "epochs": 40.0,
        "final": {"step": 9, "top1": top1, "loss": 0.25},
        "best": {"step": 8, "top1": top1 + 0.01, "loss": 0.2},
        "images_per_second": 12_000.0,
        "seconds": 90.0,
        "pieces": 1,
        "hardware": "1 x NVIDIA H100",
        "date": "2026-11-25 10:00:00+00:00",
    }
    return fields | changes


def test_a_table_has_means_and_standard_deviations_over_seeds():
    """0.90, 0.92 and 0.94: a mean of 0.92, squares of 4, 0 and 4 in hundredths, 8 / 2 = 4, so a deviation of 2 %."""
    runs = [record("a", seed, top1) for seed, top1 in ((2, 0.94), (0, 0.90), (1, 0.92))]
    again = record("b", 0, 0.5, images_per_second=None, seconds=30.0)
    rows = table([*runs, record("b", 0, 0.1), again])  # the later one of the same run counts
    assert rows[0] == (
        "a", "ra92_cifar", "40", "0, 1, 2", "92.00 ± 2.00", "93.00 ± 2.00", "0.2500 ± 0.0000", "1.5 ± 0.0", "12,000"
    )  # fmt: skip
    assert rows[1] == ("b", "ra92_cifar", "40", "0", "50.00", "51.00", "0.2500", "0.5", "")
    assert len(HEAD) == len(rows[0])
    assert plain(("x", "yy"), [("aaa", "b")]) == "x    yy\naaa  b\n"
    assert markdown(("x", "y"), [("a", "b")]) == "| x | y |\n|---|---|\n| a | b |\n"


def test_records_are_read_past_a_line_that_was_cut_off(tmp_path):
    file = tmp_path / "results.jsonl"
    assert read_records(file) == []
    append_record(file, record("a", 0, 0.5))
    with file.open("a") as out:
        out.write('{"name": "b"\n')
    append_record(file, record("c", 0, 0.5))
    assert [row["name"] for row in read_records(file)] == ["a", "c"]


WANTED = """
[[result]]
what = "CIFAR-10"
recipe = "fast"
public = "95.4 %"
run = "fast"
command = "make fast"
[[result]]
what = "ImageNet"
recipe = "slow"
paper = "78.24 %"
run = "slow"
[[speed]]
hardware = "one GPU"
file = "steps.jsonl"
net = "ra56"
batch = 8
[[paper]]
table = 3
what = "ARL"
error = 5.5
run = "fast"
"""


def test_rows_are_made_of_the_runs_that_are_wanted(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "wanted.toml").write_text(WANTED)
    append_record(tmp_path / "runs/a.jsonl", record("fast", 0, 0.96))
    append_record(tmp_path / "runs/a.jsonl", record("fast", 1, 0.1))
    append_record(tmp_path / "runs/b.jsonl", record("fast", 1, 0.98, date="2026-11-26 00:00:00+00:00", pieces=2))
    speeds = [
        ("resattn_jax", 8, 300.0),
        ("resattn_jax", 16, 900.0),
        ("torch eager", 8, 150.0),
        ("torch eager", 8, 200.0),
    ]
    for implementation, batch, speed in speeds:
        row = {"net": "ra56", "batch": batch, "what": "train", "dtype": "auto", "device": "NVIDIA"}
        append_record(tmp_path / "steps.jsonl", {**row, "implementation": implementation, "images_per_second": speed})
    tables = all_tables(tmp_path)
    first, second = tables["results"].splitlines()[2:]
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells[3:5] == ["95.4 %", "**97.00 ± 1.41 %** last epoch, 98.00 ± 1.41 % best"]
    assert cells[5] == "`make fast`; NVIDIA H100, 40 epochs, 2 seeds, 1.5 minutes each"
    assert [cell.strip() for cell in second.strip("|").split("|")][2:5] == ["78.24 %", "", MISSING]
    assert "`ra56`, 8, bfloat16 | **300** | 200, ours is 1.50x |" in tables["speed"]
    assert "| 3 | ARL | 5.50 | 3.00 ± 1.41 |" in tables["paper"]


def test_the_pages_are_what_the_command_writes():
    """python -m benchmarks.results"""
    tables, places = all_tables(), set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert filled(text, tables) == text, f"{page.name}: run python -m benchmarks.results"
        places |= {name for name in tables if f"<!-- results: {name} -->" in text}
    assert places == tables.keys()


def test_a_table_takes_its_own_place_alone():
    x, y, end = "<!-- results: x -->\n", "<!-- results: y -->\n", "<!-- end of results -->\n"
    page = f"a\n{x}{end}b\n{y}old\n{end}c\n"
    new = f"a\n{x}\n1\n\n{end}b\n{y}\n2\n\n{end}c\n"
    assert filled(page, {"x": "1\n", "y": "2\n"}) == new
    assert filled(new, {"x": "1\n", "y": "2\n"}) == new


# ---- python -m benchmarks


def test_every_figure_is_of_a_benchmark_and_of_a_page_that_tells_it():
    for figure in figures.FIGURES.values():
        page = figure.page.partition(",")[0]
        text = (ROOT / page).read_text(encoding="utf-8")
        for command in figure.commands:
            module, *arguments = command.split()
            source = (ROOT / f"benchmarks/{module}.py").read_text(encoding="utf-8")
            flags = [argument.partition("=")[0].lstrip("-") for argument in arguments if argument.startswith("--")]
            assert [flag for flag in flags if flag not in source and not flag.startswith("config")] == []
            assert f"benchmarks.{module}" in text
        assert set(figure.needs) <= figures.NEEDS.keys()


def test_what_a_benchmark_prints_as_json_is_kept_with_what_it_was_measured_on(tmp_path, monkeypatch):
    said = tmp_path / "said.py"
    said.write_text('print("a table")\nprint(\'{"speed": 1, "versions": {"torch": "2"}}\')\nprint("[1]")\n')
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/__init__.py").touch()
    said.rename(tmp_path / "benchmarks/said.py")
    assert figures.measure("told", figures.Figure("a page", ("said --x=1",), ("CPU",)), tmp_path)
    [row] = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    assert (row["speed"], row["command"]) == (1, "python -m benchmarks.said --x=1")
    assert row["versions"].keys() >= {"python", "jax", "torch"}
    assert row["versions"]["torch"] == "2"
    assert "cores of " in row["hardware"]
    (tmp_path / "benchmarks/said.py").write_text("print('{\"speed\": 2}')\nraise SystemExit(1)\n")
    assert not figures.measure("told", figures.Figure("a page", ("said",)), tmp_path)
    assert '"speed": 1' in (tmp_path / "told.jsonl").read_text()  # as it was


def test_what_cannot_be_measured_here_is_skipped_with_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(figures, "NEEDS", {need: (lambda: False, {}) for need in figures.NEEDS})
    monkeypatch.setattr(figures, "measure", lambda *_: pytest.fail("it was measured"))
    assert figures.main(["--all"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(figures.FIGURES)
    assert all("skipped: no " in line for line in said)
