"""The course's table and its copies: what is named is there, a copy has no answers and works.

Bugs killed here: a function of the table that was renamed, an exercise without questions, points
that do not add up to 100, a docstring or signature lost with the body, a neighbour's body lost,
bodies that do not come back, an answer left in a copy, a self-check that passes what is blank, a
program of a copy that does not run before all is solved.
"""

import ast
import os
import subprocess
import sys

import pytest

import blank
import exercises
from exercises import EXERCISES, REPO, functions_of, is_blank

sys.path.insert(0, str(REPO / "tests" / "course"))
import checks

GRADED = [one for one in EXERCISES if one.file]


def source(one):
    return (REPO / one.file).read_text()


def test_the_table_names_what_is_there():
    assert [one.number for one in EXERCISES] == list(range(1, len(EXERCISES) + 1))
    for one in GRADED:
        missing = set(exercises.blanked_names(one)) - set(functions_of(source(one)))
        assert not missing, f"exercise {one.number}: {one.file} has no {missing}"
        for name in one.functions:
            said = ast.get_docstring(functions_of(source(one))[name])
            assert said or "." in name, f"{name} says nothing to a student"
        assert len(one.hints) == 2 and all(len(hint) > 40 for hint in one.hints)
        assert all(0 < other < 10 and other != one.number for other in one.needs)


def test_points_add_up_to_a_hundred():
    assert sum(one.points for one in EXERCISES) == 100
    for one in GRADED:
        assert one.points == checks.points_of(one.number), f"exercise {one.number}"
        named = {check.function for check in checks.checks_of(one.number)} - {""}
        assert named == (set() if one.together else set(one.functions))
        for name in named:
            parts = {check.part for check in checks.checks_of(one.number) if check.function == name}
            assert parts == {"core", "care"} or name == "_aggregate", f"{name}: {parts}"


def test_a_full_copy_holds_no_line_of_an_answer(tmp_path):
    """In no file, compiled ones included. Two lines say nothing and stand elsewhere, too."""
    assert blank.main([str(tmp_path / "out")]) == 0
    elsewhere = {
        "if cache is not None:", "prompt, prompt_mask = encode(tokenizer, prompts, device)",
    }
    answers = exercises.solution_lines() - elsewhere
    assert len(answers) > 120
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {file.name for file in files} == {
        *exercises.FILES, "README.md", "HANDOUT.md", "requirements.txt", ".gitignore",
        "exercises.py", "bodies.py", "run.py", "self_check.py", "reference.bin",
    }
    for file in files:
        text = file.read_bytes().decode("latin-1")
        lines = {line.strip() for line in text.split("\n")}
        lines |= {line.partition("  #")[0].strip() for line in text.split("\n")}
        assert not answers & lines, f"{file.name} holds {sorted(answers & lines)[0]!r}"
    whole = (tmp_path / "out" / "losses.py").read_text()
    for name in ("entropy", "dapo", "rloo"):
        assert is_blank(functions_of(whole)[name]), f"{name} is an answer by another name"


def test_a_copy_loses_bodies_and_nothing_else_and_gets_them_back(tmp_path):
    blank.main([str(tmp_path / "out")])
    blanked = {
        (one.file, name): one.number for one in GRADED for name in exercises.blanked_names(one)
    }
    blanked |= {("losses.py", name): 0 for name in exercises.neighbours()}
    for file in exercises.FILES:
        ours, theirs = (
            functions_of((folder / file).read_text()) for folder in (REPO, tmp_path / "out")
        )
        assert list(ours) == list(theirs)
        for name in ours:
            assert ast.get_docstring(ours[name]) == ast.get_docstring(theirs[name])
            assert ast.dump(ours[name].args) == ast.dump(theirs[name].args)
            if (file, name) in blanked:
                assert is_blank(theirs[name]) and not is_blank(ours[name]), f"{name} is not blank"
            else:
                assert ast.dump(ours[name]) == ast.dump(theirs[name]), f"{name} is no exercise"
    numbers = [str(one.number) for one in GRADED]
    assert blank.main([str(tmp_path / "out"), "--solution", *numbers]) == 0
    for file in exercises.FILES:
        assert (REPO / file).read_bytes() == (tmp_path / "out" / file).read_bytes(), file


def test_only_some_are_blank_and_one_comes_back(tmp_path):
    blank.main([str(tmp_path / "out"), "--only", "2", "3"])
    losses = tmp_path / "out" / "losses.py"
    assert {name for name, node in functions_of(losses.read_text()).items() if is_blank(node)} == {
        *exercises.blanked_names(exercises.exercise(3)), *exercises.neighbours(),
    }
    mine = losses.read_text().replace(
        'raise NotImplementedError("exercise 3: reinforce is yours to write")', "return 3"
    )
    losses.write_text(mine)
    blank.main([str(tmp_path / "out"), "--solution", "2"])
    assert losses.read_text() == mine, "what is written must not be touched"
    assert (tmp_path / "out" / "eval.py").read_text() == (REPO / "eval.py").read_text()
    for words, says in (
        ([tmp_path / "out"], "exists"), ([tmp_path, "--solution", "1"], "not a copy"),
        ([tmp_path / "new", "--only", "11"], "no exercise 11"),
    ):
        with pytest.raises(SystemExit, match=says):
            blank.main([*map(str, words)])


def in_copy(folder, *words):
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout, done.stderr


def test_a_copy_checks_itself_and_runs_before_all_is_solved(tmp_path):
    out = tmp_path / "out"
    blank.main([str(out)])
    code, said, _ = in_copy(out, "tests/self_check.py", "1", "2", "8")
    assert code == 1 and said.count("is not written yet") == 3, said
    blank.main([str(out), "--solution", "8"])  # its own group_advantages is still blank
    code, said, _ = in_copy(out, "tests/self_check.py", "8")
    assert code == 0 and "right" in said, said
    losses = out / "losses.py"
    losses.write_text(losses.read_text().replace("-gamma_p * log_pi", "gamma_p * log_pi"))
    code, said, _ = in_copy(out, "tests/self_check.py", "8")
    assert code == 1 and "1.299998, please, not 0.699998" in said, said
    code, said, error = in_copy(
        out,
        "-c",
        "import sys; sys.path.insert(0, 'tests'); import run; run.complete(); "
        "import torch, losses, policy; print(losses.group_advantages(torch.tensor([1., 0.]), 2), "
        "policy.tiny()[0](torch.zeros(1, 3).long()).shape)",
    )
    assert code == 0 and "torch.Size([1, 3, 128])" in said, error
    assert "losses.py: the reference's group_advantages" in error and "diffsmooth" not in error
    code, said, error = in_copy(out, "tests/run.py", "train.py", "--loss", "nosuch")
    assert code == 2 and "nosuch" in error and "Traceback" not in error, error


def test_worked_numbers_are_right_here():
    code, said, error = in_copy(REPO, "tests/course/self_check.py")
    assert code == 0 and said.count("these numbers are right") == 9, said + error


def test_the_handout_has_all_that_a_student_needs():
    text = exercises.handout()
    for one in EXERCISES:
        for part in (one.title, one.hours, one.question, *exercises.blanked_names(one)):
            assert " ".join(part.split()) in " ".join(
                text.split()
            ), f"exercise {one.number}: {part}"
    assert text.count("First hint") == text.count("Second hint") == len(EXERCISES)
    answers = (REPO / "tests" / "course" / "answers.md").read_text()
    for one in EXERCISES:
        assert f"## {one.number}. " in answers, f"no model answer to question {one.number}"


def test_the_readme_has_the_section_that_the_table_makes():
    text = exercises.readme()
    assert text in (REPO / "README.md").read_text(), "README.md: put in what exercises.py prints"
    assert len(text.splitlines()) <= 30
