"""Write lm-evaluation-harness tasks for local copies of PIQA and BLiMP, so that they run offline.

    python benchmarks/make_tasks.py --data ../shared/data --out /tmp/tasks
    secateur eval smollm2 --tasks piqa_local,blimp_local --task-dir /tmp/tasks

PIQA is scored as the harness's own `piqa` is; BLiMP's six sets are one group, its accuracy their mean.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

PIQA = """task: piqa_local
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
validation_split: validation
output_type: multiple_choice
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1.0
"""
BLIMP = """task: blimp_local_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {data}
validation_split: train
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"
num_fewshot: 0
metric_list:
  - metric: acc
metadata:
  version: 1.0
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with piqa-valid.jsonl, its labels, and blimp/")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write(args.data.resolve(), args.out.resolve())


def write(data: Path, out: Path) -> None:
    """Write the YAML files, and PIQA's questions with their labels in one file."""
    out.mkdir(parents=True, exist_ok=True)
    questions = [json.loads(line) for line in (data / "piqa-valid.jsonl").read_text().splitlines()]
    labels = [int(line) for line in (data / "piqa-valid-labels.lst").read_text().split()]
    merged = [question | {"label": label} for question, label in zip(questions, labels, strict=True)]
    (out / "piqa.jsonl").write_text("".join(json.dumps(record) + "\n" for record in merged))
    (out / "piqa_local.yaml").write_text(PIQA.format(data=out / "piqa.jsonl"))
    names = sorted(path.stem for path in (data / "blimp").glob("*.jsonl"))
    for name in names:
        (out / f"blimp_local_{name}.yaml").write_text(BLIMP.format(name=name, data=data / "blimp" / f"{name}.jsonl"))
    members = "\n".join(f"  - blimp_local_{name}" for name in names)
    (out / "blimp_local.yaml").write_text(
        f"group: blimp_local\ntask:\n{members}\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
        "metadata:\n  version: 1.0\n"
    )


if __name__ == "__main__":
    main()
