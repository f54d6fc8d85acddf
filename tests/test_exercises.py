"""The course's three programs: the table names what is there, a student's copy is ours without
bodies, a scorecard survives what it grades.

Bugs killed here: a function of the table that was renamed, an exercise without a grader, a mark
that names nothing, a docstring or signature lost with the body, a neighbour's body lost, bodies that
do not come back, a test that a function without a body passes, points for what is not written, an exit
that takes other points with it.
"""
import ast
import json
import types

import pytest

import blank
import exercises
import grade
from exercises import EXERCISES, REPO, functions_of, is_blank

def source(one):
    return (REPO / one.file).read_text()


GRADED = [one for one in EXERCISES if one.file]
SOLVED = not any(is_blank(functions_of(source(one)).get(name))
                 for one in GRADED for name in one.functions)
needs_solution = pytest.mark.skipif(not SOLVED, reason="this is a student's copy")


def test_the_table_names_what_is_there():
    assert [one.number for one in EXERCISES] == list(range(1, len(EXERCISES) + 1))
    for one in GRADED:
        missing = set(exercises.blanked_names(one)) - set(functions_of(source(one)))
        assert not missing, f"exercise {one.number}: {one.file} has no {missing}"
        for name in one.functions:
            said = ast.get_docstring(functions_of(source(one))[name])
            assert said or "." in name, f"{name} says nothing to a student"


def marks_in(file):
    """{(core or care, function)} of the marks with a name in a test file."""
    found = set()
    for node in ast.walk(ast.parse((REPO / "tests" / file).read_text())):
        if isinstance(node, ast.FunctionDef):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and getattr(mark.func, "id", "") in ("core", "care"):
                    found |= {(mark.func.id, argument.value) for argument in mark.args}
    return found


def test_every_function_has_a_grader_and_every_mark_a_function():
    """test_losses.py goes by parameters; tests/grade.py is asked about it below."""
    for one in GRADED:
        if one.file == "losses.py":
            continue
        marks = set().union(*map(marks_in, one.tests))
        for name in one.functions:
            assert {("core", name), ("care", name)} <= marks, f"{name} in {one.tests}"
        known = {name for other in GRADED if other.tests == one.tests for name in other.functions}
        assert {name for _, name in marks} <= known, "a mark names no function of the table"


def test_which_function_a_test_grades():
    def item(name, part, *args):
        mark = types.SimpleNamespace(args=args)
        return types.SimpleNamespace(
            name=name, get_closest_marker=lambda asked: mark if asked == part else None)

    def graded(*words):
        return exercises.graded_by(item(*words))

    assert graded("test_clip[grpo-1.5-0.2]", "core") == ("core", ("grpo",))
    assert graded("test_worked_batch[rloo, beta .04]", "core") == ("core", ("rloo",))
    assert graded("test_parse[1+2]", "care", "parse") == ("care", ("parse",))
    assert graded("test_signature[grpo]", "care") == (None, ()), "holds without a body: no point"
    assert graded("test_other", None) == (None, ())


@needs_solution
def test_a_copy_loses_bodies_and_nothing_else_and_gets_them_back(tmp_path):
    """Signatures, docstrings and all other functions stay; with --solution the files are ours byte
    for byte, so that what passes here passes there."""
    assert blank.main([str(tmp_path / "out")]) == 0
    blanked = {(one.file, name): one.number
               for one in GRADED for name in exercises.blanked_names(one)}
    for file in exercises.FILES:
        ours, theirs = (functions_of((folder / file).read_text())
                        for folder in (REPO, tmp_path / "out"))
        assert list(ours) == list(theirs)
        for name in ours:
            assert ast.get_docstring(ours[name]) == ast.get_docstring(theirs[name])
            assert ast.dump(ours[name].args) == ast.dump(theirs[name].args)
            if (file, name) in blanked:
                assert is_blank(theirs[name]) and not is_blank(ours[name]), f"{name} is not blank"
                assert f"exercise {blanked[file, name]}" in ast.unparse(theirs[name])
            else:
                assert ast.dump(ours[name]) == ast.dump(theirs[name]), f"{name} is no exercise"
    numbers = [str(one.number) for one in GRADED]
    assert blank.main([str(tmp_path / "out"), "--solution", *numbers]) == 0
    for file in [*REPO.glob("*.py"), *REPO.glob("tests/*.py")]:
        assert file.read_bytes() == (tmp_path / "out" / file.relative_to(REPO)).read_bytes(), file


@needs_solution
def test_only_some_are_blank_and_one_comes_back(tmp_path):
    blank.main([str(tmp_path / "out"), "--only", "2", "3"])
    losses = tmp_path / "out" / "losses.py"
    assert {name for name, node in functions_of(losses.read_text()).items() if is_blank(node)} == {
        *exercises.blanked_names(exercises.exercise(3))}
    mine = losses.read_text().replace(
        'raise NotImplementedError("exercise 3: reinforce is yours to write")', "return 3")
    losses.write_text(mine)
    blank.main([str(tmp_path / "out"), "--solution", "2"])
    assert losses.read_text() == mine, "what is written must not be touched"
    assert (tmp_path / "out" / "eval.py").read_text() == (REPO / "eval.py").read_text()
    for words, says in (([tmp_path / "out"], "exists"),
                        ([tmp_path, "--solution", "1"], "not a copy"),
                        ([tmp_path / "new", "--only", "11"], "no exercise 11"),
                        ([REPO / "tests" / "x"], "inside tests/")):
        with pytest.raises(SystemExit, match=says):
            blank.main([*map(str, words)])


def test_a_scorecard_names_the_mistake_and_survives_an_exit():
    """The plug-in estimate in a file of its own, which prints on and on and ends the process where
    k > n: the points of all other tests are still there."""
    mine = """
import os
def pass_at_k(n, c, k):
    print("x" * 100_000)
    return 1 - (1 - c / n) ** k if k <= n else os._exit(0)
"""
    row = grade.grade(exercises.exercise(2), mine, False)["pass_at_k"]
    assert "plug-in" in row["says"], row
    assert 0 < row["core"][0] < row["core"][1] and 0 < row["care"][0] < row["care"][1], row


@needs_solution
def test_every_test_of_an_exercise_fails_without_its_body_and_passes_with_it(monkeypatch):
    one = exercises.exercise(2)                        # the quickest
    monkeypatch.setattr(grade, "written", lambda one, source: dict.fromkeys(one.functions, True))
    without = grade.grade(one, exercises.blank(source(one), one.functions, 2), True)["pass_at_k"]
    given = grade.grade(one, source(one), True)["pass_at_k"]
    assert without["core"][0] == without["care"][0] == 0, without
    assert "exercise 2" in without["says"], without
    assert given["core"][0] == given["core"][1] == without["core"][1] > 5, given
    assert given["care"][0] == given["care"][1] == without["care"][1] > 2, given


def test_what_is_not_written_is_no_failure(tmp_path, capsys):
    file, one = tmp_path / "eval.py", exercises.exercise(2)
    file.write_text(exercises.blank(source(one), one.functions, 2))
    assert grade.main([str(file), "--json", str(tmp_path / "sheet.json")]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-2:] == ["-", "-"]
    sheet = json.loads((tmp_path / "sheet.json").read_text())["exercises"]["2"]["pass_at_k"]
    assert sheet == {"written": False, "core": [0, 0], "care": [0, 0], "says": None}
    file.write_text("def pass_at_k(n, c, k) return 1")
    assert "cannot be read" in grade.grade(one, file.read_text(), True)["pass_at_k"]["says"]


def test_the_readme_has_the_section_that_the_table_makes():
    text = exercises.readme()
    assert text in (REPO / "README.md").read_text(), "README.md: put in what exercises.py prints"
    assert len(text.splitlines()) <= 28
