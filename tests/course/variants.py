"""Wrong solutions, made of the right ones in solved/: none of them may earn full marks.

    python tests/course/variants.py                # all of them: what each loses first
    python tests/course/variants.py 6 7            # those of two exercises
    python tests/course/variants.py 6 --search     # and every small change that a program can make

WRONG holds mistakes that people make, as edits of the solved file. `changes` makes the small ones
systematically: a condition dropped, a bound or sign swapped, a statement left out, a number off by
one. Those that change nothing a caller could see are named in HARMLESS, with the reason.
"""
import ast
import concurrent.futures
import copy
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]


def solved(number):
    return (HERE / "solved" / f"ex{number}.py").read_text()


def edited(source, edits):
    """The source with (old, new) pairs put in; each old text stands there once."""
    for old, new in zip(edits[::2], edits[1::2]):
        if source.count(old) != 1:
            raise SystemExit(f"variants.py: this must stand once in the solved file, and stands "
                             f"{source.count(old)} times:\n{old}")
        source = source.replace(old, new)
    return source


LIMIT = 'if len(text) > 400 or any(c not in "0123456789+-*/() \\t\\r\\n" for c in text):'
ZERO = 'if a is None or b is None or (op == "/" and b == 0):'
BLANKS = 'if c in " \\t\\r\\n":'
USED = """    left = list(numbers)
    for n in used:
        if n not in left:
            return 0.0
        left.remove(n)
    if left:
        return 0.0
"""
EXACT = "return 1.0 if Fraction(node[0], node[1]) == target else 0.0"
REWARD = """    answer = answer_of(text, style)
    node = parse(answer)
"""
NO_VALUE = """        if not after_value:
                return None
            while ops and"""
SIGN = '            if not after_value:\n                return None\n            while ops and ops[-1]'
EVAL = """    answer = answer_of(text, style)
    try:
        value = eval(answer)
    except Exception:
        return 0.0
    import re
    used = [int(w) for w in re.findall("[0-9]+", answer)]
    return float(sorted(used) == sorted(numbers) and value == target)
"""

WRONG = {1: [
    ("a number used more often than it is given", USED, "    if set(used) != set(numbers) or len(used) != len(numbers):\n        return 0.0\n"),
    ("numbers as sets", USED, "    if set(used) != set(numbers):\n        return 0.0\n"),
    ("only the count of the numbers", USED, "    if len(used) != len(numbers):\n        return 0.0\n"),
    ("numbers used again", "        left.remove(n)\n    if left:\n        return 0.0\n", "        pass\n"),
    ("numbers left over", "    if left:\n        return 0.0\n", ""),
    ("the sum of the numbers", USED, "    if sum(used) != sum(numbers):\n        return 0.0\n"),
    ("the sum and the count of the numbers", USED, "    if sum(used) != sum(numbers) or len(used) != len(numbers):\n        return 0.0\n"),
    ("numbers in the order of the prompt", USED, "    if used != list(numbers):\n        return 0.0\n"),
    ("numbers not looked at", USED, ""),
    ("a sign behind an open bracket", SIGN, '            if not after_value and (c not in "+-" or not ops or ops[-1] != "("):\n                return None\n            if not after_value:\n                i += 1\n                continue\n            while ops and ops[-1]'),
    ("a sign at the start", SIGN, '            if not after_value and (c not in "+-" or ops or values):\n                return None\n            if not after_value:\n                i += 1\n                continue\n            while ops and ops[-1]'),
    ("a minus sign as 0 -", SIGN, '            if not after_value and c == "-" and (not ops or ops[-1] == "("):\n                values.append((Fraction(0), 0))\n            elif not after_value:\n                return None\n            while ops and ops[-1]'),
    ("a plus sign skipped", SIGN, '            if not after_value and c == "+":\n                i += 1\n                continue\n            if not after_value:\n                return None\n            while ops and ops[-1]'),
    ("a tolerance of 1e-6", EXACT, "return 1.0 if abs(node[0] / node[1] - float(target)) < 1e-6 else 0.0"),
    ("a tolerance of 1e-9", EXACT, "return 1.0 if abs(node[0] / node[1] - float(target)) < 1e-9 else 0.0"),
    ("a tolerance of 1e-15, exact", EXACT, "return 1.0 if abs(Fraction(node[0], node[1]) - target) < Fraction(1, 10 ** 15) else 0.0"),
    ("floats", EXACT, "return 1.0 if node[0] / node[1] == target else 0.0"),
    ("floats on both sides", EXACT, "return 1.0 if float(Fraction(node[0], node[1])) == float(target) else 0.0"),
    ("rounded", EXACT, "return 1.0 if round(Fraction(node[0], node[1])) == target else 0.0"),
    ("the rest of a division dropped", EXACT, "return 1.0 if node[0] // node[1] == target else 0.0"),
    ("the absolute value", EXACT, "return 1.0 if abs(Fraction(node[0], node[1])) == abs(target) else 0.0"),
    ("the target as an integer", EXACT, "return 1.0 if Fraction(node[0], node[1]) == int(target) else 0.0"),
    ("the value not looked at", EXACT, "return 1.0"),
    ("a bool", EXACT, "return Fraction(node[0], node[1]) == target"),
    ("an int", EXACT, "return int(Fraction(node[0], node[1]) == target)"),
    ("0/0 meets a target of 0", "if node is None or node[1] == 0:", "if node is None:", EXACT, "return 1.0 if node[0] == target * node[1] else 0.0"),
    ("blanks: the plain one alone", BLANKS, 'if c == " ":'),
    ("blanks: no carriage return", BLANKS, 'if c in " \\t\\n":'),
    ("blanks: whatever isspace", LIMIT, "if len(text) > 400:", BLANKS, "if c.isspace():", '        elif c in "0123456789":', '        elif c not in "0123456789+-*/()":\n            return None\n        elif c in "0123456789":'),
    ("stripped first, so longer ones pass", LIMIT, "text = text.strip()\n    " + LIMIT),
    ("blanks taken out: 1 2 is 12", LIMIT, LIMIT[:-1] + ":\n        return None\n    text = ''.join(text.split())\n    if False:"),
    ("no limit of length", LIMIT, LIMIT.replace("len(text) > 400 or ", "")),
    ("399 characters", LIMIT, LIMIT.replace("> 400", "> 399")),
    ("401 characters", LIMIT, LIMIT.replace("> 400", "> 401")),
    ("200 characters", LIMIT, LIMIT.replace("> 400", "> 200")),
    ("no limit of depth", "if after_value or depth > 30:", "if after_value:"),
    ("29 brackets", "depth > 30", "depth > 29"), ("31 brackets", "depth > 30", "depth > 31"),
    ("all brackets counted, not nested ones", "            depth -= 1\n", "", "depth == 0:\n                return None\n            while ops[-1]", "'(' not in ops:\n                return None\n            while ops[-1]", "depth != 0", "'(' in ops"),
    ("leading zeros", "            if c == \"0\" and j - i > 1:\n                return None\n", ""),
    ("zero refused", 'if c == "0" and j - i > 1:', 'if c == "0":'),
    ("two numbers side by side", "            if after_value:\n                return None\n            j = i", "            j = i"),
    ("a product without its sign", "if after_value or depth > 30:", "if depth > 30:"),
    ("a bracket that stays open", "if not after_value or depth != 0:\n        return None\n    while ops:\n", "if not after_value:\n        return None\n    while ops:\n        if ops[-1] == '(':\n            ops.pop()\n            continue\n"),
    ("a bracket too many", "            if not after_value or depth == 0:\n                return None\n", "            if depth == 0:\n                i += 1\n                continue\n            if not after_value:\n                return None\n"),
    ("empty brackets", "if not after_value or depth == 0:", "if depth == 0:"),
    ("grouped from the right", ">= BINDS[c]", "> BINDS[c]"),
    ("no precedence", "BINDS[ops[-1]] >= BINDS[c]", "True"),
    ("1/0 refused", "return (0, 0, tree) if value is None else", "return None if value is None else"),
    ("1/(1/0) is 0", "if a is None or b is None or (", "if b is None and op == '/':\n            value = Fraction(0)\n        elif a is None or b is None or ("),
    ("1/0 is 0", ZERO, "if op == '/' and b == 0:\n            value = Fraction(0)\n        elif a is None or b is None:"),
    ("digits of every script", LIMIT, "if len(text) > 400 or any(not (c.isdigit() or c in '+-*/() \\t\\r\\n') for c in text):", '        elif c in "0123456789":', "        elif c.isdecimal():", 'text[j] in "0123456789":', "text[j].isdecimal():", 'c if c in "0123456789" else', "c if c.isdecimal() else"),
    ("an unknown style passes", "    check_style(style)\n", ""),
    ("the style is ignored", "answer_of(text, style)", 'answer_of(text, "bare")'),
    ("bare eval", REWARD, EVAL + REWARD),
    ("eval of Fractions, any Python", REWARD, EVAL.replace("eval(answer)", "eval(re.sub('([0-9]+)', r'Fraction(\\1)', answer))").replace("    try:", "    import re\n    try:").replace("    import re\n    used", "    used") + REWARD),
    ("eval, within allowed characters", REWARD, EVAL.replace("    try:", "    if set(answer) - set('0123456789+-*/() '):\n        return 0.0\n    try:") + REWARD),
    ("floats in parse", "values.append((Fraction(int(text[i:j])), int(text[i:j])))", "values.append((Fraction(int(text[i:j])), int(text[i:j])))", "value = a / b", "value = Fraction(float(a) / float(b))"),
    ("the tree of the operators swapped", "(op, x, y)", "(op, y, x)"),
    ("no tree", "return (0, 0, tree) if value is None else (value.numerator, value.denominator, tree)", "return (0, 0, None) if value is None else (value.numerator, value.denominator, None)"),
    ("numbers of the tree as text", "int(text[i:j])))", "text[i:j]))"),
    ("small numbers only", "j = i\n", "j = i\n            if len(text) > i + 20 and text[i:i + 20].isdigit():\n                return None\n"),
    ("words behind the answer", LIMIT, LIMIT.replace("if len", "text = text.split('=')[0]\n    if len")),
    ("the last line alone", LIMIT, LIMIT.replace("if len", "text = text.strip().split('\\n')[-1]\n    if len")),
], 2: [
    ("the plug-in", "    if n - c < k:\n", "    return 1 - (1 - c / n) ** k\n    if n - c < k:\n"),
    ("the plug-in for large n", "    if n - c < k:\n", "    if n > 60:\n        return 1 - (1 - c / n) ** k\n    if n - c < k:\n"),
    ("the plug-in for large k", "    if n - c < k:\n", "    if k > 12:\n        return 1 - (1 - c / n) ** k\n    if n - c < k:\n"),
    ("c / n", "    if n - c < k:\n", "    return c / n\n    if n - c < k:\n"),
    ("k c / n", "    if n - c < k:\n", "    return min(1.0, k * c / n)\n    if n - c < k:\n"),
    ("c > 0", "    if n - c < k:\n", "    return float(c > 0)\n    if n - c < k:\n"),
    ("all k correct", "Fraction(n - c - i, n - i)", "Fraction(max(0, c - i), n - i)", "float(1 - miss)", "float(miss)", "    if n - c < k:\n        return 1.0\n", ""),
    ("none correct", "float(1 - miss)", "float(miss)", "return 1.0", "return 0.0"),
    ("with replacement", "Fraction(n - c - i, n - i)", "Fraction(n - c, n)"),
    ("the denominator stays", "Fraction(n - c - i, n - i)", "Fraction(n - c - i, n)"),
    ("the numerator stays", "Fraction(n - c - i, n - i)", "Fraction(n - c, n - i)"),
    ("one factor too few", "range(k)", "range(k - 1)"), ("one factor too many", "range(k)", "range(min(k + 1, n))"),
    ("from 1", "range(k)", "range(1, k)"), ("n + 1", "n - i)", "n + 1 - i)"), ("c + 1", "n - c - i", "n - c - 1 - i"),
    ("1 too early", "if n - c < k:", "if n - c <= k:"), ("c for n - c", "n - c - i", "c - i"),
    ("k above n passes", "if k < 1 or k > n:", "if k < 1:\n        raise ValueError\n    if k > n:\n        return float(c > 0)\n    if False:"),
    ("k above n passes, as n", "if k < 1 or k > n:", "k = min(k, n)\n    if k < 1:"),
    ("k above n passes where all are right", "if k < 1 or k > n:", "if c == n and n:\n        return 1.0\n    if k < 1 or k > n:"),
    ("k above n passes where none is right", "if k < 1 or k > n:", "if c == 0 and n and k > 0:\n        return 0.0\n    if k < 1 or k > n:"),
    ("k of 0 passes", "k < 1", "k < 0"), ("k of 0 is 0", "if k < 1 or", "if k == 0:\n        return 0.0\n    if k < 1 or"),
    ("negative k passes", "if k < 1 or k > n:", "if k > n or k == 0:"),
    ("k of n refused", "k > n", "k >= n"), ("k of 1 refused", "k < 1", "k <= 1"),
    ("c of 0 refused", "c < 0", "c <= 0"), ("c of n refused", "c > n", "c >= n"),
    ("negative c passes", "c < 0 or ", ""), ("c above n passes", " or c > n", ""),
    ("an assert", '        raise ValueError("k of n")', "        assert False"),
    ("None for what cannot be", '        raise ValueError("k of n")', "        return None"),
    ("NaN for what cannot be", '        raise ValueError("c correct of n")', "        return float('nan')"),
    ("TypeError", 'raise ValueError("c correct of n")', 'raise TypeError("c")'),
    ("percent", "float(1 - miss)", "100 * float(1 - miss)"), ("rounded", "float(1 - miss)", "round(float(1 - miss), 4)"),
    ("rounded to 6", "float(1 - miss)", "round(float(1 - miss), 6)"),
    ("floats that overflow", "    if n - c < k:\n", "    import math\n    if n > 200:\n        return 1 - float(math.comb(n - c, k)) / float(math.comb(n, k))\n    if n - c < k:\n"),
    ("factorials in floats", "    if n - c < k:\n", "    import math\n    f = lambda m: math.gamma(m + 1.0)\n    if n - c >= k:\n        return 1 - f(n - c) * f(n - k) / f(n - c - k) / f(n)\n    if n - c < k:\n"),
    ("pairs alone", "    if n - c < k:\n", "    if k == 3:\n        k = 2\n    if n - c < k:\n"),
    ("the harmonic mean", "float(1 - miss)", "float((1 - miss) * Fraction(n, n + 1))"),
    ("a sample drawn", "    if n - c < k:\n", "    import random\n    if n > 12:\n        return sum(min(random.sample(range(n), k)) < c for _ in range(2000)) / 2000\n    if n - c < k:\n"),
]}

GROUP = "        r = rewards[start:start + group_size]\n"
STD = "        std = (centred ** 2).mean().sqrt()\n"
A = "out.append(centred / (std + 1e-6))"
EQUAL = "        if (r == r[0]).all():\n            out.append(torch.zeros_like(r))\n            continue\n"
HIGH = "    loss = torch.where(too_high, -high * advantages, loss)\n"
LOW = "    loss = torch.where(too_low, -low * advantages, loss)\n"
RATIO = "    ratio = torch.exp(batch.logp - batch.old_logp)\n"
PREPARE_3 = """    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    advantages = group"""
PREPARE_R = """    batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp)
    gain"""
GRPO_A = "advantages = group_advantages(batch.rewards, group_size)"
KL = "losses = losses + beta * kl(batch.logp, batch.ref_logp)"
CONST = '    if agg == "seq_const":\n        if max_len is None:\n            raise ValueError("seq_const needs max_len")\n        return losses.sum() / (answers * max_len)\n'
SEQ = "(losses / n.clamp(min=1)[:, None]).sum() / answers"
BLANK = "losses = torch.where(mask, token_loss, torch.zeros((), dtype=token_loss.dtype))"

WRONG[3] = [
    ("std with ddof 1", STD, "        std = r.std()\n"), ("ddof 1 for large groups", STD, "        std = r.std(correction=int(group_size > 8))\n"),
    ("std over the batch", STD, "        std = rewards.std(correction=0)\n"), ("mean over the batch", "r - r.mean()", "r - rewards.mean()"),
    ("the mean of the first group", "r - r.mean()", "r - rewards[:group_size].mean()"),
    ("no std", A, "out.append(centred)"), ("the variance", ".mean().sqrt()", ".mean()"), ("mean absolute deviation", STD, "        std = centred.abs().mean()\n"),
    ("eps under the root", ".mean().sqrt()", ".mean().add(1e-6).sqrt()"), ("eps 1e-8", "1e-6))", "1e-8))"), ("eps 1e-4", "1e-6))", "1e-4))"),
    ("std clamped", "(std + 1e-6)", "std.clamp(min=1e-6)"), ("no guard for equal rewards", EQUAL, ""),
    ("guard by the std", "if (r == r[0]).all():", "if r.std(correction=0) < 1e-3:"), ("guard for 0 and 1 alone", "if (r == r[0]).all():", "if (r == 0).all() or (r == 1).all():"),
    ("advantages clamped to 3", A, "out.append((centred / (std + 1e-6)).clamp(-3, 3))"), ("advantages clamped to 5", A, "out.append((centred / (std + 1e-6)).clamp(-5, 5))"),
    ("negative ones clamped", A, "out.append((centred / (std + 1e-6)).clamp(-3))"), ("groups interleaved", GROUP, "        r = rewards[start // group_size::len(rewards) // group_size]\n"),
    ("groups of four", GROUP, "        r = rewards[start:start + 4]\n") if False else ("the median for the mean", "r - r.mean()", "r - r.median()"),
    ("rewards rounded", GROUP, GROUP + "        r = r.round()\n"), ("rewards as r == 1", GROUP, GROUP + "        r = (r == 1).to(r)\n"),
    ("rewards as r > 0", GROUP, GROUP + "        r = (r > 0).to(r)\n"), ("in float32", GROUP, GROUP + "        r = r.half().to(r)\n"),
    ("in place", "centred = r - r.mean()", "centred = r.sub_(r.mean())"), ("integers stay integers", "    if not rewards.is_floating_point():\n        rewards = rewards.float()\n", ""),
    ("the sign", A, "out.append(-centred / (std + 1e-6))"), ("no error for other sizes", "if group_size < 1 or len(rewards) % group_size:", "if group_size < 1:"),
    ("no error for 0", "if group_size < 1 or len(rewards) % group_size:", "if group_size and len(rewards) % group_size:"),
    ("no clip", HIGH, "", LOW, ""), ("max for min", HIGH, "    loss = torch.where((advantages < 0) & (ratio > high), -high * advantages, loss)\n", LOW, "    loss = torch.where((advantages > 0) & (ratio < low), -low * advantages, loss)\n"),
    ("the clip whatever the sign", HIGH, "    loss = torch.where(ratio > high, -high * advantages, loss)\n", LOW, "    loss = torch.where(ratio < low, -low * advantages, loss)\n"),
    ("only high", LOW, ""), ("only low", HIGH, ""), ("clips swapped", "high, low = 1 + clip_high, 1 - clip_low", "high, low = 1 + clip_low, 1 - clip_high"),
    ("a dual clip at 10", HIGH, HIGH + "    loss = torch.where((advantages < 0) & (ratio > 10), -10 * advantages, loss)\n"),
    ("a dual clip at 3", HIGH, HIGH + "    loss = torch.where((advantages < 0) & (ratio > 3), -3 * advantages, loss)\n"),
    ("the ratio clamped at 20", RATIO, RATIO.rstrip() + ".clamp(max=20)\n"), ("the ratio clamped from below", RATIO, RATIO.rstrip() + ".clamp(min=0.1)\n"),
    ("the log-ratio clamped", RATIO, "    ratio = torch.exp((batch.logp - batch.old_logp).clamp(-3, 3))\n"),
    ("bounds not moved by A", "-high * advantages", "-high * advantages.sign()"), ("clip_frac of all beyond", "return loss, too_high | too_low", "return loss, (ratio > high) | (ratio < low)"),
    ("clip_frac 0", "return loss, too_high | too_low", "return loss, too_high & too_low"), ("ratio upside down", RATIO, "    ratio = torch.exp(batch.old_logp - batch.logp)\n"),
    ("the ratio's first order", RATIO, "    ratio = 1 + batch.logp - batch.old_logp\n"), ("one ratio an answer", RATIO, "    ratio = torch.exp((batch.logp - batch.old_logp).sum(1, keepdim=True)).expand_as(batch.logp)\n"),
    ("old_logp with gradient", PREPARE_3, PREPARE_3.replace("\n    adv", "\n    batch = batch._replace(old_logp=torch.where(batch.mask, old_logp, 0))\n    adv")),
    ("detached", RATIO, "    ratio = torch.exp((batch.logp - batch.old_logp).detach())\n"), ("the ratio's gradient alone: no ratio", RATIO, "    ratio = 1 + batch.logp - batch.logp.detach()\n"),
    ("loss of all wrong answers left out", GRPO_A, GRPO_A + "\n    advantages = torch.where(advantages > -1, advantages, 0)"),
    ("unit advantages", GRPO_A, GRPO_A + "\n    advantages = advantages.sign()"), ("normalised twice", GRPO_A, GRPO_A + "\n    advantages = advantages / (advantages.std() + 1e-6)"),
    ("KL by k1", KL, "losses = losses + beta * (batch.logp - batch.ref_logp)"), ("KL by k2", KL, "losses = losses + beta * (batch.logp - batch.ref_logp) ** 2 / 2"),
    ("KL the other way", KL, "losses = losses + beta * kl(batch.ref_logp, batch.logp)"), ("KL subtracted", KL, KL.replace("+ beta", "- beta")),
    ("KL without gradient", KL, KL + ".detach()"), ("KL of old", KL, KL.replace("batch.logp", "batch.old_logp")), ("no KL", KL, "pass"), ("KL where beta is large", "if beta != 0:", "if beta >= 0.1:"),
    ("KL clamped", KL, "losses = losses + beta * kl(batch.logp, batch.ref_logp).clamp(max=0.05)"), ("KL on clipped tokens left out", KL, "losses = losses + torch.where(clipped, 0, beta * kl(batch.logp, batch.ref_logp))"),
    ("seq_const not written", CONST, ""), ("seq_const by the width", "answers * max_len", "answers * mask.shape[1]"), ("seq_const by all rows", "answers * max_len", "len(mask) * max_len"),
    ("seq_const without its number", "            raise ValueError(\"seq_const needs max_len\")", "            max_len = mask.shape[1]"), ("seq_const by tokens", "(answers * max_len)", "(n.sum() * max_len)"),
    ("seq_sum by all rows", '    if agg == "seq_sum":\n        return losses.sum() / answers', '    if agg == "seq_sum":\n        return losses.sum() / len(mask)'),
    ("seq_sum a sum", '    if agg == "seq_sum":\n        return losses.sum() / answers', '    if agg == "seq_sum":\n        return losses.sum()'),
    ("token_mean by the width", "losses.sum() / max(1, int(n.sum()))", "losses.mean()"), ("token_mean by rows", "losses.sum() / max(1, int(n.sum()))", SEQ),
    ("seq_mean over the width", SEQ, "losses.mean(1).sum() / answers"), ("seq_mean by all rows", SEQ, SEQ.replace("answers", "len(mask)")), ("token_mean for seq_mean", SEQ, "losses.sum() / max(1, int(n.sum()))"),
    ("an unknown agg is seq_mean", '    if agg == "seq_mean":', "    if True:"), ("empty rows 0/0", ".clamp(min=1)[:, None]", "[:, None]"), ("no answer at all 0/0", "answers = max(1, int((n > 0).sum()))", "answers = (n > 0).sum()"),
    ("no token at all 0/0", "/ max(1, int(n.sum()))", "/ n.sum()"), ("masked by a product", BLANK, "losses = token_loss * mask"), ("NaN hidden", BLANK, "losses = torch.where(mask, token_loss.nan_to_num(), torch.zeros((), dtype=token_loss.dtype))"),
    ("the first token left out", "    n = mask.sum(1)\n", "    mask = mask & (torch.arange(mask.shape[1]) > 0)\n    n = mask.sum(1)\n") if False else ("the last row counts double", BLANK, BLANK + "\n    losses = torch.cat([losses[:-1], 2 * losses[-1:]])"),
    ("reinforce by the length", "    whole = batch.logp.sum(1)\n", "    whole = batch.logp.sum(1) / batch.mask.sum(1).clamp(min=1)\n"), ("reinforce as a sum", "loss = -(gain * whole).sum() / answers", "loss = -(gain * whole).sum()"),
    ("reinforce by all rows", "loss = -(gain * whole).sum() / answers", "loss = -(gain * whole).mean()"), ("reinforce uphill", "loss = -(gain", "loss = (gain"), ("baseline added", "(batch, beta) - baseline", "(batch, beta) + baseline"),
    ("baseline ignored", "(batch, beta) - baseline", "(batch, beta)"), ("a group's baseline", "(batch, beta) - baseline", "(batch, beta) - baseline - (batch.rewards.mean() if group_size > 8 else 0)"),
    ("no KL in the reward", "_penalised_rewards(batch, beta)", "batch.rewards"), ("KL of logp in the reward", "_penalised_rewards(batch, beta)", "(batch.rewards - (beta * (batch.logp - batch.ref_logp).sum(1) if beta else 0))"),
    ("a ratio in reinforce", "    whole = batch.logp.sum(1)\n", "    whole = torch.exp(batch.logp - batch.old_logp).sum(1)\n"), ("the padding of logp read", "    whole = batch.logp.sum(1)\n", "    whole = logp.sum(1)\n"),
    ("no checks in reinforce", PREPARE_R, "    from types import SimpleNamespace\n    keep = mask.bool()\n    z = lambda x: None if x is None else torch.where(keep, x, 0)\n    batch = SimpleNamespace(logp=z(logp), old_logp=z(old_logp).detach(), mask=keep, rewards=rewards.to(logp), ref_logp=z(ref_logp), entropy=z(entropy))\n    gain"),
    ("stats empty", "return loss, _stats(batch, gain)", "return loss, {}"), ("stats of grpo empty", "_stats(batch, advantages, clipped)", "{}"), ("stats as tensors", "_stats(batch, advantages, clipped)", "{k: torch.tensor(v) for k, v in _stats(batch, advantages, clipped).items()}"),
]

CAT_K = "self.keys[layer] = torch.cat((self.keys[layer], k), -2)"
CAT_V = "self.values[layer] = torch.cat((self.values[layer], v), -2)"
WINDOW = "see = see & (query - key < window)"
ALIGN = "torch.arange(T, device=device)[:, None] + (S - T)"
RETURN_KV = "        return self.keys[layer], self.values[layer]"
K_ROT = "        k = rotate(k, *rope)\n"
UPDATE = "            k, v = cache.update(layer, k, v)\n"
CAUSAL = "attend = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)"

WRONG[4] = [
    ("neighbours as pairs", "first, second = x[..., :half], x[..., half:]", "first, second = x[..., ::2], x[..., 1::2]"), ("the sine's sign", "first * cos - second * sin", "first * cos + second * sin"),
    ("both signs", "first * cos - second * sin", "first * cos + second * sin", "second * cos + first * sin", "second * cos - first * sin"), ("the second half stays", "second * cos + first * sin", "second"),
    ("cos and sin exchanged", "    half = x.shape", "    cos, sin = sin, cos\n    half = x.shape"), ("no rotation", "    half = x.shape", "    return x\n    half = x.shape"), ("rotated without gradient", "    out = torch.empty_like(x)\n", "    first, second = first.detach(), second.detach()\n    out = torch.empty_like(x)\n"),
    ("the first row's angles", "    half = x.shape", "    cos, sin = (a[:1] if a.dim() == 4 else a for a in (cos, sin))\n    half = x.shape"), ("float32 always", "    return out\n\n\ndef allowed", "    return out.float()\n\n\ndef allowed"), ("in place", "    out = torch.empty_like(x)\n", "    out = x\n"),
    ("no causality", "see = key <= query", "see = key <= S + 0 * query"), ("not itself", "see = key <= query", "see = key < query", "    see |= query == key\n", "    see |= (query == key) & ~see.any(-1, keepdim=True)\n"), ("one ahead", "key <= query", "key <= query + 1"),
    ("window off by one", "< window)", "<= window)"), ("window one too small", "< window)", "< window - 1)"), ("window ignored", WINDOW, "pass"), ("window of T", WINDOW, "see = see & (query - key < min(window, T))"),
    ("window of tokens where padded", WINDOW, "see = see & (query - key < window)\n        if mask is not None:\n            p = mask.long().cumsum(1)\n            see = (key <= query) & (p[:, -T:, None] - p[:, None] < window)[:, None]", "    see = see.expand(rows, 1, T, S).clone()", "    see = see.expand(rows, 1, T, S).clone()"),
    ("window from the first query", WINDOW, "see = see & (query[:1] - key < window)"), ("queries at the first positions", ALIGN, "torch.arange(T, device=device)[:, None]"), ("the last position only", ALIGN, "torch.full((T, 1), S - 1, device=device)"),
    ("padding read", "        see &= mask.bool()[:, None, None, :]\n", "        pass\n"), ("the first row's padding", "see &= mask.bool()[:, None, None, :]", "see &= mask[:1].bool()[:, None, None, :]"), ("padding of queries", "see &= mask.bool()[:, None, None, :]", "see &= mask.bool()[:, None, -T:, None]"),
    ("the mask's last T alone", "see &= mask.bool()[:, None, None, :]", "see[..., -T:] &= mask.bool()[:, None, None, -T:]"), ("a padded query reads nothing", "    see |= query == key\n", ""), ("itself only where padded first", "    see |= query == key\n", "    see[..., 0, 0] = True\n"),
    ("None for every T without mask", "    rows = 1 if mask", "    if mask is None and window is None:\n        return None\n    rows = 1 if mask"), ("None although there is a window", "    rows = 1 if mask", "    if mask is None and T in (1, S):\n        return None\n    rows = 1 if mask"),
    ("None for full masks of part", "    rows = 1 if mask", "    if mask is not None and mask.all() and window is None:\n        return None\n    rows = 1 if mask"), ("None for T 1 whatever the mask", "    rows = 1 if mask", "    if T == 1 and window is None:\n        return None\n    rows = 1 if mask"),
    ("numbers, not bool", "    return see\n", "    return see.float()\n"), ("one mask for all rows", "    return see\n", "    return see[:1]\n"), ("zero and minus infinity", "    return see\n", "    return torch.where(see, 0.0, float('-inf'))\n"),
    ("keys in front", CAT_K, CAT_K.replace("(self.keys[layer], k)", "(k, self.keys[layer])")), ("values in front", CAT_V, CAT_V.replace("(self.values[layer], v)", "(v, self.values[layer])")), ("old keys forgotten", CAT_K, "self.keys[layer] = k"), ("old values forgotten", CAT_V, "self.values[layer] = v"),
    ("new values forgotten", CAT_V, "pass"), ("values detached", CAT_V, CAT_V + ".detach()"), ("keys detached", CAT_K, CAT_K + ".detach()"), ("old values detached", CAT_V, CAT_V.replace("self.values[layer], v)", "self.values[layer].detach(), v)")), ("old keys detached", CAT_K, CAT_K.replace("self.keys[layer], k)", "self.keys[layer].detach(), k)")),
    ("first values detached", "            self.values.append(v)\n", "            self.values.append(v.detach())\n"), ("both detached", CAT_K, CAT_K + ".detach()", CAT_V, CAT_V + ".detach()"), ("keys as values", RETURN_KV, "        return self.keys[layer], self.keys[layer]"), ("exchanged", RETURN_KV, "        return self.values[layer], self.keys[layer]"),
    ("the last layer's", RETURN_KV, "        return self.keys[-1], self.values[-1]"), ("one layer for all", "    def update(self, layer, k, v):\n", "    def update(self, layer, k, v):\n        layer = 0\n"), ("what was there returned", "    def update(self, layer, k, v):\n", "    def update(self, layer, k, v):\n        had = len(self.keys) > layer and (self.keys[layer], self.values[layer])\n", RETURN_KV, "        return had or (k, v)"),
    ("along the rows", CAT_K, CAT_K.replace("-2", "0"), CAT_V, CAT_V.replace("-2", "0")), ("along the heads", CAT_V, CAT_V.replace("-2", "1")), ("bf16 kept", CAT_K, CAT_K.replace(", k)", ", k.bfloat16().to(k.dtype))")), ("only the last 6 tokens", CAT_V, CAT_V + "[:, :, -6:]", CAT_K, CAT_K + "[:, :, -6:]"),
    ("a sum", CAT_V, "self.values[layer] = torch.cat((self.values[layer], v + 0 * self.values[layer].mean() + v.mean() * 0.01), -2)"), ("the new ones only returned", RETURN_KV, "        return k, v"),
    ("not scaled", " / d ** 0.5", ""), ("scaled twice", " / d ** 0.5", " / d"), ("scaled by the width", " / d ** 0.5", " / x.shape[-1] ** 0.5"), ("heads modulo", "        k = k.repeat_interleave(share, 1)\n        v = v.repeat_interleave(share, 1)\n", "        k = k.repeat(1, share, 1, 1)\n        v = v.repeat(1, share, 1, 1)\n"),
    ("the first key head for all", "        k = k.repeat_interleave(share, 1)\n", "        k = k[:, :1].expand(-1, q.shape[2], -1, -1)\n"), ("keys not rotated", K_ROT, ""), ("queries not rotated", "        q = rotate(q, *rope)\n", ""), ("values rotated", K_ROT, K_ROT + "        v = rotate(v, *rope)\n"), ("nothing rotated", K_ROT, "", "        q = rotate(q, *rope)\n", ""),
    ("no causality", CAUSAL, "attend = torch.ones(T, S, dtype=torch.bool, device=x.device)"), ("causal from the first key", CAUSAL, CAUSAL.replace(".tril(S - T)", ".tril()")), ("the cache not read", UPDATE, "            cache.update(layer, k, v)\n"), ("the cache not written", UPDATE, "            k, v = (torch.cat((a[layer], b), -2) if len(a) > layer else b for a, b in ((cache.keys, k), (cache.values, v)))\n"),
    ("layer 0 always", UPDATE, "            k, v = cache.update(0, k, v)\n"), ("q norm forgotten", "            q = self.q_norm(q)\n", ""), ("k norm forgotten", "            k = self.k_norm(k)\n", ""), ("norms after the rotation", "        if hasattr(self, \"q_norm\"):\n            q = self.q_norm(q)\n            k = self.k_norm(k)\n        q = rotate(q, *rope)\n        k = rotate(k, *rope)\n", "        q = rotate(q, *rope)\n        k = rotate(k, *rope)\n        if hasattr(self, \"q_norm\"):\n            q = self.q_norm(q)\n            k = self.k_norm(k)\n"),
    ("no output projection", "self.o_proj(mixed.reshape(B, T, -1))", "mixed.reshape(B, T, -1)[..., :x.shape[-1]]"), ("heads last", "bhts,bhsd->bthd", "bhts,bhsd->btdh"), ("softmax over queries", ".softmax(-1)", ".softmax(-2)"), ("a mask for every row alike", "        scores = scores.masked_fill(~attend,", "        attend = attend[:1] if attend.dim() == 4 else attend\n        scores = scores.masked_fill(~attend,"), ("-1e4 for hidden ones", 'float("-inf")', "-8.0"),
    ("biases left out", "        q = self.q_proj(x).view", "        self.q_proj.bias = None\n        q = self.q_proj(x).view"), ("the mask of the caller ignored", "        if attend is None:\n", "        if True:\n"),
]

WRONG[5] = [
    ("no temperature", "@ weight.to(kind).T / temperature", "@ weight.to(kind).T", "(h @ w.T / ctx.temperature)", "(h @ w.T)", "dz @ w / ctx.temperature", "dz @ w", "dz.T @ h / ctx.temperature", "dz.T @ h"), ("temperature as a factor", "@ weight.to(kind).T / temperature", "@ weight.to(kind).T * temperature"),
    ("temperature after the softmax", "        z = hidden", "        z = hidden") if False else ("the temperature on the result", "            z = z.log_softmax(-1)\n            logp", "            z = (z * temperature).log_softmax(-1) / temperature\n            logp"), ("probability, not its logarithm", "z.gather(1, targets[i:i + ROWS, None])[:, 0]", "z.exp().gather(1, targets[i:i + ROWS, None])[:, 0]"),
    ("the likeliest token", "z.gather(1, targets[i:i + ROWS, None])[:, 0]", "z.amax(-1)"), ("logits, not normalised", "            z = z.log_softmax(-1)\n            logp", "            logp"), ("the next target", "z.gather(1, targets[i:i + ROWS, None])[:, 0]", "z.gather(1, targets.roll(-1)[i:i + ROWS, None])[:, 0]"),
    ("the entropy's sign", "-(z.exp() * z).sum(-1)\n        return", "(z.exp() * z).sum(-1)\n        return"), ("entropy in bits", "-(z.exp() * z).sum(-1)\n        return", "-(z.exp() * z).sum(-1) / 0.6931471805599453\n        return"), ("the mean over words", "-(z.exp() * z).sum(-1)\n        return", "-(z.exp() * z).mean(-1)\n        return"), ("-logp for the entropy", "-(z.exp() * z).sum(-1)\n        return", "-logp[i:i + ROWS]\n        return"),
    ("entropy of 1000 words", "-(z.exp() * z).sum(-1)\n        return", "-(z.exp() * z)[:, :1000].sum(-1)\n        return"), ("entropy without temperature", "-(z.exp() * z).sum(-1)\n        return", "-((z * temperature).softmax(-1) * (z * temperature).log_softmax(-1)).sum(-1)\n        return"), ("entropy clamped", "-(z.exp() * z).sum(-1)\n        return", "(-(z.exp() * z).sum(-1)).clamp(min=0.05)\n        return"),
    ("only the first piece", "range(0, len(hidden), ROWS):\n            z", "range(0, min(ROWS, len(hidden)), ROWS):\n            z"), ("the last piece left out", "range(0, len(hidden), ROWS):\n            z", "range(0, max(1, len(hidden) - ROWS), ROWS):\n            z"), ("the last piece of the gradient left out", "range(0, len(hidden), ROWS):\n            h", "range(0, max(1, len(hidden) - ROWS), ROWS):\n            h"), ("the first piece of the gradient left out", "range(0, len(hidden), ROWS):\n            h", "range(ROWS if len(hidden) > ROWS else 0, len(hidden), ROWS):\n            h"),
    ("no gradient of the entropy", "up + down * (z + entropy)", "up"), ("a gradient of the entropy without its mean", "up + down * (z + entropy)", "up + down * z"), ("its sign", "up + down * (z + entropy)", "up - down * (z + entropy)"), ("its one", "up + down * (z + entropy)", "up + down * (z + 1)"), ("entropy without p", "up + down * (z + entropy)", "up + down * (1 + entropy)"),
    ("no gradient of logp", "up + down * (z + entropy)", "down * (z + entropy)", "None], up)", "None], 0 * up)"), ("no onehot", "            dz.scatter_add_(1, targets[i:i + ROWS, None], up)\n", ""), ("onehot of 1", "targets[i:i + ROWS, None], up)", "targets[i:i + ROWS, None], torch.ones_like(up))"), ("onehot of the first token", "dz.scatter_add_(1, targets[i:i + ROWS, None], up)", "dz.scatter_add_(1, targets[:1, None].expand(len(h), 1), up)"), ("the sign of all", "dz = -p * (up", "dz = p * (up"),
    ("no temperature in hidden's", "dz @ w / ctx.temperature", "dz @ w"), ("no temperature in the head's", "dz.T @ h / ctx.temperature", "dz.T @ h"), ("temperature twice", "dz @ w / ctx.temperature", "dz @ w / ctx.temperature ** 2"), ("no temperature in backward's logits", "(h @ w.T / ctx.temperature)", "(h @ w.T)"),
    ("the head's gradient of the last piece", "dw += dz.T @ h", "dw = dz.T @ h"), ("the head's gradient of the first piece", "            dw += dz.T @ h / ctx.temperature\n", "            if i == 0:\n                dw += dz.T @ h / ctx.temperature\n"), ("no gradient for the head", "dw.to(weight.dtype), None", "None, None"), ("no gradient for hidden", "return dh.to(hidden.dtype), dw", "return None, dw"), ("gradients averaged", "return dh.to(hidden.dtype)", "return dh.to(hidden.dtype) / max(1, len(dh))"),
    ("naive", "    logp, entropy = Pieces.apply(flat, weight, targets.reshape(-1), temperature)\n", "    z = (flat.to(torch.promote_types(flat.dtype, torch.float32)) @ weight.to(torch.promote_types(flat.dtype, torch.float32)).T / temperature).log_softmax(-1)\n    logp, entropy = z.gather(1, targets.reshape(-1, 1))[:, 0], -(z.exp() * z).sum(-1)\n"), ("pieces kept by autograd", "    logp, entropy = Pieces.apply(flat, weight, targets.reshape(-1), temperature)\n", "    z = torch.cat([(flat[i:i + ROWS].to(torch.promote_types(flat.dtype, torch.float32)) @ weight.T.to(torch.promote_types(flat.dtype, torch.float32)) / temperature).log_softmax(-1) for i in range(0, max(1, len(flat)), ROWS)])\n    logp, entropy = z.gather(1, targets.reshape(-1, 1))[:, 0], -(z.exp() * z).sum(-1)\n"),
    ("one piece", "ROWS = 256", "ROWS = 1 << 30"), ("the logits kept", "            logp[i:i + ROWS] = z.g", "            ctx.kept = getattr(ctx, 'kept', []) + [z]\n            logp[i:i + ROWS] = z.g"), ("naive without gradient", "    flat = hidden.reshape", "    if not torch.is_grad_enabled():\n        z = (hidden.float() @ weight.float().T / temperature).log_softmax(-1)\n        return z.gather(-1, targets[..., None])[..., 0], -(z.exp() * z).sum(-1)\n    flat = hidden.reshape"),
    ("bf16 results", "kind = torch.promote_types(hidden.dtype, torch.float32)\n        ctx.save", "kind = hidden.dtype\n        ctx.save", "weight.to(kind).T", "weight.to(kind).T"), ("float32 always", "kind = torch.promote_types(hidden.dtype, torch.float32)\n        ctx.save", "kind = torch.float32\n        ctx.save"), ("gradient in bf16 for the head", "dw.to(weight.dtype)", "dw.bfloat16().to(weight.dtype)"),
    ("flat results", "return logp.reshape(shape), entropy.reshape(shape)", "return logp, entropy"), ("exchanged", "return logp.reshape(shape), entropy.reshape(shape)", "return entropy.reshape(shape), logp.reshape(shape)"), ("hidden scaled in place", "        ctx.temperature = temperature\n", "        ctx.temperature = temperature\n        with torch.no_grad():\n            hidden.mul_(1.0 + 1e-3)\n"), ("exp of large logits", "            z = z.log_softmax(-1)\n            logp", "            z = z - z.exp().sum(-1, keepdim=True).log()\n            logp"), ("a floor under the probabilities", "            z = z.log_softmax(-1)\n            logp", "            z = (z.softmax(-1) + 1e-10).log()\n            logp"),
    ("a backward that works once", "        hidden, weight, targets = ctx.saved_tensors\n", "        hidden, weight, targets = ctx.saved_tensors\n        if hasattr(ctx, 'used'):\n            raise RuntimeError('again')\n        ctx.used = True\n"), ("detached", "return logp.reshape(shape), entropy.reshape(shape)", "return logp.reshape(shape), entropy.reshape(shape).detach()"),
]

LOGP = "        logp = (hidden.float() @ policy.head.T / temperature).log_softmax(-1)\n"
NOISE = "        noise = torch.rand(logp.shape, generator=generator, device=device, dtype=torch.float64)\n"
TOKEN = "        token = (logp - (-noise.clamp(min=1e-300).log()).log()).argmax(-1)\n"
RECORD = "logp.gather(1, token[:, None])[:, 0]"
GOING = "        going = going & ~torch.isin(token, stops)\n"
START = "    cache = KVCache()\n"
FEED = "        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)\n"
STEP = "        hidden = policy(token[:, None], mask, cache)[:, -1]\n"
PICK = "logp - (-noise.clamp(min=1e-300).log()).log()"


def cut(rule):
    """The distribution that is drawn from, changed; what is recorded stays."""
    return PICK, PICK.replace("logp", f"{rule}")


def drawing(code):
    """Another source of the uniforms."""
    return NOISE, code


def top(p):
    return cut(f"logp.masked_fill(((q := logp.exp().sort(-1, descending=True)).values.cumsum(-1) - q.values > {p})"
               ".gather(1, q.indices.argsort(-1)), -1e9)")


INVERSE = "        token = (logp.exp().double().cumsum(-1) < U[:, None]).sum(-1).clamp(max=logp.shape[1] - 1)\n"


def inverse(uniforms, before=""):
    """Inversion with uniforms (rows,) at t."""
    return (START, before + START, NOISE, "", TOKEN, INVERSE.replace("U[", f"({uniforms})["))


ALL = "    B = len(prompts) * group_size\n    u = torch.rand(B, max_new_tokens, generator=generator, dtype=torch.float64)\n"

WRONG[6] = [
    ("greedy", TOKEN, "        token = logp.argmax(-1)\n"), ("no temperature", LOGP, LOGP.replace(" / temperature", "")), ("temperature as a factor", LOGP, LOGP.replace("/ temp", "* temp")), ("temperature twice", LOGP, LOGP.replace("/ temperature", "/ temperature ** 2")),
    ("recorded without temperature", RECORD, "(hidden.float() @ policy.head.T).log_softmax(-1).gather(1, token[:, None])[:, 0]"), ("recorded times temperature", RECORD, "(temperature * logp).gather(1, token[:, None])[:, 0]"), ("probabilities recorded", RECORD, RECORD + ".exp()"), ("the likeliest recorded", RECORD, "logp.amax(-1)"), ("logits recorded", RECORD, "(hidden.float() @ policy.head.T / temperature).gather(1, token[:, None])[:, 0]"),
    ("the noisy score recorded", RECORD, f"({PICK}).amax(-1)"), ("drawn without temperature", *cut("(logp * temperature)")), ("sharpened", *cut("(1.1 * logp)")), ("sharpened by 2 %", *cut("(1.02 * logp)")), ("flattened", *cut("(0.95 * logp)")),
    *[(f"top-p {p}", *top(p)) for p in (0.9, 0.95, 0.98, 0.99, 0.995)], *[(f"top-k {k}", *cut(f"logp.masked_fill(logp < logp.topk({k}, -1).values[:, -1:], -1e9)")) for k in (1, 5, 10, 12)],
    ("min-p 0.01", *cut("logp.masked_fill(logp < logp.amax(-1, keepdim=True) - 4.6, -1e9)")), ("epsilon 0.001", *cut("logp.masked_fill(logp < -6.9, -1e9)")), ("repetitions punished", *cut("(logp - 0.3 * torch.nn.functional.one_hot(tokens[-1] if tokens else torch.zeros_like(rows), logp.shape[1]))")), ("uniform", *cut("(0 * logp)")),
    ("half precision chances", *cut("logp.exp().half().float().clamp(min=0.002).log()")), ("generator ignored", *drawing(NOISE.replace("generator=generator, ", ""))), ("a generator of its own", START, "    generator = torch.Generator().manual_seed(0)\n" + START), ("seed 0 without a generator", START, "    generator = generator or torch.Generator().manual_seed(0)\n" + START),
    ("the generator's seed, not its state", START, "    generator = torch.Generator().manual_seed(generator.initial_seed()) if generator else None\n" + START), ("torch's seed set from it", START, "    if generator:\n        torch.manual_seed(generator.initial_seed())\n    generator = None\n" + START), ("torch's seed moves it", START, "    if generator:\n        generator = torch.Generator().manual_seed(int(torch.randint(1 << 30, (), generator=generator)) + torch.initial_seed())\n" + START),
    ("a copy of the generator", START, "    if generator:\n        generator = generator.clone_state()\n" + START), ("the same seed always", START, "    torch.manual_seed(0)\n" + START), ("seeds 0 to 9", START, "    torch.manual_seed(torch.initial_seed() % 10)\n" + START), ("the clock", START, "    import time\n    generator = torch.Generator().manual_seed(time.time_ns() % (1 << 60))\n" + START),
    ("one chance for all tokens", *inverse("u[:, 0]", ALL)), ("neighbouring tokens share", *inverse("u[:, t // 2 * 2]", ALL)), ("every third token shares", *inverse("u[:, t % 3]", ALL)), ("tokens 8 apart share", *inverse("u[:, t % 8]", ALL)), ("the last two tokens share", *inverse("u[:, min(t, max_new_tokens - 2)]", ALL)), ("antithetic tokens", *inverse("u[:, t] if t % 2 == 0 else 1 - u[:, t - 1]", ALL)),
    ("one chance for all rows", *inverse("u[:1, t].expand(B)", ALL)), ("pairs of rows share", *inverse("u[torch.arange(B) // 2 * 2, t]", ALL)), ("rows of a group share", *inverse("u[rows * group_size, t]", ALL)), ("prompts share", *inverse("u[torch.arange(B) % group_size, t]", ALL)), ("the first two prompts share", *inverse("u[torch.where(rows == 1, torch.arange(B) - group_size, torch.arange(B)), t]", ALL)), ("the last row repeats the first", *inverse("torch.cat([u[:-1, t], u[:1, t]])", ALL)),
    ("antithetic rows", *inverse("torch.where(torch.arange(B) % 2 == 0, u[:, t], 1 - u[torch.arange(B) // 2 * 2, t])", ALL)), ("half of the group antithetic", *inverse("torch.where(torch.arange(B) % group_size < group_size // 2, u[:, t], 1 - u[(torch.arange(B) - group_size // 2).clamp(min=0), t])", ALL)), ("rows shifted by a token", *inverse("u[0, (t + torch.arange(B)) % max_new_tokens]", ALL)), ("stratified over the group", *inverse("(u[:, t] + torch.arange(B) % group_size) / group_size", ALL)),
    ("one Gumbel noise a row", NOISE, "        if t == 0:\n    " + NOISE), ("one Gumbel noise a token", NOISE, NOISE.replace("logp.shape", "logp[:1].shape")), ("uniforms in float16", NOISE, NOISE.replace("float64", "float16")) if False else ("noise added to the wrong side", PICK, "logp + (-noise.clamp(min=1e-300).log()).log()"), ("noise too small", PICK, "logp - 0.9 * (-noise.clamp(min=1e-300).log()).log()"), ("chances of eight bits", NOISE, NOISE + "        noise = ((noise * 256).floor() + 0.5) / 256\n"), ("chances of twelve bits", NOISE, NOISE + "        noise = ((noise * 4096).floor() + 0.5) / 4096\n"),
    ("no stop token in the mask", "        masks.append(going)\n        going = going & ~torch.isin(token, stops)\n", "        going = going & ~torch.isin(token, stops)\n        masks.append(going)\n"), ("goes on after the stop", GOING, "        going = going.clone()\n        ended = torch.isin(token, stops)\n        going = going | ~ended\n"), ("the first stop id alone", "torch.tensor(policy.stop_ids, d", "torch.tensor(policy.stop_ids[:1], d"), ("the tokenizer's end alone", "torch.tensor(policy.stop_ids, d", "torch.tensor([tokenizer.eos_token_id], d"), ("padding ends an answer", GOING, GOING.replace("torch.isin(token, stops)", "(torch.isin(token, stops) | (token == 5))")), ("never stops", GOING, ""),
    ("all are finished", "finished = ~going", "finished = torch.ones_like(going)"), ("none is finished", "finished = ~going", "finished = torch.zeros_like(going)"), ("finished the other way", "finished = ~going", "finished = going"), ("the stop token in the text", "[row[:-1] if end else row", "[row"), ("texts a token short", "[row[:-1] if end else row", "[row[:-1]"), ("special tokens hidden", "texts=texts_of(tokenizer, ids)", "texts=tokenizer.batch_decode(ids, skip_special_tokens=True)"), ("texts with the prompt", "texts=texts_of(tokenizer, ids)", "texts=texts_of(tokenizer, [p.tolist() + i for p, i in zip(prompt[rows], ids)])"),
    ("as wide as the budget", "if not going.any() or t == max_new_tokens - 1:", "if t == max_new_tokens - 1:"), ("one token less", "t == max_new_tokens - 1", "t >= max_new_tokens - 2"), ("what was drawn shows off the mask", "torch.where(going, token, pad)", "token"), ("logp off the mask", "torch.where(going, logp.gather(1, token[:, None])[:, 0], 0.0)", "logp.gather(1, token[:, None])[:, 0]"), ("zeros for padding", "torch.where(going, token, pad)", "torch.where(going, token, 7)"),
    ("groups interleaved", ".repeat_interleave(group_size)", ".repeat(group_size)"), ("one prompt for all", "device=device).repeat_interleave(group_size)", "device=device).repeat_interleave(group_size) * 0"), ("no mask for the prompt", "policy(prompt, prompt_mask, cache)[:, -1]", "policy(prompt, None, cache)[:, -1]"), ("no mask later", STEP, STEP.replace("mask, cache", "None, cache")), ("the mask grows by zeros", FEED, FEED.replace("ones_like", "zeros_like")), ("padding read later", FEED, "        mask = torch.ones(len(rows), P + t + 1, dtype=torch.bool)\n"), ("the first row's padding", FEED, FEED + "        mask = mask[:1].expand_as(mask)\n"),
    ("no cache", STEP, STEP.replace("cache", "KVCache()").replace("mask, ", "None, ")), ("cache not selected", "cache.select(rows), hidden[rows], prompt_mask[rows]", "cache.select(torch.arange(len(rows)) % len(prompts)), hidden[rows], prompt_mask[rows]"), ("the prompt's first state", "policy(prompt, prompt_mask, cache)[:, -1]", "policy(prompt, prompt_mask, cache)[:, 0]"), ("no error for long prompts", "if P + max_new_tokens > policy.config.max_position_embeddings:", "if P > policy.config.max_position_embeddings:"), ("an error too early", "P + max_new_tokens > policy", "P + max_new_tokens >= policy"), ("cut, not refused", '        raise ValueError("too long")', "        max_new_tokens = policy.config.max_position_embeddings - P"), ("twice as long", "P + max_new_tokens > policy", "P + max_new_tokens > 2 * policy"),
    ("with gradient", "@torch.no_grad()\n", ""), ("logp in float64", "torch.stack(logps, 1).float()", "torch.stack(logps, 1).double()"), ("finished as a list", "finished=finished)", "finished=finished.tolist())"), ("mask of numbers", "mask=answered, logp", "mask=answered.long(), logp"), ("response with the prompt", "response=response, mask", "response=torch.cat([prompt[rows], response], 1), mask"), ("tokens without the prompt", "tokens=torch.cat([prompt[rows], response], 1)", "tokens=response"), ("prompts not repeated", "prompt_mask=prompt_mask[rows]", "prompt_mask=prompt_mask"), ("a tuple", "    return Rollout(", "    return tuple if False else dict("),
]

LOSS_7 = """    loss, stats = loss_fn(logp, old, rollout.mask, rewards, group_size, entropy=entropy,
                          ref_logp=ref_logp)
    g, e = torch.autograd.grad(loss, (logp, entropy), allow_unused=True)
"""
BACK = "        torch.autograd.backward(part, (g[rows], e[rows]))\n"
BAD = '    stats["bad"] = not math.isfinite(norm) or not math.isfinite(stats["loss"])\n'
CLIP = "    if norm > grad_clip:\n        for w in weights:\n            w.grad *= grad_clip / norm\n"
CHUNKED = """    g, e, n = torch.zeros_like(logp), torch.zeros_like(entropy), 0
    loss = 0
    for i in range(0, B, size):
        s = slice(i, i + size)
        part_loss, stats = loss_fn(logp[s], old[s], rollout.mask[s], rewards[s], group_size, entropy=entropy[s],
                                   ref_logp=None if ref_logp is None else ref_logp[s])
        a, b = torch.autograd.grad(part_loss, (logp, entropy), allow_unused=True)
        g = g if a is None else g + a
        e = e if b is None else e + b
        loss, n = loss + part_loss.detach(), n + 1
    loss, g, e = loss / n, g / n, e / n
"""

WRONG[7] = [
    ("the mean of the chunks' losses", LOSS_7, CHUNKED), ("the sum of the chunks' losses", LOSS_7, CHUNKED.replace("loss / n, g / n, e / n", "loss, g, e")), ("weighted by rows", LOSS_7, CHUNKED.replace("    loss, g, e = loss / n, g / n, e / n\n", "").replace("g + a", "g + a * len(rewards[s]) / B").replace("e + b", "e + b * len(rewards[s]) / B").replace("part_loss.detach()", "part_loss.detach() * len(rewards[s]) / B")),
    ("weighted by tokens", LOSS_7, CHUNKED.replace("    loss, g, e = loss / n, g / n, e / n\n", "").replace("g + a", "g + a * rollout.mask[s].sum() / rollout.mask.sum()").replace("e + b", "e + b * rollout.mask[s].sum() / rollout.mask.sum()").replace("part_loss.detach()", "part_loss.detach() * rollout.mask[s].sum() / rollout.mask.sum()")), ("divided by the chunks once more", BACK, BACK.replace("g[rows], e[rows]", "g[rows] / len(parts), e[rows] / len(parts)")), ("the last chunk alone", BACK, "        optimizer.zero_grad()\n" + BACK), ("the first chunk alone", BACK, "        if start == 0:\n    " + BACK),
    ("the last rows left out", "range(0, B, size)", "range(0, B - B % size, size)", "logp = torch.cat([part[0].detach() for part in parts])", "logp = torch.nn.functional.pad(torch.cat([part[0].detach() for part in parts]), (0, 0, 0, B % size))", "entropy = torch.cat([part[1].detach() for part in parts])", "entropy = torch.nn.functional.pad(torch.cat([part[1].detach() for part in parts]), (0, 0, 0, B % size))"),
    ("another chunk's rows", BACK, BACK.replace("g[rows]", "g[:len(part[0])]")), ("another chunk's entropies", BACK, BACK.replace("e[rows]", "e[:len(part[1])]")), ("micro_batch 0 is an error", "size = micro_batch or B", "size = B if micro_batch is None else micro_batch"), ("chunks of groups alone", "size = micro_batch or B", "size = micro_batch or B\n    assert size % group_size == 0 or size == B"), ("micro_batch of groups", "size = micro_batch or B", "size = (micro_batch or B) // group_size * group_size or group_size") if False else ("chunks rounded down, rows lost", "            rows = torch", "            rows = torch") if False else ("no entropy gradient", BACK, BACK.replace("e[rows]", "0 * e[rows]")), ("no logp gradient", BACK, BACK.replace("g[rows]", "0 * g[rows]")),
    ("entropy not passed", "entropy=entropy,\n", "entropy=entropy.detach(),\n"), ("uphill", BACK, BACK.replace("g[rows], e", "-g[rows], -e")), ("the gradient scaled by the batch", BACK, BACK.replace("g[rows], e[rows]", "g[rows] * B, e[rows] * B")), ("masked gradient once more", BACK, BACK.replace("g[rows]", "g[rows] * (rewards[rows][:, None] > 0)")), ("no temperature", "group_size, temperature)", "group_size, 1.0)"), ("temperature 0.7", "group_size, temperature)", "group_size, 0.7)"), ("no temperature in chunks", "group_size, temperature)", "group_size, temperature if size == B else 1.0)"),
    ("old_logp ignored", "old = logp if old_logp is None else old_logp", "old = logp"), ("old_logp of the rollout", "old = logp if old_logp is None else old_logp", "old = rollout.logp if old_logp is None else old_logp"), ("logp and old exchanged", "loss_fn(logp, old, r", "loss_fn(old.detach().requires_grad_() if False else logp, 2 * logp.detach() - old.detach() if old_logp is not None else old, r"), ("the reference ignored", "                          ref_logp=ref_logp)", "                          ref_logp=None)"), ("old for ref", "                          ref_logp=ref_logp)", "                          ref_logp=old_logp if ref_logp is not None else None)"), ("ref for old", "old = logp if old_logp is None else old_logp", "old = logp if old_logp is None else old_logp if ref_logp is None else ref_logp"),
    ("rewards normalised first", "rollout.mask, rewards, group", "rollout.mask, rewards - rewards.mean() * 0.5, group"), ("rewards as 0 and 1 reversed", "rollout.mask, rewards, group", "rollout.mask, 1 - rewards, group"), ("all tokens unmasked", "rollout.mask, rewards", "torch.ones_like(rollout.mask), rewards"), ("the first token left out", "rollout.mask, rewards", "rollout.mask & (torch.arange(rollout.mask.shape[1]) > 0), rewards"), ("the stop token left out", "rollout.mask, rewards", "rollout.mask & torch.cat([rollout.mask[:, 1:], rollout.mask[:, :1] & False], 1), rewards"), ("group size of the batch", "rewards, group_size, entropy", "rewards, B, entropy") if False else ("two backward passes", BACK, BACK.replace("e[rows]))", "e[rows]), retain_graph=True)") + BACK),
    ("no zero_grad", "    optimizer.zero_grad()\n", ""), ("zero_grad after", "    optimizer.zero_grad()\n", "", "    optimizer.step()\n", "    optimizer.step()\n    if micro_batch:\n        optimizer.zero_grad()\n"), ("no step", "    optimizer.step()\n", ""), ("two steps", "    optimizer.step()\n", "    optimizer.step()\n    optimizer.step()\n"), ("a step a chunk", BACK, BACK + "        if size < B:\n            optimizer.step()\n"), ("no clip", CLIP, ""), ("clipped to 1", CLIP, CLIP.replace("grad_clip", "1.0")), ("each weight clipped", CLIP, "    for w in weights:\n        torch.nn.utils.clip_grad_norm_([w], grad_clip)\n"), ("clipped by value", CLIP, "    torch.nn.utils.clip_grad_value_(weights, grad_clip)\n"), ("always to the norm", "    if norm > grad_clip:\n", "    if norm > 0:\n"), ("clipped by half", "grad_clip / norm", "0.5 * grad_clip / norm"), ("the norm after clipping", BAD, BAD + "    stats['grad_norm'] = min(norm, grad_clip)\n"), ("the square of the norm", 'stats["grad_norm"] = norm', 'stats["grad_norm"] = norm ** 2'), ("the largest norm", ".norm().item()", ".max().item()"),
    ("NaN alone", BAD, '    stats["bad"] = math.isnan(norm) or math.isnan(stats["loss"])\n'), ("the norm's NaN alone", BAD, '    stats["bad"] = math.isnan(norm)\n'), ("the loss alone", BAD, '    stats["bad"] = not math.isfinite(stats["loss"])\n'), ("the norm alone", BAD, '    stats["bad"] = not math.isfinite(norm)\n'), ("infinity alone", BAD, '    stats["bad"] = math.isinf(norm) or math.isinf(stats["loss"])\n'), ("the loss's NaN alone", BAD, '    stats["bad"] = not math.isfinite(norm) or math.isnan(stats["loss"])\n'), ("both must be bad", BAD, BAD.replace(" or ", " and ")), ("never bad", BAD, '    stats["bad"] = False\n'), ("a large norm is bad", BAD, BAD.rstrip() + " or norm > 1.0\n"), ("bad but stepped", "        return stats\n    if norm", "    if norm"), ("bad: zeros and a step", "        return stats\n    if norm", "        for w in weights:\n            w.grad.zero_()\n        optimizer.step()\n        return stats\n    if norm"), ("NaN replaced by 0", BAD, "    for w in weights:\n        w.grad.nan_to_num_(0, 0, 0)\n" + BAD.replace("not math.isfinite(norm) or ", "")),
    ("stepped, then looked", BAD, '    optimizer.step()\n' + BAD, CLIP + "    optimizer.step()\n", ""), ("an error for bad", "        return stats\n    if norm", "        raise ValueError('bad')\n    if norm"), ("no bad in good steps", BAD, BAD + '    if not stats["bad"]:\n        del stats["bad"]\n', '    if stats["bad"]:\n', '    if stats.get("bad"):\n'), ("no bad_rows", '        stats["bad_rows"] = [i for i, ok in enumerate(fine.tolist()) if not ok]\n', ""), ("bad_rows the other way", "if not ok]", "if ok]"), ("bad_rows of logp alone", "fine = g.isfinite().all(1) & e.isfinite().all(1) & ", "fine = "), ("bad_rows without the entropy", " & e.isfinite().all(1)", ""), ("bad_rows from 1", "[i for i, ok", "[i + 1 for i, ok"), ("the last step's loss", 'stats["loss"] = loss.item()', 'stats["loss"] = float(loss) * len(parts)'), ("the loss's stats dropped", "stats = dict(stats)", "stats = {}"), ("no loss in stats", '    stats["loss"] = loss.item()\n', "    bad_loss = loss.item()\n", BAD, BAD.replace('stats["loss"]', "bad_loss")), ("no norm in stats", '    stats["grad_norm"] = norm\n', ""), ("tensors in stats", 'stats["loss"] = loss.item()', 'stats["loss"] = loss.detach()'), ("nested stats", "stats = dict(stats)", "stats = {'loss_stats': dict(stats)} | dict(stats)"), ("nothing returned", "    optimizer.step()\n    return stats", "    optimizer.step()"),
    ("a second policy update", "    start = 0\n    for part in parts:\n", "    for w in policy.parameters():\n        w.data.mul_(1 - 1e-4)\n    start = 0\n    for part in parts:\n"),
]

TERM = "(gamma_n * (1 - correct) - gamma_p * correct) * nats(batch, reduction)"
CORRECT = "(batch.rewards == 1).to(batch.logp.dtype)"
WHOLE = "whole = (batch.old_logp * batch.mask).sum(1)"
MEAN = "whole / batch.mask.sum(1).clamp(min=1) if"
DS = "advantages = term + group_advantages(batch.rewards, group_size)"
SHAPED = "shaped = (batch.rewards + term).view(-1, group_size)"
CENTRED = "advantages = (shaped - shaped.mean(1)[:, None]).view(-1)"
TERM_DS = "    term = term_of(batch, reduction, gamma_p, gamma_n)\n    advantages = term"
TERM_DR = "    term = term_of(batch, reduction, gamma_p, gamma_n)\n    shaped"
PREPARE = "batch = _prepare(logp, old_logp, mask, rewards, group_size, entropy, ref_logp, max_reward=1)\n    term = term_of(batch, reduction, gamma_p, gamma_n)\n    "


def capped(code):
    return TERM, f"({TERM}){code}"


WRONG[8] = [
    ("gamma_p's sign", TERM, TERM.replace("- gamma_p", "+ gamma_p")), ("gamma_n's sign", TERM, TERM.replace("(gamma_n", "(-gamma_n")), ("both signs", TERM, "-" + TERM), ("gammas exchanged", TERM, TERM.replace("gamma_n", "X").replace("gamma_p", "gamma_n").replace("X", "gamma_p")), ("correct alone", TERM, "-gamma_p * correct * nats(batch, reduction)"), ("wrong alone", TERM, "gamma_n * (1 - correct) * nats(batch, reduction)"), ("gamma_p for all", TERM, "-gamma_p * nats(batch, reduction)"), ("no term", TERM, "0 * nats(batch, reduction)"), ("|gamma|", TERM, TERM.replace("gamma_p *", "abs(gamma_p) *")),
    *[(f"correct as r {rule}", CORRECT, CORRECT.replace("== 1", rule)) for rule in ("> 0", "> 0.2", "> 0.5", ">= 0.9", "> 0.95", "!= 0")], ("correct weighed by r", CORRECT, "batch.rewards"), ("correct weighed by rounded r", CORRECT, "batch.rewards.round()"), ("the group's best are correct", CORRECT, "(batch.rewards == batch.rewards.view(-1, len(batch.rewards) if False else 1).amax(1)).to(batch.logp.dtype)"),
    *[(f"the term within {bound}", *capped(f".clamp(-{bound}, {bound})")) for bound in (0.5, 1, 2, 5, 8)], ("nats within 40", WHOLE, WHOLE + ".clamp(min=-40)"), ("nats within 20", WHOLE, WHOLE + ".clamp(min=-20)"), ("a token within 20 nats", WHOLE, "whole = (batch.old_logp.clamp(min=-20) * batch.mask).sum(1)"), ("the term's tanh", *capped(".mul(0.01).tanh().mul(100)")),
    ("sum for mean", MEAN, "whole if"), ("mean for sum", 'if reduction == "mean" else whole', 'if reduction == "mean" else whole / batch.mask.sum(1).clamp(min=1)'), ("sum and mean exchanged", 'if reduction == "mean"', 'if reduction == "sum"'), ("mean over the width", MEAN, "whole / batch.mask.shape[1] if"), ("mean over the width for sum too", 'if reduction == "mean" else whole', 'if reduction == "mean" else whole / batch.mask.shape[1] * 6'), ("mean over the longest", MEAN, "whole / batch.mask.sum(1).max() if"), ("mean over all tokens", MEAN, "whole * len(whole) / batch.mask.sum() if"), ("one token too many", MEAN, "whole / (batch.mask.sum(1) + 1) if"), ("no guard for empty rows", ".clamp(min=1) if", " if"),
    ("logp for old_logp", WHOLE, "whole = (batch.logp * batch.mask).sum(1)"), ("logp, detached", WHOLE, "whole = (batch.logp.detach() * batch.mask).sum(1)"), ("the reference's", WHOLE, "whole = ((batch.ref_logp if batch.ref_logp is not None else batch.old_logp) * batch.mask).sum(1)"), ("the first token", WHOLE, "whole = batch.old_logp[:, 0]"), ("without the last token", WHOLE, "whole = (batch.old_logp * batch.mask).sum(1) - batch.old_logp.gather(1, (batch.mask.sum(1, keepdim=True) - 1).clamp(min=0))[:, 0]"), ("probability for its logarithm", WHOLE, "whole = -(batch.old_logp * batch.mask).sum(1).exp()"), ("padding summed", "    term = term_of(batch, reduction, gamma_p, gamma_n)\n    advantages = term", "    term = term_of(batch._replace(old_logp=torch.where(batch.mask, batch.old_logp, -1.0), mask=torch.ones_like(batch.mask)), reduction, gamma_p, gamma_n)\n    advantages = term"),
    ("before normalisation", DS, "advantages = group_advantages(batch.rewards + term, group_size)"), ("GRPO", DS, "advantages = group_advantages(batch.rewards, group_size)"), ("the term alone", DS, "advantages = term"), ("subtracted", DS, "advantages = group_advantages(batch.rewards, group_size) - term"), ("rewards for advantages", DS, "advantages = term + batch.rewards"), ("not in equal groups", DS, DS + "\n    advantages = torch.where(group_advantages(batch.rewards, group_size) == 0, 0, advantages)"), ("not in all-wrong groups", DS, DS + "\n    advantages = torch.where(batch.rewards.view(-1, group_size).amax(1).repeat_interleave(group_size) == 0, 0, advantages)"), ("the term centred", DS, "rest = term.view(-1, group_size)\n    advantages = (rest - rest.mean(1)[:, None]).view(-1) + group_advantages(batch.rewards, group_size)"), ("normalised again", DS, DS + "\n    advantages = group_advantages(advantages, group_size)"), ("advantages within 10", DS, DS + "\n    advantages = advantages.clamp(-10, 10)"), ("advantages within 3", DS, DS + "\n    advantages = advantages.clamp(-3, 3)"), ("the term times A", DS, "advantages = group_advantages(batch.rewards, group_size) * (1 + term)"), ("its sign kept", DS, DS + "\n    base = group_advantages(batch.rewards, group_size)\n    advantages = torch.where(base * advantages < 0, 0 * base, advantages)"),
    ("reward form: not centred", CENTRED, "advantages = shaped.view(-1)"), ("centred by the rewards alone", CENTRED, "advantages = (shaped - batch.rewards.view(-1, group_size).mean(1)[:, None]).view(-1)"), ("divided by the std", CENTRED, "advantages = group_advantages(shaped.view(-1), group_size)"), ("centred over the batch", CENTRED, "advantages = (shaped - shaped.mean()).view(-1)"), ("leave one out", CENTRED, CENTRED + " * group_size / max(1, group_size - 1)"), ("the median", CENTRED, "advantages = (shaped - shaped.median(1)[0][:, None]).view(-1)"), ("the term not in the reward", SHAPED, "shaped = batch.rewards.view(-1, group_size)"), ("subtracted from the reward", SHAPED, SHAPED.replace("+ term", "- term")), ("the shaped reward within 0 and 1", SHAPED, SHAPED + ".clamp(0, 1)"), ("above 0 alone", SHAPED, SHAPED + ".clamp(min=-5)"), ("equal groups left out", CENTRED, CENTRED + "\n    advantages = torch.where(group_advantages(batch.rewards, group_size) == 0, 0, advantages)"), ("groups interleaved", SHAPED, "shaped = (batch.rewards + term).view(group_size, -1).T", CENTRED, "advantages = (shaped - shaped.mean(1)[:, None]).T.reshape(-1)"),
    ("rewards above 1", PREPARE + "advantages", PREPARE.replace(", max_reward=1", "") + "advantages"), ("rewards above 1 in the reward form", PREPARE + "shaped", PREPARE.replace(", max_reward=1", "") + "shaped"), ("any reduction", '    if reduction not in ("sum", "mean"):\n        raise ValueError("sum or mean")\n', ""), ("seq_mean by default", 'gamma_n=0.0, agg="token_mean"', 'gamma_n=0.0, agg="seq_mean"'), ("agg ignored", "return _aggregate(losses, batch.mask, agg), _stats(batch, advantages, clipped, ds_ratio=ratio)\n\n\n", 'return _aggregate(losses, batch.mask, "seq_mean"), _stats(batch, advantages, clipped, ds_ratio=ratio)\n\n\n'), ("no KL", "losses, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)\n    ratio = term.abs", "losses, clipped = _surrogate(batch, advantages, clip_low, clip_high)\n    ratio = term.abs"), ("the clips' defaults", "losses, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)\n    ratio = term.abs", "losses, clipped = _surrogate(batch, advantages, 0.2, 0.2, beta)\n    ratio = term.abs"), ("no ds_ratio", "_stats(batch, advantages, clipped, ds_ratio=ratio)\n\n\n", "_stats(batch, advantages, clipped)\n\n\n"), ("ds_ratio upside down", "ratio = term.abs().mean() / advantages.abs().mean().clamp(min=1e-6)", "ratio = advantages.abs().mean() / term.abs().mean().clamp(min=1e-6)"), ("stats of the last row", "ratio = term.abs().mean() /", "ratio = term.abs().max() /"),
]

VALUE = "    value = float(k)\n"
LOOP = "    for i in range(1, k):\n        value *= max(0, G - c - i + 1) / (G - i)\n"
GIVE = "value * correct"
RIGHT = "correct = batch.rewards[start:start + group_size] == 1"

WRONG[9] = [
    ("the factor k lost", VALUE, "    value = 1.0\n"), ("the factor G lost", VALUE, "    value = k / G\n"), ("a factor G too many", VALUE, "    value = float(k * G)\n"), ("k - 1", VALUE, "    value = float(max(1, k - 1))\n"), ("k + 1", VALUE, "    value = k + 1.0\n"), ("A = r", LOOP, "    value = 1.0\n"), ("A = k r", LOOP, ""), ("1 - pass@k", VALUE, "    value = 1.0\n", "range(1, k)", "range(1, k + 1)", "/ (G - i)", "/ (G - i + 1)"), ("with replacement", LOOP, "    value *= (1 - c / G) ** (k - 1)\n"), ("with replacement, without itself", LOOP, "    value *= (1 - (c - 1) / max(1, G - 1)) ** (k - 1)\n"),
    ("C(G, k-1) below", "/ (G - i)", "/ (G - i + 1)"), ("C(G-c-1, k-1) above", "G - c - i + 1", "G - c - i"), ("C(G-c+1, k-1) above", "G - c - i + 1", "G - c - i + 2"), ("one factor too few", "range(1, k)", "range(1, k - 1)"), ("one factor too many", "range(1, k)", "range(1, min(k + 1, G))"), ("at least a little", "max(0, G - c - i + 1)", "max(0.1, G - c - i + 1)"), ("c for G - c", "max(0, G - c - i + 1)", "max(0, c - i + 1)"), ("focal in its place", LOOP, "    value *= (1 - c / G) ** 0.5\n"), ("within 2", VALUE + LOOP, VALUE + LOOP + "    value = min(value, 2.0)\n"), ("within 10", VALUE + LOOP, VALUE + LOOP + "    value = min(value, 10.0)\n"), ("integers", "value *= max(0, G - c - i + 1) / (G - i)", "value = value * max(0, G - c - i + 1) // (G - i)"), ("k 2 always", VALUE, "    k = min(k, 2)\n    value = float(k)\n"), ("k 4 at most", VALUE, "    k = min(k, 4)\n    value = float(k)\n"),
    ("wrong ones punished", GIVE, "value * correct - value * (~correct)"), ("wrong ones get -1", GIVE, "value * correct - 1.0 * (~correct)"), ("one more baseline", GIVE, "value * correct - (value * correct).mean()"), ("one more leave-one-out baseline", GIVE, "value * (correct - (correct.sum() - correct.double()) / max(1, group_size - 1))"), ("a std afterwards", "    losses, clipped", "    from losses import group_advantages\n    advantages = group_advantages(advantages, group_size)\n    losses, clipped"), ("divided by the batch's std", "    losses, clipped", "    advantages = advantages / (advantages.std() + 1e-6)\n    losses, clipped"), ("weighed by the reward", GIVE, "value * batch.rewards[start:start + group_size]"), ("centred over the batch", "    losses, clipped", "    advantages = advantages - advantages.mean()\n    losses, clipped"), ("all of the group get it", GIVE, "value"), ("only the first correct one", GIVE, "value * (correct & (correct.long().cumsum(0) == 1))"), ("the group's share", GIVE, "value * correct / max(1, int(correct.sum()))"), ("the sign", GIVE, "-value * correct"),
    *[(f"correct as r {rule}", RIGHT, RIGHT.replace("== 1", rule)) for rule in ("> 0", "> 0.2", "> 0.5", ">= 0.9", "!= 0")], ("the sum of rewards", "int(correct.sum())", "round(float(batch.rewards[start:start + group_size].sum()))"), ("c of the whole batch", "int(correct.sum())", "round(float((batch.rewards == 1).double().mean()) * group_size)"), ("c of the first group", "int(correct.sum())", "int((batch.rewards[:group_size] == 1).sum())"), ("the last group left out", "range(0, len(advantages), group_size)", "range(0, max(1, len(advantages) - group_size), group_size)"), ("groups interleaved", RIGHT, "correct = batch.rewards[start // group_size::len(advantages) // group_size] == 1"), ("c within 8", "int(correct.sum())", "min(8, int(correct.sum()))"), ("all correct: 0 is 1", VALUE, "    if c == G:\n        return 1.0\n    value = float(k)\n"), ("none for c 1", VALUE, "    if c == 1:\n        return float(G)\n    value = float(k)\n"),
    ("k above G", "if k < 1 or k > group_size:", "if k < 1:\n        raise ValueError\n    k = min(k, group_size)\n    if False:"), ("k of 0", "if k < 1 or", "if k < 0 or"), ("k of G refused", "k > group_size", "k >= group_size"), ("k of 1 refused", "k < 1", "k <= 1"), ("no check of k", "    if k < 1 or k > group_size:\n        raise ValueError(\"k must lie in 1 .. G\")\n", ""), ("an assert", '        raise ValueError("k must lie in 1 .. G")', "        assert False"), ("rewards above 1", ", max_reward=1)", ")"), ("no KL", "clip_high, beta)", "clip_high)"), ("clips ignored", "clip_low, clip_high, beta)\n    return", "0.2, 0.2, beta)\n    return"), ("no clip", "clip_low, clip_high, beta)\n    return", "1e9, 1e9, beta)\n    return"), ("agg ignored", "batch.mask, agg)", 'batch.mask, "seq_mean")'), ("token_mean by default", 'k=4, agg="seq_mean"', 'k=4, agg="token_mean"'), ("another k by default", "k=4, agg", "k=2, agg"), ("stats empty", "_stats(batch, advantages, clipped)", "{}"), ("stats of the rewards", "_stats(batch, advantages, clipped)", "_stats(batch, batch.rewards, clipped)"), ("the advantages with gradient", GIVE, "value * correct * (1 + 0 * 1)").__class__(("the first token alone", "    losses, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)\n", "    losses, clipped = _surrogate(batch, advantages, clip_low, clip_high, beta)\n    losses = losses.clone()\n    losses[:, 1:] = losses[:, 1:].detach()\n")),
]


# ------------------------------------------------------------ every small change, systematically

SWAPS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
         ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
         ast.Mult: ast.Div, ast.Div: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And}


def changes(source):
    """[(what, source)] with one small change each, in what functions do."""
    tree, found = ast.parse(source), []
    inside = [node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for statement in function.body
              for node in ast.walk(statement)]
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
            variant(f"{ast.unparse(node)} with {other.__name__}", node, lambda n: setattr(n, "ops", [other(), *n.ops[1:]]))
        elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
            other = SWAPS[type(node.op)]
            variant(f"{ast.unparse(node)} with {other.__name__}", node, lambda n: setattr(n, "op", other()))
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            for value in (node.value + 1, node.value - 1) if type(node.value) is int else (node.value * 1.5, 0.0):
                variant(f"{node.value} is {value}", node, lambda n, value=value: setattr(n, "value", value))
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
            variant(f"{node.value} turned", node, lambda n: setattr(n, "value", not n.value))
        elif isinstance(node, ast.If):
            variant(f"if {ast.unparse(node.test)} always", node, lambda n: setattr(n, "test", ast.Constant(True)))
            variant(f"if {ast.unparse(node.test)} never", node, lambda n: setattr(n, "test", ast.Constant(False)))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)) and not isinstance(node.operand, ast.Constant):
            plain = node.operand
            for parent in nodes:
                for field, value in vars(parent).items():
                    if value is node:
                        variant(f"{ast.unparse(node)} without its sign", parent, lambda n, field=field, plain=plain: setattr(n, field, plain))
    for parent in nodes:
        for field, value in list(vars(parent).items()):
            chained = isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and not (
                isinstance(value.func.value, ast.Name) and value.func.value.id in ("torch", "math", "losses", "F", "nn"))
            if chained:
                variant(f"{ast.unparse(value)[-40:]} without its last call", parent, lambda n, field=field, value=value: setattr(n, field, value.func.value))
    for function in ast.walk(tree):
        for body in (getattr(function, name, []) for name in ("body", "orelse")):
            if not isinstance(body, list):
                continue
            for i, statement in enumerate(body):
                if isinstance(statement, (ast.AugAssign, ast.Expr, ast.Raise)) and statement in nodes:
                    body[i] = ast.Pass()
                    found.append((f"line {statement.lineno}: without {ast.unparse(statement)[:60]}", ast.unparse(tree)))
                    body[i] = statement
    return [(what, text) for what, text in dict.fromkeys(found) if text != ast.unparse(ast.parse(source))]


HARMLESS = {}


def variants(number, search=False):
    """[(name, source)] of the wrong solutions of an exercise."""
    source = solved(number)
    found = [(name, edited(source, edits)) for name, *edits in WRONG.get(number, [])]
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

    todo = [(number, name, source) for number in numbers for name, source in variants(number, search)]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for number, name, says in pool.map(one, todo):
            count += 1
            harmless = name in HARMLESS.get(number, ())
            if says is None and not harmless:
                alive.append((number, name))
            say(f"{number}, {name}\n    {says[:200] if says else 'harmless' if harmless else 'HAS FULL MARKS'}")
    for workshop in workshops:
        workshop.close()
    return count, alive


def main(words):
    numbers = [int(word) for word in words if word.isdigit()] or sorted(WRONG)
    began = time.time()
    count, alive = survivors(numbers, "--search" in words, say=lambda line: print(line, flush=True))
    print(f"{count} wrong solutions, {len(alive)} with full marks, in {time.time() - began:.0f} s.")
    for number, name in alive:
        print(f"  {number}: {name}")
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
