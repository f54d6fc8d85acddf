"""The card: 100 points over nine exercises, and what is wrong, in a sentence for each part lost.

    python tests/grade.py OUT                      # a student's copy, made by blank.py
    python tests/grade.py OUT --only 3 5           # two exercises
    python tests/grade.py my_losses.py             # a file with some of the functions, by name
    python tests/grade.py --all FOLDER --csv grades.csv --jobs 4    # a class: one row a submission

What is asked, and for how many points, stands in course/checks.py. A part gives all of its points
or none; what is not written, cannot be imported or has another name earns none. Each function is
graded alone, all other exercised functions being the reference's, and then all of an exercise
together as they were handed in. The exit code is 1 if a point was lost, 2 for a wrong command.

The code graded runs in a process that knows no right answer (course/worker.py): this one sends it
questions and compares what comes back with what the reference says, computed here. So nothing that
the code does to its own process earns a point. It may read no files but Python's own, write none
and start nothing, as far as Python's audit hooks see; code that is not Python can get round them,
read the reference's source and answer from that. --user NAME, for those who grade as root (in a
container), leaves that to the system: NAME must not be able to read this folder.

A question that is not answered in a quarter of --seconds counts as lost, two of them end a part,
and an exercise ends after --seconds in any case: seconds of the graded process, whether it computes
or sleeps, not those in which a busy machine lets it wait.
"""

import argparse
import ast
import base64
import collections
import concurrent.futures
import csv
import functools
import importlib
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
import types
import warnings
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "tests"), str(REPO / "tests" / "course")]

import bodies
import checks
import worker
from exercises import (
    EXERCISES, FILES, blanked_names, blanked_source, exercise, functions_of, is_blank, neighbours,
)

GRADED = [one for one in EXERCISES if one.file]
checks.REFERENCE = worker.Modules()


# --------------------------------------------------------------------------- workers, from outside


class Hung(Exception):
    """No answer in time."""


class Sentence(Exception):
    """Why a question got no answer."""


class NoWorker(RuntimeError):
    """There is no process for graded code."""


class Workshop:
    """A clean process, in an empty folder, which forks a worker for each part of a card."""

    def __init__(self, user=None):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        os.chmod(self.folder.name, 0o755)
        for file in ("worker.py", "bodies.py"):
            text = (REPO / "tests" / "course" / file).read_bytes()
            Path(self.folder.name, file).write_bytes(text)
        self.ready = False
        self.orders, theirs = socket.socketpair()
        keep = {"PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT"}
        environment = {key: value for key, value in os.environ.items() if key in keep}
        environment |= {
            "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": "",
        }
        self.process = subprocess.Popen(
            [sys.executable, "worker.py", str(theirs.fileno()), user or ""], cwd=self.folder.name,
            env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        )
        theirs.close()

    def wait(self):
        """Until it has imported what is slow."""
        if not self.ready:
            self.number_sent()
            self.ready = True

    def number_sent(self):
        try:
            return struct.unpack(">Q", worker.read(self.orders, 8))[0]
        except (OSError, TypeError):
            said = self.process.stderr.read().decode(errors="replace").strip()
            said = said.rpartition("\n")[2]
            raise NoWorker(f"the process for graded code does not start: {said}")

    def fork(self):
        """A connection to a new worker, and the number of its process."""
        self.wait()
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(self.orders, [b"w"], [theirs.fileno()])
        except OSError:
            pass  # told by what follows
        theirs.close()
        return ours, self.number_sent()

    def close(self):
        self.orders.close()
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()
        self.folder.cleanup()


class Worker:
    """One submission, or a part of it, loaded in a process of its own."""

    def __init__(self, workshop, task):
        self.connection, self.pid = workshop.fork()
        self.task = task

    def ask(self, message, seconds):
        """The answer; Hung after so many seconds of its own, EOFError where the process is gone.
        `used` tells how many it took."""
        self.used, cpu = 0.0, self.cpu()
        try:
            self.connection.settimeout(300)            # to read it takes a busy machine's time
            worker.send(self.connection, message)
            raw, size = b"", 8  # eight bytes say how many follow
            while len(raw) < size:
                self.connection.settimeout(0.2)
                silent = False
                try:
                    part = self.connection.recv(min(size - len(raw), 1 << 20))
                    if not part:
                        raise EOFError
                    raw += part
                except TimeoutError:
                    silent = True
                later = self.cpu()
                self.used += self.own_time(cpu, later, 0.2 if silent else 0.0)
                cpu = later
                if self.used > seconds and len(raw) < size:
                    raise Hung
                if size == 8 and len(raw) == 8:
                    size = 8 + struct.unpack(">Q", raw)[0]
                    if size > 1 << 30:
                        raise EOFError
            return worker.unpack(json.loads(raw[8:]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            raise EOFError  # gone, or it sent what is no answer

    def cpu(self):
        """Seconds of processor time so far, and whether it sleeps (rather than waits for a
        processor or a disk), as the system tells; None where it does not."""
        try:
            text = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(text[11]) + int(text[12])) / os.sysconf("SC_CLK_TCK"), text[0] == "S"

    @staticmethod
    def own_time(before, after, silence):
        """What the process did in a time that ended with so many seconds of silence: it computed,
        or it slept. Waiting for a busy machine is neither."""
        if before is None or after is None:
            return silence
        computed = after[0] - before[0]
        return silence if after[1] and not computed else computed

    def peak(self):
        """The most memory it has held so far, in bytes, as the system counts it; 0 if unknown."""
        try:
            return 1024 * int(
                re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text())[1]
            )
        except (OSError, TypeError):
            return 0

    def close(self):
        self.connection.close()
        for kill in (os.killpg, os.kill):
            try:
                kill(self.pid, signal.SIGKILL)
            except OSError:
                pass


# ------------------------------------------------------------------------------ what was handed in


def read_source(path):
    """(source as Python reads it, the interpreter's own complaint or None)."""
    raw = path.read_bytes()
    try:
        ast.parse(raw)
        encoding = tokenize.detect_encoding(io.BytesIO(raw).readline)[0]
        return raw.decode(encoding).lstrip("\ufeff"), None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f" (line {error.lineno})" if getattr(error, "lineno", None) else ""
        return "", f"{type(error).__name__}: {getattr(error, 'msg', error)}{line}"


class Submission:
    """A folder with some of the six files, or one file with functions by name."""

    def __init__(self, path):
        self.path, self.name = path, path.name if path.is_dir() else path.stem
        self.sources, self.complaints, self.loose = {}, {}, None
        if path.is_dir():
            files = [path / file for file in FILES if (path / file).is_file()]
            if not files:
                raise SystemExit(f"'{path}' has none of {', '.join(FILES)}.")
        elif path.is_file():
            files = [path]
        else:
            raise SystemExit(f"'{path}' is neither a folder nor a file.")
        for file in files:
            source, complaint = read_source(file)
            if file.name in FILES:
                self.sources[file.name], self.complaints[file.name] = source, complaint
            else:
                self.loose, self.complaints["answer.py"] = source, complaint

    def exercises(self):
        """Those that it is about: all for a folder; for a file, those of its functions."""
        if self.path.is_dir():
            return GRADED
        if self.loose is None:
            return [one for one in GRADED if one.file in self.sources]
        top = self.top()
        found = [
            one for one in GRADED if any(name.partition(".")[0] in top for name in one.functions)
        ]
        if not found and not self.complaints["answer.py"]:
            raise SystemExit(f"'{self.path}' defines none of the functions that are graded.")
        return found or GRADED

    def top(self):
        return {
            node.name
            for node in ast.parse(self.loose).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }

    def missing(self, one, name):
        """Why a function cannot be graded at all, or None."""
        file = "answer.py" if self.loose is not None else one.file
        if self.complaints.get(file):
            return (
                f"{self.path.name if self.loose is not None else file} cannot be read:"
                f" {self.complaints[file]}"
            )
        if self.loose is None and file not in self.sources:
            return f"there is no {file}"
        source = self.sources.get(file, self.loose)
        node = functions_of(source).get(name)
        if node is not None:
            return "not written yet" if is_blank(node) else None
        names = assigned(source)  # `grpo = some_other(...)` will do
        return (
            None
            if name in names or name.partition(".")[0] in names
            else f"{file} defines no {name}"
        )

    def task(self, one, functions):
        """What a worker needs to run these functions of an exercise as they were handed in."""
        mine = {*functions, *one.helpers}
        sources = {file: blanked_source_cached(file) for file in FILES}
        given = {file: {} for file in FILES}
        for other in GRADED:
            for name in blanked_names(other):
                needed = other.number == one.number or other.number in one.needs
                if other.number == one.number and (name in mine or one.together):
                    continue
                given[other.file][name] = body_of(other.file, name) if needed else nothing(name)
        for name in neighbours_cached():
            given["losses.py"][name] = nothing(name)
        if self.loose is None:
            sources[one.file] = self.sources[one.file]
        else:
            sources["answer.py"] = self.loose
            top = self.top() | assigned(self.loose)
            names = sorted({name.partition(".")[0] for name in mine} & top)
            sources[one.file] += f"\n\nfrom answer import {', '.join(names)}\n"
        others = {
            name
            for other in GRADED
            if other.file == one.file and other.number in (one.number, *one.needs)
            for name in blanked_names(other)
            if "." not in name
        } - mine
        return {
            "others": sorted(others),
            "sources": {file: encoded(text.encode()) for file, text in sources.items()},
            "bodies": {
                file: {name: encoded(raw) for name, raw in them.items()}
                for file, them in given.items()
            },
            "module": one.file[:-3],
            "functions": list(functions),
        }


def assigned(source):
    """Names that a file binds otherwise than by def: assignments and imports on top."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            found |= {
                x.id for target in node.targets for x in ast.walk(target) if isinstance(x, ast.Name)
            }
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return found


def encoded(raw):
    return base64.b64encode(raw).decode()


blanked_source_cached = functools.cache(blanked_source)
neighbours_cached = functools.cache(neighbours)


@functools.cache
def body_of(file, name):
    return bodies.take(importlib.import_module(file[:-3]), [name])[name]


@functools.cache
def nothing(name):
    return bodies.refusal(f"{name} is not part of this exercise")


# ----------------------------------------------------------------------------------------- judging

RIGHT, LOCK = {}, threading.RLock()
prepare = functools.cache(worker.import_all)


def right_answer(ask):
    """What the reference says, computed once in this process."""
    with LOCK:
        if id(ask) not in RIGHT:
            try:
                found = worker.drivers[ask.driver](checks.REFERENCE, **ask.options)
            except (ValueError, TypeError) as error:
                found = worker.told(error)
            RIGHT[id(ask)] = ask, worker.unpack(worker.pack(found))
        return RIGHT[id(ask)][1]


def differs(ask, answer, right):
    """None, or what of an answer is not as in the right one."""
    try:
        return ask.judge(answer, right) if ask.judge else checks.same(answer, right, ask.near)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        return f"the answer has another form than asked for ({type(error).__name__}: {error})"


def judge(ask, answer):
    """None, or a sentence."""
    found = differs(ask, answer, right_answer(ask))
    return found and " ".join(f"{ask.what} {found}".split())


# Well-known mistakes (course/variants.py) are asked the same question: one that gives the very
# numbers seen is named.


class Mistaken(worker.Modules):
    """The reference's modules, but for the functions of one exercise: those of a wrong solution."""

    def __init__(self, one, source):
        self.one = one
        module = types.ModuleType(one.file[:-3])
        exec(compile((REPO / one.file).read_text(), one.file, "exec"), module.__dict__)
        theirs = {}
        exec(compile(source, "wrong", "exec", dont_inherit=True), theirs)
        module.__dict__.update(
            {
                name: theirs[name]
                for name in theirs.keys() & module.__dict__.keys()
                if not name.startswith("__")
            }
        )
        self.module = module

    def __getattr__(self, name):
        return self.module if name == self.one.file[:-3] else importlib.import_module(name)


@functools.cache
def mistaken(number):
    """[(a mistake, modules that make it)] of an exercise."""
    import variants

    one, found = exercise(number), []
    for name, source in variants.variants(number):
        try:
            found.append((name, Mistaken(one, source)))
        except Exception:  # no modules without the error itself
            pass
    return found


@functools.cache
def mistaken_answer(number, index, key):
    ask = PACK[key]
    try:
        found = worker.drivers[ask.driver](mistaken(number)[index][1], **ask.options)
        return worker.unpack(worker.pack(found))
    except Exception as error:  # a tree too deep to be told, too
        return worker.told(error)


def named(number, ask, answer, seconds=4):
    """Which mistakes give this answer, as a sentence, or ""; looked for in so many seconds."""
    if (
        ask.driver in ("sampled", "large_logprobs")
        or not isinstance(answer, (dict, list))
        or checks.is_error(answer)
    ):
        return ""
    with LOCK:
        PACK[id(ask)], began, found = ask, time.monotonic(), []
        warnings.simplefilter("ignore")  # a mistake may warn
        for index, (name, _) in enumerate(mistaken(number)):
            if len(found) == 2 or time.monotonic() - began > seconds:
                break
            theirs = mistaken_answer(number, index, id(ask))
            if (
                not checks.is_error(theirs)
                and not differs(ask, answer, theirs)
                and differs(ask, theirs, right_answer(ask))
            ):
                found.append(name)
    return f" This is what you get with: {', or: '.join(found)}." if found else ""


Row = collections.namedtuple("Row", "check says")  # says: None, or why its points are lost


class Examination:
    """A part of a submission, asked the questions of some checks by way of a worker. A worker that
    hung or ended is replaced; one that cannot be loaded ends it all."""

    def __init__(self, workshop, task, seconds, left, stop=False):
        self.workshop, self.task, self.stop = workshop, task, stop
        self.limit, self.seconds, self.left = seconds / 4, seconds, left
        self.worker, self.hung, self.broken = None, 0, None

    def ask(self, message, seconds):
        seconds = min(seconds, self.left)
        try:
            return self.worker.ask(message, seconds)
        except Hung:
            self.hung += 1
            self.drop()
            raise Sentence(f"was not finished after {seconds:.0f} s: does a loop never end?")
        except EOFError:
            self.drop()
            raise Sentence(
                "the process ended in the midst of it (an exit, a crash, no memory left)"
            )
        finally:
            if self.worker is not None:
                self.left -= self.worker.used

    def drop(self):
        if self.worker is not None:
            self.left -= self.worker.used
            self.worker.close()
            self.worker = None

    def load(self):
        """A worker, if there is none, with the submission imported."""
        if self.worker is not None:
            return
        file, self.worker = f"{self.task['module']}.py", Worker(self.workshop, self.task)
        try:
            loaded = self.ask(self.task, self.limit)
        except Sentence as error:
            self.broken = f"{file}: its import {error}".replace("import the", "import: the")
            raise Sentence(self.broken)
        has = loaded.get("has", ()) if isinstance(loaded, dict) else ()
        lacking = sorted(set(self.task["functions"]) - {x for x in has if isinstance(x, str)})
        if checks.is_error(loaded):
            self.broken = f"{file} cannot be imported: {loaded['says']}"
        elif lacking:
            self.broken = f"{file} defines no {lacking[0]}"
        if self.broken:
            raise Sentence(self.broken)

    def answer_to(self, check, ask):
        """None, or what is wrong, of one question."""
        if self.broken:
            return self.broken
        if self.left <= 0 or self.hung == 2:
            why = "two questions hung" if self.hung == 2 else f"{self.seconds} s were up"
            return f"not asked any more: {why}"
        if ask.memory:  # a peak is that of a whole process
            self.drop()
        try:
            self.load()
        except Sentence as error:
            return str(error)
        message = {"driver": ask.driver, "options": packed(ask)}
        before = self.worker.peak() if ask.memory else 0
        try:
            answer = self.ask(message, (2 if ask.memory else 1) * self.limit)
        except Sentence as error:
            return f"{(ask.what or check.title).rstrip(':')}: {error}"
        says = judge(ask, answer)
        if says:
            return says if self.stop else says + named(check.exercise, ask, answer)
        grown = self.worker.peak() - before if ask.memory else 0
        if ask.memory and grown > ask.memory:
            return (
                f"{ask.what} the process grew by {grown >> 20} MB, where {ask.memory >> 20} MB "
                "are enough"
            )
        return None

    def rows(self, asked):
        """[Row] of these checks; with stop, up to the first that is lost."""
        found = []
        try:
            for check in asked:
                says = next(
                    filter(None, (self.answer_to(check, ask) for ask in check.asks())), None
                )
                found.append(Row(check, says))
                if self.stop and says:
                    break
        finally:
            self.drop()
        return found


PACK = {}  # id of a question -> the question


@functools.cache
def packed_options(key):
    return worker.pack(PACK[key].options)


def packed(ask):
    PACK[id(ask)] = ask
    return packed_options(id(ask))


def grade(workshop, submission, one, seconds=60, stop=False):
    """One exercise of a submission -> its card; with stop, up to the first part that is lost."""
    workshop.wait()
    with LOCK:                                         # imports by several threads would meet
        prepare()
    began, left, mine = time.monotonic(), seconds, checks.checks_of(one.number)
    missing = {name: submission.missing(one, name) for name in one.functions}
    rows = []
    if one.together or len(one.functions) == 1:
        units = [(one.functions, mine)]
    else:
        units = [
            ((name,), [check for check in mine if check.function == name]) for name in one.functions
        ]
        units.append((one.functions, [check for check in mine if not check.function]))
    for functions, asked in units:
        why = [missing[name] for name in functions if missing[name]]
        if one.together and len(why) < len(functions) and missing[functions[0]] is None:
            why = []  # the class behind token_logprobs is a choice
        if why:
            whole = len(functions) > 1 and not one.together
            says = f"not all of it is there: {why[0]}" if whole else why[0]
            rows += [Row(check, says) for check in asked]
        else:
            names = [name for name in functions if missing[name] is None]
            task = submission.task(one, names)
            examined = Examination(workshop, task, seconds, left, stop)
            rows += examined.rows(asked)
            left = examined.left
        if stop and rows and rows[-1].says:
            break
    lost = sum(row.check.points for row in rows if row.says)
    return {
        "points": checks.points_of(one.number) - lost,
        "of": checks.points_of(one.number),
        "seconds": round(time.monotonic() - began, 1),
        "spent": round(seconds - left, 1),
        "parts": [
            {
                "function": row.check.function, "part": row.check.part, "what": row.check.title,
                "points": 0 if row.says else row.check.points, "of": row.check.points,
                "says": row.says,
            }
            for row in rows
        ],
    }


# ---------------------------------------------------------------------------------------- the card


def lines_of(one, card):
    """An exercise's lines on the screen."""
    title = f"{one.number:2d} {one.title} ({one.file})"
    yield f"{title:58s}{card['points']:>4d}/{card['of']}"
    names = list(dict.fromkeys(part["function"] for part in card["parts"]))
    reasons = set()
    for name in names:
        parts = [part for part in card["parts"] if part["function"] == name]
        if len(names) > 1:
            of = {
                kind: [sum(p[key] for p in parts if p["part"] == kind) for key in ("points", "of")]
                for kind in ("core", "care")
            }
            marks = "  ".join(f"{kind} {got}/{most}" for kind, (got, most) in of.items() if most)
            yield f"     {name or 'together':34s}{marks}"
        for part in parts:
            if part["says"] and part["says"] not in reasons:
                reasons.add(part["says"])
                says = f"{part['part']}, {part['what']}: {part['says']}"
                yield (
                    f"       -{part['of'] - part['points']}"
                    f" {says if len(says) <= 400 else says[:397] + '...'}"
                )


def card_of(path, chosen, seconds, workshop, show=lambda line: None):
    """{number: card} of a submission."""
    submission, cards = Submission(path), {}
    for one in chosen or submission.exercises():
        cards[one.number] = grade(workshop, submission, one, seconds)
        for line in lines_of(one, cards[one.number]):
            show(line)
    return cards


def total(cards, key="points"):
    return sum(card[key] for card in cards.values())


def grade_all(folder, chosen, args):
    """One row a submission -> [{column: value}]."""
    chosen = chosen or GRADED
    paths = sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith((".", "__")) and (path.is_dir() or path.suffix == ".py")
    )
    if not paths:
        raise SystemExit(f"'{folder}' has no submissions: a folder or a .py file each.")

    free = [Workshop(args.user) for _ in range(args.jobs)]

    def row_of(path):
        began, workshop = time.monotonic(), free.pop()
        try:
            cards, why = card_of(path, chosen, args.seconds, workshop), ""
        except NoWorker:
            raise
        except (Exception, SystemExit) as error:  # one submission must not end a class
            cards, why = {
                one.number: {"points": 0, "of": checks.points_of(one.number), "parts": []}
                for one in chosen
            }, str(error)
        free.append(workshop)
        said = [
            f"{number}: {part['says']}"
            for number, card in cards.items()
            for part in card["parts"]
            if part["says"]
        ]
        row = {"submission": path.name} | {
            f"exercise {number}": card["points"] for number, card in cards.items()
        }
        row |= {
            "points": total(cards), "of": total(cards, "of"),
            "seconds": round(time.monotonic() - began),
            "first mistake": (why or (said or [""])[0])[:200],
        }
        print(
            f"{path.name:30s}{row['points']:>4d}/{row['of']}{row['seconds']:>6d} s",
            file=sys.stderr, flush=True,
        )
        return row, cards

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(row_of, paths))
    for workshop in free:
        workshop.close()
    return [row for row, _ in found], {row["submission"]: cards for row, cards in found}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("path", type=Path, nargs="?", metavar="FOLDER_OR_FILE")
    parser.add_argument("--all", type=Path, metavar="FOLDER", help="each folder and .py file in it")
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="these exercises alone")
    parser.add_argument(
        "--seconds", type=int, default=60, metavar="N", help="limit of one exercise (default: 60)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write every part with its points and sentence"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="with --all: write the table")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="with --all: submissions at a time"
    )
    parser.add_argument("--user", metavar="NAME", help="run graded code as this user; needs root")
    args = parser.parse_args(argv)
    if (args.path is None) == (args.all is None):
        parser.error("name a folder or a file, or a folder of submissions with --all.")
    if not hasattr(os, "fork"):
        raise SystemExit("grade.py needs fork: take Linux, macOS, or the container of the README.")
    missing = [
        f"{one.number} ({name})"
        for one in GRADED
        for name in one.functions
        if is_blank(functions_of((REPO / one.file).read_text()).get(name))
    ]
    if missing:
        raise SystemExit(
            f"{REPO} has no reference for {missing[0]}: grade from the instructor's repo."
        )
    chosen = [exercise(number) for number in args.only] if args.only else None
    if chosen and not all(one.file for one in chosen):
        raise SystemExit("exercise 10 is not graded by a program.")
    if args.all:
        if not args.all.is_dir():
            raise SystemExit(f"'{args.all}' is no folder.")
        rows, sheet = grade_all(args.all, chosen, args)
        out = open(args.csv, "w", newline="") if args.csv else sys.stdout
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        out.flush()
        lost = any(row["points"] < row["of"] for row in rows)
    else:
        workshop = Workshop(args.user)
        show = functools.partial(print, flush=True)
        cards = card_of(args.path, chosen, args.seconds, workshop, show)
        workshop.close()
        print(f"{'together':58s}{total(cards):>4d}/{total(cards, 'of')}", flush=True)
        sheet, lost = cards, total(cards) < total(cards, "of")
    if args.json:
        args.json.write_text(json.dumps(sheet, indent=1))
    return int(lost)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (SystemExit, NoWorker) as error:
        code = getattr(error, "code", str(error))
        if isinstance(code, str):
            print(f"error: {code}", file=sys.stderr)
        sys.exit(2 if isinstance(code, str) else code)
