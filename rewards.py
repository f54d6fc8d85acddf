"""What is correct: two tasks whose answers a few lines of exact arithmetic can check.

A task hands out problems, writes their prompts and gives each sampled text a reward of 1.0 or 0.0:
`Math` has questions with a reference answer, compared with the last \\boxed{...} of the text, and
`Countdown` makes a target out of a few numbers with + - * /, each number used exactly once.

    >>> task = Countdown()                             # laptop setting: 4 numbers in 1..9
    >>> x = Problem(numbers=(4, 7, 2, 9), target=24)
    >>> task.prompt(x)
    '4 7 2 9,24='
    >>> task.reward(x, "2*(9+7-4)")                    # 2 * 12
    1.0
    >>> task.reward(x, "4*(7-2)+4")                    # also 24, but 4 twice and no 9
    0.0
    >>> task.canonical("2*(9+7-4)") == task.canonical("(7-(4-9))*2")
    True
    >>> len(task.solutions(x))                         # A(x) of Eq. (2), the solution multiplicity
    2

The reward is what training optimises, so a policy finds every hole of a verifier. Ours never runs
the text, never raises on any string, and looks at no more than a few hundred characters of it.
"""
import hashlib
import itertools
import json
import random
import re
from collections import Counter
from contextlib import suppress
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple
from unicodedata import normalize

MAX_ANSWER = 400               # characters; a longer answer is refused before anything reads it
MAX_DEPTH = 30                 # nested parentheses, so that the parser cannot overflow the stack


def countdown_reward(text, numbers, target, style="bare"):
    """1.0 if the answer in text uses each number exactly once and equals target, else 0.0.

    style: where the answer stands, see `answer_of`; an unknown one raises UserError, a ValueError.
    countdown_reward("6/(5/4)", (4, 5, 6), Fraction(24, 5)) is 1.0: no rounding anywhere.
    """
    check_style(style)
    answer = answer_of(text, style)
    node = parse(answer)
    if node is None:
        return 0.0
    # The text parsed, so its digits are its numbers. Sorted lists compare as multisets.
    numerator, denominator, _ = node
    used = sorted(int(digits) for digits in re.findall("[0-9]+", answer))
    return float(used == sorted(numbers) and denominator != 0 and numerator == target * denominator)


def answer_of(text, style):
    """What counts as the answer: the whole text, or for "think" what the last <answer>...</answer>
    holds: "2+3" of "<answer>1</answer> or <answer>2+3</answer>.", but "" where that tag is not
    closed or stands inside another one."""
    if not isinstance(text, str):
        return ""
    if style != "think":
        return text
    # Searching from the end keeps this fast on megabytes, which a regular expression would not be.
    *before, last = text.rsplit("<answer>", 2)
    nested = len(before) == 2 and "</answer>" not in before[1]
    if not before or nested or last.count("</answer>") != 1:
        return ""
    return last.partition("</answer>")[0]


# Exact arithmetic: a tree is an int or (op, left, right), a node is (numerator, denominator, tree).
# The verifier, the generator and the solver all compute with `combine` and nothing else.

def parse(text):
    """The node of an expression, or None: parse("2*(1+3)") is (8, 1, ("*", 2, ("+", 1, 3))).

    Allowed: ASCII digits, + - * / ( ), and any number of spaces, tabs and line ends between them.
    None for all else: signs ("-1+2"), "**", "//", "1 2", "07", "1+2=3", any other character, more
    than MAX_ANSWER characters or MAX_DEPTH nested parentheses. 5/0 parses: its denominator is 0.

        sum     = product (("+" | "-") product)*
        product = atom (("*" | "/") atom)*
        atom    = number | "(" sum ")"
    """
    if len(text) > MAX_ANSWER or not re.fullmatch(r"[-+*/() \t\r\n0-9]*", text):
        return None
    # "07" falls into two numbers and "**" into two operators here, which no rule accepts.
    tokens = re.findall(r"0|[1-9][0-9]*|[-+*/()]", text) + ["end"]
    tokens.reverse()                                   # tokens[-1] is next, tokens.pop() takes it

    def chain(ops, part, depth):                       # grouped from the left: 9-4-3 is (9-4)-3
        node = part(depth)
        while tokens[-1] in ops:
            node = combine(tokens.pop(), node, part(depth))
        return node

    def sum_(depth):
        return chain(("+", "-"), product, depth)

    def product(depth):
        return chain(("*", "/"), atom, depth)

    def atom(depth):
        token = tokens.pop()
        if token.isdigit():
            return int(token), 1, int(token)
        if token != "(" or depth == MAX_DEPTH:
            raise ValueError(token)
        node = sum_(depth + 1)
        if tokens.pop() != ")":
            raise ValueError("not closed")
        return node

    try:
        node = sum_(0)
    except ValueError:
        return None
    return node if tokens == ["end"] else None         # anything left over: "1 2", "1+2)"


def combine(op, left, right):
    """The node `left op right` in exact integers: combine("/", (1, 1, 1), (2, 1, 2))[:2] is (1, 2).
    Fractions are not reduced (a few numbers cannot grow far), which is what makes this fast.
    Division by zero gives 0/0, and every later operation keeps it 0/0."""
    (a, b, x), (c, d, y) = left, right
    if op == "+":
        return a * d + c * b, b * d, (op, x, y)
    if op == "-":
        return a * d - c * b, b * d, (op, x, y)
    if op == "*":
        return a * c, b * d, (op, x, y)
    if c == 0:                                         # without this line 1/(1/0) would be 0
        return 0, 0, (op, x, y)
    return a * d, b * c, (op, x, y)


class Countdown:
    """Random problems: a count of numbers from counts, each in 1..high, and a target in range; with
    path those of a file, though `example` makes its own. held_out: the share never trained on. In
    the paper: Countdown(counts=(3, 4), high=99, targets=(10, 100), style="think")."""

    system = "You are a careful assistant who solves arithmetic puzzles."
    several_answers = True                             # correct answers of one problem can differ

    def __init__(self, counts=(4,), high=9, targets=(1, 60), style="bare", held_out=0.1, path=None):
        check_countdown(counts, high, targets, style, held_out)
        self.counts, self.high, self.targets = tuple(counts), high, tuple(targets)
        self.style, self.held_out = style, held_out
        self.problems = countdown_file(self, path) if path else None
        self.notes = self.problems.notes if path else []

    def example(self, rng, held_out=False):
        """One problem of the split with one answer: (Problem((4, 7, 2, 9), 24), "2*(9+7-4)")."""
        return draw_example(self, rng, held_out)

    def problem(self, rng, held_out=False):
        made_up = self.problems is None
        return self.example(rng, held_out)[0] if made_up else self.problems.draw(rng, held_out)

    def held_out_problems(self, n):
        """The first n of the one list that every call and every machine gets, all distinct."""
        if self.problems:
            return self.problems.held_out[:n]
        rng, found, repeats = random.Random(0), {}, 0
        while len(found) < n:
            problem = self.problem(rng, held_out=True)
            repeats = repeats + 1 if problem.identity in found else 0
            if repeats == 1000:
                raise UserError(f"Only {len(found)} held-out problems found of {n}: ask for fewer.")
            found.setdefault(problem.identity, problem)
        return list(found.values())

    def is_held_out(self, problem):
        return share_of(problem.identity) < self.held_out

    def prompt(self, problem, style=None):
        check_style(style := style or self.style)
        listed = ", ".join(map(str, problem.numbers))
        spaced = listed.replace(",", "")
        return STYLES[style].format(listed=listed, spaced=spaced, target=problem.target)

    def reward(self, problem, text):
        return countdown_reward(text, problem.numbers, problem.target, self.style)

    def canonical(self, text):
        """One form for all ways to write the answer in text, None when no answer parses."""
        node = parse(answer_of(text, self.style))
        return canonical_form(node[2]) if node else None

    def solutions(self, problem):
        """All distinct correct answers in canonical form, sorted; A(x) of Eq. (2) counts them."""
        nodes = all_nodes(problem.numbers)
        return sorted({canonical_form(t) for a, b, t in nodes if b and a == problem.target * b})


# ------------ a first reading ends here; below: making and solving problems, math, files, flags

class UserError(ValueError):
    """A sentence for the user, who can mend it: a flag, or a file."""


MAX_TRIES = 100_000            # draws before a setting is called impossible
# "bare" is for models trained here, "think" the paper's prompt in our words, "ask" for small chat
# models. The example in "think" is in letters: one in numbers could be copied and be correct.
STYLES = {
    "bare": "{spaced},{target}=",
    "think": "Use the numbers {listed} to make {target}. You may add, subtract, multiply and "
             "divide (+ - * /) and use parentheses, and every number must be used exactly once. "
             "Reason step by step inside <think> </think>, then give only the final expression "
             "inside <answer> </answer>, like <answer>(a + b) * c</answer> with numbers in place "
             "of letters.",
    "ask": "Use each of the numbers {listed} exactly once, with + - * / and parentheses, to make "
           "{target}. Answer with one arithmetic expression and nothing else.",
}
# For `render`: the operators that a left and a right operand may not have without parentheses.
WRAP = {"+": ("", ""), "-": ("", "+-"), "*": ("+-", "+-"), "/": ("+-", "+-*/")}


class Problem(NamedTuple):
    numbers: tuple                                     # of int, in the order that the prompt shows
    target: int
    identity = property(lambda self: f"{sorted(self.numbers)} {self.target}")    # in any order


def check_style(style):
    if style not in STYLES:
        raise UserError(f"Unknown style {style!r}: choose from {', '.join(STYLES)}.")


def check_countdown(counts, high, targets, style, held_out):
    check_style(style)
    if not counts or not all(isinstance(n, int) and 2 <= n <= 5 for n in counts):
        raise UserError(f"counts must be integers from 2 to 5, not {counts}.")
    if not isinstance(high, int) or not 1 <= high <= 10**6:
        raise UserError(f"high must be an integer from 1 to 10**6, not {high}.")
    if len(targets) != 2 or targets[0] > targets[1]:
        raise UserError(f"targets must be a pair (lowest, highest), not {targets}.")
    if not 0 <= held_out <= 1:
        raise ValueError(f"held_out is a share between 0 and 1, not {held_out}.")


def draw_example(task, rng, held_out):
    """Combine random pairs of numbers with random operators until one expression is left, and keep
    it if its value is an integer in range: a target is as frequent as expressions hit it."""
    if task.held_out == (0 if held_out else 1):
        raise ValueError(f"held_out={task.held_out} leaves no problem in this split.")
    # A warm start draws 200,000: int(random() * n) is faster than choice; its bias is n / 2**53.
    draw, high, counts, (low, top) = rng.random, task.high, task.counts, task.targets
    for _ in range(MAX_TRIES):
        count = counts[int(draw() * len(counts))]
        numbers = [int(draw() * high) + 1 for _ in range(count)]
        nodes = [(n, 1, n) for n in numbers]
        for left in range(count, 1, -1):
            x = nodes.pop(int(draw() * left))
            y = nodes.pop(int(draw() * (left - 1)))
            nodes.append(combine("+-*/"[int(draw() * 4)], x, y))
        numerator, denominator, tree = nodes[0]
        if denominator == 0 or numerator % denominator:
            continue
        problem = Problem(tuple(numbers), numerator // denominator)
        if low <= problem.target <= top and task.is_held_out(problem) == held_out:
            return problem, render(tree)
    raise UserError(f"No such problem in {MAX_TRIES} draws: widen targets={task.targets}.")


def render(tree, wrap=""):
    """The tree as text with as few parentheses as possible: ("-", 1, ("-", 2, 3)) is "1-(2-3)"."""
    if isinstance(tree, int):
        return str(tree)
    op, left, right = tree
    text = render(left, WRAP[op][0]) + op + render(right, WRAP[op][1])
    return f"({text})" if op in wrap else text


def canonical_form(tree):
    """One text for all trees that are equal up to commutativity and associativity: any order and
    grouping of a sum with its signs, a-(b-c) = c+a-b, and of a product with its divisions,
    a/(b/c) = c*a/b. Nothing else: (a-b)*(c-d) and (b-a)*(d-c) stay two answers, as do a*(b+c) and
    a*b+a*c, and x*1 and x/1."""
    if isinstance(tree, int):
        return str(tree)
    ops = "+-" if tree[0] in "+-" else "*/"
    parts, nested = [], [(False, tree)]                # operands, each with whether it is inverse
    while nested:
        inverse, part = nested.pop()
        if isinstance(part, int) or part[0] not in ops:
            text = canonical_form(part)
            wrap = ops == "*/" and not isinstance(part, int)    # a sum inside a product
            parts.append((inverse, f"({text})" if wrap else text))
        else:
            op, left, right = part
            nested += [(inverse, left), (inverse != (op == ops[1]), right)]
    # Plain operands sort before inverse ones, and the leftmost is always plain: no leading sign.
    return "".join(ops[inverse] + text for inverse, text in sorted(parts))[1:]


def all_nodes(numbers):
    """Every node that uses each number once, up to the order of the operands of + and *: 6 for 2
    numbers, 108 for 3, 3,240 for 4 (milliseconds), 136,080 for 5 (half a second)."""
    if len(numbers) == 1:
        return [(numbers[0], 1, numbers[0])]
    nodes = []
    # Each way to split the numbers once: bit i sends number i to the right, the last stays left.
    for bits in range(1, 2 ** (len(numbers) - 1)):
        right = [n for i, n in enumerate(numbers) if bits >> i & 1]
        left = [n for i, n in enumerate(numbers) if not bits >> i & 1]
        for x, y in itertools.product(all_nodes(left), all_nodes(right)):
            nodes += [combine("+", x, y), combine("-", x, y), combine("-", y, x),
                      combine("*", x, y), combine("/", x, y), combine("/", y, x)]
    return nodes


# --------------------------------------------------------------------------------------------- math

def math_reward(text, answer):
    """1.0 if the last \\boxed{} of text writes the same as answer (plain or boxed), else 0.0.
    math_reward("so \\boxed{x=0.5}", "\\frac12") is 1.0. Numbers are compared exactly as fractions
    (0.33 is not 1/3), everything else letter by letter after REWRITES: no algebra."""
    if not isinstance(text, str) or not isinstance(answer, str):
        return 0.0
    boxed, reference = last_boxed(text), last_boxed(answer) or answer
    if boxed is None or len(reference) > MAX_ANSWER:
        return 0.0
    (name, form), (true_name, true_form) = normal_form(boxed), normal_form(reference)
    named = not name or not true_name or name == true_name    # x=5 is not y=5, but 5 is either
    return float(named and form == true_form != "")


def last_boxed(text):
    """The inside of the last balanced \\boxed{...}, or None: "so \\boxed{\\frac{1}{2}}." gives
    "\\frac{1}{2}". A box cut off by the end of the text is passed over; a too long one is None."""
    text, start = text.replace("\\boxed {", "\\boxed{"), len(text)
    while (start := text.rfind("\\boxed{", 0, start)) >= 0:
        inside, depth = text[start + 7:start + 8 + MAX_ANSWER], 1
        for match in re.finditer(r"\\.|[{}]", inside, re.DOTALL):    # \{ and \} do not count
            depth += {"{": 1, "}": -1}.get(match[0], 0)
            if depth == 0:
                return inside[:match.start()]
        if len(inside) > MAX_ANSWER:                   # bounds the loop: earlier boxes are longer
            return None
    return None


def normal_form(text):
    """(variable, form) of an answer: "x = \\dfrac12" gives ("x", "1/2"), "50\\%" ("", "50")."""
    for pattern, by in REWRITES:
        text = pattern.sub(by, text)
    names = {name.replace(";", ",") for _, name in VARIABLE.findall(text)}
    if len(names) == 1:
        return names.pop(), normal_part(VARIABLE.sub(r"\1", text))
    return "", normal_part(text)


def power_of_ten(match):
    """4.5e33 or 4.5*10^{33} as digits alone, exactly."""
    return format(Decimal(f"{match['number'] or 1}e{match['exponent'].strip('{}')}"), "f")


# What we compare, then the characters and commands that say the same.
SAME = r"""
- − – ‐ ‑ －; * × · ⋅ ∙ ∗ \times \cdot \ast; / ⁄ ∕ ÷ \div; ^ **; ( （; ) ）; , ，; ' ′ ’; < \lt;
<= ≤ ⩽ \le \leq \leqslant; > \gt; >= ≥ ⩾ \ge \geq \geqslant; ≠ \ne \neq !=; \in ∈; \cap ∩; ∪ \cup;
\emptyset ∅ \varnothing; \mathbb{R} ℝ; \pm ±; \infty ∞ infinity; \circ ∘; \{ \lbrace; \} \rbrace;
\frac12 ½; \frac13 ⅓; \frac23 ⅔; \frac14 ¼; \frac34 ¾; \sqrt √ sqrt;
\frac \dfrac \tfrac \cfrac \sfrac \nicefrac; \pi π pi; \theta θ; \alpha α; \beta β; \lambda λ;
\phi φ; \omega ω; \sin sin; \cos cos; \tan tan; \log log; \ln ln"""
ONE_NAME = {other: one for one, *others in map(str.split, SAME.split(";")) for other in others}
ONE_NAME |= dict.fromkeys(r"\quad \qquad".split(), " ") | dict.fromkeys(
    r"° º \degree \left \right \displaystyle \textstyle \limits \bf \rm \it \mathbf \boldsymbol "
    r"\large \Large".split(), "")
NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
BRACED = r"\{((?:[^{}]|\{[^{}]*\})*)\}"                # braces in braces, once
TEXT = r"\\(?:text(?:rm|bf|it|sf|tt|normal)?|mathrm|mbox|emph|operatorname)"
# In \text{} after a number stands a unit, unless it may change what the number says: 3 a.m. is not
# 3 p.m., 2\mathrm{i} is not 2, and 3 million, 3 tenths, 3 or more, 3 divided by ten are not 3.
UNIT = TEXT + (
    r"\{(?!(?i: ?[ap]\.? ?m\b| ?(?![mgshl]\b)[a-z] ?\}|[^{}]*\b(?:and|or|to|than|if|for|except|is"
    r"|are|not?|none|more|less|fewer|greater|most|least|positive|negative|even|odd|north|south|east"
    r"|west|left|right|up|down|above|below|before|after|ago|bce?|ad|r|plus|minus|times|by|over"
    r"|divided|multiplied|added|subtracted|increased|decreased|reduced|raised|squared|cubed|power"
    r"|root|mod(?:ulo)?|base|binary|decimal|remainder|factorial|repeat[a-z]*|recurring|periodic"
    r"|doubled?|tripled?|twice|halved|half|halves|quarters?|pairs?|couples?|dozens?|scores?|gross"
    r"|lakhs?|crores?|hundreds?|thousands?|[a-z]*illions?|per ?mille?|basis|pp[mb]|one|two|three"
    r"|four|five|six|seven|eight|nine|tens?|eleven|twelve|[a-z]*teen|(?:twen|thir|for|fif|six"
    r"|seven|eigh|nine)ty|st|nd|rd|th|thirds?|[a-z]*(?:four|fif|six|seven|eigh|nin|ten|leven|twelf"
    r"|teen|tie|hundred|thousand|illion)ths?)\b))[a-zA-Z .'/-]*(?:\^\{?[23]\}?)?\}"
    r"|(?:(?:square|cubic|sq\.?) ?)?(?:cm|mm|km|kg|inch(?:es)?|feet|miles|meters|units?|degrees"
    r"|dollars|cents|years|days|hours|minutes|seconds|percent|pct)")

# Applied in this order. Left: how people write it. Right: the one way we compare. The list only
# grows by pairs seen in real answers, and each rule must keep different answers different: a
# verifier that is too kind is found by the policy, one that is too strict costs a little signal.
REWRITES = [(re.compile(pattern, re.ASCII), by) for pattern, by in [
    # typography
    (r"[\s\u00a0\u2000-\u200b\u202f\u205f\u2060\u3000\ufeff]+", " "),
    (r"^ ?\*\*(.*)\*\* ?$", r"\1"),
    (rf"\\(?:math(?:bf|it|sf|tt|normal)|boldsymbol|bm|pmb|bold|underline) ?{BRACED}", r"\1"),
    (r"(?:√|(?<![\\a-zA-Z])sqrt) ?(\d+(?:\.\d+)?)", r"\\sqrt{\1}"),    # but \sqrt23 is \sqrt{2}3
    (r"(?:√|\\?(?<![a-zA-Z])sqrt) ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"[⁰¹²³⁴-⁹⁺⁻]+", lambda match: f"^{{{normalize('NFKC', match[0])}}}"),
    (r"(?<![\\a-zA-Z])[a-z]{2,}(?![a-z])|\\[a-zA-Z]+|\*\*|!=|[^\x00-\x7f]",
     lambda match: ONE_NAME.get(match[0], match[0])),
    (r"\^ ?\{?\\circ\}?|\\?[$%€£]", ""),
    (r"\. ?$", ""),
    (r"\\(?:[bB]igg?[lrm]?|(?:text)?color\{\w+\})(?![a-zA-Z])", ""),
    # blanks and commas that stand in large numbers only: 1\,234, 1{,}234, 1,\! 234, 1 234
    (r"(?<![\w.^])(?<![^\\],)[1-9]\d{0,2}(?:(?:\{,\}|, ?\\! ?|\\!|\\[, ]|[~ ])\d{3})+"
     r"(?!\d|,\d|(?:\\[, ]|[~ ])*[\d/])", lambda match: re.sub(r"\D", "", match[0])),
    (r"-0,(?=\d)", "-0{,}"),                           # a decimal comma: -0,5 is not 0 and 5
    (r"(?<!\\)\\[!()\[\]]", ""),
    (r"(?:(?<!\\)\\[,;:> ]|[~ ])+", " "),
    # symbols with several names
    (r"(?<=[)\]]) ?U ?(?=[(\[])", "∪"),
    (r"\\(begin|end)\{bmatrix\}", r"\\\1{pmatrix}"),
    (r"[(\[] ?\\begin\{(?:matrix\}|array\}\{[clr]+\})((?:(?!\\begin|\\end).)*)"
     r"\\end\{(?:matrix|array)\} ?[)\]]", r"\\begin{pmatrix}\1\\end{pmatrix}"),
    (r"\^ ?\(([^()]*)\)", r"^{\1}"),
    (rf"(?<![\w.\\^}}])(?P<number>{NUMBER})(?:[eE]|{TEXT}\{{[eE]\}})"
     r"(?P<exponent>[-+]?\d{1,3})(?![\w.])", power_of_ten),    # in 2e - 3 it is Euler's number
    # units, at the end and after a number
    (rf"(?:(?<=[\d}})\]])|(?<=\\pi)) ?(?:{UNIT})(?:\^\{{?[23]\}}?)?[. ]*$", ""),
    (rf"{TEXT} ?{BRACED}", r" \1 "),
    (r"(?i)(?<=\d) *([ap])\.? ?m\b\.?", lambda match: match[1].lower() + "m"),
    (r"^[^<>≠]*$",                                     # but "x<1 or x>2" is not "x<1 and x>2"
     lambda match: re.sub(r"(?: *[,;])? *\b(?:and|or)\b(?: *[,;])? *", ", ", match[0])),
    (r" +", " "),                                      # what blanks mean is read before they go
    (r"(?<=\d) (\d+) ?/ ?(\d+)", r"\\frac{\1}{\2}"),   # "1 1/2" is not 11/2
    (r", ", ";"),                                      # "100, 200" is a list, "100,200" a number
    (r"(?<=\d) ?[xX] ?(?=10 ?\^)", "*"),
    (r"(?<!\d) | (?!\d)", ""),                         # "1 2" stays apart: it is not 12
    # 1,234 where it stands alone, not in (1,234)
    (r"(?:^|(?<=[;=<>∪]))[-+]?[1-9]\d{0,2}(?:,\d{3})+(?=\.\d|[;=<>∪]|\.?$)",
     lambda match: match[0].replace(",", "")),
    # words that are a whole answer: Yes is yes, but the point A is not the length a
    (r"^((?i:yes|no|true|false|none)|[A-Z][a-z]{3,})[.!]?$", lambda match: match[1].lower()),
    # braces and signs that may be left out
    (r"\{(\*|(?<=\*\{)10)\}", r"\1"),
    (rf"^{BRACED}$", r"\1"),
    (r"([_^])\{(\w)\}", r"\1\2"),
    (r"(\\sqrt(?:\[\w\])?)(\w)", r"\1{\2}"),
    (r"\\frac(\d|\\pi)", r"\\frac{\1}"),
    (r"\\frac(\{(?:[^{}]|\{[^{}]*\})*\})(\w|\\pi)", r"\\frac\1{\2}"),
    (r"(?:^|(?<=[(\[,;=<>∪]))\+(?=[\d.\\])", ""),
    (r"^\\frac\{-((?:\w|\\sqrt\{\w+\}|\\pi)+)\}", r"-\\frac{\1}"),
    # a power of ten, if nothing beside it binds more tightly
    (rf"(?<![\w.^*/)}}\]!])(?:(?P<number>{NUMBER})\*)?10\^"
     r"(?P<exponent>[-+]?\d{1,3}|\{[-+]?\d{1,3}\})(?![\d.^!_])", power_of_ten),
    (r"\*(?=[a-zA-Z(]|\\sqrt|\\pi)", ""),              # stays before digits and \frac
]]
SYMBOLS = r"((?:(?:\\pi|\\sqrt\{\w+\}|[a-zA-Z])(?:\^\w)?)*)"
TERM = re.compile(             # 0.75, -2\pi, \frac{3}{4}, 1\frac{3}{4}, \frac34\pi, \frac{-3\pi}{4}
    rf"(?![-+]?$)([-+]?)({NUMBER}?)"
    rf"(?:\\frac\{{([-+]?)({NUMBER}?){SYMBOLS}\}}\{{([-+]?{NUMBER})\}})?{SYMBOLS}", re.ASCII)
QUOTIENT = re.compile(         # 3/4, 3\pi/4, \sqrt{3}/2, x/y
    rf"^([-+]?)((?:\d*(?:\\sqrt\{{\w+\}}|\\pi)|\w+)(?:\^\w)?|{NUMBER})"
    rf"/({NUMBER}|[a-zA-Z]|\\pi|\\sqrt\{{\w+\}})$", re.ASCII)
# "x=", "f(x)=", "AB=", "x \in" and "(x,y)=" at the start of an answer or of each item of a list.
VARIABLE = re.compile(
    r"(^|[,;])((?:[a-zA-Z]|[A-Z]{2,3}|\\angle[A-Z]{1,3}|\\(?:alpha|beta|gamma|delta|theta|lambda|mu"
    r"|phi|varphi|omega))(?:\d|_\w|_\{\w+\})?'?(?:\^\{-1\})?(?:\(\w\))?|\(\w(?:[,;]\w)+\))"
    r"(?:=|\\in(?![a-z]))", re.ASCII)


def normal_term(text):
    """One text for all ways to write a number or a multiple of symbols, exact as a fraction:
    "0.50", "1/2" and "\\frac{1}{2}" give "1/2", and "0.75x" gives "3/4*x"."""
    text = QUOTIENT.sub(r"\1\\frac{\2}{\3}", text)
    if not (match := TERM.fullmatch(text)):
        return text.replace(";", ",")
    sign, whole, sign_above, top, above, bottom, after = match.groups()
    symbols = (above or "") + after
    value = Fraction(whole or 1)
    if bottom:
        mixed = whole.isdigit() and not symbols        # 2\frac12x may be a sum or a product
        if not (top or above) or Fraction(bottom) == 0 or whole and not mixed:
            return text
        value = Fraction(whole or 0) + Fraction(sign_above + (top or "1")) / Fraction(bottom)
    value = -value if sign == "-" else value
    return str(value) if not symbols else symbols if value == 1 else f"{value}*{symbols}"


def split_list(text, separators=",;"):
    """Parts between top-level separators: "(1,2),3" -> ["(1,2)", "3"]. [] where brackets do not
    match or are nested deeper than people write, so that reading stays fast."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(rf"[()\[\]{{}}{separators}]", text):
        depth += (match[0] in "([{") - (match[0] in ")]}")
        if not 0 <= depth <= 10:
            return []
        if depth == 0 and match[0] in separators:
            parts.append(text[start:match.start()])
            start = match.end()
    return [] if depth else [*parts, text[start:]]


def normal_part(text):
    """One text for all ways to write a list, tuple, interval, set, matrix, ... of numbers."""
    sets = split_list(text, "∪")
    if len(sets) > 1:
        return "∪".join(sorted(normal_part(part) for part in sets))
    braces = text[:2] == "\\{" and text[-2:] == "\\}" and split_list(text[2:-2])
    parts = braces or split_list(text)
    if braces or len(parts) > 1:                       # a list without brackets is a set, too
        return "{" + ",".join(sorted(normal_part(part) for part in parts)) + "}"
    inside = split_list(text[1:-1]) if text[:1] in ("(", "[") and text[-1:] in (")", "]") else []
    if len(inside) > 1:
        return text[0] + ",".join(normal_part(part) for part in inside) + text[-1]
    if inside and text[0] + text[-1] == "()":          # "(5)", "(B)"
        return normal_part(inside[0])
    if matrix := re.fullmatch(r"\\begin\{pmatrix\}(.*?)(?:\\\\)?\\end\{pmatrix\}", text):
        rows = [row.split("&") for row in matrix[1].split("\\\\")]
        return f"matrix {[[normal_part(cell) for cell in row] for row in rows]}"
    return "".join(normal_term(part) for part in re.split("(<=|>=|[=<>≠])", text))


class MathVerify:
    """The grader of the package math-verify, called like `math_reward`. A text on which it raises,
    or that takes it more than 5 s, gets 0.0 and is counted in `failed`. The limit is a signal: it
    holds in the main thread, and ends sympy's loops but no single long step in C."""

    def __init__(self):
        try:
            import math_verify.errors
        except ImportError:
            raise UserError("--verifier math-verify needs that package: pip install math-verify.")
        self.package, self.failed = math_verify, 0

    def __call__(self, text, answer):
        texts = f"\\boxed{{{answer}}}", text
        try:
            parsed = [self.package.parse(each, raise_on_error=True) for each in texts]
            return float(self.package.verify(*parsed, raise_on_error=True))
        except (Exception, self.package.errors.TimeoutException):    # the latter is no Exception
            self.failed += 1
            if str(self.failed).strip("0") == "1":     # told at 1, 10, 100, ...
                print(f"math-verify failed on {self.failed} answers so far: they count as wrong.")
            return 0.0


class MathProblem(NamedTuple):
    question: str
    answer: str                                        # LaTeX or plain
    identity = property(lambda self: self.question)


class Math:
    """Questions from a file, split like Countdown; held_out=1.0 keeps all for evaluation.
    verifier: "ours", which is `math_reward`, or "math-verify", which is the package."""

    style = "boxed"
    system = "Please reason step by step, and put your final answer within \\boxed{}."
    several_answers = False                            # correct answers are equal by definition

    def __init__(self, path, held_out=0.1, verifier="ours"):
        self.verifier = MathVerify() if verifier == "math-verify" else math_reward
        self.problems = Problems(path, read_math, held_out)
        self.notes = self.problems.notes
        if self.verifier is math_reward:
            self.notes += unmatched(self.problems)

    def problem(self, rng, held_out=False):
        return self.problems.draw(rng, held_out)

    def held_out_problems(self, n=None):
        """The first n held-out problems in file order, all of them without n."""
        return self.problems.held_out[:n]

    def prompt(self, problem):
        """The question and the paper's sentence, unless the question asks for a box by itself."""
        ask = "\n\nLet's think step by step and output the final answer within \\boxed{}."
        return problem.question + ask * ("\\boxed" not in problem.question)

    def reward(self, problem, text):
        return self.verifier(text, problem.answer)

    def canonical(self, text):
        """The normal form of the last boxed answer, None when there is none."""
        boxed = last_boxed(text) if isinstance(text, str) else None
        return normal_form(boxed)[1] or None if boxed else None


# ----------------------------------------------------------------------------- problems from files

def share_of(text):
    """A number in [0, 1) that depends on the text alone (Python's own hash changes every run)."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


class Problems:
    """The problems of a file (see `lines_of`), split in two lists in file order, `train` and
    `held_out`. One that comes again is taken once, an object that `read` refuses is left out, and
    `notes` say how many; UserError where none is left."""

    def __init__(self, path, read, held_out):
        self.path, self.train, self.held_out = path, [], []
        known, refused, told, count = {}, [], Counter(), 0
        for count, (number, line) in enumerate(lines_of(path), start=1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not a JSON object")
                problem = read(record, told)
            except (ValueError, RecursionError) as error:
                refused.append(f"line {number}: {error}")
                continue
            first = known.setdefault(" ".join(problem.identity.split()), problem)
            if first is problem:
                split = self.held_out if share_of(problem.identity) < held_out else self.train
                split.append(problem)
            other_answer = first[1] != problem[1]
            told["repeat an earlier problem: each is used once"] += first is not problem
            told["give an earlier problem another answer: the first is used"] += other_answer
        if not known:
            raise UserError(f"{path} holds no problems" + (f"; {refused[0]}." if refused else "."))
        if refused:
            told[f"left out, the first {refused[0]}"] = len(refused)
        self.notes = [f"{path}: {n} of {count} lines {what}." for what, n in told.items() if n]

    def draw(self, rng, held_out):
        problems = self.held_out if held_out else self.train
        if not problems:
            kind = "held-out problem" if held_out else "problem to train on"
            raise UserError(f"The split leaves no {kind} of {self.path}.")
        return rng.choice(problems)

    def leave_out(self, unwanted, why, at_once=1000):
        """Drop the problems of which unwanted, given a list of problems, says True."""
        before = len(self.train) + len(self.held_out)
        for problems in (self.train, self.held_out):
            starts = range(0, len(problems), at_once)
            drop = [each for i in starts for each in unwanted(problems[i:i + at_once])]
            problems[:] = [problem for problem, bad in zip(problems, drop) if not bad]
        dropped = before - len(self.train) - len(self.held_out)
        self.notes += [f"{self.path}: {dropped} problems are left out: {why}."] * (dropped > 0)


def countdown_file(task, path):
    """The Problems of a Countdown file, and a note if some of 500 short ones have no solution."""
    problems = Problems(path, read_countdown, task.held_out)
    short = [x for x in problems.train + problems.held_out if len(x.numbers) <= 4]
    tried = random.Random(0).sample(short, min(500, len(short)))
    if lost := sum(not task.solutions(problem) for problem in tried):
        problems.notes.append(f"{path}: {lost} of {len(tried)} problems tried have no solution.")
    return problems


def as_models_write(answer):
    """A file's reference answer as a model would box it; "" for a sentence, which no model repeats
    word for word. If math_reward refuses it, no answer to the problem can earn the reward."""
    said = re.sub(r"(?i)^.*\b(?:answer|result)\b(?: is)?:? *|^(?:≈|~|\\approx) *", "", answer)
    said = re.sub(r"[\"`]|(?<![\w})])'|</?\w+>", "", said)
    said = re.sub(r"(?<=\d)[eE]([-+]?\d+)", r" \\times 10^{\1}", said)
    said = re.sub(r"(?<=\d) +((?!and|or)[a-z]{2,}(?: [a-z]+)*)\.?$", r" \\text{ \1}", said)
    return re.sub(r"^.*(?:(?<![\\a-z])[a-z]{2,}\b[^a-z]+){5}.*$", "", said)


def unmatched(problems):
    """[a sentence on how many reference answers no answer can match], or [] if there are none."""
    answers = sorted({problem.answer for problem in problems.train + problems.held_out})
    tried = random.Random(0).sample(answers, min(2000, len(answers)))
    lost = [x for x in tried if math_reward(f"\\boxed{{{as_models_write(x)}}}", x) == 0]
    return lost and [f"{problems.path}: no answer as models write it would match {len(lost)} of "
                     f"the {len(tried)} different references tried, such as {lost[0][:50]!r}."]


def read_math(record, told):
    """The MathProblem of a JSON object with problem, question or prompt, a text or a chat, and
    answer, label or solution; a ValueError says what it lacks. Of a worked solution only what
    follows "####", or its last \\boxed{}, is the answer. What is not used is counted in told."""
    question = next((record[k] for k in ("problem", "question", "prompt") if record.get(k)), None)
    chat = question if isinstance(question, list) else []
    for turn in chat:                                  # what its user said last
        if isinstance(turn, dict) and turn.get("role") == "user":
            question = turn.get("content")
    if isinstance(record.get("reward_model"), dict):   # verl keeps ground_truth in there
        record = record["reward_model"] | record
    keys = ("answer", "final_answer", "label", "ground_truth", "solution")
    key = next((key for key in keys if record.get(key) not in (None, "")), None)
    answer = only_item(record.get(key))
    if not isinstance(question, str):
        raise ValueError("no text under problem, question or prompt")
    if not isinstance(answer, (str, int, float)):
        raise ValueError("no text or number under answer, final_answer, label or solution")
    answer = format(Decimal(str(answer)), "f") if isinstance(answer, float) else str(answer)
    answer = re.sub(r"\\boxed\s+(\w+)", r"\\boxed{\1}", answer)
    if "####" in answer:                               # GSM8K
        answer = answer.rpartition("####")[2]
    elif last_boxed(answer) is not None:
        answer = last_boxed(answer)
    elif key == "solution" and len(answer) > 40:       # some files keep the bare answer there
        raise ValueError("the solution has no \\boxed{} and no answer beside it")
    beside = ("choices", "options", "context", "passage", "image", "images", "system")
    told.update(f"have {key}, which the prompt does not show" for key in beside if record.get(key))
    told["have a system prompt or more turns, which the prompt does not show"] += len(chat) > 1
    other_form = (r"####|\[\[|</?(?:answer|think)|(?:nswer|NSWER)\W{0,3}:|nswer is[\"'`:]"
                  r"|(?:last|final|own) line|(?:JSON|json)\b")
    if re.search(other_form, question) and "\\boxed" not in question:
        told["ask for another form of answer, but only our \\boxed{} is read"] += 1
    return MathProblem(question, answer.strip())


def only_item(answer):
    """The item of a list of one, also where a file keeps the list as text: 34 of '["34"]'."""
    item = answer
    if isinstance(answer, str) and answer.lstrip()[:1] in ("[", '"'):
        text = answer.replace("['", '["').replace("']", '"]')
        with suppress(ValueError, RecursionError):     # JSON, or LaTeX whose \ were not doubled
            item = json.loads(re.sub(r'(?<!\\)\\(?=[^\\"u])', r"\\\\", text))
    while isinstance(item, list) and len(item) == 1:
        item = item[0]
    return answer if isinstance(item, (list, dict)) else item


def read_countdown(record, told):
    """The Problem of a JSON object such as {"target": 44, "nums": [19, 36, 55, 7]}."""
    numbers, target = record.get("nums"), record.get("target")
    whole = isinstance(numbers, list) and {type(n) for n in [target, *numbers]} == {int}
    if not whole or min(numbers, default=-1) < 0:
        raise ValueError("no whole numbers under nums and target")
    return Problem(tuple(numbers), target)


def lines_of(path):
    """(number, JSON) of the lines of a file that are not blank, or of the items of its JSON array.
    path may be hf://owner/repo[@revision]/path/file.jsonl; nothing else goes online."""
    file = path
    if "://" in str(path):
        match = re.fullmatch(
            r"hf://(?:datasets/)?(?!datasets/)([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)", path)
        if not match:
            raise UserError(f"{path} is not of the form hf://owner/repo/file.jsonl.")
        try:
            from huggingface_hub import hf_hub_download    # everything else runs without it
            file = hf_hub_download(match[1], match[3], repo_type="dataset", revision=match[2])
        except Exception as error:                     # offline, no such file, no access
            raise UserError(f"Cannot fetch {path}: {' '.join(str(error).split())}") from None
    try:
        with open(file, "rb") as lines:
            start = lines.peek().lstrip()
            if start[:4] == b"PAR1":
                raise UserError(f"{path} is a parquet file: convert it once, by pandas.read_parquet"
                                f"('{file}').to_json('data.jsonl', orient='records', lines=True).")
            items = map(json.dumps, json.load(lines)) if start[:1] == b"[" else lines
            yield from ((n, item) for n, item in enumerate(items, start=1) if item.strip())
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON array: {error}.") from None


# --------------------------------------------- the task's flags, which train.py and eval.py share

# The flags that say what is measured.
SETTING = ("task", "prompt", "counts", "high", "targets", "max_new_tokens", "verifier")
# The style decides the defaults: a bare expression, or reasoning that ends in a tag or a box.
DEFAULTS = {
    "bare": {"counts": [4], "high": 9, "targets": [1, 60], "max_new_tokens": 24},
    "ask": {"counts": [3, 4], "high": 99, "targets": [10, 100], "max_new_tokens": 48},
    "think": {"counts": [3, 4], "high": 99, "targets": [10, 100], "max_new_tokens": 1024},
    "boxed": {"verifier": "ours", "max_new_tokens": 2048},
}


def add_task_flags(parser):
    flag = parser.add_argument_group("the task").add_argument
    flag("--task", choices=["countdown", "math"], default="countdown")
    flag("--data", help="problems as FILE.jsonl or hf://owner/repo/file.jsonl; countdown: default "
         "is to make them up, and with --data only those of the warm start are")
    flag("--prompt", choices=[*STYLES, Math.style], help="the style: how to ask, and where the "
         "answer is; default: bare, or think (math: boxed) where there is a chat template")
    flag("--counts", type=int, nargs="+", help="countdown: how many numbers a problem may have")
    flag("--high", type=int, help="countdown: largest number")
    flag("--targets", type=int, nargs=2, help="countdown: smallest and largest target")
    flag("--verifier", choices=["ours", "math-verify"], help="math: who compares answers, default "
         "ours; math-verify is a package that can do algebra")
    flag("--max-new-tokens", type=int, help="longest answer, in tokens")


def fill_task_flags(flags, tokenizer):
    """Fill in, in place, what the task's flags leave open; UserError where they contradict."""
    math = flags.task == "math"
    if flags.prompt is None:
        flags.prompt = "boxed" if math else "bare" if tokenizer.chat_template is None else "think"
    if math != (flags.prompt == "boxed"):
        raise UserError(f"--prompt {flags.prompt} does not go with --task {flags.task}.")
    for name, value in DEFAULTS[flags.prompt].items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    if flags.max_new_tokens < 1:
        raise UserError("--max-new-tokens must be at least 1.")
    if math and flags.data is None:
        raise UserError("--task math needs --data, a .jsonl file or hf://owner/repo/file.jsonl.")
    if flags.verifier and not math:
        raise UserError("--verifier belongs to --task math.")
    if math and (flags.counts or flags.high or flags.targets):
        raise UserError("--counts, --high and --targets belong to --task countdown.")


def make_task(flags, held_out=0.1):
    """The task that flags describe, once `fill_task_flags` has seen them."""
    if flags.task == "math":
        return Math(flags.data, held_out, flags.verifier)
    return Countdown(flags.counts, flags.high, flags.targets, flags.prompt, held_out, flags.data)
