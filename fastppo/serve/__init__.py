"""A policy as a server that speaks OpenAI's chat completions: what is asked, what is answered, and who samples it."""

from fastppo.serve.desk import Answered, Desk, Speech
from fastppo.serve.request import ChatRequest, RequestError
from fastppo.serve.server import ChatServer
from fastppo.serve.service import ChatService
from fastppo.serve.ticket import Reply, Ticket

__all__ = ["Answered", "ChatRequest", "ChatServer", "ChatService", "Desk", "Reply", "RequestError", "Speech", "Ticket"]
