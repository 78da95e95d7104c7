"""The routes that need a model, one router per file. Importing this imports PyTorch."""

from specache.server import chat_completions, completions, messages, model_list, tokenization
from specache.server.responses import response_routes

ROUTERS = (
    chat_completions.router,
    completions.router,
    response_routes.router,
    messages.router,
    model_list.router,
    tokenization.router,
)
