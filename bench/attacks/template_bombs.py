"""Chat templates that take the time or the memory of whoever runs them.

`RENDERED` go off when a conversation asks for them: one template holds them all, behind a word of the first message.
`COMPILED` are whole templates that go off when they are opened, or whose every use is refused.
"""

_C = "(messages[0]['role'][0])"  # a letter, which no compiler can know beforehand
_N = "(6 * (messages[0]['content']|length - messages[0]['content']|length + 1000000000))"  # six thousand millions
_NAMESPACE = "{% set ns = namespace(x=" + _C + ", n=3, l=[1]) %}"


def _grown(step: str, n: int = 60) -> str:
    return _NAMESPACE + "{% for i in range(" + str(n) + ") %}" + step + "{% endfor %}{{ ns.x|length }}"


def _loops(depth: int, n: int = 99999, body: str = "") -> str:
    begin = "".join("{% for i" + str(level) + " in range(" + str(n) + ") %}" for level in range(depth))
    return begin + body + "{% endfor %}" * depth


_MACROS = "".join(
    "{% macro m" + str(level) + "() %}" + ("{{ m" + str(level - 1) + "() }}") * 10 + "{% endmacro %}"
    for level in range(1, 12)
)
"""Each calls the one before ten times."""

RENDERED: tuple[str, ...] = (
    _loops(2),
    _loops(3),
    _loops(2, 90_000, "{{ 'a' }}"),
    _loops(1, 99999, "{% for c in 'a' * 99999 %}{% if c == 'b' %}x{% endif %}{% endfor %}"),
    "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro m0() %}aaaaaaaaaa{% endmacro %}" + _MACROS + "{{ m11() }}",
    *(f"{{{{ {_C}.{name}({_N})|length }}}}" for name in ("ljust", "rjust", "center", "zfill")),
    f"{{{{ ('\\t' * 1000).expandtabs({_N})|length }}}}",
    f"{{{{ ('%' ~ {_N} ~ 'd') % 1 }}}}",
    f"{{{{ ('%0' ~ {_N} ~ 'd')|format(1) }}}}",
    f"{{{{ ('%.' ~ {_N} ~ 'f')|format(1.5) }}}}",
    f"{{{{ '%*d'|format({_N}, 1) }}}}",
    f"{{{{ ('{{:>' ~ {_N} ~ '}}').format(1) }}}}",
    f"{{{{ '{{:.{{}}f}}'.format(1.5, {_N}) }}}}",
    f"{{{{ {_C}|center({_N}) }}}}",
    f"{{{{ {_C}|indent({_N}, true) }}}}",
    f"{{{{ ({_C} ~ '\\n' * 1000)|indent(9999999) }}}}",
    f"{{{{ messages|tojson(indent={_N}) }}}}",
    f"{{{{ [[[[[[[[1]]]]]]]]|tojson(indent=({_N} / 100)|int) }}}}",
    f"{{{{ range(99999)|slice({_N})|list|length }}}}",
    f"{{{{ range(99999)|batch({_N}, 1)|list|length }}}}",
    f"{{{{ {_C}.translate({{97: 'b' * 99999, 117: 'b' * 999999}})|length }}}}",
    "{{ ('u' * 99999).translate({117: 'b' * 99999})|length }}",
    f"{{{{ (({_C} * 9999).replace('', 'b' * 99999))|length }}}}",
    "{{ ('b' * 99999).join('a' * 99999)|length }}",
    "{{ ['b' * 999999] * 99999 }}",
    f"{{{{ lipsum(n={_N}) }}}}",
    "{{ lipsum(n=1, min=99999999, max=100000000) }}",
    _grown("{% set ns.x = ns.x ~ ns.x %}"),
    _grown("{% set ns.x = ns.x + ns.x %}"),
    _grown("{% set ns.x = [ns.x, ns.x]|join %}"),
    _grown("{% set ns.x = ns.x.replace('u', 'uu') %}"),
    _grown("{% set ns.l = ns.l + ns.l %}"),
    _grown("{% set ns.n = ns.n * ns.n %}"),
    _grown("{% set ns.n = ns.n * 99999999999999999 %}", 99999),
    _grown("{% set ns.l = [ns.l] %}", 99999) + "{{ ns.l }}",
    _grown("{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    _grown("{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l|tojson }}",
    "{{ ('9' * 999999)|int }}",
    "{{ range(99999)|list|sort(reverse=true)|map('string')|join|wordwrap(1)|length }}"
    "{% for i in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999)|list|length }}{% endfor %}",
    "{{ (('a' * 999999) ~ ' ')|urlize|length }}" + _loops(1, 99999, "{{ ('a.' * 99999)|urlize }}"),
    "{% for i in range(99999) %}{{ ('a' * 999999)|upper|lower|title }}{% endfor %}",
    "{{ raise_exception('x' * 1000000) }}",
    "{{ strftime_now('%Y%c' * 250000) }}",
    f"{{% filter center({_N}) %}}a{{% endfilter %}}",
    "{% for i in range(99999) %}{{ 'a' * 999999 }}{% endfor %}",
)

_NORMAL = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"


def armed_template(bombs: tuple[str, ...] = RENDERED) -> str:
    """A template that writes a conversation as any other does, unless its first message is `bomb N`."""
    cases = (
        "{% " + ("elif" if n else "if") + f" messages[0]['content'] == 'bomb {n}' %}}{bomb}"
        for n, bomb in enumerate(bombs)
    )
    return "".join(cases) + "{% else %}" + _NORMAL + "{% endif %}"


COMPILED: tuple[str, ...] = (
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ " + "[" * 100_000,
    "{{ " + "not " * 20_000 + "1 }}",
    "{% if 1 %}" * 400 + "{% endif %}" * 400,
    "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
    "{{ 'a'|center(6000000000) }}",
    "{{ ('a' * 1000000)|indent(width=6000000) }}",
    "{{ 'a'|center(999999999)|upper|lower|title|length }}",
    "{{ '%099999999999d'|format(1) }}",
    "{{ x" + ".a" * 60_000 + " }}",
    "{{ " + "9" * 200_000 + " }}",
    "{{ " + "'a' ~ " * 30_000 + "'a' }}",
    "{% macro a() %}{{ b }}{% endmacro %}" * 6000,
    "{% include 'x' %}",
)
