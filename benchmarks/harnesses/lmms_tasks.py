# SPDX-License-Identifier: Apache-2.0
"""Our tasks as local tasks of lmms-eval: a Parquet file and a YAML file for each, no network.

``python -m vtc.benchmarks.harnesses.lmms_tasks scenes --n 500 --out tasks``, then
``lmms-eval --include_path tasks --tasks vtc_scenes``. Questions, answers and their normalisation
are those of ``vtc bench``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..tasks.items import score
from ..tasks.registry import TASKS, Task


def write(folder: Path, name: str, n: int | None = 500, seed: int = 0) -> str:
    """Write a task into a folder and return the name that lmms-eval knows it by.

    Args:
        name: of a task of ours; n: number of questions, all of them if None.
    """
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    task = "vtc_" + name.replace("-", "_")
    rows = [
        {"image": item.image, "question": item.question, "answer": item.answer, "kind": item.kind}
        for item in Task(name, n=n, seed=seed)
    ]
    file = (folder / f"{task}.parquet").resolve()
    datasets.Dataset.from_list(rows).to_parquet(str(file))
    config: dict[str, Any] = {
        "task": task,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_visual": "image",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": 6},
        "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in config.items()]  # JSON is YAML
    lines.append(f"process_results: !function {__package__}.lmms_tasks.process_results")
    (folder / f"{task}.yaml").write_text("\n".join(lines) + "\n")
    return task


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The accuracy of one answer, as lmms-eval asks for it."""
    return {"accuracy": float(score(results[0], doc["answer"]))}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vtc.benchmarks.harnesses.lmms_tasks",
        description="Write a task of vtc bench as a local task of lmms-eval.",
        epilog="Example: python -m vtc.benchmarks.harnesses.lmms_tasks scenes --n 500 --out tasks",
    )
    parser.add_argument("task", choices=[*TASKS])
    parser.add_argument("--n", type=int, default=500, help="questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("tasks"), help="folder")
    args = parser.parse_args()
    task = write(args.out, args.task, args.n, args.seed)
    print(f"lmms-eval --model vtc --include_path {args.out} --tasks {task}")


if __name__ == "__main__":
    main()
