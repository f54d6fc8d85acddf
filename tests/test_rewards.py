"""Tests of rewards.py: what is correct, for Countdown and for math. CPU, no network, about 15 s.

Bugs that these tests kill; each was put in once and seen to fail:
  verifier    a number used twice or left out; "1 2" read as 12; signs, "**", "//", "07" accepted;
              1/(1/0) taken for 0; floats or a tolerance instead of exact fractions; text after the
              answer ignored; other characters skipped; "-" and "/" grouped from the right; the
              first answer tag read, or one that is open, nested or closed twice; no cap on length,
              on depth
  generator   a number of the problem not used; operands in the order of the prompt; needed
              brackets dropped, needless ones kept; target outside the range; the other split
  solver      one order of "-" or "/" forgotten; a split of the numbers forgotten; duplicates or 0/0
              counted; a-(b-c) kept apart from a-b+c; a*(b+c) merged with a*b+c
  split       the order of the numbers matters; Python's own hash; other problems on each call
  math        each rule of REWRITES left out; first box, or one cut off, read; braces of \\{
              counted; only the end of the text read; time quadratic in the boxes; "(1,234)" a
              number, "1,234" a list; (1,2) equal to (2,1) or [1,2]; x=5 equal to y=5; -1 1/2 as
              -1 + 1/2; exponents expanded; division by zero raised; "" equal to ""; answers kept in
              memory; a list of sets read for ever; runs of digits split in every way; blanks that
              glue digits; letters, "million", P.M. or "or more" dropped like units; entries of a
              list that come twice made one; decimal commas as thousands; "or" between inequalities
              as "and"; powers of ten not read, or as another one; words that change a number
              dropped as units; Yes and yes apart, a and A not; bold or Unicode characters not read
  files       line number from 0 or without blank lines; empty file accepted; "solution" before
              "answer"; hub file as a local one, of a model repository, without its revision; one
              bad line refusing the file, or left out without a word; the first turn of a chat
              asked; 1e16 kept as 1e+16; a reference that nothing matches told to nobody; a list of
              one answer kept as text; copies counted as problems; choices, system prompts and
              other forms of answer dropped without a word
  task        a file's Countdown problems trained and measured on alike, or made up after all;
              long prompts kept in one of the lists; a grader that hangs, raises or is not there
"""

import argparse
import ast
import doctest
import itertools
import json
import random
import string
import sys
import time
import tracemalloc
import types
import warnings
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from rewards import Countdown, Math, Problem, Problems, countdown_reward, math_reward

LAPTOP = Countdown()
PAPER = Countdown(counts=(3, 4), high=99, targets=(10, 100), style="think")
SETTINGS = {"laptop": LAPTOP, "three": Countdown(counts=(3,)), "paper": PAPER}
core, care = pytest.mark.core, pytest.mark.care  # with the function that a test grades


def key(problem):
    return tuple(sorted(problem.numbers)), problem.target


def tagged(task, answer):
    return f"<answer>{answer}</answer>" if task.style == "think" else answer


# An independent checker: Python's own parser on whitelisted text, then fractions.

OPS = {
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b, ast.Div: lambda a, b: a / b,
}


def ast_value(node, leaves):
    if isinstance(node, ast.Constant) and type(node.value) is int:
        leaves.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPS:
        left, right = ast_value(node.left, leaves), ast_value(node.right, leaves)
        return OPS[type(node.op)](left, right)
    raise SyntaxError("not an expression of the game")


def oracle(text, numbers, target):
    if not set(text) <= set("0123456789+-*/() "):
        return 0.0
    leaves = []
    try:
        value = ast_value(ast.parse(text.strip(), mode="eval").body, leaves)
    except (SyntaxError, ZeroDivisionError):
        return 0.0
    return float(sorted(leaves) == sorted(numbers) and value == target)


def mutated(text, rng):
    """A right answer with a few random edits, some of which keep it right."""
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        i = rng.randrange(len(text) + 1)
        j = rng.randrange(i, len(text) + 1)
        edit = rng.randrange(7)
        if edit == 0:  # insert anything
            text = text[:i] + rng.choice("0123456789+-*/() .=e_²１−") + text[i:]
        elif edit == 1:  # drop a character
            text = text[:i] + text[i + 1 :]
        elif edit == 2:  # another operator or digit
            text = text[:i] + rng.choice("+-*/123456789") + text[i + 1 :]
        elif edit == 3:  # brackets around a stretch
            text = text[:i] + "(" + text[i:j] + ")" + text[j:]
        elif edit == 4:  # a blank
            text = text[:i] + " " + text[i:]
        elif edit == 5:  # brackets around everything
            text = f"({text})"
        else:  # two characters change places
            swap = list(text)
            if swap:
                a, b = rng.randrange(len(swap)), rng.randrange(len(swap))
                swap[a], swap[b] = swap[b], swap[a]
            text = "".join(swap)
    return text


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_verifier_agrees_with_an_independent_checker():
    rng = random.Random(0)
    accepted = total = 0
    for task in (LAPTOP, SETTINGS["three"], PAPER):
        for _ in range(12_000):
            problem, answer = task.example(rng)
            for _ in range(3):
                text = mutated(answer, rng)
                got = countdown_reward(text, *problem)
                want = oracle(text, *problem)
                assert got == want, f"{text!r} for {problem}: verifier {got}, independent {want}"
                accepted, total = accepted + int(got), total + 1
    assert total >= 100_000
    assert 0.2 < accepted / total < 0.8, f"one-sided test: {accepted} of {total} accepted"


# (why, text, expected) for numbers 2 3 5 7 and target 24, style bare: (7-3)*(5-2)+12 is not
# possible, 3*7+5-2 is.
BARE = [
    ("right", "3*7+5-2", 1),
    ("right, brackets", "((3*7)+(5-2))", 1),
    ("right, other order", "5-2+7*3", 1),
    ("right, blanks", "  3 * 7 + 5 - 2 ", 1),
    ("right, newline at the end", "3*7+5-2\n", 1),
    ("right, grouped from the left", "5-2+7*3", 1),
    ("right only if - groups from the right", "5-2-7*3", 0),
    ("30 nested brackets", "(" * 30 + "3*7+5-2" + ")" * 30, 1),
    ("31 nested brackets", "(" * 31 + "3*7+5-2" + ")" * 31, 0),
    ("many brackets, none deep", "(3)*((7))+((5))-((2))", 1),
    ("wrong value", "3*7+5+2", 0),
    ("a number missing", "3*7+5", 0),
    ("a number twice", "3*7+5-2+2-2", 0),
    ("target alone", "24", 0),
    ("target and the rest cancelled", "24+2-2", 0),
    ("other numbers, right value", "4*6", 0),
    ("empty", "", 0),
    ("blank", "   ", 0),
    ("empty brackets", "()", 0),
    ("equation", "3*7+5-2=24", 0),
    ("chain of equations", "3*7=21+5=26-2=24", 0),
    ("prompt repeated", "2 3 5 7,24=3*7+5-2", 0),
    ("text before", "Answer: 3*7+5-2", 0),
    ("text after", "3*7+5-2 is the answer", 0),
    ("full stop", "3*7+5-2.", 0),
    ("second answer", "3*7+5-2\n3*7+5-2", 0),
    ("comma", "3*7+5-2,", 0),
    ("comment", "3*7+5-2#24", 0),
    ("C comment", "3*7+5-2/*24*/", 0),
    ("semicolon", "3*7+5-2;", 0),
    ("unary minus", "-2+3*7+5", 0),
    ("unary plus", "+3*7+5-2", 0),
    ("unary minus inside", "3*7-(-5)-2", 0),
    ("double minus", "3*7--5-2", 0),
    ("plus minus", "3*7+5+-2", 0),
    ("open bracket", "(3*7+5-2", 0),
    ("close bracket", "3*7+5-2)", 0),
    ("wrong way round", ")3*7+5-2(", 0),
    ("brackets as product", "3(7)+5-2", 0),
    ("brackets glued", "(3)(7)+5-2", 0),
    ("operator at the end", "3*7+5-2+", 0),
    ("operator at the start", "*3*7+5-2", 0),
    ("number e", "3e0*7+5-2", 0),
    ("underscore", "3*7+5-2_", 0),
    ("decimal", "3.0*7+5-2", 0),
    ("leading zero", "03*7+5-2", 0),
    ("hexadecimal", "0x3*7+5-2", 0),
    ("times sign", "3×7+5-2", 0),
    ("Unicode minus", "3*7+5−2", 0),
    ("full-width digits", "３*7+5-2", 0),
    ("Arabic digits", "٣*7+5-2", 0),
    ("superscript", "3*7+5-2²", 0),
    ("no-break space", "3*7+5\u00a0-2", 0),
    ("zero-width space", "3*7+5-2\u200b", 0),
    ("NUL", "3*7+5-2\x00", 0),
    ("lone surrogate", "3*7+5-2\ud800", 0),
    ("tag in bare style", "<answer>3*7+5-2</answer>", 0),
    ("LaTeX", "$3*7+5-2$", 0),
    ("code", "__import__('os')", 0),
    ("as long as the cap", "3*7+5-2".ljust(rewards.MAX_ANSWER), 1),
    ("longer than the cap", "3*7+5-2".ljust(rewards.MAX_ANSWER + 1), 0),
]


@care("countdown_reward")
@pytest.mark.parametrize("why, text, expected", BARE, ids=[row[0] for row in BARE])
def test_bare_answers(why, text, expected):
    got = countdown_reward(text, (2, 3, 5, 7), 24)
    assert got == expected, f"{why}: {text[:80]!r} must score {expected}, scored {got}"


# (why, text, numbers, target, expected)
EXACT = [
    ("thirds add up", "1/3+2/3*4", (1, 3, 2, 3, 4), 3, 1),
    ("8/(3-8/3)", "8/(3-8/3)", (3, 3, 8, 8), 24, 1),
    ("almost an integer", "1/49*49+1", (1, 49, 49, 1), 2, 1),
    ("an error floats do not see", "(99999999*99999999+1)-99999999*99999999",
     (99999999,) * 4 + (1,), 0, 0),
    ("off by a millionth", "24+1/1000000", (24, 1, 1000000), 24, 0),
    ("integer division is not meant", "7/2", (7, 2), 3, 0),
    ("floor division", "7//2", (7, 2), 3, 0),
    ("power", "2**3", (2, 3), 8, 0),
    ("caret", "2^3", (2, 3), 8, 0),
    ("modulo", "7%4", (7, 4), 3, 0),
    ("glued digits", "1 2", (1, 2), 12, 0),
    ("glued digits, one number", "1 2", (12,), 12, 0),
    ("digits written together", "12", (1, 2), 12, 0),
    ("one number", "12", (12,), 12, 1),
    ("number cut in two", "1+2", (12,), 3, 0),
    ("multiset, not set", "2*2", (2, 2), 4, 1),
    ("the same number once too few", "2+2", (2, 2, 2), 4, 0),
    ("the same number once too often", "2+2+2", (2, 2), 6, 0),
    ("division by zero", "5/(2-2)", (5, 2, 2), 0, 0),
    ("zero over zero", "(3-3)/(2-2)", (3, 3, 2, 2), 0, 0),
    ("1/(1/0) is not 0", "4/(4/(2-2))", (4, 4, 2, 2), 0, 0),
    ("0*(1/0) is not 0", "(3-3)*(4/(2-2))", (3, 3, 4, 2, 2), 0, 0),
    ("a/b/c groups from the left", "8/4/2", (8, 4, 2), 1, 1),
    ("a/b*c groups from the left", "8/4*2", (8, 4, 2), 4, 1),
    ("a-b+c groups from the left", "8-4+2", (8, 4, 2), 6, 1),
    ("product before sum", "2+3*4", (2, 3, 4), 14, 1),
    ("not from left to right", "2+3*4", (2, 3, 4), 20, 0),
    ("negative on the way", "(1-9)*(2-5)", (1, 9, 2, 5), 24, 1),
    ("fraction as target", "6/(5/4)", (4, 5, 6), Fraction(24, 5), 1),
    ("huge integer", "9" * 250, (9,), 9, 0),
    ("beyond the digits that int() takes", "9" * 5000, (9,), 9, 0),
]


@core("countdown_reward")
@pytest.mark.parametrize("why, text, numbers, target, expected", EXACT, ids=[r[0] for r in EXACT])
def test_exact_arithmetic(why, text, numbers, target, expected):
    got = countdown_reward(text, numbers, target)
    assert got == expected, f"{why}: {text[:80]!r} must score {expected}, scored {got}"


RIGHT, WRONG = "<answer>3*7+5-2</answer>", "<answer>3*7+5+2</answer>"
THINK = [
    ("plain", RIGHT, 1),
    ("after thoughts", f"<think>hm, 21+3</think>\n{RIGHT}", 1),
    ("text after the tag", f"{RIGHT} so 24.", 1),
    ("blanks inside", "<answer>\n 3*7+5-2 \n</answer>", 1),
    ("wrong, then right", WRONG + RIGHT, 1),
    ("right, then wrong", RIGHT + WRONG, 0),
    ("three tags", WRONG + WRONG + RIGHT, 1),
    ("no tag", "3*7+5-2", 0),
    ("not closed", "<answer>3*7+5-2", 0),
    ("right, then not closed", f"{RIGHT}<answer>3*7", 0),
    ("closed only", "3*7+5-2</answer>", 0),
    ("closed twice", f"{RIGHT}</answer>", 0),
    ("nested", f"<answer>{RIGHT}</answer>", 0),
    ("nested, closed once", f"<answer>{RIGHT}", 0),
    ("right, then nested", f"{RIGHT}<answer>{RIGHT}", 0),
    ("wrong way round", "</answer>3*7+5-2<answer>", 0),
    ("capital letters", "<ANSWER>3*7+5-2</ANSWER>", 0),
    ("attribute", "<answer id=1>3*7+5-2</answer>", 0),
    ("words inside", "<answer>It is 3*7+5-2</answer>", 0),
    ("equation inside", "<answer>3*7+5-2=24</answer>", 0),
    ("empty", "<answer></answer>", 0),
    ("the prompt's own example", "<answer>(a + b) * c</answer>", 0),
]


@care("countdown_reward")
@pytest.mark.parametrize("why, text, expected", THINK, ids=[row[0] for row in THINK])
def test_answer_tags(why, text, expected):
    got = countdown_reward(text, (2, 3, 5, 7), 24, style="think")
    assert got == expected, f"{why}: {text!r} must score {expected}, scored {got}"


@pytest.mark.parametrize("style", ["bare", "think", "ask"])
@pytest.mark.parametrize("settings_", SETTINGS)
def test_copying_the_prompt_is_never_rewarded(style, settings_):
    old = SETTINGS[settings_]
    task = Countdown(old.counts, old.high, old.targets, style)
    problems = task.held_out_problems(50) + [Problem((1, 2, 3), 9)]
    for problem in problems:
        prompt = task.prompt(problem)
        for text in (prompt, prompt + prompt, tagged(task, prompt), str(problem.target)):
            assert task.reward(problem, text) == 0, f"copied text is rewarded: {text!r}"
        assert all(str(n) in prompt for n in (*problem.numbers, problem.target)), prompt


def test_prompts_and_styles():
    x = Problem((4, 7, 2, 9), 24)
    assert LAPTOP.prompt(x) == "4 7 2 9,24="
    assert "<answer>" in LAPTOP.prompt(x, "think") and LAPTOP.prompt(x, "think") == PAPER.prompt(x)
    ask = Countdown(style="ask")
    assert ask.reward(x, "2*(9+7-4)") == 1, "style ask reads answers like bare"
    assert countdown_reward("2*(9+7-4)", *x, style="ask") == 1
    assert ask.reward(x, "<answer>2*(9+7-4)</answer>") == 0
    assert isinstance(LAPTOP.system, str) and LAPTOP.system
    for bad in (lambda: LAPTOP.prompt(x, "poem"), lambda: countdown_reward("1", (1,), 1, "poem")):
        with pytest.raises(ValueError, match="poem.*bare, think, ask"):
            bad()


# The generator


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("held_out", [False, True])
def test_generated_examples_are_right(name, held_out):
    task, rng = SETTINGS[name], random.Random(1)
    shown = 0
    for _ in range(2000):
        problem, answer = task.example(rng, held_out)
        assert oracle(answer, *problem) == 1, f"{answer} is not right for {problem}"
        assert task.reward(problem, tagged(task, answer)) == 1, f"{answer} refused for {problem}"
        assert len(problem.numbers) in task.counts and max(problem.numbers) <= task.high
        assert task.targets[0] <= problem.target <= task.targets[1], f"{problem} out of range"
        assert task.is_held_out(problem) == held_out, f"{problem} is of the other split"
        assert len(answer) <= 24 and " " not in answer, answer
        digits = "".join(c if c.isdigit() else " " for c in answer).split()
        shown += [int(d) for d in digits] == list(problem.numbers)
    # By chance 1/24 of 4 distinct numbers, 1/6 of 3, and more with repeated digits.
    assert shown < 600, f"{shown} of 2000 answers use the numbers in the order of the prompt"


def pairs(text):
    """Positions of matching brackets."""
    stack = []
    for i, char in enumerate(text):
        if char == "(":
            stack.append(i)
        elif char == ")":
            yield stack.pop(), i


def test_answers_have_no_needless_brackets():
    rng = random.Random(2)
    for _ in range(1000):
        problem, example = LAPTOP.example(rng)
        if len(set(problem.numbers)) < 4:  # 5-(1+7-7) is 5-1+7-7 by chance
            continue
        for answer in (example, *LAPTOP.solutions(problem)[:2]):
            for i, j in pairs(answer):
                less = answer[:i] + answer[i + 1 : j] + answer[j + 1 :]
                same = LAPTOP.canonical(less) == LAPTOP.canonical(answer)
                assert not same, f"{answer} has needless brackets: {less} is the same"


def test_example_depends_on_the_rng_alone():
    one, two = ([LAPTOP.example(random.Random(s)) for s in range(50)] for _ in range(2))
    assert one == two and len(set(one)) > 45, "same seed, same example; other seed, another"
    problems = [LAPTOP.problem(random.Random(s)) for s in range(50)]
    assert problems == [problem for problem, _ in one], "problem() is the first half of example()"


# The split


@pytest.mark.parametrize("name", SETTINGS)
def test_no_held_out_problem_in_training(name):
    task, rng = SETTINGS[name], random.Random(3)
    train = {key(task.problem(rng)) for _ in range(20_000)}
    held_out = task.held_out_problems(150)
    assert len({key(p) for p in held_out}) == 150, "held-out problems must be distinct"
    assert held_out == task.held_out_problems(150), "the same list on every call"
    assert held_out[:20] == task.held_out_problems(20), "a shorter list starts a longer one"
    assert not train & {key(p) for p in held_out}, "a held-out problem occurs in training"
    for p in held_out:
        for order in itertools.permutations(p.numbers):
            assert task.is_held_out(Problem(order, p.target)), f"order of {p} changes its split"


def test_split_is_the_same_on_every_machine():
    # Pinned: a change here silently moves training problems into everybody's evaluation.
    assert LAPTOP.held_out_problems(3) == PINNED
    everything = Countdown(held_out=0.5)
    rng, half = random.Random(4), Countdown(held_out=0)
    problems = {key(half.problem(rng)): None for _ in range(8000)}
    share = sum(everything.is_held_out(Problem(*p)) for p in problems) / len(problems)
    assert 0.47 < share < 0.53, f"held_out=0.5 keeps {share:.0%}"
    share = sum(LAPTOP.is_held_out(Problem(*p)) for p in problems) / len(problems)
    assert 0.08 < share < 0.12, f"held_out=0.1 keeps {share:.0%}"


PINNED = [((3, 6, 4, 6), 13), ((9, 9, 4, 4), 1), ((8, 3, 8, 2), 21)]


@pytest.mark.parametrize("kwargs, words", [
    ({"counts": ()}, "counts"), ({"counts": (1,)}, "counts"), ({"counts": (6,)}, "counts"),
    ({"counts": (2.5,)}, "counts"), ({"high": 0}, "high"), ({"high": 9.5}, "high"),
    ({"targets": (60, 1)}, "targets"), ({"targets": (1,)}, "targets"),
    ({"style": "poem"}, "poem"), ({"held_out": -0.1}, "held_out"), ({"held_out": 10}, "held_out"),
])
def test_bad_settings(kwargs, words):
    with pytest.raises(ValueError, match=words):
        Countdown(**kwargs)


def test_settings_at_the_edge_of_what_is_allowed():
    for kwargs in ({"counts": (2, 5)}, {"high": 1}, {"high": 10**6}, {"targets": (7, 7)}):
        Countdown(**kwargs)
    with pytest.raises(ValueError, match="high"):
        Countdown(high=10**6 + 1)


def test_a_task_by_itself_has_the_defaults_of_style_bare():
    task = {"counts": [*LAPTOP.counts], "high": LAPTOP.high, "targets": [*LAPTOP.targets]}
    assert task.items() <= rewards.DEFAULTS["bare"].items()


def test_impossible_requests_end_in_a_sentence(monkeypatch):
    monkeypatch.setattr(rewards, "MAX_TRIES", 2000)
    with pytest.raises(ValueError, match="ask for fewer"):
        Countdown(counts=(2,), high=3).held_out_problems(1000)
    with pytest.raises(ValueError, match="leaves no problem"):
        Countdown(held_out=0).problem(random.Random(0), held_out=True)
    with pytest.raises(ValueError, match="leaves no problem"):
        Countdown(held_out=1).problem(random.Random(0))
    with pytest.raises(ValueError, match="widen targets"):
        Countdown(counts=(2,), high=3, targets=(500, 600)).problem(random.Random(0))
    assert LAPTOP.solutions(Problem((1, 1), 7)) == []


# The solver and the canonical form, against an independent definition: all trees, and two of them
# are the same when a chain of single steps of commutativity and associativity leads from one to
# the other (union-find). Nothing is flattened or sorted here.


def all_trees(numbers):
    if len(numbers) == 1:
        return [numbers[0]]
    trees = []
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(range(len(numbers)), size):
            rest = [n for i, n in enumerate(numbers) if i not in chosen]
            for left in all_trees([numbers[i] for i in chosen]):
                trees += [(op, left, right) for right in all_trees(rest) for op in "+-*/"]
    return trees


def steps(tree):
    """Trees one step of commutativity or associativity away, anywhere in the tree."""
    if isinstance(tree, int):
        return
    op, left, right = tree
    plus, minus = "+-" if op in "+-" else "*/"
    if op == plus:
        yield plus, right, left  # a+b = b+a
    if not isinstance(left, int) and left[0] in (plus, minus):
        inner, a, b = left
        if inner == plus:
            yield plus, a, (op, b, right)  # (a+b)+c = a+(b+c), (a+b)-c = a+(b-c)
        else:
            yield minus, a, (minus if op == plus else plus, b, right)  # (a-b)-c = a-(b+c) ...
    yield from ((op, step, right) for step in steps(left))
    yield from ((op, left, step) for step in steps(right))


def classes(trees):
    """{tree: representative of its class}."""
    parent = {tree: tree for tree in trees}

    def find(tree):
        while parent[tree] != tree:
            parent[tree] = tree = parent[parent[tree]]
        return tree

    for tree in parent:
        for step in steps(tree):
            parent[find(step)] = find(tree)
    return {tree: find(tree) for tree in parent}


def spell(tree):
    return str(tree) if isinstance(tree, int) else f"({spell(tree[1])}{tree[0]}{spell(tree[2])})"


def tree_value(tree):
    if isinstance(tree, int):
        return Fraction(tree)
    a, b = tree_value(tree[1]), tree_value(tree[2])
    if a is None or b is None or (tree[0] == "/" and b == 0):
        return None
    return {"+": a + b, "-": a - b, "*": a * b}[tree[0]] if tree[0] != "/" else a / b


@pytest.mark.parametrize("numbers, count", [
    ((2, 3), 6), ((7, 7), 4), ((2, 3, 5), 68), ((2, 2, 3), None), ((11, 5, 5), None),
    ((4, 7, 2, 9), 1260), ((4, 4, 8, 3), None), ((1, 1, 2, 2), None), ((6, 6, 6, 6), None),
])
def test_solver_against_brute_force(numbers, count):
    cls = classes(all_trees(numbers))
    form = {tree: LAPTOP.canonical(spell(tree)) for tree in cls}
    assert None not in form.values()
    together = {(cls[tree], form[tree]) for tree in cls}
    merged = len(together) - len({f for _, f in together})
    split = len(together) - len({c for c, _ in together})
    assert merged == 0, f"{merged} pairs of different answers have one canonical form"
    assert split == 0, f"{split} pairs of equal answers have two canonical forms"
    if count is not None:
        assert len(together) == count, f"{len(together)} different expressions, not {count}"
    by_value = {}
    for tree in cls:
        by_value.setdefault(tree_value(tree), set()).add(form[tree])
    for target in range(-5, 101):
        got, want = LAPTOP.solutions(Problem(numbers, target)), sorted(by_value.get(target, ()))
        assert got == want, f"{numbers} -> {target}: solver {got}, brute force {want}"


def test_solutions_ignore_the_order_of_the_numbers():
    for order in itertools.permutations((4, 4, 8, 3)):
        assert LAPTOP.solutions(Problem(order, 24)) == LAPTOP.solutions(Problem((3, 4, 4, 8), 24))


@pytest.mark.parametrize("name", SETTINGS)
def test_solutions_are_right_and_canonical(name):
    task = SETTINGS[name]
    for problem in task.held_out_problems(30):
        known = task.solutions(problem)
        assert known, f"{problem} was generated, so it has an answer"
        for answer in known:
            assert oracle(answer, *problem) == 1, f"{answer} is not right for {problem}"
            assert task.canonical(tagged(task, answer)) == answer, f"{answer} is not canonical"


def test_examples_reach_every_order_of_the_operands():
    task, rng = Countdown(counts=(2,), high=2, targets=(3, 3), held_out=0), random.Random(8)
    drawn = {task.example(rng)[1] for _ in range(100)}
    assert drawn == {"1+2", "2+1"}, f"the warm start shows one order of a sum only: {drawn}"


@pytest.mark.parametrize("one, two, same", [
    ("1+2", "2+1", True), ("1*2", "2*1", True), ("1-2", "2-1", False), ("1/2", "2/1", False),
    ("1-(2-3)", "1-2+3", True), ("1-(2-3)", "3+1-2", True), ("1-(2+3)", "1-3-2", True),
    ("1/(2/3)", "1*3/2", True), ("1/(2*3)", "1/3/2", True), ("4*(1+2)", "(2+1)*4", True),
    ("2*3*4", "4*(3*2)", True), ("2-(3-(4-5))", "2+4-5-3", True), ("(1+2)", "1+2", True),
    ("1 + 2", "1+2", True), ("10+2", "2+10", True), ("1+2", "1+3", False),
    ("4*(1+2)", "4*1+4*2", False), ("(1-2)*(3-4)", "(2-1)*(4-3)", False),
    ("5*1", "5/1", False), ("12+3", "1+23", False), ("2+2*2", "(2+2)*2", False),
    ("8/(4/2)", "8/4/2", False), ("1-(2-3)*4", "1+(3-2)*4", False),
])
def test_what_canonical_identifies(one, two, same):
    a, b = LAPTOP.canonical(one), LAPTOP.canonical(two)
    assert (a == b) == same, f"{one} -> {a}, {two} -> {b}: must be {'one' if same else 'two'}"


def test_canonical_says_whether_an_answer_parses():
    for text in ("", "1+", "1 2", "-1", "1=1", "()", "(" * 99, "a", "1" * 999, None, 7):
        assert LAPTOP.canonical(text) is None, f"{text!r} does not parse"
    assert LAPTOP.canonical("5/0") == "5/0", "division by zero parses, it only has no value"
    assert PAPER.canonical("<answer>2 + 1</answer>") == "1+2"
    assert PAPER.canonical("2+1") is None, "without a tag there is no answer"


# Bounded: time, memory, and no exception on any text

HOSTILE = [
    "(" * 10**7, ")" * 10**7, "()" * 5 * 10**6, "1+" * 5 * 10**6, "9" * 10**7, " " * 10**7,
    "-" * 10**7, "<answer>" * 10**6, "</answer>" * 10**6, "<answer>" + "(" * 10**7 + "</answer>",
    "<answer></answer>" * 500_000, "\\boxed{" * 10**6, "\\boxed{" + "{" * 10**7, "{" * 10**7,
    "\\boxed{" + "9" * 10**7 + "}", "\\boxed{1}" * 10**6, "}" * 10**7, "\\" * 10**7,
    "\\boxed{\\frac{1}{" * 10**6, "\ud800" * 10**6, "\x00" * 10**7,
]
LINES = [
    "(" * 290, "(" * 29 + "1" + ")" * 29, "1/" * 140 + "0", "1/(" * 30 + "0" + ")" * 30,
    "9" * 290, "9*" * 140 + "9", "1-(" * 30 + "1" + ")" * 30, " " * 299 + "1", "-" * 290,
    "\\frac" * 50, "{" * 140 + "}" * 140, "(1," * 70 + "1" + ")" * 70, "1," * 140, "\\text{" * 40,
    "1 " * 140, "1 1/" * 60, "\\sqrt" * 50, "\\cup" * 60, "x=" * 100, "\\{" * 70 + "\\}" * 70,
    "1e999999999", "1e-999999999", "\\frac{1}{0}", "0/0", "." * 200, "," * 200,
    "1/" * 100, "^" * 99,
]


def everything(text):
    """All that reads a text."""
    return (
        countdown_reward(text, (1, 2, 3), 6), countdown_reward(text, (1, 2, 3), 6, "think"),
        LAPTOP.canonical(text), PAPER.canonical(text), math_reward(text, "1"), MATH.canonical(text),
    )


MATH = Math.__new__(Math)  # canonical needs no file


@pytest.mark.parametrize("text", HOSTILE, ids=[f"{t[:17]!a}" for t in HOSTILE])
def test_ten_megabytes_are_refused_at_once(text):
    start = time.perf_counter()
    got = everything(text)
    seconds = time.perf_counter() - start
    assert not any(got[:4]), f"{text[:20]!r}...: {got[:4]}"
    assert seconds < 2, f"{text[:20]!r}... took {seconds:.1f} s"


def milliseconds(f, *args):
    """Of this process alone, the best of three: other programs do not count."""
    times = []
    for _ in range(3):
        start = time.process_time()
        f(*args)
        times.append(1000 * (time.process_time() - start))
    return min(times)


def test_hostile_lines_take_milliseconds():
    for line in LINES:
        for text in (line, f"<answer>{line}</answer>", f"\\boxed{{{line}}}", line * 14):
            ms = milliseconds(everything, text) + milliseconds(math_reward, "\\boxed{1}", text)
            assert ms < 40, f"{text[:30]!r}... took {ms:.0f} ms; it should be well under 10"


def test_no_memory_is_kept():
    def attack(seed):
        rng = random.Random(seed)
        for line in LINES:
            everything(f"<answer>\\boxed{{{line}{rng.random()}}}</answer>")
        LAPTOP.solutions(LAPTOP.problem(rng))

    attack(0)
    tracemalloc.start()
    attack(1)
    before = tracemalloc.get_traced_memory()[0]
    for seed in range(2, 22):
        attack(seed)
    growth = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert growth < 100_000, f"{growth} bytes kept by 20 rounds of answers"


ANYTHING = st.text(st.characters(exclude_categories=()), max_size=400)  # lone surrogates included
PIECES = st.lists(st.sampled_from(
    [*string.digits, *"+-*/()[]{},.;=<>^_$%x \n\\", "<answer>", "</answer>", "\\boxed{", "\\frac",
     "\\text{", "\\sqrt", "\\{", "\\}", "\\cup", "\\in", "\\le", "\\pi", "\\circ", "1,234", "10"]),
    max_size=60).map("".join)


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(text=ANYTHING | PIECES, reference=ANYTHING | PIECES)
def test_nothing_raises_on_any_text(text, reference):
    for candidate in (text, f"<answer>{text}</answer>", f"\\boxed{{{text}}}"):
        for got in everything(candidate):
            assert got is None or isinstance(got, (str, float)), got
        assert math_reward(candidate, reference) in (0.0, 1.0)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(text=PIECES)
def test_a_boxed_text_equals_itself(text):
    boxed = rewards.last_boxed(f"\\boxed{{{text}}}")
    if boxed == text and MATH.canonical(f"\\boxed{{{text}}}"):
        assert math_reward(f"\\boxed{{{text}}}", f"\\boxed{{{text}}}") == 1, repr(text)


@pytest.mark.parametrize("text", [None, 3, 2.0, b"1+2", ["1+2"], {}, float("nan")])
def test_what_is_not_text_scores_zero(text):
    assert countdown_reward(text, (1, 2), 3) == countdown_reward(text, (1, 2), 3, "think") == 0
    assert math_reward(text, "3") == 0 and math_reward("\\boxed{3}", text) == 0


# Math: (what is boxed, reference, equal?)

EQUAL = [
    ("5", "5"), ("5", "5.0"), ("5.00", "5"), ("5.", "5"), ("05", "5"), ("+5", "5"), ("-5", "-5.0"),
    ("−5", "-5"), ("-0", "0"), ("0.5", ".5"), ("0.50", "\\frac{1}{2}"), ("1/2", "0.5"),
    ("\\dfrac{1}{2}", "\\frac{1}{2}"), ("\\tfrac{1}{2}", "0.5"), ("\\cfrac{1}{2}", "1/2"),
    ("\\frac12", "\\frac{1}{2}"), ("\\frac1{2}", "\\frac{1}{2}"), ("\\frac{1}2", "\\frac12"),
    ("\\frac{2}{4}", "\\frac{1}{2}"), ("-\\frac{1}{2}", "\\frac{-1}{2}"),
    ("\\frac{1}{-2}", "-\\frac12"), ("\\frac{-1}{-2}", "0.5"), ("\\frac{0.5}{2}", "0.25"),
    ("1\\frac{1}{2}", "\\frac{3}{2}"), ("1\\frac12", "1.5"), ("-1\\frac{1}{2}", "-1.5"),
    ("1 1/2", "3/2"), ("2 \\frac{3}{4}", "11/4"), ("\\frac{123}{7}", "123/7"), ("1,234", "1234"),
    ("1,234,567", "1234567"), ("1{,}234", "1234"), ("1,\\!234", "1234"), ("1\\,234", "1234"),
    ("12,345.50", "12345.5"), ("-1,234", "-1234"), ("$1,234$", "1234"), ("\\$5", "5"),
    ("\\$5.00", "5"), ("\\$1,000", "1000"), ("$5$", "5"), ("50\\%", "50"), ("50%", "50"),
    ("90^\\circ", "90"), ("90^{\\circ}", "90"), ("90°", "90"), ("90 \\text{ degrees}", "90^\\circ"),
    ("12 cm", "12"), ("12\\text{ cm}", "12"), ("12\\,\\text{cm}^2", "12"),
    ("12\\mathrm{~cm}", "12"), ("12 \\text{ cm}^{3}", "12"), ("5 dollars", "5"), ("7 units", "7"),
    ("3 \\text{ apples}", "3"), ("\\frac{1}{2}\\text{ hour}", "0.5"), ("10 minutes", "10"),
    (" 5 ", "5"), ("\\ 5\\ ", "5"), ("x = 5", "5"), ("x=5", "x = 5"), ("5", "x=5"), ("n=5", "5"),
    ("x=\\frac12", "0.5"), ("x_1=3", "3"), ("(x, y) = (1, 2)", "(1,2)"), ("y = 2x+1", "2x + 1"),
    ("\\text{Monday}", "Monday"), ("\\text{(B)}", "B"), ("(B)", "\\text{B}"), ("\\textbf{C}", "C"),
    ("\\mathrm{east}", "\\text{east}"), ("5\\text{ p.m.}", "5 \\text{ p.m.}"),
    ("\\sqrt2", "\\sqrt{2}"), ("3\\sqrt{2}", "3 \\sqrt 2"), ("3\\cdot\\sqrt{2}", "3\\sqrt2"),
    ("\\sqrt{3}/2", "\\frac{\\sqrt{3}}{2}"), ("\\frac{\\sqrt3}{2}", "\\dfrac{\\sqrt{3}}{2}"),
    ("\\frac{-\\sqrt{3}}{2}", "-\\frac{\\sqrt3}{2}"), ("\\pi/2", "\\frac{\\pi}{2}"),
    ("\\frac\\pi2", "\\frac{\\pi}{2}"), ("2\\pi", "2 \\pi"), ("x^{2}", "x^2"), ("2^{10}", "2^{10}"),
    ("a_{1}", "a_1"), ("2\\times3", "2 \\cdot 3"), ("x/2", "\\frac{x}{2}"), ("(1,2)", "( 1 , 2 )"),
    ("(1, 0.5)", "(1,\\frac12)"), ("\\left(1,2\\right)", "(1,2)"), ("[0,1)", "\\left[0, 1\\right)"),
    ("(-\\infty, 3]", "(-\\infty,3]"), ("(1,(2,3))", "(1.0,(2,3))"), ("x \\in [0,1]", "[0,1]"),
    ("(0,1)\\cup(2,3)", "(2,3) \\cup (0,1)"),
    ("(-\\infty,-\\frac12)\\cup(2,\\infty)", "(-\\infty,-0.5) \\cup (2,\\infty)"),
    ("\\{1,2,3\\}", "\\{3, 2, 1\\}"), ("\\{0.5\\}", "\\{\\frac12\\}"),
    ("\\left\\{1,2\\right\\}", "\\{2,1\\}"), ("1, 2", "2,1"), ("1,2", "\\{1,2\\}"),
    ("1 \\text{ and } 2", "1,2"), ("x=1 \\text{ or } x=2", "1, 2"), ("100, 200", "200, 100"),
    ("(1,2),(3,4)", "(3,4), (1,2)"), ("1; 2", "1,2"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ("12_5", "12_{5}"), ("\\sqrt2.", "\\sqrt{2}"), ("5", "\\boxed{5}"),
    ("5", "so it is \\boxed{5}."), ("\\displaystyle 5", "5"),
    ("\\frac{a+b}{c}", "\\dfrac{a + b}{c}"), ("x^2+2x+1", "x^2 + 2x + 1"), ("1e5", "1e5"),
    ("x\t=\n5", "x=5"), ("1,\n2", "2,1"), ("\\(5\\)", "5"), ("x\\!+\\!1", "x+1"),
    ("∅", "\\emptyset"),
    ("\\frac{-x}{y}", "-\\frac{x}{y}"), ("2\\cdot(x+1)", "2(x+1)"), ("90\\degree", "90"),
    ("x≤5", "x\\le5"),
    # lists of sets: an answer that begins and ends with a brace is not always one set
    ("\\{1,2\\},\\{3,4\\}", "\\{3,4\\},\\{1,2\\}"),
    ("\\{\\{1,2\\},\\{3\\}\\}", "\\{\\{3\\},\\{2,1\\}\\}"),
    ("\\{1\\}\\cup\\{2\\}", "\\{2\\}\\cup\\{1\\}"), ("(1,2],(3,4]", "(3,4], (1,2]"),
    # thousands with blanks, LaTeX's narrow ones included
    ("11111111100", "11,\\! 111,\\! 111,\\! 100"), ("1 000", "1000"),
    ("12\\ 345\\ 678", "12345678"), ("1~234", "1234"), ("16,\\!386.20", "16386.2"),
    ("1{,}234{,}567", "1234567"), ("-1\\,234", "-1234"), ("(1{,}234, 5)", "(1234,5)"),
    ("1,234, 2", "2; 1234"), ("x=1,234", "1234"), ("\\$3\\,000", "3000"),
    ("\\frac{1\\,000}{3}", "\\frac{1000}{3}"), ("x>1,234", "x>1234"),
    # signs that may be left out
    ("[1,\\infty)", "[1,+\\infty)"), ("(-\\infty,+\\infty)", "(-\\infty, \\infty)"),
    ("+\\frac12", "0.5"), ("(+1,+2)", "(1,2)"), ("x=+\\sqrt2", "\\sqrt{2}"), ("x>+5", "x > 5"),
    # matrices
    ("\\begin{pmatrix} \\frac{1}{5} \\\\ -\\frac{18}{5} \\end{pmatrix}",
     "\\begin{pmatrix} 1/5 \\\\ -18/5 \\end{pmatrix}"),
    ("\\begin{bmatrix}1&0.5\\\\0&1\\end{bmatrix}",
     "\\begin{pmatrix} 1 & \\dfrac12 \\\\ 0 & 1 \\\\ \\end{pmatrix}"),
    ("\\left[\\begin{array}{cc}1&2\\\\3&4\\end{array}\\right]",
     "\\begin{bmatrix}1 & 2\\\\3 & 4\\end{bmatrix}"),
    ("\\left(\\begin{matrix}x/2\\\\1\\end{matrix}\\right)",
     "\\begin{pmatrix}\\frac{x}{2}\\\\1\\end{pmatrix}"),
    # names before =
    ("f(x) = 2x + 3", "2x+3"), ("\\theta = 30^\\circ", "30"), ("f^{-1}(x)=2x", "2x"),
    ("S_{10}=55", "55"), ("AB=5", "5"), ("\\angle ABC = 90^\\circ", "90"), ("P(A)=\\frac12", "0.5"),
    ("y'=2x", "2x"), ("\\alpha=1,\\alpha=2", "2, 1"), ("a=4,\\,-8,\\,-10", "-10,-8,4"),
    ("(x, y) = (5, 8) \\quad \\text{and} \\quad (8, 5)", "(5,8),(8,5)"),
    # commands for words, and for brackets of some size
    ("\\textrm{east}", "\\text{east}"), ("\\textnormal{B}", "B"), ("\\textit{odd}", "odd"),
    ("\\bigl(1,2\\bigr)", "(1,2)"), ("\\Big[0,1\\Big)", "[0,1)"), ("12\\textrm{ cm}", "12"),
    ("125\\textnormal{ miles}", "125"), ("(5)", "5"), ("(B)", "B"),
    # units after a symbol, with a full stop, of two words; percent as a word
    ("99\\pi", "99\\pi \\text{ square inches}"), ("12\\text{ cm.}", "12"),
    ("12 \\text{ cm}.", "12"), ("5\\,\\text{m}", "5"), ("20\\pi \\mathrm{~cm}^2", "20\\pi"),
    ("60\\text{ miles per hour}", "60"), ("9\\text{ m/s}^2", "9"), ("4 square units", "4"),
    ("\\frac12\\text{ hour}", "0.5"), ("0.06 \\text{ yuan}", "0.06"), ("50 percent", "50\\%"),
    ("28\\text{ percent}", "28"), ("28 pct", "28\\%"), ("4:30\\text{ P.M.}", "4:30\\text{ p.m.}"),
    ("4:30 AM", "4:30\\text{ a.m.}"),
    # lists in words
    ("1, 2, \\text{ and } 3", "1,2,3"), ("19, 46, and 82", "19,46,82"),
    ("(11,7)or(7,11)", "(7,11),(11,7)"), ("5 or 6", "6,5"),
    ("x=1 \\quad \\text{or} \\quad x=2", "1, 2"),
    ("a_{37} = 19, \\quad a_3 = 2", "a_3=2,a_{37}=19"), ("1, \\textrm{or } 2", "1,2"),
    ("(0;-2;0)", "(0, -2, 0)"),
    # relations
    ("x \\geq 5", "x \\ge 5"), ("x\\geqslant5", "x>=5"), ("x \\leqslant 5", "x \\le 5"),
    ("x<=5", "x\\leq 5"), ("x \\ne 3", "x\\neq 3"), ("x \\lt 3", "x<3"), ("x \\gt 3", "x > 3"),
    ("x≥5", "x\\ge5"), ("x != 3", "x \\neq 3"), ("-1/2 < x \\le 3", "-\\frac12<x\\leq3"),
    ("x<1 \\text{ or } x>2", "x < 1 or x > 2"), ("\\varnothing", "\\emptyset"),
    ("(0,1) U (2,3)", "(0,1)\\cup(2,3)"),
    # quotients and multiples of a symbol, also inside of lists and after x=
    ("x = \\pi/2", "\\frac{\\pi}{2}"), ("(\\pi/2, 1)", "(\\frac{\\pi}{2},1)"),
    ("\\pi/6,\\pi/3", "\\frac\\pi3, \\frac\\pi6"), ("\\frac34\\pi", "\\frac{3\\pi}{4}"),
    ("3\\pi/4", "0.75\\pi"), ("\\frac{9}{4}\\pi", "\\frac94\\pi"), ("\\frac12x", "x/2"),
    ("\\frac{2\\sqrt3}{3}", "\\frac23\\sqrt{3}"), ("x=1/2,y=3/4", "y=0.75, x=\\frac12"),
    ("\\{\\pi/3\\}", "\\{\\frac{\\pi}{3}\\}"), ("\\frac{-3i}{2}", "-1.5i"),
    ("\\frac{x^2}{4}", "x^2/4"), ("1\\pi", "\\pi"),
    ("\\sqrt3/3, -\\sqrt3/3", "-\\frac{\\sqrt3}3,\\frac{\\sqrt3}3"),
    # powers of ten
    ("4.5 \\times 10^{33}", "4.5e33"), ("8.7\\times10^8", "8.7e8"), ("3e6", "3000000"),
    ("2.75 \\cdot 10^{11}", "2.75e11"), ("1.5 \\times 10^{-3}", "0.0015"), ("1e5", "100000"),
    ("3 \\times 10^8", "300000000"), ("3E+8", "3e8"), ("10^{-4}", "0.0001"), ("10^4", "10000"),
    ("3 × 10⁸", "3e8"), ("3 x 10^8", "3·10^8"), ("3*10**8", "3*10^8"), ("-2.5e-3", "-0.0025"),
    ("3 \\times 10^{8} \\text{ m/s}", "3e8"), ("(3\\times10^8, 2)", "(3e8,2)"),
    ("1e-05", "10^{-5}"),
    ("x = 3\\times10^8", "3e8"), ("\\frac{10^3}{3}", "1000/3"), ("10^33", "1e33"),
    ("-10^4", "-10000"), ("10^-4", "0.0001"),
    ("2{\\times}10^5", "2e5"), ("3.0\\mathrm{e}8", "3e8"), ("3\\times 10^8, 2", "2, 300000000"),
    # words that are a whole answer
    ("\\text{yes}", "Yes"), ("\\text{YES.}", "Yes"), ("\\text{No}", "no"), ("\\text{true}", "True"),
    ("False", "false"), ("\\mathbf{Yes}", "yes"), ("**Yes**", "yes"),
    ("\\operatorname{Yes}", "yes"),
    ("\\text{Even}", "even"), ("Diverges", "\\text{diverges}"), ("\\text{None}", "none"),
    ("\\text{No solution}", "no solution"),
    # type, and characters for commands
    ("\\mathbf{42}", "42"), ("\\boldsymbol{42}", "42"), ("\\mathbf{(D)}", "D"), ("{\\bf 5}", "5"),
    ("\\bm{\\frac{1}{2}}", "0.5"), ("\\mathbf 5", "5"), ("\\textsf{B}", "B"),
    ("\\color{red}{5}", "5"),
    ("\\underline{5}", "5"), ("3π", "3\\pi"), ("π/2", "\\frac{\\pi}{2}"), ("2pi", "2\\pi"),
    ("2√3", "2\\sqrt{3}"), ("√{2}", "\\sqrt{2}"), ("√12", "\\sqrt{12}"), ("√(x)", "\\sqrt x"),
    ("2*sqrt(3)", "2\\sqrt{3}"), ("\\sqrt[3]2", "\\sqrt[3]{2}"), ("(−∞, 3)", "(-\\infty,3)"),
    ("[1, ∞)", "[1,\\infty)"), ("½", "0.5"), ("2½", "2.5"), ("x²", "x^2"), ("x⁻¹", "x^{-1}"),
    ("x**2+1", "x^2+1"), ("2^(10)", "2^{10}"), ("3×4", "3\\times4"), ("6÷4", "1.5"),
    ("θ=30°", "30"),
    ("x∈[0,1]", "[0,1]"), ("x ≠ 3", "x\\neq3"), ("1\u202f234", "1234"), ("5\u00a0", "5"),
    ("（1，2）", "(1,2)"), ("{1, 2}", "\\{2,1\\}"), ("\\nicefrac{1}{2}", "1/2"), ("€5", "5"),
    ("ln(2)", "\\ln(2)"), ("sin x", "\\sin x"), ("\\infty", "infinity"),
    # units beside the words that look like them
    ("7 \\text{ months}", "7"), ("7 \\text{ teeth}", "7"), ("7 \\text{ years old}", "7"),
    ("7 \\text{ students}", "7"), ("7 \\text{ km/h}", "7"), ("7 \\text{ seconds}", "7"),
]
UNEQUAL = [
    ("5", "6"), ("5", "-5"), ("5", "50"), ("5", "0.5"), ("0.5", "0.05"), ("1/2", "2/1"),
    ("1/3", "0.33"), ("0.333333333333", "\\frac13"), ("3.14", "\\pi"),
    ("\\frac{1}{2}", "\\frac{1}{3}"), ("1\\frac{1}{2}", "\\frac{1}{2}"),
    ("1\\frac12", "\\frac{11}{2}"), ("1 1/2", "11/2"), ("-1\\frac12", "-\\frac12"),
    ("-\\frac12", "\\frac12"), ("\\frac{1}{0}", "0"), ("1/0", "1"), ("0/0", "1"),
    ("1,234", "1.234"), ("1,234", "1"), ("1,23", "123"), ("12,34", "1234"), ("(1,234)", "1234"),
    ("(1,234)", "(1234)"), ("\\{1,234\\}", "1234"), ("100, 200", "100200"), ("1,2", "12"),
    ("1 2", "12"), ("1 2 3", "123"), ("50\\%", "0.5"), ("x=5", "y=5"), ("x=5", "x=6"),
    ("x=1,y=2", "1,2"), ("x=1,y=2", "x=2,y=1"), ("5", "5x"), ("2x", "2"), ("5i", "5"), ("x", "5"),
    ("5m", "5"), ("5\\text{ a.m.}", "5\\text{ p.m.}"), ("2\\text{A}", "2\\text{B}"),
    ("\\text{A}", "\\text{B}"), ("A", "a"), ("\\text{Monday}", "Sunday"), ("\\sqrt{2}", "2"),
    ("\\sqrt{2}", "1.41421356"), ("\\sqrt2", "\\sqrt3"), ("\\sqrt{23}", "\\sqrt{2}3"),
    ("x^2", "x2"), ("x^{23}", "x^23"), ("2^{10}", "1024"), ("2\\times3", "6"),
    ("\\frac{-1+\\sqrt3}{2}", "-\\frac{1+\\sqrt3}{2}"), ("2\\cdot\\frac12", "2\\frac12"),
    ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("[0,1)", "[0,1]"), ("(0,1]", "(0,1)"),
    ("(1,2)", "1,2"), ("(1,2)", "\\{1,2\\}"), ("(1,2,3)", "(1,2)"), ("\\{1,2\\}", "\\{1,3\\}"),
    ("\\{1,2\\}", "\\{1,2,3\\}"), ("1,2", "1"), ("1", "1,2"), ("1,2,3", "1,2"),
    ("(1,2),(3,4)", "(1,3),(2,4)"), ("(0,1)\\cup(2,3)", "(0,1)"), ("(-\\infty,3]", "(-\\infty,3)"),
    ("12_5", "12"), ("12_5", "125"), ("", "5"), (" ", "5"), ("", ""), ("\\text{}", "5"), ("٥", "5"),
    ("５", "5"), ("²", "2"), ("1_000", "1000"), ("0x5", "5"), ("nan", "0"),
    ("inf", "\\infty"), ("5 or 6", "5"), ("5\\text{ or }6", "5"), ("5 = 5", "5"),
    ("\\left(1,2\\right)", "(1,3)"), ("the answer is 5", "5"), ("5.5.5", "5.5"), ("--5", "5"),
    ("5/", "5"), ("/5", "5"), (".", "0"), ("-", "0"), ("+", "0"), ("1//2", "0.5"), ("1/2/1", "0.5"),
    ("5!", "5"),
    # blanks that glue digits or numbers
    ("2 \\quad 3", "23"), ("2 \\quad 345", "2345"), ("2\\;345", "2345"), ("1\\,23", "123"),
    ("1\\,2345", "12345"), ("1\\,\\,2", "12"), ("1 2/3", "12/3"), ("1 234/5", "1234/5"),
    ("1234 567", "1234567"), ("0 123", "123"), ("2~3", "23"), ("1,\\,234", "1234"),
    ("2\\text{ }3", "23"), ("2\\text{}3", "23"),
    # words and letters that are not units
    ("2\\mathrm{i}", "2"), ("2\\text{i}", "2"), ("3\\mathrm{e}", "3"), ("5\\text{x}", "5"),
    ("4:30\\text{ P.M.}", "4:30\\text{ A.M.}"), ("4\\text{ PM}", "4\\text{ AM}"),
    ("4\\text{ P.M.}", "4"), ("3\\text{ million}", "3"), ("3\\text{ Billion}", "3"),
    ("3 million", "3"), ("2\\text{ dozen}", "2"), ("5\\text{ hundred dollars}", "5"),
    ("5\\text{ or more}", "5"), ("5\\text{ is not}", "5"), ("5\\text{ at most}", "5"),
    ("5\\text{ if even}", "5"), ("2\\text{ north}", "2\\text{ south}"), ("7\\text{ mod}", "7"),
    ("12\\text{ R }3", "12"), ("3\\text{ or 4}", "3"),
    ("2\\text{ units left}", "2\\text{ units right}"), ("5\\text{ not}", "5"),
    # commas: decimal ones are not thousands, nor lists where they follow -0
    ("245", "0,245"), ("0{,}245", "245"), ("01,234", "1234"), ("-0,245", "0,245"),
    ("1,234,56", "123456"), ("1,234, 2", "1, 2, 234"),
    # entries that come twice
    ("16,3,1", "16,3,1,1"), ("\\{1,1\\}", "\\{1\\}"), ("5,5", "5"), ("(1,2),(1,2)", "(1,2)"),
    ("x=1,x=1", "1"),
    # and, or; names; brackets; relations
    ("x<1\\text{ or }x>2", "x<1\\text{ and }x>2"), ("x \\ge 5", "x>5"), ("x\\ge5", "x\\le5"),
    ("x\\ne5", "x=5"), ("x\\ne5", "5"), ("f(x)=2x", "g(x)=2x"), ("\\theta=5", "\\alpha=5"),
    ("AB=5", "CD=5"), ("\\pi=3", "3"), ("2x=6", "6"), ("no = 5", "5"), ("x>5", "5"),
    ("\\{1\\}\\{2\\}", "\\{1,2\\}"), ("(1)(2)", "(2)"), ("(1)(2)", "2"), ("|x|+5", "|x|5"),
    ("x^{+}", "x"), ("[5]", "5"),
    ("\\begin{vmatrix}1\\end{vmatrix}", "\\begin{pmatrix}1\\end{pmatrix}"),
    ("\\begin{pmatrix}1&2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("\\begin{pmatrix}1&2\\end{pmatrix}", "\\begin{pmatrix}2&1\\end{pmatrix}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "(1,2)"),
    # multiples of a symbol
    ("\\frac{1}{2}x", "\\frac{1}{2x}"), ("1/2x", "\\frac12x"), ("1/2x", "\\frac{1}{2x}"),
    ("\\frac{\\pi}{2}", "\\frac{2}{\\pi}"), ("0x", "x"), ("2\\frac{1}{2}\\pi", "\\pi"),
    ("\\frac{x}{0}", "x"), ("\\sqrt{2}3", "3\\sqrt{2}x"), ("ab/2", "a/2"), ("-x", "x"),
    ("\\frac{-x}{2}", "\\frac x2"),
    # powers of ten that are others, or bound to what stands beside them
    ("4.5 \\times 10^{32}", "4.5e33"), ("3\\times10^{-8}", "3e8"), ("10^{x}", "10"),
    ("10^4!", "10000"),
    ("2e - 3", "0.002"), ("3e", "3"), ("1/3\\times10^8", "\\frac{1}{300000000}"),
    ("x10^4", "10000"), ("10^{2^2}", "100"), ("10^{1/2}", "10"), ("10_4", "10000"),
    ("210^2", "2100"), ("3e8", "38"), ("10^1234", f"1{'0' * 123}4"), ("10^2^3", "100^3"),
    ("2 10^4", "20000"), ("10^4", "10^{-4}"), ("1e9999", "1"),
    # words
    ("\\text{no}", "Yes"), ("\\text{true}", "No"), ("True", "yes"), ("b", "B"), ("x", "X"),
    ("AB", "ab"), ("ABC", "abc"), ("none", "no"), ("N", "no"),
    # type
    ("\\mathbf{42}", "24"), ("2√3", "2\\sqrt{2}"), ("23", "2\\sqrt{3}"), ("√23", "2\\sqrt{3}"),
    ("\\mathbf{i}", "j"), ("3π", "3"), ("(−∞, 3)", "(\\infty,3)"), ("x²", "x2"), ("½", "12"),
    ("2½", "1"), ("x^(23)", "x^23"), ("\\mathbb{N}", "N"), ("{1,2}", "(1,2)"),
    ("{1,234}", "1,234,5"),
    ("√2.5", "\\sqrt{2}.5"), ("\\sin x/2", "\\frac{\\sin x}{2}"),
]
CHANGED = (  # words that change the number before them, so that they are no units
    "fifths;sixth;sevenths;ninths;tenths;hundredths;thousandths;millionths;twentieths;sixteenths;"
    "ten-thousandths;hundred;millions;lakh;crores;score;pairs;dozen;gross;couple;repeating;"
    "recurring;divided by ten;multiplied by ten;times ten;squared;cubed;doubled;and a half;half;"
    "quarters;plus one;minus 2;mod 5;base ten;factorial;over two;negative;twenty;nineteen;seven;"
    "per mille;ppm;to the power of ten;th;nd;root two;less;more;percent less").split(";")
UNEQUAL += [(f"7 \\text{{ {word}}}", "7") for word in CHANGED]
CAP = rewards.MAX_ANSWER
# (why, whole text, reference, expected)
TEXTS = [
    ("sentence", "So the answer is \\boxed{5}.", "5", 1),
    ("last box counts", "\\boxed{4} no, \\boxed{5}", "5", 1),
    ("last box counts, wrong", "\\boxed{5} no, \\boxed{4}", "5", 0),
    ("a box cut off at the end is passed over", "\\boxed{5} and \\boxed{4", "5", 1),
    ("only a box cut off", "\\boxed{5", "5", 0),
    ("a long box cut off", "\\boxed{5} and \\boxed{" + "4" * CAP, "5", 1),
    ("a box too long, cut off or not", "\\boxed{5} and \\boxed{" + "4" * (CAP + 1), "5", 0),
    ("cut inside a fraction", "\\boxed{\\frac{1}{2}", "\\frac{1}{2}", 0),
    ("nested braces", "\\boxed{\\frac{1}{\\frac{1}{2}}}", "\\frac{1}{\\frac{1}{2}}", 1),
    ("escaped braces", "\\boxed{\\{1,2\\}}", "\\{1,2\\}", 1),
    ("escaped brace alone", "\\boxed{[1,2\\}}", "[1,2]", 0),
    ("open brace of cases", "\\boxed{\\left\\{x\\\\y\\right.}", "\\left\\{x\\\\y\\right.", 1),
    ("box in a box", "\\boxed{\\boxed{5}}", "5", 1),
    ("dollars around", "$\\boxed{5}$", "5", 1),
    ("a blank before the brace", "$\\boxed {12}$", "12", 1),
    ("a blank before another's brace", "\\boxed{12} or \\boxed {13}", "12", 0),
    ("text after", "\\boxed{5}" + " and so on" * 1000, "5", 1),
    ("long text before", "We see. " * 10_000 + "\\boxed{5}", "5", 1),
    ("no box", "5", "5", 0), ("empty", "", "5", 0), ("empty box", "\\boxed{}", "5", 0),
    ("empty box, empty reference", "\\boxed{}", "", 0), ("fbox", "\\fbox{5}", "5", 0),
    ("the prompt's own box", MATH_ASK := "final answer within \\boxed{}.", "5", 0),
    ("GSM8K ending is not a box", "#### 5", "5", 0),
    ("huge integer", "\\boxed{" + "9" * CAP + "}", "9" * CAP, 1),
    ("longer than the cap", "\\boxed{" + "9" * (CAP + 1) + "}", "9" * (CAP + 1), 0),
    ("right, then longer than the cap", "\\boxed{5}\\boxed{" + "9" * 5000 + "}", "5", 0),
    ("exponent bomb", "\\boxed{1e999999999}", "5", 0),
    ("NUL", "\\boxed{5\x00}", "5", 0), ("lone surrogate", "\\boxed{5\ud800}", "5", 0),
    ("many answers", "\\boxed{1,2,3,4,5,6,7,8,9}", "5", 0),
    ("all answers at once", "\\boxed{4 or 5 or 6}", "5", 0),
    ("reference repeated", "\\boxed{5,5}", "5", 0),
    ("code", "\\boxed{__import__('os').getcwd()}", "5", 0),
    ("every split of two runs of digits tried", f"\\boxed{{{'1' * 100}/{'1' * 190}x,2}}", "5", 0),
]
ROWS = [(f"\\boxed{{{a}}}", b, 1) for a, b in EQUAL] + [(f"\\boxed{{{b}}}", a, 1) for a, b in EQUAL]
ROWS += [(f"\\boxed{{{a}}}", b, 0) for a, b in UNEQUAL]
ROWS += [(f"\\boxed{{{b}}}", a, 0) for a, b in UNEQUAL]
ROWS += [row[1:] for row in TEXTS]


@pytest.mark.parametrize("text, answer, expected", ROWS, ids=range(len(ROWS)))
def test_math_table(text, answer, expected):
    got = math_reward(text, answer)
    assert got == expected, f"{text[-80:]!r} against {answer!r} must score {expected}, scored {got}"


def test_rationals_agree_with_fractions():
    rng = random.Random(6)

    def spellings(q):
        sign, a, b = "-" if q < 0 else "", abs(q.numerator), q.denominator
        k = rng.randint(1, 9)
        yield f"{sign}\\frac{{{a * k}}}{{{b * k}}}"
        yield f"{sign}{a}/{b}"
        if a > b:
            yield f"{sign}{a // b}\\dfrac{{{a % b}}}{{{b}}}"
        if 10**6 % b == 0:
            yield f"{float(q):.6f}"

    for _ in range(600):
        p, q = (Fraction(rng.randint(-40, 40), rng.choice([1, 2, 3, 4, 5, 8, 10])) for _ in "pq")
        for one, two in itertools.product(spellings(p), spellings(q)):
            got = math_reward(f"\\boxed{{{one}}}", two)
            assert got == (p == q), f"{one} against {two} scored {got}"


def test_powers_of_ten_agree_with_fractions():
    rng, equal = random.Random(11), 0
    for _ in range(3000):
        said = []
        for _ in range(2):
            digits, exponent = rng.choice(["1", "2", "2.5", "0.25", "25"]), rng.randint(-4, 4)
            way = rng.choice(["{} \\times 10^{{{}}}", "{}\\cdot 10^{{{}}}", "{}e{}", "{}E{:+d}",
                              "{}*10**{}", "{} × 10^{{{}}}", "{} \\times 10^{}"])
            value = Fraction(digits) * Fraction(10) ** exponent
            written = way.format(digits, exponent)
            plain = rng.random() < 0.2 and 10**6 % value.denominator == 0
            said.append((value, f"{float(value):.8f}" if plain else written))
        (one, a), (two, b) = said
        got = math_reward(f"\\boxed{{{a}}}", b)
        assert got == (one == two), f"{a} against {b} must score {one == two:.0f}, scored {got}"
        equal += one == two
    assert equal > 100, "one-sided test"


def spellings(value, rng):
    """One way to write a Fraction, or (kind, *parts): a set, a matrix, brackets such as "[)"."""
    blank = rng.choice(["", " ", "\\,", "\\ "])
    if isinstance(value, Fraction):
        sign, a, b = "-" if value < 0 else rng.choice("+ "), abs(value.numerator), value.denominator
        k, frac = rng.randint(1, 3), rng.choice(["\\frac", "\\dfrac", "\\tfrac"])
        ways = [f"{sign}{frac}{{{a * k}}}{{{b * k}}}", f"{sign}{a}/{b}"]
        if b == 1:
            comma = rng.choice(["\\,", "{,}", ",\\!", " "])
            ways += [f"{sign}{a}", f"{sign}{a}.0", sign + f"{a:,}".replace(",", comma)]
        if 1000 % b == 0:
            ways += [f"{sign}{a / b:.3f}"]
        if a > b > 1:
            ways += [f"{sign}{a // b}\\frac{{{a % b}}}{{{b}}}", f"{sign}{a // b} {a % b}/{b}"]
        if a < 10 and b < 10:
            ways += [f"{sign}\\frac{a}{b}", f"{sign}\\frac{{{a}}}{b}"]
        return rng.choice(ways)
    kind, *parts = value
    if kind == "set":
        parts = rng.sample(parts, len(parts))
    written = [spellings(part, rng) for part in parts]
    if kind == "matrix":
        style = rng.choice("bp")
        return f"\\begin{{{style}matrix}}{blank}{'&'.join(written)}{blank}\\end{{{style}matrix}}"
    if kind == "set":
        return "\\{" + rng.choice([", ", ",  ", ",\\ "]).join(written) + blank + "\\}"
    left, right = rng.choice([("", ""), ("\\left", "\\right"), ("\\bigl", "\\bigr")])
    return left + kind[0] + blank + ", ".join(written) + blank + right + kind[1]


def test_two_ways_to_write_are_equal_exactly_where_the_values_are():
    """Kills rules that make different answers equal, or equal ones different, where they meet."""
    rng, equal = random.Random(9), 0

    def some(depth):
        if depth == 0 or rng.random() < 0.3:
            top = rng.choice([*range(-9, 10), 1234, -56789])
            return Fraction(top, rng.choice([1, 1, 2, 3, 4, 5]))
        kind = rng.choice(["set", "matrix", "()", "[)", "[]"])
        inner = 0 if kind == "matrix" else depth - 1
        return (kind, *(some(inner) for _ in range(rng.randint(2, 3))))

    def plain(value):
        if isinstance(value, Fraction):
            return value
        kind, *parts = value
        parts = [plain(part) for part in parts]
        return (kind, *(sorted(parts, key=repr) if kind == "set" else parts))

    for _ in range(4000):
        one = some(rng.randint(0, 2))
        two = one if rng.random() < 0.5 else some(rng.randint(0, 2))
        a, b = spellings(one, rng), spellings(two, rng)
        got, want = math_reward(f"\\boxed{{{a}}}", b), plain(one) == plain(two)
        assert got == want, f"{a} against {b} must score {want:.0f}, scored {got}"
        equal += want
    assert equal > 1500, "one-sided test"


PARTS = [
    *"0 1 2 12 345 0.5 .5 1,234 1{,}234 x y i e n A - + = < > / * ^2 ^{10} _5 ! & . , ; ²".split(),
    *"( ) [ ] { } \\{ \\} ٥ − ∪ \\\\ \\pi \\infty +\\infty \\sqrt2 \\sqrt{3} \\sqrt".split(),
    *"\\frac12 \\frac{1}{2} \\frac \\dfrac{ 3\\pi/4 x= f(x)= \\theta= \\in \\le \\geq !=".split(),
    *"\\cup \\quad \\, \\! \\; ~ \\left \\right \\bigl \\cdot \\times \\boxed{ \\mathrm{i}".split(),
    *"\\text{ ^\\circ \\% \\$ \\begin{pmatrix} \\end{pmatrix} \\begin{bmatrix}".split(),
    *"\\begin{array}{cc} \\end{array} percent a.m.".split(),
    *"√ √( sqrt( ½ ⁸ 10^ *10^{8} e33 ** \\mathbf{ \\boldsymbol{ π ∞ × Yes pi \\bf {".split(),
    " ", "  ", "\n", " and ", " or ", " cm^2", "\\text{ cm}", "\\text{ and }", "\\text{ million}",
    "\\text{ P.M.}", "11,\\! 111",
]
AROUND = [
    ("(", ")"), ("[", ")"), ("\\{", "\\}"), ("{", "}"), ("\\left(", "\\right]"), ("\\text{", "}"),
    ("\\frac{", "}{2}"), ("\\begin{pmatrix}", "\\end{pmatrix}"), ("\\sqrt{", "}"),
]


def latex(rng, depth):
    """Something like an answer, by a model that has not learnt to close what it opens."""
    shape = rng.random()
    if depth == 0 or shape < 0.4:
        return rng.choice(PARTS)
    if shape < 0.7:
        left, right = rng.choice(AROUND)
        return left + latex(rng, depth - 1) + right
    if shape < 0.8:  # one thing again and again is slow for regular expressions, deep in recursion
        (left, right), one, other = rng.choice(AROUND), rng.choice(PARTS), rng.choice(PARTS)
        n = rng.randint(2, 120)
        nested = (left + one + ",") * n
        return rng.choice([(one + other) * n, nested, nested + right * n])
    return rng.choice([",", ", ", ";", "", " ", "\\cup ", "\\\\", "&"]).join(
        latex(rng, depth - 1) for _ in range(rng.randint(2, 4)))


def test_latex_of_any_shape_neither_raises_nor_takes_long():
    """Kills endless recursion on lists of sets, deep nesting, and runs split in every way."""
    rng = random.Random(10)
    for _ in range(4000):
        text, reference = (latex(rng, rng.randint(1, 6))[: rng.choice([CAP, 50])] for _ in "tr")
        for candidate in (text, f"\\boxed{{{text}}}"):
            start = time.process_time()
            got = math_reward(candidate, reference)
            ms = 1000 * (time.process_time() - start)
            if ms > 10:  # the clock of a busy machine: look again
                ms = milliseconds(math_reward, candidate, reference)
            assert got in (0.0, 1.0)
            assert ms < 30, f"{candidate!r} against {reference!r} took {ms:.0f} ms"


# Files


def write(tmp_path, *lines, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), "utf-8")
    return str(path)


def load_problems(path):
    return Problems(path, rewards.read_math, held_out=1.0).held_out


@pytest.mark.parametrize("record, question, answer", [
    ({"problem": "1+1?", "answer": "2"}, "1+1?", "2"),
    ({"question": "1+1?", "answer": 2}, "1+1?", "2"),
    ({"prompt": "1+1?", "solution": "2"}, "1+1?", "2"),
    ({"problem": "q", "solution": "We see \\boxed{1}, so \\boxed{\\frac{1}{2}}."}, "q",
     "\\frac{1}{2}"),
    ({"problem": "q", "solution": "long \\boxed{1}", "answer": "7"}, "q", "7"),
    ({"question": "q", "answer": "2+2=4 <<2+2=4>>\n#### 1,234"}, "q", "1,234"),
    ({"question": "q", "answer": "\\boxed{9}"}, "q", "9"),
    ({"question": "q", "final_answer": ["$9$"], "solution": ["..."]}, "q", "$9$"),
    ({"problem": "é \\text{中}", "answer": "5", "level": 3}, "é \\text{中}", "5"),
    ({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
      "label": "34"}, "q", "34"),
    ({"prompt": [{"role": "user", "content": "q"}], "ability": "math",
      "reward_model": {"style": "rule", "ground_truth": "\\frac12"}}, "q", "\\frac12"),
    ({"prompt": [{"role": "user", "content": "no"}, {"role": "assistant", "content": "a"},
                 {"role": "user", "content": "q"}], "label": 3}, "q", "3"),
    ({"prompt": "q", "reward_model": {"ground_truth": ["5"]}}, "q", "5"),
    ({"problem": "q", "reward_model": "gpt", "answer": "5"}, "q", "5"),
    ({"problem": "q", "answer": 1e16}, "q", "10000000000000000"),
    ({"problem": "q", "answer": 0.00001}, "q", "0.00001"),
    ({"problem": "q", "answer": -2.5}, "q", "-2.5"),
    ({"problem": "q", "solution": "The answer is $\\boxed 5$."}, "q", "5"),
])
def test_load_problems(tmp_path, record, question, answer):
    other = {"problem": "another", "answer": 0}
    path = write(tmp_path, "", record, "   ", other, "")
    assert load_problems(path) == [(question, answer), ("another", "0")]
    assert load_problems(path)[0].question == question
    array = tmp_path / "array.json"
    array.write_text("\n" + json.dumps([other, record], indent=1), "utf-8")
    assert load_problems(array) == [("another", "0"), (question, answer)], "like lines"


@pytest.mark.parametrize("kept, answer", [
    (["34"], "34"), ([["34"]], "34"), ([34], "34"), ('["34"]', "34"), ("['34']", "34"),
    ("[34]", "34"), ('[["34"]]', "34"), ('[ "34" ]', "34"), ('"34"', "34"), ("[-0.5]", "-0.5"),
    (json.dumps(["\\frac{1}{2}"]), "\\frac{1}{2}"), ('["\\frac{1}{2}"]', "\\frac{1}{2}"),
    (repr(["\\frac{1}{2}"]), "\\frac{1}{2}"), ("['\\text{no}']", "\\text{no}"),
    (json.dumps(["90°"]), "90°"), (json.dumps(["[1,2]"]), "[1,2]"), ('["\\boxed{7}"]', "7"),
    ("[true]", "True"), ("[1,2]", "[1,2]"), ("[1,2)", "[1,2)"), ("[[1,2],[3,4]]", "[[1,2],[3,4]]"),
    ('["1", "2"]', '["1", "2"]'), ('["x', '["x'), ("[", "["), ("[" * 3000, "[" * 3000),
])
def test_a_list_of_one_answer_is_that_answer(tmp_path, kept, answer):
    """Kills references that stay lists, which no answer matches; "\\frac" read as JSON's \\f."""
    path = write(tmp_path, {"problem": "q", "reward_model": {"ground_truth": kept}})
    assert load_problems(path) == [("q", answer)]


def test_a_problem_that_comes_many_times_is_taken_once(tmp_path):
    """Kills copies that count as problems, which make intervals too narrow, and silent dropping."""
    lines = [{"problem": f"AIME problem  {n % 30}", "answer": str(n % 30)} for n in range(480)]
    lines += [{"problem": "AIME problem 3\n", "answer": "3"}, {"problem": "alone", "answer": "3"},
              {"problem": "AIME problem 4", "answer": "5"}]
    task = Math(write(tmp_path, *lines), held_out=1.0)
    held_out = task.held_out_problems()
    assert len(held_out) == 31 and held_out[4].answer == "4", "each once, with its first answer"
    assert [note.partition(": ")[2] for note in task.notes] == [
        "452 of 483 lines repeat an earlier problem: each is used once.",
        "1 of 483 lines give an earlier problem another answer: the first is used."]
    twice = [{"target": 24, "nums": [4, 7, 2, 9]}, {"target": 24, "nums": [9, 2, 7, 4]},
             {"target": 25, "nums": [4, 7, 2, 9]}]
    task = Countdown(path=write(tmp_path, *twice), held_out=1.0)
    assert task.held_out_problems(9) == [((4, 7, 2, 9), 24), ((4, 7, 2, 9), 25)]
    assert "1 of 3 lines repeat an earlier problem: each is used once." in task.notes[0]


CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]


@pytest.mark.parametrize("beside, told", [
    ({"choices": ["1", "2"]}, "have choices"), ({"options": {"A": "1"}}, "have options"),
    ({"context": "c"}, "have context"), ({"images": ["x.png"]}, "have images"),
    ({"system": "s"}, "have system"), ({"problem": CHAT}, "have a system"),
    ({"problem": CHAT[1:] + [{"role": "assistant", "content": "Let me see"}]}, "have a system"),
    ({"problem": "Sum? End with '#### SUM'."}, "ask for"),
    ({"problem": "Solve. The last line should be Answer: $Answer"}, "ask for"),
    ({"problem": 'Remember to put your answer on its own line after "Answer:".'}, "ask for"),
    ({"problem": "Sum? Put it in <answer> </answer> tags."}, "ask for"),
    ({"problem": "Sum? Write it as [[SUM]]."}, "ask for"),
    ({"problem": "Sum? **Final Answer**: SUM"}, "ask for"),
    ({"problem": 'Sum? Finish with "The answer is: SUM".'}, "ask for"),
    ({"problem": "Sum? Reply in JSON."}, "ask for"),
    ({}, ""), ({"choices": [], "context": None, "images": ""}, ""), ({"problem": CHAT[1:]}, ""),
    ({"problem": "Find the sum. Express your answer as a common fraction, \\[x = 1.\\]"}, ""),
    ({"problem": "Sum? Put the final answer within \\boxed{}."}, ""),
])
def test_what_the_prompt_does_not_show_is_told(tmp_path, beside, told):
    """Kills choices, system prompts and formats of the row's own that vanish without a word."""
    lines = [{"problem": "q", "answer": "7"} | beside, {"problem": "another", "answer": "7"}]
    notes = Math(write(tmp_path, *lines)).notes
    assert len(notes) == bool(told) and f": 1 of 2 lines {told}" in [*notes, ": 1 of 2 lines "][0]


def test_a_question_that_asks_for_a_box_is_not_asked_twice(tmp_path):
    path = write(tmp_path, {"problem": "Sum? Put it in \\boxed{}.", "answer": "7"})
    task = Math(path, held_out=1.0)
    [problem] = task.held_out_problems()
    assert task.prompt(problem) == problem.question


@pytest.mark.parametrize("bad", [
    "{", "[1]", "3", "null", '"text"', '{"problem": "q"}', '{"answer": "5"}', "\x00", "[" * 5000,
    '{"problem": "", "answer": "5"}', '{"problem": "q", "answer": null}',
    '{"problem": 3, "answer": 3}',
    '{"problem": "q", "answer": ["1", "2"]}', '{"problem": "q", "answer": {}}',
    json.dumps({"problem": "q", "solution": "a proof without any box, longer than an answer is"}),
    '{"prompt": [], "label": "5"}',
    '{"prompt": [{"role": "system", "content": "q"}], "label": "5"}',
    '{"prompt": [{"role": "user"}], "label": "5"}', '{"prompt": ["q", 3, null], "label": "5"}',
    '{"problem": "q", "reward_model": {}}', '{"problem": "q", "reward_model": [1]}',
])
def test_a_bad_line_is_left_out_and_told(tmp_path, bad):
    """Kills a file of hundreds refused for one line, and lines dropped without a word."""
    good = {"problem": "q", "answer": "1"}
    others = [good | {"problem": f"q{n}"} for n in range(398)]
    path = write(tmp_path, good, "", bad, *others)
    problems = Problems(path, rewards.read_math, held_out=1.0)
    assert len(problems.held_out) == 399
    [note] = problems.notes
    assert "1 of 400 lines left out, the first line 3: " in note, note
    alone = write(tmp_path, "", bad, name="alone.jsonl")
    if not bad.startswith("["):  # there it is a JSON array, and a bad one
        with pytest.raises(ValueError, match=r"alone\.jsonl holds no problems; line 2: "):
            load_problems(alone)


def test_files_that_cannot_be_read(tmp_path):
    for text in ("", "\n  \n", "[]", "[\n]"):
        with pytest.raises(ValueError, match=r"holds no problems\.$"):
            load_problems(write(tmp_path, text))
    with pytest.raises(ValueError, match="Cannot read .*nowhere.jsonl: No such file"):
        load_problems(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="Cannot read .*directory"):
        load_problems(str(tmp_path))
    for text in ("[" * 9000, '[{"problem": "q"', "[1] [2]"):
        with pytest.raises(ValueError, match="is not a JSON array"):
            load_problems(write(tmp_path, text))
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "q", "answer": "1"}\n{"problem": "\xe9"}')
    problems = Problems(tmp_path / "latin.jsonl", rewards.read_math, held_out=1.0)
    assert problems.held_out == [("q", "1")]
    assert "line 2" in problems.notes[0], "a line that is not UTF-8 is one bad line"
    (tmp_path / "p.parquet").write_bytes(b"PAR1\x15\x04")
    with pytest.raises(ValueError, match=r"pandas.read_parquet\(.*p\.parquet.*lines=True"):
        load_problems(tmp_path / "p.parquet")


@pytest.mark.parametrize("path, repo, revision, filename", [
    ("hf://own/data/test.jsonl", "own/data", None, "test.jsonl"),
    ("hf://own/data/deep/er/test.jsonl", "own/data", None, "deep/er/test.jsonl"),
    ("hf://own/data@v1.0/test.jsonl", "own/data", "v1.0", "test.jsonl"),
    ("hf://datasets/own/data/test.jsonl", "own/data", None, "test.jsonl"),
    ("hf://datasets/own/data@v1/deep/er/test.jsonl", "own/data", "v1", "deep/er/test.jsonl"),
])
def test_hub_files(tmp_path, monkeypatch, path, repo, revision, filename):
    hub, calls = pytest.importorskip("huggingface_hub"), []
    local = write(tmp_path, {"problem": "q", "answer": "1"})

    def fake(repo_id, filename, *, repo_type=None, revision=None):
        calls.append((repo_id, filename, repo_type, revision))
        return local

    monkeypatch.setattr(hub, "hf_hub_download", fake)
    assert load_problems(path) == [("q", "1")]
    assert calls == [(repo, filename, "dataset", revision)]
    assert len(Math(path, held_out=1.0).held_out_problems()) == 1


def test_hub_errors_are_one_sentence(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(ValueError, match="^Cannot fetch hf://own/data/x.jsonl: no route to host$"):
        load_problems("hf://own/data/x.jsonl")
    for path in ("hf://", "hf://own", "hf://own/data", "hf://own/data@v1", "hf:///a/b",
                 "hf://datasets/own/data", "https://huggingface.co/datasets/own/data/x.jsonl"):
        with pytest.raises(ValueError, match="not of the form"):
            load_problems(path)


def test_math_task(tmp_path):
    lines = [{"problem": f"What is {n}+1?", "answer": str(n + 1)} for n in range(400)]
    path = write(tmp_path, *lines)
    task, rng = Math(path), random.Random(7)
    held_out = task.held_out_problems()
    assert 20 < len(held_out) < 60, f"held_out=0.1 of 400 keeps {len(held_out)}"
    assert held_out == sorted(held_out, key=lambda p: int(p.answer)), "file order"
    assert task.held_out_problems(5) == held_out[:5]
    drawn = {task.problem(rng) for _ in range(5000)}
    assert not drawn & set(held_out), "a held-out problem occurs in training"
    assert len(drawn) == 400 - len(held_out), "every other problem occurs"
    assert all(task.problem(rng, held_out=True) in held_out for _ in range(20))
    assert [rewards.share_of(p.question) < 0.1 for p in held_out] == [True] * len(held_out)
    assert len(Math(path, held_out=1.0).held_out_problems()) == 400
    with pytest.raises(ValueError, match="leaves no problem to train on"):
        Math(path, held_out=1.0).problem(rng)
    assert Math(path, held_out=0.0).held_out_problems() == []
    x = held_out[0]
    assert x.question in task.prompt(x) and "\\boxed{}" in task.prompt(x)
    assert task.reward(x, f"so \\boxed{{{x.answer}}}") == 1 and task.reward(x, "\\boxed{-7}") == 0
    assert task.reward(x, task.prompt(x)) == 0, "the prompt copied"
    assert task.canonical("\\boxed{\\frac12}") == task.canonical("\\boxed{0.5}") == "1/2"
    assert task.canonical("no box") is task.canonical("\\boxed{}") is task.canonical(None) is None
    assert "\\boxed" in task.system and task.notes == []


# References that are read, and references that no answer of a model can match.
READ = [
    "x" * CAP, "1", "\\text{no}", "\\{1\\}", "10^{100}", "[1,2)", "4.5e33", "Yes", "3π", "5 cm",
    "f'(x)=2x", "\\text{no real solutions}", "x^2+1", "5 or 6", "1,234", "\\$18", "10 units",
]
UNREAD = [
    "x" * (CAP + 1), "\\frac{1}{2", "$$", "5}{", '["1", "2"]', "('34',)", "'34'", "The answer is 5",
    "Answer: 5", "5 apples", "≈3.14", "<b>5</b>", "`5`", "{'34'}", "7 red apples",
    "there are no real numbers which do that", "\\text{It is always an even number, so yes}",
]


def test_references_that_no_answer_can_match_are_told(tmp_path):
    """Kills a check of a reference against itself in its own spelling, which proves nothing."""
    for answer in READ:
        notes = Math(write(tmp_path, {"problem": "q", "answer": answer})).notes
        assert notes == [], f"{answer!r} is read: {notes}"
    for answer in UNREAD:
        notes = Math(write(tmp_path, {"problem": "q", "answer": answer})).notes
        assert len(notes) == 1 and "would match 1 of the 1 " in notes[0], f"{answer!r}: {notes}"
    lines = [{"problem": f"q{n}", "answer": answer} for n, answer in enumerate(READ + UNREAD * 2)]
    [note] = Math(write(tmp_path, *lines)).notes
    assert f"match {len(UNREAD)} of the {len(READ + UNREAD)} different" in note


def test_the_check_of_references_is_bounded(tmp_path, monkeypatch):
    """Kills minutes of it on a file of millions, and a share of them told as if it were all."""
    asked = []
    monkeypatch.setattr(rewards, "math_reward", lambda *texts: asked.append(texts) or 0.0)
    lines = [{"problem": f"q{n}", "answer": str(n // 2)} for n in range(6000)]
    [note] = Math(write(tmp_path, *lines)).notes
    assert len(asked) == 2000 and "match 2000 of the 2000 different" in note


COUNTDOWN_LINES = [{"target": 24, "nums": [4, 7, 2, n]} for n in range(1, 100)]


def test_countdown_from_a_file(tmp_path):
    """Kills problems made up beside those of the file, and one split of them in the other."""
    path = write(tmp_path, *COUNTDOWN_LINES)
    task, rng = Countdown(path=path, style="think"), random.Random(1)
    known = {Problem(tuple(line["nums"]), line["target"]) for line in COUNTDOWN_LINES}
    held_out = task.held_out_problems(1000)
    train = {task.problem(rng) for _ in range(2000)}
    assert train | set(held_out) == known and not train & set(held_out)
    assert 3 < len(held_out) < 25, f"held_out=0.1 of 99 keeps {len(held_out)}"
    assert held_out == [p for p in task.problems.held_out if p in known], "file order"
    assert task.problem(rng, held_out=True) in held_out
    assert task.reward(Problem((4, 7, 2, 9), 24), "<answer>2*(9+7-4)</answer>") == 1
    problem, answer = task.example(rng)  # for a warm start: these are made up
    assert task.reward(problem, f"<answer>{answer}</answer>") == 1
    assert len(Countdown(path=path, held_out=1.0).held_out_problems(1000)) == 99


def test_countdown_problems_without_a_solution_are_told(tmp_path):
    """Kills rewards that can never be had and of which nobody hears."""
    lines = [*COUNTDOWN_LINES[:3], {"target": 99, "nums": [1, 1]}, {"target": 0, "nums": [7]},
             {"target": 7, "nums": [7]}, {"target": 1, "nums": [1, 2, 3, 4, 5, 6]}]
    notes = Countdown(path=write(tmp_path, *lines)).notes
    assert len(notes) == 1 and "2 of 6 problems tried have no solution" in notes[0], notes
    bad = [{"target": 1.5, "nums": [1]}, {"nums": [1]}, {"target": 1, "nums": []}, [3], "{",
           {"target": 1, "nums": [1, "2"]}, {"target": 3, "nums": [-1, 4]},
           {"target": 1, "nums": 1}, {"target": True, "nums": [1]}]
    notes = Countdown(path=write(tmp_path, COUNTDOWN_LINES[8], *bad)).notes
    assert len(notes) == 1 and "9 of 10 lines left out" in notes[0], notes
    assert Countdown(path=write(tmp_path, *COUNTDOWN_LINES[6:9])).notes == []
    assert LAPTOP.notes == [] and LAPTOP.problems is None


def test_long_prompts_are_left_out_everywhere(tmp_path):
    """Kills a list that keeps its long prompts, and a limit that is off by one."""
    lines = [{"problem": "1" * n, "answer": "2"} for n in range(1, 101)]
    for held_out in (0.0, 0.5, 1.0):
        problems = Math(write(tmp_path, *lines), held_out).problems
        problems.leave_out(lambda these: [len(x.question) > 60 for x in these], "too long")
        assert problems.notes == [f"{problems.path}: 40 problems are left out: too long."]
        left = sorted(len(p.question) for p in problems.train + problems.held_out)
        assert left == [*range(1, 61)], f"held_out={held_out}: prompts of {left} characters left"
    problems = Countdown(path=write(tmp_path, *COUNTDOWN_LINES)).problems
    problems.leave_out(lambda these: [sum(x.numbers) > 20 for x in these], "large")
    assert problems.notes[-1].endswith(": 92 problems are left out: large.")


def test_long_prompts_are_looked_for_in_batches(tmp_path):
    """Kills one call of the tokenizer per problem, and a batch that loses its last problems."""
    lines = [{"problem": f"{n}", "answer": "2"} for n in range(2500)]
    problems, sizes = Math(write(tmp_path, *lines), held_out=0.0).problems, []

    def odd(these):
        sizes.append(len(these))
        return [int(x.question) % 2 for x in these]

    problems.leave_out(odd, "odd")
    assert "1250 problems" in problems.notes[-1] and sizes == [1000, 1000, 500]
    assert [int(x.question) for x in problems.train] == [*range(0, 2500, 2)], "file order"


def test_a_grader_that_hangs_or_raises_costs_one_answer(monkeypatch, capsys):
    """Kills a run that ends on one text of a package's grader, and one that swallows Ctrl-C."""
    class Timeout(BaseException):
        pass

    raised = {"hang": Timeout, "raise": ValueError, "deep": RecursionError}
    raised["stop"] = KeyboardInterrupt

    def parse(text, raise_on_error):
        if text in raised and raise_on_error:
            raise raised[text]
        return text

    def verify(reference, answer, raise_on_error):
        if answer == "cannot be compared" and raise_on_error:
            raise TypeError
        return reference == answer

    package, errors = types.ModuleType("math_verify"), types.ModuleType("math_verify.errors")
    package.parse, package.errors, errors.TimeoutException = parse, errors, Timeout
    package.verify = verify
    monkeypatch.setitem(sys.modules, "math_verify", package)
    monkeypatch.setitem(sys.modules, "math_verify.errors", errors)
    grader = rewards.MathVerify()
    assert (grader("\\boxed{7}", "7"), grader("\\boxed{8}", "7"), grader.failed) == (1, 0, 0)
    for failed, text in enumerate(["hang", "raise", "deep", "cannot be compared"], start=1):
        assert grader(text, "7") == 0 and grader.failed == failed, text
        assert grader("\\boxed{7}", "7") == 1, f"the next answer after '{text}' counts again"
    assert capsys.readouterr().out.count("failed on 1 answers") == 1
    with pytest.raises(KeyboardInterrupt):
        grader("stop", "7")


def test_the_verifier_of_a_package(tmp_path, monkeypatch):
    """Kills --verifier without effect, and a missing package told late or not at all."""
    path = write(tmp_path, {"problem": "q", "answer": "7"})
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "math_verify", None)
        with pytest.raises(ValueError, match="needs that package: pip install math-verify"):
            Math(path, verifier="math-verify")
    pytest.importorskip("math_verify")
    task = Math(path, held_out=1.0, verifier="math-verify")
    [problem] = task.held_out_problems()
    assert task.reward(problem, "\\boxed{3+4}") == 1 and task.reward(problem, "\\boxed{8}") == 0
    assert Math(path).reward(problem, "\\boxed{3+4}") == 0, "ours does no algebra"
    assert task.reward(problem, "\\boxed{9^{9^9}}") == 0 and task.verifier.failed == 1
    for text in (None, "", "\ud800", "\\boxed{" + "(" * 5000):
        assert task.reward(problem, text) == 0, f"{text!r:.20} must score 0, whatever it raises"


def flags_of(*words):
    parser = argparse.ArgumentParser()
    rewards.add_task_flags(parser)
    return parser.parse_args(words)


class NoTemplate:
    chat_template = None


class Template:
    chat_template = "{{ messages }}"


@pytest.mark.parametrize("words, tokenizer, filled", [
    ([], NoTemplate, {"prompt": "bare", "counts": [4], "high": 9, "targets": [1, 60],
                      "max_new_tokens": 24, "verifier": None}),
    ([], Template, {"prompt": "think", "counts": [3, 4], "high": 99, "targets": [10, 100],
                    "max_new_tokens": 1024}),
    (["--prompt", "ask", "--high", "20"], Template,
     {"counts": [3, 4], "high": 20, "targets": [10, 100], "max_new_tokens": 48}),
    (["--task", "math", "--data", "x"], NoTemplate,
     {"prompt": "boxed", "verifier": "ours", "max_new_tokens": 2048, "counts": None}),
    (["--data", "x", "--max-new-tokens", "7"], NoTemplate, {"prompt": "bare", "max_new_tokens": 7}),
])
def test_open_flags_are_filled_in(words, tokenizer, filled):
    flags = flags_of(*words)
    rewards.fill_task_flags(flags, tokenizer)
    assert filled.items() <= vars(flags).items(), vars(flags)
    once = dict(vars(flags))
    rewards.fill_task_flags(flags, tokenizer)
    assert vars(flags) == once, "filling in twice changes nothing"


@pytest.mark.parametrize("words, why", [
    (["--task", "math"], "--task math needs --data"),
    (["--task", "math", "--data", "x", "--prompt", "bare"], "does not go with --task math"),
    (["--prompt", "boxed"], "does not go with --task countdown"),
    (["--max-new-tokens", "0"], "at least 1"),
    (["--verifier", "math-verify"], "--verifier belongs to --task math"),
    (["--task", "math", "--data", "x", "--high", "5"], "belong to --task countdown"),
])
def test_flags_that_contradict_are_told(words, why):
    with pytest.raises(ValueError, match=why):
        rewards.fill_task_flags(flags_of(*words), NoTemplate)


def test_the_task_is_the_one_that_the_flags_describe(tmp_path):
    """Kills a flag that make_task forgets to pass on."""
    flags = flags_of("--counts", "3", "--high", "20", "--targets", "5", "50", "--prompt", "ask")
    rewards.fill_task_flags(flags, Template)
    task = rewards.make_task(flags, held_out=0.3)
    facts = task.counts, task.high, task.targets, task.style, task.held_out, task.problems
    assert facts == ((3,), 20, (5, 50), "ask", 0.3, None)
    flags.data = write(tmp_path, *COUNTDOWN_LINES)
    assert len(rewards.make_task(flags, held_out=1.0).held_out_problems(1000)) == 99
    flags = flags_of("--task", "math", "--data", write(tmp_path, {"problem": "q", "answer": "7"}))
    rewards.fill_task_flags(flags, Template)
    task = rewards.make_task(flags, held_out=1.0)
    assert task.held_out_problems() == [("q", "7")] and task.verifier is math_reward


def test_the_examples_in_the_docstrings_hold():
    failed, run = doctest.testmod(rewards)
    assert run >= 7 and failed == 0


# For those who write the verifier themselves: the same by hand, and failures that know the mistake

PARSED = [  # text, its value, its tree, what the well-known mistakes give
    ("2*(1+3)", 8, ("*", 2, ("+", 1, 3)), {5: "brackets that are skipped"}),
    ("9-4-3", 2, ("-", ("-", 9, 4), 3), {8: "- grouped from the right"}),
    ("8/4/2", 1, ("/", ("/", 8, 4), 2), {4: "/ grouped from the right"}),
    ("8-4+2", 6, ("+", ("-", 8, 4), 2), {2: "+ before -"}),
    ("8/4*2", 4, ("*", ("/", 8, 4), 2), {1: "* before /"}),
    ("2+3*4", 14, ("+", 2, ("*", 3, 4)), {20: "operators taken as they come: * binds first"}),
    ("7/2", Fraction(7, 2), ("/", 7, 2), {3: "division of integers that drops the rest"}),
    ("1/3", Fraction(1, 3), ("/", 1, 3), {Fraction(1 / 3): "floats in place of exact fractions"}),
    ("120", 120, 120, {0: "only the last digit read", 1: "only the first digit read"}),
    (" 3 +  4 ", 7, ("+", 3, 4), {}),
    ("((5))", 5, 5, {}),
]


@core("parse")
@pytest.mark.parametrize("text, value, tree, bugs", PARSED, ids=[row[0] for row in PARSED])
def test_parse_by_hand(text, value, tree, bugs):
    node = rewards.parse(text)
    assert node is not None, f"parse({text!r}) must be a node of value {value}, and is None"
    assert isinstance(node, tuple) and len(node) == 3, \
        f"parse({text!r}) must be (numerator, denominator, tree), and is {node!r}"
    got = Fraction(node[0]) / Fraction(node[1])
    hint = f" This is what you get with: {bugs[got]}." if got in bugs else ""
    assert got == value, f"parse({text!r}) must have the value {value}, and has {got}.{hint}"
    assert node[2] == tree, f"parse({text!r}) must have the tree {tree!r}, and has {node[2]!r}"


NO_EXPRESSION = {
    "": "nothing at all", "()": "empty brackets", "1 2": "two numbers side by side, read as 12",
    "-1+2": "a sign", "2**3": "a power", "7//2": "floor division", "07": "a leading zero",
    "1+2=3": "an equation", "1+": "an operator at the end", "1+2)": "a bracket too many",
    "(1+2": "a bracket that stays open", "1+2 is it": "words behind the answer",
    "3(7)": "a product without its sign", "1.5": "a decimal", "٣+1": "digits of another script",
}


@core("parse")
@pytest.mark.parametrize("text, why", NO_EXPRESSION.items(), ids=NO_EXPRESSION)
def test_what_is_no_expression_does_not_parse(text, why):
    try:
        node = rewards.parse(text)
    except Exception as error:
        node = error
    assert node is None, f"parse({text!r}) must be None, for that is {why}; it gave {node!r}"


@care("parse")
@pytest.mark.parametrize("text, why", [
    ("(" * 31 + "1" + ")" * 31, "31 nested brackets: the stack of a recursive parser is finite"),
    ("(" * 300, "300 open brackets"), ("1" + "+1" * 300, "more than MAX_ANSWER characters"),
    ("9" * 5000, "more digits than int() takes")], ids=["deep", "open", "long", "digits"])
def test_parse_is_bounded(text, why):
    try:
        node = rewards.parse(text)
    except (Exception, RecursionError) as error:
        node = error
    assert node is None, f"parse must refuse {why}, by None; it gave {type(node).__name__}"


@care("parse")
def test_parse_takes_division_by_zero_and_thirty_brackets():
    node = rewards.parse("5/0")
    assert node is not None and node[1] == 0, f"5/0 parses, with denominator 0; parse gave {node!r}"
    node = rewards.parse("(" * 30 + "1" + ")" * 30)
    assert node and node[0] == node[1], "30 nested brackets must parse"


JUDGED = [  # text, numbers, target, reward, the mistake that gives the other one
    ("2*2", (2, 2), 4, 1, "numbers compared as sets: a number may come twice"),
    ("2+2", (2, 2, 2), 4, 0, "numbers compared as sets, or not all of them asked for"),
    ("2+2+2", (2, 2), 6, 0, "numbers that may be used again"),
    ("4*6", (2, 3, 5), 24, 0, "numbers that are not looked at"),
    ("3+5-2", (2, 3, 5), 7, 0, "a value that is not looked at"),
    ("6/(5/4)", (4, 5, 6), Fraction(24, 5), 1, "floats in place of exact fractions"),
    ("1/3+2/3*4", (1, 3, 2, 3, 4), 3, 1, "floats in place of exact fractions"),
    ("8/(3-8/3)", (3, 3, 8, 8), 24, 1, "floats in place of exact fractions"),
    ("24+1/1000000", (24, 1, 1000000), 24, 0, "a tolerance"),
    ("5/(2-2)", (5, 2, 2), 0, 0, "a target of 0 met by 0/0: look at the denominator"),
    ("2+5-3", (5, 3, 2), 4, 1, "an order of the numbers that is insisted on"),
]


@core("countdown_reward")
@pytest.mark.parametrize("text, numbers, target, right, bug", JUDGED, ids=[r[0] for r in JUDGED])
def test_reward_by_hand(text, numbers, target, right, bug):
    got = countdown_reward(text, numbers, target)
    assert got == right, (f"{text!r} with {numbers} for {target} must earn {right}, and earns "
                          f"{got}. This is what you get with: {bug}.")


@care("countdown_reward")
def test_reward_is_a_float_and_takes_any_text():
    for text, right in (("1+2", 1.0), ("1+1", 0.0), ("", 0.0), ("\ud800", 0.0), (None, 0.0)):
        got = countdown_reward(text, (1, 2), 3)
        assert isinstance(got, float) and got == right, f"{text!r} must earn {right}, not {got!r}"
    got = countdown_reward("<answer>9</answer> no: <answer>1+2</answer>", (1, 2), 3, style="think")
    assert got == 1.0, "style think reads the last answer tag alone"
    with pytest.raises(ValueError):
        countdown_reward("1+2", (1, 2), 3, style="thnik")
