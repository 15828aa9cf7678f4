"""The pages say what the result files say, and benchmarks/report.py tells where they do not."""

import json
import sys

import pytest

from benchmarks import report
from benchmarks.tables import markdown

TABLE = "<!-- begin:made -->\nold\n<!-- end:made -->\n"
VALUE = "A peak of <!-- value:made.peak.1|.2f -->0<!-- /value --> GiB"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results with `made.json`, and a benchmark `made` that writes a table of it."""
    (tmp_path / "made.json").write_text(json.dumps({"peak": [3, 1.3125], "name": "sdpa"}))
    module = type(sys)("benchmarks.made")
    module.table = lambda record: f"table of {record['name']}"
    module.other = lambda record: f"other of {record['name']}"
    module.figures = lambda record: {"most": {"of all": max(record["peak"])}}
    monkeypatch.setitem(sys.modules, "benchmarks.made", module)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


def test_the_tables_and_values_of_all_pages_are_those_of_the_result_files(capsys):
    status = report.main(["--check"])
    said = capsys.readouterr()
    assert status == 0, said.out + said.err


def test_a_stale_page_fails_the_check_and_is_left_as_it_is(results, monkeypatch, capsys):
    good, bad = results / "good.md", results / "bad.md"
    monkeypatch.setattr(report, "PAGES", [good, bad])
    good.write_text(report.fill(TABLE))
    bad.write_text(TABLE)
    assert report.main(["--check"]) == 1
    assert capsys.readouterr().out == "bad.md differs in made: run python benchmarks/report.py\n"
    assert bad.read_text() == TABLE
    bad.write_text(TABLE.replace("made", "absent"))
    assert report.main([]) == 2
    assert "bad.md: The page shows table absent, but there is no absent.json" in capsys.readouterr().err


def test_a_damaged_result_file_is_an_error_in_one_sentence(results, monkeypatch, capsys):
    page, made = results / "page.md", results / "made.json"
    monkeypatch.setattr(report, "PAGES", [page])
    for text, content, why in (
        (TABLE, '{"peak": []}', "table made, which cannot be made of its result files: KeyError: 'name'"),
        ("A <!-- value:made.figures.most.of all -->0<!-- /value -->", '{"peak": 1}', "figures of made, which cannot"),
        (TABLE, '{"peak": ', "table made, but made.json is no JSON: Expecting value"),
    ):
        page.write_text(text)
        made.write_text(content)
        assert report.main(["--check"]) == 2
        said = capsys.readouterr().err
        assert f"error: page.md: The page shows {why}" in said
        assert said.count("\n") == 1


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        report.main(["--help"])
    assert "example" in capsys.readouterr().out


def test_a_table_and_a_value_are_filled_from_the_result_file_of_their_name(results):
    filled = report.fill(TABLE + VALUE)
    assert "<!-- begin:made -->\ntable of sdpa\n<!-- end:made -->" in filled
    assert "A peak of <!-- value:made.peak.1|.2f -->1.31<!-- /value --> GiB" in filled
    assert report.fill(filled) == filled
    assert "other of sdpa" in report.fill(TABLE.replace("made", "made.other"))
    (results / "made_twice.json").write_text(json.dumps({"name": "eager"}))
    assert "other of eager" in report.fill(TABLE.replace("made", "made-twice.other"))


def test_a_figure_that_follows_from_a_record_is_worked_out_by_its_benchmark(results):
    text = "At most <!-- value:made.figures.most.of all|.2f -->0<!-- /value -->"
    assert report.fill(text) == text.replace("0<!", "3.00<!")
    (results / "made_twice.json").write_text(json.dumps({"peak": [7]}))
    assert "-->7.00<!--" in report.fill(text.replace("made", "made-twice"))
    (results / "speed_lost.json").write_text("{}")
    with pytest.raises(report.ReportError, match=r"figures of speed_lost, which no benchmark works out.*speed_lost"):
        report.fill(text.replace("made", "speed_lost"))
    with pytest.raises(report.ReportError, match=r"made\.json has no least"):
        report.fill(text.replace("most", "least"))


def test_a_key_that_holds_a_full_stop_is_found_in_quotes(results):
    (results / "made.json").write_text(json.dumps({"right": {"fastv/2/0.5": {"all": 71.4}, "fastv/2/0": {"5": 1}}}))
    text = '<!-- value:made.right."fastv/2/0.5".all|.0f -->0<!-- /value -->'
    assert report.fill(f"Of these {text}") == f"Of these {text}".replace("0<!", "71<!")
    with pytest.raises(report.ReportError, match=r"made\.json has no fastv/2/0\.9\.$"):
        report.fill(f"Of these {text}".replace("0.5", "0.9"))


def test_sizes_are_those_of_the_weights_that_a_conversion_of_7b_writes():
    decoder_layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    found = {key: float(report.find_value(f"sizes.{key}")) for key in report.sizes()}
    assert found["side_branch_millions"] == decoder_layer / 1e6
    assert found["side_branch_gb"] == decoder_layer * 2 / 1e9
    assert found["training_gb"] == decoder_layer * 4 * 4 / 1e9
    llava = 7_063_427_072  # of llava-hf/llava-1.5-7b-hf
    assert round(found["weights_gb"], 2) == round((llava + decoder_layer) * 2 / 1e9, 2)


@pytest.mark.parametrize("changed", ["made", "made.peak.1"])
def test_what_differs_from_the_result_files_is_named(results, changed):
    filled = report.fill(TABLE + VALUE)
    text = filled.replace("table of sdpa" if changed == "made" else "1.31", "something else")
    assert report.stale(text, filled) == [changed]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TABLE.replace("made", "absent"), r"shows table absent, but there is no absent\.json"),
        (TABLE.replace("made", "made.absent"), "neither in TABLES nor a benchmark's.*absent"),
        (VALUE.replace("made", "absent"), r"no absent\.json"),
        (VALUE.replace("peak.1", "pique"), r"made\.json has no pique"),
        (VALUE.replace("peak.1", "peak.2"), r"made\.json has no 2"),
        (VALUE.replace(".peak.1|.2f", ".peak"), "not one number"),
        ("\n" + VALUE.removeprefix("A peak of "), "start of a line"),
        ("- two\n  " + VALUE.removeprefix("A peak of "), "start of a line"),
        (TABLE.replace("end:made", "end:mode"), "without their partners"),
        (VALUE.replace("<!-- /value -->", ""), "without their partners"),
    ],
)
def test_a_marker_that_cannot_be_filled_is_an_error_that_names_it(results, text, message):
    with pytest.raises(report.ReportError, match=message):
        report.fill(text)


@pytest.mark.parametrize("name", report.TABLES)
def test_every_table_whose_results_are_there_can_be_made(name):
    missing = [file for file in report.TABLES[name][1] if not (report.ROOT / file).is_file()]
    if missing:
        pytest.skip(f"not measured yet: {', '.join(missing)}")
    assert report.make_table(name).startswith("| ")


def test_a_bar_within_a_cell_does_not_end_it():
    assert markdown(["a"], [["b|c"]]) == "| a |\n| --- |\n| b\\|c |"
