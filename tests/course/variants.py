"""Wrong solutions, made of the right ones in solved/: none of them may earn full marks.

    python tests/course/variants.py                # all of them: what each loses first
    python tests/course/variants.py 6 7            # those of two exercises
    python tests/course/variants.py 6 --search     # and every small change that a program can make

wrong/ holds mistakes that people make, a file an exercise: behind "= name" the lines "- " of the
solved file become the lines "+ " (parts of lines, where a change is small). `changes` makes the
small ones systematically: a condition dropped, a bound or sign swapped, a statement left out, a
number off by one. Those of them that change nothing a caller could see are in harmless.txt.
"""

import ast
import concurrent.futures
import copy
import functools
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]


def solved(number):
    return (HERE / "solved" / f"ex{number}.py").read_text()


def edits_of(number):
    """[(name, [(old, new)])] of an exercise's file in wrong/."""
    found, last = [], ""
    for line in (HERE / "wrong" / f"ex{number}.txt").read_text().split("\n")[:-1]:
        kind, text = line[:2], line[2:]
        if kind == "= ":
            found.append((text, []))
        elif kind == "- " and last != "- ":
            found[-1][1].append(([text], []))
        else:
            found[-1][1][-1][kind == "+ "].append(text)
        last = kind
    return [
        (name, [("\n".join(old), "\n".join(new)) for old, new in edits]) for name, edits in found
    ]


def edited(source, edits):
    """The source with these edits put in; each old text stands there once."""
    for old, new in edits:
        if source.count(old) != 1:
            raise SystemExit(
                "variants.py: this must stand once in the solved file, and stands "
                f"{source.count(old)} times:\n{old}"
            )
        source = source.replace(old, new)
    return source


# ------------------------------------------------------------ every small change, systematically

SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
}


def changes(source):
    """[(what, source)] with one small change each, in what functions do."""
    tree, found = ast.parse(source), []
    inside = [
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for statement in function.body
        for node in ast.walk(statement)
    ]
    nodes = list(dict.fromkeys(inside))

    def variant(what, node, change):
        undo = {field: value for field, value in vars(node).items()}
        saved = copy.copy(undo)
        change(node)
        try:
            found.append((f"line {getattr(node, 'lineno', 0)}: {what}", ast.unparse(tree)))
        finally:
            vars(node).clear()
            vars(node).update(saved)

    for node in nodes:
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            other = SWAPS[type(node.ops[0])]
            variant(
                f"{ast.unparse(node)} with {other.__name__}", node,
                lambda n: setattr(n, "ops", [other(), *n.ops[1:]]),
            )
        elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
            other = SWAPS[type(node.op)]
            variant(
                f"{ast.unparse(node)} with {other.__name__}", node,
                lambda n: setattr(n, "op", other()),
            )
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            for value in (
                (node.value + 1, node.value - 1)
                if type(node.value) is int
                else (node.value * 1.5, 0.0)
            ):
                variant(
                    f"{node.value} is {value}", node,
                    lambda n, value=value: setattr(n, "value", value),
                )
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            variant(f"{node.value} turned", node, lambda n: setattr(n, "value", not n.value))
        elif isinstance(node, ast.If):
            variant(
                f"if {ast.unparse(node.test)} always", node,
                lambda n: setattr(n, "test", ast.Constant(True)),
            )
            variant(
                f"if {ast.unparse(node.test)} never", node,
                lambda n: setattr(n, "test", ast.Constant(False)),
            )
        elif (
            isinstance(node, ast.UnaryOp)
            and isinstance(node.op, (ast.USub, ast.Not, ast.Invert))
            and not isinstance(node.operand, ast.Constant)
        ):
            plain = node.operand
            for parent in nodes:
                for field, value in vars(parent).items():
                    if value is node:
                        variant(
                            f"{ast.unparse(node)} without its sign", parent,
                            lambda n, field=field, plain=plain: setattr(n, field, plain),
                        )
    for parent in nodes:
        for field, value in list(vars(parent).items()):
            chained = (
                isinstance(value, ast.Call)
                and isinstance(value.func, ast.Attribute)
                and not (
                    isinstance(value.func.value, ast.Name)
                    and value.func.value.id in ("torch", "math", "losses", "F", "nn")
                )
            )
            if chained:
                variant(
                    f"{ast.unparse(value)[-40:]} without its last call", parent,
                    lambda n, field=field, value=value: setattr(n, field, value.func.value),
                )
    for function in ast.walk(tree):
        for body in (getattr(function, name, []) for name in ("body", "orelse")):
            if not isinstance(body, list):
                continue
            for i, statement in enumerate(body):
                if (
                    isinstance(statement, (ast.AugAssign, ast.Expr, ast.Raise))
                    and statement in nodes
                ):
                    body[i] = ast.Pass()
                    found.append(
                        (
                            f"line {statement.lineno}: without {ast.unparse(statement)[:60]}",
                            ast.unparse(tree),
                        )
                    )
                    body[i] = statement
    return [
        (what, text)
        for what, text in dict.fromkeys(found)
        if text != ast.unparse(ast.parse(source))
    ]


@functools.cache
def harmless():
    """{"number: change"} of those that nobody can see, or that are as right."""
    lines = (HERE / "harmless.txt").read_text().split("\n")
    return {line.partition("  #")[0] for line in lines if line and not line.startswith("#")}


def variants(number, search=False):
    """[(name, source)] of the wrong solutions of an exercise."""
    source = solved(number)
    found = [(name, edited(source, edits)) for name, edits in edits_of(number)]
    return found + (changes(source) if search else [])


def first_loss(number, source, workshop, seconds=40):
    """What a solution loses first, or None: full marks."""
    import grade
    from exercises import exercise

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.py"
        path.write_text(source)
        card = grade.grade(workshop, grade.Submission(path), exercise(number), seconds, stop=True)
    return next((f"{part['what']}: {part['says']}" for part in card["parts"] if part["says"]), None)


def survivors(numbers, search=False, jobs=2, say=print):
    """Grade all variants of these exercises -> (how many, [those with full marks])."""
    import grade

    workshops = [grade.Workshop() for _ in range(jobs)]
    free, alive, count = list(workshops), [], 0

    def one(job):
        number, name, source = job
        workshop = free.pop()
        try:
            return number, name, first_loss(number, source, workshop)
        finally:
            free.append(workshop)

    todo = [
        (number, name, source) for number in numbers for name, source in variants(number, search)
    ]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for number, name, says in pool.map(one, todo):
            count += 1
            known = f"{number}: {name}" in harmless()
            if says is None and not known:
                alive.append((number, name))
            say(
                f"{number}, {name}\n   "
                f" {says[:200] if says else 'harmless' if known else 'HAS FULL MARKS'}"
            )
    for workshop in workshops:
        workshop.close()
    return count, alive


def main(words):
    numbers = [int(word) for word in words if word.isdigit()] or list(range(1, 10))
    began = time.time()
    say = (lambda line: None) if "--short" in words else functools.partial(print, flush=True)
    count, alive = survivors(numbers, "--search" in words, say=say)
    print(f"{count} wrong solutions, {len(alive)} with full marks, in {time.time() - began:.0f} s.")
    for number, name in alive:
        print(f"  {number}: {name}")
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
