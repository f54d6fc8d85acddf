"""A right solution of exercise 1, unlike the reference: shunting-yard and Fractions."""
from fractions import Fraction

from rewards import answer_of, check_style

BINDS = {"+": 1, "-": 1, "*": 2, "/": 2}


def parse(text):
    if len(text) > 400 or any(c not in "0123456789+-*/() \t\r\n" for c in text):
        return None
    values, ops, depth, after_value, i = [], [], 0, False, 0

    def apply():
        op, right, left = ops.pop(), values.pop(), values.pop()
        (a, x), (b, y) = left, right
        if a is None or b is None or (op == "/" and b == 0):
            value = None
        elif op == "+":
            value = a + b
        elif op == "-":
            value = a - b
        elif op == "*":
            value = a * b
        else:
            value = a / b
        values.append((value, (op, x, y)))

    while i < len(text):
        c = text[i]
        if c in " \t\r\n":
            i += 1
        elif c in "0123456789":
            if after_value:
                return None
            j = i
            while j < len(text) and text[j] in "0123456789":
                j += 1
            if c == "0" and j - i > 1:
                return None
            values.append((Fraction(int(text[i:j])), int(text[i:j])))
            after_value, i = True, j
        elif c == "(":
            depth += 1
            if after_value or depth > 30:
                return None
            ops.append(c)
            i += 1
        elif c == ")":
            if not after_value or depth == 0:
                return None
            while ops[-1] != "(":
                apply()
            ops.pop()
            depth -= 1
            i += 1
        else:
            if not after_value:
                return None
            while ops and ops[-1] != "(" and BINDS[ops[-1]] >= BINDS[c]:
                apply()
            ops.append(c)
            after_value = False
            i += 1
    if not after_value or depth != 0:
        return None
    while ops:
        apply()
    value, tree = values[0]
    return (0, 0, tree) if value is None else (value.numerator, value.denominator, tree)


def countdown_reward(text, numbers, target, style="bare"):
    check_style(style)
    answer = answer_of(text, style)
    node = parse(answer)
    if node is None or node[1] == 0:
        return 0.0
    digits = "".join(c if c in "0123456789" else " " for c in answer)
    used = [int(word) for word in digits.split()]
    left = list(numbers)
    for n in used:
        if n not in left:
            return 0.0
        left.remove(n)
    if left:
        return 0.0
    return 1.0 if Fraction(node[0], node[1]) == target else 0.0
