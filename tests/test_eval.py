"""Measurement: the estimator against enumeration, the table against hand-counted answers.

Bugs killed here: biased plug-in estimate, counts pooled over problems, an interval over samples
instead of problems, unpaired gains, wrong or unparsable answers counted as distinct, diversity with
self-pairs.
"""
import ast
import gc
import itertools
import json
import math
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
import losses
import policy as policy_module
import rewards
from rewards import Countdown, Math, Problem
from test_losses import check, claim

core, care = pytest.mark.core, pytest.mark.care       # with the function that a test grades


@core("pass_at_k")
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_answer(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        # answers 0..c-1 are correct
        hits = [min(subset) < c for subset in itertools.combinations(range(n), k)]
        bugs = {"the plug-in 1 - (1 - c/n)^k, which is biased": 1 - (1 - c / n) ** k,
                "every correct answer drawn by itself, 1 - (1 - k/n)^c": 1 - (1 - k / n) ** c}
        check(f"pass_at_k({n}, {c}, {k})", evaluation.pass_at_k(n, c, k),
              sum(hits) / len(hits), 1e-12, 1e-12, bugs)


def test_pass_at_k_worked_numbers():
    """n 10, c 3, k 5: 1 - C(7,5)/C(10,5) = 1 - 21/252; the biased 1 - 0.7^5 would be 0.832."""
    assert evaluation.pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert evaluation.pass_at_k(10, 3, 5) == pytest.approx(0.916667, abs=1e-6)
    assert evaluation.pass_at_k(8, 6, 4) == 1.0
    for n, c, k in ((4, 1, 5), (4, 5, 1), (4, 1, 0), (4, -1, 1)):
        with pytest.raises(ValueError):
            evaluation.pass_at_k(n, c, k)


def test_record_counts_what_a_reader_would_count():
    """4 7 2 9 -> 24. Two spellings of one answer, a second answer, a wrong one and one that does
    not parse."""
    task, problem = Countdown(), Problem((4, 7, 2, 9), 24)
    texts = ["2*(9+7-4)", "(7+9-4)*2", "2*(9+7-4)", "(9-7)*4*2", "9+7+4+2", "24", "((", "4*(9-7)*2"]
    right = [text for text in texts if task.reward(problem, text)]
    drawn = [(text, len(text) + 1, 2.0, text != "((") for text in texts]
    record = evaluation.record(task, problem, drawn)
    assert record["n"] == 8 and record["c"] == len(right) == 3
    assert record["distinct"] == 1 and record["as_text"] == 2, "the two spellings are one answer"
    assert record["sigma"] == 0.0, "all correct answers are the same one"
    assert record["parsed"] == pytest.approx(7 / 8), "only '((' does not parse"
    assert record["nats"] == 2.0 and record["tokens"] == sum(len(text) + 1 for text in texts) / 8
    assert record["finished"] == 7 / 8


def test_sigma_is_the_chance_that_two_correct_samples_differ():
    task, problem = Countdown(counts=(3,)), Problem((1, 2, 3), 6)
    texts = ["1+2+3"] * 3 + ["1*2*3"] * 2 + ["3+2+1"]   # 4 times the sum, 2 times the product
    forms = [text.replace("3+2+1", "1+2+3") for text in texts]
    pairs = list(itertools.permutations(forms, 2))
    record = evaluation.record(task, problem, [(text, 6, 1.0, True) for text in texts])
    assert record["sigma"] == pytest.approx(sum(a != b for a, b in pairs) / len(pairs))
    assert evaluation.record(task, problem, [("1+2+3", 6, 1.0, True)])["sigma"] is None, \
        "one correct answer has no pairs"
    assert evaluation.record(task, problem, 2 * [("1+2+3", 6, 1.0, True)])["sigma"] == 0.0, \
        "two have one"


def fake(counts, n=8):
    return [{
        "n": n, "c": c, "distinct": c, "as_text": c, "sigma": 0.5 if c > 1 else None, "parsed": 1.0,
        "finished": 1.0, "tokens": 5.0, "nats": 3.0
    } for c in counts]


def test_summary_averages_over_problems_last():
    """Counts 8 and 0 of 8: Pass@2 is (1 + 0) / 2, not the Pass@2 of 8 among 16 (0.77)."""
    row = evaluation.summary({"m": fake([8, 0])})["m"]
    assert row["Pass@2"]["mean"] == 50.0 and row["Pass@1"]["mean"] == 50.0
    assert row["sigma"]["mean"] == 0.5, "a problem without correct answers has no diversity"
    assert set(row) >= {"Pass@1", "Pass@2", "Pass@4", "Pass@8"}


def test_intervals_are_over_problems_and_gains_are_paired():
    """300 problems that differ much, and a second model better by one answer on each: the gain is
    the same everywhere."""
    counts = np.random.default_rng(0).integers(0, 8, 300).tolist()
    result = evaluation.summary({"a": fake(counts), "b": fake([c + 1 for c in counts])})
    one, gain = result["a"]["Pass@1"], result["b"]["Pass@1"]["gain"]
    spread = np.std(counts) / 8 * 100 / math.sqrt(300)  # standard error over problems
    assert one["high"] - one["low"] == pytest.approx(2 * 1.96 * spread, rel=0.15)
    assert gain["mean"] == gain["low"] == gain["high"] == 12.5, \
        "unpaired resampling would give this gain an interval"


def test_the_table_names_every_model_and_measure():
    """By hand: of 8 answers 1, 2, 3 and 2, 2, 5 are right: Pass@1 25.0 and 37.5, and 12.5 more."""
    text = evaluation.table(evaluation.summary({"base": fake([1, 2, 3]), "mine": fake([2, 2, 5])}))
    head, *lines = text.splitlines()
    assert head.split() == ["base", "mine", "(gain", "over", "base)"]
    assert [line.split()[0] for line in lines][:4] == ["Pass@1", "Pass@2", "Pass@4", "Pass@8"]
    _, base, _, _, mine, gain, _, _ = lines[0].split()
    assert (base, mine, gain) == ("25.0", "37.5", "+12.5"), lines[0]


def test_the_chart_has_every_curve():
    """Three letters, one a k each; the better model stands higher."""
    text = evaluation.chart(
        evaluation.summary(
            {"base": fake([0, 1, 2]), "mine": fake([8, 8, 8]), "none": fake([0, 0, 0])}))
    grid = [line.partition("|")[2] for line in text.splitlines() if "|" in line]
    assert sum(line.count("a") for line in grid) == sum(line.count("b") for line in grid) == 4
    assert grid[0].count("b") == 4, "100 % at every k is the top line"
    assert grid[-1].count("c") == 4, "and 0 % the lowest"
    places = {
        letter: sorted(i for line in grid for i, x in enumerate(line) if x == letter)
        for letter in "abc"
    }
    assert places == {"a": [0, 6, 12, 18], "b": [1, 7, 13, 19], "c": [2, 8, 14, 20]}, \
        "side by side, above their k"
    assert text.splitlines()[-2].split() == ["k", "1", "2", "4", "8"]
    assert "a base, b mine, c none" in text


@pytest.mark.parametrize("temperatures, n", [((1.0,), 8), ((0.4, 1.0), 8), ((0.4, 1.0), 128)])
def test_a_picture_has_plain_ticks_a_legend_and_a_title(tmp_path, temperatures, n, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt
    monkeypatch.setattr(plt, "close", lambda figure: None)  # so that it can be looked at
    some = {
        T: evaluation.summary({"base": fake([0, 1, 2], n), "mine": fake([2, 5, 8], n)})
        for T in temperatures
    }
    evaluation.plot(some, tmp_path / "x.png", "Countdown")
    axes = plt.gcf().axes[0]
    assert (tmp_path / "x.png").stat().st_size > 5000 and axes.get_title() == "Countdown"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["base", "mine"]
    if len(temperatures) == 1:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4", "8"]
    else:
        assert axes.get_xlabel() == "Pass@1 (%)" and axes.get_ylabel() == f"Pass@{min(n, 64)} (%)"
        assert sorted(text.get_text()
                      for text in axes.texts) == ["T 0.4", "T 0.4", "T 1.0", "T 1.0"]


def test_evaluate_ends_in_one_record_a_problem_for_any_batching():
    policy, tokenizer = policy_module.tiny(width=32, layers=1, heads=2, kv_heads=1, inner=32)
    task = Countdown(counts=(2,), high=9, targets=(1, 20))
    problems = task.held_out_problems(3)
    for rows in (1, 4, 5, 1000):
        records = evaluation.evaluate(policy, tokenizer, task, problems, 5, 6, rows=rows)
        assert [tuple(r["problem"]) for r in records] == [tuple(p) for p in problems]
        assert all(r["n"] == 5 for r in records), f"rows={rows}"


def test_command_line(tmp_path, capsys):
    policy, tokenizer = policy_module.tiny(width=32, layers=1, heads=2, kv_heads=1, inner=32)
    policy_module.save(policy, tokenizer, tmp_path / "model")
    out = tmp_path / "out.json"
    flags = ["--n", "4", "--problems", "3", "--json", str(out), "--device", "cpu"]
    assert evaluation.main([str(tmp_path / "model"), *flags]) == 0
    assert "Pass@4" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["records"]["0.7"]["model"]) == 3
    model = str(tmp_path / "model")
    for bad, says in ((["nowhere/at/all"], "nowhere/at/all"), ([model, "--n", "0"], "--n"),
                      ([str(tmp_path)], "config.json"), ([model, "--task", "math"], "--data"),
                      ([model, "--task", "math", "--data", "no.jsonl"], "no.jsonl"),
                      ([model, "--task", "math", "--data", "no.jsonl", "--show", "1,2=3"],
                       "--show: a problem of one's own is a countdown problem")):
        assert evaluation.main([*bad, *(flags if "--n" not in bad else flags[2:])]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error


def test_several_temperatures_give_a_table_each_and_flags_may_be_spelt_either_way(tmp_path, capsys):
    policy, tokenizer = policy_module.tiny(width=32, layers=1, heads=2, kv_heads=1, inner=32)
    policy_module.save(policy, tokenizer, tmp_path / "model")
    out = tmp_path / "out.json"
    assert evaluation.main([str(tmp_path / "model"), "--samples", "2", "--problems", "3", "--json",
                            str(out), "--device", "cpu", "--temperatures", "0.5", "1.5",
                            "--max_new_tokens=6"]) == 0
    text, written = capsys.readouterr().out, json.loads(out.read_text())
    assert text.count("Pass@2") == 2 and "temperature 0.5," in text and "temperature 1.5," in text
    hot, cold = (np.mean([r["nats"] for r in written["records"][T]["model"]])
                 for T in ("1.5", "0.5"))
    assert hot > cold and written["flags"]["max_new_tokens"] == 6


def test_the_title_of_a_picture_says_what_was_measured(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    policy_module.save(*policy_module.tiny(width=32, layers=1, heads=2, kv_heads=1, inner=32),
                       tmp_path / "model")
    titles = []
    monkeypatch.setattr(evaluation, "plot", lambda summaries, file, title: titles.append(title))
    for temperatures in (["0.5"], ["0.5", "1.5"]):
        assert evaluation.main([str(tmp_path / "model"), "--n", "2", "--problems", "3",
                                "--max-new-tokens", "4", "--device", "cpu", "--json",
                                str(tmp_path / "x.json"), "--plot", str(tmp_path / "x.png"),
                                "--temperatures", *temperatures]) == 0
    assert titles == ["countdown, 3 problems, 2 samples, T 0.5", "countdown, 3 problems, 2 samples"]


def test_what_is_left_out_of_a_file_is_said_once(tmp_path, capsys):
    """Of two models one asks as the other does; a file without such problems is not spoken of."""
    # a context of 512
    policy, tokenizer = policy_module.tiny(width=32, layers=1, heads=2, kv_heads=1, inner=32)
    models, data = [tmp_path / "one", tmp_path / "two"], tmp_path / "data.jsonl"
    for folder in models:
        policy_module.save(policy, tokenizer, folder)
    fits, too_long = ({"problem": "1" * n, "answer": "2"} for n in (9, 600))
    said = f"{data}: 1 problems are left out: prompts over 508 tokens.\n"
    for lines, said in (([fits, too_long], said), ([fits], "")):
        data.write_text("\n".join(map(json.dumps, lines)))
        assert evaluation.main([*map(str, models), "--task", "math", "--data", str(data),
                                "--n", "1", "--max-new-tokens", "4", "--device", "cpu",
                                "--json", str(tmp_path / "x.json")]) == 0
        assert capsys.readouterr().out.startswith(said + "1 held-out problems, 1 samples each")


class Counting:
    """A tokenizer whose calls are counted."""

    def __init__(self, tokenizer):
        self.inner, self.calls = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, *args, **options):
        self.calls += 1
        return self.inner(*args, **options)


def test_of_a_long_file_only_doubtful_prompts_are_counted(tmp_path):
    """A token is a byte at least, so a prompt of few bytes fits; of the others exactly those of
    more tokens than there is room are left out."""
    data, texts = tmp_path / "data.jsonl", [*map(str, range(300)), "1" * 400, "1" * 401, "1" * 402]
    data.write_text("".join(json.dumps({"problem": text, "answer": "2"}) + "\n" for text in texts))
    task = Math(str(data), held_out=1.0)
    everything = "".join(map(chr, range(32, 127))) + "\n"
    tokenizer = Counting(policy_module.tiny(characters=everything)[1])
    tokens = [len(tokenizer.inner(task.prompt(x)).input_ids) for x in task.held_out_problems(303)]
    room = tokens[-2]
    assert tokens[-3:] == [room - 1, room, room + 1] and max(tokens[:-3]) < room / 2
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=room + 10))
    evaluation.leave_out_too_long(task, tokenizer, model, 10)
    assert {x.question for x in task.problems.held_out} == set(texts[:-1])
    assert f"1 problems are left out: prompts over {room} tokens." in task.notes[-1]
    assert tokenizer.calls < 10, f"{tokenizer.calls} calls for {len(texts)} problems"


def test_prompts_that_may_all_be_too_long_are_counted_together(tmp_path):
    data = tmp_path / "data.jsonl"
    texts = ["1" * (300 + i) for i in range(150)]
    data.write_text("".join(json.dumps({"problem": text, "answer": "2"}) + "\n" for text in texts))
    task = Math(str(data), held_out=1.0)
    everything = "".join(map(chr, range(32, 127))) + "\n"
    tokenizer = Counting(policy_module.tiny(characters=everything)[1])
    room = len(tokenizer.inner(task.prompt(task.held_out_problems(149)[-1])).input_ids)
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=room + 10))
    evaluation.leave_out_too_long(task, tokenizer, model, 10)
    assert [x.question for x in task.problems.held_out] == texts[:-1]
    assert tokenizer.calls <= 2, f"{tokenizer.calls} calls for {len(texts)} problems"


def test_help_names_the_defaults_that_there_are(capsys):
    with pytest.raises(SystemExit):
        evaluation.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "answers per problem (default: 128);" in text
    assert "default: None" not in text and "SUPPRESS" not in text


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a" / "b" / "x.json"
    evaluation.write_json(file, {"one": 1})
    with pytest.raises(TypeError):
        evaluation.write_json(file, {"two": 2, "what no JSON holds": object()})
    assert json.loads(file.read_text()) == {"one": 1}


def test_a_picture_without_its_package_is_told_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(policy_module, "load", lambda *args: pytest.fail("it went to work"))
    assert evaluation.main(["some/model", "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_picture_of_no_known_format_is_told_before_the_work(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(policy_module, "load", lambda *args: pytest.fail("it went to work"))
    assert evaluation.main(["some/model", "--plot", str(tmp_path / "x.xyz")]) == 2
    assert "'xyz' is no picture format" in capsys.readouterr().err


def test_processes_and_gpus(monkeypatch):
    """One process per GPU; what runs on the CPU asks no GPU for anything."""
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: torch.tensor(0))
    for device in (None, "cuda"):
        with pytest.raises(policy_module.UserError, match="more processes than the 1 GPUs here"):
            evaluation.start_processes(device)
    assert evaluation.start_processes("cpu") == ("cpu", torch.float32) and chosen == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert evaluation.start_processes(None) == ("cuda", torch.bfloat16) and chosen == [1]


def test_processes_wait_for_days(monkeypatch):
    """Half an hour, torch's own limit, is less than another process may evaluate or save."""
    joined = {}
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.distributed, "init_process_group",
                        lambda backend, timeout: joined.update(timeout=timeout))
    evaluation.start_processes("cpu")
    assert joined["timeout"].days >= 1


@pytest.mark.parametrize("problems, n, rows, right", [
    (5, 4, 1000, 1), (17, 4, 1000, 3), (17, 4, 8, 2), (17, 4, 1, 1), (512, 64, 1024, 16)])
def test_there_is_work_for_every_process(monkeypatch, problems, n, rows, right):
    """And as much in a batch whatever the number of processes: the records are then the same."""
    for processes in (1, 2, 8):
        monkeypatch.setattr(evaluation, "world", lambda: processes)
        assert evaluation.problems_at_once(problems, n, rows) == right


def test_threads_spin_a_shorter_while_but_not_where_the_user_has_chosen():
    """The statement is run on environments of our own; it has to stand before torch is imported."""
    source = (Path(evaluation.__file__)).read_text()
    statements = ast.parse(source).body
    at = next(i for i, x in enumerate(statements)
              if isinstance(x, ast.If) and "GOMP_SPINCOUNT" in ast.unparse(x.test))
    later = [ast.unparse(x) for x in statements[at:]]
    assert "import torch" in later and "import numpy as np" in later
    for chosen, right in (({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"),
                          ({"OMP_WAIT_POLICY": "ACTIVE"}, None),
                          ({"OMP_NUM_THREADS": "1"}, "2000")):
        environment = dict(chosen)
        program = ast.Module([statements[at]], [])
        exec(compile(program, "eval.py", "exec"), {"os": SimpleNamespace(environ=environment)})
        assert environment.pop("GOMP_SPINCOUNT", None) == right
    train = ast.parse((Path(evaluation.__file__).parent / "train.py").read_text()).body
    first = [ast.unparse(x) for x in train if isinstance(x, (ast.Import, ast.ImportFrom))]
    assert first.index("import eval as evaluation") < first.index("import torch")


def test_one_model_is_in_memory_at_a_time(tmp_path, monkeypatch):
    policy, tokenizer = policy_module.tiny(width=32, layers=1, heads=2, kv_heads=1, inner=32)
    models = [str(tmp_path / name) for name in ("one", "two", "three")]
    for folder in models:
        policy_module.save(policy, tokenizer, folder)
    load, loaded = policy_module.load, []
    def watched(*args):
        gc.collect()
        assert not any(former() for former in loaded), "the former model is in memory still"
        policy, tokenizer = load(*args)
        loaded.append(weakref.ref(policy))
        return policy, tokenizer
    monkeypatch.setattr(policy_module, "load", watched)
    assert evaluation.main([*models, "--n", "2", "--problems", "2", "--max-new-tokens", "4",
                            "--device", "cpu", "--json", str(tmp_path / "x.json")]) == 0
    assert len(loaded) == 3


def test_the_order_of_models_decides_nothing(tmp_path, capsys):
    """One has a chat template: both are asked in its style, whichever is named first, and that is
    said; --prompt chooses."""
    everything = "".join(map(chr, range(32, 127))) + "\n"
    for name in ("plain", "chat"):
        model, tokenizer = policy_module.tiny(width=32, layers=1, characters=everything)
        model.config.max_position_embeddings = 2048
        if name == "chat":
            tokenizer.chat_template = ("{% for m in messages %}{{ m['role'] + ': ' }}"
                                       "{{ m['content'] }}{% endfor %}assistant: ")
        policy_module.save(model, tokenizer, tmp_path / name)
    plain, chat = (str(tmp_path / name) for name in ("plain", "chat"))
    settings = []
    for models in ([plain, chat], [chat, plain], [chat, plain, "--prompt", "bare"]):
        assert evaluation.main([*models, "--n", "1", "--problems", "1", "--max-new-tokens", "4",
                                "--device", "cpu", "--json", str(tmp_path / "x.json")]) == 0
        flags = json.loads((tmp_path / "x.json").read_text())["flags"]
        settings.append([flags[key] for key in ("prompt", "counts", "high", "targets")])
        note = f"all are asked in style {settings[0][0]}, as '{chat}' has a chat template"
        assert (note in capsys.readouterr().out) == ("--prompt" not in models)
    assert settings[0] == settings[1] and settings[0][0] == "think" and settings[2][0] == "bare"


def test_a_fingerprint_tells_files_and_models_apart(tmp_path):
    policy, tokenizer = policy_module.tiny(width=32, layers=1, heads=2, kv_heads=1, inner=32)
    policy_module.save(policy, tokenizer, tmp_path / "one")
    policy_module.save(policy, tokenizer, tmp_path / "same")
    next(policy.parameters()).data[0] += 1
    policy_module.save(policy, tokenizer, tmp_path / "other")
    one, same, other = (evaluation.fingerprint(tmp_path / name)
                        for name in ("one", "same", "other"))
    assert one == same != other
    assert evaluation.fingerprint("owner/model") == "owner/model", \
        "what is no path here stands for itself"


def test_a_fingerprint_reads_all_bytes_of_data_and_of_weights(tmp_path):
    def marks(changed):
        data = bytearray(2 << 20)
        data[changed] = 1
        (tmp_path / "model.safetensors").write_bytes(data)
        return evaluation.fingerprint(tmp_path /
                                      "model.safetensors"), evaluation.fingerprint(tmp_path)

    files, folders = zip(*map(marks, (0, (1 << 20) - 1, 1 << 20, -1)))
    assert len(set(files)) == len(set(folders)) == 4, "another model has the same fingerprint"


# --------------------- for those who write the estimator themselves: failures that know the mistake


@core("pass_at_k")
@pytest.mark.parametrize("n, c, k, right", [(10, 3, 5, 1 - 21 / 252), (4, 1, 2, 0.5),
                                            (10, 3, 1, 0.3), (8, 6, 4, 1), (8, 1, 4, 0.5),
                                            (5, 0, 3, 0), (5, 5, 2, 1), (6, 2, 6, 1)])
def test_pass_at_k_by_hand(n, c, k, right):
    bugs = {
        "the plug-in 1 - (1 - c/n)^k, which is biased": 1 - (1 - c / n)**k, "k times c/n":
        k * c / n, "the chance that all k are correct": math.comb(c, k) / math.comb(n, k),
        "the chance that none of the k is correct": 1 - right,
        "the chance that exactly one of the k is correct":
        c * math.comb(n - c, k - 1) / math.comb(n, k), "c/n whatever k is": c / n,
        "n and k exchanged in C(n, k)": 1 - math.comb(n - c, k)
    }
    check(f"pass_at_k({n}, {c}, {k})", evaluation.pass_at_k(n, c, k), right, bugs=bugs)


@care("pass_at_k")
@pytest.mark.parametrize("n, c, k, why",
                         [(4, 1, 5, "k is larger than n, and no unbiased estimate exists"),
                          (4, 5, 1, "5 correct among 4 samples"), (4, 1, 0, "k is 0"),
                          (4, -1, 1, "c is negative")])
def test_pass_at_k_refuses_what_cannot_be(n, c, k, why):
    try:
        got = evaluation.pass_at_k(n, c, k)
    except ValueError:
        return
    claim(False, f"pass_at_k({n}, {c}, {k}) must raise ValueError, for {why}; it gave {got}")


@care("pass_at_k")
def test_pass_at_k_of_many_samples():
    """C(100000, 1000) has 2,430 digits: integers of Python or a product can do it, floats
    cannot."""
    product = 1.0
    for i in range(100000 - 300 + 1, 100001):
        product *= 1 - 1000 / i
    try:
        got = evaluation.pass_at_k(100000, 300, 1000)
    except OverflowError:
        got = float("nan")
    check("pass_at_k(100000, 300, 1000)", got, 1 - product)


@care("pass_at_k")
def test_pass_at_k_is_a_float():
    got = evaluation.pass_at_k(8, 8, 2)
    claim(isinstance(got, float), f"pass_at_k must return a float, not {type(got).__name__}")


def test_an_answer_goes_to_its_problem(monkeypatch):
    """A sampler that repeats its prompt: each problem must be judged on what was said to it, for
    any batching."""
    def echo(policy, tokenizer, prompts, G, *rest):
        at_once.append(len(prompts) * G)
        texts = [prompt for prompt in prompts for _ in range(G)]
        mask = torch.ones(len(texts), 3, dtype=torch.bool)
        return SimpleNamespace(texts=texts, mask=mask, logp=-mask.float(), finished=mask[:, 0])

    task = Countdown()
    problems, heard, at_once = task.held_out_problems(17), [], []
    monkeypatch.setattr(evaluation, "sample", echo)
    monkeypatch.setattr(evaluation, "record", lambda task, problem, answers: heard.append(
        (problem, answers)))
    for rows, batches in ((2, [2] * 34), (6, [4] * 17), (100, [12] * 5 + [8])):
        heard.clear(), at_once.clear()
        evaluation.evaluate(SimpleNamespace(device="cpu"), SimpleNamespace(chat_template=None),
                            task, problems, 4, 9, rows=rows)
        right = [(problem, [(task.prompt(problem), 3, 3.0, True)] * 4) for problem in problems]
        claim(heard == right,
              f"rows={rows}: answers were judged against another problem, or some are missing")
        claim(at_once == batches,
              f"rows={rows}: as many answers as fit go at once, {batches}, and not {at_once}")


def test_processes_share_the_batches_out_and_draw_what_one_draws(monkeypatch):
    """Five problems, a batch each, for two processes; test_processes.py has real ones."""
    policy, tokenizer = policy_module.tiny(width=32, layers=1, heads=2, kv_heads=1, inner=32)
    task, parts = Countdown(counts=(2,)), []
    problems = task.held_out_problems(5)

    def measured():
        return evaluation.evaluate(policy, tokenizer, task, problems, 3, 6, rows=6)

    def gathered(out, mine):
        out[:] = [{}, mine]
        parts.append(mine)

    alone = measured()
    monkeypatch.setattr(evaluation, "world", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    for process in (0, 1):
        monkeypatch.setattr(evaluation, "rank", lambda: process)
        measured()
    claim([sorted(part) for part in parts] == [[0, 2, 4], [1, 3]],
          f"batches were dealt out as {[sorted(part) for part in parts]}")
    whole = parts[0] | parts[1]
    claim([one for number in sorted(whole) for one in whole[number]] == alone,
          "a batch's answers depend on who draws it")


def trained(folder, **flags):
    """A run's folder, as far as its flags and the place of its model go."""
    (folder / "model").mkdir(parents=True)
    own = {
        "task": "countdown", "prompt": "bare", "counts": [4], "high": 9, "targets": [1, 60],
        "max_new_tokens": 24
    }
    (folder / "flags.json").write_text(json.dumps(own | flags))
    return str(folder)


def test_open_flags_are_those_of_the_runs(tmp_path):
    one, alike, other = (trained(tmp_path / name, high=high)
                         for name, high in (("one", 7), ("alike", 7), ("other", 8)))
    args = evaluation.parse([one, "owner/model", alike])
    folders, runs = evaluation.task_of_runs(args)
    assert folders == {
        one: tmp_path / "one" / "model", "owner/model": "owner/model", alike:
        tmp_path / "alike" / "model"
    }
    assert set(runs) == {one, alike}
    assert (args.task, args.prompt, args.counts, args.high) == ("countdown", "bare", [4], 7)
    with pytest.raises(ValueError, match="high 8, a run before it with 7: say by --high"):
        evaluation.task_of_runs(evaluation.parse([one, other]))
    args = evaluation.parse([one, other, "--high", "5"])
    evaluation.task_of_runs(args)
    assert (args.high, args.targets) == (5, [1, 60]), "what was typed counts, and only that"
    exam = trained(tmp_path / "math", task="math", prompt="boxed", counts=None, high=None,
                   targets=None, data="a", eval_data="b")
    args = evaluation.parse([exam])
    evaluation.task_of_runs(args)
    assert (args.task, args.data, args.counts) == ("math", "b", None), \
        "a run with an exam of its own is measured on that"
    (tmp_path / "one" / "model").rmdir()
    with pytest.raises(ValueError, match="has no model yet"):
        evaluation.task_of_runs(evaluation.parse([one]))
    args = evaluation.parse(["owner/model"])
    evaluation.task_of_runs(args)
    assert args.task == "countdown"


@pytest.mark.parametrize("error", [
    torch.distributed.DistError("closed"),
    RuntimeError("[gloo/transport] Connection closed by peer")
])
def test_a_process_that_lost_another_says_so_and_alone_it_is_a_bug(error, monkeypatch):
    monkeypatch.setattr(evaluation, "world", lambda: 2)
    assert evaluation.explain(error) == "another process has ended, so this one ends, too."
    monkeypatch.setattr(evaluation, "world", lambda: 1)
    with pytest.raises(type(error)):
        evaluation.explain(error)


def test_a_process_that_has_waited_too_long_says_that(monkeypatch):
    """gloo's words for both; the other process may be there still."""
    gloo = "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv"
    monkeypatch.setattr(evaluation, "world", lambda: 2)
    assert "has not answered for" in evaluation.explain(RuntimeError(gloo))
    assert "has ended" not in evaluation.explain(RuntimeError(gloo))
    monkeypatch.setattr(evaluation, "world", lambda: 1)
    with pytest.raises(RuntimeError):
        evaluation.explain(RuntimeError(gloo))


@pytest.mark.parametrize("module", [policy_module, rewards, losses])
def test_a_sentence_for_users_is_of_a_class_and_all_else_keeps_its_traceback(module):
    assert evaluation.explain(module.UserError("this is\n  wrong.")) == "this is wrong."
    for error in (ValueError("not enough values to unpack"), KeyError("x"), OSError("no words")):
        with pytest.raises(type(error)):
            evaluation.explain(error)


# ------------------------------------------------------- what a model says, and how it learned that

def answered(task, problem, *texts):
    return evaluation.record(task, problem, [(text, len(text), 1.0, True) for text in texts])


def test_answers_are_shown_with_their_shares():
    """1 2 3 -> 6. Of 8 samples 3 say the sum in two spellings, 2 the product, 2 the same wrong
    thing and 1 another; a bar of 40 characters is all of them."""
    task, problem = Countdown(counts=(3,)), Problem((1, 2, 3), 6)
    some = answered(task, problem, "1+2+3", "3+2+1", "1+2+3", *["1*2*3"] * 2, *["1+2*3"] * 2, "((")
    other = answered(task, problem, *["1*2*3"] * 8)
    head, base, *said, mine, all_alike = evaluation.answers_of(
        task, problem, {"base": some, "mine": other}).splitlines()
    assert head == " ".join(task.prompt(problem).split())
    assert (base, mine) == ("  base: 5 of 8 correct", "  mine: 8 of 8 correct")
    assert [line.split() for line in said] == [["1+2+3", "37.5", "%", "#" * 15],
                                               ["1*2*3", "25.0", "%", "#" * 10],
                                               ["x", "1+2*3", "25.0", "%", "#" * 10]]
    assert all_alike.split() == ["1*2*3", "100.0", "%", "#" * 40]
    assert max(map(len, [head, *said, all_alike])) <= 100


def test_boxed_answers_are_shown_with_their_shares(tmp_path):
    """Three wrong ones, as there is but one that is correct."""
    (tmp_path / "d.jsonl").write_text(json.dumps({"problem": "2+2?", "answer": "4"}) + "\n")
    task = Math(str(tmp_path / "d.jsonl"), held_out=1.0)
    problem, = task.held_out_problems(1)
    one = answered(task, problem, *[rf"so \boxed{{{x}}}." for x in (4, 4, 5, 5, 5, 6, 6, 7, 8, 8)])
    lines = evaluation.answers_of(task, problem, {"m": one}).splitlines()[1:]
    assert [line.split()[:-1] for line in lines[1:]] == [
        ["4", "20.0", "%"], ["x", "5", "30.0", "%"], ["x", "6", "20.0", "%"],
        ["x", "8", "20.0", "%"]]


def test_the_problem_that_changed_most_ends_the_table():
    """Of two that had several answers: by 1/8 + 1/8, and by 3/8 + 4/8 + 1/8."""
    task = Countdown(counts=(3,))
    problems = [Problem((1, 2, 3), 6), Problem((2, 2, 4), 8), Problem((1, 1, 2), 4)]
    before = [{"n": 8, "c": 4, "correct": {"1+2+3": 3, "1*2*3": 1}},
              {"n": 8, "c": 4, "correct": {"2+2+4": 3, "2*2+4": 1}},
              {"n": 8, "c": 1, "correct": {"1+1+2": 1}}]
    after = [{"n": 8, "c": 4, "correct": {"1+2+3": 2, "1*2*3": 2}},
             {"n": 8, "c": 5, "correct": {"2*2+4": 5}}, {"n": 8, "c": 0, "correct": {}}]
    head, base, mine = evaluation.most_changed(task, problems, before, after, "mine").splitlines()
    assert head.startswith(" ".join(task.prompt(problems[1]).split())) and len(head) <= 100
    assert base == "  base: 2+2+4 38 %, 2*2+4 12 %" and mine == "  mine: 2*2+4 62 %"
    text = evaluation.most_changed(task, problems[2:], before[2:], after[2:], "mine")
    assert text.splitlines()[2] == "  mine: never correct"


@pytest.mark.parametrize("show, shown, table", [("2", 2, True), ("2,3,5,7=17", 1, False)])
def test_answers_are_shown_on_demand(tmp_path, capsys, show, shown, table):
    """To held-out problems with several solutions, below the table; or to one problem alone."""
    policy_module.save(*policy_module.tiny(width=32, layers=1, heads=2, kv_heads=1, inner=32),
                       tmp_path / "model")
    assert evaluation.main([str(tmp_path / "model"), "--n", "4", "--problems", "40", "--show", show,
                            "--device", "cpu", "--json", str(tmp_path / "x.json")]) == 0
    text = capsys.readouterr().out
    assert text.count("  model: 0 of 4 correct") == shown and ("Pass@4" in text) == table
    assert ("2 3 5 7,17=" in text) == (not table)
    for line in text.splitlines():
        if table and "=" in line and "," in line and "x" not in line:
            numbers, target = line.rstrip("=").split(",")
            problem = Problem(tuple(map(int, numbers.split())), int(target))
            assert len(Countdown().solutions(problem)) > 2


def log_of(folder, steps, without=(), every=20):
    """A run's folder with a log.csv whose columns can be worked out: entropy 2 at all steps."""
    folder.mkdir()
    columns = [name for name in ("step", "distinct", "entropy", "held_out_1", "held_out_16",
                                 "held_out_distinct") if name not in without]
    lines = [",".join(columns)]
    for step in range(1, steps + 1):
        held = ("" if every == 0 or step % every else x for x in (step / 10, step / 5, step / 100))
        row = dict(zip(("held_out_1", "held_out_16", "held_out_distinct"), held))
        row |= {"step": step, "distinct": 3, "entropy": 2}
        lines.append(",".join(str(row[name]) for name in columns))
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture
def curves(tmp_path, monkeypatch):
    """(runs) -> the four panels that --curves draws of them. No model is loaded."""
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt
    monkeypatch.setattr(plt, "close", lambda figure: None)
    monkeypatch.setattr(policy_module, "load", lambda *args: pytest.fail("a model was loaded"))
    def drawn(*runs):
        assert evaluation.main([*runs, "--curves", str(tmp_path / "c.png")]) == 0
        assert (tmp_path / "c.png").stat().st_size > 5000
        return plt.gcf().axes
    return drawn


def test_curves_of_one_run(tmp_path, curves):
    pass_1, pass_16, entropy, distinct = curves(log_of(tmp_path / "grpo", 60))
    points = [panel.lines[0].get_xydata().tolist() for panel in (pass_1, pass_16, distinct)]
    assert points == [[[20, 2], [40, 4], [60, 6]], [[20, 4], [40, 8], [60, 12]],
                      [[20, 0.2], [40, 0.4], [60, 0.6]]]
    x, y = entropy.lines[0].get_data()
    assert x[-1] == 60 and x[0] <= 25 and set(y.round(9)) == {2}, "smoothed, up to the last step"
    assert [text.get_text() for text in pass_1.get_legend().get_texts()] == ["grpo"]
    assert all(panel.get_xlabel() == "step" and panel.get_title() for panel in
               (pass_1, pass_16, entropy, distinct))


def test_curves_of_ten_runs_of_every_age(tmp_path, curves):
    """An older log has no held-out columns and gives what it has, as does one of --eval-every 0 and
    one that is empty yet."""
    held = ("held_out_1", "held_out_16", "held_out_distinct")
    runs = [log_of(tmp_path / f"run{i}", 30 + i) for i in range(7)]
    runs += [log_of(tmp_path / "old", 30, without=held), log_of(tmp_path / "unseen", 30, every=0)]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "log.csv").write_text("")
    panels = curves(*runs, str(tmp_path / "new"))
    assert all(len(panel.lines) == 10 for panel in panels)
    assert len({line.get_color() for line in panels[0].lines}) == 10, "ten that can be told apart"
    names = [text.get_text() for text in panels[0].get_legend().get_texts()]
    assert names == [*(f"run{i}" for i in range(7)), "old", "unseen", "new"]
    for old in (7, 8):
        assert [len(panel.lines[old].get_xdata()) for panel in panels[:2]] == [0, 0]
        for panel, value in zip(panels[2:], (2, 3)):
            assert set(panel.lines[old].get_ydata().round(9)) == {value}
    assert not any(len(panel.lines[9].get_xdata()) for panel in panels)
