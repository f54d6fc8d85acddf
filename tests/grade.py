"""The scorecard: how much of each exercise is right, and what is wrong, on one screen.

    python tests/grade.py OUT                      # a student's copy, made by blank.py
    python tests/grade.py OUT --only 3 5           # two exercises
    python tests/grade.py my_losses.py             # a file with some of the functions, by name
    python tests/grade.py OUT --json sheet.json    # every number, for an instructor's sheet

A line a function: points as passed / asked, in the tests of its mathematics (core) and in those of
what real batches need besides (care); below it, the first sentence of the core that fails, rather
one that knows the mistake. `-` stands where nothing is written yet.

Each function is graded on its own: in a temporary copy of this repo, with that function as it was
handed in, its file's helpers too, and all other exercised functions as they are here. So a mistake
costs where it was made. (In a student's own copy "here" is the student's work, too.)

This RUNS THE CODE that it grades, with your rights: it may read and write your files, and one that
means to can forge its grade. Take a container or a throw-away account for code of strangers. What
happens by accident does no harm: each function runs in processes of its own, with a limit on its
time, its memory and the size of its files, and what it prints is thrown away. After a crash or an
exit the other tests are asked again, a few times; a test that hangs is broken off after --seconds,
and the third ends the exercise. What is not finished counts as failed.
"""
import argparse
import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from exercises import (EXERCISES, FILES, REPO, blanked_names, exercise, functions_of, graded_by,
                       is_blank, put_back)

ATTEMPTS = 4                   # processes for one function: one more after each crash
TESTS = 5                      # a function may take so many times the limit of one test
MEMORY, FILE_SIZE = 12 << 30, 1 << 30                  # bytes


# -------------------------------------------------------------------------- in the graded process

class Recorder:
    """A pytest plugin: asks the tests of some functions, and writes a line of JSON for each event,
    so that what was finished is known however the process ends."""

    def __init__(self, functions, results, skip, seconds):
        self.functions, self.results, self.skip, self.seconds = functions, results, skip, seconds
        self.hung = 0

    def say(self, **event):
        with open(self.results, "a") as file:
            file.write(json.dumps(event) + "\n")

    def pytest_collection_modifyitems(self, items):
        asked = {}
        for item in items:
            part, names = graded_by(item)
            names = [name for name in names if name in self.functions]
            if names:
                asked[item.nodeid] = [part, names]
        self.say(asked=asked)
        items[:] = [item for item in items
                    if item.nodeid in asked and not {item.nodeid, "all"} & self.skip]

    def pytest_runtest_logstart(self, nodeid):
        self.say(began=nodeid)
        if hasattr(signal, "SIGALRM"):
            signal.signal(signal.SIGALRM, self.alarm)
            signal.alarm(self.seconds)

    def alarm(self, number, frame):
        self.hung += 1
        raise TimeoutError(f"not finished after {self.seconds} s: does a loop never end?")

    def pytest_runtest_logreport(self, report):
        if report.skipped:
            self.say(skipped=report.nodeid)
        elif report.failed:
            self.say(failed=report.nodeid, said=sentence(report))
        elif report.when == "teardown":
            self.say(passed=report.nodeid)

    def pytest_runtest_logfinish(self, nodeid):
        if hasattr(signal, "SIGALRM"):
            signal.alarm(0)
        if self.hung == 3:                             # more of the same would only cost time
            self.say(enough=True)
            os._exit(1)


def sentence(report):
    """What a failure says, in one line; an error in the code handed in with its place."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = (crash.message if crash else str(report.longrepr)).strip()
    for word in ("AssertionError: ", "Failed: "):
        text = text.removeprefix(word)
    text = " ".join(text.split("\nassert ")[0].split())[:400] or "an assertion fails"
    if text.startswith("assert "):                     # a test without words says at least its name
        text = report.nodeid.split("::")[-1].replace("_", " ").removeprefix("test ") + ": " + text
    if crash and Path(crash.path).name in (*FILES, "answer.py"):
        text += f" ({Path(crash.path).name}, line {crash.lineno})"
    return text


def child(number, functions, results, skip, seconds):
    """In the temporary copy: run the tests of some functions of exercise `number`."""
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass                                           # not every system has these limits
    import pytest
    import torch
    torch.set_num_threads(1)
    one = exercise(int(number))
    skipped = set(json.loads(Path(skip).read_text()))
    here = Path(__file__).resolve().parent
    pytest.main([*(str(here / file) for file in one.tests), "-q", "-s", "-m", "core or care",
                 "--tb=short", "--assert=plain", "-p", "no:cacheprovider",
                 "-p", "no:unraisableexception", "-p", "no:faulthandler"],
                plugins=[Recorder(functions.split(","), results, skipped, int(seconds))])


# ------------------------------------------------------------------------------ in the grader's own

def handed_in(path):
    """FOLDER or FILE -> {file of ours: (source handed in, whether it is the whole file)}."""
    if path.is_dir():
        found = {file: ((path / file).read_text(errors="replace"), True) for file in FILES
                 if (path / file).is_file()}
        if not found:
            raise SystemExit(f"'{path}' has none of {', '.join(FILES)}.")
        return found
    if not path.is_file():
        raise SystemExit(f"'{path}' is neither a folder nor a file.")
    source = path.read_text(errors="replace")
    if path.name in FILES:
        return {path.name: (source, True)}
    try:
        top = {node.name for node in ast.parse(source).body
               if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    except SyntaxError as error:
        raise SystemExit(f"'{path}' cannot be read: {error}.")
    files = {one.file for one in EXERCISES for name in one.functions
             if name.partition(".")[0] in top}
    if not files:
        raise SystemExit(f"'{path}' defines none of the functions that are graded.")
    return {file: (source, False) for file in files}


def written(one, source):
    """{function of the exercise: whether it is written}."""
    nodes = functions_of(source)
    return {name: not is_blank(nodes.get(name)) for name in one.functions}


def prepare(folder, one, functions, source, whole):
    """A copy of this repo in which these functions of the exercise are as they were handed in."""
    (folder / "tests").mkdir(parents=True)
    for file in [*REPO.glob("*.py"), *REPO.glob("tests/*.py")]:
        shutil.copy(file, folder / file.relative_to(REPO))
    ours = (REPO / one.file).read_text()
    if whole:
        others = {name for other in EXERCISES if other.file == one.file
                  for name in blanked_names(other)}
        source = put_back(source, ours, others - {*functions, *one.helpers})
    else:                                              # our file, with what is theirs in its place
        (folder / "answer.py").write_text(source)
        names = {name.partition(".")[0] for name in functions}
        source = ours + f"\n\nfrom answer import {', '.join(sorted(names))}\n"
    (folder / one.file).write_text(source)


def ask(folder, one, functions, limit, seconds, skip=()):
    """Run the tests of these functions in `folder` -> (events, why it ended early or None)."""
    results, to_skip = folder / "results.jsonl", folder / "skip.json"
    results.write_text("")
    to_skip.write_text(json.dumps(sorted(skip)))
    command = [sys.executable, str(folder / "tests" / "grade.py"), "--child", str(one.number),
               ",".join(functions), str(results), str(to_skip), str(seconds)]
    environment = {key: value for key, value in os.environ.items() if key != "IMPL"}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TOKENIZERS_PARALLELISM": "false",
                    "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    started = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    why = None
    try:
        code = started.wait(max(1, limit))
        if code < 0:
            why = f"the process was killed by {signal.Signals(-code).name}"
    except subprocess.TimeoutExpired:
        why = "the time was up"
    finally:                                           # it, and what it may have started
        try:
            os.killpg(started.pid, signal.SIGKILL)
        except (OSError, AttributeError):
            started.kill()
        started.wait()
    events = []
    for line in results.read_text(errors="replace").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:                             # the last line may be cut off
            pass
    return events, why


def grade(one, source, whole, seconds=60):
    """One exercise, so many seconds for one test -> {function: {"written", "core": [passed, asked],
    "care": the same, "says": a sentence or None}}."""
    empty = {"written": False, "core": [0, 0], "care": [0, 0], "says": None}
    try:
        there = written(one, source)
    except (SyntaxError, ValueError) as error:         # ValueError: a NUL byte
        return {name: empty | {"written": True, "says": f"{one.file} cannot be read: {error}"}
                for name in one.functions}
    card = {name: empty | {"written": there[name], "core": [0, 0], "care": [0, 0]}
            for name in one.functions}
    names = [name for name in one.functions if there[name]]
    for unit in [names] if one.together and names else [[name] for name in names]:
        count(card, one, unit, source, whole, seconds)
    return card


def count(card, one, functions, source, whole, seconds):
    """Ask the tests of some functions, and write their lines of the card."""
    outcome, asked, began, why = {}, {}, None, None
    deadline = time.time() + TESTS * seconds
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as top:
        for attempt in range(ATTEMPTS):
            folder = Path(top).resolve() / str(attempt)
            prepare(folder, one, functions, source, whole)
            events, why = ask(folder, one, functions, deadline - time.time(), seconds, outcome)
            began = None
            for event in events:
                asked = asked or event.get("asked", {})
                began = event.get("began", began)
                for kind in ("skipped", "passed", "failed"):
                    if event.get(kind) in asked:       # a test that failed stays failed
                        outcome.setdefault(event[kind], (kind, event.get("said")))
            if began and began not in outcome:
                outcome[began] = "failed", why or "the process ended in the midst of a test: exit?"
            enough = any("enough" in event for event in events) or time.time() > deadline
            if not asked or enough or all(test in outcome for test in asked):
                break
        if not asked:                                  # it broke before a test was known
            why = why or f"{one.file} cannot be imported; try: python -c 'import {one.file[:-3]}'"
            folder = Path(top).resolve() / "blank"
            prepare(folder, one, functions, (REPO / one.file).read_text(), True)
            events, _ = ask(folder, one, functions, 600, seconds, ["all"])
            asked = next((event["asked"] for event in events if "asked" in event), {})
    first = {}                                         # function: a sentence of its core
    for test, (part, names) in asked.items():
        kind, said = outcome.get(test, ("failed", why or "not finished: earlier tests hung"))
        for name in names if kind != "skipped" else ():
            card[name][part][1] += 1
            card[name][part][0] += kind == "passed"
            if kind == "failed":
                first.setdefault((name, part, " what you get with" in said), said)
    for name in functions:
        order = [("core", True), ("core", False), ("care", True), ("care", False)]
        found = [first[name, *key] for key in order if (name, *key) in first]
        card[name]["says"] = found[0] if found else None if asked else "its tests could not be run"


def points(pair):
    return f"{pair[0]}/{pair[1]}"


def lines_of(one, card):
    """An exercise's lines on the screen."""
    def total(part):
        pairs = [row[part] for row in card.values()]
        return points([sum(pair[i] for pair in pairs) for i in (0, 1)])

    there = any(row["written"] for row in card.values())
    title = f"{one.number:2d} {one.title} ({one.file})"
    yield f"{title:48s}{total('core') if there else '-':>9s}{total('care') if there else '-':>9s}"
    for name, row in card.items():
        core, care = (points(row[part]) if row["written"] else "-" for part in ("core", "care"))
        if len(card) > 1:
            yield f"     {name:43s}{core:>9s}{care:>9s}"
        if row["says"]:
            says = row["says"]
            yield f"       {says if len(says) <= 280 else says[:277] + '...'}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, metavar="FOLDER_OR_FILE")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these exercises alone")
    parser.add_argument("--seconds", type=int, default=60, metavar="N",
                        help="limit of one test; of a function five times that (default: 60)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    args = parser.parse_args(argv)
    chosen = [exercise(number) for number in args.only] if args.only else EXERCISES
    sources, cards = handed_in(args.path), {}
    print(f"{'exercise':48s}{'core':>9s}{'care':>9s}", flush=True)
    for one in chosen:
        if one.file in sources:
            cards[one.number] = grade(one, *sources[one.file], args.seconds)
            print(*lines_of(one, cards[one.number]), sep="\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"path": str(args.path), "exercises": cards}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main())
