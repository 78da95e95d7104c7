"""The application: routes, and what stands in front of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from specache.errors import SpeCacheError
from specache.server import health, web_page
from specache.server.app_state import AppState
from specache.server.error_responses import ApiError, answer_api_error, answer_http_error, error_response
from specache.server.keys import KeyRing
from specache.server.request_context import RequestContext
from specache.server.request_log import RequestLog
from specache.server.security import OPEN_TO_ALL, Guard
from specache.server.settings import ServerSettings

if TYPE_CHECKING:
    from specache.engine.service import EngineService
    from specache.server.served_model import ServedModel

WITHOUT_MODEL = OPEN_TO_ALL | {"/metrics", "/v1/status"}  # paths that answer while the model is loaded


class ServerApp:
    """The server as an ASGI application. It answers 503 until `begin_serving`.

        app = ServerApp(ServerSettings())
        app.begin_serving(served, service)

    Importing this does not import PyTorch, so that a server listens before that is done.
    """

    def __init__(self, settings: ServerSettings, keys: KeyRing | None = None) -> None:
        self.state = AppState(settings)
        self._routes = FastAPI(
            openapi_url=None,  # its pages load scripts from elsewhere
            redirect_slashes=False,
            lifespan=self._lifespan,
            exception_handlers={
                ApiError: answer_api_error,
                SpeCacheError: answer_api_error,
                HTTPException: answer_http_error,
                Exception: answer_api_error,  # Starlette's own answer is a plain text; it is raised on to the log
            },
        )
        self._routes.state.server = self.state
        self._routes.include_router(health.router)
        if settings.page:
            self._routes.include_router(web_page.router)
        self._stack: ASGIApp = RequestLog(Guard(self._when_loaded, settings, keys), self.state)

    def begin_serving(self, served: ServedModel, service: EngineService) -> None:
        """Add the routes that need a model, and serve it."""
        from specache.server.model_routes import ROUTERS

        for router in ROUTERS:
            self._routes.include_router(router)
        self.state.begin_serving(served, service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._stack(scope, receive, send)

    async def _when_loaded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the routes. Without a model most are not there yet, which is no 404."""
        scope["root_path"] = root = self.state.settings.root_path
        if scope["type"] == "http" and scope["path"] == root:
            scope["path"] = f"{root}/"  # that of the page, which goes on to there by itself
        if scope["type"] == "http" and self.state.served is None:
            path = scope["path"].removeprefix(root)
            try:
                if path not in WITHOUT_MODEL:
                    self.state.ready()
            except ApiError as error:
                await error_response(error, RequestContext.of(scope))(scope, receive, send)
                return
        await self._routes(scope, receive, send)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self.state.expire_responses()), asyncio.create_task(self.state.history.keep(self.state))]
        yield
        for task in tasks:
            task.cancel()
        self.state.end()
