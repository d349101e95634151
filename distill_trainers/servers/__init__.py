"""Clients of servers that run elsewhere: over HTTP, and in OpenAI's dialect."""
