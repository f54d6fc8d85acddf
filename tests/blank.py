"""A student's copy of the repo: exercised functions without a body, under their own docstrings.

    python tests/blank.py OUT                    # all exercises, into a folder that is not there
    python tests/blank.py OUT --only 3 5         # these alone are blank, the others are solved
    python tests/blank.py OUT --solution 3       # a copy that is there: put the bodies of 3 back

What belongs to which exercise is told by exercises.py. A full copy holds no line of an answer: not
in the six files, where losses that are an answer by another name are blank, too, and not beside
them, for tests, mutants and study stay here. In tests/ it has a self-check, the text of the
exercises, and the reference as compiled code (of this Python version), by which run.py runs
programs before all is solved. Nothing of OUT but the functions of the exercise named is touched by
--solution.
"""

import argparse
import importlib
import marshal
import shutil
import sys
from pathlib import Path

from exercises import (
    EXERCISES, FILES, REPO, blanked_names, blanked_source, exercise, functions_of, handout,
    is_blank, neighbours, put_back,
)

COPIED = ("exercises.py", "course/bodies.py", "course/run.py", "course/self_check.py")


def compiled():
    """{file: {function: body}} of all that a copy may lack, as bytes; see run.py."""
    sys.path[:0] = [str(REPO), str(REPO / "tests" / "course")]
    import bodies

    found = {}
    for file in FILES:
        names = [name for one in EXERCISES if one.file == file for name in blanked_names(one)]
        names += neighbours() if file == "losses.py" else []
        found[file] = bodies.take(importlib.import_module(file[:-3]), names)
    return marshal.dumps((sys.version_info[:2], found))


def blank_copy(folder, numbers):
    (folder / "tests").mkdir(parents=True)
    for file in FILES:
        (folder / file).write_text(blanked_source(file, numbers))
    for file in ("README.md", "requirements.txt", ".gitignore"):
        shutil.copy(REPO / file, folder)
    for file in COPIED:
        shutil.copy(REPO / "tests" / file, folder / "tests")
    (folder / "tests" / "reference.bin").write_bytes(compiled())
    (folder / "HANDOUT.md").write_text(handout() + "\n")


def solve(folder, numbers):
    """Put bodies back, and those of losses that were blanked with exercise 3 along with it."""
    for one in map(exercise, numbers):
        if one.file:
            path, solution = folder / one.file, (REPO / one.file).read_text()
            names = [*blanked_names(one), *(neighbours() if one.number == 3 else ())]
            known = functions_of(path.read_text())
            names = [
                name for name in names if name in blanked_names(one) or is_blank(known.get(name))
            ]
            path.write_text(put_back(path.read_text(), solution, names))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="blank these alone")
    parser.add_argument(
        "--solution", type=int, nargs="+", metavar="N", help="put the bodies of these back into OUT"
    )
    args = parser.parse_args(argv)
    chosen = args.solution or args.only or [one.number for one in EXERCISES]
    for number in chosen:
        exercise(number)  # SystemExit for a number that is not there
    if args.solution and args.only:
        raise SystemExit("--only makes a copy and --solution changes one: one of the two, please.")
    if not (REPO / "tests" / "course" / "checks.py").is_file():
        raise SystemExit(f"{REPO} is a student's copy itself: it has no solution.")
    if args.solution:
        missing = [file for file in FILES if not (args.out / file).is_file()]
        if missing:
            raise SystemExit(f"'{args.out}' is not a copy of this repo: it has no {missing[0]}.")
        try:
            solve(args.out, chosen)
        except SyntaxError as error:
            raise SystemExit(f"a file in '{args.out}' cannot be read: {error}.")
    elif args.out.exists():
        raise SystemExit(f"'{args.out}' exists already; nothing was written.")
    else:
        blank_copy(args.out, chosen)
    done = "put back" if args.solution else "blank"
    print(f"{args.out}: {done} {', '.join(f'{n} {exercise(n).title}' for n in chosen)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
