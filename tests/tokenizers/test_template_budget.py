"""Hostile templates are rejected before they take time or memory; all others render as in Jinja's own sandbox."""

import tracemalloc

import pytest
import transformers.utils.chat_template_utils as theirs

from anarchobot.config.errors import UserError
from anarchobot.tokenizers import template_budget
from anarchobot.tokenizers.chat_template import ChatTemplate
from anarchobot.tokenizers.conversation import InvalidRow, Message
from tests.tokenizers.templates import dialogue, to_dicts

TALK = (Message("user", "a x b x c"),)
X = "x" * 1000
TEXT = "{% set a = '" + X + "' %}"
LIST = "{% set r = range(300) | list %}"
LOOPS = "{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}"
HUNDRED = "{% for i in range(100) %}"
END = "{% endfor %}"
DICT = "{% set d = {" + ", ".join(f"{i}: 0" for i in range(300)) + "} %}"
# Containers that hold the previous one twice: 2 ** 16 items, in 16 objects.
TWINS = (
    "{% set ns = namespace(a=[1], b=[1], t=(1,)) %}{% for i in range(16) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% set ns.b = [ns.b, ns.b] %}{% set ns.t = (ns.t, ns.t) %}{% endfor %}"
)
# Each takes too much by one kind of operation, and would end soon without the payment for it.
HOSTILE = {
    "loops": LIST + LOOPS,
    "filtered loop": LIST + "{% for i in r %}{% for j in r if false %}{% endfor %}{% endfor %}",
    "filter of a loop": TWINS + "{% for i in [1] if ns.a %}{% endfor %}",
    "recursive loop": "{% for i in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 16 }}{% endfor %}",
    "ranges": HUNDRED + "{% set r = range(10000) %}" + END,
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(16) }}",
    "calls": "{% macro f() %}{% endmacro %}" + HUNDRED + "{% set x = [" + "f(), " * 20 + "] %}" + END,
    "text": HUNDRED + X + END,
    "constant texts": HUNDRED + "{% set x = '" + X + "' %}" + END,
    "constant integers": HUNDRED + "{% set x = i + " + "9" * 4000 + " %}" + END,
    "many nodes": HUNDRED + "{% set x = [" + "i, " * 500 + "] %}" + END,
    "text of a macro": "{% macro f() %}" + X + "{% endmacro %}" + HUNDRED + "{% set x = f() %}" + END,
    "text of a caller": "{% macro f() %}" + HUNDRED + "{% set x = caller() %}" + END + "{% endmacro %}"
    "{% call f() %}" + X + "{% endcall %}",
    "text of a block": "{% if false %}{% block b %}" + X + "{% endblock %}{% endif %}"
    + HUNDRED + "{% set x = self.b() %}" + END,
    "loops in a scoped block": LIST
    + "{% for k in [1] %}{% block b scoped %}" + LOOPS + "{% endblock %}" + END,
    "generation": LIST + "{% generation %}" + LOOPS + "{% endgeneration %}",
    "linked list": "{% set ns = namespace(t=()) %}" + HUNDRED + "{% set ns.t = (ns.t, '" + X + "' ~ i) %}" + END,
    "repetition": "{{ 'x' * 10000000 }}",
    "repeated list": "{{ (1000000 * [1]) | length }}",
    "sum": "{% set ns = namespace(s='x') %}{% for i in range(20) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "added constants": TEXT + HUNDRED + "{% set b = a + 'y' %}" + END,
    "differences": DICT + "{% set view = d.keys() %}" + HUNDRED + "{% set x = view - view %}" + END,
    "concatenation": "{% set ns = namespace(s='x') %}{% for i in range(20) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "power": "{% set x = 10 ** 10000 %}",
    "powers": "{% set ns = namespace(n=9) %}{% for i in range(12) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "output": TEXT + HUNDRED + "{{ a }}" + END,
    "printed twins": TWINS + "{{ ns.a }}",
    "more twins": TWINS.replace("range(16)", "range(20)") + "{{ ns.a }}",
    "printed namespace": TWINS + "{{ ns }}",
    "printed keys": "{% set d = {'" + X + "': 1} %}" + HUNDRED + "{{ d }}" + END,
    "printed values": TWINS + "{{ {1: ns.t} }}",
    "joined twins": TWINS + "{{ 'a' ~ ns.a }}",
    "lists of equal twins": TWINS + "{{ [ns.a] == [ns.b] }}",
    "equal twins": TWINS + "{{ ns.a == ns.b }}",
    "twins less than twins": TWINS + "{{ 1 if ns.a < ns.b }}",
    "searched twins": TWINS + "{{ ns.a in [ns.b] }}",
    "twins searched for": TWINS + "{{ ns.t in {} }}",
    "tested twins": TWINS + "{{ ns.a is eq ns.b }}",
    "filtered twins": TWINS + "{{ ns.a | string | length }}",
    "JSON twins": TWINS + "{{ ns.a | tojson | length }}",
    "twins as a key": TWINS + "{{ {ns.t: 1} | length }}",
    "twins as an index": TWINS + "{{ messages[0][ns.t] }}",
    "twins in a call": TWINS + "{{ messages[0].get(ns.t) }}",
    "twins as keys of a dictionary": TWINS + "{{ dict([[ns.t, 1]]) | length }}",
    "index in a list": LIST + "{% set a = [" + "r, " * 100 + "] %}{{ a.index(r[:-1] + [9]) }}",
    "itself": "{% set ns = namespace() %}{% set ns.n = [ns] %}{{ ns.n }}",
    "slices": TEXT + HUNDRED + "{% set b = a[1:] %}" + END,
    "searches": TEXT + HUNDRED + "{% set b = 'yx' in a %}" + END,
    "methods": TEXT + HUNDRED + "{% set b = a.upper() %}" + END,
    "other methods": TEXT + HUNDRED + "{% set b = a.isalnum() %}" + END,
    "methods of ranges": "{% set r = range(1000) %}" + HUNDRED + "{% set b = r.count('x') %}" + END,
    "methods of views": DICT + "{% set view = d.keys() %}" + HUNDRED + "{% set b = view.isdisjoint([]) %}" + END,
    "methods of dictionaries": DICT + HUNDRED + "{% set b = d.copy() %}" + END,
    "filters": TEXT + HUNDRED + "{% set b = a | upper %}" + END,
    "filters of lists": LIST + HUNDRED + "{% set b = r | list %}" + END,
    "arguments of filters": TEXT + HUNDRED + "{% set b = 'x' | replace(a, '') %}" + END,
    "chains of lazy filters": LIST + "{% set ns = namespace(r=r) %}" + HUNDRED + "{% set ns.r = ns.r | select %}" + END
    + "{{ ns.r | list | length }}",
    "prefixes": TEXT + "{{ a.startswith(('y',) * 300) }}",
    "width of a filter": "{{ 'x' | center(1000000) }}",
    "width of a method": "{{ 'x'.ljust(1000000) }}",
    "width in a format": "{{ ('%1000000d' % 1) | length }}",
    "width in a format filter": "{{ ('%1000000d' | format(1)) | length }}",
    "width in a method": "{{ '{:1000000}'.format(1) | length }}",
    "variable width": "{{ ('%*d' % (1000000, 1)) | length }}",
    "variable width in a method": "{{ '{:{}}'.format(1, 1000000) | length }}",
    "repeated fields": TEXT + "{{ ('{0}' * 1000).format(a) | length }}",
    "formatted twins": TWINS + "{{ '{}'.format(ns.a) | length }}",
    "replace method": TEXT + "{{ a.replace('x', a) | length }}",
    "replace filter": TEXT + "{{ a | replace('x', a) | length }}",
    "join method": TEXT + "{{ a.join(a) | length }}",
    "join filter": TEXT + "{{ a | join(a) | length }}",
    "indent filter": "{{ ('\n' * 1000) | indent(1000, blank=true) | length }}",
    "strip": TEXT + "{{ a.strip('b' * 1000 + 'x') }}",
    "trim": TEXT + "{{ a | trim('b' * 1000 + 'x') }}",
    "search from the right": TEXT + "{{ a.rfind('b' + 'x' * 500) }}",
    "methods of safe text": TEXT + "{{ (a | safe).rfind('b' + 'x' * 500) }}",
    "batch": "{{ [1] | batch(1000000, 0) | list | length }}",
    "slice": "{{ [1] | slice(1000000) | list | length }}",
    "round": "{{ 1 | round(1000000, 'floor') }}",
    "JSON indent": "{{ [[1]] | tojson(indent=1000000) }}",
    "JSON separators": TEXT + "{{ ('xy' * 1000).split('x') | tojson(separators=(a, a)) | length }}",
    "attributes": "{% set ns = namespace() %}{% set ns.n = ns %}"
    "{% set x = [" + "ns, " * 99 + "] | map(attribute='n.' * 999 + 'n') | list %}",
    "lists of ranges": HUNDRED + "{% set x = range(300) | list %}" + END,
    "sums of lists": "{{ ([[1]] * 100) | sum(start=[]) | length }}",
    "bytes": "{{ (5).to_bytes(9, 'big') | length }}",
    "integers of bytes": "{{ (5).from_bytes([255] * 9, 'big') > 1 }}",
    "tags in safe text": "{{ ('<>' | safe).striptags() }}",
    "deep tuple": "{% set ns = namespace(t=()) %}" + HUNDRED + "{% set ns.t = (ns.t,) %}" + END + "{{ ns.t in {} }}",
    "encodings": "{{ ('x' * 1000).encode('punycode') }}",
    "tabs": "{{ ('\t' * 1000).expandtabs(1000) | length }}",
    "date": "{{ strftime_now('%999d' * 100) | length }}",
    "large integer": "{{ (('f' * 2000) | int(base=16)) > 1 }}",
    "lorem ipsum": "{% set x = lipsum(100) %}",
}  # fmt: skip


REASONS = (
    "it takes too much work", "an integer that is too large", "a format whose widths", r"\w+ is not supported",
    "sum is only supported", "tojson: indent", "containers nested too deeply", "'lipsum' is undefined",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_rejected_within_a_few_megabytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_budget, "BASE", 0)  # for speed: about 20,000 are left
    template = ChatTemplate(HOSTILE[name], {}, "t")
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRow, match=rf"rejected by the chat template \(({'|'.join(REASONS)})"):
            template.render(TALK)
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["striptags", "urlize", "wordwrap", "pprint"])
def test_filters_that_can_take_very_long_are_unknown(name: str) -> None:
    with pytest.raises(UserError, match=f"^t: invalid chat template: No filter named '{name}'"):
        ChatTemplate("{{ 'a' | " + name + " }}", {}, "t")


@pytest.mark.parametrize(
    "source",
    ["{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "a" * 100_001, "{{ [" * 3000 + "] }}" * 3000],
    ids=["loops", "long", "deep"],
)
def test_sources_that_cannot_be_compiled_are_one_line_errors(source: str) -> None:
    with pytest.raises(UserError, match=r"^t: invalid chat template: .+") as error:
        ChatTemplate(source, {}, "t")
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


def test_the_budget_grows_with_the_conversation() -> None:
    """Each character is paid for many times over, also in long conversations."""
    source = (
        "{% set ns = namespace(all='') %}{% for message in messages %}{% for i in range(12) %}"
        "{% if message.content | trim | upper | lower == 'x' %}{% endif %}{% endfor %}"
        "{% set ns.all = ns.all + message.content %}{% endfor %}{{ ns.all | length }}"
    )
    template = ChatTemplate(source, {}, "t")
    for turns, characters in ((1, 1_000_000), (300, 200), (100, 2000)):
        conversation = dialogue(*["a" * characters] * turns)
        assert template.render(conversation) == str(turns * characters)


EXPRESSIONS = """messages | map(attribute='role') | map('upper') | join(', ')
messages | selectattr('role', 'equalto', 'user') | list | length
messages | rejectattr('role', 'in', ['user']) | map(attribute='content') | list
(messages | groupby('role'))[0].grouper
messages[::-1] | first | tojson(indent=2)
messages[1:] == messages[-1:]
messages[-1] in messages
messages[0] is mapping and messages is not mapping and 'a' is string
{'b': 1, 'a': [1, 2.5, none, true]} | tojson(separators=(',', ':'), sort_keys=true)
{'b': 1, 'a': 2} | dictsort
{'b': 1, 'a': 2}.items() | list
dict(a=1, b=2).get('c', 3)
'%05.1f|%s|%-8s|' % (1.25, 'x', 'y')
'%(a)s' | format(a=3)
'{:>8}|{a:,}'.format('x', a=1234567)
('a-b-' * 3).rsplit('-', 1)[0].replace('-', '+').partition('+')
[3, 1, 2] | sort(reverse=true) | join('<')
[1, 2, 2] | unique | list + [3] * 2
['a', 'b'] | batch(3, '-') | list
[1, 2, 3, 4] | slice(3) | list
range(5) | sum + 2 ** 10 - 7 // 2 % 3
('x\\ny' | indent(2, true)) ~ 5 ~ none ~ [1]
' a ' | trim ~ 'xax' | trim('x')
'a b' | title | wordcount
'<a&b>' | e ~ ('<' | safe)
(3.14159 | round(2)) ~ ('7' | int + 1) ~ ('ff' | int(base=16))
namespace(a=5000000).a > loop_index | default(10000000)
cycler('a', 'b').next()
'a' < 'b' < 'c' and not 1 > 2
'abc'[1] ~ 'abc'[:-1] ~ ['a', 'b'][1]
'a,b'.split(',') | last | center(5)
','.join(messages | map(attribute='role'))
'x'.startswith(('a', 'x')) and 'x'.isalpha()
[[1, 2], [3]] | map('sum') | list
messages | map('length') | max"""


@pytest.mark.parametrize("expression", EXPRESSIONS.split("\n"))
def test_honest_expressions_render_as_in_transformers(expression: str) -> None:
    source = "{% for i in [0] %}{% set x = " + expression + " %}{{ x }}|{{ " + expression + " }}{% endfor %}"
    talk = dialogue("How are <you>?", "Fine.\n ", "a", "b")
    expected = theirs.render_jinja_template([to_dicts(talk)], chat_template=source)[0][0]
    assert ChatTemplate(source, {}, "t").render(talk) == expected


def test_honest_statements_render_as_in_transformers() -> None:
    source = """{% macro show(m, n=2) %}{{ m.role ~ n }}{{ varargs }}{{ caller() if caller }}{% endmacro %}
    {%- block b %}{% call show(messages[0], 3) %}inside{% endcall %}{% endblock %}{{ self.b() }}
    {%- filter upper %}{% set x %}a{{ 1 }}{% endset %}{{ x }}{% endfilter %}
    {%- for a in [[1, [2]], [3]] recursive %}{{ loop(a) if a is sequence else a }}{{ loop.depth }}{% endfor %}
    {%- for m in messages if m.role == 'user' %}{{ loop.length }}{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}
    {%- else %}none{% endfor %}{% for x in [] %}{% else %}empty{% endfor %}{% with y = 2 %}{{ y }}{% endwith %}
    {%- autoescape true %}{{ '<' }}<{{ '<' ~ messages[0].content }}{% endautoescape %}"""
    talk = dialogue("<a>", "b", "c", "d")
    expected = theirs.render_jinja_template([to_dicts(talk)], chat_template=source)[0][0]
    assert ChatTemplate(source, {}, "t").render(talk) == expected
