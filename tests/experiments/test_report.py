"""The page that compares runs: read from JSON lines alone, whatever state the run is in."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from headway.cli.main import main
from headway.errors import DataError
from headway.experiments.report.chart import ticks
from headway.experiments.report.curves import MOST_POINTS, first_reaching, thinned, value_at
from headway.experiments.report.report import compare_runs, write_page
from headway.experiments.report.runs import read_runs
from headway.experiments.report.tables import option_differences, warnings

TOKENS_PER_STEP = 1000


def loss_at(step, *, floor):
    return floor + 100 / (step + 50)


def write_run(folder, *, n=1, evaluated=range(10, 101, 10), floor=1.0, flops=7, finished=True, **options):
    """A run of 100 steps whose held-out loss falls from 3 towards `floor`, as headway train writes it."""
    folder.mkdir(parents=True)
    steps = [
        {
            "step": step,
            "tokens": TOKENS_PER_STEP * step,
            "flops": TOKENS_PER_STEP * step * flops,
            "loss": n * loss_at(step, floor=floor),
            "loss_per_offset": [loss_at(step, floor=floor) + k for k in range(n)],
            "gradient_norm": 1.0,
            "tokens_per_second": 500.0,
            "elapsed_seconds": 2.0 * step,
            "skipped_steps": 0,
            "mfu": 0.25,
            "resident_bytes": 2**30,
        }
        for step in range(5, 101, 5)
    ]
    evaluations = [
        {
            "step": step,
            "tokens": TOKENS_PER_STEP * step,
            "flops": TOKENS_PER_STEP * step * flops,
            "seconds": 0.1,
            "nats": [loss_at(step, floor=floor) + k for k in range(n)],
            "accuracy": [0.5 / (k + 1) for k in range(n)],
            "bits_per_byte": [1.4 * (loss_at(step, floor=floor) + k) for k in range(n)],
            "walk_acceptance_length": 1.0 + 0.3 * (n - 1),
            "walk_acceptance_rate": [0.5] * (n - 1),
        }
        for step in evaluated
    ]
    write_lines(folder / "metrics.jsonl", steps)
    write_lines(folder / "evaluations.jsonl", evaluations)
    known = {"num_future_tokens": n, "steps": 100, "epochs": None, "learning_rate": 0.001, "data": ["texts"], "seed": 0}
    known |= {"output": str(folder)} | options
    (folder / "config.yaml").write_text(json.dumps(known), encoding="utf-8")  # JSON is YAML
    if finished:
        (folder / "result.json").write_text(json.dumps({"num_parameters": 1_000_000}), encoding="utf-8")
    return folder


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def page_of(tmp_path, *folders):
    write_page(compare_runs(list(folders)), tmp_path / "page.html", overwrite=True)
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def charts(page):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg viewBox=\"0 0 480 .*?</svg>", page)]


class Elements(HTMLParser):
    """Counts what a page opens, and checks that it closes it in order."""

    VOID = ("meta", "input", "br")

    def __init__(self):
        super().__init__()
        self.opened, self.seen, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "data", "xlink:href")]
        if tag not in self.VOID:
            self.opened.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag


def test_sample_efficiency_is_read_off_between_evaluations(tmp_path):
    one = write_run(tmp_path / "n1", n=1, floor=1.0)
    four = write_run(tmp_path / "n4", n=4, floor=1.2, flops=14)
    found = compare_runs([one, four]).efficiency
    assert found.figure.key == "bits_per_byte"
    level = 1.4 * loss_at(100, floor=1.2)
    assert found.level == pytest.approx(level)
    # 1 + 100 / (s + 50) is the level 1.2 + 100 / 150 at s = 65.4, and the curve is straight from 60 to 70
    above, below = 1.4 * loss_at(60, floor=1.0), 1.4 * loss_at(70, floor=1.0)
    step = 60 + 10 * (above - level) / (above - below)
    ours, theirs = found.needs["tokens"]
    assert ours.amount == pytest.approx(step * TOKENS_PER_STEP)
    assert theirs.amount == pytest.approx(100 * TOKENS_PER_STEP)
    assert theirs.ratio == pytest.approx(100 / step)
    assert found.needs["flops"][1].ratio == pytest.approx(2 * 100 / step)
    # at equal operations the second run has seen half the text
    assert found.budgets == {"tokens": 100_000, "flops": 700_000}
    assert found.at_budget["flops"][1] == pytest.approx(1.4 * loss_at(50, floor=1.2))


def test_a_loss_that_the_first_evaluation_has_already_is_an_upper_bound(tmp_path):
    late = write_run(tmp_path / "late", evaluated=[100])
    early = write_run(tmp_path / "early", floor=1.5)
    found = compare_runs([early, late]).efficiency
    need = found.needs["tokens"][1]
    assert (need.amount, need.at_most, need.ratio) == (100_000, True, None)
    assert "at most 100 k" in page_of(tmp_path, early, late)


def test_the_document_of_the_command_has_every_figure(tmp_path, capsys):
    one, four = write_run(tmp_path / "n1"), write_run(tmp_path / "n4", n=4, learning_rate=0.002)
    output = tmp_path / "both.html"
    assert main(["report", str(one), str(four), "--output", str(output)]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out.splitlines()[-1])
    assert document["report"] == str(output)
    assert [run["name"] for run in document["runs"]] == ["n1", "n4"]
    newest = document["runs"][1]["newest"]
    assert newest["Held-out loss, offset 4"] == pytest.approx(loss_at(100, floor=1.0) + 3)
    assert newest["Drafts of offset 2 accepted, the earlier ones given"] == 0.5
    assert document["option_differences"] == {
        "num_future_tokens": {"n1": 1, "n4": 4},
        "learning_rate": {"n1": 0.001, "n4": 0.002},
    }
    assert document["sample_efficiency"]["runs"][1]["tokens_to_level"]["amount"] == 100_000
    assert "Sample efficiency" in captured.err
    assert main(["report", str(one), "--output", str(output)]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert main(["report", str(one), "--output", str(output), "--overwrite"]) == 0


def test_the_page_needs_nothing_but_itself_and_is_well_formed(tmp_path):
    page = page_of(tmp_path, write_run(tmp_path / "a<b>&"), write_run(tmp_path / "n4", n=4))
    elements = Elements()
    elements.feed(page)
    assert elements.opened == []
    assert elements.links == []
    assert "script" not in elements.seen
    assert not re.search(r"url\((?!#)|@import|https?:", page)
    assert "a<b>" not in page
    assert "a&lt;b&gt;&amp;" in page


def test_every_figure_is_drawn_over_tokens_and_over_operations_and_names_itself(tmp_path):
    page = page_of(tmp_path, write_run(tmp_path / "n1"), write_run(tmp_path / "n4", n=4))
    drawn = charts(page)
    titles = [chart.find("title").text for chart in drawn]
    assert len(set(titles)) == len(titles)
    for axis in ("training tokens", "training FLOPs"):
        for name in ("Held-out loss, offset 1", "Held-out loss, offset 4", "Held-out bits per byte, offset 1"):
            assert f"{name} over {axis}" in titles
        for name in (
            "Held-out accuracy, offset 2",
            "Tokens per forward along held-out text",
            "Training loss, offset 1",
        ):
            assert f"{name} over {axis}" in titles
        assert f"Drafts of offset 4 accepted, the earlier ones given over {axis}" in titles
    identifiers = re.findall(r' id="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    for chart in drawn:
        assert chart.attrib["role"] == "img"
        assert all(name in identifiers for name in chart.attrib["aria-labelledby"].split())
        assert chart.find("desc").text


def test_points_lie_where_their_figures_say(tmp_path):
    page = page_of(tmp_path, write_run(tmp_path / "n1", floor=0.5))
    chart = next(c for c in charts(page) if c.find("title").text == "Held-out loss, offset 1 over training tokens")
    path = next(p for p in chart.iter("path") if p.attrib.get("class") == "curve").attrib["d"]
    places = [tuple(map(float, pair.split())) for pair in path[1:].split("L")]
    marks = {float(t.attrib["y"]) - 4.5: float(t.text) for t in chart.iter("text") if t.attrib.get("class") == "y"}
    (y1, v1), (y2, v2) = sorted(marks.items())[0], sorted(marks.items())[-1]
    assert len(places) == 10
    for (x, y), step in zip(places, range(10, 101, 10), strict=True):
        assert v1 + (v2 - v1) * (y - y1) / (y2 - y1) == pytest.approx(loss_at(step, floor=0.5), abs=0.01)
        assert x == pytest.approx(52 + (480 - 52 - 24) * step / 100, abs=0.1)


def test_an_unfinished_run_with_a_broken_last_line_is_taken_as_far_as_it_is_whole(tmp_path):
    run = write_run(tmp_path / "n1", finished=False)
    whole = (run / "metrics.jsonl").read_text(encoding="utf-8")
    (run / "metrics.jsonl").write_text(whole + '{"step": 105, "tok', encoding="utf-8")
    read = read_runs([run])[0]
    assert [record["step"] for record in read.steps] == list(range(5, 101, 5))
    assert read.notes == ("n1/metrics.jsonl: line 21 is broken; what follows it was left out",)
    page = page_of(tmp_path, run)
    assert "unfinished" in page
    assert "step 100 of 100" in page
    assert "line 21 is broken" in page


def test_a_step_that_stands_twice_counts_as_it_was_written_last(tmp_path):
    run = write_run(tmp_path / "n1")
    with (run / "evaluations.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 50, "tokens": 50_000, "nats": [0.25]}) + "\n")
    read = read_runs([run])[0]
    assert [record["step"] for record in read.evaluations] == list(range(10, 101, 10))
    assert read.evaluations[4]["nats"] == [0.25]


def test_one_point_one_run_and_no_evaluation_are_pages_too(tmp_path):
    single = write_run(tmp_path / "single", evaluated=[100])
    silent = write_run(tmp_path / "silent", evaluated=[], finished=False)
    (silent / "evaluations.jsonl").unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("", encoding="utf-8")
    page = page_of(tmp_path, single, silent, empty)
    assert "silent has no evaluation" in page
    assert "empty has logged no step yet" in page
    assert compare_runs([single, silent, empty]).efficiency is None
    assert len(charts(page_of(tmp_path, single))) > 5
    assert charts(page_of(tmp_path, empty)) == []


def test_older_lines_without_tokens_and_operations_are_placed_by_the_steps_around_them(tmp_path):
    run = write_run(tmp_path / "old", evaluated=[7, 100])
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        records = [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]
        for record in records:
            record.pop("flops")
            if name == "evaluations.jsonl":
                record.pop("tokens")
        write_lines(run / name, records)
    read = read_runs([run])[0]
    assert [record["tokens"] for record in read.evaluations] == [7000, 100_000]
    page = page_of(tmp_path, run)
    assert "does not tell its operations" in page
    assert "over training FLOPs" not in page
    assert not re.search(r'<label for="axis-', page)


def test_strange_values_are_left_out_and_break_nothing(tmp_path):
    run = write_run(tmp_path / "odd")
    write_lines(
        run / "evaluations.jsonl",
        [
            {"step": 10, "tokens": 1e4, "nats": [None, "x"], "accuracy": 3},
            {"step": 20, "tokens": 2e4, "nats": [2.5], "bits_per_byte": None},
            {"tokens": 5},
        ],
    )
    (run / "config.yaml").write_text("- 3\n", encoding="utf-8")
    (run / "result.json").write_text("{", encoding="utf-8")
    read = read_runs([run])[0]
    assert "odd/config.yaml cannot be read and was left out" in read.notes
    assert "odd/result.json cannot be read and was left out" in read.notes
    page = page_of(tmp_path, run)
    titles = [chart.find("title").text for chart in charts(page)]
    assert "Held-out loss, offset 1 over training tokens" in titles
    assert not any("accuracy" in title or "bits" in title for title in titles)


def test_runs_of_the_same_name_are_told_apart_and_one_given_twice_stands_once(tmp_path):
    left, right = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")
    assert [run.name for run in read_runs([left, right, left / ".." / "run"])] == ["a/run", "b/run"]


def test_what_makes_a_comparison_doubtful_is_said(tmp_path):
    runs = read_runs([write_run(tmp_path / "one"), write_run(tmp_path / "two", data=["other"], log_every_steps=3)])
    assert option_differences(runs) == {"data": {"one": ["texts"], "two": ["other"]}}
    assert warnings(runs)[0].startswith("the runs were not evaluated on the same tokens (data differ)")
    seeds = read_runs([write_run(tmp_path / "three"), write_run(tmp_path / "four", seed=1)])
    assert warnings(seeds) == []


@pytest.mark.parametrize("kind", ["absent", "file", "foreign"])
def test_what_is_no_run_is_refused_with_one_line(tmp_path, kind, capsys):
    folder = tmp_path / "folder"
    if kind == "file":
        folder.write_text("", encoding="utf-8")
    elif kind == "foreign":
        folder.mkdir()
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "pass the --output folder of headway train" in captured.err
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    report = compare_runs([write_run(tmp_path / "n1")])
    (tmp_path / "taken").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="cannot write"):
        write_page(report, tmp_path / "taken" / "page.html", overwrite=False)
    with pytest.raises(DataError, match="is a folder"):
        write_page(report, tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n1", "taken"]


def test_long_curves_are_thinned_to_means_that_keep_their_ends():
    points = [(float(x), float(x % 2)) for x in range(10_001)]
    few = thinned(points)
    assert len(few) == MOST_POINTS
    assert (few[0], few[-1]) == (points[0], points[-1])
    assert all(abs(y - 0.5) < 0.02 for _, y in few[1:-1])
    assert [x for x, _ in few] == sorted(x for x, _ in few)


def test_places_on_curves():
    curve = [(10.0, 3.0), (20.0, 1.0), (30.0, 2.0)]
    assert first_reaching(curve, 2.0) == (15.0, True)
    assert first_reaching(curve, 3.5) == (10.0, False)
    assert first_reaching(curve, 0.5) is None
    assert [value_at(curve, place) for place in (5.0, 10.0, 25.0, 31.0)] == [None, 3.0, 1.5, None]
    assert value_at([(4.0, 2.0)], 4.0) == 2.0


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.3, 2.31), (0.0, 3.2e21), (-5.0, 5.0), (1.0, 1.0)])
def test_ticks_are_few_and_round_and_inside_the_frame(low, high):
    marks = ticks(low, high)
    assert 1 <= len(marks) <= 8
    assert marks == sorted(set(marks))
    assert marks[0] <= low + 1e-12
    assert marks[-1] <= high * (1 + 1e-9)


def test_a_report_is_made_without_importing_torch(tmp_path):
    run = write_run(tmp_path / "n1")
    script = (
        "import sys; from headway.cli.main import main; "
        f"code = main(['report', {str(run)!r}, '--output', {str(tmp_path / 'p.html')!r}]); "
        "sys.exit(code or ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
