"""Question answering on real data: easy-vqa's questions through the evaluate command, and the generation benchmark."""

import json
import tarfile
from pathlib import Path

from blipren.training.commands.evaluate import EvaluateSettings
from blipren.training.evaluation.evaluate import evaluate
from tests.common.processes import process_server


def test_easy_vqa(shared_data, seeing, tmp_path):
    data = tmp_path / "easy-vqa"
    (data / "images").mkdir(parents=True)
    with tarfile.open(shared_data("easy-vqa") / "easy_vqa_data.tar.gz") as archive:
        names = {Path(name).parts[-3:]: name for name in archive.getnames() if "/test/" in f"/{name}"}
        questions = json.load(archive.extractfile(next(n for n in names.values() if n.endswith("questions.json"))))
        rows = {}
        for question, answer, image in questions:
            if image < 12:
                row = rows.setdefault(image, {"file_name": f"images/{image}.png", "questions": [], "answers": []})
                row["questions"].append(question)
                row["answers"].append(answer)
        for image, row in rows.items():
            member = next(n for n in names.values() if n.endswith(f"/images/{image}.png"))
            (data / row["file_name"]).write_bytes(archive.extractfile(member).read())
    (data / "metadata.jsonl").write_text("".join(json.dumps(row | {"split": "test"}) + "\n" for row in rows.values()))
    evaluate(
        EvaluateSettings(
            model=str(seeing), dataset=str(data), out=str(tmp_path / "out"), tasks=["vqa"], device="cpu", resamples=50,
            max_new_tokens=6, attention_images=1,
        )
    )  # fmt: skip
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    asked = sum(len(set(row["questions"])) for row in rows.values())
    assert metrics["vqa"]["questions"] == asked and metrics["vqa"]["images"] == len(rows) == 12
    assert 0 <= metrics["vqa"]["accuracy"] <= 1 and "what color" in metrics["vqa"]["by_question_type"]
    assert "captioning" not in metrics and metrics["image_use"]["verdict"]
    answers = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(answers) == asked and all(len(answer["references"]) >= 1 for answer in answers)
    assert (tmp_path / "out" / "report.html").exists()


def test_generation_benchmark_runs(seeing, colours, tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "generate.py"
    words = [str(seeing), str(colours), "--out", str(tmp_path / "out.json")]
    words += "--images 4 --rounds 1 --batch-size 4 --max-new-tokens 12 --device cpu".split()
    program = process_server().start(words, tmp_path / "output.txt", program=str(script))
    output, _ = program.communicate()
    assert program.returncode == 0, output
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["images"] == 4 and result["equal_captions"] == 1 and result["ratio"] > 0
    assert set(result["arms"]) == {"one by one", "batches of 4"}
