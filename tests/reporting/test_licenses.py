"""What follows from licences, case by case, and what cards say."""

import pytest

from distill_trainers.cards.licenses import LICENSES, Licensed, inherit, licensed, terms_of


def _inherit(teacher=None, student="apache-2.0", data="mit", name=None, chosen=None):
    sources = [Licensed("teacher", "org/big", teacher)] if teacher else []
    sources += [Licensed("student", "org/small", student, "its card names none")]
    return inherit([*sources, Licensed("data", "org/rows", data, "its card names none")], name, chosen)


@pytest.mark.parametrize(
    "teacher, student, data, expected",
    [
        ("mit", "apache-2.0", "cc-by-4.0", "apache-2.0"),  # nothing is passed on: that of the weights
        (None, "mit", "apache-2.0", "mit"),
        ("gemma", "apache-2.0", "mit", "gemma"),
        ("apache-2.0", "apache-2.0", "cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("apache-2.0", "apache-2.0", "cc-by-sa-4.0", "cc-by-sa-4.0"),
        ("llama3.1", "llama3.1", "mit", "llama3.1"),
        ("bigscience-openrail-m", "apache-2.0", "mit", "bigscience-openrail-m"),
        ("gemma", "llama3.2", "mit", "gemma and llama3.2"),
        ("llama2", "llama2", "mit", "llama2"),
    ],
)
def test_what_is_passed_on(teacher, student, data, expected):
    found = _inherit(teacher, student, data)
    assert not found.conflicts and not found.unknown and found.license == expected


@pytest.mark.parametrize(
    "teacher, student, data, says",
    [
        ("llama2", "apache-2.0", "mit", "improve no other language models"),
        ("llama3", "gemma", "mit", "improve no other language models"),
        ("gemma", "apache-2.0", "cc-by-sa-4.0", "no terms but its own"),
        ("mit", "gpl-3.0", "cc-by-nc-4.0", "no terms but its own"),
        ("mit", "cc-by-sa-4.0", "gpl-3.0", "no terms but its own"),
        ("mit", "cc-by-nc-nd-4.0", "mit", "no derivatives"),
    ],
)
def test_conflicts(teacher, student, data, says):
    found = _inherit(teacher, student, data)
    assert len(found.conflicts) == 1 and says in found.conflicts[0]
    assert found.license is None and found.metadata() == {}


def test_a_user_may_decide_and_is_warned_all_the_same():
    found = _inherit("llama2", chosen="apache-2.0")
    assert found.conflicts and found.metadata() == {"license": "apache-2.0"}


@pytest.mark.parametrize("name, conflicts", [("me/Llama-mine", 0), ("me/mine", 1), (None, 0)])
def test_names_that_llama_asks_for(name, conflicts):
    assert len(_inherit("llama3.1", name=name).conflicts) == conflicts


def test_unknown_is_said_and_nothing_guessed():
    for found in (_inherit("mit", data=None), _inherit("house-licence-1.0")):
        assert len(found.unknown) == 1 and found.license is None and not found.conflicts
    assert "asks is not known here; read it" in _inherit("house-licence-1.0").unknown[0]


def test_several_terms_are_named_together():
    found = _inherit("gemma", "llama3.2").metadata()
    assert found == {"license": "other", "license_name": "gemma-and-llama3.2", "license_link": "README.md"}


def test_every_pattern_is_reached():
    """An earlier pattern must not hide a later one."""
    for pattern, terms in LICENSES.items():
        assert terms_of(pattern.replace("*", "x")) is terms, pattern


@pytest.mark.parametrize(
    "card, expected",
    [
        ("---\nlicense: MIT\n---\n", "mit"),
        ("---\nlicense: [cc-by-4.0]\n---\n", "cc-by-4.0"),
        ("---\nlicense: other\nlicense_name: house\n---\n", "house"),
        ("---\nlicense: unknown\n---\n", None),
        ("---\nlicense: [mit, gpl-3.0]\n---\n", None),
        ("---\ntags: [a]\n---\n", None),
        ("MIT, says the text", None),
        (None, None),
    ],
)
def test_cards_in_folders(tmp_path, card, expected):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    (tmp_path / "rows.jsonl").write_text("")
    for source in (tmp_path, tmp_path / "rows.jsonl"):
        found = licensed("data", str(source))
        assert found.license == expected and str(tmp_path.parent) not in found.name + found.why
        assert bool(found.why) == (expected is None)


def test_cards_on_the_hub(hub):
    hub.add("org/big", "---\nlicense: gemma\n---\n")
    hub.add("org/rows", "---\nlicense: [odc-by]\n---\n", kind="datasets")
    hub.add("them/secret", "---\nlicense: mit\n---\n", private=True)
    assert licensed("teacher", "org/big").license == "gemma"
    assert licensed("data", "org/rows").license == "odc-by"
    hidden = licensed("student", "them/secret")
    assert hidden.license is None and "could not be read (RepositoryNotFoundError)" in hidden.why


def test_offline_is_unknown():
    found = licensed("teacher", "org/never-asked-before")
    assert found.license is None and "OfflineModeIsEnabled" in found.why
