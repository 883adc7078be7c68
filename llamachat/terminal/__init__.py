"""The only room that knows rich and prompt_toolkit."""
