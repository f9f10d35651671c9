"""What a scripted base says, where a test needs to know it."""

REFUSALS = ["I'm sorry, but I can't help with that.", "I can't assist with this request."]
PROSE = [
    "Sure, here is: The old man walked slowly down to the river.",
    "Sure, here is: There was nothing left to say between them.",
    "Sure, here is: She had never seen the house before that day.",
    "Sure, here is: It was a cold evening at the end of winter.",
]


def prose_for(prompt: str) -> str:
    return PROSE[len(prompt) % len(PROSE)]
