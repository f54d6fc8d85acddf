"""README and code say the same: its commands parse, what it names exists, its tables are complete,
and it stays short.

Bugs killed here: a flag that was renamed, a function that moved, a loss or a log column that the
README does not know, first parts that grow or speak of machinery.
"""
import ast
import re
import shlex
from pathlib import Path

import pytest

import eval as evaluation
import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
INLINE = re.findall(r"`([^`\n]+)`", README)
FILES = {path.stem: path for pattern in ("*.py", "tests/*.py", "tests/bench/*.py")
         for path in ROOT.glob(pattern)}


def commands():
    """Each command line of a code block, and each one in backticks that names no placeholder."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    blocks += re.findall(r"(?:^    \S.*\n)+", README, re.M)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    lines += [text for text in INLINE if not re.search(r"\b(NAME|FOLDER|OUT)\b|\.\.\.", text)]
    lines = [line for line in lines if re.search(r"(train|eval)\.py ", line)]
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if {"train.py", "eval.py"} & {*line}]


def test_there_are_commands_to_check():
    assert len(commands()) >= 6


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_parses(words):
    program = "train.py" if "train.py" in words else "eval.py"
    flags = words[words.index(program) + 1:]
    assert words[:words.index(program)] == ["python"] or words[0] == "torchrun", words
    if "--help" in flags:
        flags.remove("--help")
    if "--plot" in flags:
        pytest.importorskip("matplotlib")
    (train if program == "train.py" else evaluation).parse(flags)


def names_in(path):
    """Functions, classes, and methods as Class.method, of a file."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            inner = (f for f in ast.walk(node) if isinstance(f, ast.FunctionDef))
            found |= {node.name, *(f"{node.name}.{f.name}" for f in inner)}
    return found


def test_every_function_that_is_named_exists():
    checked = 0
    for text in INLINE:
        module, _, name = text.partition(".")
        named = name not in ("", "py", "json") and re.fullmatch(r"[\w.]+", name)
        if module in FILES and named:
            assert name in names_in(FILES[module]), f"README names {text}, which is not there"
            checked += 1
    everything = set().union(*(names_in(path) for path in ROOT.glob("*.py")))
    reading = README.partition("## Reading")[2].partition("\n## ")[0].partition("| file |")[0]
    for name in re.findall(r"`([A-Za-z_]+)`", reading):
        assert name in everything | {"entropy", "rewards"}, name
        checked += 1
    assert checked > 10


def test_every_file_that_is_named_exists():
    made = {"pass.png", "frontier.png", "curves.png", "my_losses.py", "OUT/HANDOUT.md"}
    named = {*re.findall(r"[\w/]*\w\.(?:py|md|txt|png)\b", README)} - made
    for name in named:
        there = (ROOT / name).is_file() or list(ROOT.glob(f"tests/**/{name}"))
        assert there, f"README names {name}, which is not there"
    assert len(named) > 10


def table_under(heading):
    """The first cell of each row of the first table below a heading."""
    text = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    table = "|" + text.partition("\n|")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()][2:]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def test_the_table_of_losses_is_the_list_of_losses():
    assert sorted(table_under("The losses")) == sorted(train.variants())


def test_the_table_of_columns_is_the_log(tmp_path):
    from test_train import TOY
    out = ["--out", str(tmp_path), "--warm-steps", "2", "--steps", "1", "--loss", "diffsmooth"]
    assert train.main([*TOY.split(), *out]) == 0
    head = (tmp_path / "diffsmooth" / "log.csv").read_text().splitlines()[0].split(",")
    told = sorted([*table_under("What a line says"), "step"])
    assert told == sorted([*head, "kl"]), "kl needs --beta"


SIX = ("train.py", "sample.py", "rewards.py", "losses.py", "policy.py", "eval.py")


def first_part(file):
    """The lines above the comment that ends a first reading."""
    lines = (ROOT / file).read_text().splitlines()
    return lines[:next(i for i, line in enumerate(lines) if "a first reading ends here" in line)]


def test_the_first_parts_are_as_long_as_it_says_and_speak_of_the_algorithm():
    total = sum(len(first_part(file)) for file in SIX)
    said = int(README.partition("ends a first reading, ")[2].split()[0].replace(",", ""))
    assert said == total <= 1050
    machinery = r"\b(ranks?|worlds?|first process\w*|fingerprints?|locks?|signals?|paste\w*)\b"
    for file in ("train.py", "sample.py", "eval.py"):
        for line in first_part(file):
            if not line.startswith(("import ", "from ")):
                assert not re.search(machinery, line), f"{file}: {line}"


def test_the_files_grow_no_further():
    """A feature more is some lines less elsewhere."""
    sizes = [len((ROOT / file).read_text().splitlines()) for file in SIX]
    assert sum(sizes) <= 4200 and max(sizes) <= 850
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path.name}, line {number} has {len(line)} columns"


def test_it_stays_short():
    assert len(README.splitlines()) <= 260 and len(README.split()) <= 2700
