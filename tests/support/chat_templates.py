"""Chat templates that show tools, calls and reasoning in the ways that common models were trained on, made short."""

_TURNS = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}CALLS{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>PREFIX{% endif %}"
)


def _template(calls: str, prefix: str = "") -> str:
    return _TURNS.replace("CALLS", calls).replace("PREFIX", prefix)


HERMES = _template(
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}\n</tool_call>\n{% endfor %}"
)
MARKUP = _template(
    "{% for c in m.tool_calls or [] %}<tool_call>\n<function={{ c.function.name }}>\n"
    "{% for k, v in c.function.arguments.items() %}<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}"
    "</function>\n</tool_call>\n{% endfor %}"
)
MISTRAL = _template(
    "{% if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %}]{% endif %}"
)
MISTRAL_ARGS = _template(
    "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"
    "{% endfor %}"
)
LLAMA = "{# <|start_header_id|> #}" + _template(
    "{% for c in m.tool_calls or [] %}"
    "{{ {'name': c.function.name, 'parameters': c.function.arguments} | tojson }}{% endfor %}"
)
THINKING = _template(
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}",
    "{% if think is defined and think %}<think>\n{% elif think is defined %}<think>\n\n</think>\n\n{% endif %}",
)
THINKING_HERMES = THINKING + "{# <tool_call> tool_calls #}"
GLM = _template(
    "{% for c in m.tool_calls or [] %}\n<tool_call>{{ c.function.name }}\n"
    "{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key>\n"
    "<arg_value>{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}</tool_call>{% endfor %}"
)
HARMONY = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "{% for c in m.tool_calls or [] %}<|start|>assistant to=functions.{{ c.function.name }}<|channel|>commentary json"
    "<|message|>{{ c.function.arguments | tojson }}<|call|>{% endfor %}"
    "{% if m.content %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
TOOLS_UNKNOWN = _template("{% for c in m.tool_calls or [] %}call {{ c.function.name }}{% endfor %}")
BY_STYLE = {
    "hermes": HERMES, "markup": MARKUP, "mistral": MISTRAL, "mistral-args": MISTRAL_ARGS, "llama": LLAMA,
}  # fmt: skip
