"""Messages in, events out: the conversation above one engine."""
