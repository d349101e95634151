"""The demo, from a teacher that is there already: what it says at its end, and what lies in its folder."""

from __future__ import annotations

import json

from distill_trainers.cli import main
from distill_trainers.toy import addition_rows, character_tokenizer, tiny_llama


def test_the_demo_ends_with_size_nearness_and_answers(tmp_path, capsys):
    tokenizer, out = character_tokenizer(), tmp_path / "demo"
    tiny_llama(tokenizer, 32, 4, seed=0).save_pretrained(out / "teacher")
    tokenizer.save_pretrained(out / "teacher")
    rows = [json.dumps({"prompt": row["prompt"]}) for row in addition_rows()[:24]]
    for name, part in (("train", rows[:16]), ("held", rows[16:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
    (tmp_path / "recipe.yaml").write_text(
        "method: gkd\nstudent_init: {from_teacher: true, keep_layers: 3}\nseq_kd: true\nlmbda: 0.0\nuse_cpu: true\n"
        f"dataset: {tmp_path}/train.jsonl\neval_dataset: {tmp_path}/held.jsonl\nmax_steps: 2\nmax_new_tokens: 4\n"
        "output_dir: unused\nlogging_steps: 1\nreport_to: none\n"
    )
    for _ in range(2):  # once more in the same folder starts anew
        command = ["demo", "--teacher-wheel", "none", "--output-dir", str(out), "--config", f"{tmp_path}/recipe.yaml"]
        assert main(command) == 0
    shown = capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    models = {"teacher", "student before", "student after"}
    assert [set(sample) for sample in metrics["samples"]] == [{"prompt", *models}] * 6
    assert metrics["samples"][0]["prompt"].replace(" ", "") == json.loads(rows[16])["prompt"], "the first held out"
    scores = metrics["scores"]
    smaller = 1 - scores["student after"]["parameters"] / scores["teacher"]["parameters"]
    assert 0 < smaller < 0.25 and f"{smaller:.1%} fewer parameters" in shown
    assert f"{scores['student after']['kl']:.2f} nats per token" in shown
    assert 0 < scores["teacher"]["bits_per_byte"] < scores["student before"]["bits_per_byte"] + 1
    assert (out / "report.html").is_file() and str(out / "report.html") in shown
