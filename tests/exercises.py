"""The exercises of a course: one table, from which the rest is made.

    python tests/exercises.py                          # the README's section, as text

`blank.py` makes a student's copy from it, in which the functions named here have no body;
`grade.py` counts the tests that grade each of them. A test grades the function that its mark names,
@core("pass_at_k") or @care("pass_at_k"); in test_losses.py, whose tests go by a parameter, it is
the word behind the bracket of the test's id. The source surgery of both programs is here too.
"""
import ast
import re
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent
FILES = ("rewards.py", "eval.py", "losses.py", "policy.py", "sample.py", "train.py")
# Tests that hold before a body is written, because the signature is given: no points for them.
GIVEN = ("test_signature", "test_default_options", "test_misspelt_option_is_refused",
         "test_only_the_losses_that_it_has")


class Exercise(NamedTuple):
    number: int
    title: str
    file: str                  # which of the six; "" where nothing is handed in to the grader
    functions: tuple           # graded, a line of the scorecard each
    helpers: tuple             # blanked with them, but without a line of their own
    tests: tuple               # files in tests/ in which the grading tests stand
    write: str                 # what to write
    look: str                  # what to look at in a run
    question: str              # its answer needs that run or a derivation
    together: bool = False     # its functions share inner workings, and are graded as one


EXERCISES = (
    Exercise(1, "the verifier", "rewards.py", ("parse", "countdown_reward"), (),
             ("test_rewards.py",),
             "a recursive parser in exact arithmetic, and the reward that it gives",
             "the column `parsed` of log.csv in the first and the last step",
             "Which wrong rule would a policy find first: floats, or a number used twice?"),
    Exercise(2, "Pass@k without bias", "eval.py", ("pass_at_k",), (), ("test_eval.py",),
             "the chance that k of n samples, c of them correct, hold a correct one",
             "Pass@1 to Pass@64 of runs/base",
             "Why is 1 - (1 - c/n)^k too low on average, and on which problems most?"),
    Exercise(3, "from REINFORCE to GRPO", "losses.py",
             ("group_advantages", "reinforce", "grpo"), ("_clip", "_aggregate"),
             ("test_losses.py",),
             "advantages in the group, the clip, the mean over tokens, the two losses",
             "`loss` and `grad_norm`",
             "With one update a step every ratio is 1: why is the loss 0 and the gradient not?"),
    Exercise(4, "attention with a cache", "policy.py",
             ("rotate", "allowed", "KVCache.update", "Attention.forward"), (),
             ("test_policy.py",),
             "rotary positions, who sees whom, grouped-query attention, a cache that grows",
             "`tokens_s`",
             "By how much must a cache speed up T tokens, and how much of it do you see?"),
    Exercise(5, "log-probabilities in tiles", "policy.py",
             ("token_logprobs", "TokenLogprobs.forward", "TokenLogprobs.backward"), (),
             ("test_logprobs.py",),
             "first the two lines of the definition; then tile by tile, with its own gradient",
             "`memory_gb`, first and later",
             "What is the gradient of the entropy in the logits, and where does it vanish?",
             together=True),
    Exercise(6, "the sampler", "sample.py", ("sample",), (), ("test_sample.py",),
             "a plain loop over the cache: draw, record, stop",
             "`cut` and `length`, the stop token in the mask and not",
             "What does training optimise when sampling cuts to the top p and scoring does not?"),
    Exercise(7, "one exact step", "train.py", ("train_step",), (), ("test_train.py",),
             "one gradient in (B, T) log-probabilities, pushed through the model in chunks",
             "log.csv with --micro-batch 0 and with 16, digit by digit",
             "For which aggregators is the mean of chunk losses the loss of the batch?"),
    Exercise(8, "differential smoothing", "losses.py", ("diffsmooth", "diffsmooth_reward"), (),
             ("test_losses.py",),
             "Eq. (6) with both signs, and its form in the reward",
             "`distinct` and `entropy`, gamma_p of both signs",
             "What does each form do in a group that is all correct, and which one do you want?"),
    Exercise(9, "Pass@k as the objective", "losses.py", ("pkpo",), (), ("test_losses.py",),
             "A = k C(G-c, k-1) / C(G-1, k-1) for the correct",
             "Pass@1 and Pass@16 of `--loss pkpo --k 4` beside grpo",
             "Derive the factor, and show that one more baseline would bias it."),
    Exercise(10, "your own method", "", (), (), (),
             "a new function in losses.py; its name is a flag, its keywords are too",
             "its table beside grpo and diffsmooth",
             "What would you have to see, on how many seeds, to say that it is better?"),
)


def exercise(number):
    for one in EXERCISES:
        if one.number == number:
            return one
    raise SystemExit(f"there is no exercise {number}: they are 1 to {len(EXERCISES)}.")


def blanked_names(one):
    return (*one.functions, *one.helpers)


def readme():
    """The README's section."""
    lines = ["## Exercises", "",
             "`python tests/blank.py OUT` writes a student's copy, in which the functions below "
             "have kept only their docstrings;",
             "`--only 3 5` blanks some, `--solution 3` puts bodies back. `python tests/grade.py "
             "OUT` grades it on one screen: points",
             "for **core** (the mathematics) and **care** (padding, types, errors), and what is "
             "wrong in a sentence. `--only 3` is",
             "one exercise, `--json` an instructor's sheet. It runs the code that it grades.",
             "A file of your own goes too: `python tests/grade.py my_losses.py`, or "
             "`IMPL=my_losses pytest tests/test_losses.py`.", ""]
    for one in EXERCISES:
        names = ", ".join(f"`{name}`" for name in one.functions) or "a new function"
        lines.append(f"{one.number}. **{one.title[0].upper()}{one.title[1:]}**: {names}. Look at "
                     f"{one.look}.\n   {one.question}")
    return "\n".join(lines)


# --------------------------------------------------------------------------- which test grades what

def graded_by(item):
    """A collected test of pytest -> ("core" or "care", names of the functions that it grades)."""
    for part in ("core", "care"):
        mark = item.get_closest_marker(part)
        if mark is None or item.name.partition("[")[0] in GIVEN:
            continue
        found = re.match(r"[^\[]*\[(\w+)", item.name)
        return part, mark.args or ((found[1],) if found else ())
    return None, ()


# ----------------------------------------------------------------------------------- source surgery

def functions_of(source):
    """{name, or Class.name: its ast node} of a file."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}": inner for inner in node.body
                      if isinstance(inner, ast.FunctionDef)}
    return found


def is_docstring(statement):
    return (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            and isinstance(statement.value.value, str))


def is_blank(node):
    """Whether a function is not there, or is nothing but a raise of NotImplementedError."""
    if node is None:
        return True
    body = node.body[is_docstring(node.body[0]):]
    if len(body) != 1 or not isinstance(body[0], ast.Raise):
        return not body or all(isinstance(statement, ast.Pass) for statement in body)
    raised = body[0].exc
    raised = raised.func if isinstance(raised, ast.Call) else raised
    return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"


def blank(source, names, number):
    """The source without the bodies of the functions named; signatures and docstrings stay."""
    lines, nodes = source.split("\n"), functions_of(source)
    for name in sorted(names, key=lambda name: -nodes[name].lineno):    # from the end of the file
        node = nodes[name]
        if is_docstring(node.body[0]):
            start = node.body[0].end_lineno
        else:
            start = node.body[0].lineno - 1
            while lines[start - 1].lstrip().startswith("#"):
                start -= 1
        indent = " " * node.body[0].col_offset
        lines[start:node.end_lineno] = [
            f'{indent}raise NotImplementedError("exercise {number}: {name} is yours to write")']
    return "\n".join(lines)


def put_back(source, solution, names):
    """The source with the functions named as they are in the solution; one that the source lacks,
    or that the solution has not written either, is left as it is."""
    lines, ours, nodes = source.split("\n"), functions_of(solution), functions_of(source)
    known = [name for name in names if name in nodes and not is_blank(ours.get(name))]
    for name in sorted(known, key=lambda name: -nodes[name].lineno):
        mine, theirs = ours[name], nodes[name]
        text = solution.split("\n")[first_line(mine):mine.end_lineno]
        lines[first_line(theirs):theirs.end_lineno] = text
    return "\n".join(lines)


def first_line(node):
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1


if __name__ == "__main__":
    print(readme())
