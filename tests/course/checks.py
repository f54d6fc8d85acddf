"""What is graded, and for how many points: questions to a submission, and how answers are judged.

A `Check` gives all of its points or none. It asks a few questions, each a driver of worker.py with
its options; the reference answers the same question in the judge's process, and `same` compares,
unless the question has a `judge` of its own. The tables below hold no answers, only questions; the
numbers of the sampler's tests, which have no one right answer, state how often they are wrong.
"""

import builtins
import collections
import functools
import itertools
import math
import random
from fractions import Fraction
from typing import Callable, NamedTuple, Optional

import torch

from worker import SPOILT, Other

F64 = torch.float64
NAN, INF = float("nan"), float("inf")


class Ask(NamedTuple):
    driver: str
    options: dict
    what: str  # said before the numbers that differ
    judge: Optional[Callable] = None  # (answer, right) -> a sentence, or None
    near: tuple = (1e-7, 1e-5)  # atol, rtol
    memory: Optional[int] = None  # bytes by which the process may grow


class Check(NamedTuple):
    exercise: int
    function: str  # "": all of the exercise's functions together
    part: str  # core or care
    points: int
    title: str
    asks: Callable  # () -> [Ask]


CHECKS = []


def check(exercise, function, part, points, title):
    """Registers a function that lists questions, made once."""

    def register(asks):
        CHECKS.append(Check(exercise, function, part, points, title, functools.cache(asks)))
        return asks

    return register


def checks_of(number):
    return [one for one in CHECKS if one.exercise == number]


def points_of(number):
    return sum(one.points for one in checks_of(number))


# ------------------------------------------------------------------------------------- comparing


def is_error(x):
    return isinstance(x, dict) and "error" in x


def number(x):
    return (
        f"{x:.7g}" if isinstance(x, float) else repr(x) if not isinstance(x, Fraction) else str(x)
    )


def same(answer, right, near=(1e-7, 1e-5), path=""):
    """None, or a sentence with the first thing that differs."""
    at = f"{path} " if path else "it "
    if is_error(right):
        kind = next(kind for kind in right["error"] if hasattr(builtins, kind))
        if is_error(answer):
            return (
                None
                if kind in answer["error"]
                else f"{at}must raise {kind}, and raises {answer['says']}"
            )
        return f"{at}must raise {kind} ({right['says'].partition(': ')[2]}), and does not"
    if is_error(answer):
        return f"{at}fails with {answer['says']}"
    if isinstance(right, torch.Tensor):
        return same_tensor(answer, right, near, at)
    if isinstance(right, (list, tuple)):
        if not isinstance(answer, (list, tuple)):
            return f"{at}should be {len(right)} values, but is {shown(answer)}"
        if len(answer) != len(right):
            return f"{at}should be {len(right)} values, but is {len(answer)}"
        parts = (
            (f"{path}[{i}]" if path else f"number {i + 1}", a, b)
            for i, (a, b) in enumerate(zip(answer, right))
        )
    elif isinstance(right, dict):
        if not isinstance(answer, dict):
            return f"{at}should be a dict, but is {shown(answer)}"
        if "shape" in answer and "shape" not in right:
            return answer["shape"]
        parts = []
        for key, value in right.items():
            if key not in answer:
                return f"{at}lacks '{key}'"
            parts.append((f"{path} {key}".strip(), answer[key], value))
    elif isinstance(right, (int, float)) and isinstance(answer, (int, float)):
        atol, rtol = near
        fits = (
            answer == right
            or (answer != answer and right != right)
            or (math.isfinite(right) and abs(answer - right) <= atol + rtol * abs(right))
        )
        return None if fits else f"{at}should be {number(right)}, but is {number(answer)}"
    else:
        return (
            None
            if answer == right and type(answer) is type(right)
            else (f"{at}should be {shown(right)}, but is {shown(answer)}")
        )
    for name, a, b in parts:
        found = same(a, b, near, name)
        if found:
            return found
    return None


def same_tensor(answer, right, near, at):
    if not isinstance(answer, torch.Tensor):
        return f"{at}should be a tensor, but is {shown(answer)}"
    if answer.shape != right.shape:
        return f"{at}should have shape {tuple(right.shape)}, but has {tuple(answer.shape)}"
    if answer.is_floating_point() != right.is_floating_point() or (
        (answer.dtype == torch.bool) != (right.dtype == torch.bool)
    ):
        return f"{at}should be {right.dtype}, but is {answer.dtype}"
    atol, rtol = near
    differs = ~torch.isclose(answer.to(F64), right.to(F64), rtol=rtol, atol=atol, equal_nan=True)
    if not differs.any():
        return None
    place = differs.nonzero()[0].tolist()
    where = f" at {place}" if place else ""
    more = f" ({int(differs.sum())} of {right.numel()} numbers differ)" if right.numel() > 1 else ""
    a, b = answer[tuple(place)].item(), right[tuple(place)].item()
    return f"{at.strip()}{where} should be {number(b)}, but is {number(a)}{more}"


def shown(x):
    if isinstance(x, torch.Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    return str(x) if isinstance(x, Other) else f"{x!r:.80}"


def same_dtype(answer, right):
    """As `same`, and each tensor in the dtype that the reference gives it."""
    found = same(answer, right)
    if found:
        return found
    for key, value in (right.items() if isinstance(right, dict) else enumerate(right)):
        if isinstance(value, torch.Tensor) and answer[key].dtype != value.dtype:
            return f"{key} should be {value.dtype}, but is {answer[key].dtype}"
    return None


def call(name, args, options=None):
    words = [f"{x!r:.60}" if not isinstance(x, Fraction) else str(x) for x in args]
    words += [f"{key}={value!r}" for key, value in (options or {}).items()]
    return f"{name}({', '.join(words)})"


def each_call(name, calls, judge=None):
    """A judge of `many`: the first call whose value is wrong, by its arguments."""
    judge = judge or (lambda answer, right: same(answer, right))

    def judged(answer, right):
        if not isinstance(answer, list) or len(answer) != len(right):
            return f"{name}: {same(answer, right)}"
        for (args, options), a, b in zip(calls, answer, right):
            found = judge(a, b)
            if found:
                return f"{call(name, args, options)}: {found}"
        return None

    return judged


def calls_of(file, name, rows, judge=None):
    calls = [
        (
            row
            if isinstance(row[0], tuple) and len(row) == 2 and isinstance(row[1], dict)
            else (tuple(row), {})
        )
        for row in rows
    ]
    return Ask("many", dict(file=file, name=name, calls=calls), "", each_call(name, calls, judge))


# ------------------------------------------------------------------------------ 1: the verifier


def expression(rng, numbers, blanks=""):
    """A random expression over these numbers, in this order, as text with needless brackets."""
    if len(numbers) == 1:
        text = str(numbers[0])
    else:
        cut = rng.randrange(1, len(numbers))
        left, right = (expression(rng, part, blanks) for part in (numbers[:cut], numbers[cut:]))
        space = rng.choice(blanks) if blanks else ""
        text = f"{left}{space}{rng.choice('+-*/')}{space}{right}"
        if rng.random() < 0.6:
            text = f"({text})"
    return text


def damaged(rng, text, letters="0123456789+-*/() \t.=^%_,xe٣"):
    """The text with one character put in, taken out or replaced."""
    place, how = rng.randrange(len(text) + 1), rng.randrange(3)
    if how == 0:
        return text[:place] + rng.choice(letters) + text[place:]
    if how == 1:
        return text[:place] + text[place + 1 :]
    return text[:place] + rng.choice(letters) + text[place + 1 :]


def plain(tree):
    return tuple(map(plain, tree)) if isinstance(tree, (list, tuple)) else tree


def judge_node(answer, right):
    """Any (numerator, denominator, tree) of the right value; denominator 0 where it has none."""
    if is_error(answer):
        return f"fails with {answer['says']}"
    if right is None or answer is None:
        if answer is None and right is None:
            return None
        return f"should be {'None' if right is None else 'a node'}, but is {shown(answer)}"
    if not (
        isinstance(answer, (list, tuple))
        and len(answer) == 3
        and all(isinstance(x, (int, Fraction)) and not isinstance(x, bool) for x in answer[:2])
    ):
        return f"should be (numerator, denominator, tree), but is {shown(answer)}"
    if right[1] == 0 or answer[1] == 0:
        if right[1] != answer[1]:
            return f"should have the denominator {right[1]}, but has {answer[1]}"
    elif Fraction(answer[0]) / Fraction(answer[1]) != Fraction(right[0], right[1]):
        return (
            f"should have the value {shortly(Fraction(right[0], right[1]))}, "
            f"but has {shortly(Fraction(answer[0]) / Fraction(answer[1]))}"
        )
    if plain(answer[2]) != plain(right[2]):
        return f"should have the tree {right[2]!r:.80}, but has {answer[2]!r:.80}"
    return None


def shortly(x):
    text = str(x)
    return text if len(text) < 40 else text[:37] + "..."


SIGNS = [
    "-1+2", "+1", "(-1+2)", "(+1)", "2*(-3)", "2*-3", "2*(3+(-1))", "((-1))", "3-(-2)", "1+-1",
    "(1)-(-1)", "1--1", "2-(+1)", "(-(1))", "-(1+2)", "(\t-1+2)", "( +2)",
]
POWERS = [
    "2**3", "7//2", "2***3", "8%3", "2^3", "6/ /2", "2* *3", "1e3", "1_000", "0x10", "1.5", "1.",
    ".5", "1j", "5!", "~1", "1<2", "1=1", "1==1", "1+2=3", "1,2", "(1,2)", "[1]", "{1}", "1;2",
    "1if 1else 2", "1 and 2", "not 1", "1or 2", "lambda:1", "int(1)", "abs(1)", "a", "1+a", "True",
    "None", "__import__('os')", "1#2", "1\\\n+2", "1+2 # x", "'1'", "1 2", "1\n2", "1 + 2 3",
    "3(7)", "(3)7", "(1)(2)", "2(3)", "()", "(())", "1+()", "", " ", "\t\n", "1+", "+", "*1", "/",
    "1+*2", "1+2)", "(1+2", ")1+2(", "((1)", "07", "00", "0 7+1", "1+08", "7+00", "٣+1", "１+1",
    "²",
    "1−2", "2×3", "6÷2", "1\x0b+2", "1\x0c+2", "1\u00a0+2", "1\u2003+2", "1\x00", "1+2\x00",
    "\ufeff1", "1\u2028+2", "1\x85", "1 +\x1f2", "\ud800", "1+2 is it", "answer: 3", "1..2",
    "1'000",
]


def nested(n, inside="1"):
    return "(" * n + inside + ")" * n


@check(1, "parse", "core", 3, "value and tree of what is an expression")
def _():
    rng, texts = random.Random(1), [
        "2*(1+3)", "9-4-3", "8/4/2", "2+3*4", "2-3*4-5", "7/2", "1/3", "120", " 3 +  4 ", "((5))",
        "0", "0*5", "5/0", "1/(1/0)", "0/0", "5/(2-2)", "6/(5/4)", "8/(3-8/3)", "1/(2/0)+3",
        "3*(1/0)", "(1/0)-(1/0)", "10*10",
    ]
    for n in [2, 3, 4, 5, 6, 9] * 50:
        numbers = [rng.choice((0, 1, 2, 7, 10, 99, 1000, 10**6, 10**30)) for _ in range(n)]
        texts.append(expression(rng, numbers, ["", " ", "\t", "  ", "\n", "\r\n", " \t "]))
    texts = [text for text in texts if len(text) <= 400]
    return [calls_of("rewards", "parse", [(text,) for text in texts], judge_node)]


@check(1, "parse", "core", 2, "what the grammar has no rule for is refused")
def _():
    short = ["".join(t) for n in range(5) for t in itertools.product("10+-*/() ", repeat=n)]
    rng, more = random.Random(2), []
    for _ in range(1500):
        numbers = [rng.choice((0, 1, 7, 10, 99)) for _ in range(rng.randrange(1, 5))]
        text = expression(rng, numbers, ["", " "])
        for _ in range(rng.randrange(1, 3)):
            text = damaged(rng, text)
        more.append(text)
    return [
        calls_of("rewards", "parse", [(text,) for text in texts], judge_node)
        for texts in (SIGNS + POWERS, short, more)
    ]


@check(1, "parse", "care", 1, "blanks of any kind and number; limits of length and depth; any text")
def _():
    texts = [
        "\t1\r\n+\t2 ", "\n\n3*7\n", "1" + " " * 398 + "+"[:0], "1" + "\t" * 399, "1" + " " * 400,
        " " * 399 + "1", " " * 400 + "1", "1+1" + " " * 300, "\r1\r+\r2\r", "1 \t\r\n+\n\r\t 2",
        "(" + " " * 200 + "1+2" + "\t" * 100 + ")", "1\r\n", "\n1", "1 ", "12 +3", nested(29),
        nested(30), nested(31), nested(30, "1+2"), nested(31, "1+2"), nested(199),
        "2*" * 9 + nested(30), nested(15, "2*" + nested(15)), nested(15, "2*" + nested(16)),
        "+".join([nested(30)] * 6), "+".join([nested(2)] * 60), "(" * 300, ")" * 300, "(" * 400,
        "+".join(["1"] * 200), "+".join(["1"] * 201), "1" + "+1" * 199 + "0", "9" * 400, "9" * 401,
        "9" * 5000, "1" * 199 + "*" + "1" * 200, "1" * 200 + "/" + "1" * 199, "9" * 399 + "*",
        "1" + "+1" * 5000, nested(5000), "x" * 401, "7" * 398 + "/7", "*".join(["9" * 99] * 4),
        "-" * 400, "1/" * 199 + "1", "1/" * 200 + "1", "\ud800" * 3, "1\ud800", "\x00",
    ]
    return [calls_of("rewards", "parse", [(text,) for text in texts], judge_node)]


def judge_reward(answer, right):
    return same(answer, right)


def problems(seed, count, high=99):
    """(text, numbers, value) with a value that is a number."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        numbers = [rng.randint(1, rng.choice((3, 9, high))) for _ in range(rng.randint(1, 6))]
        text = expression(rng, numbers, ["", " ", "\t", "\n"])
        try:
            value = eval(
                text.translate(str.maketrans("\t\n", "  ")), {}, {}
            )  # ours, not a submission's
        except ZeroDivisionError:
            continue
        exact = value_of(text)
        if exact is not None and abs(float(exact) - value) < 1e-6 * max(1, abs(value)):
            found.append((text, numbers, exact))
    return found


def value_of(text):
    import re

    try:
        return eval(re.sub(r"(\d+)", r"Fraction(\1)", text.translate(str.maketrans("\t\n", "  "))))
    except ZeroDivisionError:
        return None


def as_target(value):
    return int(value) if value.denominator == 1 else value


@check(1, "countdown_reward", "core", 2, "each number exactly as often as it is given")
def _():
    rng, rows = random.Random(3), [
        ("2+3+3", (2, 2, 3), 8), ("2*2", (2, 2), 4), ("2+2", (2, 2, 2), 4), ("2+2+2", (2, 2), 6),
        ("4*6", (2, 3, 5), 24), ("2+5-3", (5, 3, 2), 4), ("3*7+5-2\n", (2, 3, 5, 7), 24),
        ("12", (1, 2), 12), ("1+2", (12,), 3), ("5", (5,), 5), ("5", (5, 5), 5),
        ("10+1", (1, 0, 1), 11), ("0+5", (5,), 5), ("0*7+5", (5, 0, 7), 5), ("1*5", (5,), 5),
        ("(2)+(3)", (3, 2), 5), ("2*6", (3, 4), 12), ("1*2*9", (1, 3, 6), 18),
        ("1+4+4", (2, 2, 5), 9), ("1*6*6", (2, 2, 9), 36),
    ]
    for text, numbers, value in problems(4, 250):
        target = as_target(value)
        rows.append((text, tuple(numbers), target))
        shuffled = numbers[:]
        rng.shuffle(shuffled)
        rows.append((text, tuple(shuffled), target))
        other = numbers[:]
        i, j = rng.randrange(len(other)), rng.randrange(len(other))
        other[i] = other[j]  # one number twice, in another's place
        rows.append((text, tuple(other), target))
        rows.append((text, tuple(numbers + [rng.choice(numbers)]), target))
        rows.append((text, tuple(numbers[:-1]), target))
        other = numbers[:]
        other[i] += rng.choice((-1, 1))
        rows.append((text, tuple(other), target))
        other[j - 1] -= other[i] - numbers[i]  # as many, with the same sum
        rows.append((text, tuple(other), target))
        rows.append((text, list(numbers), target))
    return [calls_of("rewards", "countdown_reward", rows, judge_reward)]


@check(1, "countdown_reward", "core", 2, "the value exactly: no float, no tolerance, no 0/0")
def _():
    big = 10**30
    rows = [
        ("6/(5/4)", (4, 5, 6), Fraction(24, 5)), ("1/3+2/3*4", (1, 3, 2, 3, 4), 3),
        ("8/(3-8/3)", (3, 3, 8, 8), 24), ("24+1/1000000", (24, 1, 1000000), 24),
        ("10000001/10000000", (10000001, 10000000), 1), ("5/(2-2)", (5, 2, 2), 0),
        ("0/(2-2)", (0, 2, 2), 0), ("1/(1/(2-2))", (1, 1, 2, 2), 0),
        ("(2-2)*5/(3-3)", (2, 2, 5, 3, 3), 0), (f"{big + 1}/{big}", (big + 1, big), 1),
        (f"{big + 1}-{big}", (big + 1, big), 1), (f"{big}+1", (big, 1), big),
        (f"{big}+1", (big, 1), big + 1), ("3+5-2", (2, 3, 5), 7), ("1/3", (1, 3), Fraction(1, 3)),
        ("1/3", (1, 3), Fraction(3333333333333333, 10**16)), ("2/4", (2, 4), Fraction(1, 2)),
        ("7/2", (7, 2), 3), ("7/2", (7, 2), 4), ("7/2", (2, 7), 3.5),
        ("(1+2)*3/(1+2)/3*7", (1, 2, 3, 1, 2, 3, 7), 7), ("3-5", (3, 5), -2), ("3-5", (3, 5), 2),
        ("1-1", (1, 1), 0), ("5/5", (5, 5), 1), ("1/49*49", (1, 49, 49), 1),
        ("1/98*98*3", (1, 98, 98, 3), 3),
    ]
    rows += [(f"{n}/{n + 1}", (n, n + 1), 1) for n in (10**k for k in range(1, 40, 3))]
    rows += [
        (f"{n}*{n}", (n, n), n * n + d) for n in (9**k for k in range(1, 30, 4)) for d in (-1, 0, 1)
    ]
    rng = random.Random(5)
    for text, numbers, value in problems(6, 200, high=10**6):
        rows.append((text, tuple(numbers), as_target(value)))
        rows.append(
            (
                text, tuple(numbers),
                value + Fraction(1, 10 ** rng.choice((1, 3, 6, 7, 9, 12, 15, 20))),
            )
        )
        rows.append(
            (text, tuple(numbers), round(value) if value.denominator > 1 else int(value) + 1)
        )
        rows.append((text, tuple(numbers), -as_target(value)))
    return [calls_of("rewards", "countdown_reward", rows, judge_reward)]


def digits_in(text):
    import re

    return tuple(int(d) for d in re.findall("[0-9]+", text)) if len(text) < 500 else (1, 2)


@check(1, "countdown_reward", "core", 3, "nothing for what is no expression: signs, powers, code")
def _():
    rows = []
    for text in SIGNS + POWERS:
        numbers = digits_in(text)
        rows += [(text, numbers, target) for target in range(-4, 10)]
        rows.append((text, numbers, sum(numbers)))
    rows += [
        ("2**3", (2, 3), 8), ("7//2", (7, 2), 3), ("-1+2", (1, 2), 1), ("(-1+2)", (1, 2), 1),
        ("3--2", (3, 2), 5), ("2*(-3)+9", (2, 3, 9), 3), ("10%4", (10, 4), 2), ("6^3", (6, 3), 5),
        ("1+2=3", (1, 2, 3), 3), ("3 7", (3, 7), 37), ("0b11", (0, 11), 3),
        ("1+2 # 3", (1, 2, 3), 3), ("07+1", (7, 1), 8), ("5 if 1 else 2", (5, 1, 2), 5),
        ("(5)or 2", (5, 2), 5), ("5,", (5,), 5), ("max(5,2)", (5, 2), 5), ("1e2", (1, 2), 100),
        ("5.0", (5, 0), 5), ("1 + + 2", (1, 2), 3),
    ]
    return [calls_of("rewards", "countdown_reward", rows, judge_reward)]


@check(1, "countdown_reward", "care", 1, "a float for any text, styles, limits")
def _():
    def judge(answer, right):
        if not is_error(right) and not is_error(answer) and type(answer) is not float:
            return f"should be the float {right}, but is {shown(answer)}"
        return same(answer, right)

    long = "1" + "+1" * 199
    rows = [
        (None, (1, 2), 3), (7, (7,), 7), (b"1+2", (1, 2), 3), ("\ud800", (1,), 1), ("", (), 0),
        (long, (1,) * 200, 200), (long + " ", (1,) * 200, 200), (long + "  ", (1,) * 200, 200),
        (nested(30), (1,), 1), (nested(31), (1,), 1), (nested(5000), (1,), 1),
        ("(" * 10**6, (1,), 1), ("9" * 5000, (9,), 9),
        ("9" * 400, (int("9" * 400),), int("9" * 400)), ("1+2", (1, 2), 3), ("1+1", (1, 2), 3),
        ("9**9**9**9", (9, 9, 9, 9), 1), ("1/0", (1, 0), 0),
    ]
    styles = [
        "<answer>1+2</answer>", "<answer>9</answer> no: <answer>1+2</answer>", "1+2", "<answer>1+2",
        "<answer>1+2</answer> <answer>3</answer>", "<answer> 1 + 2\n</answer> so it is.",
        "<answer><answer>1+2</answer>", "<answer>1+2</answer></answer>", "</answer>1+2<answer>",
        "<think>1+1</think><answer>2+1</answer>", "<answer></answer>",
        "x" * 9999 + "<answer>1+2</answer>", "<answer>" * 9999, "<Answer>1+2</Answer>",
        "<answer>1+2</answer",
    ]
    rows = [(row, {}) for row in rows]
    rows += [
        ((text, (1, 2), 3), dict(style=style))
        for text in styles
        for style in ("think", "bare", "ask")
    ]
    rows += [(("1+2", (1, 2), 3), dict(style=style)) for style in ("thnik", "", "x")]
    return [calls_of("rewards", "countdown_reward", rows, judge)]


# --------------------------------------------------------------------------- 2: Pass@k without bias


def judge_chance(answer, right):
    return same(answer, right, (1e-9, 1e-7))


@check(2, "pass_at_k", "core", 5, "the unbiased estimate, for all counts up to 12 and some beyond")
def _():
    rows = [(n, c, k) for n in range(1, 13) for c in range(n + 1) for k in range(1, n + 1)]
    rows += [
        (n, c, k)
        for n in (16, 33, 64, 100)
        for c in (0, 1, 2, n // 3, n - 2, n - 1, n)
        for k in (1, 2, 5, n // 2, n - 1, n)
    ]
    return [calls_of("eval", "pass_at_k", rows, judge_chance)]


@check(2, "pass_at_k", "core", 1, "thousands of samples")
def _():
    rows = [
        (n, c, k)
        for n in (128, 256, 1024, 5000)
        for c in (0, 1, 7, n // 100, n // 2, n - 1, n)
        for k in (1, 4, 128, n // 2, n)
    ]
    return [calls_of("eval", "pass_at_k", rows, lambda a, b: same(a, b, (1e-8, 1e-6)))]


@check(2, "pass_at_k", "care", 2, "ValueError for impossible counts")
def _():
    rows = [
        (4, 2, 5), (0, 0, 1), (4, 2, 0), (4, 2, -1), (4, -1, 2), (4, 5, 2), (4, 5, 4), (10, 11, 1),
        (1, 0, 2), (4, 0, 5), (4, 4, 5), (4, 0, 0), (4, 4, 0), (100, 1, 101), (3, 4, 4), (5, -2, 5),
        (0, 0, 0),
    ]
    good = [(4, 0, 4), (4, 4, 4), (1, 0, 1), (1, 1, 1), (4, 0, 1), (4, 4, 1)]
    return [calls_of("eval", "pass_at_k", rows + good, judge_chance)]


# ----------------------------------------------------------------------- batches for 3, 8 and 9


def randn(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=F64)


def rand(generator, *shape):
    return torch.rand(*shape, generator=generator, dtype=F64)


def batch(
    seed, G, groups=4, T=6, rewards="01", on_policy=False, depth=1.5, spread=0.35, ratio=None,
    rough=False, entropy=True, full=False, dtype=F64,
):
    """Arguments of a loss. rewards: 01, partial (0, 1 and anything between), any, equal, or one
    number; the first group is all correct, the second all wrong. ratio: some tokens have it, or its
    inverse. rough: NaN in the padding, an empty row."""
    draw = torch.Generator().manual_seed(seed)
    B = G * groups
    lengths = torch.randint(1, T + 1, (B,), generator=draw)
    lengths[-1] = T
    if full:
        lengths[:] = T
    if rough:
        lengths[B // 2] = 0
    mask = torch.arange(T) < lengths[:, None]
    r = (rand(draw, B) < 0.5).to(F64)
    if rewards == "partial":
        kind = torch.randint(4, (B,), generator=draw)
        r = torch.where(kind < 2, r, torch.where(kind == 2, rand(draw, B), 0.1 + 0.8 * r))
    elif rewards == "any":
        r = 3 * randn(draw, B)
    elif rewards == "scarce":
        r = (rand(draw, B) < 1.5 / G).to(F64)
    elif isinstance(rewards, float):
        r = torch.full((B,), rewards, dtype=F64)
    if groups > 2 and rewards in ("01", "partial", "scarce"):
        r[:G], r[G : 2 * G] = 1, 0
        if G > 1:
            r[-G], r[1 - G] = 1, 0  # the last group is mixed
    old = -0.05 - 2 * depth * rand(draw, B, T)
    logp = old.clone() if on_policy else (old + spread * randn(draw, B, T)).clamp(max=-0.001)
    if ratio is not None:
        far = rand(draw, B, T)
        deep = -math.log(ratio) - 0.3
        old = torch.where(far < 0.2, deep, torch.where(far > 0.8, -0.2, old))
        logp = torch.where(
            far < 0.2, deep + math.log(ratio), torch.where(far > 0.8, -0.2 - math.log(ratio), logp)
        )
    ref = (old + 0.3 * randn(draw, B, T)).clamp(max=-0.001)
    H = 0.2 + rand(draw, B, T)
    if rough:
        noise = torch.where(mask, 0.0, NAN)
        noise[0] = torch.where(mask[0], 0.0, INF)
        old, logp, ref, H = old + noise, logp + noise, ref + noise, H + noise
    found = dict(
        logp=logp.to(dtype), old_logp=None if on_policy else old.to(dtype), mask=mask,
        rewards=r.to(dtype), group_size=G, entropy=H.to(dtype) if entropy else None,
        ref_logp=ref.to(dtype),
    )
    return found


def loss_ask(name, what, options=None, stats=False, judge=None, near=(1e-7, 1e-5), **made):
    arguments = made.pop("arguments", None) or batch(**made)
    words = [f"{key}={value}" for key, value in (options or {}).items()]
    label = f"{name}({', '.join(words)}), {what}"
    return Ask(
        "loss", dict(name=name, options=options or {}, stats=stats, **arguments), label, judge, near
    )


def refusals(name, options=None, one_refused=False, **more):
    """Arguments that every loss refuses with ValueError."""
    good = batch(7, 4, 2, 3)
    B, T = good["logp"].shape
    bad = {
        "a group size that does not divide the rows": dict(group_size=3),
        "a group size of 0": dict(group_size=0),
        "rewards of another length": dict(rewards=good["rewards"][:-1]),
        "rewards (B, 1)": dict(rewards=good["rewards"][:, None]),
        "a mask of another shape": dict(mask=good["mask"][:, :-1]),
        "old_logp of another shape": dict(old_logp=good["old_logp"][:, :-1]),
        "a mask of 0.5": dict(mask=good["mask"] * 0.5),
        "a reward of NaN": dict(rewards=spoil(good["rewards"], NAN)),
        "an infinite reward": dict(rewards=spoil(good["rewards"], INF)),
        "a log-probability of 0.5": dict(logp=spoil(good["logp"], 0.5)),
        "an old log-probability of 0.5": dict(old_logp=spoil(good["old_logp"], 0.5)),
    }
    if one_refused:
        bad["a reward of 1.1"] = dict(rewards=spoil(good["rewards"], 1.1))
    asks = [loss_ask(name, what, options, arguments=good | change) for what, change in bad.items()]
    for what, change, its_options in more.get("others", []):
        asks.append(loss_ask(name, what, its_options, arguments=good | change))
    return asks


def spoil(x, value):
    x = x.clone()
    x.view(-1)[0] = value
    return x


def rough_asks(name, options, seed, rewards="01"):
    """Padding of NaN, empty rows, an empty mask, other dtypes, more padding; and the stats."""
    asks = [
        loss_ask(
            name, "with NaN in the padding and a row without tokens", options, True, seed=seed, G=4,
            rewards=rewards, rough=True, ratio=3.0,
        ),
        loss_ask(
            name, "on the sampling weights: logp in place of old_logp", options, True,
            seed=seed + 1, G=8, rewards=rewards, on_policy=True,
        ),
        loss_ask(
            name, "in float32, with a mask of integers", options, seed=seed + 2, G=4,
            near=(1e-5, 1e-4), rewards=rewards,
            arguments=integers(batch(seed + 2, 4, rewards=rewards, dtype=torch.float32)),
        ),
    ]
    empty = batch(seed + 3, 4, 2)
    empty["mask"] = torch.zeros_like(empty["mask"])
    asks.append(loss_ask(name, "with a mask of zeros alone", options, True, arguments=empty))
    nan = batch(seed + 4, 4, 2)
    nan["logp"] = spoil(nan["logp"], NAN)
    asks.append(
        loss_ask(
            name, "with a NaN on a generated token, which must show", options, arguments=nan,
            judge=shows_nan,
        )
    )
    asks.append(
        loss_ask(
            name, "with no entropy and no reference", options, True,
            arguments=batch(seed + 5, 4) | dict(entropy=None, ref_logp=None),
        )
    )
    wide = batch(seed + 6, 2, 3, 4, ratio=5.0)
    pad = dict(old_logp=-9.0, logp=-9.0, entropy=5.0, ref_logp=-1.0, mask=False)
    wide |= {
        key: torch.nn.functional.pad(wide[key], (0, 5), value=value) for key, value in pad.items()
    }
    asks.append(loss_ask(name, "with five more columns of padding", options, True, arguments=wide))
    misspelt = options | dict(clip_hihg=0.3)
    asks.append(loss_ask(name, "an option that it lacks", misspelt, seed=seed, G=4))
    return asks


def integers(arguments):
    return arguments | dict(mask=arguments["mask"].long())


def shows_nan(answer, right):
    if is_error(answer):
        return None  # refusing it shows it as well
    value = answer.get("loss")
    return None if isinstance(value, torch.Tensor) and value.isnan().any() else "the loss hides it"


# ------------------------------------------------------------------- 3: from REINFORCE to GRPO


def rewards_of(seed, G, groups, kind):
    return batch(seed, G, groups, 1, kind)["rewards"]


def advantage_ask(rows, G, what, near=(1e-7, 1e-6), judge=None):
    return Ask(
        "advantages", dict(rewards=rows, group_size=G), f"group_advantages, G = {G}, {what}:",
        judge, near,
    )


@check(3, "group_advantages", "core", 3, "the advantages of any group")
def _():
    asks = [
        advantage_ask([torch.tensor(r, dtype=F64) for r in rows], 4, "by hand")
        for rows in (
            [
                [1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1],
                [0.1, 0, 1, 0], [2, 4, 6, 8], [-1, 0, 1, 5.5], [1, 0, 0, 0, 0, 0, 1, 1],
            ],
        )
    ]
    for G in (2, 3, 4, 8, 16, 64, 100):
        rows = [
            rewards_of(G + i, G, 3, kind)
            for i, kind in enumerate(("01", "partial", "any", "scarce", "partial"))
        ]
        rows.append(torch.eye(G, dtype=F64)[0])  # one correct answer: A = sqrt(G - 1)
        rows.append(1 - torch.eye(G, dtype=F64)[1])
        asks.append(advantage_ask(rows, G, "rewards of all kinds"))
    tiny = [torch.tensor([0.5, 0.5 + e, 0.5 - e, 0.5], dtype=F64) for e in (1e-3, 1e-5, 1e-6, 1e-7)]
    asks.append(
        advantage_ask(
            tiny, 4, "rewards that nearly agree, where the 1e-6 counts", near=(1e-6, 1e-4)
        )
    )
    return asks


@check(3, "group_advantages", "care", 1, "equal rewards, dtypes, errors, arguments left alone")
def _():
    def exactly_zero(answer, right):
        for (a, left), (b, given) in zip(answer, right):
            if is_error(a) or not isinstance(a, torch.Tensor):
                return same(a, b)
            if a.shape != b.shape or (a != 0).any():
                return (
                    f"equal rewards of {given[0]:.6g} must give exactly 0, and give"
                    f" {a.flatten()[0]:.6g}"
                )
        return None

    asks = []
    for G in (1, 2, 3, 5, 6, 7, 10, 16, 64):
        rows = [
            torch.full((2 * G,), v, dtype=torch.float32)
            for v in (0.1, 0.3, 0.7, 1 / 3, 0.9, 1e-4, 123.456)
        ]
        asks.append(advantage_ask(rows, G, "equal rewards in float32", judge=exactly_zero))
    whole = [
        torch.tensor([1, 0, 0, 1]), torch.tensor([True, False, False, False]),
        torch.tensor([2, 0, 1, 1]),
    ]
    asks.append(advantage_ask(whole, 4, "rewards of integers", near=(1e-5, 1e-5)))
    asks.append(advantage_ask([torch.tensor([1.0, 0, 0, 0, 1, 1])], 4, "6 rewards"))
    asks.append(advantage_ask([torch.tensor([1.0, 0])], 0, "a group size of 0"))
    asks.append(advantage_ask([torch.tensor([1.0, 0])], 4, "2 rewards"))
    asks.append(advantage_ask([torch.tensor([1.0, 0])], -2, "a group size of -2"))
    return asks


AGGREGATES = ("seq_mean", "token_mean", "seq_sum", "seq_const")


def aggregate_calls():
    rows = []
    for seed, (B, T) in enumerate(((2, 6), (8, 5), (3, 1), (16, 9), (1, 1), (1, 4))):
        made = batch(30 + seed, 1, B, T)
        losses = made["logp"] * 3 + 1
        for agg in AGGREGATES:
            width = (10,) if agg == "seq_const" else ()
            rows.append((losses, made["mask"], agg, *width))
            some = made["mask"].clone()
            some[0] = False
            rows.append((losses, some, agg, *width))
            rows.append((torch.where(some, losses, NAN), some, agg, *width))
            rows.append((losses[:, :1], some, agg, *width))
            rows.append((losses, torch.zeros_like(some), agg, *width))
    losses, mask = (
        torch.tensor([[-1.0] * 6, [1.0] * 6], dtype=F64),
        torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 6]).bool(),
    )
    rows += [(losses, mask, agg, 10) for agg in AGGREGATES]
    rows += [(losses, mask, "seq_const", n) for n in (1, 6, 512)]
    rows += [(losses, mask, agg) for agg in ("mean", "", "seq_const", None, "sum")]
    return [(row, {}) for row in rows]


@check(3, "_aggregate", "core", 1, "every aggregator, the constant one too")
def _():
    calls = aggregate_calls()

    def judged(answer, right):
        for (args, _), a, b in zip(calls, answer, right):
            found = same(a, b)
            if found:
                return (
                    f"_aggregate, agg {args[2]!r}, a mask of {args[1].sum(1).tolist()} tokens:"
                    f" {found}"
                )
        return None if len(answer) == len(right) else "too few values"

    return [Ask("many", dict(file="losses", name="_aggregate", calls=calls), "", judged)]


@check(3, "reinforce", "core", 1, "loss and gradient, baselines, the KL in the reward")
def _():
    asks = []
    for i, options in enumerate(
        (
            {}, dict(baseline=0.5), dict(baseline=-2.0), dict(beta=0.3),
            dict(beta=0.1, baseline=1.0), dict(beta=-0.2),
        )
    ):
        for G, kind in ((1, "01"), (4, "partial"), (16, "any")):
            asks.append(loss_ask("reinforce", f"G {G}", options, seed=40 + i, G=G, rewards=kind))
        asks.append(
            loss_ask(
                "reinforce", "logp in place of old_logp", options, seed=50 + i, G=4, on_policy=True
            )
        )
    asks.append(
        loss_ask("reinforce", "answers of -45 nats", dict(beta=0.2), seed=60, G=4, T=15, depth=3.0)
    )
    for T in (1, 5):
        made = dict(seed=60 + T, G=1, groups=1, T=T, rewards="any")
        asks.append(loss_ask("reinforce", f"one answer of {T} tokens", **made))
    return asks


@check(3, "reinforce", "care", 1, "padding, empty rows, dtypes, stats, errors")
def _():
    return (
        rough_asks("reinforce", dict(beta=0.2, baseline=0.25), 70)[:5]
        + [
            loss_ask(
                "reinforce", "no reference needed without beta", {}, True,
                arguments=batch(75, 4) | dict(ref_logp=None, entropy=None),
            )
        ]
        + refusals(
            "reinforce", others=[("beta without a reference", dict(ref_logp=None), dict(beta=0.1))]
        )
    )


@check(
    3, "grpo", "core", 3, "the clipped surrogate and its gradient, at every ratio and group size"
)
def _():
    asks = []
    for i, (G, kind) in enumerate(
        ((4, "01"), (2, "partial"), (8, "any"), (16, "scarce"), (64, "scarce"), (64, "01"))
    ):
        asks.append(loss_ask("grpo", f"G {G}", seed=80 + i, G=G, rewards=kind))
        asks.append(
            loss_ask(
                "grpo", f"G {G}, ratios of 50 and 1/50", seed=90 + i, G=G, rewards=kind, ratio=50.0
            )
        )
        asks.append(
            loss_ask(
                "grpo", f"G {G}, logp in place of old_logp: every ratio is 1", seed=100 + i, G=G,
                rewards=kind, on_policy=True,
            )
        )
    for options in (
        dict(clip_low=0.2, clip_high=0.28), dict(clip_low=0.05, clip_high=0.5),
        dict(clip_low=0.9, clip_high=5.0), dict(clip_low=0.0, clip_high=0.0), dict(clip_high=1e9),
    ):
        asks.append(
            loss_ask("grpo", "other clips", options, seed=110, G=4, rewards="partial", ratio=6.0)
        )
    asks.append(loss_ask("grpo", "answers of -45 nats", seed=111, G=4, T=15, depth=3.0))
    for T in (1, 5):
        made = dict(seed=112 + T, G=2, groups=1, T=T, rewards="any")
        asks.append(loss_ask("grpo", f"two answers of {T} tokens", **made))
    return asks


@check(3, "grpo", "core", 1, "every mean over tokens that agg names")
def _():
    return [
        loss_ask("grpo", what, dict(agg=agg), **made, seed=120 + i, G=4, rewards="partial")
        for agg in ("seq_mean", "token_mean", "seq_sum")
        for i, (what, made) in enumerate(
            (("ratios of 6", dict(ratio=6.0)), ("on policy", dict(on_policy=True)))
        )
    ] + [loss_ask("grpo", "agg='mean' is unknown", dict(agg="mean"), seed=122, G=4)]


@check(3, "grpo", "core", 1, "the KL term")
def _():
    return [
        loss_ask("grpo", what, options, seed=130 + i, G=4, **made)
        for i, options in enumerate(
            (dict(beta=0.04), dict(beta=2.0), dict(beta=0.5, agg="token_mean"))
        )
        for what, made in (
            ("ratios of 6", dict(ratio=6.0)), ("on policy", dict(on_policy=True)),
            ("equal rewards", dict(rewards=1.0)),
        )
    ]


@check(3, "grpo", "care", 1, "padding, empty rows, dtypes, stats, errors")
def _():
    return (
        rough_asks("grpo", dict(beta=0.1), 140)[:5]
        + rough_asks("grpo", {}, 150)
        + refusals(
            "grpo",
            others=[
                ("beta without a reference", dict(ref_logp=None), dict(beta=0.1)),
                ("an unknown agg", {}, dict(agg="mean")),
            ],
        )
    )


# ----------------------------------------------------------------------- 4: attention with a cache


@check(4, "rotate", "core", 1, "each pair turned by its angle")
def _():
    draw, asks = torch.Generator().manual_seed(0), []
    for shape in ((1, 1, 1, 4), (2, 5, 3, 8), (3, 4, 2, 2)):
        B, T, heads, d = shape
        for rows in ((T,), (B, T)):
            angles = 3 * randn(draw, *rows, 1, d // 2)
            asks.append(
                Ask(
                    "turned",
                    dict(
                        x=randn(draw, *shape), cos=angles.cos(), sin=angles.sin(),
                        weight=randn(draw, *shape),
                    ),
                    f"rotate, x {shape}, angles {tuple(angles.shape)}:",
                )
            )
    return asks


@check(4, "rotate", "care", 1, "shape and dtype stay; x is left alone")
def _():
    draw, asks = torch.Generator().manual_seed(1), []
    x, angles = randn(draw, 2, 3, 4, 6), randn(draw, 2, 3, 1, 3)
    for dtype, near in ((torch.float32, (1e-5, 1e-4)), (torch.bfloat16, (0.05, 0.05))):
        asks.append(
            Ask(
                "turned",
                dict(
                    x=x.to(dtype), cos=angles.cos().to(dtype), sin=angles.sin().to(dtype), weight=x
                ),
                f"rotate in {dtype}:",
                lambda a, b, near=near: same(a, b, near) or same_dtype_only(a, b),
            )
        )
    return asks


def same_dtype_only(answer, right):
    for key, value in right.items():
        if isinstance(value, torch.Tensor) and answer[key].dtype != value.dtype:
            return f"{key} should be {value.dtype}, but is {answer[key].dtype}"
    return None


def masks(seed, B, S, left=True):
    draw = torch.Generator().manual_seed(seed)
    padding = torch.randint(0, S, (B,), generator=draw)
    padding[0] = 0
    mask = torch.arange(S) >= padding[:, None]
    return mask if left else mask & (torch.rand(B, S, generator=draw) < 0.7)


def allowed_cases(window_too):
    cases = []
    for S in (1, 2, 3, 5, 8):
        for T in range(1, S + 1):
            for window in ((None, 1, 2, 3, S - 1, S, S + 1, 99) if window_too else (None,)):
                if window == 0:
                    continue
                cases += [(None, T, S, window), (torch.ones(2, S).bool(), T, S, window)]
                cases += [(masks(S + T, 3, S, left), T, S, window) for left in (True, False)]
    return cases


def judge_allowed(cases):
    def judged(answer, right):
        if not isinstance(answer, list) or len(answer) != len(cases):
            return same(answer, right)
        for (mask, T, S, window), got, wanted in zip(cases, answer, right):
            label = (
                "allowed with"
                f" {'no mask' if mask is None else 'a mask of ' + str(mask.long().tolist())}, T"
                f" {T}, S {S}, window {window}:"
            )
            B = 1 if mask is None else len(mask)
            if is_error(got):
                return f"{label} it fails with {got['says']}"
            if got is None:
                if T not in (1, S):
                    return (
                        f"{label} None stands for plain causal attention, right for T = 1 and T = S"
                        " only"
                    )
                got = torch.ones(1, 1, T, S).tril(S - T) > 0
            if wanted is None:
                wanted = torch.ones(1, 1, T, S).tril(S - T) > 0
            if not isinstance(got, torch.Tensor) or got.dtype != torch.bool:
                return f"{label} it must be a bool tensor or None, and is {shown(got)}"
            try:
                got, wanted = (x.expand(B, 1, T, S)[:, 0] for x in (got, wanted))
            except RuntimeError:
                return f"{label} it must be (1 or {B}, 1, {T}, {S}), and is {tuple(got.shape)}"
            real = torch.ones(B, T, dtype=torch.bool) if mask is None else mask[:, -T:]
            for b, q in real.nonzero().tolist():
                if not torch.equal(got[b, q], wanted[b, q]):
                    rows = ["".join(str(int(x)) for x in table[b, q]) for table in (wanted, got)]
                    return f"{label} row {b}, query {q} must read {rows[0]}, and reads {rows[1]}"
            if not got.any(-1).all():
                return f"{label} a padded query reads nothing, and its softmax is NaN"
        return None

    return judged


@check(4, "allowed", "core", 2, "who sees whom: causality, padding, windows")
def _():
    cases = allowed_cases(True)
    return [Ask("seen", dict(cases=cases), "", judge_allowed(cases))]


@check(4, "allowed", "care", 1, "masks of numbers; a row of its own for each row of the batch")
def _():
    cases = [
        (masks(i, 4, 6).to(kind), T, 6, window)
        for i, kind in enumerate((torch.int64, torch.float32))
        for T in (1, 2, 6)
        for window in (None, 2)
    ]
    cases += [
        (torch.zeros(2, 4).bool(), 4, 4, None), (torch.zeros(2, 4).bool(), 2, 4, 2),
        (None, 64, 200, 50),
    ]
    return [
        Ask(
            "seen",
            dict(cases=cases),
            "",
            judge_allowed(
                [(None if mask is None else mask.bool(), *rest) for mask, *rest in cases]
            ),
        )
    ]


def cache_ask(plan, what, dtype=F64, B=2, heads=3, d=4):
    """plan: [(layer, tokens)]."""
    draw = torch.Generator().manual_seed(len(plan))
    make = lambda *shape: torch.randn(*shape, generator=draw, dtype=F64).to(dtype)
    steps, weights, length = [], [], {}
    for layer, T in plan:
        length[layer] = length.get(layer, 0) + T
        steps.append((layer, make(B, heads, T, d), make(B, heads, T, d)))
        weights.append((make(B, heads, length[layer], d), make(B, heads, length[layer], d)))
    return Ask(
        "cached", dict(steps=steps, weights=weights, rows=torch.tensor([B - 1, 0, B - 1])),
        f"KVCache.update, {what}:", near=(1e-4, 1e-4) if dtype != F64 else (1e-7, 1e-5),
    )


@check(4, "KVCache.update", "core", 2, "keys and values of all tokens, with their gradients")
def _():
    return [
        cache_ask([(0, 3)], "one layer, once"),
        cache_ask([(0, 2), (0, 1)], "one layer, twice"),
        cache_ask(
            [(0, 4), (1, 4), (2, 4), (0, 1), (1, 1), (2, 1), (0, 3), (1, 3), (2, 3)], "three layers"
        ),
        cache_ask(
            [(0, 1), (1, 1)] + [(layer, 1) for _ in range(12) for layer in (0, 1)], "token by token"
        ),
    ]


@check(4, "KVCache.update", "care", 1, "dtypes, the cache's own lists, what was returned before")
def _():
    return [
        cache_ask([(0, 2), (1, 2), (0, 2), (1, 2)], "in float32", torch.float32),
        cache_ask([(0, 5), (0, 5), (0, 1)], "one row, one head", B=1, heads=1, d=1),
    ]


def attention_asks(kinds, T=7, B=2, cases=None, start=0):
    asks = []
    for i, kind in enumerate(kinds):
        draw = torch.Generator().manual_seed(i)
        x, weight = randn(draw, B, T, 32), randn(draw, B, T, 32)
        for pieces in cases or ((T,), (3, 1, T - 4), (T - 1, 1), (1,) * T):
            made, S = [], 0
            for t in pieces:
                S += t
                made.append(None if t in (1, S) else torch.ones(1, 1, t, S).tril(S - t) > 0)
            for cached in ((False, True) if len(pieces) == 1 else (True,)):
                asks.append(
                    Ask(
                        "attention",
                        dict(
                            kind=kind, x=x, pieces=pieces, masks=made, weight=weight,
                            with_cache=cached, start=start,
                        ),
                        f"attention ({kind}), {T} tokens read as"
                        f" {pieces}{', with a cache' if cached else ''}:",
                    )
                )
    return asks


@check(
    4, "Attention.forward", "core", 3,
    "attention read at once and piece by piece, with its gradient",
)
def _():
    return attention_asks(("llama", "one key head", "as many key heads")) + attention_asks(
        ("llama",), start=50
    )


@check(4, "Attention.forward", "care", 1, "masks, biases, norms, heads of their own size")
def _():
    asks = attention_asks(
        ("qwen2", "qwen3", "biases", "head of its own size"), cases=((7,), (5, 2))
    )
    draw = torch.Generator().manual_seed(9)
    x, weight, S = randn(draw, 3, 6, 32), randn(draw, 3, 6, 32), 6
    seen = (torch.rand(3, 1, 6, S, generator=draw) < 0.5).tril() | torch.eye(S).bool()
    return asks + [
        Ask(
            "attention", dict(kind="llama", x=x, pieces=(6,), masks=[seen], weight=weight),
            "attention with a mask of its own for each row:",
        ),
        Ask(
            "attention",
            dict(
                kind="llama", x=x, pieces=(5, 1), masks=[seen[..., :5, :5], seen[..., 5:, :]],
                weight=weight,
            ),
            "attention with a mask, the last token on its own:",
        ),
    ]


@check(4, "", "core", 2, "all of the exercise together, in the whole model")
def _():
    draw, asks = torch.Generator().manual_seed(3), []
    tokens, mask = torch.randint(2, 53, (4, 9), generator=draw), masks(5, 4, 9)
    weight = randn(draw, 4, 9, 32)
    for kind in ("llama", "window", "layers of both kinds", "qwen3"):
        for padded in (None, mask):
            for pieces in ((9,), (3, 1, 5), (8, 1)):
                if (
                    padded is not None
                    and not padded[:, : pieces[0]].any(1).all()
                    and len(pieces) > 1
                ):
                    pieces = (8, 1)
                asks.append(
                    Ask(
                        "forward",
                        dict(kind=kind, tokens=tokens, mask=padded, pieces=pieces, weight=weight),
                        f"the model ({kind}), {'a padded' if padded is not None else 'a'} batch"
                        f" read as {pieces}:",
                    )
                )
        asks.append(
            Ask(
                "forward",
                dict(
                    kind=kind, tokens=torch.cat([tokens[[0, 0, 1, 1], :5], tokens[:, 5:]], 1),
                    mask=None, pieces=(5, 3, 1), weight=weight, rows=torch.tensor([0, 0, 1, 1]),
                ),
                f"the model ({kind}), a prompt read once for two answers:",
            )
        )
    return asks


# ------------------------------------------------------------------- 5: log-probabilities in tiles

SHAPES = ((1, 3, 2), (1, 8, 97), (5, 7, 1), (37, 16, 101), (64, 5, 30), (3, 4, 24))


def logprob_options(seed, N, D, V, dtype=F64, size=4.0):
    draw = torch.Generator().manual_seed(seed)
    return dict(
        hidden=randn(draw, N, D).to(dtype), weight=(size * D**-0.5 * randn(draw, V, D)).to(dtype),
        targets=torch.randint(V, (N,), generator=draw), g=randn(draw, N).to(dtype),
        e=randn(draw, N).to(dtype),
    )


def only(*keys):
    return lambda answer, right: (
        same(answer, {key: right[key] for key in keys if key in right})
        if (isinstance(answer, dict) and not is_error(answer))
        else same(answer, right)
    )


@check(5, "", "core", 2, "log-probability and entropy, at every size and temperature")
def _():
    asks = []
    for i, (N, D, V) in enumerate(SHAPES):
        for T in (0.7, 1.0, 1.3):
            asks.append(
                Ask(
                    "logprobs", dict(temperature=T, frozen="all", **logprob_options(i, N, D, V)),
                    f"{N} tokens of {V}, temperature {T}:", only("logp", "entropy"), (1e-9, 1e-8),
                )
            )
    asks.append(
        Ask(
            "logprobs",
            dict(
                temperature=0.9, frozen="all", **logprob_options(20, 1100, 3, 2003, torch.float32)
            ),
            "1,100 tokens of 2,003, which are several tiles:",
            lambda a, b: same(a, {k: b[k] for k in ("logp", "entropy")}, (1e-4, 1e-4)),
        )
    )
    return asks


@check(5, "", "core", 4, "the gradient of both, alone and together")
def _():
    asks = []
    for i, (N, D, V) in enumerate(SHAPES):
        for T in (0.7, 1.3):
            options = logprob_options(i + 30, N, D, V)
            for which in ("both", "log-probability", "entropy"):
                these = (
                    options
                    | {"log-probability": dict(e=None), "entropy": dict(g=None), "both": {}}[which]
                )
                asks.append(
                    Ask(
                        "logprobs", dict(temperature=T, **these),
                        f"{which}, {N} tokens of {V}, temperature {T}:",
                        only("logp", "entropy", "gradient in hidden", "gradient in weight"),
                    )
                )
    asks.append(
        Ask(
            "logprobs", dict(temperature=0.9, **logprob_options(50, 1100, 3, 2003)),
            "1,100 tokens of 2,003, which are several tiles:",
            only("gradient in hidden", "gradient in weight"),
        )
    )
    return asks


@check(5, "", "care", 3, "the logits never take more memory than MEMORY allows")
def _():
    """The logits have 328 MB; up to 256 MB of them may be kept, and these are more. What the
    process grows by is measured from outside, with all that an honest piece needs beside it."""
    size = dict(N=8192, D=4, V=10007, temperature=0.8)
    return [
        Ask(
            "large_logprobs", dict(with_gradient=False, **size),
            "logits of 328 MB, without gradient:", lambda a, b: same(a, b, (1e-4, 1e-4)),
            memory=400 << 20,
        ),
        Ask(
            "large_logprobs", dict(with_gradient=True, **size), "logits of 328 MB, with gradient:",
            lambda a, b: same(a, b, (2e-3, 1e-3)), memory=400 << 20,
        ),
    ]


@check(5, "", "care", 1, "shapes, dtypes, frozen inputs, a second backward, large logits")
def _():
    made = logprob_options(60, 12, 4, 9)
    shaped = made | dict(
        hidden=made["hidden"].view(3, 4, 4), targets=made["targets"].view(3, 4),
        g=made["g"].view(3, 4), e=made["e"].view(3, 4),
    )
    none = made | {key: made[key][:0] for key in ("hidden", "targets", "g", "e")}
    f32 = logprob_options(61, 40, 16, 301, torch.float32)
    half = f32 | dict(hidden=f32["hidden"].bfloat16())
    peaked = dict(
        hidden=torch.tensor([[1.0, 0, 0, 0], [-1, -1, -1, -1], [0.1, 0.08, 0, 0]]),
        weight=torch.eye(4) * 300, targets=torch.tensor([0, 1, 1]), g=torch.ones(3),
        e=torch.ones(3),
    )
    f32_near = lambda a, b: same(a, b, (2e-4, 2e-3)) or same_dtype_only(a, b)
    ask = lambda options, what, judge=None, **more: Ask(
        "logprobs", dict(temperature=0.8, **options, **more), what, judge
    )
    return [
        ask(made, "arguments after the call, and a second backward:", twice=True),
        ask(shaped, "hidden (3, 4, D) and targets (3, 4):"),
        ask(none, "no token at all:"),
        ask(made | dict(weight=made["weight"].float()), "float64 states, a float32 head:"),
        ask(made, "a frozen head:", frozen="weight"),
        ask(made, "frozen hidden states:", frozen="hidden"),
        ask(f32, "in float32:", f32_near),
        ask(peaked, "logits of 300:", f32_near),
        ask(
            half, "hidden states in bf16:",
            lambda a, b: same(a, b, (2e-2, 2e-2)) or same_dtype_only(a, b),
        ),
    ]


# --------------------------------------------------------------------------------- 6: the sampler

PROMPTS = ("4 7 2 9,24=", "1,2=", "3 9 9,7=")


def sample_ask(what, judge, prompts=PROMPTS, G=4, new=14, T=1.0, plan=((None, ("a", 0)),), **model):
    return Ask(
        "sampled",
        dict(model=model, prompts=prompts, group_size=G, new=new, temperature=T, plan=plan), what,
        judge,
    )


def of_rollouts(judge):
    """A judge of all rollouts at once, once they look like rollouts."""

    def judged(answer, right):
        if is_error(answer) or is_error(right) or "shape" in answer:
            return same(answer, right)
        for got, wanted in zip(answer["rollouts"], right["rollouts"]):
            B = len(wanted["prompt_mask"])
            for name in ("tokens", "prompt_mask", "response", "mask", "logp", "finished"):
                x = got[name]
                if (
                    not isinstance(x, torch.Tensor)
                    or x.dim() != (1 if name == "finished" else 2)
                    or len(x) != B
                ):
                    return f"{name} must be a tensor of {B} rows, and is {shown(x)}"
            if not got["response"].shape == got["mask"].shape == got["logp"].shape:
                return "response, mask and logp must all be (B, T)"
            if got["prompt_mask"].shape[1] + got["mask"].shape[1] != got["tokens"].shape[1]:
                return "tokens must be (B, P+T)"
        return judge(answer["rollouts"], right["rollouts"])

    return judged


REFERENCE = None  # the modules; grade.py sets it


def scored(rollout, temperature, model):
    """What each row's tokens are worth, read alone, whole and without cache: (B, T) float64."""
    import worker

    policy, _ = worker.speaker(REFERENCE, **model)
    policy = policy.double()
    policy.dtype = F64
    P, found = rollout["prompt_mask"].shape[1], torch.zeros(rollout["mask"].shape, dtype=F64)
    with torch.no_grad():
        for row, (tokens, keep, mask) in enumerate(
            zip(rollout["tokens"], rollout["prompt_mask"], rollout["mask"])
        ):
            n = int(mask.sum())
            ids = torch.cat([tokens[:P][keep.bool()], tokens[P : P + n]])
            p = len(ids) - n
            logits = policy(ids[None])[0] @ policy.head.T / temperature
            found[row, :n] = logits.log_softmax(-1)[p - 1 : -1].gather(1, ids[p:, None])[:, 0]
    return found


def judge_recorded(temperature, model):
    def judged(answer, right):
        for got, wanted in zip(answer, right):
            if not torch.equal(got["prompt_mask"], wanted["prompt_mask"]):
                return (
                    "the rows must be the prompts in their order, each G times, padded on the left"
                )
            P = wanted["prompt_mask"].shape[1]
            keep = wanted["prompt_mask"]
            if not torch.equal(got["tokens"][:, :P][keep], wanted["tokens"][:, :P][keep]):
                return (
                    "the rows must ask the prompts in their order, each G times: neighbours, not"
                    " interleaved"
                )
            mask = got["mask"].bool()
            if (got["response"].lt(0) | got["response"].ge(22)).any():
                return "response must hold token ids"
            if (
                mask.sum() == 0
                or (mask.long().cumsum(1) != torch.arange(1, mask.shape[1] + 1))
                .logical_and(mask)
                .any()
            ):
                return "the mask is 1 up to some length, then 0, and at least one"
            exact = scored(got, temperature, model)
            found = same_tensor(
                got["logp"].to(F64)[mask], exact[mask], (2e-4, 2e-4),
                "the recorded log-probability ",
            )
            if found:
                return found + hint(got, mask, exact, temperature, model)
        return None

    return of_rollouts(judged)


def hint(got, mask, exact, temperature, model):
    made = {
        "the temperature missing": lambda: scored(got, 1.0, model),
        "log-probabilities divided by the temperature": (
            lambda: scored(got, 1.0, model) / temperature
        ),
        "probabilities, not their logarithms": lambda: exact.exp(),
    }
    for name, make in made.items():
        if torch.allclose(got["logp"].to(F64)[mask], make()[mask], atol=2e-4, rtol=2e-4):
            return f". This is what you get with: {name}"
    return ""


@check(
    6, "sample", "core", 2,
    "the recorded log-probabilities, in a padded batch, at every temperature",
)
def _():
    asks = []
    for kind in ("llama", "qwen2", "qwen3", "window", "biases"):
        for T in (0.7, 1.0, 1.5) if kind == "llama" else (0.7,):
            model = dict(kind=kind, seed=3)
            asks.append(
                sample_ask(
                    f"{kind}, temperature {T}:", judge_recorded(T, model), T=T,
                    plan=((None, ("a", 5)),), **model,
                )
            )
    return asks


TAIL = {
    3: 0.30, 5: 0.22, 7: 0.15, 8: 0.10, 10: 0.08, 11: 0.06, 12: 0.04, 13: 0.02, 15: 0.012,
    16: 0.008, 17: 0.005, 18: 0.003, 19: 0.0012, 20: 0.0005, 21: 0.0002, 6: 0.0001,
}
FALSE_ALARM = 1e-7  # of each test of chance: see the tests of it


def binomial_tails(n, p, k):
    """P(X <= k) and P(X >= k) for X binomial, from its logarithms."""
    terms = [
        math.lgamma(n + 1)
        - math.lgamma(i + 1)
        - math.lgamma(n - i + 1)
        + i * math.log(p)
        + (n - i) * math.log1p(-p)
        for i in range(n + 1)
    ]
    sum_of = lambda part: sum(math.exp(t) for t in part if t > -745)
    return sum_of(terms[: k + 1]), sum_of(terms[k:])


def unlikely(n, p, k):
    """Whether k successes of n are rarer than FALSE_ALARM, on either side."""
    p = min(max(p, 1e-300), 1 - 1e-12)
    if abs(k - n * p) <= 3 * math.sqrt(n * p * (1 - p)) + 1:
        return False
    return min(binomial_tails(n, p, k)) < FALSE_ALARM / 2


def judge_frequencies(chances, temperature):
    """How often the rarest tokens come, two, three and more of them together; the mean
    log-probability; and each token by itself."""
    raw = {token: p ** (1 / temperature) for token, p in chances.items()}
    p = {token: value / sum(raw.values()) for token, value in raw.items()}

    def judged(answer, right):
        tokens = torch.cat([got["response"][got["mask"].bool()] for got in answer])
        counts = collections.Counter(tokens.tolist())
        n, order = len(tokens), sorted(p, key=p.get)
        if counts.keys() - p.keys():
            token = min(counts.keys() - p.keys())
            return f"token {token} was drawn, whose probability is below 1e-20"
        for size in range(1, len(order)):
            k, mass = sum(counts[t] for t in order[:size]), sum(p[t] for t in order[:size])
            if unlikely(n, mass, k):
                return (
                    f"of {n} draws {k} were one of the {size} rarest tokens, where {n * mass:.1f}"
                    " are expected (a right sampler is this far off once in"
                    f" {1 / FALSE_ALARM:.0e}): a sharpened or truncated softmax?"
                )
        seen = sum(k * math.log(p[t]) for t, k in counts.items()) / n
        mean = sum(p[t] * math.log(p[t]) for t in order)
        variance = sum(p[t] * (math.log(p[t]) - mean) ** 2 for t in order)
        z = (seen - mean) / (variance / n) ** 0.5
        if abs(z) > 5.5:  # by the normal law once in 2.6e7
            return (
                f"the mean log-probability of {n} draws is {seen:.4f}, where {mean:.4f} is"
                f" expected ({z:+.1f} standard deviations): a"
                f" {'sharpened' if z > 0 else 'flattened'} softmax?"
            )
        for token in order:
            k = counts[token]
            if unlikely(n, p[token], k):
                return f"of {n} draws {k} were token {token}, where {n * p[token]:.1f} are expected"
        return None

    return of_rollouts(judged)


@check(6, "sample", "core", 1, "draws follow the full softmax, to the end of its tail")
def _():
    model = dict(chances=TAIL, stop_ids=[1])
    asks = [
        sample_ask(
            f"120,000 draws of one token, temperature {T}:", judge_frequencies(TAIL, T), ("4 7=",),
            120000, 1, T, ((None, ("a", seed)),), **model,
        )
        for seed, T in ((1, 1.0), (2, 2.0), (3, 0.8))
    ]
    return asks + [
        sample_ask(
            "100 x 40 answers of 15 tokens:", judge_frequencies(TAIL, 1.0), ("4 7=", "1,2="), 2000,
            15, 1.0, ((None, ("a", 4)),), **model,
        )
    ]


def texts(rollout):
    return [
        tuple(ids[: int(n)]) for ids, n in zip(rollout["response"].tolist(), rollout["mask"].sum(1))
    ]


def judge_generator(plan):
    """The same seed gives the same, another seed or the generator's next state something else."""

    def judged(answer, right):
        said, state, made = {}, {}, []
        for i, (torch_seed, name) in enumerate(plan):
            if name is None:
                key = ("torch", torch_seed, i if torch_seed is None else 0)
            else:
                state[tuple(name)] = state.get(tuple(name), -1) + 1
                key = (name[1], state[tuple(name)])
            made.append(key)
        for (i, key), (j, other) in itertools.combinations(enumerate(made), 2):
            alike = texts(answer[i]) == texts(answer[j])
            if key == other and not alike:
                return (
                    f"two calls with {label(key)} draw different answers: the generator's state"
                    " alone decides, nothing else"
                )
            if key != other and alike:
                return (
                    f"two calls draw the same answers, one with {label(key)}, the other with"
                    f" {label(other)}"
                )
        return None

    def label(key):
        if key[0] == "torch":
            return "no generator and " + (
                f"torch.manual_seed({key[1]})" if key[1] is not None else "no new seed"
            )
        return f"a generator of seed {key[0]}{', asked again' * (key[1] > 0)}"

    return of_rollouts(judged)


@check(6, "sample", "core", 5, "the generator's state alone decides the draws")
def _():
    plans = (
        ((1, ("a", 0)), (2, ("b", 0)), (1, ("c", 7)), (1, ("a", 0)), (3, ("b", 0)), (3, ("a", 0))),
        ((1, None), (1, None), (2, None), (None, None), (None, None), (1, ("a", 0)), (5, ("b", 0))),
        ((8, ("a", 0)), (8, ("a", 0)), (8, ("a", 0)), (8, ("z", 123)), (8, None)),
    )
    return [
        sample_ask(
            f"calls with {len({p[1] for p in plan})} generators:", judge_generator(plan), G=16,
            new=12, plan=plan, seed=1,
        )
        for plan in plans
    ]


def rows_alike(rows):
    """Of all pairs of rows, whether two agree in more tokens than any pair would by chance."""
    marks = torch.nn.functional.one_hot(rows, 22).flatten(1).float()
    agree = (marks @ marks.T).fill_diagonal_(-1)
    k, pairs = int(agree.max()), len(rows) * (len(rows) - 1) / 2
    if binomial_tails(rows.shape[1], 1 / 12, k)[1] * pairs < FALSE_ALARM:
        i, j = divmod(int(agree.argmax()), len(rows))
        return (
            f"answers {i} and {j} agree in {k} of {rows.shape[1]} tokens: they share their chance"
        )
    return None


def judge_independent(chances, calls):
    """A policy for which every token has the same distribution wherever it stands: two draws agree
    with chance sum p^2, and any chance that they share shows in how often they do."""
    p = torch.tensor(sorted(chances.values()), dtype=F64)
    agree = float((p**2).sum())

    def judged(answer, right):
        found = torch.stack(
            [got["response"].view(3, -1, got["response"].shape[1]) for got in answer]
        )
        C, X, G, T = found.shape  # calls, prompts, rows of a group, tokens
        pairs = {}
        for lag in range(1, T):
            pairs[f"tokens {lag} apart in an answer"] = found[..., lag:], found[..., :-lag]
        for t in range(T - 1):
            pairs[f"tokens {t} and {t + 1} of an answer"] = found[..., t], found[..., t + 1]
        for lag in (1, 2, 3, G // 2):
            pairs[f"rows {lag} apart in a group"] = found[:, :, lag:], found[:, :, :-lag]
            pairs[f"rows {lag} apart, a token later"] = (
                found[:, :, lag:, 1:], found[:, :, :-lag, :-1],
            )
        for a, b in itertools.combinations(range(X), 2):
            pairs[f"the same rows of prompts {a} and {b}"] = found[:, a], found[:, b]
        for a, b in itertools.combinations(range(C), 2):
            pairs[f"the same rows of calls {a} and {b}"] = found[a], found[b]
            pairs[f"call {b} a token behind call {a}"] = found[a][..., 1:], found[b][..., :-1]
        alike = rows_alike(found.permute(1, 2, 0, 3).reshape(X * G, C * T)) or rows_alike(
            found.reshape(-1, T)
        )
        if alike:
            return alike
        for name, (a, b) in pairs.items():
            n, k = a.numel(), int((a == b).sum())
            if unlikely(n, agree, k):
                return (
                    f"{name} agree in {k} of {n} pairs, where {n * agree:.0f} are expected: they"
                    " share their chance (independent draws are this far off once in"
                    f" {1 / FALSE_ALARM:.0e})"
                )
        return None

    return of_rollouts(judged)


EVEN = {token: 1 / 12 for token in range(3, 15)}


@check(6, "sample", "core", 2, "draws are independent over tokens, rows, prompts and calls")
def _():
    model = dict(chances=EVEN, stop_ids=[1])
    same_generator = ((None, ("a", 0)),) * 3
    no_generator = ((9, None), (None, None), (None, None))
    return [
        sample_ask(
            f"three calls {what}:", judge_independent(EVEN, 3), PROMPTS, 64, 12, 1.0, plan, **model
        )
        for what, plan in (
            ("with one generator", same_generator), ("without a generator", no_generator),
        )
    ]


def judge_ends(stop_ids, new):
    def judged(answer, right):
        for got in answer:
            kinds = set()
            for row, (ids, mask, finished) in enumerate(
                zip(got["response"].tolist(), got["mask"].tolist(), got["finished"].tolist())
            ):
                n, stops = sum(map(bool, mask)), [
                    t for t, token in enumerate(ids) if token in stop_ids and mask[t]
                ]
                kinds.add(bool(finished))
                if [bool(x) for x in mask] != [t < n for t in range(len(ids))]:
                    return f"row {row}: the mask is 1 up to some length, then 0; it is {mask}"
                if finished and (not stops or n != stops[0] + 1):
                    return (
                        f"row {row}: the first stop token is at {stops[:1] or 'no place'} of the"
                        f" answer, so the mask must hold {(stops or [0])[0] + 1} ones, and"
                        f" holds {n}"
                    )
                if not finished and (stops or n != new):
                    return (
                        f"row {row}: finished is False where max_new_tokens cut the answer; this"
                        f" one has {n} tokens of"
                        f" {new}{' and a stop token at ' + str(stops[0]) if stops else ''}"
                    )
                if n == len(ids) == new and finished and not stops:
                    return f"row {row}: finished, but without a stop token"
        return None

    return of_rollouts(judged)


@check(6, "sample", "core", 1, "an answer ends with its first stop token, or is cut")
def _():
    chances = {1: 0.08, 4: 0.08, **{token: 0.84 / 10 for token in range(5, 15)}}
    asks = [
        sample_ask(
            "two stop tokens:", judge_ends([1, 4], new), G=40, new=new, chances=chances,
            stop_ids=[1, 4],
        )
        for new in (1, 2, 6, 14)
    ]
    return asks + [
        sample_ask(
            "every token stops:", judge_ends(list(range(22)), 9), new=9, stop_ids=list(range(22))
        ),
        sample_ask("the end by one stop token:", judge_ends([1], 14), G=8, stop_ids=[1], seed=2),
        sample_ask("no stop token at all:", judge_ends([], 5), new=5, stop_ids=[]),
    ]


def judge_care(stop_ids, new):
    def judged(answer, right):
        import worker

        for got, wanted in zip(answer, right):
            mask, P = got["mask"].bool(), wanted["prompt_mask"].shape[1]
            _, tokenizer = worker.speaker(REFERENCE)
            if (
                got["mask"].dtype != torch.bool
                or got["finished"].dtype != torch.bool
                or got["prompt_mask"].dtype != torch.bool
            ):
                return "mask, prompt_mask and finished are bool"
            if got["logp"].dtype != torch.float32:
                return f"logp is float32, not {got['logp'].dtype}"
            if got["tokens"].dtype != torch.int64 or got["response"].dtype != torch.int64:
                return "tokens and response are int64"
            if got["with gradient"]:
                return "sampling needs no gradient: torch.no_grad()"
            if (got["logp"][~mask] != 0).any():
                return "logp must be 0 off the mask"
            if (got["response"][~mask] != tokenizer.pad_token_id).any():
                return "response must hold the padding token off the mask"
            if not torch.equal(got["tokens"][:, P:], got["response"]):
                return "response must be the tail of tokens"
            if not torch.equal(got["tokens"][:, :P], wanted["tokens"][:, :P]):
                return (
                    "tokens must begin with the prompts, padded on the left with the padding token"
                )
            if got["mask"].shape[1] != int(mask.sum(1).max()):
                return (
                    f"T must be {int(mask.sum(1).max())}, the length of the longest answer, and is"
                    f" {got['mask'].shape[1]}"
                )
            ids = [
                row[: int(n) - int(f)]
                for row, n, f in zip(got["response"].tolist(), mask.sum(1), got["finished"])
            ]
            said = REFERENCE.sample.texts_of(tokenizer, ids)
            if not isinstance(got["texts"], list) or got["texts"] != said:
                where = (
                    next(
                        (i for i, (a, b) in enumerate(zip(got["texts"], said)) if a != b), len(said)
                    )
                    if isinstance(got["texts"], list)
                    else 0
                )
                return (
                    f"text {where} should be {said[where] if where < len(said) else said!r}, but is"
                    f" {shown(got['texts'][where:where + 1])}"
                )
        return None

    return of_rollouts(judged)


@check(6, "sample", "care", 1, "what is off the mask, texts, dtypes, T, a prompt that does not fit")
def _():
    asks = [
        sample_ask("a ragged batch:", judge_care([1, 4, 9, 14], 14), G=8, seed=seed)
        for seed in (0, 1)
    ]
    asks.append(
        sample_ask("two calls:", judge_care([1], 14), G=3, plan=((None, ("a", 0)), (0, None)))
    )
    asks.append(
        sample_ask(
            "short answers, a large budget:", judge_care([1], 40), G=4, new=40,
            stop_ids=list(range(1, 22)),
        )
    )
    room = 64 - len(PROMPTS[0])
    asks.append(
        sample_ask(
            f"prompts of {len(PROMPTS[0])} and {room} new tokens in a context of 64:",
            lambda a, b: a["says"] if is_error(a) else None, new=room,
        )
    )
    asks.append(
        sample_ask(
            f"prompts of {len(PROMPTS[0])} and {room + 1} new tokens in a context of 64:", None,
            new=room + 1,
        )
    )
    return asks


# -------------------------------------------------------------------------------- 7: one exact step


@functools.cache
def rollout():
    """A ragged rollout of 12 rows, made by the reference."""
    policy, tokenizer = REFERENCE.policy.tiny(
        width=32, layers=2, heads=2, kv_heads=1, inner=64, seed=0
    )
    policy.stop_ids = [1, 4, 9, 14]
    made = REFERENCE.sample.sample(
        policy, tokenizer, list(PROMPTS), 4, 9, 0.7, torch.Generator().manual_seed(3)
    )
    return dict(vars(made))


REWARDS = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1])


def old_and_ref():
    """Log-probabilities somewhat off those of the policy, 0 off the mask."""
    own, mask, draw = rollout()["logp"], rollout()["mask"], torch.Generator().manual_seed(4)
    noise = lambda: torch.where(
        mask, (own + 0.3 * torch.randn(own.shape, generator=draw)).clamp(max=-0.01), 0.0
    )
    return noise(), noise()


def near_gradient(answer, right):
    """Gradients within 1e-4 of their largest value; numbers of stats within 1e-4."""
    if not isinstance(answer, dict) or is_error(answer) or is_error(right):
        return same(answer, right)
    for i, (got, wanted) in enumerate(zip(answer["steps"], right["steps"])):
        if got.get("steps") != wanted.get("steps"):
            return (
                f"step {i + 1}: the optimiser must step {wanted['steps']} times, and steps"
                f" {got.get('steps')} times"
            )
        if "gradient" in wanted:
            size = wanted["gradient"].abs().max().item()
            found = same_tensor(
                got["gradient"], wanted["gradient"], (2e-5 * size, 1e-3),
                f"step {i + 1}: the gradient of the weights ",
            )
            if found:
                return found + ratio_of(got["gradient"], wanted["gradient"])
        keys = ("loss",)
        found = same(
            {k: got["stats"].get(k) for k in keys}, {k: wanted["stats"][k] for k in keys},
            (1e-4, 1e-4), f"step {i + 1}: stats",
        )
        if found:
            return found
    return same_tensor(answer["weights"], right["weights"], (1e-4, 1e-3), "the weights afterwards ")


def ratio_of(a, b):
    scale = float((a @ b) / (b @ b))
    if (a - scale * b).norm() < 1e-2 * b.norm() * max(abs(scale), 0.01):
        return f": it is {scale:.3g} times the right one"
    return ""


def step_ask(
    what, losses=("coupled",), judge=near_gradient, lr=0.0, adam=False, rows=None, **options
):
    options = dict(temperature=0.7, grad_clip=1e9) | options
    made, rewards = rollout(), REWARDS
    if rows is not None:
        rewards = rewards[rows]
        made = {
            k: v[rows] if isinstance(v, torch.Tensor) else [v[i] for i in rows.tolist()]
            for k, v in made.items()
        }
    return Ask(
        "stepped",
        dict(
            rollout=made, rewards=rewards, group_size=4, losses=list(losses), options=options,
            lr=lr, adam=adam,
        ),
        what,
        judge,
    )


@check(
    7, "train_step", "core", 5, "the gradient of the whole batch's loss, whatever the micro-batch"
)
def _():
    return [
        step_ask(f"micro_batch {size}, {name}:", (name,), micro_batch=size)
        for name in ("coupled", "without_entropy", "only_entropy", "some_rows")
        for size in ((None, 0, 1, 3, 4, 5, 8, 12, 100) if name == "coupled" else (None, 4, 5))
    ]


@check(7, "train_step", "core", 2, "temperature, old_logp and ref_logp reach the loss")
def _():
    old, ref = old_and_ref()
    return [
        step_ask(f"{what}, micro_batch {size}:", micro_batch=size, **more)
        for size in (None, 5)
        for what, more in (
            ("temperature 1", dict(temperature=1.0)), ("temperature 1.5", dict(temperature=1.5)),
            ("old_logp given", dict(old_logp=old)), ("ref_logp given", dict(ref_logp=ref)),
            ("both given", dict(old_logp=old, ref_logp=ref)),
        )
    ]


@check(7, "train_step", "core", 2, "a step goes downhill, begins afresh, and is clipped")
def _():
    def judge_clip(answer, right):
        return near_gradient(answer, right) or same(
            {"grad_norm": answer["steps"][0]["stats"].get("grad_norm")},
            {"grad_norm": right["steps"][0]["stats"]["grad_norm"]}, (1e-5, 1e-3), "stats",
        )

    return [
        step_ask(
            "three steps of plain descent:", ("coupled", "without_entropy", "coupled"), lr=0.05
        ),
        step_ask(
            "three steps in chunks of 5:", ("coupled", "only_entropy", "coupled"), lr=0.05,
            micro_batch=5,
        ),
        step_ask("a gradient clipped at 0.01:", judge=judge_clip, grad_clip=0.01),
        step_ask(
            "a gradient clipped at 0.01, chunks of 4:", judge=judge_clip, grad_clip=0.01,
            micro_batch=4,
        ),
        step_ask("a gradient too small to be clipped:", judge=judge_clip, grad_clip=1e3),
        step_ask("one step of AdamW:", judge=judge_moved, lr=1e-3, adam=True),
    ]


def judge_moved(answer, right):
    if is_error(answer):
        return same(answer, right)
    if not answer["steps"][0]["moved"]:
        return "the weights did not move"
    far = (answer["weights"] - right["weights"]).abs().max().item()
    return None if far < 2.5e-3 else "the weights moved elsewhere"


def judge_bad(answer, right):
    if is_error(answer):
        return same(answer, right)
    for i, (got, wanted) in enumerate(zip(answer["steps"], right["steps"])):
        bad, stats = bool(wanted["stats"]["bad"]), got["stats"]
        if not isinstance(stats, dict) or "bad" not in stats:
            return f"step {i + 1}: stats lacks 'bad'"
        if bool(stats["bad"]) != bad:
            return f"step {i + 1}: stats['bad'] should be {bad}, but is {stats['bad']}"
        if bad and (got["moved"] or got.get("steps") or got.get("moments")):
            return f"step {i + 1}: the optimiser made a step, and weights or moments have moved"
        if bad and list(stats.get("bad_rows", [])) != list(wanted["stats"]["bad_rows"]):
            return (
                f"step {i + 1}: stats['bad_rows'] should be {wanted['stats']['bad_rows']}, but is"
                f" {stats.get('bad_rows')}"
            )
        if not bad and not got["moved"]:
            return f"step {i + 1}: a good step after a bad one must move the weights"
    return None


@check(7, "train_step", "care", 2, "a NaN or infinite loss, gradient or norm moves nothing")
def _():
    asks = []
    for name in SPOILT:
        for size in (None, 5):
            asks.append(
                step_ask(
                    f"{name}, micro_batch {size}:", (name, "coupled"), judge_bad, lr=0.05,
                    grad_clip=1.0, micro_batch=size,
                )
            )
        asks.append(
            step_ask(f"{name}, AdamW:", (name,), judge_bad, lr=1e-3, adam=True, grad_clip=1.0)
        )
    return asks


def judge_stats(answer, right):
    if is_error(answer):
        return same(answer, right)
    for got, wanted in zip(answer["steps"], right["steps"]):
        stats = got["stats"]
        if not isinstance(stats, dict):
            return f"train_step must return stats, a dict, and returns {shown(stats)}"
        for key, value in wanted["stats"].items():
            if key == "bad_rows":
                continue
            if key not in stats:
                return f"stats lacks '{key}'"
            if not isinstance(stats[key], (int, float)):
                return f"stats['{key}'] must be a number, and is {shown(stats[key])}"
            found = same(float(stats[key]), float(value), (1e-4, 1e-3), f"stats['{key}']")
            if found:
                return found
        more = [
            key
            for key, value in stats.items()
            if key != "bad_rows" and not isinstance(value, (int, float))
        ]
        if more:
            return f"stats must be a flat dict of floats; '{more[0]}' is {shown(stats[more[0]])}"
    return None


@check(
    7, "train_step", "care", 1,
    "stats: those of the loss, and loss, grad_norm and bad in every step",
)
def _():
    old, ref = old_and_ref()
    return [
        step_ask(
            "stats:", ("coupled", "without_entropy"), judge_stats, micro_batch=size, ref_logp=ref,
            old_logp=old, grad_clip=0.5,
        )
        for size in (None, 5)
    ]


# ------------------------------------------------------------------------ 8: differential smoothing

GAMMAS = (
    dict(gamma_p=0.03, gamma_n=0.01), dict(gamma_p=0.2, gamma_n=0.0),
    dict(gamma_p=0.0, gamma_n=0.1), dict(gamma_p=-0.1, gamma_n=-0.2),
    dict(gamma_p=0.0, gamma_n=0.0), {},
)
KINDS_OF_REWARDS = ("01", "partial", "scarce", 1.0, 0.0, 0.5, 0.9)


def smoothing_asks(name, seed):
    asks = []
    for i, gammas in enumerate(GAMMAS):
        for reduction in ("sum", "mean"):
            options = dict(reduction=reduction, **gammas)
            for j, kind in enumerate(KINDS_OF_REWARDS):
                G = (4, 8, 16, 2, 64, 3, 5)[(i + j) % 7]
                made = (dict(), dict(on_policy=True), dict(ratio=50.0), dict(T=30, depth=3.0))[
                    (i + j) % 4
                ]
                asks.append(
                    loss_ask(
                        name, f"G {G}, rewards {kind}{', ' + str(made) if made else ''}", options,
                        seed=seed + 10 * i + j, G=G, groups=3, rewards=kind, **made,
                    )
                )
    for options in (
        dict(agg="token_mean"), dict(agg="seq_mean"), dict(agg="seq_sum"), dict(beta=0.3),
        dict(clip_low=0.1, clip_high=0.4),
    ):
        for made in (dict(ratio=6.0), dict(on_policy=True)):
            asks.append(
                loss_ask(
                    name, f"{made}", options | dict(gamma_p=0.1, gamma_n=0.05), seed=seed + 90, G=4,
                    rewards="partial", **made,
                )
            )
    one = batch(seed + 99, 4, 2, 1, "01")
    one |= dict(
        old_logp=torch.full((8, 1), -45.0, dtype=F64), logp=torch.full((8, 1), -44.8, dtype=F64)
    )
    asks.append(
        loss_ask(name, "one token of -45 nats", dict(gamma_p=0.2, gamma_n=0.1), arguments=one)
    )
    alone = batch(seed + 98, 1, 4, 3, "01")
    asks.append(loss_ask(name, "groups of one", dict(gamma_p=0.2, gamma_n=0.1), arguments=alone))
    return asks


def smoothing_care(name, seed):
    options = dict(gamma_p=0.1, gamma_n=0.05)
    return (
        rough_asks(name, options, seed, "partial")
        + rough_asks(name, options | dict(reduction="mean"), seed, "partial")[:2]
        + [
            loss_ask(name, "no advantage", dict(gamma_p=0.0), True, seed=seed, G=4, rewards=1.0)
        ]
        + refusals(
            name,
            options,
            one_refused=True,
            others=[
                ("an unknown reduction", {}, dict(reduction="max")),
                ("an unknown agg", {}, dict(agg="mean")),
                ("beta without a reference", dict(ref_logp=None), dict(beta=0.1)),
            ],
        )
    )


@check(8, "diffsmooth", "core", 3, "Eq. (6): both signs, sum and mean, any reward, any group")
def _():
    return smoothing_asks("diffsmooth", 200)


@check(8, "diffsmooth", "care", 1, "padding, empty rows, dtypes, stats, errors")
def _():
    return smoothing_care("diffsmooth", 300)


@check(8, "diffsmooth_reward", "core", 2, "the term in the reward, centred, without a std")
def _():
    return smoothing_asks("diffsmooth_reward", 400)


@check(8, "diffsmooth_reward", "care", 1, "padding, empty rows, dtypes, stats, errors")
def _():
    return smoothing_care("diffsmooth_reward", 500)


# ---------------------------------------------------------------------- 9: Pass@k as the objective


@check(9, "pkpo", "core", 4, "the factor, for every number of correct answers")
def _():
    asks = []
    for i, (G, k) in enumerate(
        ((4, 1), (4, 2), (4, 4), (8, 3), (8, 8), (16, 4), (64, 16), (5, 5), (3, 2), (1, 1))
    ):
        for kind in ("01", "partial", "scarce", 1.0, 0.0, 0.9):
            made = (dict(), dict(on_policy=True), dict(ratio=50.0))[i % 3]
            asks.append(
                loss_ask(
                    "pkpo", f"G {G}, rewards {kind}", dict(k=k), seed=600 + i, G=G, groups=3,
                    rewards=kind, **made,
                )
            )
        rewards = torch.tensor([float(j < c) for c in range(G + 1) for j in range(G)], dtype=F64)
        made = batch(620 + i, G, G + 1, 2)
        asks.append(
            loss_ask(
                "pkpo", f"G {G}, 0 to {G} correct", dict(k=k),
                arguments=made | dict(rewards=rewards),
            )
        )
    for options in (
        {}, dict(agg="token_mean"), dict(agg="seq_sum"), dict(beta=0.3),
        dict(clip_low=0.1, clip_high=0.4, k=2),
    ):
        for made in (dict(ratio=6.0), dict(on_policy=True)):
            asks.append(
                loss_ask("pkpo", f"{made}", options, seed=640, G=8, rewards="partial", **made)
            )
    return asks


@check(9, "pkpo", "care", 2, "k, padding, empty rows, dtypes, stats, errors")
def _():
    refused = [(f"k {k} for G 4", {}, dict(k=k)) for k in (0, -1, 5)]
    return rough_asks("pkpo", dict(k=2), 700, "partial") + refusals(
        "pkpo",
        dict(k=2),
        one_refused=True,
        others=refused
        + [
            ("an unknown agg", {}, dict(agg="mean")),
            ("beta without a reference", dict(ref_logp=None), dict(beta=0.1)),
        ],
    )


# -------------------------------------------------------------------- an exercise's parts together


def together(number, points, functions):
    """All questions about these functions once more, with all of them as they were handed in."""
    mine = [one for one in CHECKS if one.exercise == number and one.function]
    check(number, "", "core", points, "all of the exercise together")(
        lambda: [ask for one in mine for ask in one.asks()]
    )


together(1, 1, ("parse", "countdown_reward"))
together(3, 2, ("group_advantages", "_aggregate", "reinforce", "grpo"))
together(8, 1, ("diffsmooth", "diffsmooth_reward"))
