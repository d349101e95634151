"""Licences listed and warned about, and what cards say."""

import pytest

from distill_trainers.cards.licenses import LICENSES, Licensed, inherit, known_of, licensed


def _inherit(teacher=None, student="apache-2.0", data="mit", name=None, chosen=None):
    sources = [Licensed("teacher", "org/big", teacher)] if teacher else []
    sources += [Licensed("student", "org/small", student, "its card names none")]
    return inherit([*sources, Licensed("data", "org/rows", data, "its card names none")], name, chosen)


@pytest.mark.parametrize("license_id", ["mit", "gemma", "cc-by-nc-4.0", "cc-by-sa-4.0", "llama3.1", "llama2"])
def test_one_licence_of_all_is_the_students(license_id):
    terms = _inherit(license_id, license_id, license_id)
    assert not terms.conflicts and not terms.unknown and terms.metadata() == {"license": license_id}
    assert _inherit(None, license_id, license_id).license == license_id


@pytest.mark.parametrize(
    "teacher, student, data, says",
    [
        ("mit", "apache-2.0", "cc-by-4.0", "credit its authors"),
        ("gemma", "apache-2.0", "mit", "models trained on its outputs are under its terms too"),
        ("apache-2.0", "apache-2.0", "cc-by-nc-4.0", "no commercial use"),
        ("apache-2.0", "apache-2.0", "cc-by-sa-4.0", "under this licence alone"),
        ("bigscience-openrail-m", "apache-2.0", "mit", "restrictions of use"),
        ("llama2", "apache-2.0", "mit", "improve no other language models"),
        ("llama3", "gemma", "mit", "improve no other language models"),
    ],
)
def test_licences_that_differ_are_listed_and_none_is_named(teacher, student, data, says):
    terms = _inherit(teacher, student, data)
    assert terms.license is None and terms.metadata() == {} and not terms.conflicts
    assert terms.unknown == [terms.difference()] and "set `card_license`" in terms.difference()
    assert all(license_id in terms.difference() for license_id in (teacher, student, data))
    assert any(says in note for note in terms.notes)


@pytest.mark.parametrize("license_id", ["cc-by-nd-4.0", "cc-by-nc-nd-4.0"])
def test_no_derivatives_is_a_conflict(license_id):
    terms = _inherit(license_id, license_id, license_id)
    assert terms.license is None and all("no derivatives" in conflict for conflict in terms.conflicts)
    assert len(terms.conflicts) == 3


def test_a_user_may_decide_and_is_warned_all_the_same():
    terms = _inherit("llama2", chosen="apache-2.0")
    assert terms.difference() in terms.unknown and terms.metadata() == {"license": "apache-2.0"}
    named = _inherit("llama2", chosen="our terms").metadata()
    assert named == {"license": "other", "license_name": "our-terms", "license_link": "README.md"}


@pytest.mark.parametrize("name, conflicts", [("me/Llama-mine", 0), ("me/mine", 1), (None, 0)])
def test_names_that_llama_asks_for(name, conflicts):
    assert len(_inherit("llama3.1", name=name).conflicts) == conflicts


def test_unknown_is_said_and_nothing_guessed():
    for terms in (_inherit("mit", "mit", data=None), _inherit(*["house-licence-1.0"] * 3)):
        assert terms.unknown and terms.license is None and not terms.conflicts and not terms.difference()
    assert "asks is not known here; read it" in terms.unknown[0]


def test_every_pattern_is_reached():
    """An earlier pattern must not hide a later one."""
    for pattern, said in LICENSES.items():
        assert known_of(pattern.replace("*", "x")) == said, pattern


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
