"""OpenAI's HTTP API beside the native one: a facade over the same generation, in the same process."""

from __future__ import annotations

from bucketserve_gateway.openai.facade import OpenAIFacade
from bucketserve_gateway.openai.server import HttpServer

__all__ = ["HttpServer", "OpenAIFacade"]
