"""The harmony format: conversations to tokens with a loss mask, tokens to messages with their defects.

    conversation = conversation_from_chat({"messages": [...]}, date="2025-06-28")
    prompt = render(conversation, completion=True).token_ids
    parsed = parse(completion_ids)

Importing this loads neither openai-harmony nor the vocabulary; the first call that needs them does. Used by training,
the engine's callers and the evaluations. The engine itself never sees text.
"""

from gptoss_infer.harmony.chat import conversation_from_chat
from gptoss_infer.harmony.conversation import Conversation, Message, ReasoningEffort, ResponseFormat, Tool
from gptoss_infer.harmony.parse import DEFECTS, Parsed, ToolCall, parse
from gptoss_infer.harmony.render import Rendered, render, render_answer, training_samples
from gptoss_infer.harmony.vocabulary import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    END_OF_TEXT,
    MESSAGE,
    RETURN,
    START,
    STOP_TOKENS,
    decode,
    encode,
)

__all__ = [
    "CALL",
    "CHANNEL",
    "CONSTRAIN",
    "DEFECTS",
    "END",
    "END_OF_TEXT",
    "MESSAGE",
    "RETURN",
    "START",
    "STOP_TOKENS",
    "Conversation",
    "Message",
    "Parsed",
    "ReasoningEffort",
    "Rendered",
    "ResponseFormat",
    "Tool",
    "ToolCall",
    "conversation_from_chat",
    "decode",
    "encode",
    "parse",
    "render",
    "render_answer",
    "training_samples",
]
