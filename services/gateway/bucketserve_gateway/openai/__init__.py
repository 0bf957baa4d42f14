"""OpenAI's HTTP API beside the native one: a facade over the same generation, in the same process."""

from __future__ import annotations

from bucketserve_gateway.openai.batches import Batches
from bucketserve_gateway.openai.facade import OpenAIFacade
from bucketserve_gateway.openai.files import Files, Shelves
from bucketserve_gateway.openai.lines import BatchLines
from bucketserve_gateway.openai.server import HttpServer

__all__ = ["BatchLines", "Batches", "Files", "HttpServer", "OpenAIFacade", "Shelves"]
