"""The exercises of a course: one table, from which the rest is made.

    python tests/exercises.py                          # the README's section, as text
    python tests/exercises.py handout                  # the handout for students

`blank.py` makes a student's copy, in which the functions named here have no body, and `grade.py`
grades it, by the questions of course/checks.py. The source surgery of both is here, too.
"""

import ast
import io
import sys
import textwrap
import tokenize
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).resolve().parent.parent
FILES = ("rewards.py", "eval.py", "losses.py", "policy.py", "sample.py", "train.py")


class Exercise(NamedTuple):
    number: int
    title: str
    file: str  # which of the six; "" where nothing is handed in to the grader
    functions: tuple  # graded, a line of the scorecard each
    helpers: tuple  # blanked with them, but without a line of their own
    needs: tuple  # exercises whose functions these call; solved or not, the reference
    points: int  # serves for them while this one is graded
    hours: str
    level: str
    write: str  # what to write
    look: str  # what to look at in a run
    hand_in: str  # a number, a plot, a sentence: beside the code
    question: str  # its answer needs that run or a derivation
    hints: tuple  # two, in steps
    together: bool = False  # its functions share inner workings, and are graded as one


EXERCISES = (
    Exercise(
        1,
        "the verifier",
        "rewards.py",
        ("parse", "countdown_reward"),
        (),
        (),
        15,
        "2-3",
        "medium",
        "a recursive parser in exact arithmetic, and the reward that it gives",
        "the column `parsed` of log.csv in the first and the last step",
        "both numbers of `parsed`, and one text that a looser verifier would have paid for",
        "Which wrong rule would a policy find first: floats, or a number used twice?",
        (
            (
                "Write the grammar of the docstring as three functions that call each other; each"
                " takes tokens from one list. Keep numerator and denominator as two integers."
            ),
            (
                "Two of the refusals need no code: `07` and `**` fall apart into tokens that no"
                " rule takes. Compare sorted lists of numbers, and numerator with target *"
                " denominator."
            ),
        ),
    ),
    Exercise(
        2,
        "Pass@k without bias",
        "eval.py",
        ("pass_at_k",),
        (),
        (),
        8,
        "1",
        "easy",
        "the chance that k of n samples, c of them correct, hold a correct one",
        "Pass@1 to Pass@64 of runs/base",
        "the five numbers, and the same by 1 - (1 - c/n)^k",
        "Why is 1 - (1 - c/n)^k too low on average, and on which problems most?",
        (
            "Count subsets: how many of the k-subsets of n samples hold no correct one?",
            "Python's integers do not overflow; divide them last.",
        ),
    ),
    Exercise(
        3,
        "from REINFORCE to GRPO",
        "losses.py",
        ("group_advantages", "_aggregate", "reinforce", "grpo"),
        ("_clip",),
        (),
        15,
        "4-6",
        "medium",
        "advantages in the group, the clip, the means over tokens, the two losses",
        "`loss` and `grad_norm`",
        "a plot of both over 100 steps, and a sentence on why one of them says nothing",
        "With one update a step every ratio is 1: why is the loss 0 and the gradient not?",
        (
            (
                "`_prepare` has checked the arguments and blanked the padding: write the formula of"
                " the docstring for one token, then take the mean that agg names."
            ),
            (
                "The clip is a min of two losses, not a clamp of one: look at which of them has a"
                " gradient for A = +1 and A = -1 at ratio 1.5. The std is the population's."
            ),
        ),
    ),
    Exercise(
        4,
        "attention with a cache",
        "policy.py",
        ("rotate", "allowed", "KVCache.update", "Attention.forward"),
        (),
        (),
        14,
        "4-6",
        "hard",
        "rotary positions, who sees whom, grouped-query attention, a cache that grows",
        "`tokens_s`",
        "`tokens_s` with the cache, and of a loop that reads the whole text for each token",
        "By how much must a cache speed up T tokens, and how much of it do you see?",
        (
            (
                "Draw the (T, S) table of `allowed` for 2 new tokens after 3 cached ones before you"
                " write it. Queries are the LAST T of the S positions."
            ),
            (
                "Keys go into the cache after they are rotated. Query head h reads key head "
                "h // (heads / kv_heads); scaled_dot_product_attention has enable_gqa for it."
            ),
        ),
    ),
    Exercise(
        5,
        "log-probabilities in tiles",
        "policy.py",
        ("token_logprobs", "TokenLogprobs.forward", "TokenLogprobs.backward"),
        (),
        (),
        10,
        "6-8",
        "hard",
        "first the two lines of the definition; then tile by tile, with its own gradient",
        "`memory_gb`, first and later",
        "peak memory of both versions for 8,192 tokens of a vocabulary of 20,000",
        "What is the gradient of the entropy in the logits, and where does it vanish?",
        (
            (
                "The two lines of the docstring earn 7 of the 10 points. Then cut the rows into"
                " pieces, and keep of each piece only its log-sum-exp and its entropy."
            ),
            (
                "Backward makes each tile's logits again and uses the formula in the class's"
                " docstring. Entropies of parts join by the chain rule: H = sum of share (H_part -"
                " log share)."
            ),
        ),
        together=True,
    ),
    Exercise(
        6,
        "the sampler",
        "sample.py",
        ("sample",),
        (),
        (4, 5),
        12,
        "3-4",
        "medium",
        "a plain loop over the cache: draw, record, stop",
        "`cut` and `length`, the stop token in the mask and not",
        "both columns at step 100, and what you did with rows that have ended",
        "What does training optimise when sampling cuts to the top p and scoring does not?",
        (
            (
                "Read all prompts once into a KVCache, copy it to B rows (`cache_of_rows`), then"
                " feed one token per row. The mask for Policy.forward grows by a column per token."
            ),
            (
                "The first token comes from the prompt's last hidden state. Draw with the generator"
                " that you were given, on its device, and record log_softmax of the very logits"
                " that you drew from."
            ),
        ),
    ),
    Exercise(
        7,
        "one exact step",
        "train.py",
        ("train_step",),
        (),
        (4, 5, 6),
        12,
        "3-4",
        "hard",
        "one gradient in (B, T) log-probabilities, pushed through the model in chunks",
        "log.csv with --micro-batch 0 and with 16, digit by digit",
        "the first digit in which the two logs differ, and why they may",
        "For which aggregators is the mean of chunk losses the loss of the batch?",
        (
            (
                "Score all chunks without gradient; make logp and entropy leaves; one autograd.grad"
                " of the loss of the whole batch gives two (B, T) arrays."
            ),
            (
                "Score each chunk again, now with gradient, and call backward with its rows of"
                " those arrays. Look at norm AND loss before the optimiser steps."
            ),
        ),
    ),
    Exercise(
        8,
        "differential smoothing",
        "losses.py",
        ("diffsmooth", "diffsmooth_reward"),
        (),
        (3,),
        8,
        "1-2",
        "easy",
        "Eq. (6) with both signs, and its form in the reward",
        "`distinct` and `entropy`, gamma_p of both signs",
        "`distinct` after 300 steps for gamma_p 0.2, 0 and -0.2",
        "What does each form do in a group that is all correct, and which one do you want?",
        (
            (
                "Only the advantages differ from grpo's. The term is a constant: it is made of"
                " old_logp."
            ),
            (
                "Check your signs on the docstring's numbers; check the length on an answer whose"
                " tokens you repeat: reduction sum doubles the term, mean does not."
            ),
        ),
    ),
    Exercise(
        9,
        "Pass@k as the objective",
        "losses.py",
        ("pkpo",),
        (),
        (3,),
        6,
        "2",
        "medium",
        "A = k C(G-c, k-1) / C(G-1, k-1) for the correct",
        "Pass@1 and Pass@16 of `--loss pkpo --k 4` beside grpo",
        "the four numbers, and your derivation of the factor",
        "Derive the factor, and show that one more baseline would bias it.",
        (
            (
                "It depends on c alone: make a list of its values for c = 0 .. G, and look each"
                " group up."
            ),
            "When is an answer the only correct one of its k-subset? Count those subsets.",
        ),
    ),
    Exercise(
        10,
        "your own method",
        "",
        (),
        (),
        (3,),
        0,
        "8+",
        "open",
        "a new function in losses.py; its name is a flag, its keywords are too",
        "its table beside grpo and diffsmooth",
        "the table, with its seeds and intervals, and one sentence of judgement",
        "What would you have to see, on how many seeds, to say that it is better?",
        (
            "Change only the advantages at first: then every other part stays comparable.",
            "Take paired intervals, and give the baseline as many learning rates as your method.",
        ),
    ),
)


def exercise(number):
    for one in EXERCISES:
        if one.number == number:
            return one
    raise SystemExit(f"there is no exercise {number}: they are 1 to {len(EXERCISES)}.")


def blanked_names(one):
    return (*one.functions, *one.helpers)


README = """
`python tests/blank.py OUT` writes a student's copy, in which the functions below have only their
docstrings and no test or other loss gives an answer away, with a handout (goals, hours, hints),
`self_check.py` (worked numbers), and `run.py`, which runs train.py with compiled code for what is
not solved yet. Here, `python tests/grade.py OUT` grades it, 100 points and each mistake in a
sentence (or one file: `python tests/grade.py my_losses.py`); `python tests/grade.py --all FOLDER
--csv grades.csv --jobs 4` grades a class. Code of strangers goes into a container:

    docker build -t course - < tests/course/Dockerfile
    docker run --rm --network none --memory 16g --cpus 4 --pids-limit 512 -v "$PWD":/root/repo:ro \\
        -v "$PWD/handed_in":/handed_in:ro -w /root/repo course \\
        python tests/grade.py --all /handed_in --user nobody > grades.csv

Graded code runs in a process that knows no right answer; native code could read the reference's
files, but not in the container.
"""


def readme():
    """The README's section."""
    lines = ["## Exercises", ""]
    for part in README.strip("\n").split("\n\n"):
        code = part.startswith("    ")
        lines += [part if code else textwrap.fill(part, 138, break_on_hyphens=False), ""]
    for one in EXERCISES:
        names = ", ".join(f"`{name}`" for name in one.functions) or "a new function"
        worth = f" ({one.points})" if one.points else ""
        title = one.title[0].upper() + one.title[1:]
        lines.append(f"{one.number}. **{title}**{worth}: {names}.")
    return "\n".join(lines)


def handout():
    """What a student gets to read: HANDOUT.md of a copy."""
    lines = [
        "# Exercises",
        "",
        (
            "Ten exercises, 100 points. Write the bodies that raise NotImplementedError; the"
            " docstrings say what they must do, and everything that is graded is said there."
        ),
        "",
        "    python tests/self_check.py 3                   # worked numbers, for exercise 3",
        "    python tests/run.py train.py --loss grpo       # any program, with what you have",
        "    python tests/run.py eval.py runs/base runs/grpo --n 64",
        "",
        (
            "`run.py` takes a compiled reference for what is not written yet, so each exercise can"
            ' be done alone, and each "look at" tried before anything is solved; `train.py` itself'
            " runs once all is written. A default run takes minutes on two cores. Losses that the"
            " exercises do not name are blank as well where they would be an answer; you need not"
            " write them."
        ),
        "",
        (
            "Hand in your folder, or a file with your functions, and for each exercise what it says"
            " below. **core** is the mathematics, **care** what real batches need besides: padding,"
            " types, errors. Each function is graded alone, among the reference's, and then all of"
            " an exercise together as you wrote them. A part gives all of its points or none."
        ),
        "",
        "| | exercise | points | hours | level | needs |",
        "|---|---|---|---|---|---|",
    ]
    for one in EXERCISES:
        needs = ", ".join(map(str, one.needs)) or "-"
        lines.append(
            f"| {one.number} | {one.title} | {one.points or '-'} | {one.hours} | {one.level} |"
            f" {needs} |"
        )
    lines += [
        "",
        (
            "Any order will do; 1 and 2 are the gentlest start, 3 comes before 8, 9 and 10, and 4"
            " before 6 and 7 if you want to run on code of your own."
        ),
        "",
    ]
    for one in EXERCISES:
        names = ", ".join(f"`{name}`" for name in blanked_names(one)) or "a new function"
        where = f" in `{one.file}`" if one.file else ""
        lines += [
            f"## {one.number}. {one.title[0].upper()}{one.title[1:]}", "",
            *wrapped(f"**Write** {names}{where}: {one.write}."),
            *wrapped(f"**Look at** {one.look}."), *wrapped(f"**Hand in** {one.hand_in}."),
            *wrapped(f"**Question.** {one.question}"), "", "<details><summary>First hint</summary>",
            "", *wrapped(one.hints[0]), "", "</details>", "<details><summary>Second hint</summary>",
            "", *wrapped(one.hints[1]), "", "</details>", "",
        ]
    return "\n".join(lines)


def wrapped(text):
    return [*textwrap.wrap(text, 100), ""]


# ----------------------------------------------------------------------------------- source surgery


def functions_of(source):
    """{name, or Class.name: its ast node} of a file."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{inner.name}": inner
                for inner in node.body
                if isinstance(inner, ast.FunctionDef)
            }
    return found


def is_docstring(statement):
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def is_blank(node):
    """Whether a function is not there, or is nothing but a raise of NotImplementedError."""
    if node is None:
        return True
    body = node.body[is_docstring(node.body[0]) :]
    if len(body) != 1 or not isinstance(body[0], ast.Raise):
        return not body or all(isinstance(statement, ast.Pass) for statement in body)
    raised = body[0].exc
    raised = raised.func if isinstance(raised, ast.Call) else raised
    return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"


def blank(source, names, number):
    """The source without the bodies of the functions named; signatures and docstrings stay."""
    lines, nodes = source.split("\n"), functions_of(source)
    for name in sorted(names, key=lambda name: -nodes[name].lineno):  # from the end of the file
        node = nodes[name]
        if is_docstring(node.body[0]):
            start = node.body[0].end_lineno
        else:
            start = node.body[0].lineno - 1
            while lines[start - 1].lstrip().startswith("#"):
                start -= 1
        indent = " " * node.body[0].col_offset
        says = f"exercise {number}: {name} is yours to write" if number else f"{name} comes with 3"
        lines[start : node.end_lineno] = [f'{indent}raise NotImplementedError("{says}")']
    return "\n".join(lines)


def put_back(source, solution, names):
    """The source with the functions named as they are in the solution; one that the source lacks,
    or that the solution has not written either, is left as it is."""
    lines, ours, nodes = source.split("\n"), functions_of(solution), functions_of(source)
    known = [name for name in names if name in nodes and not is_blank(ours.get(name))]
    for name in sorted(known, key=lambda name: -nodes[name].lineno):
        mine, theirs = ours[name], nodes[name]
        text = solution.split("\n")[first_line(mine) : mine.end_lineno]
        lines[first_line(theirs) : theirs.end_lineno] = text
    return "\n".join(lines)


def first_line(node):
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1


def code_lines(text):
    """The lines without their comments and the blanks around."""
    lines = text.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return [line.strip() for line in lines]


def body(node):
    """The lines of a function's body, docstring aside, as a slice."""
    if is_docstring(node.body[0]):
        return slice(node.body[0].end_lineno, node.end_lineno)
    return slice(node.body[0].lineno - 1, node.end_lineno)


def solution_lines():
    """What no copy may hold: each line of an exercised body that has more than 20 characters."""
    found = set()
    for file in FILES:
        text = (REPO / file).read_text()
        lines, nodes = code_lines(text), functions_of(text)
        for one in EXERCISES:
            if one.file == file:
                for name in blanked_names(one):
                    found.update(line for line in lines[body(nodes[name])] if len(line) > 20)
    return found


def neighbours():
    """Functions of losses.py that are no exercise, but whose bodies hold a line of one: `entropy`
    is grpo for a coefficient of 0, `rloo` is reinforce with another baseline, and so on. They are
    blank in a copy, and while a submission is graded."""
    text, answers = (REPO / "losses.py").read_text(), solution_lines()
    exercised = {name for one in EXERCISES for name in blanked_names(one)}
    lines = code_lines(text)
    return [
        name
        for name, node in functions_of(text).items()
        if name not in exercised and answers.intersection(lines[body(node)])
    ]


def blanked_source(file, numbers=None):
    """One of the six without the bodies of these exercises, of all by default; the neighbours are
    blanked with exercise 3."""
    source = (REPO / file).read_text()
    for one in EXERCISES:
        if one.file == file and (numbers is None or one.number in numbers):
            source = blank(source, blanked_names(one), one.number)
    if file == "losses.py" and (numbers is None or 3 in numbers):
        source = blank(source, neighbours(), 0)
    return source


if __name__ == "__main__":
    print(handout() if sys.argv[1:] == ["handout"] else readme())
