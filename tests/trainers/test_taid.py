"""TAID inside GKD: the target moves with training, survives a resume, and evaluation does not move."""

import pytest

from distill_trainers.toy import addition_dataset


def settings(**more):
    return {"divergence": "taid", "lmbda": 0.0, "max_steps": 6, **more}


def test_t_rises_to_the_teacher(make_trainer):
    trainer = make_trainer(**settings())
    assert trainer.taid_schedule.t == 0.4
    trainer.train()
    assert trainer.taid_schedule.t == pytest.approx(1.0)


def test_fixed_t_does_not_move(make_trainer):
    assert make_trainer(**settings(t=0.5)).taid_schedule is None


def test_evaluation_is_at_the_end_of_the_schedule(make_trainer):
    trainer = make_trainer(**settings(), eval_dataset=addition_dataset(8))
    scores = trainer.evaluate()
    assert scores["eval_loss"] == pytest.approx(scores["eval_kl"], rel=1e-5)  # t = 1 is forward KL


def test_resume_goes_on_with_the_schedule(make_trainer, die_at, by_step, tmp_path):
    whole = make_trainer(**settings(output_dir=str(tmp_path / "whole")))
    whole.train()
    cut = settings(output_dir=str(tmp_path / "cut"), save_strategy="steps", save_steps=2)
    with pytest.raises(die_at.error):
        make_trainer(**cut, callbacks=[die_at(3)]).train()
    again = make_trainer(**cut)
    again.train(resume_from_checkpoint=True)
    losses, resumed = by_step(whole), by_step(again)
    assert {step: losses[step] for step in (3, 4, 5, 6)} == {step: resumed[step] for step in (3, 4, 5, 6)}
    assert again.taid_schedule.state_dict() == whole.taid_schedule.state_dict()
