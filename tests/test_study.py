"""The study: its conclusions from invented runs, so that every number can be worked out by hand;
and a real run of two steps, which must not change because it is measured on the way.

Bugs killed here: seeds pooled that only one of two methods has, a verdict from the interval alone,
a setting chosen by large k, a trade called a gain, Pass@1 compared at unequal Pass@64, one base
taken for all bases, a run from a base that the study does not know, a measurement that changes the
run, a README that no longer says what the results say.
"""
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from policy import UserError

sys.path.insert(0, str(Path(__file__).parent / "bench"))
import study                                           # noqa: E402
import study_page                                      # noqa: E402

GRPO = f"--loss grpo --lr {study.RATE}"
SLOW_GRPO = f"--loss grpo --lr {study.HALF}"
SMOOTH = f"--loss diffsmooth --gamma_p 0.2 --lr {study.RATE}"


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


def test_the_weighted_mean_counts_pass_at_1_as_much_as_all_others():
    """One of two problems always solved, the other one time in 64: its Pass@k is k / 64, so Pass@1
    is 50.78125 and the mean of Pass@2 .. 64 is 50 + 50 * (126 / 64) / 6 = 66.40625."""
    curve = study.PASS[[64, 1]].mean(0)
    assert curve @ study.COLUMNS[study.WEIGHTED] == pytest.approx((50.78125 + 66.40625) / 2)


def test_the_defaults_are_those_of_train_py():
    args = train.parse([])
    assert float(study.RATE) == args.lr == 2 * float(study.HALF) == float(study.TWICE) / 2
    assert float(study.METHODS["diffsmooth"][1].split()[3]) == args.gamma_p


def test_settings_are_kept_by_the_weighted_mean_and_smoothing_gets_the_rates_too():
    results = {study.name_of("many", flags, 0): {study.WEIGHTED: number}
               for flags, number in zip(study.METHODS["diffsmooth"], (41, 40, 43))}
    assert study.kept(seen({}), "diffsmooth") == SMOOTH, "before all are tried: the middle one"
    strongest = "--loss diffsmooth --gamma_p 0.4 --lr "
    both_rates = [strongest + study.HALF, strongest + study.TWICE]
    assert study.tried(seen(results), "diffsmooth")[3:] == both_rates
    assert study.kept(seen(results), "diffsmooth") == SMOOTH, "two rates are still to be tried"
    results[study.name_of("many", strongest + study.HALF, 0)] = {study.WEIGHTED: 44}
    results[study.name_of("many", strongest + study.TWICE, 0)] = {study.WEIGHTED: 20}
    assert study.kept(seen(results), "diffsmooth") == strongest + study.HALF
    assert study.at_rates(seen(results), "diffsmooth") == [strongest + lr for lr in study.RATES]
    names = study.wanted(seen(results), ["diffsmooth", "grpo"])
    assert study.name_of("many", strongest + study.HALF, 4) in names
    assert study.name_of("many", strongest + study.HALF + " --steps 2400", 6) in names
    assert study.name_of("many", SMOOTH, 4) in names, "the default, though not kept"
    assert study.name_of("many", GRPO, 4) not in names, "grpo is not tuned yet"
    assert {study.name_of("many", flags, base + 4, base) for base in study.BASES
            for flags in (SMOOTH, GRPO, SLOW_GRPO)} < {*names}, "the headline on further bases"
    assert names[0] == "many: base"


def test_where_the_lowest_rate_is_best_a_lower_one_is_tried_by_smoothing_too():
    settings, smoothing = study.METHODS["grpo"], study.METHODS["diffsmooth"]
    results = {study.name_of("many", flags, 0): {study.WEIGHTED: 40 - i}
               for i, flags in enumerate(settings)}
    results |= {study.name_of("many", flags, 0): {study.WEIGHTED: 40} for flags in smoothing}
    lower = f"--loss grpo --lr {study.LOWER}"
    assert study.tried(seen(results), "grpo") == [lower, *settings]
    assert study.kept(seen(results), "grpo") == GRPO, "the lower one is still to be tried"
    slowest = study.with_rate(smoothing[0], study.LOWER)
    assert slowest in study.tried(seen(results), "diffsmooth")
    results[study.name_of("many", lower, 0)] = {study.WEIGHTED: 41}
    assert study.kept(seen(results), "grpo") == lower
    assert study.at_rates(seen(results), "grpo") == [lower, *settings], "so its frontier has four"
    assert study.longer(seen(results))["grpo"] == settings[0] + study.LONG
    assert study.longer(seen(results))["grpo, same rate"] == GRPO + study.LONG
    results[study.name_of("many", GRPO, 0)] = {study.WEIGHTED: 42}
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


@pytest.mark.parametrize("second, verdict, number",
                         [(0.5, "contradicted", "-10.0"), (0.2, "shown", "+10.0")])
def test_of_several_rivals_the_best_counts(second, verdict, number):
    """Ours has 40 %, the first rival 30 %, the second 50 % or 20 %: 10 points behind or ahead."""
    study_, other = both(0.4, 0.3), "--loss grpo --lr 2e-4"
    for seed in (4, 5, 6):
        study_.results[study.name_of("many", other, seed)] = line(*[second] * 4)
    found = study_page.compare(study_, SMOOTH, GRPO, other, want={study.WEIGHTED: 1})
    assert found[0] == verdict and found[1].startswith(f"T 0.7: {number} [")


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


def on_bases(gains):
    """On base b smoothing has always solved gains[b] of the 100 problems more than GRPO at 1e-4,
    which has solved 30; GRPO at 5e-5 has solved 20, the base 10. Base 0 has seeds 4, 5 and 6."""
    results = {}
    for base, more in enumerate(gains):
        results[study.base_name("many", base)] = line(*[0.1] * 4)
        for seed in (4, 5, 6) if base == 0 else (base + 4,):
            for flags, share in ((SMOOTH, 0.3 + more / 100), (GRPO, 0.3), (SLOW_GRPO, 0.2)):
                results[study.name_of("many", flags, seed, base)] = line(*[share] * 4)
    return study.Study(results, "many", [4, 5, 6, 7, 8])


def test_an_interval_over_bases_by_hand():
    """Gains 2, 4, 6 on three bases: mean 4, standard deviation 2. t(0.975) with 2 degrees of
    freedom is 4.303, so the bases give +- 4.303 * 2 / sqrt(3) = 4.968676. All problems gain alike:
    the bootstrap over them adds nothing."""
    x = np.zeros((2, 3, 50))
    x[0] = np.array([2, 4, 6])[:, None]
    found = study_page.gain_over_bases(study_page.lead, x)
    assert (found.mean, found.low, found.high) == pytest.approx((4, 4 - 4.968676, 4 + 4.968676))
    assert found.parts.tolist() == [2, 4, 6]


def test_an_interval_over_bases_has_the_problems_in_it_too():
    """Two bases with the same gain on every problem, so the t interval is 0 wide: what is left is
    the interval of eval.py over problems. And with both, half widths of 3 and 4 make one of 5."""
    gains = np.random.default_rng(1).normal(size=50)
    x = np.stack([np.stack([gains] * 2), np.zeros((2, 50))])
    found = study_page.gain_over_bases(study_page.lead, x)
    picks = np.random.default_rng(0).integers(0, 50, (2000, 50))
    by_eval = study.evaluation.interval(gains, picks)
    assert {key: getattr(found, key) for key in by_eval} == pytest.approx(by_eval)
    apart = (by_eval["mean"] - by_eval["low"]) * 4 / 3 * np.sqrt(2) / 12.706   # standard deviation
    x[0] += np.array([[1], [-1]]) * apart / np.sqrt(2)
    both = study_page.gain_over_bases(study_page.lead, x)
    assert both.mean - both.low == pytest.approx((by_eval["mean"] - by_eval["low"]) * 5 / 3)


@pytest.mark.parametrize("gains, verdict, at_k_1", [
    ([10, 11, 12], "shown", "+11.0"),
    ([-10, -11, -12], "contradicted", "-11.0"),
    ([10, 30, 1], "not shown", "+13.7"),               # every base above 0, the interval is not
    ([10, 11, 12, 10, -1], "not shown", "+8.4"),       # one base is below
])
def test_verdict_over_bases(gains, verdict, at_k_1):
    found = study_page.compare(on_bases(gains), SMOOTH, GRPO, over="bases")
    bases = ", ".join(map(str, range(len(gains))))
    assert found[0] == verdict and found[1].endswith(f"; bases {bases}")
    assert found[1].startswith(f"T 0.7: {at_k_1} [")


def test_over_bases_the_better_rate_is_chosen_on_each_base():
    """Smoothing minus the better rate: 10 and 12 against 1e-4; on base 1, 5e-5 has 40 %: 2."""
    found = on_bases([10, 12])
    found.results[study.name_of("many", SLOW_GRPO, 5, 1)] = line(*[0.4] * 4)
    gains = study_page.compare(found, SMOOTH, GRPO, SLOW_GRPO, over="bases")[1]
    assert gains.startswith("T 0.7: +6.0 [")


def test_one_base_is_not_several_and_a_base_without_all_settings_does_not_count():
    found = on_bases([10, 12, 14])
    del found.results[study.name_of("many", GRPO, 6, 2)]
    assert study_page.compare(found, SMOOTH, GRPO, over="bases")[1].endswith("bases 0, 1")
    assert study_page.compare(found, SMOOTH, SLOW_GRPO, over="bases")[1].endswith("bases 0, 1, 2")
    del found.results[study.name_of("many", GRPO, 5, 1)]
    assert study_page.compare(found, SMOOTH, GRPO, over="bases") is None
    assert study_page.compare(found, SMOOTH, GRPO)[1].startswith("T 0.7: +10.0"), "base 0 alone"


def test_each_claim_over_bases_is_about_the_runs_that_it_names():
    """Base 10 %, GRPO 30 % and 20 %, smoothing 42 % on average: +20 over the base is GRPO's."""
    numbers = [found[1].split(" [")[0] for claim, found in study_page.claims(on_bases([11, 13]))
               if found and claim.startswith("Over bases")]
    assert numbers == ["T 0.7: +20.0", *["T 0.7: +12.0"] * 3]


def test_the_page_lists_bases_and_what_smoothing_gains_on_each(monkeypatch, capsys):
    monkeypatch.setattr(study_page, "solutions", lambda task: np.array([1, 3]))
    found = on_bases([10, 12])
    made = {"seed": 1, "warm_steps": 500}
    found.results["many: base 1"] |= {"made": made, "weights": "0123456789abcdef" * 4}
    study_page.print_page(found.results, ["many"], found.seeds)
    page = capsys.readouterr().out
    assert "| `many: base 1` | seed 1; warm_steps 500 | 0123456789abcdef | 3 |" in page
    assert "| `many: base` |  | not recorded | 9 |" in page
    rows = page.split(f"{SMOOTH} minus {GRPO}**")[1].split("\n\n")[1].splitlines()[2:]
    assert [row[:10] for row in rows] == ["| 0 | +10.", "| 1 | +12.", "| mean | +"]
    assert rows[2].startswith("| mean | +11.0 [")


@pytest.mark.parametrize("name, run", [
    ("many: base", ("many", None, 0, None)),
    ("one: base 12", ("one", None, 12, None)),
    (f"many: {GRPO}, seed 5", ("many", GRPO, 0, "5")),
    (f"many: {GRPO}{study.LONG}, base 3, seed 7", ("many", GRPO + study.LONG, 3, "7")),
])
def test_a_name_says_what_the_run_is_and_where_it_starts(name, run):
    task, flags, base, seed = run
    assert study.parts_of(name) == run
    assert study.base_of(name) == f"{task}: base" + f" {base}" * (base > 0)
    if flags:
        assert study.name_of(task, flags, seed, base) == name
    for wrong in (name.replace("many", "few").replace("one", "two"), name + " and more"):
        with pytest.raises(UserError, match="names no run"):
            study.parts_of(wrong)


def test_samples_for_the_same_pass_at_64():
    """Half of the problems have one correct answer in 64: Pass@k is 100 k / 128, 12.5 at k = 16."""
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
    assert verdict == "not shown" and "+0.0 [+0.0, +0.0] on average" in numbers
    del results[study.name_of("many", f"--loss grpo --lr {study.HALF}", 5)]
    assert study_page.compare_frontier(seen(results), "diffsmooth")[1].endswith("seeds 4, 6")
    for seed in (4, 5, 6):
        results.pop(study.name_of("many", study.with_rate(SMOOTH, study.TWICE), seed))
    found = study_page.compare_frontier(seen(results), "diffsmooth")
    assert found is None, "ours at two rates, GRPO at three"


def test_the_page_copes_with_whatever_is_finished(monkeypatch, capsys):
    monkeypatch.setattr(study_page, "solutions", lambda task: np.array([1, 3]))
    study_page.print_page({}, ["many", "one"], [4])
    missing = "not yet measured on `many`, not yet measured on `one`"
    assert capsys.readouterr().out.count(missing) == 27
    results = both(0.5, 0.3).results
    results["many: base"] = line(*[(0.1, 0.9)] * 4) | {"path": [[0, [10, 16, 17, 18, 19, 20, 30]]]}
    tried = {"commit": "abc", "seconds": 0, study.WEIGHTED: 40.0}
    results[study.name_of("many", GRPO, 0)] = tried
    study_page.print_page(results, ["many", "one"], [4, 5, 6])
    page = capsys.readouterr().out
    assert "Pass@1 rises and Pass@64 falls: shown on `many`, not yet measured on `one`" in page
    assert f"both with lr {study.RATE}: shown on `many`" in page and "7.0 hours" in page
    assert "| diffsmooth | 3 | 50.0 ± 0.0 |" in page and "(40.0)" in page
    assert "| base | (15.00) |" in page, "half of Pass@1 = 10 and of the others' mean, 20"


def test_the_page_names_the_methods_that_are_not_tried_yet_and_only_these(monkeypatch, capsys):
    monkeypatch.setattr(study_page, "solutions", lambda task: np.array([1, 3]))
    all_tried = {study.name_of("many", study.with_rate(flags, lr), 0):
                 {"commit": "abc", "seconds": 0, study.WEIGHTED: 40.0}
                 for settings in study.METHODS.values() for flags in settings
                 for lr in (study.LOWER, *study.RATES)}
    without = dict(all_tried)
    del without[study.name_of("many", GRPO, 0)]
    for results, named in ((all_tried, []), (without, ["grpo"])):
        study_page.print_page(results, ["many"], [4, 5, 6])
        page = capsys.readouterr().out
        assert re.findall(r"tried yet\*\* on `many`.*these: (.*)\.", page) == named


def test_the_page_says_of_known_commits_that_they_compute_the_same(monkeypatch, capsys):
    monkeypatch.setattr(study_page, "solutions", lambda task: np.array([1, 3]))
    one, two = both(0.5, 0.3), sorted(study_page.ALIKE)[:2]
    for commits, said in ((two, True), (two[:1], False), ([*two, "abc"], False)):
        for i, each in enumerate(one.results.values()):
            each["commit"] = commits[i % len(commits)]
        study_page.print_page(one.results, ["many"], [4, 5, 6])
        assert ("compute the same" in capsys.readouterr().out) is said


def test_gamma_n_beside_gamma_p_is_judged_at_one_gamma_p():
    """The kept gamma_p is 0.4, with 50 %; 0.2 has 40 % alone, 45 % with gamma_n, which adds 5."""
    beside, strongest = study.METHODS["both gammas"][1], study.METHODS["diffsmooth"][2]
    assert beside.startswith(study.DEFAULT.split(" --lr")[0]) and study.DEFAULT != strongest
    results = {study.name_of("many", flags, seed): line(*[share] * 4) for seed in (4, 5, 6)
               for flags, share in ((study.DEFAULT, 0.4), (beside, 0.45), (strongest, 0.5))}
    rates = [study.with_rate(strongest, lr) for lr in study.RATES]
    results |= {study.name_of("many", flags, 0): {study.WEIGHTED: 40 + (flags == strongest)}
                for flags in study.METHODS["diffsmooth"] + rates}
    assert study.kept(seen(results), "diffsmooth") == strongest
    found = next(found for claim, found in study_page.claims(seen(results))
                 if "half is enough" in claim)
    assert found[0] == "contradicted" and found[1].startswith("T 0.7: -5.0 [")


def test_the_claims_on_longer_runs_are_each_about_the_runs_that_they_name():
    """In longer runs smoothing's Pass@k is 35 + k / 2: 35.5 at k = 1, and 40 at k = 10. GRPO has 40
    at the same rate and 30 at its own best rate, the bonus 20, the penalty 25."""
    shares = {SMOOTH: (0.35, 0.67), GRPO: 0.4, SLOW_GRPO: 0.3,
              study.METHODS["bonus"][1]: 0.2, study.METHODS["penalty"][1]: 0.25}
    results = {study.name_of("many", flags + study.LONG, seed): line(*[share] * 4)
               for flags, share in shares.items() for seed in (4, 5, 6)}
    rates = [*study.METHODS["grpo"], f"--loss grpo --lr {study.LOWER}"]
    results |= {study.name_of("many", flags, 0): {study.WEIGHTED: 40 - i}
                for i, flags in enumerate(rates)}
    numbers = {claim: found[1].split(" [")[0]
               for claim, found in study_page.claims(seen(results)) if found}
    assert {claim.split("longer runs")[-1]: number for claim, number in numbers.items()
            if "GRPO at every k in" in claim} == {
        "": "T 0.7: +5.5", ", both with one rate": "T 0.7: -4.5"}
    assert {claim.split()[0]: number for claim, number in numbers.items()
            if "GRPO" not in claim} == {"Four": "T 0.7: k = 10", "Smoothing": "T 0.7: +10.5"}


RESULTS = study.read(study.ROOT / "tests/bench/study.json")
PAGE = (study.ROOT / "tests/bench/study.md").read_text()
README = (study.ROOT / "README.md").read_text()
SEEDS = [4, 5, 6, 7, 8]


def rows_below(head):
    """The rows of README's table with these headings, as lists of cells."""
    text = README.partition(study_page.row_of(head) + "\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()[1:]]


def test_readme_s_rows_are_worked_out_by_hand():
    """GRPO's best rate on validation is 5e-5: of its 100 problems it has solved 20, at the default
    rate 30; smoothing, 40 with both. Over two bases, gains 10 and 12 over the default rate."""
    found = on_bases([10, 12])
    for flags in study.METHODS["diffsmooth"] + study.METHODS["grpo"]:
        number = 40 + (flags in (SMOOTH, SLOW_GRPO))
        for lr in (study.LOWER, flags.split()[-1]):
            found.results.setdefault(study.name_of("many", study.with_rate(flags, lr), 0),
                                     {study.WEIGHTED: number - (lr == study.LOWER)})
    assert study.kept(found, "grpo") == SLOW_GRPO
    rows = [[name, rule, str(number).split(" [")[0]]
            for name, rule, number, *_ in study_page.readme_results(found)]
    assert rows == [["base", "", "10.0"], ["`grpo --lr 5e-5`", "validation", "20.0"],
                    ["`diffsmooth`", "validation and default", "40.0"],
                    ["`grpo`", "default", "30.0"],
                    ["`diffsmooth` minus `grpo --lr 5e-5`", "validation", "+20.0"],
                    ["`diffsmooth` minus `grpo`", "default", "+10.0"],
                    ["`diffsmooth` minus `grpo`", "default, 2 bases", "+11.0"]]


def test_the_results_table_of_the_readme_is_the_study_s():
    """Every row: the setting, the rule that chose it, the numbers."""
    many = study.Study(RESULTS, "many", SEEDS)
    rows = [[str(cell) for cell in row] for row in study_page.readme_results(many)]
    assert rows_below(study_page.RESULTS_HEAD) == rows


REQUIRED = ("RL sharpens", "GRPO at every k, both with lr 1e-4", "GRPO at every k, each with",
            "at the best of GRPO's rates", "outside GRPO's frontier", "Four times fewer samples:",
            "bonus and penalty at every k", "good as the base", "The positive half matters",
            "Over bases, smoothing is")


def test_the_claims_of_the_readme_are_the_study_s_word_for_word():
    studies = [study.Study(RESULTS, task, SEEDS) for task in study.TASKS]
    known = {row[0]: row for row in study_page.readme_claims(*studies)}
    rows = rows_below(study_page.CLAIMS_HEAD)
    for row in rows:
        assert row == known[row[0]]
        assert f"- **{row[0]}: {row[1]}.**" in PAGE.splitlines()
    for part in REQUIRED:
        assert any(part in claim for claim, *_ in rows), f"README does not tell: {part}"


def test_every_interval_of_the_readme_s_results_is_on_the_page():
    text = README.partition("\n## Results")[2].partition("\n## A real model")[0]
    intervals = re.findall(r"([+-]?[\d.]+)\s(\[[^]]+\])", text)
    assert len(intervals) >= 15
    for number, interval in intervals:
        assert re.search(rf"[ +]{re.escape(f'{number} {interval}')}", PAGE), (number, interval)


def test_the_page_is_printed_from_all_the_results(capsys):
    """Word for word; a number may differ in its last digit, where a sum was rounded otherwise."""
    study_page.print_page(RESULTS, list(study.TASKS), SEEDS)
    printed, number = capsys.readouterr().out, r"[+-]?\d+(?:\.\d+)?"
    assert re.sub(number, "#", printed) == re.sub(number, "#", PAGE)
    new, old = ([float(x) for x in re.findall(number, text)] for text in (printed, PAGE))
    assert new == pytest.approx(old, rel=0, abs=0.11)


def test_every_line_stands_on_a_recorded_base():
    """A base's number is the seed that made it; a run on another base than 0 has another seed; a
    run that noted the weights it started from noted those recorded."""
    for name, one in RESULTS.items():
        run, base = study.parts_of(name), RESULTS[study.base_of(name)]
        assert base["made"]["seed"] == run.base and base["made"]["warm_steps"] == 500
        assert one.get("base", base["weights"]) == base["weights"]
        assert run.flags is None or run.base == 0 or int(run.seed) != run.base
    kinds = {"many": ([4], 9, [1, 60]), "one": ([3], 20, [1, 60])}
    for task, made in kinds.items():
        base = RESULTS[study.base_name(task)]["made"]
        assert (base["counts"], base["high"], base["targets"]) == made
    weights = [one["weights"] for one in RESULTS.values() if "weights" in one]
    assert len({*weights}) == len(weights) >= 3, "no two bases are one"


SMALL = ("--loss entropy --entropy_coef 0.1 --steps 2 --prompts 2 --group-size 2 "
         "--max-new-tokens 4 --save-every 1")


@pytest.fixture
def small(monkeypatch):
    """A study of two problems whose bases take one step; the handlers of signals as before."""
    before = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(study, "PROBLEMS", 2)
    monkeypatch.setattr(study, "TEMPERATURES", ["0.7"])
    monkeypatch.setitem(study.TASKS, "many", "--warm-steps 1 --max-new-tokens 4")
    yield monkeypatch
    for sign, handler in before.items():
        signal.signal(sign, handler)


def test_a_run_is_measured_on_its_way_and_stays_the_same(small, tmp_path):
    weights = []
    assert study.run_one(tmp_path, "many: base", {}) == 0
    for path in ((1, 2), ()):
        with small.context() as patch:
            patch.setattr(study, "PATH", path)
            patch.setattr(train, "save_checkpoint", train.save_checkpoint)  # what is put back
            name = f"many: {SMALL} --show-every {1 + len(path)}, seed 4"
            assert study.run_one(tmp_path, name, {}) == 0
        place = study.place_of(tmp_path, name)
        made = study.read(place.with_name(place.name + ".json"))
        assert [step for step, _ in made["path"]] == list(path)
        assert len(made["test"]["0.7"]["c"]) == 2
        weights.append((place / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    base = study.read(tmp_path / "many/base.json")
    assert weights[0] != (tmp_path / "many/base/model/model.safetensors").read_bytes()
    assert made["base"] == base["weights"] and base["made"]["seed"] == 0
    assert base["made"]["warm_steps"] == 1


def test_without_its_base_a_run_is_refused_and_makes_none(tmp_path):
    name = f"many: {GRPO}, seed 7"
    found = subprocess.run([sys.executable, study.__file__, "--out", str(tmp_path), "--run", name],
                           capture_output=True, text=True)
    assert found.returncode == 1 and len(found.stderr.splitlines()) == 1
    assert 'make it with python tests/bench/study.py --run "many: base".' in found.stderr
    assert not (tmp_path / "many").exists()


def flip_last_weight(place):
    from safetensors.torch import load_file, save_file
    file = place / "model" / "model.safetensors"
    weights = load_file(file)
    last = weights[sorted(weights)[-1]]
    last.view(-1)[-1] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})


def test_a_run_is_refused_unless_its_base_is_the_recorded_one(small, tmp_path):
    name, base = f"many: {SMALL}, base 2, seed 6", "many: base 2"
    assert study.run_one(tmp_path, base, {}) == 0
    place = study.place_of(tmp_path, base)
    recorded = study.read(place.with_name("base_2.json"))
    assert recorded["made"]["seed"] == 2
    assert study.check_base(tmp_path, base, {base: recorded}) == recorded["weights"]
    assert study.check_base(tmp_path, base, {}) == recorded["weights"], "its own line will do"
    with small.context() as patch:
        patch.setattr(train, "save_checkpoint", train.save_checkpoint)  # what is put back
        assert study.run_one(tmp_path, name, {base: recorded}) == 0
    assert study.read(study.place_of(tmp_path, name) / "flags.json")["base"] == "base_2"
    assert not (tmp_path / "many" / "base").exists(), "train.py would have made base 0"

    flags = (place / "flags.json").read_text()
    for key, value in (("seed", 7), ("warm_steps", 2), ("high", 10)):
        (place / "flags.json").write_text(json.dumps(json.loads(flags) | {key: value}))
        with pytest.raises(UserError, match=f"made with {key} {value}, .* with"):
            study.run_one(tmp_path, name, {base: recorded})
    (place / "flags.json").write_text(flags)

    other = {base: recorded | {"weights": "0" * 64}}
    for run in (name, base):                           # making it again is no way round it
        with pytest.raises(UserError, match="has other weights"):
            study.run_one(tmp_path, run, other)
    flip_last_weight(place)
    for results in ({base: recorded}, {}):
        with pytest.raises(UserError, match="has other weights"):
            study.run_one(tmp_path, name, results)


def test_bases_come_first_and_stay_as_recorded(monkeypatch, tmp_path):
    """The lists of runs that are made together. Base 3 fails, so nothing that starts from it is
    tried; base 0 is recorded already, its folder is missing: it is made again, its line stays."""
    made = []

    def run_apart(args, name):
        made.append(name)
        if name != "many: base 3":
            (study.place_of(args.out, name) / "model").mkdir(parents=True)
            return name, {"commit": "abc", "seconds": 0, study.WEIGHTED: 40.0}
        return name, None

    monkeypatch.setattr(study, "run_apart", run_apart)
    args = type("Args", (), dict(out=tmp_path, results=tmp_path / "study.json", tasks=["many"],
                                 seeds=[4], methods=["grpo"]))
    results = {"many: base": {"weights": "recorded"}}
    assert study.run_all(args, results) == {"many: base 3"}
    assert made[:5] == ["many: base", *(f"many: base {base}" for base in study.BASES)]
    assert len(made) == len({*made}) and not any(", base 3" in name for name in made)
    assert study.name_of("many", GRPO, 8, 4) in made and study.name_of("many", GRPO, 4) in made
    assert results["many: base"] == {"weights": "recorded"}
    assert {*study.read(args.results)} == {*made} - {"many: base 3"}
