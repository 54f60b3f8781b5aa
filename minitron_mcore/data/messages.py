"""The messages of a conversation, [{"role": ..., "content": ...}, ...]. No torch import."""

from typing import Any

from minitron_mcore.errors import UserError

Message = dict[str, Any]
ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")


def check_messages(messages: object) -> list[Message]:
    """The messages of a conversation.

    Raises:
        UserError: no list, or an empty one; a message without a known role or text.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f'"messages" is {str(messages)[:40]}: write a list of {{"role": ..., "content": ...}}.')
    for number, message in enumerate(messages, 1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in ROLES:
            raise UserError(f"message {number} has the role {str(role)[:40]!r}: write one of {', '.join(ROLES)}.")
        if not isinstance(content, str) or (role == ASSISTANT and not content.strip()):
            raise UserError(f"message {number} ({role}) has the content {str(content)[:40]!r}: write a text.")
    return messages
