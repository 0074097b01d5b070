#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Write the ranges of fastops/_word_break.py from the Unicode character database.

Usage: ``python tools/make_word_break.py FOLDER``, where FOLDER holds auxiliary/WordBreakProperty.txt and
emoji/emoji-data.txt (Debian's package unicode-data: /usr/share/unicode). What stands between the module's two marks is
replaced.
"""

import re
import sys
import textwrap
from pathlib import Path

MODULE = Path(__file__).resolve().parents[1] / "fastops" / "_word_break.py"
BEGIN, END = "# Begin of what tools/make_word_break.py writes.\n", "# End of what tools/make_word_break.py writes.\n"
# Emoji that may follow a joiner (WB3c); not a value of Word_Break.
EMOJI = "Extended_Pictographic"


def read(path: Path) -> tuple[str, dict[str, list[tuple[int, int]]]]:
    """Version of a database file, and for each property value its ranges: sorted, neighbours joined."""
    version = ""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        found = re.match(r"# (?:.*?-([\d.]+)\.txt|Version: ([\d.]+))", line)
        if found and not version:
            version = found[1] or found[2]
        fields = line.partition("#")[0].split(";")
        if len(fields) == 2:
            first, _, last = fields[0].strip().partition("..")
            ranges.setdefault(fields[1].strip(), []).append((int(first, 16), int(last or first, 16)))
    for value, items in ranges.items():
        joined: list[tuple[int, int]] = []
        for first_, last_ in sorted(items):
            if joined and joined[-1][1] + 1 == first_:
                joined[-1] = (joined[-1][0], last_)
            else:
                joined.append((first_, last_))
        ranges[value] = joined
    return version, ranges


def text(ranges: list[tuple[int, int]]) -> str:
    """Ranges in hexadecimal: "41-5a aa"."""
    return " ".join(f"{first:x}" if first == last else f"{first:x}-{last:x}" for first, last in ranges)


def main(folder: Path) -> None:
    """Replace the module's generated part."""
    version, words = read(folder / "auxiliary" / "WordBreakProperty.txt")
    _, emoji = read(folder / "emoji" / "emoji-data.txt")
    lines = [f'UNICODE_VERSION = "{version}"\n', "RANGES: dict[str, str] = {\n"]
    for value, ranges in [*sorted(words.items()), (EMOJI, emoji[EMOJI])]:
        pieces = textwrap.wrap(text(ranges), 100)
        if len(pieces) == 1:
            lines.append(f'    "{value}": "{pieces[0]}",\n')
        else:
            lines.append(f'    "{value}": (\n')
            lines += [f'        "{piece} "\n' for piece in pieces[:-1]]
            lines += [f'        "{pieces[-1]}"\n', "    ),\n"]
    lines.append("}\n")
    source = MODULE.read_text(encoding="utf-8")
    before, rest = source.split(BEGIN)
    after = rest.split(END)[1]
    MODULE.write_text("".join([before, BEGIN, *lines, END, after]), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
