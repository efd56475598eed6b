"""The command line: models by name, tables from CSV files, errors in words with exit code 2."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from ppl.__main__ import load_model, main, read_csv
from ppl.errors import DataError, PPLError

MODEL = """
from neighbour import WIDTH
from ppl import Normal, HalfNormal, latent, model, observe, plate

ANSWER = 42

@model
def grouped():
    school = plate("school")
    pupil = plate("pupil", within=school)
    centre = latent("centre", Normal(0.0, WIDTH))
    with school:
        level = latent("level", Normal(centre, 1.0))
    with pupil:
        observe("score", Normal(level, 1.0))
"""
ROWS = "score,school\n1.0,a\n2.5,b\n0.5,a\n,b\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a model that imports its neighbour, and a table."""
    (tmp_path / "study.py").write_text(MODEL)
    (tmp_path / "neighbour.py").write_text("WIDTH = 2.0\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "scores.csv").write_text(ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    return tmp_path


def test_columns_are_numbers_whole_numbers_or_labels(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text('x, i,name\n1.5,3,"a, b"\n,4,c\n\n2,5,\n')
    table = read_csv(file)
    assert table.columns == ["x", "i", "name"]
    np.testing.assert_array_equal(table["x"].to_numpy(), [1.5, np.nan, 2.0])
    assert table["i"].to_numpy().dtype == np.int64
    assert table["name"].to_numpy().tolist() == ["a, b", "c", None]


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "expected a header and rows, got 0 lines"),
        ("a,b\n", "expected a header and rows, got 1 lines"),
        ("a,b\n1,2\n1,2,3\n", "line 3: expected 2 entries, got 3"),
    ],
)
def test_bad_tables_are_refused(text, problem, tmp_path):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(DataError, match=problem):
        read_csv(tmp_path / "table.csv")


def test_a_model_is_found_in_a_file_that_imports_its_neighbour(project):
    assert load_model("study.py:grouped").name == "grouped"


@pytest.mark.parametrize(
    "spec, problem",
    [
        ("study.py", "expected path.py:name or package.module:name"),
        ("absent.py:grouped", "there is no file 'absent.py'"),
        ("no.such.module:grouped", "cannot be imported: ModuleNotFoundError"),
        ("broken.py:grouped", "cannot be imported: ZeroDivisionError"),
        ("study.py:groupd", "has no 'groupd'. Did you mean 'grouped'?"),
        ("study.py:ANSWER", "not a model called 'ANSWER'. Models: grouped"),
    ],
)
def test_bad_models_are_refused(spec, problem, project):
    with pytest.raises(PPLError) as error:
        load_model(spec)
    assert problem in str(error.value)


def test_explain_prints_the_graph(capsys, project):
    assert main(["explain", "study.py:grouped"]) == 0
    assert "pupil: size from data within school" in capsys.readouterr().out


def test_explain_prints_the_methods(capsys, project):
    assert main(["explain", "study.py:grouped", "scores.csv"]) == 0
    out = capsys.readouterr().out
    assert "school: 2" in out and "pupil: 4 within school" in out
    assert "qem" in out and "exact" in out


def test_fit_then_summary(capsys, project):
    fit = ["fit", "study.py:grouped", "scores.csv", "--method", "exact", "--out", "scores.ppl"]
    assert main(fit) == 0
    first = capsys.readouterr().out
    assert "scores.ppl" in first and (project / "scores.ppl").is_file()
    assert main(["summary", "scores.ppl", "study.py:grouped"]) == 0
    assert "level" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["fit", "study.py:grouped", "absent.csv"], "there is no data file 'absent.csv'"),
        (["fit", "study.py:grouped", "scores.csv", "--method", "qam"], "Did you mean 'qem'?"),
        (["summary", "absent.ppl", "study.py:grouped"], "there is no file 'absent.ppl'"),
    ],
)
def test_errors_are_words_and_exit_code_2(arguments, problem, capsys, project):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert problem in printed.err and "Traceback" not in printed.err


def test_without_a_command_argparse_explains_itself(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_fits_everything_it_finds(capsys):
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    for part in ("factor graph of eight_schools", "ninth school", "a rat not seen yet"):
        assert part in out
