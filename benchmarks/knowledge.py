"""How long a search takes in a knowledge base of 100,000 passages, and how often it finds what it should.

The passages: PubMedQA's abstracts, cut as `kb add` cuts them, and, up to the number, two pieces of other real text each
(books, Wikipedia, biomedical articles), drawn anew: words are as common and as rare as in text. The questions:
PubMedQA's, and hard ones of nothing but common words. One process, one thread: wall and CPU time of a search; on a
shared machine the second is the steadier.

    .venv/bin/python benchmarks/knowledge.py
    .venv/bin/python benchmarks/knowledge.py --passages 20000
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from anarchobot.config.schema import DataConfig, KnowledgeBaseConfig
from anarchobot.data.sources.documents import Counts
from anarchobot.knowledge import knowledge_base, ranking
from anarchobot.knowledge.knowledge_base import KnowledgeBase
from anarchobot.knowledge.passages import CHARS, passages

HERE = Path(__file__).parent
TEXTS = ("text/*.txt", "text/books/*.txt", "biomedical/*.txt")
COMMON = ("what is it about?", "who was the one that had been there with them when it was so?", "the of and in to a is")
ASKED, VOTES = 300, 10_000


def write_texts(data: Path, path: Path, number: int) -> None:
    """JSONL of so many texts of one passage each."""
    files = sorted(file for pattern in TEXTS for file in data.glob(pattern))
    pieces = [piece for file in files for piece in passages(file.read_text(encoding="utf-8"), CHARS // 2)]
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as out:
        for _ in range(number):
            out.write(json.dumps({"text": draw.choice(pieces) + draw.choice(pieces)}) + "\n")


def timed(base: KnowledgeBase, questions: list[str]) -> tuple[dict[str, float], list[list[str]]]:
    """Milliseconds of a search, and the sources that each question found."""
    wall, cpu, found = [], [], []
    for question in questions:
        cpu_began, wall_began = time.process_time(), time.perf_counter()
        hits = base.search(question)
        wall.append(1e3 * (time.perf_counter() - wall_began))
        cpu.append(1e3 * (time.process_time() - cpu_began))
        found.append([hit.source for hit in hits])
    figures = {"median": statistics.median(wall), "worst": max(wall)}
    figures |= {"cpu_median": statistics.median(cpu), "cpu_worst": max(cpu)}
    return {name: round(value, 1) for name, value in figures.items()}, found


def share(found: list[list[str]], pubmed: Path) -> float:
    return sum(f"{pubmed}:{row}" in sources for row, sources in enumerate(found, start=1)) / len(found)


def measure(data: Path, number: int, folder: Path) -> dict[str, Any]:
    pubmed, texts = data / "biomedical" / "pubmedqa.jsonl", folder / "texts.jsonl"
    questions = [json.loads(line)["question"] for line in pubmed.read_bytes().split(b"\n") if line][:ASKED]
    results: dict[str, Any] = {}
    with KnowledgeBase(folder / "kb.db", KnowledgeBaseConfig(), create=True) as base:
        base.add(pubmed, DataConfig(text_field="abstract"), Counts())
        write_texts(data, texts, number - base.documents()[0].passages)
        began = time.perf_counter()
        base.add(texts, DataConfig(), Counts())
        results["add_seconds"] = round(time.perf_counter() - began, 1)
        results["passages"] = sum(held.passages for held in base.documents())
        results["megabytes"] = round((folder / "kb.db").stat().st_size / 1e6, 1)
        results["questions"], found = timed(base, questions)
        results["found_in_first_3"] = round(share(found, pubmed), 4)
        results["common_words_only"], _ = timed(base, [*COMMON] * 5)
        limit = ranking.MOST_PASSAGES
        ranking.MOST_PASSAGES = knowledge_base.MOST_PASSAGES = 10**9
        results["all_words"], found = timed(base, questions[:100])
        results["all_words_found_in_first_3_of_100"] = round(share(found, pubmed), 4)
        ranking.MOST_PASSAGES = knowledge_base.MOST_PASSAGES = limit
        _, found = timed(base, questions[:100])
        results["found_in_first_3_of_100"] = round(share(found, pubmed), 4)
        draw = random.Random(1)
        for _ in range(VOTES // 100):
            base.feedback(draw.choice(questions), draw.sample(range(1, 1300), 100), draw.choice([1.0, -1.0]))
        results[f"with_{VOTES}_votes"], _ = timed(base, questions)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(os.environ.get("ANARCHOBOT_TEST_DATA", HERE.parents[1] / "shared" / "data"))
    parser.add_argument("--data", type=Path, default=default, help="a folder with text/*.txt and biomedical/")
    parser.add_argument("--passages", type=int, default=100_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(args.data, args.passages, Path(folder))
    print(f"{results['passages']:,} passages, {results['megabytes']} MB, added in {results['add_seconds']} s\n")
    print("| search | median ms | worst | CPU, median | CPU, worst |\n| --- | ---: | ---: | ---: | ---: |")
    for name, row in results.items():
        if isinstance(row, dict):
            print(f"| {name.replace('_', ' ')} | " + " | ".join(f"{value}" for value in row.values()) + " |")
    print(f"\nfound in the first 3: {results['found_in_first_3']:.1%}")
    output = HERE / "results" / "knowledge.json"
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{output.relative_to(HERE.parent)} written")


if __name__ == "__main__":
    main()
