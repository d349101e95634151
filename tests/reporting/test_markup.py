"""Text of data and models never becomes markup."""

import json

from distill_trainers.reporting.markup import data_script, el, figure, join, missing, shortened, stacked, table, visible

HOSTILE = "</script><script>alert(1)</script><!-- \" ' & \u202e\x00"


def test_children_and_attributes_are_escaped():
    assert el("p", HOSTILE, title=HOSTILE) == (
        '<p title="&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;!-- &quot; &#x27; &amp; ‹U+202E›‹U+0000›">'
        "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;!-- &quot; &#x27; &amp; ‹U+202E›‹U+0000›</p>"
    )


def test_elements():
    assert el("p", "a", None, ["b", el("b", "c")], class_="x", aria_label="y", hidden=True, open=False) == (
        '<p class="x" aria-label="y" hidden>ab<b>c</b></p>'
    )
    assert el("input", type="search") == '<input type="search">'
    assert join(["<", el("i", 1)]) == "&lt;<i>1</i>"


def test_what_hides_or_reorders_is_named():
    assert visible("a\u202eb\u200bc\ufeff\x1b[0m\ud800") == "a‹U+202E›b‹U+200B›c‹U+FEFF›‹U+001B›[0m‹U+D800›"
    assert visible("tab\tline\nend\r\n") == "tab\tline\nend\n"
    assert visible("👩\u200d💻 می\u200cخواهم") == "👩\u200d💻 می\u200cخواهم"  # joiners are part of words


def test_long_text_is_cut_and_says_so():
    assert shortened("short", 10) == "short"
    assert shortened("x" * 1_000_000, 10) == "xxxxxxxxxx… (+999,990)"
    assert shortened("abcde\u0301fg", 5) == "abcd… (+4)"  # an accent stays with its letter


def test_data_cannot_end_its_element():
    script = data_script({"text": HOSTILE})
    inner = script.removeprefix('<script type="application/json">').removesuffix("</script>")
    assert not set(inner) & set("<>&") and json.loads(inner) == {"text": HOSTILE}


def test_tables_name_their_rows_and_columns():
    made = table("Title <b>", ["", "one"], [["row", "1"]])
    assert "<caption><span>Title &lt;b&gt;</span></caption>" in made and 'aria-label="Title &lt;b&gt;"' in made
    assert '<th scope="col">one</th>' in made and '<th scope="row">row</th><td>1</td>' in made
    assert 'tabindex="0"' in made  # it scrolls by itself


def test_small_parts():
    assert stacked("0.3 [0.1, 0.5]") == '0.3<small class="interval">[0.1, 0.5]</small>'
    assert stacked("–") == "–"
    assert "<figcaption><b>t</b></figcaption>" in figure("t", el("svg"))
    assert missing("a ", el("code", "b")) == '<p class="missing">a <code>b</code></p>'
