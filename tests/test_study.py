"""The study: what it concludes from runs that are made up, so that every number can be worked out
by hand; and a run of two steps, which being measured on the way must not change.

Bugs killed here: seeds pooled that one of the two has not, a verdict from the interval alone, a
setting chosen by large k, a trade called a gain, Pass@1 compared at unequal Pass@64, a path that
moves the run, a README that says what the results no longer do.
"""
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

import train

sys.path.insert(0, str(Path(__file__).parent / "bench"))
import study                                           # noqa: E402
import study_page                                      # noqa: E402

GRPO, SMOOTH = f"--loss grpo --lr {study.RATE}", f"--loss diffsmooth --gamma_p 0.2 --lr {study.RATE}"


def line(*shares):
    """A finished run on 100 problems, a share for each temperature. A share s: that part is always
    solved, the rest never. A pair (a, b): what lies between the two is solved one time in 64, so
    that Pass@1 is a + (b - a) / 64 and Pass@64 is b."""
    tests = {}
    for temperature, share in zip(study.TEMPERATURES, shares):
        low, high = share if isinstance(share, tuple) else (share, share)
        always, sometimes = round(100 * low), round(100 * (high - low))
        c = [64] * always + [1] * sometimes + [0] * (100 - always - sometimes)
        tests[temperature] = {"c": c, "distinct": 1.0, "sigma": 0.0}
    return {"commit": "abc", "seconds": 3600, "path": [], "test": tests}


def seen(results):
    return study.Study(results, "many", [4, 5, 6])


def both(ours, grpo):
    """Of smoothing and of GRPO a share, or one for each seed -> a study of the two."""
    results = {}
    for flags, shares in ((SMOOTH, ours), (GRPO, grpo)):
        shares = shares if isinstance(shares, list) else [shares] * 3
        for seed, share in zip((4, 5, 6), shares):
            results[study.name_of("many", flags, seed)] = line(*[share] * 4)
    return seen(results)


def test_the_score_weighs_k_1_as_much_as_the_rest():
    """One of two problems always solved, the other one time in 64: its Pass@k is k / 64, so Pass@1
    is 50.78125 and the mean of Pass@2 .. 64 is 50 + 50 * (126 / 64) / 6 = 66.40625."""
    curve = study.PASS[[64, 1]].mean(0)
    assert curve @ study.COLUMNS["score"] == pytest.approx((50.78125 + 66.40625) / 2)


def test_the_defaults_are_those_of_train_py():
    args = train.parse([])
    assert float(study.RATE) == args.lr == 2 * float(study.HALF) == float(study.TWICE) / 2
    assert float(study.METHODS["diffsmooth"][1].split()[3]) == args.gamma_p


def test_settings_are_kept_by_the_score_and_smoothing_gets_the_rates_too():
    results = {study.name_of("many", flags, 0): {"score": score}
               for flags, score in zip(study.METHODS["diffsmooth"], (41, 40, 43))}
    assert study.kept(seen({}), "diffsmooth") == SMOOTH, "before all are tried: the middle one"
    strongest = "--loss diffsmooth --gamma_p 0.4 --lr "
    assert study.tried(seen(results), "diffsmooth")[3:] == [strongest + study.HALF, strongest + study.TWICE]
    assert study.kept(seen(results), "diffsmooth") == SMOOTH, "two rates are still to be tried"
    results[study.name_of("many", strongest + study.HALF, 0)] = {"score": 44}
    results[study.name_of("many", strongest + study.TWICE, 0)] = {"score": 20}
    assert study.kept(seen(results), "diffsmooth") == strongest + study.HALF
    assert study.at_rates(seen(results), "diffsmooth") == [strongest + lr for lr in (study.HALF, study.RATE, study.TWICE)]
    names = study.wanted(seen(results), ["diffsmooth", "grpo"])
    assert study.name_of("many", strongest + study.HALF, 4) in names
    assert study.name_of("many", strongest + study.HALF + " --steps 2400", 6) in names
    assert study.name_of("many", SMOOTH, 4) in names, "the default, though not kept"
    assert study.name_of("many", GRPO, 4) not in names, "grpo is not tuned yet"


def test_where_the_lowest_rate_is_best_a_lower_one_is_tried_by_smoothing_too():
    settings = study.METHODS["grpo"]
    results = {study.name_of("many", flags, 0): {"score": 40 - i} for i, flags in enumerate(settings)}
    results |= {study.name_of("many", flags, 0): {"score": 40} for flags in study.METHODS["diffsmooth"]}
    lower = f"--loss grpo --lr {study.LOWER}"
    assert study.tried(seen(results), "grpo") == [lower, *settings]
    assert study.kept(seen(results), "grpo") == GRPO, "the lower one is still to be tried"
    assert study.with_rate(study.METHODS["diffsmooth"][0], study.LOWER) in study.tried(seen(results), "diffsmooth")
    results[study.name_of("many", lower, 0)] = {"score": 41}
    assert study.kept(seen(results), "grpo") == lower
    assert study.at_rates(seen(results), "grpo") == [lower, *settings], "so its frontier has four"
    assert study.longer(seen(results))["grpo"] == settings[0] + study.LONG
    assert study.longer(seen(results))["grpo, same rate"] == GRPO + study.LONG
    results[study.name_of("many", GRPO, 0)] = {"score": 42}
    assert study.tried(seen(results), "grpo") == settings, "the middle one was best"


@pytest.mark.parametrize("ours, grpo, verdict", [
    (0.5, 0.3, "shown"),
    (0.3, 0.5, "contradicted"),
    (0.4, 0.4, "not shown"),
    ([0.5, 0.5, 0.3], [0.3, 0.3, 0.31], "not shown"),  # the interval lies above 0, one seed below
    ((0.3, 0.9), (0.5, 0.5), "contradicted"),          # a trade: less at k = 1, more at k = 64
    ((0.4, 0.9), (0.4, 0.5), "shown"),                 # level at k = 1, more from k = 2 on
])
def test_verdict_at_every_k(ours, grpo, verdict):
    assert study_page.compare(both(ours, grpo), SMOOTH, GRPO)[0] == verdict


@pytest.mark.parametrize("second, verdict, score", [(0.5, "contradicted", "-10.0"), (0.2, "shown", "+10.0")])
def test_of_several_rivals_the_best_counts(second, verdict, score):
    """Ours has 40 %, the first rival 30 %, the second 50 % or 20 %: in the score 10 points behind or ahead."""
    study_, other = both(0.4, 0.3), "--loss grpo --lr 2e-4"
    for seed in (4, 5, 6):
        study_.results[study.name_of("many", other, seed)] = line(*[second] * 4)
    found = study_page.compare(study_, SMOOTH, GRPO, other, want={"score": 1})
    assert found[0] == verdict and found[1].startswith(f"T 0.7: {score} [")


def test_only_seeds_that_both_have_are_compared():
    study_ = both([0.5, 0.5, 0.9], 0.3)
    del study_.results[study.name_of("many", GRPO, 6)]
    verdict, numbers = study_page.compare(study_, SMOOTH, GRPO)
    assert numbers.startswith("T 0.7: +20.0 [") and numbers.endswith("seeds 4, 5")
    for seed in (4, 5):
        del study_.results[study.name_of("many", GRPO, seed)]
    assert study_page.compare(study_, SMOOTH, GRPO) is None


def test_the_interval_is_that_of_eval():
    x = np.random.default_rng(1).normal(size=(2, 3, 50))           # (settings, seeds, problems)
    found = study_page.gain(study_page.lead, x)
    picks = np.random.default_rng(0).integers(0, 50, (2000, 50))
    by_eval = study.evaluation.interval((x[0] - x[1]).mean(0), picks)
    assert {key: getattr(found, key) for key in by_eval} == pytest.approx(by_eval)


def test_samples_for_the_same_pass_at_64():
    """Half of the problems have one right answer in 64: Pass@k is 100 k / 128, 12.5 at k = 16."""
    found = study_page.gain(study_page.samples_needed, np.stack([
        study.PASS[[[1] * 50 + [0] * 50]], np.full((1, 100, 64), 12.5)]))
    assert found.mean == 16 and found.low <= 16 <= found.high


def test_envelope_by_hand():
    """A curve from (40, 50) to (30, 70), (Pass@1, Pass@64): a Pass@64 of 60 goes with 35, one below
    50 with 40, one above 70 with nothing. A second curve through (38, 60) is higher there."""
    one, two = [[40, 50], [30, 70]], [[38, 60], [20, 65]]
    levels = np.array([[45.0], [60], [70], [71]])
    curves = np.array([one, two], dtype=float)[:, :, None]                  # (rates, T, R, 2)
    for curves, highest in ((curves[:1], [40, 35, 30, -np.inf]), (curves, [40, 38, 30, -np.inf])):
        assert study_page.envelope(curves, levels)[:, 0].tolist() == pytest.approx(highest)


def test_gain_over_the_frontier_by_hand():
    """GRPO from (40, 50) to (30, 70), ours from (42, 55) to (32, 75). From 50 to 55 ours has 42,
    GRPO 40 falling to 37.5; from 55 to 70 both fall by half a point a point, 4.5 apart. So +2 at
    the cold end, +4.5 at the hot one; 21 levels, a point apart: (2 + 2.5 .. 4 + 16 * 4.5) / 21."""
    grpo, ours = [[40, 50], [30, 70]], [[42, 55], [32, 75]]
    points = np.array([ours, grpo], dtype=float)[:, None]                   # (rates, R, T, 2)
    parts = {part: study_page.outside(points, 1, part)[0] for part in ("cold", "hot", "mean")}
    assert parts == pytest.approx({"cold": 2, "hot": 4.5, "mean": (15 + 16 * 4.5) / 21})


def test_a_colder_grpo_is_no_gain_over_its_frontier():
    """Ours at T 0.7 is GRPO at T 0.4: ahead at k = 1 at equal T, not at all over the frontier."""
    shares = [(0.5, 0.6), (0.4, 0.7), (0.3, 0.8), (0.2, 0.9)]
    results = {study.name_of("many", study.with_rate(flags, lr), seed): line(*curve)
               for flags, curve in ((SMOOTH, [shares[0], *shares[:3]]), (GRPO, shares))
               for lr in study.RATES for seed in (4, 5, 6)}
    verdict, numbers = study_page.compare_frontier(seen(results), "diffsmooth")
    assert verdict == "not shown" and "+0.0 [+0.0, +0.0] in the mean" in numbers
    del results[study.name_of("many", f"--loss grpo --lr {study.HALF}", 5)]
    assert study_page.compare_frontier(seen(results), "diffsmooth")[1].endswith("seeds 4, 6")
    for seed in (4, 5, 6):
        results.pop(study.name_of("many", study.with_rate(SMOOTH, study.TWICE), seed))
    assert study_page.compare_frontier(seen(results), "diffsmooth") is None, "ours at two rates, GRPO at three"


def test_the_page_copes_with_whatever_is_finished(monkeypatch, capsys):
    monkeypatch.setattr(study_page, "solutions", lambda task: np.array([1, 3]))
    study_page.print_page({}, ["many", "one"], [4])
    missing = "not yet measured on `many`, not yet measured on `one`"
    assert capsys.readouterr().out.count(missing) == 23
    results = both(0.5, 0.3).results
    results["many: base"] = line(*[(0.1, 0.9)] * 4) | {"path": [[0, [10, 16, 17, 18, 19, 20, 30]]]}
    results[study.name_of("many", GRPO, 0)] = {"commit": "abc", "seconds": 0, "score": 40.0}
    study_page.print_page(results, ["many", "one"], [4, 5, 6])
    page = capsys.readouterr().out
    assert "Pass@1 rises and Pass@64 falls: shown on `many`, not yet measured on `one`" in page
    assert f"both with lr {study.RATE}: shown on `many`" in page and "7.0 hours" in page
    assert "| diffsmooth | 3 | 50.0 ± 0.0 |" in page and "(40.0)" in page
    assert "| base | (15.00) |" in page, "half of Pass@1 = 10 and of the others' mean, 20"


def test_the_page_names_the_methods_that_are_not_tried_yet_and_only_these(monkeypatch, capsys):
    monkeypatch.setattr(study_page, "solutions", lambda task: np.array([1, 3]))
    all_tried = {study.name_of("many", study.with_rate(flags, lr), 0): {"commit": "abc", "seconds": 0, "score": 40.0}
                 for settings in study.METHODS.values() for flags in settings for lr in (study.LOWER, *study.RATES)}
    without = {name: line for name, line in all_tried.items() if name != study.name_of("many", GRPO, 0)}
    for results, named in ((all_tried, []), (without, ["grpo"])):
        study_page.print_page(results, ["many"], [4, 5, 6])
        assert re.findall(r"tried yet\*\* on `many`.*these: (.*)\.", capsys.readouterr().out) == named


def test_the_page_says_of_known_commits_that_they_compute_the_same(monkeypatch, capsys):
    monkeypatch.setattr(study_page, "solutions", lambda task: np.array([1, 3]))
    one, two = both(0.5, 0.3), sorted(study_page.ALIKE)[:2]
    for commits, said in ((two, True), (two[:1], False), ([*two, "abc"], False)):
        for i, each in enumerate(one.results.values()):
            each["commit"] = commits[i % len(commits)]
        study_page.print_page(one.results, ["many"], [4, 5, 6])
        assert ("compute the same" in capsys.readouterr().out) is said


def test_gamma_n_beside_gamma_p_is_judged_at_one_gamma_p():
    """The kept gamma_p is 0.4, with 50 %; 0.2 has 40 % alone and 45 % with gamma_n, which so adds 5."""
    beside, strongest = study.METHODS["both gammas"][1], study.METHODS["diffsmooth"][2]
    assert beside.startswith(study.DEFAULT.split(" --lr")[0]) and study.DEFAULT != strongest
    results = {study.name_of("many", flags, seed): line(*[share] * 4) for seed in (4, 5, 6)
               for flags, share in ((study.DEFAULT, 0.4), (beside, 0.45), (strongest, 0.5))}
    rates = [study.with_rate(strongest, lr) for lr in study.RATES]
    results |= {study.name_of("many", flags, 0): {"score": 40 + (flags == strongest)}
                for flags in study.METHODS["diffsmooth"] + rates}
    assert study.kept(seen(results), "diffsmooth") == strongest
    found = next(found for claim, found in study_page.claims(seen(results)) if "half is enough" in claim)
    assert found[0] == "contradicted" and found[1].startswith("T 0.7: -5.0 [")


def test_the_claims_on_longer_runs_are_each_about_the_runs_that_they_name():
    """In longer runs smoothing's Pass@k is 35 + k / 2: 35.5 at k = 1, and 40, what GRPO has at the same
    rate, at k = 10. At its own best rate GRPO has 30, the bonus 20, the penalty 25."""
    shares = {SMOOTH: (0.35, 0.67), GRPO: 0.4, f"--loss grpo --lr {study.HALF}": 0.3,
              study.METHODS["bonus"][1]: 0.2, study.METHODS["penalty"][1]: 0.25}
    results = {study.name_of("many", flags + study.LONG, seed): line(*[share] * 4)
               for flags, share in shares.items() for seed in (4, 5, 6)}
    rates = [*study.METHODS["grpo"], f"--loss grpo --lr {study.LOWER}"]
    results |= {study.name_of("many", flags, 0): {"score": 40 - i} for i, flags in enumerate(rates)}
    numbers = {claim: found[1] for claim, found in study_page.claims(seen(results)) if found}
    assert {claim.split("longer runs")[-1]: number.split(" [")[0] for claim, number in numbers.items()
            if "GRPO at every k in" in claim} == {"": "T 0.7: +5.5", ", both with one rate": "T 0.7: -4.5"}
    assert {claim.split()[0]: number.split(" [")[0] for claim, number in numbers.items()
            if "GRPO" not in claim} == {"Four": "T 0.7: k = 10", "Smoothing": "T 0.7: +10.5"}


def test_the_table_of_the_readme_is_the_study_s():
    """A row's flags are those of a setting of the study; its numbers, means over the seeds named."""
    text = (study.ROOT / "README.md").read_text().split("## Results")[1].split("## The paper's claims")[0]
    seeds = list(range(4, 4 + int(re.search(r"mean of (\d) seeds", text)[1])))
    found = study.Study(study.read(study.ROOT / "tests/bench/study.json"), "many", seeds)
    settings = {str(train.parse(flags.split())): flags for m in study.METHODS for flags in study.tried(found, m)}
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("|")]
    assert rows[0] == ["", "k = 1", "4", "16", "64"] and rows[-1][0] == "minus `grpo`"
    flags = {cell: settings[str(train.parse(f"--loss {cell[1:-1]}".split()))] for cell, *_ in rows[3:-1]}
    flags[rows[2][0]] = "base"
    for cell, *numbers in rows[2:-1]:
        has, x = study_page.passes(found, [flags[cell]], "0.7")
        assert has == seeds and numbers == [f"{x[..., k - 1].mean():.1f}" for k in (1, 4, 16, 64)]
    _, x = study_page.passes(found, [flags["`diffsmooth`"], flags["`grpo`"]], "0.7")
    assert rows[-1][1:] == [str(study_page.gain(study_page.lead, x[..., k - 1])) for k in (1, 4, 16, 64)]


PAGE = (study.ROOT / "tests/bench/study.md").read_text()
CLAIMS = (study.ROOT / "README.md").read_text().split("## The paper's claims")[1].split("\n## ")[0]


def test_the_page_is_printed_from_all_the_results():
    results = study.read(study.ROOT / "tests/bench/study.json")
    hours = sum(line["seconds"] for line in results.values()) / 3600
    assert f"So far:\n{len(results)} runs, {hours:.1f} hours of one core" in PAGE


def test_every_interval_of_the_readme_s_claims_is_on_the_page():
    intervals = re.findall(r"(-?[\d.]+)\s(\[[^]]+\])", CLAIMS)
    assert len(intervals) >= 5
    for number, interval in intervals:
        assert re.search(rf"[ +]{re.escape(f'{number} {interval}')}", PAGE), (number, interval)


@pytest.mark.parametrize("readme, page, verdict", [
    ("RL sharpens: shown.", "RL sharpens", "shown"),
    ("at one rate: shown at 1e-4 and 2e-4", "GRPO at every k, both with lr 1e-4:", "shown"),
    ("at one rate: shown at 1e-4 and 2e-4", "GRPO at every k, both with lr 2e-4:", "shown"),
    ("at 5e-5 a trade", "GRPO at every k, both with lr 5e-5:", "contradicted"),
    ("each at its best rate: shown here", "Smoothing has a higher score", "shown"),
    ("a trade by validation problems", "each with its best setting:", "contradicted"),
    ("In longer runs (2400 steps, 3 seeds): shown", "in the longer runs:", "shown"),
    ("In longer runs (2400 steps, 3 seeds): shown", "GRPO at every k in the longer runs, both", "shown"),
    ("shown, against bonus and penalty too", "penalty at every k in the longer runs:", "shown"),
    ("another rate or temperature: not shown", "outside GRPO's frontier", "not shown"),
    ("Four times fewer samples: contradicted", "samples: smoothing has", "contradicted"),
    ("better of bonus and penalty: contradicted", "and penalty at every k:", "contradicted"),
    ("with one: not shown", "the bonus is better than the penalty", "not shown"),
    ("Pass@k training, unlikeliness, CISPO: contradicted", "as good as passk", "contradicted"),
    ("Pass@k training, unlikeliness, CISPO: contradicted", "good as unlikeliness", "contradicted"),
    ("Pass@k training, unlikeliness, CISPO: contradicted", "as good as cispo", "contradicted"),
    ("both rise: contradicted", "Smoothing is at least as good as the base", "contradicted"),
    ("correct half of Eq. (6) does it: shown", "The positive half matters", "shown")])
def test_a_verdict_of_the_readme_is_the_page_s(readme, page, verdict):
    """README's bullets speak of `many`, and say a trade where one is part of the sentence."""
    assert readme in " ".join(CLAIMS.replace("**", "").split())
    heads = [line for line in PAGE.splitlines() if line.startswith("- **") and page in line]
    assert heads and all(f": {verdict} on `many`" in line for line in heads), heads


def test_the_readme_s_numbers_of_the_second_task():
    """Pass@1, Pass@64 of four; and what the default changes in GRPO's."""
    found = study.Study(study.read(study.ROOT / "tests/bench/study.json"), "one", [4, 5, 6, 7, 8])
    settings = ["base", *(study.kept(found, m) for m in ("passk", "grpo", "maxrl")), study.DEFAULT]
    seeds, x = study_page.passes(found, settings, "0.7")
    ends = x.mean((1, 2))[:, [0, -1]]                  # (settings, 2)
    base, *others = [f"{first:.1f}, {last:.1f}" for first, last in ends[:4]]
    less, more = (ends[4] - ends[2]) * [-1, 1]
    said = " ".join(CLAIMS.partition("**Mostly one solution")[2].split())
    assert seeds == found.seeds and f"gives {less:.1f} of Pass@1 for {more:.1f} of Pass@64" in said
    assert "the base ({}): {}; `grpo` {}; `maxrl` {}.".format(base, *others) in said


def test_a_run_is_measured_on_its_way_and_stays_the_same(monkeypatch, tmp_path):
    small = ("--loss entropy --entropy_coef 0.1 --steps 2 --prompts 2 --group-size 2 "
             "--warm-steps 1 --max-new-tokens 4 --save-every 1")
    before = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
    weights = []
    for path in ((1, 2), ()):
        with monkeypatch.context() as patch:
            patch.setattr(study, "PROBLEMS", 2)
            patch.setattr(study, "PATH", path)
            patch.setattr(study, "TEMPERATURES", ["0.7"])
            patch.setattr(train, "save_checkpoint", train.save_checkpoint)  # what is put back
            name = f"many: {small} --show-every {1 + len(path)}, seed 4"
            assert study.run_one(tmp_path, name) == 0
        place = study.place_of(tmp_path, name)
        made = study.read(place.with_name(place.name + ".json"))
        assert [step for step, _ in made["path"]] == list(path)
        assert len(made["test"]["0.7"]["c"]) == 2
        weights.append((place / "model" / "model.safetensors").read_bytes())
    for sign, handler in before.items():
        signal.signal(sign, handler)
    assert weights[0] == weights[1]
    assert weights[0] != (tmp_path / "many/base/model/model.safetensors").read_bytes()
