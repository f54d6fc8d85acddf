"""A student's copy of the repo: exercised functions without a body, under their own docstrings.

    python tests/blank.py OUT                    # all exercises, into a folder that is not there
    python tests/blank.py OUT --only 3 5         # these alone are blank, the others are solved
    python tests/blank.py OUT --solution 3       # a copy that is there: put the bodies of 3 back

What belongs to which exercise is told by exercises.py. Nothing of OUT but the functions of the
exercise named is touched by --solution. History is not copied, so a copy does not hold the answers.
"""
import argparse
import shutil
import sys
from pathlib import Path

from exercises import (EXERCISES, FILES, REPO, blank, blanked_names, exercise, functions_of,
                       is_blank, put_back)


def copy_of(folder):
    """The files on top and tests/, without history, runs and caches."""
    if REPO / "tests" in folder.resolve().parents:
        raise SystemExit(f"'{folder}' lies inside tests/, which is copied: take another place.")
    folder.mkdir(parents=True)
    for file in REPO.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    shutil.copytree(REPO / "tests", folder / "tests",
                    ignore=shutil.ignore_patterns("__pycache__", "results"))


def blank_copy(folder, numbers):
    copy_of(folder)
    for one in map(exercise, numbers):
        if one.file:
            path = folder / one.file
            path.write_text(blank(path.read_text(), blanked_names(one), one.number))


def solve(folder, numbers):
    for one in map(exercise, numbers):
        if one.file:
            path, solution = folder / one.file, (REPO / one.file).read_text()
            if any(map(is_blank, map(functions_of(solution).get, blanked_names(one)))):
                raise SystemExit(f"{REPO} is a student's copy itself: it has no solution.")
            path.write_text(put_back(path.read_text(), solution, blanked_names(one)))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="blank these alone")
    parser.add_argument("--solution", type=int, nargs="+", metavar="N",
                        help="put the bodies of these back into OUT")
    args = parser.parse_args(argv)
    chosen = args.solution or args.only or [one.number for one in EXERCISES]
    for number in chosen:
        exercise(number)                               # SystemExit for a number that is not there
    if args.solution and args.only:
        raise SystemExit("--only makes a copy and --solution changes one: one of the two, please.")
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
