"""The texts that benchmarks read. corpora.json names their sources on GitHub, by commit and SHA-256. They are
downloaded once, to build/texts; `--data FOLDER` reads a folder that has texts of the same names instead.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CATALOG: dict[str, dict[str, Any]] = json.loads((HERE / "corpora.json").read_text(encoding="utf-8"))
HOST = "https://raw.githubusercontent.com/"
DOWNLOADED = HERE.parent / "build" / "texts"
PROSE = [name for name in CATALOG if name.startswith("text/") and name.endswith(".txt")]  # English
BOOKS = [name for name in CATALOG if name.startswith("text/books/")]


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("ANARCHOBOT_TEST_DATA"),
        help="folder with the texts (default: ANARCHOBOT_TEST_DATA, else download them to build/texts)",
    )


def flags(data: Path | None) -> list[str]:
    """The flags that give another process the same texts."""
    return [] if data is None else ["--data", str(data)]


def find(data: Path | None, *names: str) -> list[Path]:
    """The files of the texts. Ends the program with one line that says which is missing and why."""
    if data is not None:
        for name in names:
            if not (data / name).is_file():
                sys.exit(f"{data / name}: no such file: the folder of --data or ANARCHOBOT_TEST_DATA needs it")
        return [data / name for name in names]
    if unknown := [name for name in names if name not in CATALOG]:
        sys.exit(f"{', '.join(unknown)}: can't be downloaded: give a folder that has them with --data")
    return [_download(name) for name in names]


def _download(name: str) -> Path:
    path = DOWNLOADED / name
    if path.is_file():
        return path
    parts = []
    for source, digest in CATALOG[name]["sources"].items():
        print(f"downloading {HOST}{source}", file=sys.stderr, flush=True)
        try:
            with urllib.request.urlopen(HOST + source, timeout=60) as response:
                content = response.read()
        except OSError as error:  # also URLError and a timeout
            sys.exit(f"{HOST}{source}: can't download it: {error}: give a folder with {name} with --data")
        if hashlib.sha256(content).hexdigest() != digest:
            sys.exit(f"{HOST}{source}: other content than expected (SHA-256): give a folder with {name} with --data")
        parts.append(content.decode("utf-8").replace("\r\n", "\n"))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text("".join(FORMS[CATALOG[name]["form"]](parts)), encoding="utf-8", newline="")
    partial.replace(path)
    return path


def _lines(rows: Iterator[dict[str, Any]]) -> list[str]:
    return [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]


def _chapters(parts: list[str]) -> list[str]:
    return _lines({"text": text} for part in parts for text in re.split(r"^(?=## )", part, flags=re.M)[1:])


def _paragraphs(parts: list[str]) -> list[str]:
    """Headings and paragraphs of the body of TEI files, one a line."""
    lines = []
    for part in parts:
        (body,) = ElementTree.fromstring(part).iter("{http://www.tei-c.org/ns/1.0}body")
        texts = (" ".join("".join(e.itertext()).split()) for e in body.iter() if e.tag.endswith(("}p", "}head")))
        lines += [f"{text}\n" for text in texts if text]
    return lines


def _pubmedqa(parts: list[str]) -> list[str]:
    rows = sorted(json.loads(parts[0]).items())
    return _lines(
        {"question": row["QUESTION"], "abstract": " ".join(row["CONTEXTS"]), "conclusion": row["LONG_ANSWER"]}
        for _, row in rows
    )


def _dialogues(parts: list[str]) -> list[str]:
    roles = {"USER": "user", "SYSTEM": "assistant"}
    return _lines(
        {"messages": [{"role": roles[turn["speaker"]], "content": turn["utterance"]} for turn in dialogue["turns"]]}
        for part in parts
        for dialogue in json.loads(part)
    )


FORMS: dict[str, Callable[[list[str]], list[str]]] = {
    "text": lambda parts: parts,
    "chapters": _chapters,
    "tei": _paragraphs,
    "pubmedqa": _pubmedqa,
    "dialogues": _dialogues,
}
