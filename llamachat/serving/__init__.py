"""A model behind the OpenAI protocol: what programs on this machine or others talk to."""
