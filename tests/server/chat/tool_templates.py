"""Chat templates in the manner of each family of models that calls tools, with what is particular to it."""

HERMES = """{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}# Tools
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>
For each function call: <tool_call>{"name": <function-name>, "arguments": <args-json-object>}</tool_call><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' %}<|im_start|>assistant
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}{% if m.content or not loop.first %}{{ '\n' }}{% endif %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {% if call.function.arguments is string -%}
{{ call.function.arguments }}{% else %}{{ call.function.arguments | tojson }}{% endif %}}
</tool_call>{% endfor %}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""

QWEN_CODER = (
    HERMES.split("For each function call")[0]
    + """Call: <tool_call><function=name><parameter=key>value</parameter></function></tool_call><|im_end|>
{% endif %}
{%- for m in messages %}{% if m.role != 'tool' %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>
<function={{ call.function.name }}>
{% for key, value in call.function.arguments | items %}<parameter={{ key }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor %}</function>
</tool_call>{% endfor %}<|im_end|>
{% else %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
).replace("{% elif messages[0].role == 'system' %}", "{% elif false %}")

MISTRAL = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}{% if tools and loop.index0 == 0 %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]
{%- endif %}[INST]{{ m.content }}[/INST]
{%- elif m.tool_calls %}[TOOL_CALLS][{% for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
{%- endif %}{{ (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}{% if not loop.last %}, {% endif %}
{%- endfor %}]{{ eos_token }}
{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}
{%- elif m.role == 'tool' %}{% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}
{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif -%}
[TOOL_RESULTS]{"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

MISTRAL_ARGS = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- elif m.role == 'user' %}{% if tools and loop.first %}[AVAILABLE_TOOLS]
{{- tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}
[INST]{{ m.content }}[/INST]
{%- elif m.role == 'assistant' %}{% if m.content is string %}{{ m.content }}{% else %}{% for block in m.content %}
{%- if block.type == 'thinking' %}[THINK]{{ block.thinking }}[/THINK]{% else %}{{ block.text }}{% endif %}{% endfor %}
{%- endif %}{% for call in m.tool_calls or [] %}[TOOL_CALLS]{{ call.function.name }}[ARGS]
{%- if call.function.arguments is string %}{{ call.function.arguments }}{% else %}{{ call.function.arguments | tojson }}
{%- endif %}{% endfor %}{{ eos_token }}
{%- else %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% endif %}{% endfor %}"""

LLAMA3 = """{{ bos_token }}<|start_header_id|>system<|end_header_id|>

{% if tools %}Environment: ipython
{% endif %}{% set rest = messages %}{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}
{%- set rest = messages[1:] %}{% endif %}<|eot_id|>
{%- for m in rest %}{% if m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>

{{ m.content | tojson }}<|eot_id|>
{%- elif m.tool_calls %}{% if m.tool_calls | length != 1 %}
{{- raise_exception('This model only supports single tool-calls at once!') }}{% endif -%}
<|start_header_id|>assistant<|end_header_id|>

{% set f = m.tool_calls[0].function %}{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}<|eot_id|>
{%- else %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{% if tools and loop.first %}Respond with {"name": function name, "parameters": dictionary}.
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

HARMONY = """<|start|>system<|message|>Reasoning: {{ reasoning_effort or 'medium' }}
# Valid channels: analysis, commentary, final.<|end|>
{%- set rest = messages %}{% set told = '' %}{% if messages[0].role in ('system', 'developer') %}
{%- set told = messages[0].content %}{% set rest = messages[1:] %}{% endif %}
{%- if told or tools %}<|start|>developer<|message|>{{ told }}{% for tool in tools or [] %}
type {{ tool.function.name }} = (_: {{ tool.function.parameters | tojson }}) => any;{% endfor %}<|end|>{% endif %}
{%- for m in rest %}{% if m.role == 'assistant' %}{% if 'tool_calls' in m %}
{%- if m.content and m.thinking %}{{ raise_exception('Cannot pass both content and thinking!') }}{% endif %}
{%- if m.content or m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.content or m.thinking }}<|end|>
{%- endif %}{% set call = m.tool_calls[0].function %}<|start|>assistant to=functions.
{{- call.name }}<|channel|>commentary json<|message|>{{ call.arguments | tojson }}<|call|>
{%- else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}
{%- elif m.role == 'tool' %}<|start|>functions.{{ m.name }} to=assistant<|channel|>commentary<|message|>
{{- m.content | tojson }}<|end|>
{%- else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""

GLM = """[gMASK]<sop>{% if tools %}<|system|>
# Tools{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
Call: <tool_call>{function-name}
<arg_key>{arg-key-1}</arg_key>
<arg_value>{arg-value-1}</arg_value>
</tool_call>{% endif %}{% for m in messages %}{% if m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}<|observation|>{% endif %}
<tool_response>
{{ m.content }}
</tool_response>{% elif m.role == 'assistant' %}<|assistant|>
<think>{{ m.reasoning_content or '' }}</think>{% if m.content %}
{{ m.content }}{% endif %}{% for call in m.tool_calls or [] %}
<tool_call>{{ call.function.name }}
{% for key, value in call.function.arguments.items() %}<arg_key>{{ key }}</arg_key>
<arg_value>{{ value if value is string else value | tojson }}</arg_value>
{% endfor %}</tool_call>{% endfor %}{% else %}<|{{ m.role }}|>
{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{%- if enable_thinking is defined and not enable_thinking %}
<think></think>{% endif %}{% endif %}"""

DEEPSEEK = """{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
{%- for tool in tools or [] %}
{{ tool.function | tojson }}{% endfor %}{% for m in messages %}
{%- if m.role == 'user' %}<｜User｜>{{ m.content }}
{%- elif m.role == 'assistant' %}<｜Assistant｜></think>{{ m.content }}
{%- if m.tool_calls %}<｜tool▁calls▁begin｜>{% for call in m.tool_calls %}<｜tool▁call▁begin｜>
{{- call.function.name }}<｜tool▁sep｜>{{ call.function.arguments | tojson }}<｜tool▁call▁end｜>{% endfor -%}
<｜tool▁calls▁end｜>{% endif %}<｜end▁of▁sentence｜>
{%- elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}{% endif %}"""

DEEPSEEK_R1 = DEEPSEEK.replace(
    "{{- call.function.name }}<｜tool▁sep｜>{{ call.function.arguments | tojson }}",
    "function<｜tool▁sep｜>{{ call.function.name }}\n```json\n{{ call.function.arguments | tojson }}\n```",
).replace("{{ '<think>' if thinking else '</think>' }}", "<think>\n")

GEMMA4 = """{%- macro argument(value) %}{% if value is string %}<|"|>{{ value }}<|"|>
{%- elif value is boolean %}{{ 'true' if value else 'false' }}
{%- elif value is mapping %}{ {%- for key, inner in value | dictsort %}{{ key }}:{{ argument(inner) }}
{%- if not loop.last %},{% endif %}{% endfor %}}
{%- elif value is sequence %}[{% for inner in value %}{{ argument(inner) }}
{%- if not loop.last %},{% endif %}{% endfor %}]
{%- else %}{{ value }}{% endif %}{% endmacro %}
{{- bos_token }}{% set rest = messages %}{% if tools or messages[0].role == 'system' or enable_thinking %}<|turn>system
{% if enable_thinking %}<|think|>
{% endif %}{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set rest = messages[1:] %}{% endif %}
{%- for tool in tools or [] %}<|tool>declaration:{{ tool.function.name }}{
{{- argument(tool.function.parameters) }}}<tool|>{% endfor %}<turn|>
{% endif %}{% for m in rest if m.role != 'tool' %}
{%- set again = m.role == 'assistant' and loop.previtem is defined and loop.previtem.role == 'assistant' %}
{%- if not again %}<|turn>{{ 'model' if m.role == 'assistant' else m.role }}
{% endif %}{% if m.reasoning_content %}<|channel>thought
{{ m.reasoning_content }}
<channel|>{% endif %}{% for call in m.tool_calls or [] %}<|tool_call>call:{{ call.function.name }}
{{- argument(call.function.arguments) }}<tool_call|>{% endfor %}
{%- for call in m.tool_calls or [] %}{% for result in rest if result.tool_call_id == call.id %}<|tool_response>response:
{{- call.function.name }}{value:{{ argument(result.content) }}}<tool_response|>{% endfor %}{% endfor %}
{{- m.content | trim }}{% if m.content %}<turn|>
{% endif %}{% endfor %}{% if add_generation_prompt and messages[-1].role != 'tool' %}<|turn>model
{% if not enable_thinking %}<|channel>thought
<channel|>{% endif %}{% endif %}"""

GRANITE = """{% set rest = messages[1:] if messages[0].role == 'system' else messages %}
{%- if tools %}<|start_of_role|>system<|end_of_role|>
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}# Tools
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>
Call: <tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|end_of_text|>
{% elif messages[0].role == 'system' %}<|start_of_role|>system<|end_of_role|>{{ messages[0].content }}<|end_of_text|>
{% else %}<|start_of_role|>system<|end_of_role|>You are a helpful assistant.<|end_of_text|>
{% endif %}{% for m in rest %}
{%- if m.role == 'tool' %}{% if loop.previtem is not defined or loop.previtem.role != 'tool' -%}
<|start_of_role|>user<|end_of_role|>{% endif %}
<tool_response>
{{ m.content }}
</tool_response>{% if loop.last or loop.nextitem.role != 'tool' %}<|end_of_text|>
{% endif %}{% else %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}
{%- for call in m.tool_calls or [] %}{% if m.content or not loop.first %}
{% endif %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|end_of_text|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"""

MINIMAX = """{% set rest = messages %}{% set told = 'Be helpful.' %}{% if messages[0].role == 'system' %}
{%- set told = messages[0].content %}{% set rest = messages[1:] %}{% endif %}]~!b[]~b]system
{{ told }}{% if tools %}

# Tools
<tools>
{% for tool in tools %}<tool>{{ tool.function | tojson }}</tool>
{% endfor %}</tools>

<minimax:tool_call>
<invoke name="tool-name-1">
<parameter name="param-key-1">param-value-1</parameter>
</invoke>
</minimax:tool_call>{% endif %}[e~[
{% set last = namespace(asked=-1, called=false) %}{% for m in rest if m.role == 'user' %}
{%- set last.asked = rest.index(m) %}{% endfor %}{% for m in rest %}{% if m.role == 'assistant' %}]~b]ai
{% if m.reasoning_content is string and loop.index0 > last.asked %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}{% if m.tool_calls %}
<minimax:tool_call>
{% for call in m.tool_calls %}<invoke name="{{ call.function.name }}">
{% if call.function.arguments is mapping %}{% for key, value in call.function.arguments | items -%}
<parameter name="{{ key }}">{{ value if value is string else value | tojson }}</parameter>
{% endfor %}{% endif %}</invoke>
{% endfor %}</minimax:tool_call>{% endif %}[e~[
{% set last.called = m.tool_calls | length > 0 %}{% elif m.role == 'tool' %}
{%- if not last.called %}{{ raise_exception('Message has tool role, but there was no tool call!') }}{% endif %}
{%- if loop.first or loop.previtem.role != 'tool' %}]~b]tool{% endif %}
<response>{{ m.content }}</response>{% if loop.last or loop.nextitem.role != 'tool' %}[e~[
{% endif %}{% else %}]~b]{{ m.role }}
{{ m.content }}[e~[
{% endif %}{% endfor %}{% if add_generation_prompt %}]~b]ai
<think>
{% endif %}"""

BAILING2 = """{% set rest = messages[1:] if messages[0].role == 'system' else messages %}
{%- set thinking = 'on' if enable_thinking else 'off' %}<role>SYSTEM</role>
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif %}{% if tools %}# Tools
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>
Call: <tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>
{% endif %}detailed thinking {{ thinking }}<|role_end|>
{%- for m in rest %}{% if m.role == 'user' -%}
<role>HUMAN</role>{{ m.content }}<|role_end|>{% elif m.role == 'system' -%}
<role>SYSTEM</role>{{ m.content }}<|role_end|>{% elif m.role == 'assistant' -%}
<role>ASSISTANT</role>{% if m.reasoning_content %}
<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|role_end|>{% else %}
{%- if loop.previtem is not defined or loop.previtem.role != 'tool' %}<role>OBSERVATION</role>{% endif %}
<tool_response>
{{ m.content }}
</tool_response>{% if loop.last or loop.nextitem.role != 'tool' %}<|role_end|>{% endif %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"""

KIMI2 = """{% if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}
{%- for m in messages %}{% if loop.first and m.role != 'system' -%}
<|im_system|>system<|im_middle|>You are Kimi.<|im_end|>{% endif %}
{%- if m.role == 'assistant' %}<|im_assistant|>assistant<|im_middle|>{{ m.content }}{% if m.tool_calls -%}
<|tool_calls_section_begin|>{% for call in m.tool_calls %}<|tool_call_begin|>{{ call.id }}
{{- '<|tool_call_argument_begin|>' }}{% if call.function.arguments is string %}{{ call.function.arguments }}
{%- else %}{{ call.function.arguments | tojson }}{% endif %}<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>
{%- endif %}{% elif m.role == 'tool' %}<|im_system|>tool<|im_middle|>## Return of {{ m.tool_call_id }}
{{ m.content }}{% else %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{{ m.content }}{% endif %}<|im_end|>
{%- endfor %}{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"""

FAMILIES = {
    "hermes": HERMES,
    "qwen-coder": QWEN_CODER,
    "mistral": MISTRAL,
    "mistral-args": MISTRAL_ARGS,
    "llama3": LLAMA3,
    "harmony": HARMONY,
    "glm": GLM,
    "deepseek": DEEPSEEK,
    "deepseek-r1": DEEPSEEK_R1,
    "gemma4": GEMMA4,
    "granite": GRANITE,
    "minimax": MINIMAX,
    "bailing2": BAILING2,
}

UNREAD = {"kimi2": KIMI2}
"""Templates that know tools, but whose way to write calls is not read from answers: tools are told in plain words."""

TOOLLESS = {
    "phi": """{% for m in messages %}{% if m.role == 'system' and m.content %}<|system|>
{{ m.content }}<|end|>
{% elif m.role == 'user' %}<|user|>
{{ m.content }}<|end|>
{% elif m.role == 'assistant' %}<|assistant|>
{{ m.content }}<|end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}""",
    "ernie": """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}User: {{ m.content }}
{% elif m.role == 'assistant' %}Assistant: {{ m.content }}{{ eos_token }}{% else %}{{ m.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}""",
    "hunyuan": """{% set rest = messages %}{% set told = '' %}{% if messages[0].role == 'system' %}
{%- set told = messages[0].content + '<|extra_4|>' %}{% set rest = messages[1:] %}{% endif %}
{%- for m in rest %}{% if m.role == 'user' %}<|startoftext|>{{ told if loop.first }}{{ m.content }}<|extra_0|>
{%- if enable_thinking is defined and not enable_thinking %}<think>

</think>
{% endif %}{% elif m.role == 'assistant' %}{{ m.content }}<|eos|>{% endif %}{% endfor %}""",
    "dots": """{% if messages[0].role == 'system' %}<|system|>{{ messages[0].content }}<|endofsystem|>
{%- else %}<|system|>You are a helpful assistant.<|endofsystem|>{% endif %}{% for m in messages %}
{%- if m.role == 'user' %}<|userprompt|>{{ m.content }}<|endofuserprompt|>
{%- elif m.role == 'assistant' %}<|response|>{{ m.content }}<|endofresponse|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|response|>{% endif %}""",
    "mixtral": """{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}
{%- if m.role == 'user' %} [INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}
{%- endif %}{% endfor %}""",
    "chatml": """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "loops over tools": """{% if tools %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}
{%- endif %}{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}""",
    "allocates over calls": """{% for m in messages %}{% if m.tool_calls -%}
{{ 'x'.ljust(6000000000) | length }}{% endif -%}
[{{ m.role }}] {{ m.content }} {% endfor %}""",
    "reads attributes": """{% for m in messages %}{% if m.tool_calls or tools -%}
{{ m.__class__.__mro__[1].x }}{% endif -%}
[{{ m.role }}] {{ m.content }} {% endfor %}""",
}
"""Templates that know no tools, or that take too much when they are given some."""
