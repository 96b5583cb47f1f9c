"""What can be wrong with a model's chat template."""

from slimoe.offload.errors import SlimoeError


class ChatTemplateError(SlimoeError):
    """The model's chat template refuses the conversation, or cannot be run for it."""


class TemplateLimitError(ChatTemplateError):
    """The model's template takes more time, memory or room than it may have; `limit` says of what."""

    def __init__(self, limit: str) -> None:
        self.limit = limit
        super().__init__(f"The model's chat template takes more than {limit} for these messages, so it was stopped.")


class UnusableTemplateError(ChatTemplateError):
    """The model's template cannot be compiled, so that no chat is possible at all."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"This model cannot chat, for its chat template cannot be used: {reason}. It still completes plain text."
        )
