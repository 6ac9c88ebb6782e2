"""Three steps of every family as a student, each taught by the next one: python family_runs.py FOLDER.

In FOLDER: each family's model under its name, and ``data``. Written: ``results.json``.
"""

import json
import sys
from pathlib import Path

import families
import tiny

from vlm_distill.config.sections import RunConfig
from vlm_distill.runtime.launch import leave
from vlm_distill.runtime.processes import Processes
from vlm_distill.trainer import Trainer


def main(folder: Path) -> None:
    processes = Processes("cpu")
    names = [name for name in families.FAMILIES if (folder / name).is_dir()]
    results = {}
    for student, teacher in zip(names, names[1:] + names[:1], strict=True):
        plain = tiny.config(
            folder / "runs" / student,
            folder / "data" / "data.jsonl",
            folder / teacher,
            student={"path": str(folder / student)},
            loss=[{"name": "forward_kl"}, {"name": "cross_entropy", "weight": 0.5}],
            data__max_length=2048,
            training__steps=3,
            training__batch_size=4,
        )
        trainer = Trainer(RunConfig.model_validate(plain), processes)
        parts = trainer.student.parts
        before = {part: [p.detach().clone() for p in module.parameters()] for part, module in parts.items()}
        trainer.run()
        lines = [json.loads(line) for line in (folder / "runs" / student / "metrics.jsonl").read_text().splitlines()]
        results[student] = {
            "teacher": teacher,
            "lines": [line for line in lines if line["kind"] == "train"],
            "moved": {
                part: any(not a.equal(b) for a, b in zip(before[part], module.parameters(), strict=True))
                for part, module in parts.items()
            },
        }
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    with families.num2words():
        main(Path(sys.argv[-1]))
    leave(0)
