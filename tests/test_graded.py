"""The card: right solutions get all points, mistakes cost what they should, nothing is forged.

Right solutions are those of course/solved/, written otherwise than the reference; wrong ones are
made of them (course/variants.py, where all are graded; some here).

Bugs killed here: a right solution that loses a point, a defining mistake that costs little, a
grade that the graded code can write itself, a submission that stops the grader, a sentence that
names no cause, a test of chance that is wrong too often or sees nothing.
"""

import csv
import json
import random
import sys

import pytest
import torch

import exercises
import grade
from exercises import EXERCISES, REPO, exercise

sys.path.insert(0, str(REPO / "tests" / "course"))
import checks
import variants
import worker

GRADED = [one for one in EXERCISES if one.file]


@pytest.fixture(scope="module")
def workshop():
    made = grade.Workshop()
    yield made
    made.close()


def graded(workshop, tmp_path, number, source, seconds=120, name="answer.py"):
    path = tmp_path / name
    path.write_text(source) if isinstance(source, str) else path.write_bytes(source)
    return grade.grade(workshop, grade.Submission(path), exercise(number), seconds)


def says(card):
    return [part["says"] for part in card["parts"] if part["says"]]


@pytest.mark.parametrize("number", [one.number for one in GRADED])
def test_a_right_solution_of_another_kind_gets_all_points(number, workshop, tmp_path):
    card = graded(workshop, tmp_path, number, variants.solved(number))
    assert card["points"] == card["of"], says(card)


def test_the_reference_as_a_folder_gets_all_points(workshop):
    submission = grade.Submission(REPO)
    for number in (2, 8):
        card = grade.grade(workshop, submission, exercise(number), 120)
        assert card["points"] == card["of"] == exercise(number).points, says(card)


DEFINING = [
    (1, "bare eval"), (2, "the plug-in"), (3, "max for min"), (3, "old_logp with gradient"),
    (4, "keys not rotated"), (5, "no gradient of the entropy"), (6, "generator ignored"),
    (7, "the mean of the chunks' losses"), (8, "both signs"),
    (8, "mean over the width for sum too"), (9, "the factor k lost"),
]


@pytest.mark.parametrize("number, name", DEFINING, ids=[name for _, name in DEFINING])
def test_a_defining_mistake_costs_two_fifths(number, name, workshop, tmp_path):
    wrong = [source for other, source in variants.variants(number) if other == name][-1]
    card = graded(workshop, tmp_path, number, wrong)
    assert card["points"] <= 0.6 * card["of"], f"{card['points']} of {card['of']}"


# ----------------------------------------------------------------------------------------- forging

PATCHED = """
import sys, types
main = sys.modules["__main__"]
main.Recorder = types.SimpleNamespace(say=lambda *a, **k: None)
for name in ("drivers", "loss", "pack", "told"):
    if name == "drivers":
        main.drivers["loss"] = lambda *a, **k: {"loss": 0.0, "gradient in logp": 0.0, "stats": {}}
    elif name == "pack":
        main.pack = lambda x: {"~": "dict", "of": []}
try:
    import pytest
    pytest.fail = lambda *a, **k: None
except ImportError:
    pass
def grpo(logp, *rest, **options):
    return (0 * logp).sum(), {}
"""
READING = """
import os
def find():
    for line in (open("/proc/%d/cmdline" % os.getppid()).read(), ):
        return line
try:
    FOUND = find()
except PermissionError as error:
    FOUND = str(error)
def grpo(logp, *rest, **options):
    raise RuntimeError("found: " + FOUND)
"""
KNOWING = """
import importlib.util, sys
def grpo(*args, **options):
    spec = importlib.util.spec_from_file_location("theirs", {path!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.grpo(*args, **options)
"""
OTHERS = """
import os
def grpo(*args, **options):
    {how}
    raise RuntimeError("it was let")
"""


def test_no_forgery_earns_a_point(workshop, tmp_path):
    """Replacing what reports results, pytest's own functions, and reading the grader's command line
    from /proc; knowing where the reference lies does not help either."""
    lost = lambda card: [part["points"] for part in card["parts"] if part["function"] == "grpo"]
    card = graded(workshop, tmp_path, 3, PATCHED)
    assert sum(lost(card)) == 0, card
    card = graded(workshop, tmp_path, 3, READING)
    assert sum(lost(card)) == 0 and "may not open /proc" in " ".join(says(card)), says(card)
    card = graded(workshop, tmp_path, 3, KNOWING.format(path=str(REPO / "losses.py")))
    assert sum(lost(card)) == 0 and f"may not open {REPO / 'losses.py'}" in " ".join(
        says(card)
    ), says(card)


@pytest.mark.parametrize(
    "how",
    [
        "os.listdir('/')", "os.system('true')", "os.fork()", "open('x', 'w')",
        "os.remove('/tmp/x')", "__import__('subprocess').run(['true'])",
        "__import__('ctypes').CDLL(None)",
        "__import__('socket').create_connection(('127.0.0.1', 9))", "os.kill(os.getppid(), 9)",
        "__import__('pathlib').Path('/etc/passwd').read_text()",
    ],
)
def test_graded_code_reads_writes_and_starts_nothing(how, workshop, tmp_path):
    path = tmp_path / "answer.py"
    path.write_text(OTHERS.format(how=how))
    card = grade.grade(workshop, grade.Submission(path), exercise(3), 60, stop=True)
    task = grade.Submission(path).task(exercise(3), ["grpo"])
    asked = [check for check in checks.checks_of(3) if check.function == "grpo"]
    row = grade.Examination(workshop, task, 60, 60, stop=True).rows(asked)[0]
    assert "PermissionError" in row.says and "it was let" not in row.says, row.says
    assert card["points"] < card["of"]


def test_no_right_answer_is_in_the_process_that_is_graded(tmp_path):
    """Neither sources nor bodies of the functions that are asked for go there."""
    path = tmp_path / "answer.py"
    path.write_text("def grpo():\n    return 1\n")
    task = grade.Submission(path).task(exercise(3), ["grpo"])
    sources = {
        file: __import__("base64").b64decode(text).decode()
        for file, text in task["sources"].items()
    }
    answers = exercises.solution_lines() - {
        "if cache is not None:", "prompt, prompt_mask = encode(tokenizer, prompts, device)",
    }
    for file, text in sources.items():
        assert not answers & {line.strip() for line in text.split("\n")}, file
    nothing = grade.encoded(grade.nothing("diffsmooth"))
    assert (
        task["bodies"]["losses.py"]["diffsmooth"]
        == nothing
        != task["bodies"]["losses.py"]["group_advantages"]
    )
    assert not {"grpo", "_clip"} & task["bodies"]["losses.py"].keys()
    assert task["bodies"]["losses.py"]["entropy"] == grade.encoded(
        grade.nothing("entropy")
    ), "grpo by another name"


def test_an_answer_that_is_no_answer_is_a_sentence(workshop, tmp_path):
    for code in (
        "raise SystemExit(0)", "import os; os._exit(0)", "import sys; sys.setrecursionlimit(40)",
        "return (logp * float('nan')).sum(), {'x': object()}", "return 'loss', 3",
        "print('x' * 10 ** 7); raise KeyboardInterrupt",
    ):
        card = graded(workshop, tmp_path, 3, f"def grpo(logp, *rest, **options):\n    {code}\n")
        assert [p["points"] for p in card["parts"] if p["function"] == "grpo"] == [0, 0, 0, 0]
        assert all(len(text) > 20 for text in says(card)), says(card)


# ---------------------------------------------------------------------------------------- the card


def test_what_is_not_there_is_no_points_and_a_sentence(workshop, tmp_path):
    one = exercise(2)

    def of(source, name="eval.py"):
        card = graded(workshop, tmp_path, 2, source, name=name)
        assert card["of"] == one.points
        return card["points"], says(card)[0] if says(card) else None

    whole = (REPO / "eval.py").read_text()
    assert of(exercises.blank(whole, one.functions, 2)) == (0, "not written yet")
    assert of(whole.replace("def pass_at_k", "def passatk")) == (0, "eval.py defines no pass_at_k")
    points, why = of("def pass_at_k(n, c, k) return 1")
    assert points == 0 and why == "eval.py cannot be read: SyntaxError: expected ':' (line 1)", why
    points, why = of("import nosuchmodule\n" + whole)
    assert (
        points == 0
        and why
        == "eval.py cannot be imported: ModuleNotFoundError: No module named "
        "'nosuchmodule' (eval.py, line 1)"
    ), why
    points, why = of("import sys\nsys.exit(0)\n" + whole)
    assert points == 0 and "SystemExit: 0 (eval.py, line 2)" in why, why
    points, why = of(b"# \xe9\n" + whole.encode())
    assert points == 0 and "SyntaxError: invalid or missing encoding declaration" in why, why
    assert of(b"\xef\xbb\xbf" + whole.encode()) == (8, None), "a byte order mark is nothing"
    assert of(whole.replace("\n", "\r\n").encode()) == (8, None)
    points, why = of(whole.replace("1.0 - math.comb(n - c, k) / math.comb(n, k)", "1 / 0"))
    line = 1 + whole[: whole.index("return 1.0 - math.comb")].count("\n")
    assert points < 8 and f"ZeroDivisionError: division by zero (eval.py, line {line})" in why, why


def test_a_hanging_submission_costs_its_seconds(workshop, tmp_path):
    for code in (
        "def pass_at_k(n, c, k):\n    while True:\n        pass\n",
        "while True:\n    pass\ndef pass_at_k():\n    return 1\n",
        "import time\ndef pass_at_k(n, c, k):\n    time.sleep(1e6)\n",
    ):
        card = graded(workshop, tmp_path, 2, code, seconds=8)
        assert card["points"] == 0 and card["spent"] < 9, card
        assert "not finished after 2 s: does a loop never end?" in says(card)[0], says(card)


def test_waiting_for_a_busy_machine_is_not_hanging():
    """A loop computes, a sleeper sleeps; who could run, but is not let, does neither."""
    own_time = grade.Worker.own_time
    assert own_time((1.0, False), (1.2, False), 0.2) == pytest.approx(0.2)
    assert own_time((1.0, False), (1.0, False), 0.2) == 0, "it waits for a processor"
    assert own_time((1.0, True), (1.0, True), 0.2) == own_time(None, None, 0.2) == 0.2
    assert own_time((1.0, True), (1.0, True), 0.0) == 0, "it says something"


def test_the_first_number_that_differs_is_told():
    right = torch.tensor([[1.0, 0, 0], [0, 2, 0]])
    wrong = right.clone()
    wrong[1, 1] = 2.5
    assert (
        checks.same({"loss": wrong}, {"loss": right})
        == "loss at [1, 1] should be 2, but is 2.5 (1 of 6 numbers differ)"
    )
    assert checks.same(wrong, right[:1]) == "it should have shape (1, 3), but has (2, 3)"
    assert (
        checks.same({"error": ["KeyError"], "says": "KeyError: 'x'"}, 1.0)
        == "it fails with KeyError: 'x'"
    )
    assert "must raise ValueError" in checks.same(
        1.0, {"error": ["ValueError"], "says": "ValueError: no"}
    )
    assert checks.same(1.0, 1.0 + 1e-9) is None and checks.same(float("nan"), 1.0)
    assert checks.same([1, (2, "a")], [1, (2, "a")]) is None and checks.same(
        [1, (2, "a")], [1, (2, "b")]
    )


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, -1 << 200, 0.1, float("nan"), float("-inf"), "a\ud800", [1, [2.5, "x"]],
        (1, ()), {"a": {"b": (1,)}}, torch.tensor([1.5, float("nan")]), torch.zeros(0, 3),
        torch.tensor(2), torch.tensor([[True]]), torch.tensor([1.5]).bfloat16(),
    ],
    ids=repr,
)
def test_values_come_back_as_they_were_sent(value):
    back = worker.unpack(json.loads(json.dumps(worker.pack(value))))
    assert type(back) is type(value)
    if isinstance(value, torch.Tensor):
        assert (
            back.dtype == value.dtype
            and back.shape == value.shape
            and torch.equal(back.nan_to_num(), value.nan_to_num())
        )
    else:
        assert repr(back) == repr(value)


# --------------------------------------------------------------------------------- tests of chance


def test_tests_of_chance_are_wrong_as_rarely_as_stated():
    """The exact tail of a binomial; and independent draws raise no alarm in hundreds of tests."""
    low, high = checks.binomial_tails(10, 0.3, 4)
    assert abs(low - 0.8497317) < 1e-6 and abs(high - 0.3503893) < 1e-6
    assert (
        checks.unlikely(3000, 0.01, 0)
        and checks.unlikely(1000, 0.01, 40)
        and not checks.unlikely(1000, 0.01, 20)
    )
    judge = checks.judge_independent(checks.EVEN, 3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert judge(*[rollouts_of(torch.randint(3, 15, (3, 192, 12), generator=draw))] * 2) is None


def rollouts_of(tokens):
    made = []
    for some in tokens:
        B, T = some.shape
        whole = torch.cat([torch.zeros(B, 1, dtype=torch.int64), some], 1)
        made.append(
            dict(
                tokens=whole, prompt_mask=torch.ones(B, 1).bool(), response=some,
                mask=torch.ones(B, T).bool(), logp=torch.zeros(B, T),
                finished=torch.zeros(B).bool(), texts=[""] * B,
            )
        )
    return {"rollouts": made}


def test_a_tail_cut_at_98_percent_is_seen():
    """60,000 draws: all but two hundredths of the mass, and what is left rescaled."""
    rng, p = random.Random(0), checks.TAIL
    judge = checks.judge_frequencies(p, 1.0)

    def drawn(chances):
        return rollouts_of(
            torch.tensor(
                [[[t] for t in rng.choices(list(chances), list(chances.values()), k=60000)]]
            )
        )

    assert judge(*[drawn(p)] * 2) is None
    kept, mass = {}, 0.0
    for token in sorted(p, key=p.get, reverse=True):
        if mass <= 0.98:
            kept[token] = p[token]
        mass += p[token]
    assert len(kept) < len(p) and "rarest" in judge(*[drawn(kept)] * 2)


# ----------------------------------------------------------------------------------------- a class


def test_a_class_is_one_table(tmp_path, capsys):
    """Four submissions, two at a time; one hangs, one is empty, one is right."""
    handed_in = tmp_path / "handed_in"
    handed_in.mkdir()
    (handed_in / "ann.py").write_text(variants.solved(2))
    (handed_in / "bob.py").write_text("def pass_at_k(n, c, k):\n    while True:\n        pass\n")
    (handed_in / "cid").mkdir()
    (handed_in / "cid" / "eval.py").write_text((REPO / "eval.py").read_text())
    (handed_in / "dan").mkdir()
    sheet, table = tmp_path / "sheet.json", tmp_path / "grades.csv"
    code = grade.main(
        [
            "--all", str(handed_in), "--only", "2", "--csv", str(table), "--json", str(sheet),
            "--jobs", "2", "--seconds", "40",
        ]
    )
    rows = {row["submission"]: row for row in csv.DictReader(table.open())}
    assert code == 1 and list(rows) == ["ann.py", "bob.py", "cid", "dan"]
    assert [row["points"] for row in rows.values()] == ["8", "0", "8", "0"] and {
        row["of"] for row in rows.values()
    } == {"8"}
    assert (
        "does a loop never end" in rows["bob.py"]["first mistake"]
        and "has none of" in rows["dan"]["first mistake"]
    )
    assert json.loads(sheet.read_text())["bob.py"]["2"]["points"] == 0
    code = grade.main([str(handed_in / "ann.py")])
    assert code == 0 and "8/8" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="neither a folder nor a file"):
        grade.main([str(tmp_path / "nobody")])
