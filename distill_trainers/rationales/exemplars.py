"""Worked examples for few-shot prompts, written for this project."""

from __future__ import annotations

from typing import Any

Exemplar = dict[str, Any]  # question, rationale, answer, and, for contrastive prompts, wrong_rationale, wrong_answer

ARITHMETIC: list[Exemplar] = [
    {
        "question": "A shelf holds 14 jars. Nadia takes 5 jars down and puts 8 new ones up. How many jars are on it?",
        "rationale": "The shelf has 14 jars. After 5 are taken, 14 - 5 = 9 are left. With 8 more there are 9 + 8 = 17.",
        "answer": "17",
        "wrong_rationale": "The shelf has 14 jars. After 5 are taken, 14 - 5 = 9 are left. Then 8 more go, 9 - 8 = 1.",
        "wrong_answer": "1",
    },
    {
        "question": "Each of 6 boats carries 7 people, and 4 people wait on the shore. How many people are there?",
        "rationale": "The boats carry 6 * 7 = 42 people. With the 4 on the shore that makes 42 + 4 = 46.",
        "answer": "46",
        "wrong_rationale": "The boats carry 6 + 7 = 13 people. With the 4 on the shore that makes 13 + 4 = 17.",
        "wrong_answer": "17",
    },
    {
        "question": "Tom shares 45 stamps equally among his 3 sisters. Each already had 10. How many has each?",
        "rationale": "Each sister gets 45 / 3 = 15 stamps. Together with the 10 she had, that is 15 + 10 = 25.",
        "answer": "25",
        "wrong_rationale": "Each sister gets 45 / 3 = 15 stamps. The 10 are for all of them, so each has 15.",
        "wrong_answer": "15",
    },
    {
        "question": "A rope is 30 metres long. Two pieces of 8 metres are cut off. How long is what remains?",
        "rationale": "Two pieces of 8 metres are 2 * 8 = 16 metres. What remains is 30 - 16 = 14 metres.",
        "answer": "14",
        "wrong_rationale": "A piece of 8 metres is cut off. What remains is 30 - 8 = 22 metres.",
        "wrong_answer": "22",
    },
]

CHOICE: list[Exemplar] = [
    {
        "question": "Where would you keep milk so that it stays fresh?",
        "choices": ["cupboard", "refrigerator", "window sill"],
        "rationale": "Milk spoils when it is warm. The coldest of these places is a refrigerator.",
        "answer": "(B)",
        "wrong_rationale": "Milk is kept in the kitchen. Most things in a kitchen stand in a cupboard.",
        "wrong_answer": "(A)",
    },
    {
        "question": "What does a person need to row a boat?",
        "choices": ["oars", "sails", "petrol"],
        "rationale": "Rowing moves a boat by muscle. Muscle works on the water through oars.",
        "answer": "(A)",
        "wrong_rationale": "A boat is moved by the wind. The wind pushes against sails.",
        "wrong_answer": "(B)",
    },
    {
        "question": "Which of these floats on water?",
        "choices": ["a nail", "a stone", "a cork"],
        "rationale": "What is lighter than water floats. Iron and stone are heavier than water, cork is lighter.",
        "answer": "(C)",
        "wrong_rationale": "Small things float on water. The smallest of these is a nail.",
        "wrong_answer": "(A)",
    },
]

EXEMPLARS: dict[str, list[Exemplar]] = {"arithmetic": ARITHMETIC, "choice": CHOICE}
