"""Right and wrong answers over the forms that answer columns have, for ``math_answer``: (gold,
other ways to say it, wrong ones).

The wrong ones are fragments of the gold and what differs from it in one sign, digit or bracket.
"""

from __future__ import annotations

MATH: list[tuple[str, list[str], list[str]]] = [
    # whole numbers, decimals, separators, signs
    ("72", ["72", "72.0", "72.", r"72\text{ clips}", r"\$72"], ["7", "2", "27", "-72", "72.5"]),
    ("1234", ["1,234", "1{,}234", r"1,\!234", "1234"], ["1", "234", "1.234"]),
    ("-5", ["-5", "\u22125", "-5.0"], ["5"]),
    ("0", ["0", "0.0"], ["1", "O"]),
    ("0.5", [r"\frac{1}{2}", r"\frac12", "1/2", "0.50", ".5"], ["5", "1", "2", "0.05"]),
    ("3.75", [r"\frac{15}{4}", r"3\frac{3}{4}", "3.750"], ["3", "75", "4"]),
    (r"0.\overline{3}", [r"\frac{1}{3}", r"0.\overline{3}"], ["0.3", "3", "0"]),
    ("1000000", ["1,000,000", "10^6", r"1\times10^{6}", "1e6"], ["1", "10", "6"]),
    # fractions and mixed numbers
    (
        r"\frac{3}{4}",
        [r"\dfrac{3}{4}", r"\frac34", "0.75", "3/4", r"\frac{6}{8}"],
        ["3", "4", r"\frac{4}{3}"],
    ),
    (r"-\frac{2}{3}", [r"\frac{-2}{3}", "-2/3"], [r"\frac{2}{3}", "2", "-2"]),
    (r"2\frac{1}{4}", [r"\frac{9}{4}", "2.25"], ["2", r"\frac{1}{4}", r"\frac{1}{2}"]),
    (r"\frac{\pi}{6}", [r"\frac{1}{6}\pi", r"\pi/6"], [r"\pi", "6", r"\frac{6}{\pi}"]),
    (
        r"\frac{\sqrt{3}}{2}",
        [r"\frac12\sqrt{3}", r"\sqrt{\frac{3}{4}}"],
        ["3", "2", r"\sqrt{3}", r"\frac{3}{2}"],
    ),
    # roots, powers, factorials, constants
    (
        r"11\sqrt2",
        [r"11\sqrt{2}", r"\sqrt{242}", r"\sqrt{2}\cdot 11"],
        ["11", "2", r"\sqrt{2}", "22"],
    ),
    (r"5\sqrt{3}", [r"\sqrt{75}"], ["5", "3", r"5\sqrt{7}"]),
    (r"\sqrt[3]{2}", [r"2^{1/3}"], ["2", "3", r"\sqrt{2}"]),
    ("2^{10}", ["1024", r"2^{10}"], ["2", "10", "20", "210"]),
    ("7!", ["5040", "7!"], ["7", "5041"]),
    (r"7\pi", [r"7\pi", r"\pi\cdot7"], ["7", r"\pi", r"8\pi"]),
    (r"16\pi\text{ square units}", [r"16\pi"], ["16", r"\pi"]),
    (r"6 \times 10^{4}", ["60000", r"6\cdot10^4"], ["6", "10", "4", "600000"]),
    (r"1.5\times10^5", ["150000", "1.5e5"], ["1.5", "5", "10"]),
    (r"\binom{5}{2}", ["10"], ["5", "2"]),
    (r"\log 3", [r"\log 3"], ["3"]),
    (r"\tan 30^\circ", [r"\frac{\sqrt{3}}{3}"], ["30"]),
    ("e^{2}", ["e^2"], ["2", "e"]),
    # units, money, percent, angles
    (r"5\text{ cm}", ["5"], ["6"]),
    (r"50\%", ["50", r"50\%"], ["5", "0"]),
    (r"\$18", ["18"], ["8", "1"]),
    (r"90^\circ", ["90"], ["9", "0"]),
    (r"10\text{ inches}", ["10", r"10\text{ inches}"], ["1"]),
    ("3 hours", ["3"], ["4"]),
    # polynomials, equations, inequalities
    ("4x-9", ["-9+4x", "4x - 9"], ["4", "9", "4x", "4x+9"]),
    ("y=2x+3", ["y=2x+3", "y = 3+2x"], ["3", "2", "y=2x", "y=2x-3"]),
    ("x^2+1", ["1+x^2"], ["2", "1", "x^2", "x+1"]),
    (r"\frac{1}{3}n(n-1)", [r"\frac{n(n-1)}{3}"], [r"\frac{1}{3}", "1", "n"]),
    ("(x+1)(x-2)", ["x^2-x-2", "(x-2)(x+1)"], ["1", "2", "x+1"]),
    ("9k", ["9k"], ["9", "k"]),
    ("x=5", ["5", "x=5"], ["6", "x=6"]),
    (r"x \le 5", [r"x\leq 5"], ["5", r"x\ge 5"]),
    ("x<3", ["x < 3"], ["3", "x>3"]),
    # complex numbers, pairs, sets, intervals, matrices
    ("2+3i", ["3i+2"], ["2", "3", "3i", "2-3i"]),
    (r"8 - 3\sqrt{2}", [r"-3\sqrt{2}+8"], ["8", "2", r"8+3\sqrt{2}"]),
    (
        r"(3, \frac{\pi}{2})",
        [r"\left( 3, \frac{\pi}{2} \right)", r"\left(3,\frac{\pi}{2}\right)"],
        ["3", r"\frac{\pi}{2}", r"(\frac{\pi}{2},3)"],
    ),
    ("(1,2)", ["(1, 2)"], ["(2,1)", "1", "2"]),
    ("(1,2,3)", ["(1, 2, 3)"], ["(1,2)", "3", "(3,2,1)"]),
    (r"\{1,2,3\}", [r"\{3,1,2\}", "1, 2, 3"], [r"\{1,2\}", "3"]),
    ("2, 5", ["5, 2", r"\{2,5\}"], ["2", "5", "2, 6"]),
    (r"3 \text{ and } 8", ["3, 8"], ["3", "8"]),
    (r"\pm 4", ["-4, 4", "4, -4"], ["4", "-4"]),
    (r"(-\infty, 6)", [r"(-\infty,6)"], ["6", r"(-\infty, 6]", r"(6,\infty)"]),
    ("[0,1)", ["[0, 1)"], ["[0,1]", "(0,1)", "0", "1"]),
    (r"[1,2]\cup[3,4]", [r"[1,2] \cup [3,4]", r"[3,4]\cup[1,2]"], ["[1,2]", "4", "[1,4]"]),
    (
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
        [r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"],
        [r"\begin{pmatrix}1&2\\4&3\end{pmatrix}", "1", "4"],
    ),
    ("5:6", [r"\frac{5}{6}"], ["5", "6", "6:5"]),
    # words, letters, bases
    (r"\text{Thursday}", ["Thursday", r"\text{thursday}"], [r"\text{Friday}", "Tuesday"]),
    ("east", ["east", r"\text{East}"], ["west", "seat", "teas"]),
    ("no", [r"\text{No}", "no"], ["on", "yes"]),
    ("True", ["true"], ["False"]),
    (r"\text{(C)}", ["C", r"\text{C}", "(C)"], ["D", "(B)"]),
    (r"\text{even}", ["even"], ["odd"]),
    ("12_8", ["12_8", "12_{8}"], ["12", "12_9", "8"]),
]


def table() -> list[tuple[str, str, float]]:
    """(gold, said, verdict)."""
    return [
        (gold, said, verdict)
        for gold, *both in MATH
        for verdict, texts in zip((1.0, 0.0), both, strict=True)
        for said in texts
    ]
