"""Generation speed with a draft model, by the share of its tokens that are accepted, compared with none.

The model has the shape of configs/small.yaml, a vocabulary of 2,048 tokens and random weights; the draft model is its
first block with the same embedding and head. What the other seven blocks add is multiplied by a factor, so that the two
models agree always, often or seldom. Runs with and without the draft model alternate, and must give the same tokens.

    .venv/bin/python benchmarks/speculative.py
"""

import argparse
import json
import statistics
import time
from pathlib import Path

HERE = Path(__file__).parent
FACTORS, TOKENS = (0.0, 0.1, 0.2, 0.3), 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "speculative.json")
    arguments = parser.parse_args()
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()
    import mlx.core as mx
    import numpy as np

    from anarchobot.config.loading import load_config
    from anarchobot.config.schema import GenerationConfig
    from anarchobot.inference.batching import Batch
    from anarchobot.inference.model import Model
    from anarchobot.inference.speculative import Draft, SpeculativeBatch
    from anarchobot.model.parameters import init_parameters

    shape = load_config(HERE.parent / "configs" / "small.yaml").config.model
    shape = shape.model_copy(update={"vocab_size": 2048, "sliding_window": None})
    one_block, rng = shape.model_copy(update={"n_layers": 1}), np.random.default_rng(0)
    weights = {
        name: array + 0.05 * rng.standard_normal(array.shape).astype(np.float32)
        for name, array in init_parameters(shape, 0).items()
    }
    prompt, rows = [7 * i % 1000 + 100 for i in range(32)], []

    def run(batch: Batch, settings: GenerationConfig) -> tuple[float, list[int | None]]:
        batch.insert(prompt, settings, ())
        tokens, start = [], time.perf_counter()
        while batch:
            tokens += [output.token for output in batch.step()]
        return time.perf_counter() - start, tokens

    for factor in FACTORS:
        params, drafts = {}, {}
        for name, array in weights.items():
            is_later = name.startswith("model.layers.") and not name.startswith("model.layers.0.")
            adds = is_later and ("o_proj" in name or "down_proj" in name)
            params[name] = mx.array(array * factor if adds else array)
            if not is_later:
                drafts[name] = params[name]
        mx.eval(params)
        for method in ("greedy", "random"):
            settings = GenerationConfig(method=method, temperature=1.0, max_new_tokens=TOKENS)
            ratios = []
            for _ in range(arguments.rounds + 1):
                draft = Draft(Model(drafts, one_block, None))  # type: ignore[arg-type]  # no text
                seconds, tokens = run(Batch(params, shape), settings)
                with_draft, same = run(SpeculativeBatch(params, shape, draft=draft), settings)
                assert tokens == same, "other tokens with the draft model"
                ratios.append(seconds / with_draft)
            accepted = draft.accepted / draft.proposed
            ratio = round(statistics.median(ratios[1:]), 2)  # the first is a warm-up
            rows.append({"factor": factor, "method": method, "accepted": round(accepted, 2), "speed": ratio})
            print(f"{method}: {accepted:.0%} accepted, {ratio:.2f} times the speed", flush=True)
    arguments.output.write_text(json.dumps({"device": str(mx.default_device()), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
