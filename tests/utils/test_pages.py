"""Pages from templates: what is put in is text, not markup, and nothing is left out unnoticed."""

import jinja2
import pytest

from utils.pages import render


def test_values_are_text_whatever_is_in_them(tmp_path):
    template = tmp_path / "page.html.jinja"
    template.write_text("<p title=\"{{ a }}\">{{ b | join('<br>' | safe) }}</p>\n", encoding="utf-8")
    page = render(template, a='"猫"', b=["<b>", "{{ a }}"])
    assert page == '<p title="&#34;猫&#34;">&lt;b&gt;<br>{{ a }}</p>\n'


def test_a_value_that_is_lacking_is_an_error(tmp_path):
    template = tmp_path / "page.html.jinja"
    template.write_text("{{ title }}", encoding="utf-8")
    with pytest.raises(jinja2.UndefinedError, match="title"):
        render(template, name="x")
